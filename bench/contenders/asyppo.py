"""Our ops, in each of their forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import asyppo_kernels
from bench.cases import Case, Inputs, Outputs
from bench.contenders.heads import wants_entropy
from bench.ops import OPS, ensemble_value, linear_logprob, linear_ppo_loss
from bench.ops.agreement_masks import FRACTION
from bench.registry import Absent, Contender, Head, Run, add, need_gpu

Build = Callable[[Case, str], Run]


def _logprob_head(case: Case, backend: str) -> Head:
    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return asyppo_kernels.linear_logprob(
            hidden,
            weight,
            target,
            temperature=float(case.options["temperature"]),
            entropy=wants_entropy(case),
            backend=backend,
        )

    return head


def _linear_logprob(case: Case, backend: str) -> Run:
    return linear_logprob.run_of_head(_logprob_head(case, backend), case, lambda head: head)


def _composed_loss(case: Case, backend: str) -> Run:
    return linear_ppo_loss.run_of_head(_logprob_head(case, backend), case, lambda forward: forward)


def _linear_ppo_loss(case: Case, backend: str) -> Run:
    options = linear_ppo_loss.options_of(case)

    def run(inputs: Inputs) -> Outputs:
        result = asyppo_kernels.linear_ppo_loss(**inputs, **options, backend=backend)
        outputs = {"loss": result.loss.detach(), "logprob": result.logprob, "entropy": result.entropy}
        return outputs | linear_ppo_loss.gradients(result.loss, inputs)

    return run


def _ensemble_value(case: Case, backend: str) -> Run:
    def run(inputs: Inputs) -> Outputs:
        result = asyppo_kernels.ensemble_value(inputs["hidden"], inputs["weight"], inputs["bias"], backend=backend)
        return ensemble_value.outputs_of(case, inputs, *result)

    return run


def _ensemble_gae(case: Case, backend: str) -> Run:
    numbers = {name: float(case.options[name]) for name in ("gamma", "lam", "value_lam")}
    return lambda inputs: asyppo_kernels.ensemble_gae(**inputs, **numbers, backend=backend)._asdict()


def _agreement_masks(case: Case, backend: str) -> Run:
    fractions = {"advantage_fraction": FRACTION, "entropy_fraction": FRACTION}

    def run(inputs: Inputs) -> Outputs:
        result = asyppo_kernels.agreement_masks(**inputs, **fractions, backend=backend)
        return {"advantage_keep": result.advantage_keep, "entropy_keep": result.entropy_keep}

    return run


def _register(op: str, build: Build, accumulates: tuple[str, ...] = (), suffix: str = "") -> None:
    def build_torch(case: Case) -> Run:
        return build(case, "torch")

    def build_triton(case: Case) -> Run:
        _need_triton_form(case, build)
        return build(case, "triton")

    add(op, Contender(f"asyppo{suffix} (triton)", build_triton, accumulates=accumulates))
    add(op, Contender(f"asyppo{suffix} (torch)", build_torch, accumulates=accumulates))


def _need_triton_form(case: Case, build: Build) -> None:
    """Ask the op itself, with few rows, so that a Triton form takes part from the day it is there."""
    module = OPS[case.op]
    small = next(c for c in module.cases("quick", case.device) if c.backward == case.backward)
    try:
        inputs = module.inputs(small, torch.Generator(case.device).manual_seed(0))
        build(small, "triton")(inputs)
    except NotImplementedError as error:
        raise Absent(str(error)) from error
    except Exception:
        if case.device.type == "cuda":  # a fault of the op: let the measured call show it
            return
    need_gpu(case)


_register("linear_ppo_loss", _linear_ppo_loss, ("d_hidden", "d_weight"))
_register("linear_ppo_loss", _composed_loss, ("d_hidden",), suffix=" linear_logprob + loss")
_register("linear_logprob", _linear_logprob, ("d_hidden",))
_register("ensemble_value", _ensemble_value)
_register("ensemble_gae", _ensemble_gae)
_register("agreement_masks", _agreement_masks)

"""How our op takes part: in its torch form anywhere, in its Triton form where there is one and a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Case, Inputs, Run, Scale
from bench.registry import Absent, Contender, add, need_gpu

Build = Callable[[Case, str], Run]  # the backend is the second
Cases = Callable[[Scale, torch.device], list[Case]]
MakeInputs = Callable[[Case, torch.Generator], Inputs]


def add_ours(
    op: str, build: Build, cases: Cases, inputs: MakeInputs, *, accumulates: tuple[str, ...] = (), suffix: str = ""
) -> None:
    """Register both forms of our op. ``cases`` and ``inputs`` are the op's own, by which the Triton form is tried."""

    def build_torch(case: Case) -> Run:
        return build(case, "torch")

    def build_triton(case: Case) -> Run:
        small = next(c for c in cases("quick", case.device) if c.backward == case.backward)
        _need_triton_form(small, build, inputs)
        return build(case, "triton")

    add(op, Contender(f"asyppo{suffix} (triton)", build_triton, accumulates=accumulates))
    add(op, Contender(f"asyppo{suffix} (torch)", build_torch, accumulates=accumulates))


def _need_triton_form(small: Case, build: Build, make_inputs: MakeInputs) -> None:
    """Ask the op itself, with few rows, so that a Triton form takes part from the day it is there."""
    try:
        inputs = make_inputs(small, torch.Generator(small.device).manual_seed(0))
        build(small, "triton")(inputs)
    except NotImplementedError as error:
        raise Absent(str(error)) from error
    except Exception:
        if small.device.type == "cuda":  # a fault of the op: let the measured call show it
            return
    need_gpu(small)

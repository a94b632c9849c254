"""The trainer's whole step: sampling, rewards, and the update on what was sampled."""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Case, Inputs, Outputs, Scale, Sweep, Work
from bench.ops import training
from bench.ops.training import GENERATIONS, GRAPH, SLACK, required  # noqa: F401  (the op's own, too)
from bench.ops.training_forms import Step, add_all
from bench.ops.training_formulas import losses_and_gradients

OP = "train_step"
# Responses B, tokens T of a sequence, those of its prompt among them: few, as sampling takes a pass for each.
BATCH: dict[Scale, tuple[int, int, int]] = {"gpu": (8, 256, 64), "cpu": (8, 96, 32), "quick": (8, 12, 4)}
TARGETS = tuple(training.Target(t.figure, t.of, t.over, None) for t in training.TARGETS)
TARGET_NOTE = "No targets: sampling is the same for all"


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """One batch of prompts. Responses have the longest length there is: the end-of-sequence token cannot be drawn."""
    return training.training_case(OP, scale, device, BATCH[scale])


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """None, as of the update."""
    return []


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """The prompts; token 0, which pads, is in none."""
    shape = (case.sizes["B"] // GENERATIONS, case.sizes["prompt"])
    return {"prompts": torch.randint(1, case.sizes["V"], shape, device=case.device, generator=generator)}


def rows_of(given: Inputs) -> list[dict[str, str]]:
    """Rows of training data: a token is written as its number."""
    return [{"prompt": " ".join(map(str, row))} for row in given["prompts"].tolist()]


def phases(case: Case) -> dict[str, Work]:
    """Those of the update, and sampling: every token of a response reads the weights once."""
    parts = training.phases(case)
    once = parts["old_log_prob"]
    steps = case.sizes["T"] - case.sizes["prompt"]
    return {"gen": Work(once.flops, once.bytes * steps)} | parts


def work(case: Case) -> Work:
    """Of AsyPPO."""
    return training.total(phases(case), "AsyPPO's products and AdamW, and a pass over the weights a sampled token")


class TrainStep(Step):
    """A step that begins with sampling."""

    samples = True

    def prepare(self, inputs: Inputs) -> None:
        """Make the inputs the trainer's training data."""
        from asyppo.rollout.collecting import Rollout

        t = self.trainer
        t.rollout = Rollout(t.sampler, t.tokenizer, t.reward_funcs, rows_of(inputs), t.config, device=t.device)


def _sampled(case: Case, inputs: Inputs) -> Any:
    """The batch the contenders' step samples: same policy, same sampler, same seed."""
    from asyppo.run.progress import Timer
    from asyppo.run.rng import seed_everything

    step = TrainStep(case, "grpo")
    step.prepare(inputs)
    seed_everything(step.trainer.config.seed * 1_000_003 + 1)
    return step.trainer.rollout(1, Timer(case.device)).batch


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The formulas, in ``dtype``, on what the step samples."""
    return losses_and_gradients(case, _sampled(case, inputs), dtype)


add_all(OP, TrainStep)

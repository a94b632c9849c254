"""The trainer's update: everything of a step but sampling, on a batch that is given.

AsyPPO with its critics stacked or one by one, with the fused ops or without; PPO with one critic of the policy's size;
GRPO. All go through ``AsyPPOTrainer.step``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs, Outputs, Scale, Sweep
from bench.ops.training import (  # noqa: F401  (the op's own, too)
    GENERATIONS,
    GRAPH,
    SLACK,
    TARGET_NOTE,
    TARGETS,
    phases,
    required,
    training_case,
    work,
)
from bench.ops.training_forms import Step, add_all
from bench.ops.training_formulas import losses_and_gradients

OP = "update"
# Responses B, tokens T of a sequence, those of its prompt among them.
BATCH: dict[Scale, tuple[int, int, int]] = {"gpu": (8, 2048, 256), "cpu": (8, 128, 32), "quick": (8, 24, 4)}


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """One batch without padding."""
    return training_case(OP, scale, device, BATCH[scale])


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """None: the models' shapes belong together."""
    return []


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Sequences and their scores. Prompts are equal within a group of ``GENERATIONS``."""
    rows, width, prompt, vocabulary = (case.sizes[name] for name in ("B", "T", "prompt", "V"))

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=case.device, generator=generator)

    prompts = integers(vocabulary, rows // GENERATIONS, prompt).repeat_interleave(GENERATIONS, dim=0)
    return {
        "tokens": torch.cat([prompts, integers(vocabulary, rows, width - prompt)], dim=1),
        "score": torch.randn(rows, device=case.device, generator=generator),
    }


def batch_of(case: Case, given: Inputs) -> Any:
    """The trainer's batch of these inputs."""
    from asyppo.data.batch import Batch

    rows, width, prompt = (case.sizes[name] for name in ("B", "T", "prompt"))
    response = width - prompt
    reward = torch.zeros(rows, response, device=case.device)
    reward[:, -1] = given["score"]
    return Batch(
        tokens=given["tokens"],
        prompt_length=torch.full((rows,), prompt, device=case.device),
        response_length=torch.full((rows,), response, device=case.device),
        group=torch.arange(rows, device=case.device) // GENERATIONS,
        reward=reward,
        sampler_logprob=torch.zeros_like(reward),
        truncated=torch.zeros(rows, dtype=torch.bool, device=case.device),
        score=given["score"],
        ignored=torch.zeros(rows, dtype=torch.bool, device=case.device),
    )


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The formulas, in ``dtype``, on the batch that is given."""
    return losses_and_gradients(case, batch_of(case, inputs), dtype)


class Update(Step):
    """A step on a batch that is given."""

    def prepare(self, inputs: Inputs) -> Any:
        """The batch, with its rewards."""
        from asyppo.rewards.computing import Rewards
        from asyppo.rollout.collecting import Sampled

        return Sampled(batch_of(self.case, inputs), Rewards({}, inputs["score"].tolist(), {}))


add_all(OP, Update)

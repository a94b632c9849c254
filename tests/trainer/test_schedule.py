"""Learning rates against transformers' schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from asyppo.algorithm.schedules import learning_rate_factor


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_rates_are_those_of_transformers(kind: Any, warmup: int) -> None:
    """Theirs takes its first step at rate 0 where there is a warm-up; ours starts one step into the rise."""
    total = 10
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate_factor(kind, step, total, warmup) for step in range(1, total + 1)]
    assert ours[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert theirs[:warmup] == pytest.approx([0.0, *ours][:warmup])


def test_by_hand() -> None:
    assert [learning_rate_factor("linear", step, 6, 2) for step in range(1, 7)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert learning_rate_factor("cosine", 4, 6) == pytest.approx(0.5)  # halfway, after three of six


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_run_that_ends_in_its_warm_up(kind: Any) -> None:
    assert [learning_rate_factor(kind, step, 2, 4) for step in (1, 2)] == [0.25, 0.5]

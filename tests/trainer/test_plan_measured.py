"""What ``asyppo plan`` says of each phase of a step, against what was alive in it at the most: what
``bench.gpu_check`` compares on a GPU, with another count of what there was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from bench.planned import CASES, PHASES, SMALL, compared
from tests.trainer.accounting import DEVICE, accounting
from tests.trainer.test_offload import PromptLane, with_a_gpu


@contextmanager
def alive(moves: bool) -> Iterator[Callable[[], Mapping[str, int]]]:
    """As ``bench.planned.Peaks``, by the books."""
    with with_a_gpu(PromptLane) if moves else accounting() as accounts:
        yield lambda: {phase: peak[DEVICE] for phase, peak in accounts.peak.items()}


@pytest.mark.parametrize(
    "name", [name if name == "float32" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_plan_is_within_a_twentieth_of_what_is_alive(name: str) -> None:
    case = CASES[name]
    if "optim" in case.own or "load_in_4bit" in case.policy:
        pytest.importorskip("bitsandbytes")
    torch.set_num_threads(1)
    [row] = compared(SMALL, {name: case}, "cpu", partial(alive, moves="offload" in case.own)).values()
    assert row.keys() == PHASES.keys()
    for phase, (plan, found) in row.items():
        assert plan == pytest.approx(found, rel=0.05), phase

"""One family of each kind of attention goes through; ``python -m tests.families`` takes them all."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families.__main__ import table
from tests.families.through import Outcome, through

# Those of kinds that another test has: rotary with and without windows, tests/trainer/test_families.py.
KINDS = ["gemma2", "gptj", "mpt", "gpt_oss", "deepseek_v3", "diffllama", "mamba2", "qwen3_next", "rwkv"]


@pytest.fixture(scope="module", autouse=True)
def few_collections() -> Iterator[None]:
    """Keep what is there out of garbage collections, which continuous batching asks for often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_kind(name: str, tmp_path: Path) -> None:
    outcomes = through(name, tmp_path)
    faults = [f"{sampler}: {outcome}" for sampler, outcome in outcomes.items() if outcome.fault]
    assert not faults
    assert any(outcome.gap is not None for outcome in outcomes.values())


def test_the_table() -> None:
    found = {
        "qwen3": {"generate": Outcome(gap=2.34e-7), "continuous": Outcome(gap=1e-7)},
        "mamba": {
            "generate": Outcome(gap=0.0),
            "continuous": Outcome(refusal="sampler: got it, needs auto, or one of your own; no"),
            "auto for continuous": Outcome(gap=3e-7),
        },
        "rwkv": {"generate": Outcome(fault="RuntimeError: shapes"), "continuous": Outcome(refusal="no")},
    }
    assert table(found).splitlines()[2:] == [
        "| qwen3 | rotary | 2e-07 | 1e-07 |",
        "| mamba | state space | 0e+00 | refused (1); `auto`: 3e-07 |",
        "| rwkv | recurrent | **RuntimeError: shapes** | refused (1) |",
        "",
        "Why refused:",
        "",
        "1. no",
    ]

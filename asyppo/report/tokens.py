"""Responses as the token view takes them: few bytes a token, read only when one is looked at."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from asyppo.report.figures import plain
from asyppo.report.runs import Run, Sample

MAX_SAMPLES = 1000
"""Most responses of training in the page, and most of evaluation."""
MAX_TOKENS = 1_000_000
"""Most tokens in the page."""
SCALED = ("value", "std", "advantage", "entropy", "log_ratio")
"""What tokens can be coloured by."""


def choose(runs: Sequence[Run]) -> list[tuple[int, Sample]]:
    """Return evenly spaced responses of each run, each with the number of its run, in order of steps."""
    chosen = []
    for r, run in enumerate(runs):
        for split in ("train", "eval", "audit"):
            samples = sorted((s for s in run.samples if s.split == split), key=lambda s: s.step)
            tokens = sum(len(s.tokens or ()) for s in samples)
            share = max(len(samples) / MAX_SAMPLES, tokens / MAX_TOKENS) * len(runs)
            chosen += [(r, s) for s in samples[:: math.ceil(max(share, 1))]]
    return chosen


def index(chosen: Sequence[tuple[int, Sample]]) -> dict[str, list[Any]]:
    """Return what filters and the list of responses need, a column each."""
    samples = [s for _, s in chosen]
    return {
        "run": [r for r, _ in chosen],
        "split": [s.split for s in samples],
        "step": [s.step for s in samples],
        "reward": plain([s.reward for s in samples]),
        "length": [s.length for s in samples],
    }


def pack(sample: Sample) -> dict[str, Any]:
    """Return one response for the page: columns as base64 of little-endian floats, flags as a string of 0 and 1."""
    flags = sample.flags | ({} if sample.policy is None else {"policy": sample.policy})
    return {
        "prompt": sample.prompt,
        "completion": sample.completion,
        "rewards": dict(zip(sample.rewards, plain(list(sample.rewards.values())), strict=True)),
        "truncated": sample.truncated,
        "group": sample.group,
        "tokens": sample.tokens,
        "columns": {name: _floats(column) for name, column in sample.columns.items()},
        "flags": {name: (flags.astype(np.uint8) + ord("0")).tobytes().decode() for name, flags in flags.items()},
        **({"turns": sample.turns} if sample.turns else {}),
    }


def scales(chosen: Sequence[tuple[int, Sample]]) -> dict[str, list[float]]:
    """Return for each quantity of ``SCALED`` that is there the range that holds 98 % of its tokens."""
    out = {}
    for name in SCALED:
        columns = [s.columns[name] for _, s in chosen if name in s.columns]
        values = np.concatenate(columns) if columns else np.zeros(0)
        values = values[np.isfinite(values)]
        if len(values):
            low, high = np.quantile(values.astype(float), [0.01, 0.99]).tolist()
            out[name] = [low, high]
    return out


def _floats(column: np.ndarray) -> str:
    """Half precision has three digits to show, and half the bytes; larger numbers need single precision.

    The page tells them apart by their length.
    """
    finite = column[np.isfinite(column)]
    kind = "<f2" if not len(finite) or np.abs(finite).max() < 60_000 else "<f4"
    return base64.b64encode(np.where(np.isfinite(column), column, math.nan).astype(kind).tobytes()).decode()

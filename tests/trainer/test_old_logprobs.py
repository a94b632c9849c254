"""Steps without a pass for the old log-probs: what they learn, and what they report, is what they would with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asyppo.config.old_logprobs import reads_old_logprobs

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("fields", "readers"),
    [
        ({"beta": 0.1, "delta": 3.0, "policy_loss": "gspo", "num_mini_batches": 4}, []),
        ({"beta": 0.1, "use_kl_in_reward": True}, ["use_kl_in_reward"]),
        (
            {"importance_sampling_clip_max": 2.0, "mask_truncated_completions": True},
            ["importance_sampling_clip_max", "mask_truncated_completions"],
        ),
    ],
)
def test_what_reads_them(tiny_config: Make, fields: dict[str, Any], readers: list[str]) -> None:
    assert reads_old_logprobs(tiny_config(**fields)) == readers

"""The example runs as a script, and its two losses are one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "ppo_loss_in_one_call.py"
NUMBER = r"(-?\d\.\d+(?:e[+-]\d+)?)"


def test_both_losses_and_gradients_agree(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    before, after = (
        float(re.search(rf"^{name} +{NUMBER}$", printed, re.M)[1]) for name in ("loss_before", "loss_after")
    )
    largest, difference = map(float, re.search(rf"gradient {NUMBER}, .* {NUMBER}$", printed, re.M).groups())
    assert abs(before) > 1e-3
    assert after == pytest.approx(before, abs=1e-6)
    assert largest > 1e-3
    assert difference < 1e-5 * largest


def test_every_term_of_the_loss_counts() -> None:
    """No term is too small to be seen missing, and the clip and the mask are not idle."""
    example = runpy.run_path(str(SCRIPT))
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 8, 16), torch.randn(32, 16) / 8
    batch = {
        "target": torch.randint(32, (2, 8)),
        "old_logprob": torch.randn(2, 8) / 2 - 3.5,
        "ref_logprob": torch.randn(2, 8) / 2 - 3.5,
        "advantage": torch.randn(2, 1).expand(2, 8),
        "mask": torch.ones(2, 8).tril(3),
    }
    before, after = example["loss_before"], example["loss_after"]
    loss = before(hidden, weight, batch)
    assert after(hidden, weight, batch) == pytest.approx(loss.item(), rel=1e-5)
    settings = before.__globals__
    for name in ("TEMPERATURE", "CLIP_LOW", "CLIP_HIGH", "ENTROPY_COEF", "KL_COEF"):
        was = settings[name]
        settings[name] = was * 2
        changed = before(hidden, weight, batch)
        assert changed != pytest.approx(loss.item(), rel=1e-4), name
        assert after(hidden, weight, batch) == pytest.approx(changed.item(), rel=1e-5), name
        settings[name] = was

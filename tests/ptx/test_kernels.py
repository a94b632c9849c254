"""The package's compiled kernels in the emulator, in processes of their own, where Triton does not interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = (
    "linear_ppo_loss",
    "linear_logprob",
    "ensemble_value",
    "ensemble_gae",
    "agreement_masks",
    "stacked_rms_norm",
    "stacked_qk_norm_rope",
    "stacked_swiglu",
    "stacked_embedding",
)


def emulate(*arguments: str) -> str:
    """What ``python -m tests.ptx`` prints; an AssertionError with it if something was found."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "kernels"), str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-m", "tests.ptx", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_all_ops_are_clean_and_every_kernel_has_a_case() -> None:
    printed = emulate("check", "--quick", "--no-write")
    assert all(op in printed for op in OPS)


@pytest.mark.slow
def test_a_fault_of_each_kind_is_found() -> None:
    assert "MISSED" not in emulate("faults")


@pytest.mark.slow
def test_each_barrier_left_out_is_found() -> None:
    printed = emulate("mutate", "--quick", "--no-write")
    assert all(f"`{kernel}`" in printed for kernel in ("loss_kernel", "forward_kernel", "rms_norm_backward_kernel"))


@pytest.mark.slow
def test_instructions_an_element_stay_within_their_budgets() -> None:
    printed = emulate("bounds", "--no-write")
    assert "`loss_kernel`, fp32 logits" in printed

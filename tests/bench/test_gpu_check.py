"""What ``bench.gpu_check`` runs on a GPU, as far as Triton's interpreter can."""

from __future__ import annotations

import pytest
import torch

from asyppo_kernels._args import INTERPRETED
from bench import gpu_check

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on CPU, Triton kernels need TRITON_INTERPRET=1")


def test_the_runs_it_repeats() -> None:
    torch.manual_seed(0)
    for run in (
        gpu_check.policy_loss(5, 8, 97, torch.bfloat16, bias=True, softcap=20.0),
        gpu_check.policy_loss(5, 8, 97, torch.float16, compact=False),
        gpu_check.logprob(5, 8, 97, torch.float32, logits_dtype=torch.bfloat16),
        gpu_check.stacked(2, 3, 8, 5, (2, 1, 4)),
    ):
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(run(), run(), strict=True))


def test_without_a_gpu(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().out == "no GPU\n"

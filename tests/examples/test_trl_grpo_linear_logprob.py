"""The example runs. Its numbers against TRL's own are tests/integrations/test_trl.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

trl = pytest.importorskip("trl", reason="trl is not installed")

from asyppo_kernels.integrations import trl as integration  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "trl_grpo_linear_logprob.py"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames what TRL 1.16 calls
def test_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        assert trl.trainer.utils._ChunkedLogProbFunction.__name__ == "LinearLogprobFunction"
    finally:
        integration.disable()
    assert capsys.readouterr().out.count("'grad_norm'") == 3

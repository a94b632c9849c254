"""Every kernel compiled for GPUs that are not here: no spills, within its budgets, 16-byte accesses where needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compiled(*options: str) -> list[dict]:
    """In a process of its own, since Triton does not compile in one that interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "kernels"), str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-m", "bench.aot", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def problems(cases: list[dict]) -> list[str]:
    return [f"{c['op']}, {c['name']}, {c['target']}: {'; '.join(c['problems'])}" for c in cases if c["problems"]]


@pytest.mark.slow
def test_every_kernel_keeps_its_budget_on_every_target() -> None:
    cases = compiled()
    assert {c["target"] for c in cases} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert problems(cases) == []
    rooms = (ROOT / "kernels" / "asyppo_kernels").glob("*/kernels.py")
    kernels = {name for room in rooms for name in re.findall(r"^def (\w+_kernel)\(", room.read_text(), re.MULTILINE)}
    assert kernels <= {c["kernel"] for c in cases}


def test_loss_kernel_compiles_for_hopper() -> None:
    cases = compiled("--op", "linear_ppo_loss", "--target", "sm_90")
    assert cases
    assert problems(cases) == []

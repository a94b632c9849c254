"""Training on several processes: the same as on one. Real processes, gloo on the CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("distributed_rank.py")
# What depends on how rows are cut into micro-batches, and on the clock.
NOT_COMPARED = ("timing_s/", "perf/", "critic/padding_frac")


def launch(processes: int, *arguments: Any, script: str | None = None, **environment: str) -> str:
    """Run a script on so many ranks and return what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [script or str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rank_script() -> ModuleType:
    """The script of a rank, as a module."""
    spec = importlib.util.spec_from_file_location("distributed_rank", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(rank_script: ModuleType) -> dict[str, Any]:
    """Every case on one process that knows nothing of others."""
    return {name: case() for name, case in rank_script.cases(None).items() if name != "collectives"}


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Assert that two runs had the same metrics, masks, signals and weights, up to ``tolerance``, absolute and of the
    largest of a tensor; masks exactly."""
    for step, (a, b) in enumerate(zip(one["rows"], other["rows"], strict=True)):
        names = {name for name in a if not name.startswith(NOT_COMPARED)}
        assert names == {name for name in b if not name.startswith(NOT_COMPARED)}
        for name in names:
            close = math.isclose(a[name], b[name], rel_tol=10 * tolerance, abs_tol=10 * tolerance)
            assert close or (math.isnan(a[name]) and math.isnan(b[name])), (step, name, a[name], b[name])
    for a, b in zip(one["signals"], other["signals"], strict=True):
        for name, value in a.items():
            if value.dtype == torch.bool:
                assert torch.equal(b[name], value), name
            else:
                torch.testing.assert_close(b[name], value, rtol=10 * tolerance, atol=10 * tolerance)
    assert one["weights"].keys() == other["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(
            other["weights"][name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()), msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings"),
    [(1, {}), (2, {}), (4, {}), (4, {"replicate": 2})],
    ids=["1", "2", "4", "2-copies-on-4"],
)
def test_several_processes_train_as_one(
    processes: int, settings: dict[str, Any], alone: dict[str, Any], tmp_path: Path
) -> None:
    launch(processes, tmp_path, ASYPPO_TEST_DISTRIBUTED=json.dumps(settings))
    for name, want in alone.items():
        got = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        same(want, got)

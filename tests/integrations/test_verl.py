"""The ops in verl 0.9.1: its fused head and its GAE, with and without. verl pins an older transformers than ours, so
that this runs in an environment of its own: ``make test-integrations``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

verl = pytest.importorskip("verl", reason="verl is not installed")
import verl_numbers  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402

from asyppo_kernels.integrations import verl as integration  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    integration.disable()


def with_and_without(function: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    theirs = function()
    integration.enable()
    ours = function()
    integration.disable()
    assert theirs.keys() == ours.keys()
    return theirs, ours


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_the_policy_of_a_model_that_verl_patched(entropy_coef: float) -> None:
    theirs, ours = with_and_without(lambda: verl_numbers.policy_step(entropy_coef))
    for name, want in theirs.items():
        scale = want.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours[name], want, atol=1e-5 * scale, rtol=1e-5, msg=name)


def test_in_bfloat16_no_farther_from_float32_than_verl() -> None:
    exact = verl_numbers.policy_step(0.1)
    theirs, ours = with_and_without(lambda: verl_numbers.policy_step(0.1, torch.bfloat16))
    for name in ("log-prob", "entropy", "gradient of the head"):
        assert (ours[name] - exact[name]).norm() <= 1.05 * (theirs[name] - exact[name]).norm(), name


def test_advantages_and_returns() -> None:
    """Equal where the mask is set; 0 elsewhere, where verl's hold what no loss reads."""
    theirs, ours = with_and_without(verl_numbers.advantages)
    mask = verl_numbers.batch()["response_mask"].bool()
    for name in ("advantages", "returns"):
        torch.testing.assert_close(ours[name][mask], theirs[name][mask], atol=1e-5, rtol=1e-5)
    assert (ours["returns"][~mask] == 0).all()


@pytest.mark.parametrize(
    ("variables", "on"),
    [
        ({}, False),
        ({"VERL_USE_EXTERNAL_MODULES": "asyppo_kernels.integrations.verl_plugin"}, True),
        ({"VERL_USE_EXTERNAL_PLUGINS": "asyppo"}, True),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, False),
    ],
    ids=["installed only", "module", "entry point", "no plugins"],
)
def test_verl_loads_it_and_it_says_so(variables: dict[str, str], on: bool) -> None:
    code = "import verl; import verl.trainer.ppo.core_algos as c; print(c.compute_gae_advantage_return.__module__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == ("asyppo_kernels.integrations.verl" if on else core_algos.__name__)
    assert ("asyppo_kernels: on in verl" in done.stderr) == on


def test_another_verl_is_refused_aloud(tmp_path: Path) -> None:
    """verl swallows the error of an entry point."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nreal = m.version\nm.version = lambda n: '0.8.0' if n == 'verl' else real(n)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "import verl"],
        env=os.environ | {"VERL_USE_EXTERNAL_PLUGINS": "asyppo", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert "asyppo_kernels: off in verl: verl: got 0.8.0, needs 0.9.1" in done.stderr

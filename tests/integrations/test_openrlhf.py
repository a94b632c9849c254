"""GAE in OpenRLHF 0.11, with and without the op. OpenRLHF pins other versions of what we need, so that this runs in an
environment of its own: ``make test-integrations``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("openrlhf", reason="openrlhf is not installed")

import openrlhf_numbers

from asyppo_kernels.integrations import _patching
from asyppo_kernels.integrations import openrlhf as integration


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    integration.disable()


def test_advantages_and_returns_are_openrlhfs() -> None:
    theirs = openrlhf_numbers.advantages()
    integration.enable()
    ours = openrlhf_numbers.advantages()
    mask = openrlhf_numbers.batch()["action_mask"]
    for name, want in theirs.items():
        assert want[mask].std() > 0.5
        torch.testing.assert_close(ours[name][mask], want[mask], atol=1e-5, rtol=1e-5)


def test_a_masked_step_inside_a_response_is_skipped() -> None:
    """OpenRLHF takes it for a step of value 0, from which the one before it bootstraps."""
    values, rewards, mask = torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1]])
    maker = openrlhf_numbers.maker(1.0, 0.0)
    theirs, _ = maker.get_advantages_and_returns(values, rewards, mask, 1.0, 0.0)
    integration.enable()
    ours, returns = maker.get_advantages_and_returns(values, rewards, mask, 1.0, 0.0)
    assert theirs.tolist() == [[-1.0, 2.0, -1.0]]
    assert ours.tolist() == [[1.0, 0.0, -1.0]]
    assert returns.tolist() == [[2.0, 0.0, 1.0]]


def test_another_openrlhf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patching, "version", lambda _: "0.10.2")
    with pytest.raises(ImportError, match=r"openrlhf: got 0\.10\.2, needs 0\.11"):
        integration.enable()

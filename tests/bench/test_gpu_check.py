"""What ``bench.gpu_check`` runs on a GPU, as far as Triton's interpreter can."""

from __future__ import annotations

import pytest
import torch

from asyppo_kernels._args import INTERPRETED
from bench import gpu_check
from bench.ops import OPS

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


def test_the_head_is_measured_before_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dict(gpu_check.steps(lambda: 570.0))
    assert list(made)[:3] == ["repeats", "tests", "bench"]
    command = made["bench"]()
    assert command is not None
    ops = [word.removeprefix("--op=") for word in command if word.startswith("--op=")]
    assert ops[:2] == ["linear_ppo_loss", "linear_logprob"]
    assert sorted(ops[-2:]) == ["train_step", "update"]
    assert set(ops) == set(OPS)


@pytest.mark.parametrize(("step", "package"), [("tests", "hypothesis"), ("plan", "transformers")])
def test_what_a_step_needs_is_asked_for(step: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = dict(gpu_check.steps(lambda: 570.0))[step]
    assert make() is not None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    assert make() is None


def test_a_step_that_cannot_start_ends_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = [("first", lambda: ["/no/such/command"]), ("second", lambda: ["true"])]
    monkeypatch.setattr(gpu_check, "steps", lambda left: steps)
    assert gpu_check.main([]) == 1
    printed = capsys.readouterr().out
    assert "first      FAILED ([Errno 2]" in printed
    assert "second     passed" in printed


def test_without_a_gpu(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().out == "no GPU\n"


def test_peaks_of_phases_that_lie_in_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the most there was in it, what was there before apart."""
    pytest.importorskip("transformers")
    from asyppo.run.progress import Timer
    from bench import planned

    most = 0

    def allocate(size: int) -> None:
        nonlocal most
        most = max(most, size)

    def reset() -> None:
        nonlocal most
        most = 100

    fakes = {"memory_allocated": lambda: 100, "max_memory_allocated": lambda: most, "reset_peak_memory_stats": reset}
    for name, fake in {**fakes, "synchronize": lambda: None, "empty_cache": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **kw: ones(*shape, **kw))
    timer = Timer(torch.device("cpu"))
    with planned.peaks_of_the_allocator() as noted:
        allocate(900)
        with timer.phase("step"):
            allocate(300)
            with timer.phase("gen"):
                allocate(200)
            with timer.phase("values"):
                allocate(700)
            allocate(400)
    assert noted() == {"step": 600, "gen": 100, "values": 600}

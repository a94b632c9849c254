"""Weights and moments that lie in the host's memory between their uses: which, when, and that nothing else changes.

The CPU stands in for a GPU (``accounting``): what lies in pinned memory is the host's, what has been moved away must
not be read. Copies end as late as they may.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from asyppo.checkpoint import load_checkpoint
from asyppo.config import AsyPPOConfig, DistributedConfig
from asyppo.distributed.processes import make_mesh, processes
from asyppo.loop import TrainingLoop
from asyppo.models import offload
from asyppo.models.optimizers import make_optimizer
from asyppo.run.directory import open_run
from asyppo.trainer import AsyPPOTrainer
from tests.trainer import distributed_rank
from tests.trainer.accounting import DEVICE, HOST, Accounts, accounting
from tests.trainer.distributed_rank import Scripted, cases, make_config, make_trainer, weights

LOT, SMALLEST = 4096, 64


class Late:
    """A copy that happens when somebody waits for it, or for one after it."""

    def __init__(self, lane: LateLane, pairs: list[tuple[Tensor, Tensor]], after: Late | None):
        self.lane, self.pairs, self.after = lane, pairs, after

    def wait(self) -> None:
        while self in self.lane.queue:
            first = self.lane.queue.pop(0)
            if first.after is not None:
                first.after.wait()
            for target, source in first.pairs:
                target.copy_(source)
            first.pairs = []

    synchronize = wait


class LateLane:
    """What leaves the device is as it was when it was sent, like anything that a stream does in its turn; what arrives
    there is nonsense until somebody has waited."""

    accounts: Accounts
    every: ClassVar[list[LateLane]] = []

    def __init__(self, device: torch.device):
        self.queue: list[Late] = []
        self.every.append(self)

    @classmethod
    def end_all(cls) -> None:
        """Time passes: all copies have happened."""
        for lane in cls.every:
            for copy in lane.queue[-1:]:
                copy.wait()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Any = None) -> Late:
        taken = []
        for target, source in pairs:
            if HOST in self.accounts.where([target]):
                source = source.clone()
            else:
                target.fill_(255)
            taken.append((target, source))
        self.queue.append(Late(self, taken, after))
        return self.queue[-1]


class PromptLane(LateLane):
    """Copies end at once."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Any = None) -> Late:
        for target, source in pairs:
            target.copy_(source)
        return Late(self, [], None)


@contextmanager
def with_a_gpu(lane: type[LateLane] = LateLane) -> Iterator[Accounts]:
    """Inside, the CPU is one, everything moves, and lots are small."""
    with accounting() as accounts, pytest.MonkeyPatch.context() as patch:
        lane.accounts = accounts
        lane.every.clear()
        patch.setattr(offload, "has_own_memory", lambda device: True)
        patch.setattr(offload, "Lane", lane)
        patch.setattr(offload, "SMALLEST", SMALLEST)
        patch.setattr(offload, "LOT_BYTES", LOT)
        yield accounts


def small(**fields: Any) -> AsyPPOConfig:
    few = {"prompts_per_step": 1, "num_mini_batches": 2, "max_tokens_per_micro_batch": 1000, "beta": 0.1}
    return make_config(**few | fields)


def made(config: AsyPPOConfig, **kw: Any) -> AsyPPOTrainer:
    return make_trainer(config, kw.pop("mesh", None), sampler=Scripted(12), dtype=torch.bfloat16, **kw)


def steps(trainer: AsyPPOTrainer, *numbers: int) -> dict[str, Any]:
    return {"rows": [trainer.step(number).metrics for number in numbers], "weights": weights(trainer)}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two runs came to the same bits, up to how long they took."""
    for mine, theirs in zip(one["rows"], other["rows"], strict=True):
        assert mine.keys() == theirs.keys()
        timed = {name for name in mine if name.startswith(("timing", "perf"))}
        # As text, where NaN is NaN.
        assert {k: str(mine[k]) for k in mine.keys() - timed} == {k: str(theirs[k]) for k in mine.keys() - timed}
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


def test_a_step_takes_three_lots_of_moments() -> None:
    """Also where copies end no sooner than somebody waits for them; and what has no gradient stays as it is."""
    torch.manual_seed(0)
    start = [torch.randn(LOT // 16) for _ in range(12)]  # two a lot
    gradients: list[Tensor | None] = [torch.randn_like(x) for x in start]
    gradients[4] = gradients[5] = gradients[8] = None

    def stepped(level: str) -> tuple[list[Tensor], list[int], int]:
        parameters = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
        moved, taken, before = offload.Offload(level, torch.device("cpu"), [], [optimizer]), [], accounts.alive[DEVICE]
        for number in range(3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            alive = accounts.alive[DEVICE]
            with accounts.phase(f"{level} {number}"):
                moved.step(optimizer)
            taken.append(accounts.peak[f"{level} {number}"][DEVICE] - alive)
            optimizer.zero_grad()
            LateLane.end_all()
        return parameters, taken, accounts.alive[DEVICE] - before

    moments = 9 * 2 * start[0].nbytes
    with with_a_gpu() as accounts:
        plain, taken, left = stepped("none")
        assert (max(taken), left // moments) == (moments + 9 * 4, 1)
        got, taken, left = stepped("optimizer")
        assert max(taken) <= 3 * LOT + 9 * 4
        assert left == 9 * 4  # counts of steps
    assert all(map(torch.equal, plain, got))


def test_moments_in_8_bits_move() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 64, 80), torch.randn(3, 64, 80)

    def stepped(level: str) -> list[Tensor]:
        parameters = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = make_optimizer(parameters, "adamw_8bit", learning_rate=0.1, weight_decay=0.1)
        moved = offload.Offload(level, torch.device("cpu"), [], [optimizer])
        for _ in range(3):
            for parameter, own in zip(parameters, gradient, strict=True):
                parameter.grad = own.clone()
            moved.step(optimizer)
            moved.use()
            assert bool(accounts.where(moments_of(optimizer))) is (level == "none")
        return parameters

    with with_a_gpu() as accounts:
        assert all(map(torch.equal, stepped("none"), stepped("optimizer")))


@pytest.mark.parametrize(
    ("level", "sharded"), [("all", True), pytest.param("optimizer", False, marks=pytest.mark.slow)]
)
def test_the_same_bits(level: str, sharded: bool) -> None:
    with processes(DistributedConfig(shard_single=sharded)):
        mesh = make_mesh(DistributedConfig(), torch.device("cpu"))
        plain = steps(made(small(), mesh=mesh), 1, 2)
        with with_a_gpu():
            moved = steps(made(small(offload=level), mesh=mesh), 1, 2)
    assert_same(plain, moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sharded"),
    [
        ("one_by_one", False),
        ("options", True),
        ("monte_carlo", False),
        ("side_made_again", True),
        ("adapters", False),
        ("adapters", True),
    ],
)
def test_the_same_bits_of_all_kinds(case: str, sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with processes(DistributedConfig(shard_single=sharded)):
        mesh = make_mesh(DistributedConfig(), torch.device("cpu"))
        monkeypatch.setattr(distributed_rank, "make_config", small)
        plain = cases(mesh)[case]()
        monkeypatch.setattr(distributed_rank, "make_config", lambda **fields: small(**fields, offload="all"))
        with with_a_gpu():
            moved = cases(mesh)[case]()
    assert_same(plain, moved)


def moments_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if x.dim()]


class Watched:
    """A second step: what was on the device whenever a model computed or an optimizer stepped, and the books."""

    def __init__(self, level: str):
        self.seen: dict[str, set[str]] = {}
        with with_a_gpu(PromptLane) as self.accounts:
            trainer = made(small(offload=level))
            trainer.step(1)
            policy, critics, reference = trainer.policy, trainer.critics, trainer.reference
            assert critics is not None
            assert trainer.critic_optimizer is not None
            optimizers = {"policy": trainer.policy_optimizer, "critics": trainer.critic_optimizer.adamw}
            models = {"policy": policy, "critics": critics, "reference": reference}
            self.things = {name: list(model.parameters()) for name, model in models.items()}
            self.things |= {f"moments of {name}": moments_of(optimizer) for name, optimizer in optimizers.items()}
            for name, tensors in self.things.items():
                self.things[name] = [t for t in tensors if t.nbytes >= SMALLEST]
            self.most = dict.fromkeys(optimizers, 0)
            for name, model in models.items():
                model.register_forward_pre_hook(lambda *_, name=name: self.look(f"{name} computes"))
            for name, optimizer in optimizers.items():
                optimizer.register_step_pre_hook(lambda *_, name=name: self.look(f"{name} steps", name))
            sample = trainer.sampler.sample
            trainer.sampler.sample = lambda *a, **kw: (self.look("sampling"), sample(*a, **kw))[1]
            self.accounts.peak.clear()
            trainer.step(2)
            trainer.offload.recall()
            self.bytes = {name: self.accounts.where(tensors)[DEVICE] for name, tensors in self.things.items()}

    def look(self, event: str, stepping: str | None = None) -> None:
        here = {name: self.accounts.where(tensors)[DEVICE] for name, tensors in self.things.items()}
        self.seen.setdefault(event, set()).update(name for name, size in here.items() if size)
        if stepping is not None:
            self.most[stepping] = max(self.most[stepping], here[f"moments of {stepping}"])


def test_what_lies_where() -> None:
    everything, moved, least = Watched("none"), Watched("optimizer"), Watched("all")
    models = {"policy", "critics", "reference"}
    events = {"sampling": "policy", "policy computes": "policy", "policy steps": "policy"}
    events |= {"reference computes": "reference", "critics computes": "critics", "critics steps": "critics"}
    assert set(everything.seen) == set(events)
    for event, model in events.items():
        moments = {f"moments of {model}"} if "steps" in event else set()
        assert everything.seen[event] == set(everything.things)
        assert moved.seen[event] == models | moments
        assert least.seen[event] == {model} | moments
    # Of moments there are three lots, of the largest parameters that are one on their own.
    assert max(moved.most["policy"], least.most["critics"]) <= 3 * 2 * LOT
    sizes, peak = everything.bytes, everything.accounts.peak
    all_moments = sizes["moments of policy"] + sizes["moments of critics"]
    for phase, others in {"gen": 0, "ref": 0, "update_critic": 3 * 2 * LOT, "update_actor": 3 * 2 * LOT}.items():
        saved = {run: peak[phase][DEVICE] - run.accounts.peak[phase][DEVICE] for run in (moved, least)}
        assert saved[moved] >= all_moments - others
        away = "policy" if phase == "update_critic" else "critics"
        assert saved[least] >= saved[moved] + sizes[away] + (sizes["reference"] if phase != "ref" else 0) - others
    assert least.accounts.peak["step"][HOST] >= sum(sizes.values()) * 0.9


@pytest.mark.parametrize(
    "levels", [["none", "all"], pytest.param(["all", "optimizer", "none"], marks=pytest.mark.slow)]
)
def test_a_run_goes_on_with_another_setting(levels: list[str], tmp_path: Path) -> None:
    straight = steps(made(small()), *range(1, len(levels) + 1))
    rows, saved, last = [], tmp_path, {}
    for step, level in enumerate(levels, start=1):
        config = small(offload=level, output_dir=str(tmp_path), run_name="run", report_to=[], resume=step > 1)
        with with_a_gpu(), open_run(config) as run:
            trainer = made(config)
            if step > 1:
                assert load_checkpoint(saved, trainer.trained())["step"] == step - 1
            run.start(step - 1)
            rows.append(trainer.step(step).metrics)
            saved = TrainingLoop(trainer).save(run, step)
            last = weights(trainer)
    assert_same(straight, {"rows": rows, "weights": last})

"""Contenders can be absent: nothing is imported before one is built, and a peer that is missing is named."""

from __future__ import annotations

import importlib.abc
import subprocess
import sys

import pytest
import torch

from bench.contenders import contenders
from bench.environment import ROOT
from bench.ops import OPS
from bench.registry import Absent
from bench.suite import measure

CPU = torch.device("cpu")
PEERS = ("liger_kernel", "trl", "verl", "cut_cross_entropy", "quack", "torchrl")


class Blocked(importlib.abc.MetaPathFinder):
    """Makes the peers impossible to import."""

    def find_spec(self, name: str, path=None, target=None):
        """Refuse the peers."""
        if name.partition(".")[0] in PEERS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block the peers, also those imported before."""
    for name in list(sys.modules):
        if name.partition(".")[0] in PEERS:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    monkeypatch.setattr("bench.contenders.verl.PathFinder.find_spec", lambda *_: None)


@pytest.mark.usefixtures("without_peers")
@pytest.mark.parametrize("op", OPS)
def test_every_contender_has_an_import_guard(op: str) -> None:
    """Without the peers, plain torch and ours remain, and the others say why they do not."""
    for case in OPS[op].cases("quick", CPU):
        for entry in contenders(op):
            if not any(peer.replace("_kernel", "").replace("_", "-") in entry.name for peer in PEERS):
                continue
            with pytest.raises(Absent, match=r"\w"):
                entry.build(case)


def test_registry_has_the_peers() -> None:
    """Whether they are installed or not."""
    names = {entry.name.split()[0] for op in OPS for entry in contenders(op)}
    assert {"liger", "trl", "verl", "cut-cross-entropy", "quack", "torchrl", "plain", "torch.compile"} <= names
    assert {"sort", "torch.quantile"} <= {entry.name for entry in contenders("agreement_masks")}
    assert all(contenders(op)[0].ours for op in OPS)


def test_importing_the_contenders_imports_no_peer() -> None:
    """A broken peer must not break the suite."""
    code = f"import sys, bench.contenders; print([name for name in {PEERS!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SLOW = ("linear_logprob", "linear_ppo_loss", "critics")


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, marks=[pytest.mark.slow] if op in SLOW else [])
        for op in OPS
        if op not in ("update", "train_step")  # test_training has these
    ],
)
def test_ours_and_plain_torch_are_right(op: str) -> None:
    """In every case that is benchmarked, on tiny shapes."""
    for case in OPS[op].cases("quick", CPU):
        entries = [
            e for e in contenders(op) if e.ours or e.name in ("plain torch", "plain torch loop", "sort", "one by one")
        ]
        rows = measure(case, entries, budget=0.01, min_rounds=1, launches=False)
        bad = {row["contender"]: row["reason"] for row in rows if row["status"] == "failing"}
        assert not bad
        assert sum(row["status"] == "ok" for row in rows) >= 2


def test_triton_forms_take_part_or_say_why() -> None:
    """On a CPU they are absent: not written yet, or in need of a GPU."""
    for op in OPS:
        entry = next(entry for entry in contenders(op) if entry.name == "asyppo (triton)")
        with pytest.raises(Absent, match=r"no Triton form|GPU"):
            entry.build(OPS[op].cases("quick", CPU)[0])

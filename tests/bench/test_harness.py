"""The harness: what is wrong is not timed, what is counted is exact, and the contenders take turns."""

from __future__ import annotations

import math

import pytest
import torch

from bench import errors, memory, suite, timing
from bench.cases import Case, Work, nbytes
from bench.contenders import contenders
from bench.floors import Floors, measure_floors
from bench.ops import OPS, baseline, ensemble_gae, linear_ppo_loss, oracle
from bench.registry import Absent, Contender

CPU = torch.device("cpu")


def quick_case(op: str, index: int = 0) -> Case:
    """One of the op's tiny cases."""
    return OPS[op].cases("quick", CPU)[index]


def planted(name: str, op: str, change) -> Contender:
    """A contender of this name that is right but for ``change``, applied to its outputs."""
    honest = next(entry for entry in contenders(op) if entry.name == "asyppo (torch)")

    def build(case: Case):
        run = honest.build(case)
        return lambda inputs: change(run(inputs))

    return Contender(name, build)


def rows_of(case: Case, *entries: Contender) -> dict[str, dict]:
    """Measure these contenders; rows by name."""
    return {row["contender"]: row for row in suite.measure(case, entries, budget=0.01, min_rounds=2)}


def test_an_oracle_that_raises_fails_its_own_case_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(linear_ppo_loss, "reference", no_memory)
        rows = rows_of(quick_case("linear_ppo_loss"), planted("right", "linear_ppo_loss", lambda outputs: outputs))
    assert rows["right"]["status"] == "failing"
    assert rows["right"]["reason"] == "not judged, since its oracle raises RuntimeError: out of memory"


@pytest.mark.parametrize("op", OPS)
def test_wrong_contender_is_caught_and_not_timed(op: str) -> None:
    """One wrong element in one output is enough."""

    def spoil(outputs):
        name, value = next(iter(outputs.items()))
        value = value.clone()
        flat = value.view(-1)
        flat[:2] = ~flat[:2] if value.dtype == torch.bool else flat[:2] * 1.01 + 0.01
        return outputs | {name: value}

    rows = rows_of(quick_case(op), planted("wrong", op, spoil), planted("right", op, lambda outputs: outputs))
    assert rows["wrong"]["status"] == "failing"
    assert "limit" in rows["wrong"]["reason"]
    assert "seconds" not in rows["wrong"]
    assert rows["right"]["status"] == "ok"
    assert rows["right"]["seconds"]["median"] > 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda outputs: {"loss": outputs["loss"]}, "does not return d_hidden, d_weight"),
        (lambda outputs: outputs | {"d_weight": outputs["d_weight"] * math.nan}, "d_weight: error inf"),
        (lambda outputs: outputs | {"d_hidden": outputs["d_hidden"][1:]}, "d_hidden: error inf"),
    ],
)
def test_missing_nan_and_misshapen_outputs_fail(change, complaint: str) -> None:
    """None of these may pass for a small error."""
    rows = rows_of(quick_case("linear_ppo_loss"), planted("wrong", "linear_ppo_loss", change))
    assert rows["wrong"]["status"] == "failing"
    assert complaint in rows["wrong"]["reason"]


def test_absent_and_raising_contenders_say_why() -> None:
    """Neither stops the others."""

    def absent(case: Case):
        raise Absent("not here")

    def raising(case: Case):
        raise RuntimeError("broken at /home/someone/site-packages/peer/file.py")

    rows = rows_of(quick_case("agreement_masks"), Contender("a", absent), Contender("b", raising))
    assert (rows["a"]["status"], rows["a"]["reason"]) == ("absent", "not here")
    assert rows["b"]["status"] == "failing"
    assert rows["b"]["reason"] == "raises RuntimeError: broken at …/file.py"


def test_out_of_time_is_shown() -> None:
    """After the deadline nothing is run."""
    case = quick_case("ensemble_gae")
    rows = suite.measure(case, contenders(case.op), budget=1.0, deadline=0.0)
    assert {row["status"] for row in rows} == {"skipped"}


@pytest.mark.parametrize("size", [1, 1000, 123_457])
def test_memory_counts_a_known_allocation_exactly(size: int) -> None:
    """Peak is what lives at the worst moment, outputs what is returned."""
    x = torch.ones(size)

    def run():
        first = x.neg()
        second = first.exp()  # both live here: the peak
        del first
        third = second.neg()  # and both of these
        return {"third": third, "view": third[1:]}

    run()
    found = memory.footprint(run, CPU)
    assert found.peak == 2 * nbytes(x)
    assert found.outputs == nbytes(x)  # the view adds none
    assert found.launches == 4  # neg, exp, neg, slice


def test_floor_is_the_larger_of_arithmetic_and_memory() -> None:
    """And the rates are positive."""
    floors = Floors(copy=100.0, matmul={"float32": 10.0})
    assert floors.seconds(Work(flops=50, bytes=100), torch.float32) == 5.0
    assert floors.bound(Work(flops=50, bytes=100), torch.float32) == "arithmetic"
    assert floors.seconds(Work(flops=50, bytes=1000), torch.float32) == 10.0
    assert floors.bound(Work(flops=50, bytes=1000), torch.float32) == "memory"
    measured = measure_floors(CPU, {torch.float32}, "quick")
    assert measured.copy > 0
    assert measured.matmul["float32"] > 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", ["gpu", "cpu", "quick"])
def test_every_case_has_work_and_a_name_of_its_own(op: str, scale) -> None:
    """At every scale, sweeps included."""
    cases = OPS[op].cases(scale, CPU)
    assert len({case.key for case in cases}) == len(cases)
    for case in [*cases, *(case for sweep in OPS[op].sweeps(scale, CPU) for _, case in sweep.cases)]:
        work = OPS[op].work(case)
        assert work.flops > 0
        assert work.bytes > 0


def test_work_counts_live_rows() -> None:
    """Rows without a gradient are in the first product only."""
    case = quick_case("linear_ppo_loss", index=1)
    n, v, h = (case.sizes[name] for name in "NVH")
    live = round(0.8 * n)
    assert linear_ppo_loss.work(case).flops == 2 * v * h * (n + 2 * live)
    assert linear_ppo_loss.inputs(case, torch.Generator().manual_seed(0))["advantage_keep"].sum() == live


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_random_and_differ_between_sets(op: str) -> None:
    """Zeros run faster than real numbers, and equal sets are the cache's."""
    case = quick_case(op)
    first, again, other = (OPS[op].inputs(case, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    for name, value in first.items():
        assert torch.equal(value, again[name])
    large = max(first, key=lambda name: first[name].numel() * first[name].is_floating_point())
    assert not torch.equal(first[large], other[large])
    assert (first[large] != 0).all()


def test_oracle_is_float64_and_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts add up to the definition, computed at once in the case's own dtype."""
    case = quick_case("linear_ppo_loss")
    inputs = OPS[case.op].inputs(case, torch.Generator().manual_seed(0))
    monkeypatch.setattr("bench.ops.policy_head.ROWS", 7)
    want, whole = oracle(case, inputs), baseline(case, inputs)
    assert {value.dtype for value in want.values()} == {torch.float64}
    for name, value in want.items():
        assert errors.error(whole[name], value) < 1e-5


def test_contenders_take_turns() -> None:
    """A slow one sits out rounds, and all are sampled to the end."""
    order: list[str] = []
    samples, failed = timing.interleave(
        {name: lambda name=name: float(order.append(name) is None) for name in "abc"}, 1e-9, min_rounds=3
    )
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[-9:] == list("abcbcacab")
    assert not failed


def test_what_fails_when_timed_is_left_out() -> None:
    """The others are timed on."""

    def broken() -> float:
        raise RuntimeError("out of memory")

    samples, failed = timing.interleave({"broken": broken, "right": lambda: 1.0}, 1e-9, min_rounds=2)
    assert samples == {"right": [1.0, 1.0]}
    assert "out of memory" in str(failed["broken"])


def test_spread_and_rotation() -> None:
    """The fifth and four fifths; sets of inputs that together exceed the cache four times."""
    taken = timing.Timing(tuple(float(x) for x in range(11)), "perf_counter")
    assert (taken.median, *taken.spread()) == (5.0, 2.0, 8.0)
    cache = timing.cache_bytes(CPU)
    assert timing.sets_past_cache(cache, CPU) == 4
    assert timing.sets_past_cache(8 * cache, CPU) == 1
    assert timing.sets_past_cache(1, CPU) == 16


def test_loop_over_time_is_what_its_name_says() -> None:
    """The plain loop is right where steps are masked between valid ones, which its peers leave out."""
    case = quick_case("ensemble_gae", index=2)
    assert case.options["holes"]
    entry = Contender("loop", ensemble_gae.gae_loop)
    assert rows_of(case, entry)["loop"]["status"] == "ok"

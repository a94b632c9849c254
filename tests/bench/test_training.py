"""The update and the training step: contenders agree with the oracle and with each other, and the report shows them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from asyppo.algorithm.ops import FUSED, Ops
from asyppo_kernels import agreement_masks, ensemble_gae, ensemble_value, linear_ppo_loss
from bench import errors, plots, report, suite
from bench.cases import Case
from bench.contenders import contenders
from bench.ops import OPS, baseline, oracle, training, training_forms
from bench.ops.unfused import UNFUSED
from bench.ops.update import Update
from bench.registry import Contender

CPU = torch.device("cpu")
NAMES = ("asyppo (torch)", "one by one", "plain torch, stacked critics", "plain torch", "symmetric PPO", "GRPO")


def case_of(op: str) -> Case:
    """The op's tiny case."""
    return OPS[op].cases("quick", CPU)[0]


@pytest.fixture(scope="module", params=["update", "train_step"])
def measured(request: pytest.FixtureRequest) -> dict:
    """All contenders, measured."""
    session = suite.Session(CPU, quick=True)
    return session.run_case(case_of(request.param))


@pytest.mark.slow
def test_every_contender_is_right(measured: dict) -> None:
    """All but the one for a GPU, each with the phases it has and the memory it holds."""
    rows = {row["contender"]: row for row in measured["rows"]}
    assert {name: rows[name]["reason"] for name in NAMES if rows[name]["status"] != "ok"} == {}
    assert rows["asyppo (triton)"]["status"] == "absent"
    with_critics = {"old_log_prob", "update_critic", "values", "adv", "update_actor"}
    for name in NAMES:
        phases = rows[name]["phases"]
        assert (set(phases) >= with_critics) == (name != "GRPO")
        assert ("gen" in phases) == (measured["op"] == "train_step")
        assert sum(phases.values()) <= 1.5 * rows[name]["seconds"]["median"]
    held = {name: rows[name]["resident_bytes"] for name in NAMES}
    assert held["GRPO"] < held["asyppo (torch)"] == held["plain torch"] < held["symmetric PPO"]


def test_weights_and_optimizer_states_are_counted() -> None:
    """Four bytes a parameter for the weight, and for each of AdamW's two moments."""
    case = case_of("update")
    step = Update(case, "ppo")
    step(OPS[case.op].inputs(case, torch.Generator().manual_seed(0)))
    modules = [step.shared.policy, *step.models]
    parameters = [p for module in modules for p in module.parameters()]
    counters = 4 * len(parameters)  # AdamW's count of steps, of each parameter
    assert step.resident_bytes() == 12 * sum(p.numel() for p in parameters) + counters


def without_mask(*arguments, **options):
    """The loss with a mask forgotten."""
    return linear_ppo_loss(*arguments, **options | {"advantage_keep": torch.ones_like(options["advantage_keep"])})


def scaled(value, reward, mask, **options):
    """GAE with another discount."""
    return ensemble_gae(value, reward, mask, **options | {"gamma": 0.99})


def flipped(std, mask, **options):
    """Masks, the one of the advantage upside down."""
    found = agreement_masks(std, mask, **options)
    return found._replace(advantage_keep=mask & ~found.advantage_keep)


def biased(hidden, weight, bias=None):
    """Values, each a little off."""
    return (found := ensemble_value(hidden, weight, bias))._replace(value=found.value + 0.1)


@pytest.mark.parametrize(
    ("wrong", "outputs", "stacked"),
    [
        (Ops(linear_ppo_loss=without_mask), ["d_policy"], True),
        (Ops(ensemble_gae=scaled), ["d_policy", "vf_loss"], True),
        (Ops(agreement_masks=flipped), ["d_policy"], True),
        (Ops(ensemble_value=biased), ["vf_loss"], True),
        (Ops(ensemble_value=biased), ["vf_loss"], False),
    ],
)
def test_a_wrong_op_is_caught(wrong: Ops, outputs: list[str], stacked: bool) -> None:
    """Inside the trainer, too, and not timed."""
    entry = Contender("wrong", lambda case: Update(case, "asyppo", stacked=stacked, ops=wrong))
    (row,) = suite.measure(case_of("update"), [entry], budget=0.01, min_rounds=1, launches=False)
    assert row["status"] == "failing"
    assert all(f"asyppo {output}" in row["reason"] for output in outputs)
    assert "seconds" not in row


def test_another_algorithm_cannot_pass_for_asyppo() -> None:
    """Its outputs have another name, which AsyPPO's contenders may not do without."""
    (row,) = suite.measure(case_of("update"), [Contender("PPO", lambda case: Update(case, "ppo"))], budget=0.01)
    assert row["status"] == "failing"
    assert "does not return asyppo d_critic" in row["reason"]


def test_weights_after_the_update_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """At rates that move them: fused, unfused, stacked and one by one."""
    case = case_of("update")
    inputs = OPS[case.op].inputs(case, torch.Generator().manual_seed(0))
    quiet = training.config_of

    def moving(case: Case, algorithm: training.Algorithm):
        config = quiet(case, algorithm)
        config.learning_rate = config.critic.learning_rate = 1e-2
        return config

    monkeypatch.setattr(training_forms, "config_of", moving)
    after = []
    for stacked, ops in ((True, FUSED), (False, FUSED), (True, UNFUSED), (False, UNFUSED)):
        monkeypatch.setattr(training_forms, "_SHARED", {})  # models of its own
        step = Update(case, "asyppo", stacked=stacked, ops=ops)
        before = [p.detach().clone() for m in (step.shared.policy, *step.models) for p in m.parameters()]
        step(inputs)
        after.append([p.detach() for m in (step.shared.policy, *step.models) for p in m.parameters()])
        moved = sum(float((a - b).abs().sum()) for a, b in zip(after[-1], before, strict=True))
        assert moved > 1
    for other in after[1:]:
        for want, got in zip(after[0], other, strict=True):
            assert errors.error(got, want) < 1e-3


def test_each_of_the_five_ops_is_replaced() -> None:
    """The plain contenders go through none of ours; two contenders that share a policy do not share their ops."""
    called = []

    def counted(name: str):
        def op(*arguments, **options):
            called.append(name)
            return getattr(UNFUSED, name)(*arguments, **options)

        return op

    names = [field.name for field in dataclasses.fields(Ops)]
    assert not [name for name in names if getattr(UNFUSED, name) is getattr(FUSED, name)]
    case = case_of("update")
    inputs = OPS[case.op].inputs(case, torch.Generator().manual_seed(0))
    for stacked in (True, False):
        plain = Update(case, "asyppo", stacked=stacked, ops=Ops(**{name: counted(name) for name in names}))
        fused = Update(case, "asyppo", stacked=stacked)
        plain(inputs)
        assert set(called) == set(names)
        called.clear()
        fused(inputs)
        assert not called


def test_oracle_is_near_the_same_formulas_in_float32() -> None:
    """And every output it has is one that some contender returns."""
    case = case_of("update")
    inputs = OPS[case.op].inputs(case, torch.Generator().manual_seed(0))
    want, whole = oracle(case, inputs), baseline(case, inputs)
    assert set(want) == set().union(*map(training.answers, training.ALGORITHMS))
    for name, value in want.items():
        assert errors.error(whole[name], value) < 1e-5


@pytest.mark.slow
def test_report_shows_phases_targets_and_what_comes_next(measured: dict, tmp_path) -> None:
    """From the figures alone."""
    case = copy.deepcopy(measured)
    figures = {"asyppo (torch)": (0.006, 100), "symmetric PPO": (0.010, 300), "GRPO": (0.005, 100)}
    for row in case["rows"]:
        seconds, held = figures.get(row["contender"], (0.02, 100))
        if row["status"] == "ok":
            row["seconds"]["median"] = seconds
            row |= {"resident_bytes": held, "peak_bytes": 100}
            row["phases"] = {"update_critic": 0.25 * seconds, "update_actor": 0.75 * seconds}
    case["phase_floors"] = {"update_critic": 0.0, "update_actor": 0.0042}
    page = report.phase_tables(case)
    assert "| **asyppo (torch)** | 1.5 ms | 4.5 ms | 100 B | 200 B |" in page
    target = "at most 0.75" if measured["op"] == "update" else ""
    assert f"| time of asyppo (torch) over symmetric PPO | 0.60 | {target} |" in page
    assert "| memory of asyppo (torch) over symmetric PPO | 0.50 |" in page
    assert "| time of asyppo (torch) over GRPO | 1.20 |" in page
    assert "goes: update_actor 75%, update_critic 25%." in page
    assert "next: update_critic" in page
    assert "at its floor of 0 µs the whole would take 4.5 ms in place of 6 ms" in page
    assert plots._phases([case], "title", tmp_path / "phases.png")
    assert (tmp_path / "phases.png").stat().st_size > 1000


def test_a_case_without_phases_has_no_such_tables() -> None:
    """Nothing but its own table."""
    assert report.phase_tables({"rows": [], "op": "agreement_masks"}) == ""
    assert not plots._phases([{"rows": []}], "title", None)


def test_every_target_names_contenders_there_are() -> None:
    """A misspelt one would not be shown."""
    names = {entry.name for entry in contenders("update")}
    for target in training.TARGETS:
        assert {*target.of, target.over} <= names

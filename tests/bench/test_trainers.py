"""``bench.trainers``: what both trainers are given, a step of each, and the tables."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench.trainers import __main__ as command
from bench.trainers import critics
from bench.trainers.cases import CASES, OURS, OURS_GRPO, PEER, QUICK, endings, rows_of
from bench.trainers.table import case_table, summary


def measured(seconds: float, peak: int, **phases: float) -> dict[str, Any]:
    step = {"whole": seconds, "tokens": 100, **phases}
    return {"steps": [step] * 3, "parameters": {"policy": 10}, "peak_bytes": peak}


def result(ragged: bool = False) -> dict[str, Any]:
    rows = {
        OURS_GRPO: measured(1.0, 2**20, gen=0.25, update_actor=0.5),
        OURS: measured(1.5, 2**21, gen=0.25, values=0.25),
        PEER: measured(2.0, 2**22, gen=1.0),
    }
    return {"cases": [asdict(replace(CASES[0], ragged=ragged)) | {"rows": rows}]}


def test_shares_are_of_trls_and_the_rest_is_in_no_phase() -> None:
    table = case_table(result()["cases"][0])
    assert f"| **{OURS_GRPO}** | 1.00 | 0.50 | 0.70 | 0.25 |  |  |  | 0.50 | 0.25 | 1 MiB | 0.25 |" in table
    assert f"| {PEER} | 2.00 | 1.00 |  | 1.00 |  |  |  |  | 1.00 | 4 MiB | 1.00 |" in table
    assert summary(result()).endswith("| 1.2 million | 0.50 | 0.25 | 0.75 | 0.50 |")


def test_of_ragged_lengths_a_token_is_what_counts() -> None:
    of = result(ragged=True)
    for step in of["cases"][0]["rows"][PEER]["steps"]:
        step["tokens"] = 200
    assert summary(of).endswith("| 1.2 million | 1.00 | 0.25 | 1.50 | 0.50 |")


def test_tables_go_between_their_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    monkeypatch.setattr(command, "PLACES", {path: lambda result: "new"})
    command.write_tables({})
    assert path.read_text() == f"before\n{command.BEGIN}\nnew\n{command.END}\nafter\n"


@pytest.mark.parametrize("case", [QUICK, CASES[0], CASES[-1]], ids=lambda case: case.name)
def test_prompts_have_the_length_they_should_and_end_nothing(case: Any) -> None:
    tokens = [[int(word) for word in row["prompt"].split()] for row in rows_of(case)]
    assert {len(prompt) for prompt in tokens} <= set(range(case.prompt // 8 if case.ragged else case.prompt, 65))
    assert max(map(len, tokens)) <= case.prompt
    assert not {token for prompt in tokens for token in prompt} & {0, *endings(case)}
    assert bool(endings(case)) == case.ragged


@pytest.mark.slow
def test_all_three_take_steps_with_all_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    path = tmp_path / "result.json"
    arguments = ["--case", QUICK.name, "--rounds", "1", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench.trainers", *arguments])
    assert command.main() == 0
    [case] = json.loads(path.read_text())["cases"]
    tokens = QUICK.responses * QUICK.completion
    for name, phases in ((OURS_GRPO, {"gen", "update_actor"}), (OURS, {"values", "update_critic"}), (PEER, {"gen"})):
        [step] = case["rows"][name]["steps"]
        assert step["tokens"] == tokens
        assert all(0 < step[phase] < step["whole"] for phase in phases)
        assert case["rows"][name]["peak_bytes"] > 0


@pytest.mark.slow
def test_critics_of_each_kind_take_their_turns(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["critics", "--case", QUICK.name, "--steps", "2", "--only", "time"])
    assert critics.main() == 0
    table, _, data = capsys.readouterr().out.rpartition("\n{")
    assert [row.split(" | ")[:2] for row in table.splitlines()[4:9]] == [
        [f"| {arm}", against or "–"] for arm, (against, *_) in critics.ARMS.items()
    ]
    assert {arm: len(seconds) for arm, seconds in json.loads("{" + data)["seconds"].items()} == dict.fromkeys(
        critics.ARMS, 2
    )

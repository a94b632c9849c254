"""docs/evidence.md and its second part: their grids load, and their tables are what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml

from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import Outcome
from asyppo.compare.grid import load_grid
from asyppo.config import DataConfig, TaskConfig, WarmStartConfig
from asyppo.data.batch import make_batch
from asyppo.data.sources import load_train_rows
from asyppo.models import warm_start
from asyppo.report.runs import Sample

ROOT = Path(__file__).parents[1]
PAGE, SECOND_PAGE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence-critics.md"
ENVIRONMENTS_PAGE = ROOT / "docs" / "evidence-environments.md"
RESULTS = PAGE.with_suffix("")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def effects() -> ModuleType:
    return module("effects")


@pytest.mark.parametrize("name", ["sweep", "stage1", "stage2", "gcd"])
def test_a_table_is_of_every_run_of_its_grid(name: str) -> None:
    grid = load_grid(RESULTS / f"{name}.yaml")
    accuracy, *_ = (RESULTS / f"{name}.md").read_text().split("\n\n")
    assert accuracy.strip() in PAGE.read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in accuracy.splitlines()[2:]]
    assert [(row[0], int(row[1])) for row in rows] == [(arm, len(grid.seeds)) for arm in grid.arms]


@pytest.mark.parametrize(
    "name", ["critics-sweep", "critics", "critics-confident", "critics-settings", "critics-short", "critics-default"]
)
def test_a_grid_of_the_second_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have runs that are still to come, of which the page says so; a table in it is the one that was written."""
    monkeypatch.chdir(ROOT)  # the oracle is named from there
    grid = load_grid(RESULTS / f"{name}.yaml")
    written = RESULTS / f"{name}.md"
    if written.exists():
        accuracy, *_ = written.read_text().split("\n\n")
        assert accuracy.strip() in SECOND_PAGE.read_text()
        assert {row.split("|")[1].strip() for row in accuracy.splitlines()[2:]} == set(grid.arms)


def test_the_grid_of_optimizers() -> None:
    """Its runs may be still to come."""
    grid = load_grid(RESULTS / "optim.yaml")
    assert [arm["optim"] for arm in grid.arms.values()] == ["adamw", "adamw_8bit"]
    written = RESULTS / "optim.md"
    if written.exists():
        accuracy, *_ = written.read_text().split("\n\n")
        assert accuracy.strip() in (ROOT / "docs" / "running.md").read_text()


def test_what_critics_explain_is_what_was_found() -> None:
    found = json.loads((RESULTS / "explained-long.json").read_text())
    assert module("explained").table(found) in SECOND_PAGE.read_text()
    assert f"explains {found['scores explained by the oracle']:.3f}" in SECOND_PAGE.read_text().replace("\n", " ")


@pytest.mark.parametrize("name", ["stage1", "gcd"])
def test_the_effects_are_those_of_the_runs(name: str, effects: ModuleType) -> None:
    assert effects.table(RESULTS / f"{name}.json") in PAGE.read_text()


def test_the_effects_of_the_second_part_are_of_its_arms(effects: ModuleType) -> None:
    arms = yaml.safe_load((RESULTS / "critics.yaml").read_text())["arms"]
    assert {arm for pair in effects.OF_CRITICS.values() for arms in pair for arm in arms} <= set(arms)


@pytest.mark.slow
def test_the_luck_of_environments(tmp_path: Path) -> None:
    """The grid has every method at every slip probability; what the script says of it, and of what has been run."""
    environments = module("environments")
    grid = load_grid(RESULTS / "environments.yaml")
    assert list(grid.arms) == [f"slip {s}, {m}" for s in ("0", "0.2", "0.4") for m in environments.STYLES]
    for arm, settings in grid.arms.items():
        slip, method = arm.removeprefix("slip ").split(", ")
        algorithm, _, credit = method.partition(" ")
        assert (settings.get("algorithm", "asyppo"), settings["environment_credit"]) == (algorithm, credit or "keep")
        assert settings["environment"]["params"] == {"slip": float(slip)}
    written = RESULTS / "environments.json"
    if written.exists():
        assert environments.table(environments.curves_of(written)) in ENVIRONMENTS_PAGE.read_text()

    # Two moves to the goal, one of them past the pit: by hand.
    known = {"width": 2, "start": [0, 0], "goal": [1, 1], "pits": [[0, 1]]}
    row = {"entry": {"metadata": known}}
    assert environments.best(row, 0.0, 2) == 1.0
    assert environments.best(row, 0.0, 1) == 0.0
    # Down: 0.8 there, 0.1 the pit, 0.1 stays. Right: 0.8 the goal, and else to where it was, or stays.
    assert environments.best(row, 0.2, 2) == pytest.approx(0.8 * 0.8)

    def arm(name: str, *finals: float) -> dict[str, object]:
        curves = [{"seed": s, "steps": [0, 80], "accuracy": [0.5, final]} for s, final in enumerate(finals)]
        return {"name": name, "curves": curves}

    made = [arm("slip 0.2, grpo", 0.7, 0.8), arm("slip 0.2, ppo keep", 0.6, 0.7), arm("slip 0.2, ppo drop", 0.7, 0.8)]
    (tmp_path / "grid.json").write_text(json.dumps(made))
    curves = environments.curves_of(tmp_path / "grid.json")
    lines = environments.table(curves).splitlines()
    assert {"| ppo keep | 0.650 |", "| asyppo keep | – |", "| ppo drop minus ppo keep | +0.100 ± 0.000 |"} <= set(lines)
    environments.draw(curves, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_what_masks_take_of_a_response() -> None:
    masks = module("masks")
    sample = Sample(
        60, "train", "State the final answer to 4 - 1 + 7 =\n", "", 0.0, {}, False, 0, ["3", ",", " 4", "5"]
    )
    sample.columns = {"std": np.array([0.1, 0.2, 0.3, 0.4]), "advantage": np.array([1.0, -1.0, 0.0, 2.0])}
    sample.flags = {"advantage_keep": np.arange(4) > 0, "entropy_keep": np.arange(4) < 3}
    assert masks.right_so_far(sample).tolist() == [True, True, True, False]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in masks.table([sample]).splitlines()[2:]]
    assert rows == [
        ["token 1", "0.250", "0.250", "0.1000", "1.000", "1.000", "0.000"],
        ["token 2", "0.250", "0.250", "0.2000", "0.000", "0.000", "0.000"],
        ["tokens 3 to 4", "0.500", "0.500", "0.3500", "0.000", "0.000", "0.500"],
        ["right so far", "0.750", "0.500", "0.2000", "0.333", "1.000", "0.000"],
        ["a mistake or a guess before it", "0.250", "0.500", "0.4000", "0.000", "0.000", "1.000"],
    ]


def test_arms_without_a_common_seed_have_no_effect(tmp_path: Path, effects: ModuleType) -> None:
    names = {name for there, absent in effects.EFFECTS.values() for name in there + absent}
    arms = [{"name": n, "curves": [{"seed": int(n == "grpo"), "accuracy": [0.5]}]} for n in sorted(names)]
    (tmp_path / "grid.json").write_text(json.dumps(arms))
    with pytest.raises(SystemExit, match=r"grid\.json: got no seed that all of asyppo, grpo have finished"):
        effects.table(tmp_path / "grid.json")


def test_the_oracle_knows_a_mistake_when_it_is_made() -> None:
    oracle = module("oracle")
    task = TaskConfig("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1})
    rows = load_train_rows(DataConfig(task=task, train_size=50), [])
    solve = warm_start.solutions(WarmStartConfig(noise=0.0, guess=0.0))
    tokenizer = warm_start._make_tokenizer(rows, solve)
    prompt = torch.tensor(tokenizer("State the final answer to 4 - 1 + 7 =\n")["input_ids"])
    texts = [f"{total}, <answer>{answer}</answer><eos>" for total, answer in ((3, 10), (3, 11), (4, 11))]
    responses = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    batch = make_batch(
        [prompt] * 3,
        responses,
        [torch.zeros(len(r)) for r in responses],
        [1.0, 0.0, 0.0],
        [False] * 3,
        [0] * 3,
        pad_token_id=0,
        device=torch.device("cpu"),
    )
    [value] = oracle.values(batch, tokenizer)
    alike: dict[bool | None, list[tuple[int, int]]] = {}  # by whether the total is still to write; None: wrong
    for row, text in enumerate(texts):
        written = ""
        for t, token in enumerate(responses[row].tolist()):
            key = "," not in written if texts[0].startswith(written) else None
            alike.setdefault(key, []).append((row, t))
            written += tokenizer.decode([token])
        assert written == text
    for places in alike.values():
        mean = sum(row == 0 for row, _ in places) / len(places)
        assert [float(value[place]) for place in places] == pytest.approx([mean] * len(places))
    assert set(alike) == {True, False, None}
    signal = oracle.oracle.advantage(
        Outcome(batch.reward, batch.mask, batch.learned, batch.group, value[None]), AdvantageOptions()
    )
    assert torch.equal(signal.advantage_keep, batch.mask)

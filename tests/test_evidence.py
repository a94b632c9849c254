"""docs/evidence.md: its grids load, and its tables are what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from asyppo.compare.grid import load_grid

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
RESULTS = PAGE.with_suffix("")


@pytest.fixture(scope="module")
def effects() -> ModuleType:
    spec = importlib.util.spec_from_file_location("effects", RESULTS / "effects.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sweep", "stage1", "stage2", "gcd"])
def test_a_table_is_of_every_run_of_its_grid(name: str) -> None:
    grid = load_grid(RESULTS / f"{name}.yaml")
    accuracy, *_ = (RESULTS / f"{name}.md").read_text().split("\n\n")
    assert accuracy.strip() in PAGE.read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in accuracy.splitlines()[2:]]
    assert [(row[0], int(row[1])) for row in rows] == [(arm, len(grid.seeds)) for arm in grid.arms]


@pytest.mark.parametrize("name", ["stage1", "gcd"])
def test_the_effects_are_those_of_the_runs(name: str, effects: ModuleType) -> None:
    assert effects.table(RESULTS / f"{name}.json") in PAGE.read_text()


def test_arms_without_a_common_seed_have_no_effect(tmp_path: Path, effects: ModuleType) -> None:
    names = {name for there, absent in effects.EFFECTS.values() for name in there + absent}
    arms = [{"name": n, "curves": [{"seed": int(n == "grpo"), "accuracy": [0.5]}]} for n in sorted(names)]
    (tmp_path / "grid.json").write_text(json.dumps(arms))
    with pytest.raises(SystemExit, match=r"grid\.json: got no seed that all of asyppo, grpo have finished"):
        effects.table(tmp_path / "grid.json")

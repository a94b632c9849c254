"""tools/arrows.py: on a small tree with one fault each, every fault is found, and none where there is none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "arrows.py"
TREE = {
    "asyppo/__init__.py": "",
    "asyppo/trainer.py": "from asyppo.algorithm.losses import ppo\nimport asyppo_kernels.masks as masks\n",
    "asyppo/loop.py": "",
    "asyppo/algorithm/__init__.py": "",
    "asyppo/algorithm/losses.py": "",
    "asyppo/data/__init__.py": "",
    "asyppo/data/batch.py": "import torch\n",
    "asyppo/run/__init__.py": "",
    "asyppo/run/rng.py": "",
    # The package collects what its modules offer: no circle, though they run its __init__ first.
    "kernels/asyppo_kernels/__init__.py": "from asyppo_kernels.masks import op\n",
    "kernels/asyppo_kernels/masks/__init__.py": "from .op import masks\n",
    "kernels/asyppo_kernels/masks/op.py": "import torch\n",
    "kernels/asyppo_kernels/masks/triton_form.py": "",
    "bench/suite.py": "from asyppo import trainer\n",
    "tests/test_suite.py": "from bench import suite\n",
}


@pytest.fixture(scope="module")
def arrows() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("arrows", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["arrows"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def planted(root: Path, **changes: str) -> Path:
    """Write the tree; a change's name is a path with "__" for "/", without ".py"."""
    for name, text in (TREE | {f"{k.replace('__', '/')}.py": v for k, v in changes.items()}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_tree_without_fault(arrows: ModuleType, tmp_path: Path) -> None:
    root = planted(tmp_path)
    assert arrows.problems(root) == []
    assert {(a.source, a.target) for a in arrows.arrows(root)} == {
        ("asyppo.trainer", "asyppo.algorithm.losses"),
        ("asyppo.trainer", "asyppo_kernels.masks"),
        ("asyppo_kernels", "asyppo_kernels.masks.op"),
        ("asyppo_kernels.masks", "asyppo_kernels.masks.op"),
        ("bench.suite", "asyppo.trainer"),
        ("tests.test_suite", "bench.suite"),
    }


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"kernels__asyppo_kernels__masks__op": "import asyppo.data.batch\n"},
            "upward: kernels/asyppo_kernels/masks/op.py:1 imports asyppo.data.batch",
        ),
        (
            {"asyppo__algorithm__losses": "def f():\n    from asyppo.data.batch import Batch\n"},
            "upward: asyppo/algorithm/losses.py:2 imports asyppo.data.batch (in a function)",
        ),
        (
            {"asyppo__algorithm__losses": "from ..data import batch\n"},
            "upward: asyppo/algorithm/losses.py:1 imports asyppo.data.batch",
        ),
        (
            {"asyppo__data__batch": "class A:\n    def f(self):\n        import asyppo.loop\n"},
            "upward: asyppo/data/batch.py:3 imports asyppo.loop (in a function)",
        ),
        (
            {"asyppo__data__batch": "import importlib\n\nimportlib.import_module('asyppo.trainer')\n"},
            "upward: asyppo/data/batch.py:3 imports asyppo.trainer",
        ),
        ({"bench__suite": "import tests.test_suite as t\n"}, "upward: bench/suite.py:1 imports tests.test_suite"),
        ({"asyppo__novelty": ""}, "asyppo.novelty has no place in the order of arrows.py"),
    ],
)
def test_one_fault_is_named_with_its_line(
    arrows: ModuleType, tmp_path: Path, changes: dict[str, str], fault: str
) -> None:
    assert fault in arrows.problems(planted(tmp_path, **changes))


def test_a_circle_of_files_in_one_room(arrows: ModuleType, tmp_path: Path) -> None:
    """Also where a name is put together: the f-string can name the module."""
    root = planted(
        tmp_path,
        kernels__asyppo_kernels__masks__op="def f(form):\n    import_module(f'asyppo_kernels.masks.{form}_form')\n",
        kernels__asyppo_kernels__masks__triton_form="from asyppo_kernels.masks import op\n",
    )
    (fault,) = arrows.problems(root)
    assert fault.splitlines() == [
        "circle of 2 files: asyppo_kernels.masks.op, asyppo_kernels.masks.triton_form",
        "    kernels/asyppo_kernels/masks/op.py:2 imports asyppo_kernels.masks.triton_form (in a function)",
        "    kernels/asyppo_kernels/masks/triton_form.py:1 imports asyppo_kernels.masks.op",
    ]


def test_a_circle_of_rooms_on_one_line(arrows: ModuleType, tmp_path: Path) -> None:
    """No file reaches itself, but neither room can be understood without the other."""
    root = planted(
        tmp_path,
        asyppo__data__batch="from asyppo.run import rng\n",
        asyppo__run__signals="import asyppo.data.prompts\n",
        asyppo__data__prompts="",
    )
    (fault,) = arrows.problems(root)
    assert fault.splitlines()[0] == "circle of 2 rooms: data, run"
    assert len(fault.splitlines()) == 3


def test_what_only_type_checkers_follow_does_not_count(tmp_path: Path) -> None:
    """It is shown; what really runs gives the exit status."""
    checked = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from asyppo.trainer import T\n"
    root = planted(tmp_path, asyppo__data__batch=checked)
    command = [sys.executable, str(SCRIPT), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = "upward, but never run: asyppo/data/batch.py:4 imports asyppo.trainer (for type checkers)\n"
    assert done.stdout == shown + f"{len(TREE)} files, 7 arrows, 0 faults\n"
    planted(tmp_path, asyppo__data__batch=checked + "else:\n    import asyppo.trainer\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "upward: asyppo/data/batch.py:6 imports asyppo.trainer\n" in done.stdout

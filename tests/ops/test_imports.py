"""The ops need torch and triton, and nothing else."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(importlib.util.find_spec("asyppo_kernels").origin).parent

WITH_NOTHING_ELSE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
import torch
import asyppo_kernels

hidden = torch.randn(3, 4, requires_grad=True)
row = torch.ones(3)
out = asyppo_kernels.linear_ppo_loss(hidden, torch.randn(5, 4), torch.arange(3), -row, row, row)
out.loss.backward()
assert hidden.grad.isfinite().all()
assert not {blocked} & {{name.split(".")[0] for name in sys.modules}}
"""


def test_imports_and_runs_with_everything_else_blocked() -> None:
    blocked = {"asyppo", "transformers", "tokenizers", "safetensors", "liger_kernel", "reasoning_gym", "jsonargparse"}
    blocked |= {"matplotlib", "rich", "kernels"}
    subprocess.run(
        [sys.executable, "-c", WITH_NOTHING_ELSE.format(blocked=blocked)],
        check=True,
        env={"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "PATH": ""},
        timeout=120,
    )


def test_source_imports_only_torch_triton_and_itself() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert files
    for file in files:
        allowed = set(sys.stdlib_module_names) | {"torch", "triton", "asyppo_kernels"}
        if file.parent.name == "integrations":  # the trainer that the module is for, and what that needs
            allowed |= {file.stem.partition("_")[0]} | ({"transformers"} if file.stem == "verl_critics" else set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.split(".")[0] in allowed, f"{file} imports {name}"


def test_a_definition_does_not_import_what_it_judges() -> None:
    files = list(PACKAGE.glob("*/reference.py"))
    assert files
    for file in files:
        imported = {node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)}
        judged = {name for name in imported if name and name.endswith((".op", "_form", "kernels"))}
        assert not judged, f"{file} imports {judged}"


def test_every_op_and_its_result_is_exported() -> None:
    import asyppo_kernels

    rooms = {path.parent.name for path in PACKAGE.glob("*/op.py")}
    assert rooms <= set(asyppo_kernels.__all__)
    for name in asyppo_kernels.__all__:
        assert callable(getattr(asyppo_kernels, name))
        assert getattr(asyppo_kernels, name).__doc__

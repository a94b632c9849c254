"""Every Python block of the READMEs runs as it stands, on a CPU and within seconds."""

from __future__ import annotations

import importlib.util
import re
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
READMES = [path for path in (ROOT / "README.md", ROOT / "kernels" / "README.md") if path.exists()]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.M | re.S)


def blocks() -> list[pytest.param]:
    found = []
    for path in READMES:
        text, name = path.read_text(), path.relative_to(ROOT)
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            found.append(pytest.param(path, "\n" * line + match[1], id=f"{name}:{line + 1}"))
    return found


@pytest.mark.parametrize(("path", "source"), blocks())
def test_block_runs(path: Path, source: str) -> None:
    torch.manual_seed(0)
    start = time.process_time()
    # The lines before the block are there as empty ones, so that a traceback names the README's own.
    exec(compile(source, path, "exec"), {"__name__": "__main__"})
    assert time.process_time() - start < 20


def test_no_block_is_missed() -> None:
    fences = sum(len(re.findall(r"^\s*```py", path.read_text(), re.M)) for path in READMES)
    assert fences == len(blocks()) > 0


def test_the_table_of_settings_is_that_of_the_dataclasses() -> None:
    spec = importlib.util.spec_from_file_location("configuration_table", ROOT / "docs" / "configuration_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.README.read_text()
    assert script.with_table(text) == text, "run python docs/configuration_table.py"
    assert "| `warm_start.policy.hidden_size` | `128` | Width. |" in text


def test_every_op_has_a_block() -> None:
    import asyppo_kernels

    text = (ROOT / "kernels" / "README.md").read_text()
    ops = [name for name in asyppo_kernels.__all__ if name.islower()]
    assert ops
    for name in ops:
        assert f"\n## {name}\n" in text
        assert any(re.search(rf"\b{name}\(", match[1]) for match in BLOCK.finditer(text)), name

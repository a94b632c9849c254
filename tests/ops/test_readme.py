"""The snippets of kernels/README.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "kernels" / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: re.findall(r"import (\w+)\n", s)[-1])
def test_snippet_runs(snippet: str) -> None:
    exec(compile(snippet, str(README), "exec"), {})


def test_every_op_has_one() -> None:
    import asyppo_kernels

    ops = [name for name in asyppo_kernels.__all__ if name.islower()]
    assert ops
    for name in ops:
        assert any(re.search(rf"\b{name}\(", snippet) for snippet in SNIPPETS), name
        assert f"\n## {name}\n" in README.read_text()

"""Every Python block of the READMEs and of docs/settings.md runs as it stands, on a CPU and within seconds."""

from __future__ import annotations

import importlib.util
import re
import shlex
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "docs" / "settings.md"
READMES = [ROOT / "README.md", ROOT / "kernels" / "README.md", SETTINGS]
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
    assert script.PAGE == SETTINGS
    text = SETTINGS.read_text()
    assert script.with_table(text) == text, "run python docs/configuration_table.py"
    assert "| `warm_start.policy.hidden_size` | `128` | Width. (an integer of at least 1) |" in text
    assert "| `eval.every` ↻ | `0` | " in text
    assert "| `seed` | `0` | " in text


def test_the_settings_page_says_how_settings_are_given(tmp_path: Path) -> None:
    from asyppo.cli.main import parse
    from asyppo.config.files import READY_CONFIGS

    text = SETTINGS.read_text()
    [file] = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    (tmp_path / "my.yaml").write_text(file)
    [command] = re.findall(r"^asyppo (.*)$", text, re.M)
    config = parse(shlex.split(command.replace("my.yaml", str(tmp_path / "my.yaml"))))
    assert (config.critic.model_name_or_path, config.critic.num_critics) == ("Qwen/Qwen3-1.7B", 4)
    assert config.reward_funcs == ["math_verify"]
    assert config.policy.gradient_checkpointing
    assert all(f"`{name}`" in text for name in READY_CONFIGS)


def test_every_op_has_a_block() -> None:
    import asyppo_kernels

    text = (ROOT / "kernels" / "README.md").read_text()
    ops = [name for name in asyppo_kernels.__all__ if name.islower()]
    assert ops
    for name in ops:
        assert f"\n## {name}\n" in text
        assert any(re.search(rf"\b{name}\(", match[1]) for match in BLOCK.finditer(text)), name

"""The pages hold: their Python runs, their links lead somewhere, their tables are what their scripts write."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "bench/README.md")),
    ROOT / "bench" / "results" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^ *(`{3,})[^`\n]*\n.*?^ *\1$", re.M | re.S)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def script(name: str) -> ModuleType:
    """Import a script of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def blocks() -> list[pytest.param]:
    found = []
    for path in PAGES:
        text, name = path.read_text(), path.relative_to(ROOT)
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            found.append(pytest.param(path, "\n" * line + match[1], id=f"{name}:{line + 1}"))
    return found


@pytest.fixture
def models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory that has small models, which read characters, at the names that pages load from the hub."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+= "])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    for name in {match for path in PAGES for match in re.findall(r'"(Qwen/[\w.-]+)"', path.read_text())}:
        config = Qwen3Config(
            vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, intermediate_size=32, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("path", "source"), blocks())
@pytest.mark.usefixtures("models_by_name")
def test_block_runs(path: Path, source: str) -> None:
    """As it stands, on a CPU and within seconds."""
    torch.manual_seed(0)
    start = time.process_time()
    # The lines before the block are there as empty ones, so that a traceback names the page's own.
    exec(compile(source, path, "exec"), {"__name__": "__main__"})
    assert time.process_time() - start < 20


def test_no_block_is_missed() -> None:
    fences = sum(len(re.findall(r"^\s*```py", path.read_text(), re.M)) for path in PAGES)
    assert fences == len(blocks()) > 0
    assert sum(param.values[0] == ROOT / "README.md" for param in blocks()) == 2  # the ops, and the trainer


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    for source in BLOCK.findall("\n".join(lines)):
        assert len(re.findall(r"^[^\n#]", source, re.M)) <= 10  # with the imports


def anchors(path: Path) -> set[str]:
    """The anchors of a page: those that GitHub makes of its headings, and the objects that the site shows."""
    text = FENCE.sub("", path.read_text())
    found: set[str] = set(re.findall(r"^::: (\S+)$", text, re.M))
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def relative_links(path: Path) -> Iterator[str]:
    text = CODE.sub("", FENCE.sub("", path.read_text()))
    return (target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in relative_links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_relative_to(ROOT), f"{path.name}: {link} leaves the repository"
        assert target.is_file(), f"{path.name}: {link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}: {target.name} has no such heading"


def test_links_are_found() -> None:
    assert sum(len(list(relative_links(path))) for path in PAGES) > 50


def test_every_page_of_the_documentation_is_linked_from_the_readme() -> None:
    linked = set(relative_links(ROOT / "README.md"))
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in linked


def test_the_tables_of_settings_are_those_of_the_dataclasses() -> None:
    table = script("configuration_table")
    assert table.PAGE == ROOT / "docs" / "settings.md"
    text = table.PAGE.read_text()
    assert table.with_table(text) == text, "run python docs/configuration_table.py"
    assert "| `warm_start.policy.hidden_size` | `128` | Width. (an integer of at least 1) |" in text
    assert "| `eval.every` ↻ | `0` | " in text
    assert "| `seed` | `0` | " in text


def test_the_settings_page_says_how_settings_are_given(tmp_path: Path) -> None:
    from asyppo.cli.main import parse
    from asyppo.config.files import READY_CONFIGS

    text = (ROOT / "docs" / "settings.md").read_text()
    [file] = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    (tmp_path / "my.yaml").write_text(file)
    [command] = re.findall(r"^asyppo (.*)$", text, re.M)
    config = parse(shlex.split(command.replace("my.yaml", str(tmp_path / "my.yaml"))))
    assert (config.critic.model_name_or_path, config.critic.num_critics) == ("Qwen/Qwen3-1.7B", 4)
    assert config.reward_funcs == ["math_verify"]
    assert config.policy.gradient_checkpointing
    assert all(f"`{name}`" in text for name in READY_CONFIGS)


def test_the_picture_of_the_step_is_that_of_its_script() -> None:
    drawn = script("step_picture")
    assert drawn.PICTURE.read_text() == drawn.picture(), "run python docs/step_picture.py"


def test_the_readme_says_what_the_benchmarks_say() -> None:
    """The step's times on a CPU, against PPO with a critic of the policy's size and against GRPO."""
    [path] = (ROOT / "bench" / "results").glob("*e965d43-train-step.json")
    [case] = json.loads(path.read_text())["cases"]
    time_of = {row["contender"]: row["seconds"]["median"] for row in case["rows"] if row["status"] == "ok"}
    readme = " ".join((ROOT / "README.md").read_text().split())
    to_ppo, to_grpo = (time_of["asyppo (torch)"] / time_of[other] for other in ("symmetric PPO", "GRPO"))
    assert f"takes {to_ppo:.2f} of the time of PPO" in readme
    assert f"and {to_grpo:.2f} of GRPO's" in readme


def test_every_op_has_a_block() -> None:
    import asyppo_kernels

    text = (ROOT / "kernels" / "README.md").read_text()
    ops = [name for name in asyppo_kernels.__all__ if name.islower()]
    assert ops
    for name in ops:
        assert f"\n## {name}\n" in text
        assert any(re.search(rf"\b{name}\(", match[1]) for match in BLOCK.finditer(text)), name


def test_everything_public_is_in_the_api() -> None:
    import asyppo
    import asyppo_kernels

    ops = (ROOT / "docs" / "api" / "ops.md").read_text()
    for name in asyppo_kernels.__all__:
        assert re.search(rf"^::: asyppo_kernels\.(\w+\.)*{name}$", ops, re.M), name
    trainer = (ROOT / "docs" / "api" / "trainer.md").read_text()
    for name in asyppo.__all__:
        if not name.startswith("__"):
            assert re.search(rf"^::: asyppo\.(\w+\.)*{name}$", trainer, re.M), name

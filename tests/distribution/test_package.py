"""What a user installs: the wheel in an environment that has torch, triton and numpy and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from asyppo import extras

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://example.org/owner/asyppo"
BARE = ("torch", "triton", "numpy")

ADVICE = r"not installed: datasets, .*transformers\. They come with pip install 'asyppo\[train\]'\n"
USE = """
import torch, asyppo_kernels
hidden = torch.randn(3, 4, requires_grad=True)
row = torch.ones(3)
asyppo_kernels.linear_ppo_loss(hidden, torch.randn(5, 4), torch.arange(3), -row, row, row).loss.backward()
assert hidden.grad.isfinite().all()
assert "site-packages" in asyppo_kernels.__file__
try:
    from asyppo import AsyPPOTrainer
except ImportError as error:
    print(error)
"""


def needed(names: tuple[str, ...]) -> dict[str, object]:
    """The distributions that these need, themselves included, as far as they are installed."""
    found: dict[str, object] = {}
    todo = list(names)
    while todo:
        name = re.match(r"[\w.-]+", todo.pop())[0].lower().replace("_", "-")
        try:
            found[name] = distribution(name) if name not in found else found[name]
        except PackageNotFoundError:
            continue
        todo += [r for r in found[name].requires or [] if "extra" not in r and re.match(r"[\w.-]+", r)[0] not in found]
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the source distribution, and the wheel that is built of it."""
    for tool in ("build", "twine", "hatchling"):
        pytest.importorskip(tool)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, env=os.environ | {"ASYPPO_REPOSITORY": REPOSITORY}, capture_output=True)
    return out


@pytest.fixture(scope="module")
def bare(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel and what its base dependencies bring."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for each in needed(BARE).values():
        for top in {file.parts[0] for file in each.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(each.locate_file(top))
    [wheel] = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return folder / "bin"


def run(bare: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the bare environment, outside the repository."""
    clean = {"PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(bare / command[0]), *command[1:]], cwd=bare, env=clean, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_wheel_works_where_there_is_only_torch(bare: Path) -> None:
    done = run(bare, "python", "-c", USE)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"asyppo\.AsyPPOTrainer: " + ADVICE, done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("command", [("asyppo", "train"), ("python", "-m", "asyppo", "--help")], ids=" ".join)
def test_the_command_says_what_to_install(bare: Path, command: tuple[str, ...]) -> None:
    done = run(bare, *command)
    assert done.returncode == 2
    assert re.fullmatch("asyppo: error: " + ADVICE, done.stderr)


@pytest.mark.slow
def test_the_package_index_would_take_it(built: Path) -> None:
    files = [str(path) for path in built.iterdir()]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel], [source] = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        assert {"asyppo/py.typed", "asyppo_kernels/py.typed"} <= set(archive.namelist())
        [name] = [name for name in archive.namelist() if name.endswith("METADATA")]
        text = archive.read(name).decode()
    assert f"Project-URL: Changelog, {REPOSITORY}/blob/v" in text
    readme = text.partition("\n\n")[2]
    assert re.findall(r"!\[[^\]]*\]\((.*?)\)", readme)
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)\s]+)\)", readme))
    for version in re.findall(r"Python :: (3\.\d+)\n", text):
        assert f'python="{version}"' in (ROOT / "tests" / "versions.py").read_text() or version == "3.11"
    with tarfile.open(source) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"asyppo", "kernels", "tests", "hatch_build.py", "CHANGELOG.md"} <= tops
    assert not tops & {".cache", ".venv", "build", "runs"}


def test_missing_requirements_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2",
        'no-such-thing>=1; extra == "train"',
        'pytest>=1; extra == "train"',
        'nor-this; extra == "dev"',
    ]
    monkeypatch.setattr(extras, "requires", lambda _: lines)
    assert extras.advice("train") == "not installed: no-such-thing. They come with pip install 'asyppo[train]'"
    assert extras.advice("tasks") == ""

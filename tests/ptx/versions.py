"""Every minor version of Triton from 3.6 to the newest: the ahead-of-time budgets, and the quick cases in the emulator.

Each version is installed beside the others, under ``.cache/triton``, and stands before the environment's own on the
path of a process; torch and numpy are those of the environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "triton"
OLDEST = (3, 6)  # as pyproject.toml has it


@dataclass(frozen=True)
class Verdict:
    """Of one version: how many cases of each kind there are, and what is wrong with those that fail."""

    minor: str
    version: str
    compiled: int
    exceptions: tuple[str, ...]  # within a budget of this version's own
    over_budget: tuple[str, ...]
    emulated: int
    unclean: tuple[str, ...]


def minor_versions() -> list[str]:
    """``3.6`` and so on, as the package index has them. Raises RuntimeError where it cannot be asked."""
    command = [sys.executable, "-m", "pip", "index", "versions", "triton"]
    done = subprocess.run(command, capture_output=True, text=True)
    listed = re.search(r"Available versions: (.*)", done.stdout)
    if not listed:
        raise RuntimeError(f"triton's versions cannot be listed: {done.stderr.strip()}")
    minors = {tuple(int(part) for part in version.split(".")[:2]) for version in listed[1].split(", ")}
    return [".".join(str(part) for part in minor) for minor in sorted(minors) if minor >= OLDEST]


def install(version: str) -> Path:
    """The folder that holds the newest release of a minor version; installed once."""
    folder = CACHE / version
    if not (folder / "triton").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            f"triton=={version}.*",
        ]
        subprocess.run(command, check=True)
    return folder


def judge(version: str) -> Verdict:
    """Compile and run everything with one version."""
    folder = install(version)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT / "kernels"), str(ROOT)])

    def run(*module: str) -> str:
        done = subprocess.run([sys.executable, *module], cwd=ROOT, env=environment, capture_output=True, text=True)
        if not done.stdout:
            raise RuntimeError(f"Triton {version}: {' '.join(module)} failed: {done.stderr[-2000:]}")
        return done.stdout

    exact = run("-c", "import triton; print(triton.__version__)").strip()
    if not exact.startswith(f"{version}."):
        raise RuntimeError(f"triton {version} was asked for, {exact} was imported")
    compiled = json.loads(run("-m", "bench.aot", "--json"))
    over = [f"{_case(c)}: {'; '.join(c['problems'])}" for c in compiled if c["problems"]]
    exceptions = [f"{_case(c)}: {c['exception']}" for c in compiled if c["exception"]]
    checked = run("-m", "tests.ptx", "check", "--quick", "--no-write").splitlines()
    cases = [line for line in checked if line.startswith(("clean", "PROBLEM"))]
    unclean = [re.sub(r"\s+", " ", line.split(" error ")[0]) for line in cases if line.startswith("PROBLEM")]
    unclean += [line for line in checked if line.startswith("kernels that no case reaches")]
    return Verdict(version, exact, len(compiled), tuple(exceptions), tuple(over), len(cases), tuple(unclean))


def _case(compiled: dict[str, Any]) -> str:
    return f"`{compiled['op']}`, {compiled['name']}, {compiled['target']}"


def judge_all(chosen: list[str]) -> Iterator[Verdict]:
    """Of the minor versions named, or of all."""
    for version in chosen or minor_versions():
        yield judge(version)


def table(verdicts: list[Verdict]) -> str:
    """Markdown: a row per version."""
    lines = [
        "| Triton | release | compiled ahead of time, within budget | in the emulator, clean | budgets of its own | "
        "what fails |",
        "|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        within, clean = v.compiled - len(v.over_budget), v.emulated - len(v.unclean)
        failing = "; ".join((*v.over_budget, *v.unclean)) or "nothing"
        own = "; ".join(v.exceptions) or "none"
        lines.append(
            f"| {v.minor} | {v.version} | {within} of {v.compiled} | {clean} of {v.emulated} | {own} | {failing} |"
        )
    return "\n".join(lines)

"""``python -m tests.versions``: the fast tests and the ahead-of-time table, with the oldest and the newest versions.

    list            the sets, and the versions that each has where it is installed
    run SET         all of one set, or ``--part`` of it
    shard COMMIT    one part of one set, chosen by the commit; minutes
    all             every set, then ``table``
    table           the table of CONTRIBUTING.md, of what each part of each set came to last

What ``pyproject.toml`` allows is what is tested: the oldest version of a requirement is the last patch of its lower
bound. An environment is made once, under ``.cache/versions``. One that takes torch as installed stands on the
environment of this process and holds only what differs from it; the others hold everything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "versions"
PAGE = ROOT / "CONTRIBUTING.md"
SHOWN = ("torch", "triton", "numpy", "transformers", "peft", "trl", "liger-kernel", "datasets", "tokenizers")
TESTS = 3  # parts that the fast tests are cut into
PARTS = (*(f"tests-{i + 1}" for i in range(TESTS)), "aot")


@dataclass(frozen=True)
class Set:
    """Versions that are tested together."""

    oldest: bool
    """The lower bounds, or else the newest releases."""
    python: str | None = None
    """Minor version; None: that of this process, on whose environment the set then stands, torch included."""
    exceptions: dict[str, str] = field(default_factory=dict)
    """Requirements in the place of those of ``pyproject.toml``, by name, as pip takes them."""
    without: str = ""
    """What does not work with these versions, an expression for ``pytest -k``, with the reason in a comment."""


NOT_THERE = ("peft", "trl", "ruff", "mypy", "twine")
"""Of the packages for development: the first two are among the sets' versions, the linters say nothing of versions, and
twine asks for a rich above our lower bound."""
# Of the ops alone it is 1.26; pyarrow, which datasets needs, has no use for that.
NUMPY = {"numpy": "numpy==2.0.*"}
SETS = {
    "oldest": Set(oldest=True, exceptions=NUMPY),
    "newest": Set(oldest=False),
    "oldest-torch": Set(oldest=True, python="3.12", exceptions=NUMPY),
    "newest-torch": Set(oldest=False, python="3.13"),
}


@dataclass(frozen=True)
class Verdict:
    """What a set, or a part of it, came to."""

    versions: dict[str, str]
    passed: int
    skipped: int
    failed: tuple[str, ...]
    compiled: int
    over_budget: tuple[str, ...]
    parts: tuple[str, ...]

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.versions | other.versions,
            self.passed + other.passed,
            self.skipped + other.skipped,
            self.failed + other.failed,
            self.compiled + other.compiled,
            self.over_budget + other.over_budget,
            self.parts + other.parts,
        )


def requirements(chosen: Set) -> list[str]:
    """What pip is asked for. ``peft`` and ``trl`` are the packages of the tests whose version matters."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [Requirement(text) for text in (*project["dependencies"], *extras["train"], *extras["tasks"])]
    listed += [r for r in map(Requirement, extras["dev"]) if r.name == "trl"]
    wanted = []
    for requirement in listed:
        bound = next((s.version for s in requirement.specifier if s.operator == ">="), None)
        if bound and "." not in bound:
            bound = f"{bound}.0"
        if requirement.name == "torch" and chosen.python is None:
            continue
        if requirement.name in chosen.exceptions:
            wanted.append(chosen.exceptions[requirement.name])
        else:
            extra = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            specifier = f"=={bound}.*" if chosen.oldest and bound else str(requirement.specifier)
            wanted.append(f"{requirement.name}{extra}{specifier}")
    return wanted


def environment_of(name: str) -> Path:
    """The interpreter of a set, whose environment is made if there is none. Raises RuntimeError where it cannot be."""
    chosen, folder = SETS[name], CACHE / name
    interpreter, wanted = folder / "bin" / "python", requirements(chosen)
    ready = folder / ".ready"
    if ready.exists() and ready.read_text().split("\n") == wanted:
        return interpreter
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    if chosen.python is None:
        _call([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        base = next(p for p in sys.path if Path(p).name == "site-packages")
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
        import torch

        pip += [f"torch=={torch.__version__}"]  # there already
    else:
        _call([_interpreter(chosen.python), "-m", "venv", "--without-pip", str(folder)])
        dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
        pip += [text for text in dev if Requirement(text).name not in NOT_THERE]
    if not chosen.oldest:
        pip += ["--upgrade"]  # of what is named; what that needs goes along where it has to
    _call([*pip, *wanted])
    ready.write_text("\n".join(wanted))
    return interpreter


def _interpreter(version: str) -> str:
    """``python3.12`` on the path, or of pyenv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in (f"python{version}", *map(str, sorted(root.glob(f"versions/{version}.*/bin/python")))):
        found = shutil.which(candidate)
        if found and subprocess.run([found, "-V"], capture_output=True).returncode == 0:
            return found
    raise RuntimeError(f"Python {version} is not here")


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def run(name: str, part: str) -> Verdict:
    """One part of a set, as its tests and its kernels fare; kept for the table."""
    verdict = _run(name, part)
    (CACHE / f"{name}-{part}.json").write_text(json.dumps(asdict(verdict)))
    return verdict


def kept() -> dict[str, Verdict]:
    """What the parts of each set came to last."""
    verdicts: dict[str, Verdict] = {}
    for name in SETS:
        for part in PARTS:
            file = CACHE / f"{name}-{part}.json"
            if file.exists():
                fields = json.loads(file.read_text())
                verdict = Verdict(**{k: tuple(x) if isinstance(x, list) else x for k, x in fields.items()})
                verdicts[name] = verdicts[name] + verdict if name in verdicts else verdict
    return verdicts


def _run(name: str, part: str) -> Verdict:
    interpreter = environment_of(name)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    programs = [str(interpreter.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment |= {"PATH": os.pathsep.join(programs)}
    environment |= {"ASYPPO_TEST_BROWSER": "skip"}  # the page in it is of the same Plotly
    listing = "import json; from importlib.metadata import version as v; print(json.dumps({n: v(n) for n in %r}))"
    versions = _output([interpreter, "-c", listing % (SHOWN,)], environment)
    versions = {"python": _output([interpreter, "-V"], environment).split()[1]} | json.loads(versions)
    if part == "aot":
        cases = json.loads(_output([interpreter, "-m", "bench.aot", "--json"], environment))
        over = [f"{c['op']}, {c['name']}, {c['target']}: {'; '.join(c['problems'])}" for c in cases if c["problems"]]
        return Verdict(versions, 0, 0, (), len(cases), tuple(over), (part,))
    files = sorted((ROOT / "tests").glob("*/test_*.py")) + sorted((ROOT / "tests").glob("test_*.py"))
    files = [file for file in files if file.parent.name != "vllm"]  # which pins versions of its own
    files = files[int(part.removeprefix("tests-")) - 1 :: TESTS]
    report = CACHE / f"{name}-{part}.xml"
    command = [interpreter, "-m", "pytest", "-m", "not slow", "-q", "--tb=short", f"--junitxml={report}"]
    command += ["-n", "2", "--dist", "worksteal"]
    if SETS[name].without:
        command += ["-k", f"not ({SETS[name].without})"]
    report.unlink(missing_ok=True)
    status = subprocess.run([*command, *files], cwd=ROOT, env=environment).returncode
    if status not in (0, 1) or not report.exists():
        raise RuntimeError(f"{name}, {part}: pytest ended with {status}, needs all tests to have run, passed or failed")
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [
        f"{c.get('classname')}::{c.get('name')}"
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return Verdict(versions, len(cases) - skipped - len(failed), skipped, tuple(failed), 0, (), (part,))


def _output(command: Sequence[object], environment: dict[str, str]) -> str:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def shard(commit: str) -> tuple[str, str]:
    """The set and the part that a commit stands for: any set with the torch that is here."""
    choices = [(name, part) for name, chosen in SETS.items() if chosen.python is None for part in PARTS]
    return choices[int(hashlib.sha256(commit.encode()).hexdigest(), 16) % len(choices)]


def table(verdicts: dict[str, Verdict]) -> str:
    """Markdown: a row per set."""
    names = ("python", *SHOWN)
    lines = [
        f"| | {' | '.join(names)} | fast tests | compiled ahead of time, within budget | what fails |",
        "|" + "---|" * (len(names) + 4),
    ]
    for name, v in verdicts.items():
        failing = "; ".join((*(f"`{f}`" for f in v.failed), *v.over_budget)) or "nothing"
        shown = " | ".join(v.versions.get(n, "") for n in names)
        ran = [part for part in v.parts if part != "aot"]
        tests = f"{v.passed} passed, {v.skipped} skipped, {len(v.failed)} failed"
        tests += "" if len(ran) == TESTS else f" (of {' and '.join(ran) or 'no part'})"
        budgets = f"{v.compiled - len(v.over_budget)} of {v.compiled}" if "aot" in v.parts else "did not run"
        lines.append(f"| {name} | {shown} | {tests} | {budgets} | {failing} |")
    return "\n".join(lines)


def write_table(verdicts: dict[str, Verdict]) -> None:
    """Between its two marks."""
    before, rest = re.split(r"(?<=<!-- versions: begin -->\n)", PAGE.read_text())
    PAGE.write_text(before + table(verdicts) + "\n" + rest[rest.index("<!-- versions: end -->") :])


def main() -> int:
    """0 if nothing fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    one = commands.add_parser("run")
    one.add_argument("set", choices=SETS)
    one.add_argument("--part", choices=PARTS)
    commands.add_parser("shard").add_argument("commit")
    commands.add_parser("all")
    commands.add_parser("table")
    chosen = parser.parse_args()

    CACHE.mkdir(parents=True, exist_ok=True)
    if chosen.command == "list":
        for name in SETS:
            print(f"{name}: {' '.join(requirements(SETS[name]))}")
        return 0
    if chosen.command == "table":
        write_table(kept())
        return 0
    if chosen.command == "all":
        work = [(name, part) for name in SETS for part in PARTS]
    elif chosen.command == "shard":
        work = [shard(chosen.commit)]
    else:
        work = [(chosen.set, part) for part in ([chosen.part] if chosen.part else PARTS)]
    verdicts: dict[str, Verdict] = {}
    for name, part in work:
        print(f"== {name}, {part}", flush=True)
        verdict = run(name, part)
        verdicts[name] = verdicts[name] + verdict if name in verdicts else verdict
    print(table(verdicts))
    if chosen.command == "all":
        write_table(verdicts)
    return 1 if any(v.failed or v.over_budget for v in verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python tools/arrows.py``: which file imports which; exits with 1 where imports run in a circle or upward.

An import counts wherever it stands, in a function too, and so does ``importlib.import_module`` of a name that is
written out (an f-string stands for every module it can name). An import under ``if TYPE_CHECKING`` never runs: it does
not count, and is listed apart where it points upward. Importing ``a.b`` also runs ``a/__init__.py``; that arrow is left
out, or no package could collect the names of its own modules.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTABLE = (".", "kernels")  # folders whose packages are imported by name
# From top to bottom, by package (the empty name: the repository). An arrow may point down. It may also point along its
# own line, as long as that closes no circle of rooms. A package that is not named here only has to be free of circles.
ORDER: dict[str, tuple[str, ...]] = {
    "": ("tests", "bench examples docs tools", "asyppo", "asyppo_kernels"),
    "asyppo": (
        "__init__ __main__",
        "entry",
        "cli",
        "compare",
        "audit",
        "publish",
        "from_trl",
        "trainer loop evaluate checkpoint",
        "report",  # the loop ends with one
        "metrics rollout",
        "models",
        "rewards",
        "data run",
        "environments",
        "distributed",
        "config",
        "algorithm",
        "version extras",
    ),
    "bench": (
        "__init__ conftest test_ops test_scaling run gpu_check aot host_time data_rows trainers",
        "compare report plots planned",
        "behind",
        "suite",
        "contenders",
        "ops",
        "registry",
        "errors results timing memory floors kernels_readme",
        "cases environment",
        "aot_cases",
        "aot_ensemble aot_stacked",
        "aot_case",
    ),
}


@dataclass(frozen=True)
class Arrow:
    """One import: module ``source``, in ``file`` at ``line``, imports module ``target``."""

    source: str
    target: str
    file: str
    line: int
    where: str = ""
    """Empty for an import at the top, else "in a function" or "for type checkers"."""

    @property
    def counts(self) -> bool:
        """Whether the import ever runs."""
        return self.where != "for type checkers"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}" + (f" ({self.where})" if self.where else "")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the repository by its dotted name; a package's name is that of its ``__init__.py``."""
    found: dict[str, Path] = {}
    for folder in IMPORTABLE:
        names = {name for line in ORDER[""] for name in line.split()}
        for name in sorted(names):
            for path in sorted((root / folder / name).rglob("*.py")):
                parts = path.relative_to(root / folder).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(root: Path) -> list[Arrow]:
    """All imports between the repository's own modules."""
    known = modules(root)
    found: dict[Arrow, None] = {}
    for name, path in known.items():
        for node, where in _imports(ast.parse(path.read_text(), str(path))):
            for target in _targets(node, name, path.name == "__init__.py", known):
                if target != name:
                    found[Arrow(name, target, str(path.relative_to(root)), node.lineno, where)] = None
    return list(found)


def _imports(tree: ast.AST, where: str = "") -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Every import below ``tree``, and where it stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
            yield node, where
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _imports(node, where or "in a function")
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.body:
                yield from _imports(ast.Module([statement], []), "for type checkers")
            for statement in node.orelse:
                yield from _imports(ast.Module([statement], []), where)
        else:
            yield from _imports(node, where)


def _targets(node: ast.stmt | ast.expr, source: str, package: bool, known: dict[str, Path]) -> list[str]:
    """The modules of the repository that an import names."""
    if isinstance(node, ast.Import):
        return [found for alias in node.names if (found := _nearest(alias.name, known))]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = source.split(".")
            parents = parents[: len(parents) - node.level + package]
            base = ".".join([*parents, *([node.module] if node.module else [])])
        named = [f"{base}.{alias.name}" for alias in node.names]
        return [found for name in named if (found := name if name in known else _nearest(base, known))]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
        return _named_by(node.args[0], known) if node.args else []
    return []


def _nearest(name: str, known: dict[str, Path]) -> str:
    """The module itself, or the package that would have to hold it; empty if neither is the repository's."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _named_by(argument: ast.expr, known: dict[str, Path]) -> list[str]:
    """What a string, or an f-string that begins with one of the repository's packages, can name."""
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return [argument.value] if argument.value in known else []
    if not isinstance(argument, ast.JoinedStr):
        return []
    parts = [re.escape(str(p.value)) if isinstance(p, ast.Constant) else r"\w+" for p in argument.values]
    return [name for name in known if "." in parts[0] and re.fullmatch("".join(parts), name)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The largest sets of nodes each of which reaches all others of its set; sets of one left out (Tarjan's)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found, key=len, reverse=True)


def parting(source: str, target: str) -> tuple[str, str, str] | None:
    """The package in which two modules part, and the room of each in it; None if they share a room without an order.

    A package's own ``__init__.py`` is its room ``__init__``.
    """
    package = ""
    ours, theirs = source.split("."), target.split(".")
    while package in ORDER:
        depth = len(package.split(".")) if package else 0
        a, b = (parts[depth] if len(parts) > depth else "__init__" for parts in (ours, theirs))
        if a != b:
            return package, a, b
        package = f"{package}.{a}" if package else a
    return None


def level(package: str, room: str) -> int | None:
    """The room's line in the package's order, 0 at the top; None if it has none."""
    return next((i for i, line in enumerate(ORDER[package]) if room in line.split()), None)


def problems(root: Path) -> list[str]:
    """A text for each circle of files, upward arrow, circle of rooms on one line, and room without a place."""
    running = [arrow for arrow in arrows(root) if arrow.counts]
    files: dict[str, set[str]] = defaultdict(set)
    level_rooms: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for arrow in running:
        files[arrow.source].add(arrow.target)
        if (parted := parting(arrow.source, arrow.target)) and not points_up(arrow):
            package, source, target = parted
            if level(package, source) == level(package, target):
                level_rooms[package][source].add(target)

    found, in_a_circle = [], circles(files)
    for members in in_a_circle:
        inside = [a for a in running if a.source in members and a.target in members]
        found.append(f"circle of {len(members)} files: {', '.join(members)}" + _listed(inside))
    found += [f"upward: {arrow}" for arrow in running if points_up(arrow)]
    for package, graph in level_rooms.items():
        for members in circles(graph):
            inside = [
                a
                for a in running
                if (parted := parting(a.source, a.target)) and parted[0] == package and set(parted[1:]) <= set(members)
            ]
            if not any({a.source for a in inside} <= set(circle) for circle in in_a_circle):  # said already
                found.append(f"circle of {len(members)} rooms: {', '.join(members)}" + _listed(inside))
    return found + [f"{room} has no place in the order of {Path(__file__).name}" for room in _unplaced(root)]


def _unplaced(root: Path) -> list[str]:
    """Rooms that the order of their package leaves out."""
    found: dict[str, None] = {}
    for name in modules(root):
        package = ""
        for room in [*name.split("."), "__init__"]:
            if package not in ORDER:
                break
            inside = f"{package}.{room}" if package else room
            if level(package, room) is None:
                found[inside] = None
            package = inside
    return list(found)


def points_up(arrow: Arrow) -> bool:
    """Whether it leads to a room on a line above its own."""
    parted = parting(arrow.source, arrow.target)
    if parted is None:
        return False
    package, source, target = parted
    above, below = level(package, source), level(package, target)
    return above is not None and below is not None and above > below


def _listed(found: list[Arrow]) -> str:
    return "".join(f"\n    {arrow}" for arrow in found)


def main(arguments: list[str] | None = None) -> int:
    """Print what is wrong, and the upward arrows that only type checkers follow; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python tools/arrows.py", description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="another tree with the same layers")
    root = parser.parse_args(arguments).root.resolve()
    wrong = problems(root)
    for text in wrong:
        print(text)
    for arrow in arrows(root):
        if not arrow.counts and points_up(arrow):
            print(f"upward, but never run: {arrow}")
    print(
        f"{len(modules(root))} files, {len({(a.source, a.target) for a in arrows(root)})} arrows, {len(wrong)} faults"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

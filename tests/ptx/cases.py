"""All cases, and the kernels they have to reach. A new kernel is a case, or ``check`` fails."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from triton.runtime.jit import JITFunction

import asyppo_kernels
from tests.ptx import cases_ensemble, cases_head, cases_stacked
from tests.ptx.case import Case

CASES: list[Case] = [*cases_head.CASES, *cases_ensemble.CASES, *cases_stacked.CASES]


def choose(ops: list[str], text: str = "", *, quick: bool = False) -> list[Case]:
    """Cases of ``ops`` (all, if none is named) whose name contains ``text``. Raises ValueError if there is none."""
    unknown = set(ops) - {case.op for case in CASES}
    if unknown:
        raise ValueError(f"op: got {sorted(unknown)}, there are {sorted({case.op for case in CASES})}")
    chosen = [c for c in CASES if (not ops or c.op in ops) and text in c.name and (c.quick or not quick)]
    if not chosen:
        raise ValueError(f"case: no name contains {text!r}; see tests/ptx/cases_*.py")
    return chosen


def package_kernels() -> set[str]:
    """The package's kernels, with their modules: its functions for Triton that none other of them calls."""
    functions = {f"{f.module}.{f.__name__}": f for f in _jit_functions()}
    called = {name for f in functions.values() for name in f.fn.__code__.co_names}
    return {path for path, f in functions.items() if f.__name__ not in called}


def _jit_functions() -> Iterator[JITFunction]:
    for module in pkgutil.walk_packages(asyppo_kernels.__path__, "asyppo_kernels."):
        if module.name.startswith("asyppo_kernels.integrations."):  # of packages that need not be here
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.module.startswith("asyppo_kernels."):
                yield value

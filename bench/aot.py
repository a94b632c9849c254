"""``python -m bench.aot``: compile every kernel for GPUs that need not be there, and table what they take.

Registers, spills, shared memory and the width of the memory instructions are read from the machine code. The table
goes into ``kernels/README.md``, between its markers; the budgets of ``aot_cases.py`` are asserted by ``tests/ops``.
A new kernel is a ``Case`` in ``aot_cases.py``. Needs a process without TRITON_INTERPRET, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import kernels_readme
from bench.aot_case import Case

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# Loads and stores of global memory of 16 bytes a lane (32 on sm_100), in the code of each kind of target.
WIDE = {
    "cuda": {"load": r"\bLDG\.E[.\w]*\.(?:128|256)\b", "store": r"\bSTG\.E[.\w]*\.(?:128|256)\b"},
    "hip": {"load": r"(?:global|buffer)_load_dwordx4\b", "store": r"(?:global|buffer)_store_dwordx4\b"},
}
ANY = {
    "cuda": {"load": r"\bLDG\.E", "store": r"\bSTG\.E"},
    "hip": {"load": r"(?:global|buffer)_load_", "store": r"(?:global|buffer)_store_"},
}


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one case for one target takes."""

    op: str
    name: str
    kernel: str
    target: str
    num_warps: int
    registers: int  # a thread: the vector registers, on AMD
    spills: int  # bytes of local memory a thread, stack frame included
    shared: int  # bytes a program
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    problems: tuple[str, ...]
    exception: str  # what is over the budget of other versions of Triton, and within this one's own


def compile_case(case: Case, target: str) -> Compiled:
    """Compile for ``target`` and read the machine code. Raises RuntimeError under TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: kernels compile in a process without it only")
    names = list(case.kernel.arg_names)
    unknown = set(names) ^ (set(case.signature) | set(case.constants))
    if unknown:
        raise ValueError(
            f"{case.op}/{case.name}: signature and constants disagree with the kernel on {sorted(unknown)}"
        )
    aligned = [n for n in names if n in case.divisible or case.signature.get(n, "").startswith("*")]
    backend, arch, warp_size = TARGETS[target]
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={**case.constants, **(case.amd if backend == "hip" else {})},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.num_warps}
    kernel = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)
    code, registers, spills = _read_cuda(kernel) if backend == "cuda" else _read_hip(kernel)
    count = {
        (width, kind): len(re.findall(patterns[backend][kind], code))
        for width, patterns in (("wide", WIDE), ("any", ANY))
        for kind in ("load", "store")
    }
    shared = int(kernel.metadata.shared)
    problems = [f"{spills} bytes of spills"] if spills else []
    most = case.max_registers_with.get(".".join(triton.__version__.split(".")[:2]), case.max_registers)
    exception = ""
    if backend == "cuda" and registers > most:
        problems.append(f"{registers} registers, over {most}")
    elif backend == "cuda" and registers > case.max_registers:
        exception = f"{registers} registers, at most {most} for {case.max_registers}"
    if shared > case.max_shared:
        problems.append(f"{shared} bytes of shared memory, over {case.max_shared}")
    problems += [f"no {kind} of 16 bytes a lane" for kind in case.wide if not count["wide", kind]]
    return Compiled(
        op=case.op,
        name=case.name,
        kernel=case.kernel.__name__,
        target=target,
        num_warps=case.num_warps,
        registers=registers,
        spills=spills,
        shared=shared,
        wide_loads=count["wide", "load"],
        loads=count["any", "load"],
        wide_stores=count["wide", "store"],
        stores=count["any", "store"],
        problems=tuple(problems),
        exception=exception,
    )


def _read_cuda(kernel: Any) -> tuple[str, int, int]:
    """(SASS, registers a thread, bytes of stack and local memory a thread), by the cuobjdump in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run(
                [tools / "cuobjdump", option, cubin],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"PATH": f"{tools}:{os.environ.get('PATH', '')}"},  # cuobjdump calls nvdisasm
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    spills = int(found["STACK"]) + int(found["LOCAL"])
    if re.search(r"\b(?:LDL|STL)\b", code):
        spills = max(spills, 4)
    return code, int(found["REG"]), spills


def _read_hip(kernel: Any) -> tuple[str, int, int]:
    """(assembly, vector registers a thread, bytes of scratch a thread)."""
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, name
        return int(found[1])

    scratch = number("private_segment_fixed_size")
    return code, number("vgpr_count"), max(scratch, 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")))


def table(compiled: Sequence[Compiled]) -> str:
    """Markdown: a row per kernel, a column per target."""
    targets = list(dict.fromkeys(c.target for c in compiled))
    lines = [
        "Registers a thread / bytes of shared memory a program / loads and stores of 16 bytes a lane or more, of all."
        + ("" if any(c.spills for c in compiled) else " None spills."),
        "",
        "| op | kernel | warps | " + " | ".join(targets) + " |",
        "|---|---|---|" + "---|" * len(targets),
    ]
    for op, name in dict.fromkeys((c.op, c.name) for c in compiled):
        cells = {c.target: c for c in compiled if (c.op, c.name) == (op, name)}
        warps = next(iter(cells.values())).num_warps
        row = [
            f"{c.registers} / {c.shared} / {c.wide_loads} of {c.loads}, {c.wide_stores} of {c.stores}"
            + (f" **{'; '.join(c.problems)}**" if c.problems else "")
            for c in (cells[t] for t in targets)
        ]
        lines.append(f"| `{op}` | {name} | {warps} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, write; 1 if a kernel is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--op", action="append", default=[], help="only this op (may be repeated); README untouched")
    parser.add_argument(
        "--target", action="append", default=[], choices=list(TARGETS), help="only this target; likewise"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and leave the README alone")
    chosen = parser.parse_args(arguments)

    from bench.aot_cases import CASES

    compiled = [
        compile_case(case, target)
        for case in CASES
        if not chosen.op or case.op in chosen.op
        for target in chosen.target or TARGETS
    ]
    if chosen.json:
        print(json.dumps([asdict(c) for c in compiled]))
        return 0
    print(table(compiled))
    if not (chosen.op or chosen.target):
        import triton

        kernels_readme.write("aot", "python -m bench.aot", f"Triton {triton.__version__}. {table(compiled)}")
    return 1 if any(c.problems for c in compiled) else 0


if __name__ == "__main__":
    sys.exit(main())

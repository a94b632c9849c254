"""Instructions and bytes an element of each kernel at one realistic shape, and the least time an H200 takes for them.

Instructions are those of the machine code (sm_90): the SASS of each source line, times how often the PTX of that line
ran. Bytes are those of the sectors touched. Times are computed, not measured: 132 multiprocessors at 1.7 GHz that
overlap everything perfectly, and 4.3 TB/s; a unit's rate is what a multiprocessor starts a cycle, in warps.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ptx import cases_ensemble, cases_head, cases_stacked
from tests.ptx.case import BF16, Call, Case
from tests.ptx.device import Launch
from tests.ptx.machine import Schedule

MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.7e9, 4.3e12

# What runs an instruction of the machine code; whatever is named nowhere is integer work or a comparison, "alu".
UNITS = {
    "fp32": {"FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"},
    "imad": {"IMAD", "IDP"},
    "sfu": {"MUFU", "POPC", "FLO", "I2F", "F2I", "BREV", "I2FP", "F2F"},
    "ld-st": {"LDG", "STG", "LDS", "STS", "ATOM", "ATOMG", "ATOMS", "RED", "REDG", "SHFL", "LDSM", "LDL", "STL"},
    "other": {
        *("BRA", "BAR", "EXIT", "BSSY", "BSYNC", "S2R", "S2UR", "LDC", "WARPSYNC", "YIELD"),
        *("BREAK", "RET", "CALL", "DEPBAR", "CCTL", "MEMBAR", "R2UR", "VOTE", "REDUX", "CS2R"),
    },
}


@dataclass(frozen=True)
class Line:
    """Launches of one kernel: counted on a small shape of ``elements``, computed for ``full`` of them.

    ``budget``: instructions an element that a test holds the kernel to. ``target``: what it should come down to; None
    where it has.
    """

    name: str
    op: str
    kernel: str
    call: Callable[..., Call]
    arguments: Mapping[str, Any]
    elements: int
    full: int
    budget: float
    target: float | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    launch: int | None = None  # which of the kernel's launches; None: all


VOCABULARY, ROWS = 151_936, 8192


def _head(call: Callable[..., Call], kernel: str, name: str, budget: float, target: float | None, **more: Any) -> Line:
    return Line(
        f"`{kernel}`, {name}",
        "linear_ppo_loss" if call is cases_head.linear_ppo_loss else "linear_logprob",
        kernel,
        call,
        {"n": 2, "h": 8, "v": VOCABULARY, "all_live": True} | more,
        elements=2 * VOCABULARY,
        full=ROWS * VOCABULARY,
        budget=budget,
        target=target,
    )


def _masks(launch: int, kernel: str, name: str, budget: float, full: int = 4 * 2**20) -> Line:
    return Line(
        f"`{kernel}`{name}",
        "agreement_masks",
        kernel,
        cases_ensemble.agreement_masks,
        {"n": 65_536},
        elements=65_536,
        full=full,
        budget=budget,
        settings={"agreement_masks.triton_form.PROGRAMS": 8},  # several blocks a program, as 4 M tokens take
        launch=launch,
    )


def _stacked(
    op: str, call: Callable[..., Call], kernel: str, name: str, budget: float, count: int, full: int, **of: Any
) -> Line:
    return Line(
        f"`{kernel}`{name}",
        op,
        kernel,
        call,
        of,
        count,
        full,
        budget,
        settings={"stacked_layers.triton_form.PROGRAMS": 2},
    )


LOSS, LOGPROB = cases_head.linear_ppo_loss, cases_head.linear_logprob
FULL = {"bias": BF16, "softcap": 15.0}
RMS = {"m": 2, "n": 64, "h": 1024, "residual": BF16}
ROPE = {"m": 2, "n": 64, "q_heads": 16, "k_heads": 8, "d": 128, "sliced": True}
EMBEDDING = {"m": 2, "n": 64, "h": 1024}
SWIGLU = {"m": 2, "n": 32, "width": 3072}

LINES = [
    _head(LOSS, "loss_kernel", "fp32 logits", 16, None),
    _head(LOSS, "loss_kernel", "bf16 logits", 18, None, logits_dtype=BF16),
    _head(LOSS, "loss_kernel", "fp32 logits, bias, softcap, KL", 59, None, **cases_head.EVERYTHING),
    Line(
        "`rows_kernel`, its one program",
        "linear_ppo_loss",
        "rows_kernel",
        LOSS,
        {"n": 2048, "h": 4, "v": 5, "kl": 0.05, "no_grad": True},
        elements=2048,
        full=ROWS,
        budget=280,
    ),
    _head(LOGPROB, "statistics_kernel", "fp32 logits", 8, None),
    _head(LOGPROB, "statistics_kernel", "bias, softcap", 30, None, **FULL),
    _head(LOGPROB, "gradient_kernel", "fp32 logits", 8, None),
    _head(LOGPROB, "gradient_kernel", "bias, softcap", 30, None, **FULL),
    Line(
        "`gae_kernel`, M = 2, fp32, T = 8,192",
        "ensemble_gae",
        "gae_kernel",
        cases_ensemble.ensemble_gae,
        {"b": 4, "t": 8192, "holes": False},
        elements=4 * 8192,
        full=512 * 8192,
        budget=41,
        settings={"ensemble_gae.triton_form.FEW_ROWS": 0},  # a program a row, as of 512 rows
    ),
    _masks(0, "begin_kernel", "", 2, full=65_536),  # whatever the number of tokens
    _masks(0, "count_all_kernel", ", level 0", 48),
    _masks(0, "count_kernel", ", level 1", 36),
    _masks(1, "count_kernel", ", level 2", 32),
    _masks(2, "count_kernel", ", level 3", 2),
    _masks(0, "apply_kernel", "", 25),
    *(
        Line(
            f"`{kernel}` of ensemble_value, M = 2, bf16, H = 1,024",
            "ensemble_value",
            kernel,
            cases_ensemble.ensemble_value,
            {"k": 2, "n": 512, "h": 1024},
            elements=2 * 512 * 1024,
            full=2 * 131_072 * 1024,
            budget=budget,
            settings={"ensemble_value.triton_form.PROGRAMS": 4},
        )
        for kernel, budget in (("forward_kernel", 10), ("backward_kernel", 10))
    ),
    *(
        _stacked(op, call, kernel, name, budget, count, full, **of)
        for op, call, name, of, count, full, kernels in (
            (
                "stacked_rms_norm",
                cases_stacked.stacked_rms_norm,
                ", residual",
                RMS,
                2 * 64 * 1024,
                2 * 32_768 * 1024,
                (("rms_norm_kernel", 17), ("rms_norm_backward_kernel", 28)),
            ),
            (
                "stacked_qk_norm_rope",
                cases_stacked.stacked_qk_norm_rope,
                ", weights",
                ROPE,
                2 * 64 * 24 * 128,
                2 * 32_768 * 24 * 128,
                (("qk_norm_rope_kernel", 28), ("qk_norm_rope_backward_kernel", 35)),
            ),
            (
                "stacked_swiglu",
                cases_stacked.stacked_swiglu,
                "",
                SWIGLU,
                2 * 32 * 3072,
                2 * 32_768 * 3072,
                (("swiglu_kernel", 25), ("swiglu_backward_kernel", 36)),
            ),
            (
                "stacked_embedding",
                cases_stacked.stacked_embedding,
                ", two features",
                EMBEDDING,
                2 * 64 * 1024,
                2 * 32_768 * 1024,
                (("embedding_kernel", 19), ("embedding_backward_kernel", 10)),
            ),
        )
        for kernel, budget in kernels
    ),
]


@dataclass(frozen=True)
class Count:
    """Of one line, an element: instructions by unit, bytes that cross the memory bus; and microseconds of each."""

    line: Line
    units: Mapping[str, float]
    bytes: float
    times: Mapping[str, float]  # by what takes them, "memory" included

    @property
    def instructions(self) -> float:
        """Of all units."""
        return sum(self.units.values())

    def problems(self) -> list[str]:
        """A sentence, if the budget is exceeded."""
        if self.instructions <= self.line.budget:
            return []
        return [f"{self.line.name}: {self.instructions:.1f} instructions an element, over {self.line.budget:g}"]


def measure_all(ops: Sequence[str] = (), text: str = "") -> list[Count]:
    """Count every line of ``ops``, or of all, whose name contains ``text``; lines that differ in the kernel alone share
    a run."""
    counts, before, launches = [], None, []
    for line in LINES:
        if (ops and line.op not in ops) or text not in line.name:
            continue
        run = (line.call, line.arguments, line.settings)
        if run != before:
            case = Case(line.op, line.name, line.call, line.arguments, line.settings)
            _, session = case.run(Schedule(races=False), count=True)
            before, launches = run, session.launches
        chosen = [launch for launch in launches if launch.machine.program.name == line.kernel]
        counts.append(summarise(line, chosen if line.launch is None else [chosen[line.launch]]))
        print(table(counts[-1:]).splitlines()[-1], flush=True)
    return counts


def summarise(line: Line, launches: Sequence[Launch]) -> Count:
    """Add launches up."""
    units, traffic, dram, shuffles = Counter[str](), Counter[str](), 0, 0
    for launch in launches:
        machine, ran, there = launch.machine, Counter[str](), Counter[str]()
        for i, times in zip(machine.program.code, machine.executed, strict=True):
            ran[i.line] += int(times)
            there[i.line] += 1
            shuffles += int(times) if i.parts[0] == "shfl" else 0
        usual = sum(ran.values()) / sum(there.values())  # for lines of the machine code that the PTX does not have
        for source, ops in sass_by_line(launch.kernel).items():
            often = ran[source] / there[source] if there[source] else usual
            for op, number in ops.items():
                units[
                    next(
                        (unit for unit, names in UNITS.items() if op in names or (op[0] == "U" and unit == "other")),
                        "alu",
                    )
                ] += number * often
        assert machine.traffic is not None
        traffic.update(machine.traffic.totals)
        dram += machine.traffic.dram()
    cycles = {
        "issue": sum(units.values()) / 4,
        "fp32": (units["fp32"] + 2 * units["imad"]) / 4,  # an IMAD takes its lanes twice
        "alu": units["alu"] / 2,
        "sfu": units["sfu"] * 2,
        "ld-st": max(units["ld-st"], traffic["lines"] + traffic["wavefronts"] + shuffles),
    }
    scale = line.full / line.elements * 1e6
    times = {name: count / MULTIPROCESSORS / CLOCK * scale for name, count in cycles.items()}
    per_element = {unit: number * 32 / line.elements for unit, number in units.items()}
    return Count(line, per_element, dram / line.elements, times | {"memory": dram / BANDWIDTH * scale})


def sass_by_line(kernel: Any) -> dict[str, Counter[str]]:
    """How often each opcode stands in the machine code of each source line, by the nvdisasm in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [tools / "nvdisasm", "-g", "-c", cubin]
        text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    found, line = defaultdict[str, Counter[str]](Counter), "?"
    for row in text.splitlines():
        place = re.search(r'//## File "([^"]+)", line (\d+)', row)
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", row)
        if place:
            line = f"{place[1].rsplit('/', 1)[-1]}:{place[2]}"
        elif instruction and instruction[1] != "NOP":
            found[line][instruction[1]] += 1
    return found


def table(counts: Sequence[Count]) -> str:
    """Markdown: a row per line."""
    lines = [
        "| kernel | instructions an element: fp32 + imad / alu / sfu / ld-st / all | budget | bytes an element | "
        "µs: instructions / bytes | bound by |",
        "|---|---|---|---|---|---|",
    ]
    for count in counts:
        work = {name: time for name, time in count.times.items() if name != "memory"}
        slowest = max(work, key=lambda name: work[name])
        bound = (
            "memory"
            if count.times["memory"] >= work[slowest]
            else f"{slowest}, {work[slowest] / count.times['memory']:.2f} × its bytes"
        )
        units = [
            count.units.get("fp32", 0) + count.units.get("imad", 0),
            *(count.units.get(u, 0) for u in ("alu", "sfu", "ld-st")),
        ]
        numbers = " / ".join(f"{number:.1f}" for number in (*units, count.instructions))
        budget = f"{count.line.budget:g}" + ("" if count.line.target is None else f", to reach {count.line.target:g}")
        lines.append(
            f"| {count.line.name} | {numbers} | {budget} | {count.bytes:.1f} | "
            f"{work[slowest]:.0f} / {count.times['memory']:.0f} | {bound} |"
        )
    return "\n".join(lines)

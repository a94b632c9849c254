"""One run of the suite: floors once, then case by case error, memory, launches and time of every contender."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from bench import errors, memory, results, timing
from bench.cases import Case, Inputs, Outputs, Run, Scale, Sweep, dtype_name, nbytes
from bench.contenders import contenders
from bench.environment import environment
from bench.floors import Floors, measure_floors
from bench.ops import OPS, baseline, oracle
from bench.registry import Absent, Contender, Phased

# Seconds of timing a case and a point of a sweep get, beside compilation, errors and memory.
CASE_BUDGET: dict[Scale, float] = {"gpu": 6.0, "cpu": 8.0, "quick": 0.1}
SWEEP_BUDGET: dict[Scale, float] = {"gpu": 1.0, "cpu": 1.0, "quick": 0.02}
MIN_ROUNDS: dict[Scale, int] = {"gpu": 5, "cpu": 5, "quick": 2}
SWEPT = ("plain torch", "plain torch loop", "sort")  # beside ours, whose growth is compared
LAUNCHES_COUNTED = 0.3  # seconds; the profile of a longer call takes too long
POISON = {"cuda": 2**30, "cpu": 2**24}


def pick_device(name: str = "auto") -> torch.device:
    """Choose the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


class Session:
    """Collects what ``result`` holds: the content of one result file."""

    def __init__(
        self,
        device: torch.device,
        *,
        quick: bool = False,
        minutes: float = 8.5,
        select: Callable[[Contender], bool] | None = None,
    ) -> None:
        self.device = device
        self.scale: Scale = "quick" if quick else "gpu" if device.type == "cuda" else "cpu"
        self.deadline = time.monotonic() + 60 * minutes
        self.select = select or (lambda entry: True)
        self.result: results.Result = {"schema": results.SCHEMA, "scale": self.scale, **environment(device)}
        self.result |= {"floors": None, "cases": [], "sweeps": []}
        self._floors: Floors | None = None

    def cases(self, ops: Sequence[str] = ()) -> list[Case]:
        """All cases of these ops, or of all."""
        return [case for op in ops or OPS for case in OPS[op].cases(self.scale, self.device)]

    def sweeps(self, ops: Sequence[str] = ()) -> list[Sweep]:
        """All sweeps of these ops, or of all."""
        return [sweep for op in ops or OPS for sweep in OPS[op].sweeps(self.scale, self.device)]

    @property
    def floors(self) -> Floors:
        """Rates of the device, measured when first asked for."""
        if self._floors is None:
            dtypes = {case.dtype for case in self.cases()}
            self._floors = measure_floors(self.device, dtypes, self.scale)
            self.result["floors"] = {"copy": self._floors.copy, "matmul": self._floors.matmul}
        return self._floors

    def run_case(self, case: Case) -> dict[str, Any]:
        """Measure a case, or return it if it has been measured."""
        for done in self.result["cases"]:
            if (done["op"], done["name"]) == (case.op, case.name):
                return done
        entries = [entry for entry in contenders(case.op) if self.select(entry)]
        measured = self._measure(case, entries, CASE_BUDGET[self.scale], launches=True)
        self.result["cases"].append(measured)
        return measured

    def run_sweep(self, sweep: Sweep) -> dict[str, Any]:
        """Measure ours and one plain contender at each point."""
        entries = [e for e in contenders(sweep.op) if (e.ours or e.name in SWEPT) and self.select(e)]
        points = []
        for x, case in sweep.cases:
            measured = self._measure(case, entries, SWEEP_BUDGET[self.scale], launches=False)
            points.append({"x": x, **measured})
        done = {"op": sweep.op, "axis": sweep.axis, "points": points}
        self.result["sweeps"].append(done)
        return done

    def _measure(self, case: Case, entries: Sequence[Contender], budget: float, *, launches: bool) -> dict[str, Any]:
        floors = self.floors  # before the case, while memory is free
        work = OPS[case.op].work(case)
        rows = measure(
            case, entries, budget, min_rounds=MIN_ROUNDS[self.scale], launches=launches, deadline=self.deadline
        )
        floor = floors.seconds(work, case.dtype)
        for row in rows:
            if row["status"] == "ok":
                row["floor_multiple"] = row["seconds"]["median"] / floor
        return {
            "op": case.op,
            "name": case.name,
            "sizes": dict(case.sizes),
            "options": dict(case.options),
            "dtype": dtype_name(case.dtype),
            "work": {"flops": work.flops, "bytes": work.bytes, "note": work.note},
            "floor_seconds": floor,
            "floor_bound": floors.bound(work, case.dtype),
            "rows": rows,
        } | self._training(case)

    def _training(self, case: Case) -> dict[str, Any]:
        """Of an op that has phases: the floor of each, and the ratios that are aimed at."""
        module = OPS[case.op]
        if not hasattr(module, "phases"):
            return {}
        return {
            "phase_floors": {name: self.floors.seconds(w, case.dtype) for name, w in module.phases(case).items()},
            "targets": [{**asdict(t), "of": list(t.of)} for t in module.TARGETS],
            "target_note": module.TARGET_NOTE,
        }


def measure(
    case: Case,
    entries: Sequence[Contender],
    budget: float,
    *,
    min_rounds: int = 5,
    launches: bool = True,
    deadline: float = float("inf"),
    seed: int = 0,
) -> list[results.Row]:
    """Return a row for each contender. Only those whose error is within the limit are timed, in turn."""
    if time.monotonic() > deadline:
        return [_row(entry, "skipped", "out of time") for entry in entries]
    module = OPS[case.op]
    if "torch._dynamo" in sys.modules:  # other cases' graphs would count against the limit of recompilations
        torch._dynamo.reset()

    def make(number: int) -> Inputs:
        return module.inputs(case, torch.Generator(case.device).manual_seed(seed + number))

    try:
        inputs = make(0)
        want = oracle(case, inputs)
        limit = errors.limits(baseline(case, inputs), want, case.dtype, getattr(module, "SLACK", 1.0))
    except Exception as error:
        return [_row(entry, "failing", f"not judged, since its oracle {_message(error)}") for entry in entries]
    rows, running = _check(case, entries, inputs, want, limit, deadline)

    for row, run, seconds in running.values():
        try:
            wanted = launches or (module.GRAPH and case.device.type == "cuda")  # how long a graph would be
            count = wanted and (case.device.type == "cpu" or seconds < LAUNCHES_COUNTED)
            found = memory.footprint(lambda run=run: run(inputs), case.device, launches=count)
        except Exception as error:
            row |= {"status": "failing", "reason": _message(error)}
            continue
        row |= {"peak_bytes": found.peak, "outputs_bytes": found.outputs, "launches": found.launches if count else None}
        if isinstance(run, Phased):
            row["resident_bytes"] = run.resident_bytes()

    copies = timing.sets_past_cache(memory.storage_bytes(inputs), case.device)
    sets = [inputs, *(make(number) for number in range(1, copies))]
    samplers, methods = {}, {}
    for entry, (row, run, _) in running.items():
        if row["status"] != "ok":
            continue
        try:
            samplers[entry.name], methods[entry.name] = timing.sampler(
                run,
                sets,
                case.device,
                graph=module.GRAPH and row["launches"] is not None,
                launches=row["launches"] or 0,
            )
        except Exception as error:
            row |= {"status": "failing", "reason": _message(error)}
    samples, failed = timing.interleave(samplers, budget, min_rounds=min_rounds)
    for entry, (row, run, _) in running.items():
        if entry.name in failed:
            row |= {"status": "failing", "reason": _message(failed[entry.name])}
        elif entry.name in samples:
            taken = timing.Timing(tuple(samples[entry.name]), methods[entry.name])
            low, high = taken.spread()
            row["seconds"] = {
                "median": taken.median,
                "p20": low,
                "p80": high,
                "rounds": len(taken.samples),
                "method": taken.method,
                "samples": list(taken.samples),
            }
            if isinstance(run, Phased):
                last = run.phases[-len(taken.samples) :]
                row["phases"] = {name: median(seconds[name] for seconds in last) for name in last[0]}
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _check(
    case: Case,
    entries: Sequence[Contender],
    inputs: Inputs,
    want: Outputs,
    limit: dict[str, float],
    deadline: float,
) -> tuple[list[results.Row], dict[Contender, tuple[results.Row, Run, float]]]:
    """Error first. Return all rows, and of those that are right what is needed to time them."""
    module = OPS[case.op]
    rows = [_row(entry, "ok") for entry in entries]
    built, running = {}, {}
    for entry, row in zip(entries, rows, strict=True):
        try:  # all before the first is run: importing a library can undo what another has compiled
            built[entry] = row, entry.build(case)
        except Absent as reason:
            row |= {"status": "absent", "reason": results.clean(str(reason))}
        except Exception as error:
            row |= {"status": "failing", "reason": _message(error)}
    for entry, (row, run) in built.items():
        if time.monotonic() > deadline:
            row |= {"status": "skipped", "reason": "out of time"}
            continue
        try:
            run(inputs)  # compiles what there is to compile
            memory.poison(case.device, POISON[case.device.type])
            _synchronise(case)
            begin = time.perf_counter()
            got = run(inputs)
            _synchronise(case)
            seconds = time.perf_counter() - begin
            required = module.required(case) if entry.required is None else set(entry.required)
            row["errors"], complaint = errors.verdict(got, want, limit, required)
            row["limits"] = {name: limit[name] for name in row["errors"]}
        except Exception as error:
            row |= {"status": "failing", "reason": _message(error)}
        else:
            if complaint:
                row |= {"status": "failing", "reason": complaint}
            else:
                row["accumulators_bytes"] = _accumulators(entry, got)
                running[entry] = row, run, seconds
            del got
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, running


def _row(entry: Contender, status: str, reason: str = "") -> results.Row:
    return {"contender": entry.name, "ours": entry.ours, "status": status, "reason": reason, "less": entry.less}


def _accumulators(entry: Contender, outputs: Outputs) -> int:
    """Bytes of the float32 accumulators the contender states, where an output is not itself in float32."""
    stated = [outputs[name] for name in entry.accumulates if name in outputs]
    return sum(4 * nbytes(x) // x.element_size() for x in stated if x.dtype != torch.float32)


def _message(error: Exception) -> str:
    return results.clean(f"raises {type(error).__name__}: {error}")


def _synchronise(case: Case) -> None:
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)

"""``python -m bench.report``: Markdown tables and PNG plots of result files, side by side where there are several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import behind, results
from bench.environment import load_line
from bench.results import RESULTS, Result, Row

MOST = 4  # newest results shown unless files are named


def title(result: Result) -> str:
    """Device, day and commit."""
    return f"{result['device']['name']}, {result['date'][:10]}, {(result['commit'] or 'unknown')[:7]}"


def floors_line(result: Result) -> str:
    """What the device can do."""
    rates = [f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in result["floors"]["matmul"].items()]
    return f"Measured limits: {', '.join(rates)}; copy {result['floors']['copy'] / 1e9:.3g} GB/s (read and written)."


def environment_lines(result: Result) -> list[str]:
    """Device, driver, versions, commit."""
    device = {name: value for name, value in result["device"].items() if name not in ("type", "name") and value}
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    changed = " with uncommitted changes" if result["modified"] else ""
    commit = result["commit"] or "unknown"
    measured = [floors_line(result)] if "floors" in result else []
    measured += [load_line(result["load"])] if "load" in result else []
    return [
        f"{result['device']['name']} ({facts}), {result['date']}, commit {commit}{changed}.",
        f"{versions}.",
        *([" ".join(measured)] if measured else []),
    ]


def case_title(case: dict[str, Any]) -> str:
    """Op, case, shapes and dtype."""
    sizes = ", ".join(f"{name} = {size:,}" for name, size in case["sizes"].items())
    return f"{case['op']}, {case['name']} ({sizes}, {case['dtype']})"


def case_table(case: dict[str, Any], device: str) -> str:
    """Return the table of one case: right ones by time, then failing ones, then who is absent; of a CPU's, why others
    are ahead of ours."""
    floor = f"Floor {_time(case['floor_seconds'])} ({case['floor_bound']}): {case['work']['note']}."
    lines = [f"### {case_title(case)}", "", floor, ""]
    lines += [
        "| contender | time | middle of the samples | × floor | peak | outputs + accumulators | launches | error |"
    ]
    lines += ["|---|--:|--:|--:|--:|--:|--:|---|"]
    notes = []
    right = [row for row in case["rows"] if row["status"] == "ok"]
    for row in sorted(right, key=lambda row: row["seconds"]["median"]):
        lines.append(_right_row(row))
        if row["less"]:
            notes.append(f"{row['contender']}: {row['less']}")
    for row in case["rows"]:
        if row["status"] == "failing":
            lines.append(f"| {_name(row)} | fails, not timed | | | | | | {_escape(row['reason'])} |")
    absent = [f"{row['contender']} ({row['reason']})" for row in case["rows"] if row["status"] in ("absent", "skipped")]
    lines += ["", "Less than the others: " + "; ".join(notes) + "."] if notes else []
    lines += ["", "Absent: " + _escape("; ".join(absent)) + "."] if absent else []
    ahead = behind.lines(case) if device == "cpu" else []
    lines += ["", "Ahead of ours: " + " ".join(ahead)] if ahead else []
    return "\n".join(lines)


def phase_tables(case: dict[str, Any]) -> str:
    """Return, of a case whose contenders have phases, time by phase with the memory, the ratios that are aimed at, and
    where our time goes; empty for other cases."""
    rows = [row for row in case["rows"] if row["status"] == "ok" and "phases" in row]
    if not rows or "phase_floors" not in case:
        return ""
    floors = case["phase_floors"]
    names = list(dict.fromkeys([*floors, *(name for row in rows for name in row["phases"])]))
    lines = ["| contender | " + " | ".join(names) + " | weights and optimizers | with the call's peak |"]
    lines += ["|---|" + "--:|" * (len(names) + 2)]
    lines += ["| floor of AsyPPO's | " + " | ".join(_time(floors[n]) if n in floors else "" for n in names) + " | | |"]
    for row in sorted(rows, key=lambda row: row["seconds"]["median"]):
        cells = [_time(row["phases"][name]) if name in row["phases"] else "" for name in names]
        memory = [_bytes(row["resident_bytes"]), _bytes(_memory(row))]
        lines.append(f"| {_name(row)} | " + " | ".join([*cells, *memory]) + " |")
    lines += ["", *_target_lines(case, rows), "", *_where_the_time_goes(case, rows)]
    return "\n".join(lines)


def _memory(row: Row) -> int:
    return row["resident_bytes"] + row["peak_bytes"]


def target_ratio(target: dict[str, Any], rows: list[Row]) -> tuple[str, float] | None:
    """Name the first of the target's contenders that ran, and its ratio over the other; None if either did not."""
    by_name = {row["contender"]: row for row in rows if row["status"] == "ok"}
    ours = next((name for name in target["of"] if name in by_name), None)
    if ours is None or target["over"] not in by_name:
        return None
    figure = _memory if target["figure"] == "memory" else lambda row: row["seconds"]["median"]
    return ours, figure(by_name[ours]) / figure(by_name[target["over"]])


def _target_lines(case: dict[str, Any], rows: list[Row]) -> list[str]:
    lines = ["| ratio | measured | target |", "|---|--:|--:|"]
    for target in case["targets"]:
        found = target_ratio(target, rows)
        if found is not None:
            aim = "" if target["most"] is None else f"at most {target['most']}"
            lines.append(f"| {target['figure']} of {found[0]} over {target['over']} | {found[1]:.2f} | {aim} |")
    return [*lines, "", f"{case['target_note']}."]


def _where_the_time_goes(case: dict[str, Any], rows: list[Row]) -> list[str]:
    """Shares of our time, and the phase that is farthest above its floor."""
    ours = next((row for row in rows if row["ours"]), None)
    if ours is None:
        return []
    phases, floors = ours["phases"], case["phase_floors"]
    whole = sum(phases.values())
    shares = sorted(phases.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in shares if seconds > 0.005 * whole)
    above = {name: seconds - floors.get(name, 0.0) for name, seconds in phases.items()}
    worst = max(above, key=lambda name: above[name])
    at_floor = f"at its floor of {_time(floors[worst])}" if worst in floors else "without it"
    return [
        f"Where the time of {ours['contender']} goes: {text}.",
        f"What would come next: {worst}, the phase with the most time above its floor; {at_floor} the whole "
        f"would take {_time(whole - above[worst])} in place of {_time(whole)}.",
    ]


def _right_row(row: Row) -> str:
    seconds = row["seconds"]
    launches = "" if row.get("launches") is None else f"{row['launches']:,}"
    cells = [
        _name(row),
        _time(seconds["median"]),
        f"{_time(seconds['p20'])} – {_time(seconds['p80'])}, {seconds['rounds']} ({seconds['method']})",
        f"{row['floor_multiple']:.2f}",
        _bytes(row.get("peak_bytes")),
        f"{_bytes(row.get('outputs_bytes'))} + {_bytes(row.get('accumulators_bytes'))}",
        launches,
        worst_error(row),
    ]
    return "| " + " | ".join(cells) + " |"


def worst_error(row: Row) -> str:
    """Name the output that uses up most of its limit, with its error."""
    errors = {name: value for name, value in row["errors"].items() if value is not None}
    if not errors:
        return ""
    name = max(errors, key=lambda name: errors[name] / max(row["limits"][name] or 0, 1e-300))
    return f"{name} {errors[name]:.1e} (limit {row['limits'][name]:.1e})"


def _name(row: Row) -> str:
    return f"**{row['contender']}**" if row["ours"] else row["contender"]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def sweep_table(sweep: dict[str, Any]) -> str:
    """Return time against a size, and how much faster than the least work it grows."""
    names = list(dict.fromkeys(row["contender"] for point in sweep["points"] for row in point["rows"]))
    timed = {name: [_median(point, name) for point in sweep["points"]] for name in names}
    timed = {name: times for name, times in timed.items() if any(times)}
    lines = [f"| {sweep['axis']} | floor | " + " | ".join(timed) + " |", "|--:|--:|" + "--:|" * len(timed)]
    for i, point in enumerate(sweep["points"]):
        cells = [_time(times[i]) if times[i] else "" for times in timed.values()]
        lines.append(f"| {point['x']:,} | {_time(point['floor_seconds'])} | " + " | ".join(cells) + " |")
    growth = [_growth(sweep, times) for times in timed.values()]
    lines.append("| growth | | " + " | ".join(growth) + " |")
    return "\n".join(lines)


def _median(point: dict[str, Any], name: str) -> float | None:
    return next((r["seconds"]["median"] for r in point["rows"] if r["contender"] == name and r["status"] == "ok"), None)


def _growth(sweep: dict[str, Any], times: list[float | None]) -> str:
    known = [(t, p["floor_seconds"]) for t, p in zip(times, sweep["points"], strict=True) if t]
    if len(known) < 2:
        return ""
    (first, first_floor), (last, last_floor) = known[0], known[-1]
    return f"{last / first:.3g}× for {last_floor / first_floor:.3g}× the work"


def side_by_side(shown: list[Result]) -> str:
    """Return multiples of each run's own floor, so that devices can be compared, with the times beside them."""
    tables = []
    for op, name in dict.fromkeys((case["op"], case["name"]) for result in shown for case in result["cases"]):
        columns = [next((c for c in r["cases"] if (c["op"], c["name"]) == (op, name)), None) for r in shown]
        names = dict.fromkeys(row["contender"] for case in columns if case for row in case["rows"])
        heads = [title(result) for result in shown]
        lines = [f"### {op}, {name}", "", "| contender | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
        for contender in names:
            cells = [_side_cell(case, contender) for case in columns]
            if any(cell not in ("", "absent", "skipped") for cell in cells):
                lines.append(f"| {contender} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _side_cell(case: dict[str, Any] | None, contender: str) -> str:
    row = next((r for r in case["rows"] if r["contender"] == contender), None) if case else None
    if row is None:
        return ""
    if row["status"] != "ok":
        return {"failing": "fails"}.get(row["status"], row["status"])
    return f"{row['floor_multiple']:.2f}× ({_time(row['seconds']['median'])})"


def page(shown: list[Result], plots: list[list[str]]) -> str:
    """Return the whole report. ``plots``: for each result the files to show."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m bench.report` from the result files beside it; `make bench` adds one of this machine.",
        "",
        "A contender's error comes first: the relative distance of each output from a float64 oracle, which may",
        "be at most that of the definition in plain torch in the same precision plus a stated tolerance. One",
        "beyond that is shown as failing and is not timed. Times are medians of samples taken in turn with the",
        "other contenders', beside which stand their middle three fifths and their number. The floor is the",
        "larger of the operations over the rate of a matrix product and the bytes over that of a copy, both",
        "measured in the same run. Peak is memory beyond the inputs; outputs are what the call returns,",
        "accumulators the float32 sums a contender states it keeps for them; both are in the peak only while they",
        "live. Launches are a GPU's kernels, copies and fills, or a CPU's aten operators. Ours are in bold.",
        "An update and a training step have time by phase, and their peak stands on weights and optimizer states.",
    ]
    for result, drawn in zip(shown, plots, strict=True):
        lines += ["", f"## {title(result)}", ""]
        for line in environment_lines(result):
            lines += [line, ""]
        if result["scale"] == "quick":
            lines += ["A quick run on tiny shapes: its times say nothing.", ""]
        lines += [f"![{Path(plot).stem}]({plot})" for plot in drawn]
        for case in result["cases"]:
            lines += ["", case_table(case, result["device"]["type"])]
            if by_phase := phase_tables(case):
                lines += ["", by_phase]
        for sweep in result["sweeps"]:
            lines += ["", f"### {sweep['op']} against {sweep['axis']}", "", sweep_table(sweep)]
    if len(shown) > 1:
        lines += [
            "",
            "## Side by side",
            "",
            "Multiples of each run's own floor, with the time.",
            "",
            side_by_side(shown),
        ]
    return "\n".join(lines) + "\n"


def newest(folder: Path) -> list[Path]:
    """Return the newest full results, newest first."""
    found = [(results.load(path), path) for path in folder.glob("*.json")]
    full = [(result["date"], path) for result, path in found if result["scale"] != "quick"]
    return [path for _, path in sorted(full, reverse=True)][:MOST]


def write(paths: list[Path], folder: Path) -> Path:
    """Write README.md and its plots into ``folder``."""
    shown = [results.load(path) for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    plots: list[list[str]] = [[] for _ in shown]
    try:
        from bench import plots as drawing
    except ImportError:
        print("matplotlib is not installed: tables only")
    else:
        drawn = [drawing.draw(result, folder / "plots", path.stem) for path, result in zip(paths, shown, strict=True)]
        plots = [[str(plot.relative_to(folder)) for plot in run] for run in drawn]
    target = folder / "README.md"
    target.write_text(page(shown, plots))
    return target


def main(arguments: list[str] | None = None) -> int:
    """Write the report of the files named, or of the newest in bench/results."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help=f"default: the {MOST} newest full runs in bench/results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of README.md and plots/")
    chosen = parser.parse_args(arguments)
    paths = chosen.files or newest(RESULTS)
    if not paths:
        print("no result file: run `python -m bench.run` first")
        return 1
    print(f"wrote {write(paths, chosen.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

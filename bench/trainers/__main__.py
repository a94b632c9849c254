"""``python -m bench.trainers``: ``AsyPPOTrainer`` beside TRL's ``GRPOTrainer`` on equal work, one thread of a CPU.

Each contender runs in processes of its own, which take turns, ``--rounds`` each: CPU seconds of each step after the
first, by phase, and the process's peak memory over what it held before it built the models, the median of all. The
result is a file in ``bench/results/trainers``; tables in ``bench/README.md`` and on the front page are made of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import results
from bench.environment import ROOT, environment, slug
from bench.trainers.cases import CASES, CONTENDERS, QUICK, TrainerCase
from bench.trainers.table import page, summary

FOLDER = results.RESULTS / "trainers"
PLACES = {ROOT / "bench" / "README.md": page, ROOT / "README.md": summary}
BEGIN, END = "<!-- trainers: begin, written by python -m bench.trainers -->", "<!-- trainers: end -->"


def in_a_process(case: TrainerCase, contender: str, steps: int) -> dict[str, Any]:
    """What ``measure`` returns of one contender, in a process of its own with one thread."""
    command = [sys.executable, "-m", "bench.trainers", "--here", case.name, contender, str(steps)]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=os.environ | one_thread, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name}, {contender}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_case(case: TrainerCase, contenders: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """Steps of all rounds, the sizes, and the median peak, by contender."""
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for i in range(len(contenders)):
            name = contenders[(turn + i) % len(contenders)]
            taken[name].append(in_a_process(case, name, steps))
            whole = median(step["whole"] for step in taken[name][-1]["steps"])
            print(f"{case.name}, {name}: {whole:.3f} CPU s a step", flush=True)
    rows = {
        name: {
            "steps": [step for run in runs for step in run["steps"]],
            "parameters": runs[0]["parameters"],
            "peak_bytes": median(run["peak_bytes"] for run in runs),
        }
        for name, runs in taken.items()
    }
    return asdict(case) | {"rows": rows}


def write_tables(result: dict[str, Any]) -> None:
    """Put the tables between their markers."""
    for path, of in PLACES.items():
        before, rest = path.read_text().split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n{of(result)}\n{END}{rest.split(END)[1]}")


def newest() -> Path:
    """The newest result there is."""
    return max(FOLDER.glob("*.json"), key=lambda path: results.load(path)["date"])


def main() -> int:
    """Measure and save, or make the tables of a result."""
    parser = argparse.ArgumentParser(prog="python -m bench.trainers", description=__doc__)
    named = {case.name: case for case in (*CASES, QUICK)}
    parser.add_argument("--case", action="append", choices=list(named), help="only this one (may be repeated)")
    parser.add_argument("--contender", action="append", choices=CONTENDERS, help="only this one (may be repeated)")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--steps", type=int, help="that count, in each process")
    parser.add_argument("--out", type=Path, help="result file; cases that are in it already stay, if not run anew")
    parser.add_argument("--tables", action="store_true", help="only write the tables, of --out or the newest result")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.here:
        from bench.trainers.contenders import measure

        name, contender, steps = chosen.here
        print(json.dumps(measure(named[name], contender, int(steps))))
        return 0
    if chosen.tables:
        write_tables(results.load(chosen.out or newest()))
        return 0
    torch.set_num_threads(1)
    result = {"schema": results.SCHEMA, "scale": "cpu", **environment(torch.device("cpu")), "cases": []}
    commit = (result["commit"] or "unknown")[:7]
    path = chosen.out or FOLDER / f"{result['date'][:10]}-{slug(result['device']['name'])}-{commit}.json"
    if path.exists():
        result["cases"] = results.load(path)["cases"]
    for name in chosen.case or [case.name for case in CASES]:
        case = named[name]
        done = run_case(case, chosen.contender or CONTENDERS, chosen.rounds, chosen.steps or case.steps)
        others = [other for other in result["cases"] if other["name"] != name]
        order = list(named)
        result["cases"] = sorted([*others, done], key=lambda of: order.index(of["name"]))
        results.save(result, path)
    print(f"\n{page(result)}\n\nwrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

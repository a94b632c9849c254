"""``python docs/evidence/seconds.py RUN ...``: a run's median seconds a step, by phase, as a table; the first two
steps of a run do not count. A RUN is a directory with ``metrics.jsonl``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

NOT_COUNTED = 2


def seconds(run: Path) -> dict[str, float]:
    """The median of each ``timing_s/`` of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][NOT_COUNTED:]
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("timing_s/"))
    # A phase that a step does without, as the check of the sampler in most, takes no time there.
    return {name.removeprefix("timing_s/"): median(row.get(name, 0.0) for row in rows) for name in names}


def table(runs: list[Path]) -> str:
    """Markdown: a row a run."""
    found = {run.name: seconds(run) for run in runs}
    phases = list(dict.fromkeys(phase for one in found.values() for phase in one))
    lines = [f"| | {' | '.join(phases)} |", "|---|" + "--:|" * len(phases)]
    for name, one in found.items():
        lines.append(f"| {name} | {' | '.join(f'{one[p]:.2f}' if p in one else '' for p in phases)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]]))

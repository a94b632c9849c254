"""What σ is and what the two masks take, by the token's number and by whether the working is right so far.

``python docs/evidence/masks.py RUN RUN …`` reads the responses that runs on chain sums left in samples.jsonl, of the
last half of training, and prints a table. *Right so far*: what was written before the token begins the right solution
with all its working.
"""

from __future__ import annotations

import random
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from asyppo.models.warm_start import chain_sum_solution
from asyppo.report.runs import Sample, read_run

EXPRESSION = re.compile(r"-?\d+(?: [+-] \d+)+")


def right_so_far(sample: Sample) -> np.ndarray:
    """Return bool [n], for each token of a response."""
    found = EXPRESSION.search(sample.prompt)
    if found is None:
        raise SystemExit(f"prompt: got {sample.prompt!r}, needs a chain of sums")
    solution = chain_sum_solution({"expression": found[0]}, 0.0, 0.0, random.Random(0))
    tokens = sample.tokens or []
    return np.array([solution.startswith("".join(tokens[:t])) for t in range(len(tokens))], dtype=bool)


def table(samples: list[Sample]) -> str:
    """Return shares in Markdown, a row for each range of numbers and for right and wrong."""
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    whole = np.zeros(3)
    for sample in samples:
        columns = sample.columns["std"], np.abs(sample.columns["advantage"])
        flags = (~sample.flags[name] for name in ("advantage_keep", "entropy_keep"))
        rows = np.stack([np.ones(len(columns[0])), *columns, *flags])
        whole += [rows.shape[1], columns[1].sum(), rows[3].sum()]
        right = right_so_far(sample)
        for name, chosen in (("right so far", right), ("a mistake or a guess before it", ~right)):
            parts[name].append(rows[:, chosen])
        for t, column in enumerate(rows.T):
            power = t.bit_length()
            name = f"token {t + 1}" if power < 2 else f"tokens {2 ** (power - 1) + 1} to {2**power}"
            parts[name].append(column[:, None])
    head = (
        "",
        "of the tokens",
        "of all \\|advantage\\|",
        "mean σ",
        "advantage masked",
        "of what that mask takes",
        "entropy filtered",
    )
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), "|---" * len(head) + "|"]
    for name in sorted(parts, key=lambda name: (name[0] != "t", int((re.findall(r"\d+", name) or "0")[0]))):
        count, std, advantage, masked, filtered = np.concatenate(parts[name], axis=1).sum(axis=1)
        of_all = count / whole[0], advantage / whole[1]
        shares = *of_all, std / count, masked / count, masked / whole[2], filtered / count
        cells = [f"{share:.4f}" if i == 2 else f"{share:.3f}" for i, share in enumerate(shares)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    runs = [read_run(Path(path)) for path in sys.argv[1:]]
    print(table([sample for run in runs for sample in run.trained if 2 * sample.step > run.last_step]), end="")

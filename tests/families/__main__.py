"""``python -m tests.families [FAMILY …]``: each family through training, going on, and evaluation, with both samplers.

Prints what came of each, and ``--out FILE`` writes it as a page. Exits with 1 where a family is neither right nor
refused in one line.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
from pathlib import Path

import torch
import transformers

from asyppo.config import ConfigError
from asyppo.config.fields import did_you_mean
from tests.families.makers import FAMILIES
from tests.families.through import ROUTES, TOLERANCE, Outcome, through

PAGE = """# Families of models

Tiny models of {families} families of causal language models, with random weights, each taken through training, a
resumed run and `asyppo eval`, on a CPU in float32 with transformers {transformers} and torch {torch}: with
`sampler: generate` and `algorithm: grpo`, and with `sampler: continuous` and `algorithm: ppo`, whose critic is of the
same family. A figure means that the family is right. It is the difference between the sampler's log-probs and the
trainer's, in nats, the mean over tokens, of the worse of two steps; more than {tolerance:g} would count as wrong.
Where a sampler that is named cannot sample from a family, that is refused in one line before the first step, and
`auto` takes another; numbers lead to what that line says.

`python -m tests.families --out docs/families.md` makes this page; names of families behind it take these alone.

{table}
"""


def table(found: dict[str, dict[str, Outcome]]) -> str:
    """The outcomes as a Markdown table; refusals, which are long, as notes below it."""
    notes: dict[str, int] = {}

    def cell(outcomes: dict[str, Outcome], sampler: str) -> str:
        outcome, instead = outcomes[sampler], outcomes.get(f"auto for {sampler}")
        if not outcome.refusal:
            return str(outcome)
        number = notes.setdefault(outcome.refusal.rpartition("one of your own; ")[2], len(notes) + 1)
        return f"refused ({number})" + ("" if instead is None or instead.refusal else f"; `auto`: {instead}")

    lines = [
        "| family | looks back | " + " | ".join(f"`{s}`, `{a}`" for s, a in ROUTES.items()) + " |",
        "|---|---|" + "---|" * len(ROUTES),
    ]
    for name, outcomes in found.items():
        cells = (cell(outcomes, sampler) for sampler in ROUTES)
        lines.append(f"| {name} | {FAMILIES[name].kind} | " + " | ".join(cells) + " |")
    refusals = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join([*lines, *(["", "Why refused:", "", *refusals] if refusals else [])])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="by default all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write")
    arguments = parser.parse_args()
    names = arguments.families or list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise ConfigError(f"{name}: unknown family{did_you_mean(name, dict.fromkeys(FAMILIES))}")
    logging.getLogger("asyppo").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # continuous batching collects garbage often, and there is much that will never be any
    found: dict[str, dict[str, Outcome]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            found[name] = through(name, Path(directory))
        print(name, *(f"{sampler}: {outcome}" for sampler, outcome in found[name].items()), sep="  ", flush=True)
    faults = [name for name, outcomes in found.items() if any(o.fault for o in outcomes.values())]
    if arguments.out is not None:
        page = PAGE.format(
            families=len(found),
            transformers=transformers.__version__,
            torch=torch.__version__,
            tolerance=TOLERANCE,
            table=table(found),
        )
        arguments.out.write_text(page)
    print(f"{len(found)} families, {len(faults)} with faults{': ' if faults else ''}{', '.join(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

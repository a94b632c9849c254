"""``python -m bench.data_rows [ROWS …] [--kind jsonl|parquet]``: what a run does with that many rows before its first
step, and a step's share of it, with seconds and memory. Minutes and gigabytes of disk for ten million; not in CI.

Each number of rows is a process of its own, on a file of generated prompts of about 20 tokens each. ``anonymous`` is
what the process holds beyond files that it has mapped, at the end; ``peak`` is the most it ever had, pages of mapped
files included, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from asyppo.config import DataConfig
from asyppo.data.checks import Checks, Fit
from asyppo.data.schedule import PromptSchedule
from asyppo.data.sources import load_eval_rows, load_train_rows

STEPS, PROMPTS = 20, 64


def prompt(i: int) -> str:
    """A question, different for every ``i``."""
    return f"Question {i}: what is the sum of {i} and {7 * i + 1}, and the answer to that?"


def write(path: Path, rows: int) -> None:
    """Write a file of ``rows`` rows, JSON lines or Parquet."""
    if path.suffix == ".jsonl":
        with open(path, "w") as file:
            for i in range(rows):
                file.write(json.dumps({"prompt": prompt(i), "answer": str(8 * i + 1)}) + "\n")
        return
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("prompt", pa.string()), ("answer", pa.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 100_000):
            part = range(start, min(start + 100_000, rows))
            columns = {"prompt": [prompt(i) for i in part], "answer": [str(8 * i + 1) for i in part]}
            writer.write_table(pa.table(columns, schema=schema))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,000 tokens trained on prompts like these."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator((prompt(i * 997) for i in range(2000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def measure(path: Path) -> dict[str, float]:
    """Seconds of each part of the start, of a step's prompts, and MiB, in this process."""
    data = DataConfig(dataset_name=str(path), eval_size=512)
    checks = Checks(data, Fit(tokenizer(), 1024))
    anonymous = memory()["anonymous"]
    start, spent = time.perf_counter(), time.process_time()
    held_out = load_eval_rows(data)
    opened = time.perf_counter()
    rows = load_train_rows(data, held_out, checks)
    checked, spent = time.perf_counter(), time.process_time() - spent
    schedule = PromptSchedule(len(rows), PROMPTS, seed=0)
    for step in range(STEPS):
        assert len([rows[i] for i in schedule.rows_of_step(step)]) == PROMPTS
    end = time.perf_counter()
    return {
        "rows": len(rows) + len(held_out),
        "open and hold out, s": opened - start,
        "look at every row, s": checked - opened,
        "both, CPU s": spent,
        "prompts of a step, ms": (end - checked) / STEPS * 1e3,
        "anonymous, MiB more": memory()["anonymous"] - anonymous,
        "peak, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def memory() -> dict[str, float]:
    """MiB that this process holds."""
    pairs = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    held = {name: rest.split()[0] for name, _, rest in pairs if name == "RssAnon"}
    return {"anonymous": int(held["RssAnon"]) / 1024}


def main() -> None:
    """Measure each number of rows in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file is not None:
        print(json.dumps(measure(arguments.file)))
        return
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"rows.{arguments.kind}"
            write(path, rows)
            command = [sys.executable, "-m", "bench.data_rows", "--file", str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print("  ".join(f"{name} {value:.4g}" for name, value in json.loads(done.stdout).items()), flush=True)


if __name__ == "__main__":
    main()

"""Rows of ``samples.jsonl``: what was sampled, and what the algorithm made of each token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.table import Table
from rich.text import Text
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from asyppo.metrics.record import StepRecord


def sample_rows(
    record: StepRecord, count: int, tokenizer: PreTrainedTokenizerBase, chosen: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Return rows of ``count`` responses, spread evenly over the batch: of different prompts as far as there are
    enough; or of those that are ``chosen``. What lies on the grid [B, T] becomes a number, or a bool, for each token of
    a response."""
    batch, signal = record.batch, record.signal
    columns = {
        "logprob": record.old.logprob,
        "sampler_logprob": batch.sampler_logprob,
        "entropy": record.old.entropy,
        "log_ratio": record.log_ratio,
        "value": signal.value,
        "std": signal.std,
        "advantage": signal.advantage,
        "raw_advantage": signal.raw_advantage,
        "returns": signal.returns,
        "advantage_keep": signal.advantage_keep,
        "entropy_keep": signal.entropy_keep,
    }
    count = min(count, len(batch))
    chosen = [index * len(batch) // count for index in range(count)] if chosen is None else chosen
    rows, extra = [], record.rewards.logged.extra
    for b in chosen:
        prompt, length = int(batch.prompt_length[b]), int(batch.response_length[b])
        tokens = batch.tokens[b].tolist()
        response = tokens[prompt : prompt + length]
        rows.append(
            {
                "step": record.number,
                "split": "train",
                "group": int(batch.group[b]),
                "prompt": tokenizer.decode(tokens[:prompt]),
                "completion": tokenizer.decode(response, skip_special_tokens=True),
                "reward": rounded(float(batch.score[b])),
                "rewards": {name: rounded(given[b]) for name, given in record.rewards.by_function.items()},
                **({"extra": {name: values[b] for name, values in extra.items()}} if extra else {}),
                "truncated": bool(batch.truncated[b]),
                "tokens": pieces(tokenizer, response),
                **{name: [rounded(x) for x in grid[b, :length].tolist()] for name, grid in columns.items()},
                "values": [[rounded(x) for x in grid[b, :length].tolist()] for grid in signal.values],
                **(_turns(record, b, length) if record.turns else {}),
            }
        )
    return rows


def _turns(record: StepRecord, b: int, length: int) -> dict[str, Any]:
    """Return which tokens of response ``b`` are the policy's, and its turns: with V̄ before an answer and after it, and
    what the answer brought beyond what was expected, where there are critics."""
    value = record.signal.value[b].tolist() if len(record.signal.values) else None
    rows = []
    for number, turn in enumerate(record.turns[b]):
        row = {**vars(turn), "reward": rounded(turn.reward)}
        if value is not None and turn.until > turn.end:
            goes_on = number + 1 < len(record.turns[b])
            before, after = value[turn.end], value[turn.until] if goes_on else 0.0
            gained = float(record.batch.turns.reward[b, turn.end - 1]) if record.batch.turns is not None else 0.0
            luck = gained + record.gamma * after - before
            row |= {"value_before": rounded(before), "value_after": rounded(after), "luck": rounded(luck)}
        rows.append(row)
    return {"policy_tokens": record.batch.mask[b, :length].tolist(), "turns": rows}


LONGEST_TEXT = 400


def completions_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return rows of ``sample_rows`` as a table to print: what was asked, what came, and what it was given for it, by
    reward function; as TRL's ``print_prompt_completions_sample``. Long texts lose their middle."""
    names = list(rows[0]["rewards"])
    table = Table(title=f"step {rows[0]['step']}", show_lines=True, expand=True)
    table.add_column("prompt", ratio=1)
    table.add_column("completion", ratio=1)
    for name in [*names, "advantage"]:
        table.add_column(name, justify="right")
    for row in rows:
        advantage = [math.nan if a is None else a for a in row["advantage"]]  # of one that is not finite
        numbers = [*(row["rewards"][name] for name in names), sum(advantage) / len(advantage)]
        completion = row["completion"] + (" (cut off)" if row["truncated"] else "")
        table.add_row(*map(_short_text, (row["prompt"], completion)), *map(_number, numbers))
    return table


def _short_text(text: str) -> Text:
    half = LONGEST_TEXT // 2
    return Text(text if len(text) <= LONGEST_TEXT else f"{text[:half]} … {text[-half:]}")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def rounded(value: Any) -> Any:
    """Round a number to 6 significant digits; one that is not finite becomes None. Other things stay themselves."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """Return the text of each token, special tokens included; together they are the decoded text.

    A letter that is spread over tokens belongs to the last of them. Where bytes form no letters, and for a tokenizer
    that is written in Python, it is what each token says alone.
    """
    whole = tokenizer.decode(tokens)
    if tokenizer.is_fast:
        stream = DecodeStream(skip_special_tokens=False)
        with suppress(Exception):  # its own class for a text that is not the beginning of a longer one
            texts = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in tokens]
            begun = "".join(texts)
            if whole.startswith(begun):
                texts[-1] += whole[len(begun) :]  # of a letter that was cut off
                return texts
    return [tokenizer.decode([token]) for token in tokens]

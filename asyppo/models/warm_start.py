"""A small policy and a smaller critic, made on the spot: a Qwen3 from a config, a tokenizer of its own, and a short
supervised training on worked solutions with mistakes in them.

It stands in for a pretrained checkpoint where none can be had: the models know the format of a solution and make
mistakes, which is where reinforcement learning begins. The result lies in a cache and is loaded by
``from_pretrained`` like any other model.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from asyppo.config import ConfigError, DataConfig, EnvironmentConfig, ModelShape, WarmStartConfig
from asyppo.data.rows import Row
from asyppo.distributed.processes import forked_rng
from asyppo.environments import DEMONSTRATIONS, ENVIRONMENTS, TASKS_OF
from asyppo.environments.protocol import reset, step
from asyppo.run import durable
from asyppo.run.progress import ProgressDisplay


def chain_sum_solution(
    metadata: dict[str, Any], noise: float, guess: float, rng: random.Random, wrong_rule: float = 0.0
) -> str:
    """Return the running totals of ``"4 - 1 + 7"`` as ``"3, <answer>10</answer>"``, with mistakes.

    Each total is off by 1 or 2 with probability ``noise``, and the next goes on from it. With probability ``guess`` the
    working is left out, and the answer is at most 4 away from the right one. With probability ``wrong_rule`` a solution
    with working takes every 9 for a 1 of the other sign, as one does who forgets the ten: 27 + 9 is 26.
    """
    first, *rest = metadata["expression"].split()
    guessed = rng.random() < guess
    forgets = not guessed and wrong_rule > 0 and rng.random() < wrong_rule
    total, totals = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        step = -1 if forgets and term == "9" else int(term)
        total += step if sign == "+" else -step
        if not guessed and rng.random() < noise:
            total += rng.choice((-2, -1, 1, 2))
        totals.append(total)
    if guessed:
        totals = [total + rng.randint(-4, 4)]
    return "".join(f"{t}, " for t in totals[:-1]) + f"<answer>{totals[-1]}</answer>"


def gcd_solution(metadata: dict[str, Any], noise: float, guess: float, rng: random.Random) -> str:
    """Return Euclid's remainders of 49 and 29 as ``"20, 9, 2, 1, 0, <answer>1</answer>"``, with mistakes.

    Each remainder is off by 1 with probability ``noise``, as long as it stays a remainder, and the next goes on from
    it. With probability ``guess`` the working is left out, and the answer is any number up to the smaller one's root.
    """
    a, b = metadata["numbers"]
    if rng.random() < guess:
        return f"<answer>{rng.randint(1, math.isqrt(min(a, b)))}</answer>"
    lines = ""
    while b:
        remainder = a % b
        if rng.random() < noise:
            remainder = min(max(remainder + rng.choice((-1, 1)), 0), b - 1)
        a, b = b, remainder
        lines += f"{remainder}, "
    return f"{lines}<answer>{a}</answer>"


Solution = Callable[..., str]
SOLUTIONS: dict[str, Solution] = {"chain_sum": chain_sum_solution, "gcd": gcd_solution}
"""Worked solutions by reasoning-gym task, from its row's metadata."""


WITH_A_WRONG_RULE = ("chain_sum",)
"""Tasks whose solutions take a ``wrong_rule``."""


def worked_solution(row: Row, noise: float, guess: float, rng: random.Random, wrong_rule: float = 0.0) -> str:
    """Return a solution of a row, with mistakes."""
    metadata = row["entry"]["metadata"]
    rule = {"wrong_rule": wrong_rule} if wrong_rule else {}
    return SOLUTIONS[metadata["source_dataset"]](metadata, noise, guess, rng, **rule)


def demonstration(row: Row, config: WarmStartConfig, environment: EnvironmentConfig, rng: random.Random) -> list[str]:
    """Return an episode with an environment that ships, with mistakes: a turn, its answer, a turn, its answer, …"""
    assert environment.name is not None
    made = ENVIRONMENTS[environment.name](**environment.params)
    reset(made, row, rng.getrandbits(31))
    parts: list[str] = []
    for _ in range(environment.max_turns):
        if environment.name in DEMONSTRATIONS:
            action = DEMONSTRATIONS[environment.name](made, config.noise, config.guess, rng)
        else:
            action = worked_solution(row, config.noise, config.guess, rng, config.wrong_rule)
        answer = step(made, action)
        parts += [action, answer.observation]
        if answer.done:
            break
    return parts


OF_WORDS = ("word_guessing",)
"""Environments whose words are tokens."""

Solve = Callable[[Row, random.Random], list[str]]
"""What is learned of a row: turns and, between them and at the end, answers of an environment."""


def solutions(config: WarmStartConfig, environment: EnvironmentConfig | None = None) -> Solve:
    """Return what makes solutions of rows, or, beside an environment, episodes with it."""
    if environment is not None and environment.name is not None:
        return lambda row, rng: demonstration(row, config, environment, rng)
    return lambda row, rng: [worked_solution(row, config.noise, config.guess, rng, config.wrong_rule)]


def build(
    config: WarmStartConfig,
    data: DataConfig,
    train_rows: Sequence[Row],
    device: torch.device,
    environment: EnvironmentConfig | None = None,
) -> tuple[Path, Path]:
    """Return the directories of the policy and of the checkpoint of the critics, making them if they are not cached.

    Only ``train_rows`` are learned from, so held-out prompts stay unseen; beside an ``environment``, episodes with it.
    Raises WriteError.
    """
    played = None if environment is None else environment.name
    if played is not None and played not in ENVIRONMENTS:
        raise ConfigError(
            f"environment.name: got {played!r}, needs one of {', '.join(ENVIRONMENTS)} beside a warm_start, which has "
            "episodes of those"
        )
    if environment is not None and played is not None:
        try:
            ENVIRONMENTS[played](**environment.params)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"environment.params: got {environment.params} for {played!r}: {error}") from error
    for name in (task.name for task in data.tasks or [data.task]):
        if played is not None and (tasks := TASKS_OF.get(played)) is not None:
            if name not in tasks:
                raise ConfigError(f"data.task.name: got {name!r}, needs {tasks[0]} with environment.name {played!r}")
        elif name not in SOLUTIONS:
            raise ConfigError(
                f"data.task.name: got {name!r}, needs one of {', '.join(SOLUTIONS)}, which warm_start has solutions of"
            )
        if config.wrong_rule and name not in WITH_A_WRONG_RULE:
            raise ConfigError(
                f"warm_start.wrong_rule: got {config.wrong_rule}, needs 0 for {name!r}: "
                f"only {', '.join(WITH_A_WRONG_RULE)} has one"
            )
    made_by = asdict(replace(config, cache_dir=""))
    if not config.wrong_rule:
        del made_by["wrong_rule"]  # without one the models are those of versions that had none, under their name
    settings = {"warm_start": made_by, "data": asdict(data), "format": 1}
    if environment is not None and played is not None:
        settings["environment"] = {"name": played, "params": environment.params, "max_turns": environment.max_turns}
    words = played in OF_WORDS
    if words:
        settings["tokens"] = "words"
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    directory = Path(config.cache_dir).expanduser() / f"warm-start-{key}"
    if not directory.exists():
        with durable.writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            for left in directory.parent.glob(".warm-start-*"):  # by a killed process, unless it is still at it
                if time.time() - left.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(left)
            partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            right = solutions(replace(config, noise=0.0, guess=0.0, wrong_rule=0.0), environment)
            tokenizer = _make_tokenizer(train_rows, right, words)
            solve = solutions(config, environment)
            model = None
            for name, shape in (("policy", config.policy), ("critic", config.critic)):
                if model is None or shape != config.policy:  # of one shape they come out the same
                    model = _teach(name, shape, tokenizer, train_rows, solve, config, device)
                with durable.writing(directory / name):
                    model.save_pretrained(partial / name)
                    tokenizer.save_pretrained(partial / name)
            with durable.writing(directory):
                durable.flush_tree(partial)
                partial.rename(directory)
                durable.flush(directory.parent)
        except durable.WriteError:
            if not directory.exists():  # else another run made the same at the same time
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return directory / "policy", directory / "critic"


def _make_tokenizer(rows: Sequence[Row], solve: Solve, words: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the task's own text: one token a digit or sign, and one for the prose of a question; with
    ``words`` one for a word and the space before it, so that a small model can take one out of its prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[a-z]+" if words else r" ?-?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024 if words else 384,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    known = ["".join(solve(row, rng)) for row in rows[:2000]]
    texts = [
        row["prompt"] + text.replace("<answer>", "").replace("</answer>", "")
        for row, text in zip(rows[:2000], known, strict=True)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<answer>", "</answer>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _teach(
    name: str,
    shape: ModelShape,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    solve: Solve,
    config: WarmStartConfig,
    device: torch.device,
) -> Qwen3ForCausalLM:
    """Return a model of this shape after ``config.steps`` supervised steps on the responses, not on the prompts, nor on
    what an environment answers."""
    rng = random.Random(config.seed)
    with forked_rng():
        torch.manual_seed(config.seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                # transformers' 0.02 is meant for wide models; at this width it learns slower.
                initializer_range=shape.hidden_size**-0.5,
                head_dim=shape.hidden_size // shape.num_attention_heads,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **asdict(shape),
            )
        ).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = min(30, config.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - 0.9 * step / config.steps)
    )
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    with ProgressDisplay(f"teach the {name}", config.steps, every=50) as progress:
        for _ in range(config.steps):
            chosen = [rng.randrange(len(rows)) for _ in range(config.batch_size)]
            responses = _encoded(tokenizer, [solve(rows[i], rng) for i in chosen])
            tokens = [torch.tensor(prompts[i] + ids) for i, (ids, _) in zip(chosen, responses, strict=True)]
            labels = [
                torch.tensor([-100] * len(prompts[i]) + own) for i, (_, own) in zip(chosen, responses, strict=True)
            ]
            pad = torch.nn.utils.rnn.pad_sequence
            loss = model(
                # Padding on the right is behind every token of a causal model, so no attention mask is needed.
                input_ids=pad(tokens, batch_first=True, padding_value=tokenizer.pad_token_id).to(device),
                labels=pad(labels, batch_first=True, padding_value=-100).to(device),
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.advance(f"loss {loss.item():.3f}")
    return model


def _encoded(
    tokenizer: PreTrainedTokenizerFast, episodes: Sequence[Sequence[str]]
) -> list[tuple[list[int], list[int]]]:
    """Tokens of each episode, and its labels: a turn ends with an end-of-sequence token, and an answer is not learned;
    where it is empty, it is that token."""
    end = tokenizer.eos_token_id
    ids = iter(tokenizer([part for parts in episodes for part in parts])["input_ids"])
    encoded = []
    for parts in episodes:
        tokens: list[int] = []
        labels: list[int] = []
        for number in range(len(parts)):
            own = next(ids)
            turn = number % 2 == 0
            own = [*own, end] if turn else own or [end]
            tokens += own
            labels += own if turn else [-100] * len(own)
        encoded.append((tokens, labels))
    return encoded

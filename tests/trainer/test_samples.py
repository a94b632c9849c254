"""Rows of samples.jsonl: which responses, and a column a token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyppo.algorithm.advantage import group_advantage
from asyppo.algorithm.ops import FUSED
from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import Outcome
from asyppo.metrics.record import StepRecord
from asyppo.metrics.samples import pieces, rounded, sample_rows
from asyppo.models.policy import Policy, TokenStats
from asyppo.rewards.computing import Rewards
from asyppo.run.directory import RunDirectory

Make = Callable[..., Any]
COLUMNS = (
    "logprob",
    "sampler_logprob",
    "entropy",
    "log_ratio",
    "value",
    "std",
    "advantage",
    "raw_advantage",
    "returns",
)
MASKS = ("advantage_keep", "entropy_keep")


def score(completions: list[str], **_: Any) -> list[float]:
    """Number of a's."""
    return [float(c.count("a")) for c in completions]


@pytest.mark.parametrize("algorithm", ["asyppo", "ppo", "grpo"])
def test_what_a_training_step_logs(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch, algorithm: Any
) -> None:
    seen: dict[str, Any] = {}

    def keep(name: str) -> None:
        original = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *a, **k: seen.setdefault(name, original(*a, **k)))

    config = tiny_config(algorithm=algorithm, logging_samples=5, num_iterations=2, num_mini_batches=2)
    trainer = tiny_trainer(config, score)
    keep("rollout")
    samples = trainer.step(1).samples
    batch = seen["rollout"].batch
    assert [row["group"] for row in samples] == [0, 0, 1, 1, 2]  # responses 0, 2, 4, 7, 9 of 12
    for index, row in zip([0, 2, 4, 7, 9], samples, strict=True):
        length = int(batch.response_length[index])
        tokens = batch.tokens[index, int(batch.prompt_length[index]) :][:length].tolist()
        assert row["tokens"] == trainer.tokenizer.convert_ids_to_tokens(tokens)
        assert (row["step"], row["split"]) == (1, "train")
        assert row["completion"] == "".join(t for t in row["tokens"] if not t.startswith("<"))
        assert row["reward"] == row["rewards"]["score"] == row["completion"].count("a")
        assert row["truncated"] is (row["tokens"][-1] != "<eos>")
        assert len(row["values"]) == {"asyppo": 2, "ppo": 1, "grpo": 0}[algorithm]
        for name in COLUMNS:
            assert len(row[name]) == length
            assert all(isinstance(x, float) for x in row[name])
        assert all(len(row[name]) == length and all(isinstance(x, bool) for x in row[name]) for name in MASKS)
        assert row["sampler_logprob"] == [rounded(x) for x in batch.sampler_logprob[index, :length].tolist()]
        assert row["logprob"] == pytest.approx(row["sampler_logprob"], abs=1e-4)
        mean = [sum(of_token) / len(of_token) for of_token in zip(*row["values"], strict=True)]
        assert algorithm == "grpo" or row["value"] == pytest.approx(mean, abs=1e-5)
        assert row["returns"] == pytest.approx([row["reward"]] * length, abs=1e-6)  # γ = λ = 1: A + V, rounded
        # At its last visit, in the second pass, the policy is another one than that which sampled.
        assert any(abs(x) > 1e-4 for x in row["log_ratio"])
    assert {row["prompt"] for row in samples} <= {row["prompt"] for row in trainer.train_dataset}


def test_the_log_ratio_is_that_of_the_last_visit(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits: list[list[float]] = []
    op = FUSED.linear_ppo_loss

    def spy(*arguments: Any, **options: Any) -> Any:
        result = op(*arguments, **options)
        visits.append([rounded(x) for x in (result.logprob - arguments[3]).tolist()])
        return result

    monkeypatch.setattr(Policy, "ops", replace(FUSED, linear_ppo_loss=spy))
    config = tiny_config(num_iterations=3, logging_samples=12)
    logged = sorted(x for row in tiny_trainer(config, score).step(1).samples for x in row["log_ratio"])
    assert max(map(abs, visits[0])) < 1e-4  # the policy that sampled
    assert logged == sorted(visits[2]) != sorted(visits[1])


def test_without_a_policy_update_the_ratio_is_one(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(critic={"warmup_steps": 1})
    assert {x for row in tiny_trainer(config, score).step(1).samples for x in row["log_ratio"]} == {0.0}


@pytest.mark.parametrize(("count", "groups"), [(0, []), (1, [0]), (3, [0, 1, 2]), (6, [0, 0, 1, 1, 2, 2]), (99, None)])
def test_samples_are_spread_over_prompts(ragged_batch: Make, tokenizer: Any, count: int, groups: Any) -> None:
    batch = ragged_batch()
    nothing = group_advantage(Outcome(batch.reward, batch.mask, batch.mask, batch.group), AdvantageOptions())
    zeros = torch.zeros_like(batch.reward)
    record = StepRecord(1, batch, Rewards({}, [], {}), TokenStats(zeros, zeros), batch.mask, nothing, zeros)
    rows = sample_rows(record, count, tokenizer)
    assert [row["group"] for row in rows] == (groups if groups is not None else batch.group.tolist())


def test_numbers_are_short_and_json(tiny_config: Make, tiny_trainer: Make) -> None:
    assert rounded(1 / 3) == 0.333333
    assert rounded(123456789.0) == 123457000.0
    assert (rounded(math.nan), rounded(-math.inf), rounded(True), rounded(0)) == (None, None, True, 0)
    run = RunDirectory(tiny_config())
    run.log_samples(tiny_trainer(tiny_config(), score).step(1).samples)
    for line in run.samples.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def byte_level() -> PreTrainedTokenizerFast:
    """A token a byte, as in Qwen and Llama 3: letters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Pieces with a mark for the blank before a word, as in Llama 2 and Gemma; the first blank is not shown."""
    vocab = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁ab", "c", "▁", "d", "▁ef", "<eos>"]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    made.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>")


def test_pieces_of_letters_that_take_several_tokens() -> None:
    tokenizer = byte_level()
    text = "a é\u2028 漢🙂b"
    tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(tokens) > len(text) + 1
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens) == text + "<eos>"
    assert pieces(tokenizer, tokens)[:5] == ["a", " ", "", "é", ""]
    cut = tokens[:-4]  # in the middle of a letter
    assert "".join(pieces(tokenizer, cut)) == tokenizer.decode(cut)


def test_pieces_with_blanks_before_words() -> None:
    tokenizer = sentence_piece()
    ids = tokenizer.convert_tokens_to_ids(["▁ab", "c", "▁ef", "<0xC3>", "<0xA9>", "d", "▁ab", "<eos>"])
    assert tokenizer.decode(ids) == "abc eféd ab<eos>"
    assert pieces(tokenizer, ids) == ["ab", "c", " ef", "", "é", "d", " ab", "<eos>"]


def test_random_tokens_give_their_text_back(tokenizer: Any) -> None:
    for made in (byte_level(), tokenizer):
        for seed in range(50):
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(len(made), (1 + seed % 9,), generator=generator).tolist()
            texts = pieces(made, tokens)
            assert len(texts) == len(tokens)
            assert "".join(texts) == made.decode(tokens)


def test_bytes_that_form_no_letter_are_shown_one_by_one() -> None:
    """What such bytes say depends on all that follow, which no stream of pieces can know."""
    tokenizer = sentence_piece()
    ids = tokenizer.convert_tokens_to_ids(["▁ab", "<0x41>", "<0xFF>", "c"])
    assert tokenizer.decode(ids) == "ab\ufffd\ufffdc"
    assert pieces(tokenizer, ids) == ["ab", "A", "\ufffd", "c"]

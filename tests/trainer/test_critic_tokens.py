"""Critics that were made for other tokens than the policy's, and those that only seem to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyppo.algorithm.ops import FUSED
from asyppo.config import ConfigError
from asyppo.data.batch import Batch
from asyppo.models.critics import Critics, make_critics
from asyppo.trainer import AsyPPOTrainer

Make = Callable[..., Any]
ROWS = [{"prompt": text} for text in ("ab", "cde", "f", "ghij")]


def characters(text: str, special: tuple[str, ...] = ("<pad>", "<eos>", "<unk>")) -> PreTrainedTokenizerFast:
    """One token a character of ``text``, after three special ones."""
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *text])}, unk_token=special[2]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    pad, eos, unk = special
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, eos_token=eos, unk_token=unk)


@pytest.fixture
def trainer(tmp_path: Path, tiny_lm: Make, tokenizer: PreTrainedTokenizerFast, tiny_config: Make) -> Make:
    """Make a trainer of a policy with 19 tokens and of critics with this tokenizer (None: no files)."""

    def make(own: PreTrainedTokenizerFast | None, vocab_size: int = 19, policy_size: int = 19) -> AsyPPOTrainer:
        tiny_lm(seed=1, vocab_size=vocab_size).save_pretrained(tmp_path / "critic")
        if own is not None:
            own.save_pretrained(tmp_path / "critic")
        return AsyPPOTrainer(
            policy=tiny_lm(vocab_size=policy_size),
            critics=str(tmp_path / "critic"),
            tokenizer=tokenizer,
            reward_funcs=[lambda completions, **_: [1.0] * len(completions)],
            train_dataset=ROWS,
            config=tiny_config(),
        )

    return make


def test_other_texts_are_refused(trainer: Make) -> None:
    """Of the same size, and of a larger one; in the prompts, and beside them."""
    refused = r"critic\.model_name_or_path: '.*critic' has another tokenizer than the policy: "
    with pytest.raises(ConfigError, match=refused + r"in the prompts, token 3 is 'a' to the policy and 'b' to the"):
        trainer(characters("bacdefghijklmnop"))
    with pytest.raises(ConfigError, match=refused + r"in the prompts, token 3 is 'a' .* 'z' .* 16 of 19 tokens"):
        trainer(characters("zyxwvutsrqponmlkjihgfe"), vocab_size=40)
    with pytest.raises(ConfigError, match=refused + r"in the vocabulary, token 17 is 'o' .* 'p' .* 2 of 19 tokens"):
        trainer(characters("abcdefghijklmnpo"))
    with pytest.raises(ConfigError, match=r"has embeddings of 18 tokens, needs those of the policy's tokenizer, 19"):
        trainer(characters("abcdefghijklmno"), vocab_size=18)


def test_padded_embeddings_are_taken(trainer: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    assert trainer(tokenizer, vocab_size=64).train().checkpoint.exists()
    # A policy's, whose critic has no embeddings of what no tokenizer has: it may be sampled all the same.
    critics = trainer(tokenizer, vocab_size=20, policy_size=64).critics
    assert critics.last_token == 19
    assert critics(torch.tensor([[3, 63, 4]])).equal(critics(torch.tensor([[3, 19, 4]])))


@pytest.mark.parametrize("stacked", [True, False])
def test_tokens_that_no_tokenizer_has(
    stacked: bool, tiny_critic: Make, tiny_config: Make, ragged_batch: Callable[..., Batch]
) -> None:
    critics: Critics = make_critics([tiny_critic()], tiny_config(critic={"stacked": stacked}).critic)
    assert critics.ops is FUSED
    batch = ragged_batch()
    expected = critics.values(batch, 1000)
    known = batch.tokens == 18
    batch.tokens[known] = 60
    critics.last_token = 18
    assert known.any()
    assert critics.values(batch, 1000).equal(expected)


def test_other_names_of_special_tokens(trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer(characters("abcdefghijklmnop", ("<fill>", "<end>", "<unk>")))
    assert not caplog.records  # they are in no prompt


def test_other_cuts_are_said(
    trainer: Make, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    other = characters("abcdefghijklmnop")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("b", "removed")
    trainer(other)
    assert [r.getMessage().partition(" tokenizer of ")[2].partition("' ")[2] for r in caplog.records] == [
        "cuts 3 of 4 prompts into other tokens than the policy's; the critic gets the policy's, whose texts it knows"
    ]


def test_a_critic_of_a_checkpoint_has_the_tokenizer_beside_it(
    trainer: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.save_pretrained(tmp_path / "policy")
    trainer(None)
    assert not caplog.records
    characters("bacdefghijklmnop").save_pretrained(tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"'.*critic' has another tokenizer than the policy"):
        trainer(None)


def test_no_tokenizer_is_said(trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer(None)
    [record] = caplog.records
    assert record.getMessage().endswith(
        "critic' has no tokenizer; it is taken to have the policy's, whose 19 tokens its embeddings have room for"
    )

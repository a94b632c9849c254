"""What ends a response: the tokenizer's token, the generation config's, and the chat template's end of a turn."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from asyppo.config import ConfigError
from asyppo.models.tokenizer import eos_token_ids, pad_token_id


def stops(tokenizer: PreTrainedTokenizerFast, generation: Any = None, **changes: Any) -> list[int]:
    """Of a model with these end-of-sequence tokens in its generation config, beside the tokenizer with changes."""
    own = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(own, name, value)
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=generation))
    return eos_token_ids(model, own)


def turns(end: str) -> str:
    return "{% for m in messages %}{{ m.role[0] }}{{ m.content }}" + end + "{% endfor %}"


def test_what_ends_a_response(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    pad, eos, unk = 0, 1, 2
    assert stops(tokenizer) == [eos]
    assert stops(tokenizer, generation=[7, 8]) == [eos, 7, 8]
    with caplog.at_level(logging.WARNING, "asyppo"):
        # A base model's template ends turns with another token than the tokenizer's.
        assert stops(tokenizer, chat_template=turns("<unk>")) == [eos, unk]
        assert stops(tokenizer, chat_template=turns("ab<pad>c")) == [pad, eos]
        assert stops(tokenizer, chat_template=turns("<eos>")) == [eos]
        assert stops(tokenizer, chat_template=turns("")) == [eos]
        assert not caplog.messages
        assert stops(tokenizer, chat_template=turns("bcd")) == [eos]
        assert stops(tokenizer, chat_template=turns("\n")) == [eos]
        assert stops(tokenizer, chat_template="{{ raise_exception('no') }}") == [eos]
        assert stops(tokenizer, eos_token=None) == []
    assert [message.split(":")[0] for message in caplog.messages] == [
        "the chat template ends a turn with 'bcd', which is no special token",
        "the chat template ends a turn with '\\n', which is no special token",
        "the chat template takes no turn of user and assistant",
        "the tokenizer has no end-of-sequence token",
    ]


def test_a_tokenizer_without_an_end_and_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    without = {"eos_token": None, "pad_token": None}
    with pytest.raises(ConfigError, match=r"no end-of-sequence token and no padding token, .*; needs eos_token in "):
        stops(tokenizer, **without)
    with pytest.raises(ConfigError, match=r"needs eos_token in tokenizer_config\.json \('<unk>', as its chat template"):
        stops(tokenizer, **without, chat_template=turns("<unk>"))
    assert stops(tokenizer, **without, generation=5) == [5]
    own = copy.deepcopy(tokenizer)
    own.eos_token = own.pad_token = None
    assert pad_token_id(own) == 0  # lengths say what is padding

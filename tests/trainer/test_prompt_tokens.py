"""Prompts as tokens, and the most that a text can have."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from asyppo.config import ConfigError, DataConfig
from asyppo.data import checks
from asyppo.data.bounds import tokens_per_byte
from asyppo.data.checks import Checks, Fit
from asyppo.data.prompts import prompt_text, prompt_tokens
from asyppo.data.sources import load_train_rows
from tests.trainer.rows import fitting, jsonl, numbered

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% if think %}p{% endif %}{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One that begins text with <bos>, which its chat template writes, too."""
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.add_special_tokens(["<bos>"])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )


def test_tokens_of_text_and_of_messages(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    bos, ids = chat_tokenizer.bos_token_id, {c: i for i, c in enumerate("abcdefghijklmnop", 3)}
    messages = [{"role": "h", "content": "bc", "name": None}, {"role": "i", "content": "d"}]
    tokens = prompt_tokens(["ab", messages, "<bos>ab"], chat_tokenizer, {"think": True})
    # Each begins with exactly one <bos>, whoever writes it.
    assert tokens == [[bos, ids["a"], ids["b"]], [bos, *(ids[c] for c in "hbcidap")], [bos, ids["a"], ids["b"]]]
    assert prompt_tokens([messages], chat_tokenizer)[0] == tokens[1][:-1]
    assert prompt_tokens([messages], chat_tokenizer)[0] == chat_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_messages_need_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"prompts are chat messages, but the tokenizer has no chat template; needs"):
        prompt_tokens([CHAT], tokenizer)
    with pytest.raises(ConfigError, match="has no chat template"):
        fitting([{"prompt": CHAT}], "train_dataset", tokenizer, DataConfig(), 10)


def test_prompts_as_text_to_read() -> None:
    assert prompt_text("a") == "a"
    assert prompt_text(CHAT) == "system: s\nuser: u"


@pytest.mark.parametrize("of_messages", [False, True])
@pytest.mark.parametrize(
    ("limit", "own", "reason"),
    [
        (6, None, "the models' positions less max_completion_length"),
        (6, 5, "data.max_prompt_length"),
        (5, 6, "the models' positions less max_completion_length"),
    ],
)
def test_long_prompts(
    chat_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    of_messages: bool,
    limit: int,
    own: int | None,
    reason: str,
) -> None:
    def prompt(length: int) -> Any:  # <bos>, the role, the content, and the beginning of the answer
        return [{"role": "h", "content": "b" * (length - 3)}] if of_messages else "b" * (length - 1)

    longest = min(limit, own or limit)
    rows = [{"prompt": prompt(n), "n": n} for n in (longest, longest + 1, 4, longest + 3)]
    config = DataConfig(max_prompt_length=own)
    with pytest.raises(ConfigError) as error:
        fitting(rows, "train_dataset", chat_tokenizer, config, limit)
    assert str(error.value).startswith(
        f"data.long_prompts: train_dataset has 2 prompts that are too long: row 2: {longest + 1} tokens, needs at most "
        f"{longest}, {reason}; row 4: "
    )
    assert f"; row 4: {longest + 3} tokens" in str(error.value)
    config.long_prompts = "skip"
    with caplog.at_level(logging.WARNING, "asyppo"):
        assert [row["n"] for row in fitting(rows, "train_dataset", chat_tokenizer, config, limit)] == [longest, 4]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("; left out")
    with pytest.raises(ConfigError, match="train_dataset has no prompt that can be used"):
        fitting(rows[1:2], "train_dataset", chat_tokenizer, config, limit)


def test_numbers_of_a_file_survive_what_was_left_out_before(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    name = jsonl(tmp_path / "own.jsonl", "{", *numbered(3), {"prompt": "b" * 20})
    rows = load_train_rows(DataConfig(dataset_name=name, bad_rows="skip"), [{"prompt": "p1"}])
    with pytest.raises(ConfigError, match=r"own\.jsonl has 1 prompt that is too long: row 5: 21 tokens"):
        fitting(rows, "train_dataset", chat_tokenizer, DataConfig(), 10)
    fit = fitting(rows, "train_dataset", chat_tokenizer, DataConfig(long_prompts="skip"), 10)
    assert [row["answer"] for row in fit] == [0, 2]


def test_a_row_that_the_template_refuses(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": [{"role": role, "content": "a"}]} for role in ("user", "tool", "user")]
    with pytest.raises(
        ConfigError, match=r"1 bad row: row 2: prompt: got .*, but the chat template refuses it: no tools here; needs"
    ):
        fitting(rows, "train_dataset", chat_tokenizer, DataConfig(), 10)
    assert len(fitting(rows, "train_dataset", chat_tokenizer, DataConfig(bad_rows="skip"), 10)) == 2


def test_a_prompt_without_tokens(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyppo.data.checks.prompt_tokens", lambda prompts, *_: [[] for _ in prompts])
    with pytest.raises(ConfigError, match=r"row 1: prompt: got 'a', but it has no tokens"):
        fitting([{"prompt": "a"}], "train_dataset", tokenizer, DataConfig(), 10)


def test_no_rows_at_all_are_no_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(fitting([], "eval_dataset", tokenizer, DataConfig(), 10)) == 0


def test_text_does_not_end_with_what_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast) -> None:
    for single, begin in (("$A <eos>", []), ("<pad> $A <eos> <pad>", [0])):
        made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        special = [("<pad>", 0), ("<eos>", 1)]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        adding = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", bos_token="<pad>")
        # An end that the text has itself stays.
        assert prompt_tokens(["ab", "<pad>ab", "b<eos>"], adding) == [[*begin, 3, 4], [0, 3, 4], [*begin, 4, 1]]


def test_a_begun_answer_goes_on(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """Beside a prompt whose answer has not begun; blocks and tool calls are read as text."""
    user, begun = {"role": "h", "content": "b"}, {"role": "assistant", "content": "cd"}
    blocks = {"role": "h", "content": [{"type": "text", "text": "b"}]}
    call = {"role": "j", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    tokens = prompt_tokens([[user, begun], [user], [blocks, begun], [call, user]], chat_tokenizer)
    texts = ["".join(chat_tokenizer.convert_ids_to_tokens(ids)) for ids in tokens]
    assert texts == ["<bos>hbacd", "<bos>hba", "<bos>hbacd", "<bos>jhba"]
    assert prompt_text([blocks, call]) == "h: b\nj: "


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a\ud83d", r"prompt: half a surrogate pair, '\ud83d', at character 2, needs the whole character"),
        (
            [{"role": "h", "content": "\ude00"}],
            r"prompt: message 1 is no text: half a surrogate pair, '\ude00', at character 1, needs the whole character",
        ),
        ("ac", "prompt: got 'ac', but its token 'c' is number 5, beyond the models' 5 embeddings; needs the tokenizer"),
        (
            [{"role": "h", "content": [{"type": "image"}]}],
            "prompt: message 1 has a block of type 'image' in its content, needs blocks of text: the models here read",
        ),
        ([{"role": "h", "content": None}], "prompt: message 1 is {'role': 'h', 'content': None}, needs a role and a"),
        ([{"role": "assistant", "content": ""}], None),
    ],
)
def test_prompts_that_cannot_be_read(
    tokenizer: PreTrainedTokenizerFast,
    chat_tokenizer: PreTrainedTokenizerFast,
    prompt: Any,
    fault: str | None,
    tmp_path: Path,
) -> None:
    name = jsonl(tmp_path / "own.jsonl", {"prompt": "ab"}, {"prompt": prompt})
    fit = Fit(tokenizer, 10, vocab_size=5) if isinstance(prompt, str) else Fit(chat_tokenizer, 10)
    with nullcontext() if fault is None else pytest.raises(ConfigError) as error:
        load_train_rows(DataConfig(dataset_name=name), [], Checks(DataConfig(dataset_name=name), fit))
    assert fault is None or f"own.jsonl has 1 bad row: row 2: {fault}" in str(error.value)


def test_a_tokenizer_that_refuses_a_text(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise TypeError("no\nsuch text")

    monkeypatch.setattr("asyppo.data.checks.prompt_tokens", refuse)
    with pytest.raises(ConfigError, match=r"row 1: prompt: got 'a', but the tokenizer refuses it: no such text; needs"):
        fitting([{"prompt": "a"}], "train_dataset", tokenizer, DataConfig(), 10)


# --- how many tokens a text has at most ---


def byte_level(normalizer: Any = None, single: str = "$A", **changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *letters, "ab", "abc"])}
    made = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")], **changes))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        made.normalizer = normalizer
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(min_size=1, max_size=12), st.booleans())
def test_no_text_has_more_tokens_than_the_bound(text: str, nfc: bool) -> None:
    own = NFC if nfc else PLAIN
    assert 1 <= len(own(text)["input_ids"]) <= len(text.encode()) * (3 if nfc else 1)


PLAIN, NFC = byte_level(), byte_level(normalizers.NFC())


def test_of_which_tokenizers_a_bound_is_known(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokens_per_byte(PLAIN), tokens_per_byte(NFC), tokens_per_byte(tokenizer)) == (1, 3, None)
    for unknown in (byte_level(normalizers.NFKC()), byte_level(dropout=0.5), byte_level(end_of_word_suffix="</w>")):
        assert tokens_per_byte(unknown) is None
    own = byte_level(single="<eos> $A <eos>")
    assert Fit(own, 10).certain_bytes(10) == 8
    assert Fit(own, 10, vocab_size=100).certain_bytes(10) == 0  # it has tokens that the models have not


def test_what_certainly_fits_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what does not is counted: the same rows are found as by tokenizing all."""
    seen: list[str] = []

    def counted(prompts: Any, *rest: Any) -> Any:
        seen.extend(prompts)
        return prompt_tokens(prompts, *rest)

    monkeypatch.setattr(checks, "prompt_tokens", counted)
    rows = [{"prompt": text} for text in ("xyz", "abcabcabc", "x" * 6, "x" * 5)]
    found = fitting(rows, "rows", PLAIN, DataConfig(long_prompts="skip"), 5)
    assert [row["prompt"] for row in found] == ["xyz", "abcabcabc", "x" * 5]
    assert seen == ["abcabcabc", "x" * 6]

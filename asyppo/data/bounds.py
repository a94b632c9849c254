"""How many tokens a text has at most, known without tokenizing it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokens_per_byte(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return how many tokens a byte of text (UTF-8) makes at most; None where that is not known.

    It is known of byte-level BPE, which most language models have: its tokens are pieces of the text's bytes, none of
    them empty, and every byte is in one, so a text of n > 0 bytes has 1 to n tokens. Where text is first brought to
    Unicode's form NFC, its bytes may become three times as many (Unicode Standard Annex 15, section 8: the expansion
    factor of NFC in UTF-8).
    """
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    if getattr(type(tokenizer), "_encode_plus", None) is not TokenizersBackend._encode_plus:
        return None
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer, cut = parts["model"], parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    cuts = cut.get("pretokenizers", [cut])
    plain = (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
        and any(c.get("type") == "ByteLevel" and not c.get("add_prefix_space") for c in cuts)
        and all(c.get("type") in ("ByteLevel", "Digits") or _keeps_all(c) for c in cuts)
        and normalizer.get("type", "NFC") == "NFC"
        and parts["truncation"] is None
    )
    if not plain:
        return None
    return 3 if normalizer else 1


def _keeps_all(cut: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer only cuts, and leaves no text out."""
    return cut.get("type") == "Split" and cut.get("behavior") in ("Isolated", "MergedWithPrevious", "MergedWithNext")

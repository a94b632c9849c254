"""Whether critics understand the policy's tokens: what the tokenizers say of real prompts, not how many tokens there
are, which says nothing. Embeddings are padded to round sizes, and strangers can be of one size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from asyppo.config import ConfigError
from asyppo.models.critics.base import Critics
from asyppo.models.critics.loading import check_vocabulary
from asyppo.models.tokenizer import load_tokenizer

log = logging.getLogger("asyppo")

OTHERS_ALLOWED = 0.01  # of the vocabulary, where the prompts show none: reserved and unused tokens change their names


def check_tokens(
    critics: Critics,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    trust_remote_code: bool = False,
) -> None:
    """Raise ConfigError if the critics' checkpoint reads other texts than ``tokenizer``, the policy's, in the tokens of
    ``prompts``.

    ``vocab_size`` is the number of the policy's embeddings. What it samples beyond those of a critic has no text in
    either tokenizer; critics read their last token there. A critic in a checkpoint of a run has the tokenizer of the
    policy beside it; another one without a tokenizer is taken at its size.
    """
    configs = [getattr(model, "config", critics.config) for model in critics.models]
    for config in configs:
        check_vocabulary(config, config._name_or_path, min(len(tokenizer), vocab_size))
    smallest = min(config.get_text_config().vocab_size for config in configs)
    critics.last_token = smallest - 1 if smallest < vocab_size else None
    for path in dict.fromkeys(config._name_or_path for config in configs):
        if not path or path == tokenizer.name_or_path:
            continue
        own = _tokenizer_of(path, trust_remote_code)
        if own is None:
            log.warning(
                "critic.model_name_or_path: %r has no tokenizer; it is taken to have the policy's, whose %d tokens its "
                "embeddings have room for",
                path,
                len(tokenizer),
            )
            continue
        _compare(path, own, tokenizer, prompts)


def _tokenizer_of(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a critic by directory or hub name, or of the policy in the same checkpoint; None without any."""
    beside = Path(path).parent / "policy"
    for place in (path, str(beside)) if Path(path).is_dir() and beside.is_dir() else (path,):
        with suppress(ConfigError):
            return load_tokenizer(place, trust_remote_code)
    return None


def _compare(
    path: str, own: PreTrainedTokenizerBase, policys: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> None:
    """Raise ConfigError if the critic's ``own`` tokenizer has other texts for ordinary tokens, and warn of special
    tokens and of prompts that it would have cut otherwise."""
    texts, others = _texts(policys), _texts(own)
    special = {*policys.all_special_ids, *policys.get_added_vocab().values()}
    different = {token for token, text in texts.items() if others.get(token) != text}
    used = dict.fromkeys(token for prompt in prompts for token in prompt if token in different)
    met = [token for token in used if token not in special]
    ordinary = different - special
    if met or len(ordinary) > OTHERS_ALLOWED * len(texts):
        token = next(iter(met or ordinary))
        where = "in the prompts" if met else "in the vocabulary"
        raise ConfigError(
            f"critic.model_name_or_path: {path!r} has another tokenizer than the policy: {where}, token {token} is "
            f"{texts[token]!r} to the policy and {others.get(token)!r} to the critic, and so on with {len(ordinary)} "
            f"of {len(texts)} tokens; needs a critic with the policy's tokenizer"
        )
    if used:
        names = ", ".join(f"{texts[t]!r} ({'none' if t not in others else repr(others[t])} there)" for t in used)
        log.warning("critic.model_name_or_path: %r has other names for special tokens of the prompts: %s", path, names)
    plain = [policys.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    cut: list[Any] = [t(plain, add_special_tokens=False)["input_ids"] for t in (policys, own)] if plain else [[], []]
    otherwise = sum(one != other for one, other in zip(*cut, strict=True))
    if otherwise:
        log.warning(
            "critic.model_name_or_path: the tokenizer of %r cuts %d of %d prompts into other tokens than the policy's; "
            "the critic gets the policy's, whose texts it knows",
            path,
            otherwise,
            len(prompts),
        )


def _texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token: text for text, token in tokenizer.get_vocab().items()}

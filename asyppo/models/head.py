"""How a causal language model makes logits of its last hidden states, as far as the fused ops can follow it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from asyppo.config import ConfigError

# What configurations call the c of c tanh(x / c).
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class HeadRule(NamedTuple):
    """Logits are ``scale * softcap(x)`` of what the head gives, x: a scale is one over a temperature."""

    scale: float
    softcap: float | None


@contextmanager
def any_dtype_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``model`` runs on any device and in any precision: where it has flash attention, which does not, it has
    eager attention instead."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    flash = {i: c._attn_implementation for i, c in configs.items() if is_flash_attention_requested(c)}
    for i in flash:
        configs[i]._attn_implementation = "eager"
    try:
        yield
    finally:
        for i, own in flash.items():
            configs[i]._attn_implementation = own


@torch.no_grad()
def head_rule(model: PreTrainedModel) -> HeadRule:
    """Measure the rule on the model's own logits, so that a head with another one is refused rather than trained
    wrongly. Raises ConfigError."""
    name, head = type(model).__name__, model.get_output_embeddings()
    text = model.config.get_text_config()
    ids = torch.arange(4, device=model.device)[None] % text.vocab_size
    own = model(input_ids=ids, use_cache=False).logits.double()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    plain = head(hidden)
    if not own.isfinite().all():
        bad = [n for n, p in model.named_parameters() if not p.isfinite().all()]
        where = f"{bad[0]} has weights that are not" if bad else "its weights are"
        raise ConfigError(f"policy: the logits of {name} are not finite; {where}")
    softcap = next((c for attribute in SOFTCAPS if (c := getattr(text, attribute, None))), None)
    found = _nearest(own, plain.double(), softcap) if own.shape == plain.shape else None
    tolerance = 1e-3 if plain.dtype == torch.float32 else 1e-2
    if found is None or not _error(own, plain.double(), found) <= tolerance * float(own.abs().max()):
        raise ConfigError(
            f"policy: the logits of {name} are not a linear head on its last hidden states, times a number or capped "
            "by a tanh, which the fused ops need (another rule of its own?)"
        )
    # What was measured is a number of the configuration or one over it, but for rounding.
    numbers = [1.0, *(v for v in vars(text).values() if isinstance(v, float) and v > 0)]
    scale = min((s for v in numbers for s in (v, 1 / v)), key=lambda s: abs(s - found.scale))
    if abs(scale / found.scale - 1) > tolerance / 4:
        return found
    return HeadRule(scale, softcap / scale if softcap and found.softcap not in (None, softcap) else found.softcap)


def _nearest(own: Tensor, plain: Tensor, softcap: float | None) -> HeadRule | None:
    """The rule that gives logits nearest to ``own`` of the head's output ``plain``; scales fit in the least squares."""
    rules = [HeadRule(_ratio(own, plain), None)]
    if softcap is not None:
        rules.append(HeadRule(_ratio(own, _capped(plain, softcap)), softcap))
        # Scaled before they are capped: c tanh(s x / c) is s times a softcap of c / s.
        inside = own.abs() < 0.99 * softcap
        before = _ratio(softcap * (own[inside] / softcap).atanh(), plain[inside])
        rules.append(HeadRule(before, softcap / before if before else None))
    possible = [rule for rule in rules if rule.scale > 0]
    return min(possible, key=lambda rule: _error(own, plain, rule), default=None)


def _error(own: Tensor, plain: Tensor, rule: HeadRule) -> float:
    return float((own - rule.scale * _capped(plain, rule.softcap)).abs().max())


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _ratio(y: Tensor, x: Tensor) -> float:
    """The s that makes s x closest to y; 1 where x is 0."""
    square = float(x.square().sum())
    return float((x * y).sum()) / square if square else 1.0

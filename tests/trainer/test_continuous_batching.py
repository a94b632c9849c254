"""Continuous batching: responses and log-probs as of ``generate``; and the weights that samplers decode with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen3ForCausalLM

from asyppo.models.policy import Policy
from asyppo.rollout.samplers import (
    ContinuousBatchingSampler,
    DecodingSampler,
    GenerateSampler,
    Response,
    continuous,
)
from asyppo.rollout.samplers.base import WorkingWeights

PAD, EOS, OTHER_EOS = 0, 1, 5
PROMPTS = [torch.tensor(p) for p in ([3, 4, 5, 6, 7, 8], [9], [10, 11], [12, 13, 14])] * 3

Make = Callable[..., Any]


def likes_a(completions: list[str], **_: Any) -> list[float]:
    """Share of a's."""
    return [c.count("a") / max(len(c), 1) for c in completions]


def sampler(model: Qwen3ForCausalLM, **changes: Any) -> ContinuousBatchingSampler:
    """A sampler whose end-of-sequence tokens are EOS and OTHER_EOS."""
    return ContinuousBatchingSampler(model, **({"eos_token_ids": [EOS, OTHER_EOS], "pad_token_id": PAD} | changes))


def favour_the_end(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Give both end tokens a higher logit, whatever the model reads."""
    bias = torch.zeros(model.config.vocab_size)
    bias[[EOS, OTHER_EOS]] = 1.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def expected_logprob(model: Qwen3ForCausalLM, prompt: torch.Tensor, response: Response, temperature: float) -> Any:
    """By hand: one sequence, no padding, no cache."""
    with torch.no_grad():
        logits = model(torch.cat([prompt, response.tokens])[None]).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, response.tokens[:, None])[:, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_responses_and_logprobs(tiny_lm: Make, attention: str) -> None:
    model = favour_the_end(tiny_lm())
    model.set_attn_implementation(attention)
    responses = sampler(model, batch_size=5).sample(PROMPTS * 3, max_completion_length=4, temperature=0.7)
    assert model.config._attn_implementation == attention
    assert not model.training
    for prompt, response in zip(PROMPTS * 3, responses, strict=True):
        tokens = response.tokens.tolist()
        ends = [t in (EOS, OTHER_EOS) for t in tokens]
        assert not any(ends[:-1])
        assert response.truncated == (not ends[-1])
        assert len(tokens) == 4 or not response.truncated
        assert (response.tokens.dtype, response.logprob.dtype) == (torch.int64, torch.float32)
        torch.testing.assert_close(response.logprob, expected_logprob(model, prompt, response, 0.7), atol=1e-4, rtol=0)
    last = {int(r.tokens[-1]) for r in responses}
    assert {EOS, OTHER_EOS} <= last
    assert any(r.truncated for r in responses)
    assert any(len(r.tokens) == 1 for r in responses)


def test_frequencies_are_those_of_the_softmax_whatever_a_checkpoint_sets(tiny_lm: Make) -> None:
    model, prompt, count = tiny_lm(), torch.tensor([3, 4]), 1500
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, temperature=0.1, repetition_penalty=5.0, eos_token_id=7, max_length=3
    )
    responses = sampler(model, batch_size=count).sample([prompt] * count, max_completion_length=1, temperature=0.8)
    with torch.no_grad():
        probability = (model(prompt[None]).logits[0, -1] / 0.8).softmax(-1)
    seen = torch.stack([r.tokens[0] for r in responses]).bincount(minlength=len(probability))
    expected = count * probability
    common = expected >= 5
    chi_square = ((seen - expected).square() / expected)[common].sum()
    freedom = int(common.sum())
    assert freedom >= 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, (seen, expected)


def test_the_seed_decides(tiny_lm: Make) -> None:
    one = sampler(tiny_lm(), eos_token_ids=[])  # a model's own end token does not end a response
    drawn, states = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(one.sample(PROMPTS, max_completion_length=3, temperature=1.0))
        states.append(float(torch.rand(())))
    assert all(len(r.tokens) == 3 and r.truncated for r in drawn[0])
    for a, b in zip(drawn[0], drawn[1], strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.logprob, b.logprob)
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert states[0] == states[1] != states[2]
    second = one.sample(PROMPTS, max_completion_length=3, temperature=1.0)  # and the next call goes on from there
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(drawn[2], second, strict=True))


def test_no_prompts(tiny_lm: Make) -> None:
    assert sampler(tiny_lm()).sample([], max_completion_length=2, temperature=1.0) == []


def test_what_goes_wrong_is_said(tiny_lm: Make) -> None:
    with pytest.raises(RuntimeError, match=r"continuous batching: .*index out of range.*sampler: generate"):
        sampler(tiny_lm()).sample([torch.tensor([10_000])], max_completion_length=2, temperature=1.0)


def test_the_settings_that_transformers_5_17_has(tiny_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ("block_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "allow_block_sharing")
    older = make_dataclass("Older", [(name, Any, None) for name in (*known, "return_logprobs", "seed")])
    monkeypatch.setattr(continuous, "ContinuousBatchingConfig", older)
    assert sampler(tiny_lm())._batching(tiny_lm(), 10, 2).block_size == 32


def test_in_the_loop(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(sampler="continuous")
    trainer = tiny_trainer(config, likes_a)
    assert isinstance(trainer.engine.chosen, ContinuousBatchingSampler)
    row = trainer.step(1).metrics
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert isinstance(tiny_trainer(tiny_config(), likes_a).engine.chosen, DecodingSampler)  # on a CPU


# --- working weights ---


def test_float32_weights_are_the_models_own(tiny_lm: Make) -> None:
    model = tiny_lm()
    with WorkingWeights(model, torch.float32).current() as used:
        assert used is model


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_follows_the_policy_and_is_there_only_inside(tiny_lm: Make, tied: bool) -> None:
    model = tiny_lm(tie_word_embeddings=tied)
    weights = WorkingWeights(model, torch.bfloat16)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        with weights.current() as used:
            assert (used.lm_head.weight is used.model.embed_tokens.weight) == tied
            for own, copied in zip(model.parameters(), used.parameters(), strict=True):
                assert (own.dtype, copied.dtype) == (torch.float32, torch.bfloat16)
                assert torch.equal(own.bfloat16(), copied)
                assert own.requires_grad
                assert not copied.requires_grad
        assert not any(p.untyped_storage().nbytes() for p in used.parameters())


@pytest.mark.parametrize("kind", [GenerateSampler, DecodingSampler, ContinuousBatchingSampler])
def test_sampling_in_bfloat16_weights(tiny_lm: Make, kind: Any) -> None:
    """Not in float32, and not under autocast, whose norms and residuals are float32."""
    model = tiny_lm()
    one = kind(model, eos_token_ids=[EOS], pad_token_id=PAD, dtype=torch.bfloat16)
    prompts = PROMPTS[:2]
    for _ in range(2):
        with torch.no_grad():
            model.model.norm.weight.mul_(1.3)  # an update of the policy
        low = tiny_lm()
        low.load_state_dict(model.state_dict())
        low.bfloat16()
        for prompt, response in zip(
            prompts, one.sample(prompts, max_completion_length=5, temperature=1.0), strict=True
        ):
            expected = expected_logprob(low, prompt, response, 1.0)
            torch.testing.assert_close(response.logprob, expected, atol=0.05, rtol=0)
            assert (response.logprob - expected_logprob(model, prompt, response, 1.0)).abs().max() > 1e-4


def test_the_trainer_samples_in_the_policys_dtype(tiny_config: Make, tiny_trainer: Make, tiny_lm: Make) -> None:
    trainer = tiny_trainer(tiny_config(), likes_a, policy=Policy(tiny_lm(), dtype=torch.bfloat16))
    with trainer.engine.chosen.weights.current() as model:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

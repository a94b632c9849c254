"""Sampling: what a response is, and that its log-probs are those of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen3ForCausalLM

from asyppo.data.batch import make_batch, micro_batches
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import ContinuousBatchingSampler, DecodingSampler, GenerateSampler, Response

PAD, EOS, OTHER_EOS = 0, 1, 5
PROMPTS = [torch.tensor(p) for p in ([3, 4, 5, 6, 7, 8], [9], [10, 11], [12, 13, 14])] * 3

TinyLM = Callable[..., Qwen3ForCausalLM]
Make = Callable[..., Any]


@pytest.fixture(params=[GenerateSampler, DecodingSampler])
def sampler(request: pytest.FixtureRequest) -> Make:
    """Make a sampler of a model, whose end-of-sequence tokens are EOS and OTHER_EOS."""
    return lambda model, **changes: request.param(
        model, **({"eos_token_ids": [EOS, OTHER_EOS], "pad_token_id": PAD} | changes)
    )


def favour(model: Qwen3ForCausalLM, tokens: dict[int, float]) -> Qwen3ForCausalLM:
    """Give the model's head a bias towards these tokens, whatever it reads."""
    bias = torch.zeros(model.config.vocab_size)
    for token, logit in tokens.items():
        bias[token] = logit
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def check(response: Response, longest: int) -> None:
    """A response ends with its first end-of-sequence token, or at the limit."""
    tokens = response.tokens.tolist()
    ends = [t in (EOS, OTHER_EOS) for t in tokens]
    assert response.logprob.shape == response.tokens.shape
    assert response.logprob.dtype == torch.float32
    assert not any(ends[:-1])
    assert response.truncated == (not ends[-1])
    assert len(tokens) == longest if response.truncated else 1 <= len(tokens) <= longest


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_responses_end_with_any_end_token_or_at_the_limit(sampler: Make, tiny_lm: TinyLM, pad: int) -> None:
    model = favour(tiny_lm(), {EOS: 2.0, OTHER_EOS: 2.0})
    responses = sampler(model, pad_token_id=pad).sample(PROMPTS * 5, max_completion_length=3, temperature=1.0)
    assert len(responses) == 60
    for response in responses:
        check(response, 3)
    last = [int(r.tokens[-1]) for r in responses]
    assert EOS in last
    assert OTHER_EOS in last
    assert any(r.truncated for r in responses)
    assert any(not r.truncated and len(r.tokens) == 3 for r in responses)  # the limit cut nothing off


def test_a_response_of_one_token(sampler: Make, tiny_lm: TinyLM) -> None:
    model = favour(tiny_lm(), {EOS: 1e4})
    for limit in (1, 4):
        for response in sampler(model).sample(PROMPTS[:2], max_completion_length=limit, temperature=1.0):
            assert response.tokens.tolist() == [EOS]
            assert not response.truncated
            assert float(response.logprob) == 0


def test_no_end_token(sampler: Make, tiny_lm: TinyLM) -> None:
    responses = sampler(tiny_lm(), eos_token_ids=[]).sample(PROMPTS, max_completion_length=4, temperature=1.0)
    assert all(r.truncated and len(r.tokens) == 4 for r in responses)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_logprobs_are_the_trainers(sampler: Make, tiny_lm: TinyLM, temperature: float, pad: int) -> None:
    """Left padding in the sampler, right padding in the trainer: the same distribution of the same tokens."""
    model = favour(tiny_lm(), {EOS: 1.0})
    prompts = PROMPTS * 2
    responses = sampler(model, pad_token_id=pad).sample(prompts, max_completion_length=6, temperature=temperature)
    batch = make_batch(
        prompts,
        [r.tokens for r in responses],
        [r.logprob for r in responses],
        [0.0] * len(prompts),
        [r.truncated for r in responses],
        list(range(len(prompts))),
        pad_token_id=pad,
        device=torch.device("cpu"),
    )
    policy = Policy(model, temperature=temperature)
    logprob, entropy = policy.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 40))
    torch.testing.assert_close(batch.sampler_logprob, logprob, atol=1e-4, rtol=0)
    assert logprob[batch.mask].max() <= 0
    assert (entropy[batch.mask] > 0).all()
    # By hand, one sequence at a time and without any padding.
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            logits = model(torch.cat([prompt, response.tokens])[None]).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, response.tokens[:, None])[:, 0]
        torch.testing.assert_close(logprob[row, : len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_those_of_the_softmax(sampler: Make, tiny_lm: TinyLM, temperature: float) -> None:
    model, prompt, count = tiny_lm(), torch.tensor([3, 4]), 4000
    responses = sampler(model).sample([prompt] * count, max_completion_length=1, temperature=temperature)
    with torch.no_grad():
        probability = (model(prompt[None]).logits[0, -1] / temperature).softmax(-1)
    seen = torch.stack([r.tokens[0] for r in responses]).bincount(minlength=len(probability))
    expected = count * probability
    common = expected >= 5
    chi_square = ((seen - expected).square() / expected)[common].sum()
    freedom = int(common.sum())
    assert freedom >= 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, (seen, expected)


def test_a_checkpoints_own_sampling_settings_do_not_apply(sampler: Make, tiny_lm: TinyLM) -> None:
    def draw(own: GenerationConfig | None) -> list[Response]:
        model = tiny_lm()
        if own is not None:
            model.generation_config = own
        torch.manual_seed(3)
        drawn = sampler(model).sample(PROMPTS * 4, max_completion_length=6, temperature=1.0)
        assert own is None or model.generation_config is own
        return drawn

    own = GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        min_p=0.5,
        temperature=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        bad_words_ids=[[7]],
        suppress_tokens=[8],
        min_new_tokens=5,
        max_length=3,
        eos_token_id=7,
        num_beams=2,
    )
    for plain, other in zip(draw(None), draw(own), strict=True):
        assert torch.equal(plain.tokens, other.tokens)
        assert torch.equal(plain.logprob, other.logprob)


def test_own_settings_come_back_after_an_error(sampler: Make, tiny_lm: TinyLM) -> None:
    model = tiny_lm().train()
    own = model.generation_config
    with pytest.raises(IndexError):
        sampler(model).sample([torch.tensor([10_000])], max_completion_length=2, temperature=1.0)
    assert model.generation_config is own
    assert model.training


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_responses_come_in_the_order_of_the_prompts(sampler: Make, tiny_lm: TinyLM, batch_size: int) -> None:
    """A model that all but repeats the last token, so a response tells which prompt it belongs to."""
    model = tiny_lm(tie_word_embeddings=True, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(20 * torch.eye(19, 16) + 0.01)
    prompts = [torch.tensor([4] * (i % 4) + [3 + i]) for i in range(12)]
    responses = sampler(model, batch_size=batch_size).sample(prompts, max_completion_length=2, temperature=1.0)
    for i, response in enumerate(responses):
        assert response.tokens.tolist()[0] == 3 + i


def test_no_prompts(sampler: Make, tiny_lm: TinyLM) -> None:
    assert sampler(tiny_lm()).sample([], max_completion_length=2, temperature=1.0) == []


def test_every_token_of_a_large_vocabulary_can_be_drawn(sampler: Make, tiny_lm: TinyLM) -> None:
    """A default of transformers keeps the 50 likeliest only."""
    model = favour(tiny_lm(vocab_size=130), {token: 0.01 * token for token in range(130)})
    torch.nn.init.zeros_(model.lm_head.weight)
    responses = sampler(model).sample(PROMPTS * 250, max_completion_length=1, temperature=1.0)
    assert len({int(r.tokens) for r in responses}) == 130


@pytest.mark.parametrize("kind", [GenerateSampler, DecodingSampler, ContinuousBatchingSampler])
def test_at_temperature_0_the_likeliest_token_is_taken(tiny_lm: TinyLM, kind: Any) -> None:
    model = tiny_lm()
    one = kind(model, eos_token_ids=[EOS], pad_token_id=PAD)
    for prompt, response in zip(
        PROMPTS[:4], one.sample(PROMPTS[:4], max_completion_length=5, temperature=0.0), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.cat([prompt, response.tokens])[None]).logits[0, len(prompt) - 1 : -1]
        assert torch.equal(response.tokens, logits.argmax(dim=-1))


@pytest.mark.parametrize("kind", [GenerateSampler, DecodingSampler, ContinuousBatchingSampler])
def test_temperature_0_takes_the_likeliest_tokens(kind: Any, tiny_lm: Callable[..., Any]) -> None:
    model, prompts = tiny_lm(), [torch.tensor([3, 4, 5]), torch.tensor([6])]
    sampler = kind(model, eos_token_ids=[1], pad_token_id=0)
    for prompt, response in zip(prompts, sampler.sample(prompts, max_completion_length=5, temperature=0), strict=True):
        tokens = torch.cat([prompt, response.tokens])
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0]
        assert torch.equal(logits.argmax(dim=1)[len(prompt) - 1 : -1], response.tokens)
        assert not response.logprob.any()

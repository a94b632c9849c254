"""Decoding with a cache of keys and values: what is drawn, how often, and how little is computed for it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from asyppo.rollout.samplers import DecodingSampler, Response, decode, one_token
from asyppo.rollout.samplers.draw import draw, inverse

PAD, EOS = 0, 1

Make = Callable[..., Any]


def chi_square(seen: Tensor, expected: Tensor) -> float:
    """Pearson's statistic as standard deviations above its mean; what is expected less than 5 times counts as one."""
    rare = expected < 5
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    freedom = len(expected) - 1
    assert freedom >= 5
    return float((((seen - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5)


# --- drawing ---


def test_frequencies() -> None:
    """20,000 draws tell the distribution from one that is 3 % more or less tempered."""
    logits, count = 2 * torch.randn(300), 20_000
    token, logprob = draw(logits.expand(count, -1), temperature=0.8)
    torch.testing.assert_close(logprob, (logits / 0.8).log_softmax(0)[token])
    seen = token.bincount(minlength=300)
    assert chi_square(seen, count * (logits / 0.8).softmax(0)) < 4
    assert chi_square(seen, count * (logits / 0.8 * 1.03).softmax(0)) > 4
    assert chi_square(seen, count * (logits / 0.8 / 1.03).softmax(0)) > 4


def test_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of probability 2^-40, of which uniforms and sums in float32 would make one token or none."""
    logits = torch.full((1, 1025), -40 * torch.tensor(2.0).log())
    logits[0, 0] = 0.0  # the first has all but 2^-30
    for token in (1, 2, 513, 1024):
        at = (1 + (token - 0.5) * 2**-40) / (1 + 1024 * 2**-40)
        monkeypatch.setattr(torch, "rand", lambda *size, u=at, **options: torch.full(size, u, dtype=options["dtype"]))
        drawn, logprob = draw(logits)
        assert int(drawn) == token
        assert float(logprob) == pytest.approx(float(logits[0, 1]))


@pytest.mark.parametrize("share", [0.0, 0.5, 1 - 2**-53, 1.0])
def test_what_has_probability_0_is_never_drawn(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Not at the ends, where a uniform may be 0, or the very total."""
    logits = torch.tensor([-torch.inf, -1e30, 1.0, -torch.inf, 2.0, -1e30, -torch.inf])
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, share, dtype=options["dtype"]))
    assert draw(logits[None])[0].item() == (2 if share == 0 else 4)
    assert draw(torch.zeros(1, 1))[0].item() == 0


def test_the_inverse_by_hand() -> None:
    cumulative = torch.tensor([[0.0, 0.25, 0.25, 0.75, 1.0, 1.0]], dtype=torch.float64)
    for at, token in ((0.0, 1), (0.2, 1), (0.25, 3), (0.74, 3), (0.75, 4), (1.0, 4), (1.5, 4)):
        assert inverse(cumulative, torch.tensor([[at]], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_distribution(bad: float) -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        draw(torch.tensor([[0.0, 1.0], [bad, 1.0]]))


# --- responses ---


@pytest.mark.parametrize("batch_size", [60, 6000])
def test_responses_are_distributed_as_the_model_has_it(tiny_lm: Make, batch_size: int) -> None:
    """All responses of up to 3 tokens to two prompts, by their exact probabilities; 3,000 draws of each tell them from
    those of a model whose logits are a fifth larger. Of the smaller batch, places are filled as responses end."""
    model, count = tiny_lm(vocab_size=7), 3000 if batch_size > 60 else 600
    prompts = [torch.tensor([3, 4, 5, 6, 2]), torch.tensor([6])]
    sampler = DecodingSampler(model, eos_token_ids=[EOS], pad_token_id=PAD, batch_size=batch_size)
    responses = sampler.sample(prompts * count, max_completion_length=3, temperature=1.0)
    for which, prompt in enumerate(prompts):
        seen = [tuple(r.tokens.tolist()) for r in responses[which::2]]
        possible = [t for n in (1, 2, 3) for t in itertools.product(range(7), repeat=n) if EOS not in t[:-1]]
        possible = [t for t in possible if len(t) == 3 or t[-1] == EOS]
        logprob = {t: torch.zeros(2, dtype=torch.float64) for t in possible}
        of_three = [t for t in possible if len(t) == 3]
        with torch.no_grad():
            logits = model(torch.stack([torch.cat([prompt, torch.tensor(t)]) for t in of_three])).logits.double()
        by_prefix = {t[:n]: logits[i, len(prompt) - 1 + n] for i, t in enumerate(of_three) for n in range(3)}
        for response in possible:
            for n, token in enumerate(response):
                for tempered, scale in enumerate((1.0, 1.2)):
                    logprob[response][tempered] += (by_prefix[response[:n]] * scale).log_softmax(0)[token]
        probability = torch.stack([logprob[t] for t in possible]).exp()
        torch.testing.assert_close(probability.sum(dim=0), torch.ones(2, dtype=torch.float64))
        counts = torch.tensor([seen.count(t) for t in possible])
        assert chi_square(counts, count * probability[:, 0]) < 4
        assert batch_size == 60 or chi_square(counts, count * probability[:, 1]) > 4


def read(model: Any) -> list[tuple[int, int]]:
    """Shapes [rows, tokens] of all passes of ``model`` from now on."""
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_a_prompt_is_read_once_and_what_has_ended_is_dropped(tiny_lm: Make) -> None:
    model = tiny_lm()
    bias = torch.zeros(model.config.vocab_size)
    bias[EOS] = 3.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    prompts = [torch.tensor(p) for p in ([3, 4, 5], [6, 7, 8], [9])]
    shapes = read(model)
    sampler = DecodingSampler(model, eos_token_ids=[EOS], pad_token_id=PAD)
    responses = sampler.sample([p for p in prompts for _ in range(40)], max_completion_length=30, temperature=1.0)
    assert shapes[0] == (3, 3)
    assert all(width == 1 for _, width in shapes[1:])
    lengths = torch.tensor([len(r.tokens) for r in responses])
    under_way = [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]
    rows = [count for count, _ in shapes[1:]]
    assert len(rows) == len(under_way)
    # An eighth of the rows may have ended.
    assert all(needed <= got < needed * 8 / 7 + 1 for got, needed in zip(rows, under_way, strict=True))


def test_prompts_are_read_in_pieces_and_free_places_filled(tiny_lm: Make) -> None:
    model = tiny_lm()
    prompts = [torch.randint(3, 19, (1 + i % 9,)) for i in range(20)]
    shapes = read(model)
    sampler = DecodingSampler(model, eos_token_ids=[EOS], pad_token_id=PAD, batch_size=6, max_tokens=12)
    responses = sampler.sample([p for p in prompts for _ in range(2)], max_completion_length=9, temperature=1.0)
    assert max(rows for rows, _ in shapes) <= 6
    assert max(rows * width for rows, width in shapes if width > 1) <= 12
    for prompt, response in zip([p for p in prompts for _ in range(2)], responses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, response.tokens])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, response.tokens[:, None])[:, 0]
        torch.testing.assert_close(response.logprob, expected, atol=1e-5, rtol=0)


# --- a pass over one token ---


def of_family(name: str, **changes: Any) -> Any:
    """A tiny model of transformers in which every weight counts."""
    shape = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "sliding_window": None,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def assert_the_models(model: Any, prompts: list[Tensor], responses: list[Response]) -> None:
    """Log-probs are those of passes over whole sequences."""
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, response.tokens])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, response.tokens[:, None])[:, 0]
        torch.testing.assert_close(response.logprob, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}),
        ("mistral", {}),
        ("qwen2", {"head_dim": 4}),
        ("qwen3", {"num_key_value_heads": 4}),
    ],
)
def test_a_pass_over_one_token_is_the_models(
    monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    """Log-probs of ragged responses to ragged prompts are those of passes over whole sequences."""
    model = of_family(family, **changes)
    monkeypatch.setattr(one_token, "HEAD_ROWS", 5)  # of 23
    widths, forward = [], model.forward

    @functools.wraps(forward)
    def counted(**inputs: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counted)
    prompts = [torch.randint(2, 23, (n,)) for n in (2, 2, 5, 3, 7, 7, 7, 2)]
    sampler = DecodingSampler(model, eos_token_ids=[EOS], pad_token_id=PAD, batch_size=5)
    prompts = [p for p in prompts for _ in range(3)]
    responses = sampler.sample(prompts, max_completion_length=9, temperature=1.0)
    assert min(widths) > 1
    assert_the_models(forward, prompts, responses)


@pytest.mark.parametrize("once", [("cpu",), ()])
def test_prompts_are_kept_once_or_with_their_rows(monkeypatch: pytest.MonkeyPatch, once: tuple[str, ...]) -> None:
    """Of rows that end one by one; so many of one prompt and so few of the others that a grid of all would be mostly
    padding; and even ones."""
    monkeypatch.setattr(decode, "ONCE", once)
    model = of_family("qwen3")
    sampler = DecodingSampler(model, eos_token_ids=[EOS], pad_token_id=PAD)
    for counts in ((30, 2, 1, 1, 1), (3, 3, 3, 3, 3)):
        prompts = [torch.randint(2, 23, (n,)) for n in (2, 3, 5, 5, 7)]
        prompts = [p for p, count in zip(prompts, counts, strict=True) for _ in range(count)]
        responses = sampler.sample(prompts, max_completion_length=9, temperature=1.0)
        assert_the_models(model, prompts, responses)


def test_what_is_not_known_goes_through_the_model() -> None:
    """A window, another activation, weights in bfloat16, a layer that is not what it was, a hook, another class."""
    why = one_token.why_not_by_token
    assert "window" in str(why(of_family("mistral", sliding_window=4)))
    assert "gelu" in str(why(of_family("llama", hidden_act="gelu")))
    assert "float32" in str(why(of_family("llama").bfloat16()))
    model = of_family("llama")
    assert why(model) is None
    hook = model.model.layers[1].register_forward_hook(print)
    assert "model.layers.1 has a hook" in str(why(model))
    hook.remove()
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert "up_proj is a Sequential" in str(why(model))
    assert "Gemma" in str(why(of_family("gemma")))

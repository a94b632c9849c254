"""Whether a sampler samples from the policy: how it is measured, and what follows where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from asyppo.config import ConfigError
from asyppo.loop import TrainingError
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import SAMPLERS, GenerateSampler, Response, agreement, make_sampler, settle
from asyppo.run.directory import read_jsonl

Make = Callable[..., Any]

PROMPTS = [torch.tensor(p) for p in ([3, 4, 5, 6, 7, 8, 9, 10, 11], [9], [10, 11])]
SHAPE: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 32},
    "minimax": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
    },
    "rwkv": {"attention_hidden_size": 32},
    "llama": {},
}


def of_family(name: str) -> Policy:
    """A tiny model with weights large enough for distributions far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE | FAMILIES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2 if name != "gptj" else 8)
    return Policy(model)


def likes_a(completions: list[str], **_: Any) -> list[float]:
    """Share of a's."""
    return [c.count("a") / max(len(c), 1) for c in completions]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What asyppo has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "asyppo"]


class Tempered(GenerateSampler):
    """Samples at a temperature of its own, and says what it did."""

    def __init__(self, policy: Policy, scale: float = 1.0):
        super().__init__(policy.model, eos_token_ids=[1], pad_token_id=0)
        self.scale = scale

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """As ``Sampler``."""
        return super().sample(
            prompts, max_completion_length=max_completion_length, temperature=temperature * self.scale
        )


# --- the measure ---


def test_agreement(tiny_lm: Make, tiny_config: Make) -> None:
    policy, config = Policy(tiny_lm(), temperature=0.8), tiny_config()
    before = torch.get_rng_state()
    assert agreement(Tempered(policy), policy, PROMPTS, config).gap < 1e-6
    assert agreement(Tempered(policy, 1.3), policy, PROMPTS, config).gap > 0.05
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("family", "scale"), [("gpt2", 1), ("gpt2", 0.1), ("llama", 2), ("gptj", 0.01)])
def test_in_bfloat16_the_policys_own_rounding_says_what_is_much(
    family: str, scale: float, tiny_config: Make, tokenizer: Any
) -> None:
    """The decoding loop passes where log-probs are rounded by a thousandth and by a tenth; GPT-J under continuous
    batching, which is wrong, does not although it is within a tenth."""
    policy = of_family(family)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    policy.dtype = torch.bfloat16
    config = tiny_config(sampler="continuous" if family == "gptj" else "generate", max_completion_length=8)
    sampler = make_sampler(policy, tokenizer, config)
    found = agreement(sampler, policy, PROMPTS, config)
    assert policy.dtype == torch.bfloat16
    assert found.rounding is not None
    if family == "gptj":
        assert 0.001 < found.gap < 0.1
        with pytest.raises(ConfigError, match="continuous batching: log-probs differ"):
            settle(sampler, sampler, policy, PROMPTS, config)
    else:
        assert found.gap < 4 * found.rounding
        assert settle(sampler, sampler, policy, PROMPTS, config) == found.gap


# --- what is taken ---


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("gpt2", "a cache of keys and values"),
        ("bloom", "a cache of keys and values"),
        ("gemma3_text", "a cache of keys and values"),
        ("lfm2", "transformers' generate"),
        ("minimax", "transformers' generate on prompts of one length"),
        ("rwkv", "transformers' generate without a cache"),
    ],
)
def test_a_way_that_agrees_is_taken(
    family: str, way: str, tiny_config: Make, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy, config = of_family(family), tiny_config(max_completion_length=8)
    sampler = make_sampler(policy, tokenizer, config)
    settle(sampler, sampler, policy, PROMPTS, config)
    lines = said(caplog)
    assert len(lines) == (way != "a cache of keys and values")
    assert all(line.startswith(f"sampler: {way} is used; a cache of keys and values: ") for line in lines)
    assert agreement(sampler, policy, PROMPTS, config).gap < 1e-5


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gptj", "log-probs differ from the trainer's by 0"),
        # From the thread of transformers 5.17, or from the call that would start it.
        ("lfm2", "(RuntimeError: continuous batching: 0 of .* finished; Invalid group|ValueError: Invalid layer)"),
    ],
    ids=["gptj", "lfm2"],
)
def test_a_named_sampler_is_refused_in_a_line(
    family: str, reason: str, tiny_config: Make, tokenizer: Any, capfd: pytest.CaptureFixture
) -> None:
    policy, config = of_family(family), tiny_config(sampler="continuous", max_completion_length=8)
    attention = policy.model.config._attn_implementation
    sampler = make_sampler(policy, tokenizer, config)
    capfd.readouterr()
    with pytest.raises(ConfigError, match=rf"^sampler: got 'continuous', .*; continuous batching: {reason}[^\n]*$"):
        settle(sampler, sampler, policy, PROMPTS, config)
    assert "Traceback" not in capfd.readouterr().err
    assert policy.model.config._attn_implementation == attention


def test_auto_falls_back_from_continuous_batching(
    tiny_config: Make, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU, with attention that pages."""

    def ways(attention: str, device: str) -> list[str]:
        config = SimpleNamespace(**vars(policy.model.config), _attn_implementation=attention)
        model = SimpleNamespace(config=config, generation_config=policy.model.generation_config, parameters=lambda: [])
        of = SimpleNamespace(model=model, device=torch.device(device), dtype=torch.float32)
        return list(SAMPLERS["auto"](of, tokenizer, tiny_config()).ways)

    policy, config = of_family("gptj"), tiny_config(max_completion_length=8)
    assert ways("sdpa", "cuda")[0] == ways("flash_attention_2", "cpu")[0] == "a cache of keys and values"
    assert ways("flash_attention_2", "cuda")[:2] == ["continuous batching", "a cache of keys and values"]
    sampler = SAMPLERS["continuous"](policy, tokenizer, config)
    sampler.ways |= SAMPLERS["generate"](policy, tokenizer, config).ways
    settle(sampler, sampler, policy, PROMPTS, config)
    [line] = said(caplog)
    assert line.startswith("sampler: a cache of keys and values is used; continuous batching: log-probs differ")


# --- in the loop ---


def test_one_of_ones_own_is_refused_before_the_run(tiny_config: Make, tiny_trainer: Make, tiny_lm: Make) -> None:
    policy, config = Policy(tiny_lm()), tiny_config()
    trainer = tiny_trainer(config, likes_a, policy=policy, sampler=Tempered(policy, 1.3))
    with pytest.raises(ConfigError, match=r"^sampler: log-probs differ .* more than 0.0001; needs"):
        trainer.train()


@pytest.mark.parametrize("tolerance", [None, 10.0])
def test_responses_of_another_policy_are_a_warning_and_then_an_error(
    tiny_config: Make, tiny_trainer: Make, tiny_lm: Make, caplog: pytest.LogCaptureFixture, tolerance: float | None
) -> None:
    policy = Policy(tiny_lm())
    config = tiny_config(max_steps=5, max_skipped_steps=2, sampling_logp_tolerance=tolerance, algorithm="grpo")
    trainer = tiny_trainer(config, likes_a, policy=policy, sampler=(sampler := Tempered(policy)))
    step = trainer.step

    def drifting(number: int) -> Any:
        sampler.scale = 1.0 if number in (1, 3) else 1.3
        return step(number)

    trainer.step = drifting
    if tolerance is not None:
        trainer.train()
        assert not said(caplog)
        return
    with pytest.raises(TrainingError, match=r"2 steps in a row had .* not sampled from the policy.*step 5; .*point-5"):
        trainer.train()
    assert [line.split(":")[0] for line in said(caplog)] == ["step 2", "step 4", "step 5"]


def test_an_engine_that_did_not_take_the_weights_is_seen_before_an_evaluation(
    tiny_config: Make, tiny_trainer: Make, tiny_lm: Make, caplog: pytest.LogCaptureFixture, prompts: Any
) -> None:
    class Stale(Tempered):
        def update_weights(self, weights: Any) -> None:
            """Forget them."""

    policy, config = Policy(tiny_lm()), tiny_config(algorithm="grpo", learning_rate=0.1)
    stale = Stale(Policy(tiny_lm()))
    tiny_trainer(config, likes_a, policy=policy, sampler=stale, eval_dataset=prompts[:2]).train()
    assert [line.split(":")[0] for line in said(caplog)] == ["step 1"]


def test_the_check_changes_no_number_of_a_run(
    tiny_config: Make, tiny_trainer: Make, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for checks in (True, False):
        if not checks:
            monkeypatch.setattr("asyppo.loop.settle", lambda *arguments: 0.0)
        run = tiny_trainer(tiny_config(run_name=f"{checks}"), likes_a, eval_dataset=prompts[:2]).train().run
        logged = read_jsonl(run.path / "metrics.jsonl")
        rows.append([{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf"))} for row in logged])
    for one, other in zip(*rows, strict=True):
        assert {k: (v, other.get(k)) for k, v in one.items() if v != other.get(k)} == {}

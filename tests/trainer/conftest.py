"""What the tests of the trainer share: tiny models, a tokenizer, a configuration, a sampler that says what it is told.

Everything is made here, nothing is downloaded. Helpers come as fixtures that return functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForTokenClassification

from asyppo.config import AsyPPOConfig, CriticConfig, EvalConfig
from asyppo.data.batch import Batch, make_batch
from asyppo.data.rows import Row
from asyppo.evaluate import Evaluation
from asyppo.models.critics import make_critics
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import Response
from asyppo.trainer import AsyPPOTrainer

PAD, EOS = 0, 1
CHARACTERS = "abcdefghijklmnop"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: <pad> 0, <eos> 1, <unk> 2, then a to p."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def chat() -> PreTrainedTokenizerFast:
    """Bytes, with Qwen3's special tokens and its chat template, as TRL has it."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<pad>", "<|im_end|>", *sorted(letters)])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL is not installed")
    tokenizer.chat_template = (Path(spec.origin).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def shape(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of a tiny model's config; weights large enough for distributions far from uniform."""
    return {
        "vocab_size": len(CHARACTERS) + 3,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    } | changes


@pytest.fixture
def tiny_lm() -> Callable[..., Qwen3ForCausalLM]:
    """Make a tiny causal language model in eval mode."""

    def make(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(Qwen3Config(**shape(**changes))).eval()

    return make


@pytest.fixture
def tiny_critic() -> Callable[..., Qwen3ForTokenClassification]:
    """Make a tiny value model in eval mode."""

    def make(seed: int = 0, **changes: Any) -> Qwen3ForTokenClassification:
        torch.manual_seed(seed)
        config = Qwen3Config(**shape(**{"num_hidden_layers": 1, "num_labels": 1} | changes))
        config.classifier_dropout = 0.0
        return Qwen3ForTokenClassification(config).eval()

    return make


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., AsyPPOConfig]:
    """Make a small configuration; ``critic`` and ``eval`` take dictionaries of their fields."""

    def make(critic: dict[str, Any] | None = None, evaluation: dict[str, Any] | None = None, **fields: Any) -> Any:
        defaults: dict[str, Any] = {
            "max_steps": 1,
            "output_dir": str(tmp_path / "runs"),
            "run_name": "run",
            "critic": CriticConfig(**({"learning_rate": 1e-2} | (critic or {}))),
            "eval": EvalConfig(**(evaluation or {})),
            "prompts_per_step": 3,
            "num_generations": 4,
            "max_completion_length": 5,
            "learning_rate": 1e-2,
            "num_mini_batches": 1,
        }
        return AsyPPOConfig(**(defaults | fields))

    return make


@dataclass
class ScriptedSampler:
    """Returns prepared responses, in order, whatever the prompts; repeats them from the start when they run out."""

    responses: list[Response]
    calls: list[list[Tensor]] = field(default_factory=list)

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return the first ``len(prompts)`` responses."""
        self.calls.append(list(prompts))
        return [copy.deepcopy(self.responses[i % len(self.responses)]) for i in range(len(prompts))]


@pytest.fixture
def scripted_sampler() -> Callable[..., ScriptedSampler]:
    """Make a sampler that returns these token lists, the last token of each being the end where it is EOS."""

    def make(responses: Sequence[Sequence[int]]) -> ScriptedSampler:
        return ScriptedSampler(
            [Response(torch.tensor(r), torch.full((len(r),), -1.0), truncated=r[-1] != EOS) for r in responses]
        )

    return make


def random_responses(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """``count`` responses of 1 to ``longest`` tokens; most end with EOS."""
    generator = torch.Generator().manual_seed(seed)
    responses = []
    for i in range(count):
        length = 1 + int(torch.randint(longest, (), generator=generator))
        tokens = torch.randint(3, 3 + len(CHARACTERS), (length,), generator=generator).tolist()
        responses.append(tokens if i % 4 == 3 else [*tokens[:-1], EOS])
    return responses


@pytest.fixture
def make_responses() -> Callable[..., list[list[int]]]:
    """``random_responses`` for tests."""
    return random_responses


@pytest.fixture
def prompts() -> list[Row]:
    """Rows with prompts of different lengths."""
    return [{"prompt": text} for text in ("ab", "cdefg", "h", "ijkl", "mno", "pab", "acegik", "bd")]


@pytest.fixture
def tiny_trainer(
    tiny_lm: Callable[..., Qwen3ForCausalLM],
    tiny_critic: Callable[..., Qwen3ForTokenClassification],
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Row],
) -> Callable[..., AsyPPOTrainer]:
    """Make a trainer of tiny models for a configuration."""

    def make(config: AsyPPOConfig, reward: Callable[..., Any], *, dtype: torch.dtype = torch.float32, **kw: Any) -> Any:
        critics = [tiny_critic(seed=10 + m) for m in range(config.num_critics)]
        kind = kw.pop("critics", config.critic.kind)  # side critics are the trainer's to make
        return AsyPPOTrainer(
            policy=kw.pop("policy", None) or Policy(tiny_lm(), temperature=config.temperature, dtype=dtype),
            critics=make_critics(critics, config.critic, dtype=dtype) if kind == "mini" and critics else None,
            tokenizer=tokenizer,
            reward_funcs=[reward],
            train_dataset=kw.pop("train_dataset", prompts),
            config=config,
            **kw,
        )

    return make


@pytest.fixture
def exact_value() -> Callable[..., float]:
    """The value of a state, by going through everything that can be written from it."""

    def value(model: Qwen3ForCausalLM, tokens: list[int], room: int, reward: Callable[[list[int]], float]) -> float:
        """Of ``tokens``, a prompt and what is written of its response, where ``room`` tokens are left; ``reward`` is of
        all that is written in the end, prompt included."""
        open_ones, total = {tuple(tokens): 1.0}, 0.0
        while open_ones and room:
            with torch.no_grad():
                chance = model(torch.tensor(list(open_ones))).logits[:, -1].double().softmax(dim=-1).tolist()
            grown = {
                (*written, token): p * q
                for (written, p), row in zip(open_ones.items(), chance, strict=True)
                for token, q in enumerate(row)
            }
            room -= 1
            over = {written: p for written, p in grown.items() if written[-1] == EOS or room == 0}
            total += sum(p * reward(list(written)) for written, p in over.items())
            open_ones = {written: p for written, p in grown.items() if written not in over}
        return total

    return value


@pytest.fixture
def ragged_batch() -> Callable[..., Batch]:
    """Make a batch of random tokens with ragged prompts and responses, G responses a prompt."""

    def make(num_prompts: int = 3, num_generations: int = 4, longest: int = 6, seed: int = 0, pad: int = PAD) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        count = num_prompts * num_generations
        responses = random_responses(count, longest, seed)
        heads = [torch.randint(3, 19, (1 + i % 4,), generator=generator) for i in range(num_prompts)]
        return make_batch(
            [heads[i // num_generations] for i in range(count)],
            [torch.tensor(r) for r in responses],
            [-torch.rand(len(r), generator=generator) for r in responses],
            torch.randn(count, generator=generator).tolist(),
            [r[-1] != EOS for r in responses],
            [i // num_generations for i in range(count)],
            pad_token_id=pad,
            device=torch.device("cpu"),
        )

    return make


@pytest.fixture
def scripted_evaluation() -> Callable[[float], Evaluation]:
    """Make an evaluation of ten prompts, one response each, so many of them right."""

    def make(accuracy: float) -> Evaluation:
        right = [[i < round(10 * accuracy)] for i in range(10)]
        return Evaluation(["other"] * 10, right, [{"response_length": 1, "truncated": False}] * 10)

    return make

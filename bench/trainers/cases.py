"""What both trainers are given: models from a configuration, prompts of random tokens, a reward."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

Family = Literal["llama", "qwen3"]
OURS_GRPO, OURS, PEER = "grpo (asyppo)", "asyppo", "GRPO (TRL)"
CONTENDERS = (OURS_GRPO, OURS, PEER)


@dataclass(frozen=True)
class Shape:
    """A model: its head is its embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int

    def sizes(self) -> dict[str, int]:
        """Under transformers' names."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.mlp,
        }


@dataclass(frozen=True)
class TrainerCase:
    """One comparison. ``prompts`` of a step, ``generations`` of each, and their greatest lengths in tokens.

    ``ragged``: lengths vary, and each library has its own defaults; otherwise all are of the greatest length, which no
    end-of-sequence token cuts, and both do the same work: one update, no checkpointing of layers. TRL's is one
    micro-batch; ours are what a CPU takes at once (``asyppo.data.batch.CPU_TOKENS``).
    """

    name: str
    family: Family
    vocabulary: int
    policy: Shape
    critic: Shape
    prompts: int
    generations: int
    prompt: int
    completion: int
    steps: int
    ragged: bool = False
    targets: dict[str, float] = field(default_factory=dict)
    """Shares of TRL's CPU seconds that are aimed at."""

    @property
    def responses(self) -> int:
        """Of a step."""
        return self.prompts * self.generations


SMALL = TrainerCase(
    "1.2 million",
    "llama",
    1024,
    Shape(128, 5, 4, 4, 384),
    Shape(64, 3, 4, 4, 192),
    *(8, 8, 32, 128),
    steps=6,
    targets={OURS_GRPO: 0.7, OURS: 0.9},
)
CASES = (
    SMALL,
    TrainerCase(
        "11.5 million",
        "llama",
        32_000,
        Shape(256, 4, 4, 4, 736),
        Shape(128, 2, 4, 4, 368),
        *(8, 8, 32, 64),
        steps=3,
        targets={OURS_GRPO: 0.35, OURS: 0.4},
    ),
    TrainerCase(
        "100 million",
        "qwen3",
        32_000,
        Shape(768, 12, 12, 4, 2048),
        Shape(384, 6, 6, 2, 1024),
        *(2, 8, 32, 64),
        steps=2,
        targets={OURS_GRPO: 0.5, OURS: 0.6},
    ),
    TrainerCase(
        "vocabulary of 151,936",
        "qwen3",
        151_936,
        Shape(128, 4, 4, 2, 384),
        Shape(64, 2, 4, 2, 192),
        *(2, 8, 32, 32),
        steps=3,
    ),
    replace(SMALL, name="1.2 million, ragged, as by default", prompt=64, steps=8, ragged=True, targets={}),
)
QUICK = TrainerCase("quick", "llama", 67, Shape(16, 2, 2, 1, 24), Shape(8, 1, 2, 1, 16), *(2, 2, 6, 5), steps=1)
"""To see that it runs."""


def model_of(case: TrainerCase, shape: Shape, seed: int, kind: str) -> Any:
    """A model of transformers, ``ForCausalLM`` or ``ForTokenClassification``, with random weights in float32."""
    import transformers

    family = {"llama": "Llama", "qwen3": "Qwen3"}[case.family]
    sizes = shape.sizes() | {"max_position_embeddings": case.prompt + case.completion}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=case.vocabulary, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None, **sizes
    )
    if kind == "ForTokenClassification":
        config.num_labels, config.classifier_dropout = 1, 0.0
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}{kind}")(config)


def policy_of(case: TrainerCase) -> Any:
    """The policy; with ragged lengths so many of its tokens end a response that half the greatest length is the mean
    where none is cut off."""
    model = model_of(case, case.policy, 0, "ForCausalLM")
    if case.ragged:
        model.generation_config.eos_token_id = endings(case)
    return model


def endings(case: TrainerCase) -> list[int]:
    """Tokens that end a response, the last of the vocabulary."""
    count = 2 * case.vocabulary // case.completion if case.ragged else 0
    return list(range(case.vocabulary - count, case.vocabulary))


def parameters(model: Any) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in model.parameters())


def rows_of(case: TrainerCase) -> list[dict[str, str]]:
    """Prompts, of which a step takes others each time."""
    generator = random.Random(0)
    last = case.vocabulary - len(endings(case)) - 1
    lengths = (generator.randint(case.prompt // 8, case.prompt) if case.ragged else case.prompt for _ in range(64))
    return [{"prompt": " ".join(str(generator.randint(1, last)) for _ in range(length))} for length in lengths]


class Reward:
    """The share of even tokens in a response; ``tokens`` counts those of all responses."""

    __name__ = "even"

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """In TRL's signature."""
        self.tokens += sum(map(len, completion_ids))
        return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]

"""Train from Python: one's own models, rows, reward and callback.

Run it: ``python examples/python_door.py [POLICY [CRITICS]]``, directories or hub names; CRITICS is what both
critics start from, and reads the policy's tokens.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback

from asyppo.config import AsyPPOConfig, CriticConfig
from asyppo.trainer import AsyPPOTrainer, TrainResult

ROWS = [{"prompt": f"Count down from {number}: ", "first": str(number - 1)} for number in range(2, 100)]


def digits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Reward of each completion, in TRL's signature: the fraction of its characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def begins_right(prompts: list[str], completions: list[str], *, first: list[str], **_: Any) -> list[float]:
    """Rewards see every column of the rows: 1 where the completion begins with what ``first`` says."""
    return [float(text.startswith(answer)) for text, answer in zip(completions, first, strict=True)]


class Print(TrainerCallback):
    """A callback as transformers has them; it could also save, evaluate or stop."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Print what a step came to."""
        if logs and "critic/score/mean" in logs:
            print(f"step {logs['step']:.0f}: reward {logs['critic/score/mean']:.3f}")


def main(policy: str = "Qwen/Qwen3-0.6B-Base", critics: str = "Qwen/Qwen3-0.6B-Base", **settings: Any) -> TrainResult:
    """Train for some steps and return where the run lies; ``settings`` are further fields of the configuration."""
    config = AsyPPOConfig(
        **{
            "max_steps": 20,
            "prompts_per_step": 8,
            "num_generations": 8,
            "max_completion_length": 32,
            "critic": CriticConfig(num_critics=2, learning_rate=1e-5),
        }
        | settings
    )
    trainer = AsyPPOTrainer(
        policy=policy,
        critics=critics,
        reward_funcs=[digits, begins_right],
        train_dataset=ROWS,
        config=config,
        callbacks=[Print()],
    )
    return trainer.train()


if __name__ == "__main__":
    result = main(*sys.argv[1:])
    print(f"{result.checkpoint}/policy is for AutoModelForCausalLM.from_pretrained")

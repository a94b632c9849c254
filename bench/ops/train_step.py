"""The trainer's whole step: sampling, rewards, and the update of ``bench.ops.update`` on what was sampled."""

from __future__ import annotations

import torch

from bench.cases import Case, Inputs, Scale, Sweep, Work
from bench.ops import update
from bench.ops.update import GENERATIONS, GRAPH, SLACK, required  # noqa: F401  (as of the update)

OP = "train_step"
# Responses B, tokens T of a sequence, those of its prompt among them: few, as sampling takes a pass for each.
BATCH: dict[Scale, tuple[int, int, int]] = {"gpu": (8, 256, 64), "cpu": (8, 96, 32), "quick": (8, 12, 4)}
TARGETS = tuple(update.Target(t.figure, t.of, t.over, None) for t in update.TARGETS)
TARGET_NOTE = "No targets: sampling is the same for all"


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """One batch of prompts. Responses have the longest length there is: the end-of-sequence token cannot be drawn."""
    return update.training_case(OP, scale, device, BATCH[scale])


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """None, as of the update."""
    return []


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """The prompts; token 0, which pads, is in none."""
    shape = (case.sizes["B"] // GENERATIONS, case.sizes["prompt"])
    return {"prompts": torch.randint(1, case.sizes["V"], shape, device=case.device, generator=generator)}


def rows_of(given: Inputs) -> list[dict[str, str]]:
    """Rows of training data: a token is written as its number."""
    return [{"prompt": " ".join(map(str, row))} for row in given["prompts"].tolist()]


def tokenizer_of(case: Case) -> object:
    """A token is a word, its number. The end-of-sequence token lies beyond the model's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(case.sizes["V"])} | {"<eos>": case.sizes["V"]}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="<eos>")


def reward(completions: list[str], **columns: object) -> list[float]:
    """The mean of the tokens' numbers modulo 7: no two responses need have the same."""
    return [sum(int(word) % 7 for word in text.split()) / max(1, len(text.split())) for text in completions]


def phases(case: Case) -> dict[str, Work]:
    """Those of the update, and sampling: every token of a response reads the weights once."""
    parts = update.phases(case)
    once = parts["old_log_prob"]
    steps = case.sizes["T"] - case.sizes["prompt"]
    return {"gen": Work(once.flops, once.bytes * steps)} | parts


def work(case: Case) -> Work:
    """Of AsyPPO."""
    return update.total(phases(case), "AsyPPO's products and AdamW, and a pass over the weights a sampled token")

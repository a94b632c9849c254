"""Reward functions of one's own, in TRL's signature: lists with one item a sample, columns of the data by name."""

import re


def close_answer(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """1 for the right answer, less the further it is off, 0 for none."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        found = re.search(r"<answer>(-?\d+)</answer>", completion)
        rewards.append(0.0 if found is None else 1 / (1 + abs(int(found[1]) - right)))
    return rewards


def short_working(completions: list[str], completion_ids: list[list[int]], **_: object) -> list[list[float]]:
    """Minus 1 for each token after the twelfth: a reward for every token in place of one for the whole response."""
    return [[0.0 if position < 12 else -1.0 for position in range(len(ids))] for ids in completion_ids]

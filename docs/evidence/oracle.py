"""Values that know whether the working is right so far: what credit by the token could bring, if critics knew as much.

``algorithm: docs/evidence/oracle.py:oracle``, from the repository's root, on chain sums alone. A state's value is the
mean score of the batch over the states with as many running totals still to write that are free of mistakes so far,
and over all that are not. There is no critic, so nothing to learn, and no σ: the masks drop nothing.
"""

from __future__ import annotations

import random
import re

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from asyppo.algorithm.advantage import critics_advantage
from asyppo.algorithm.algorithms import Algorithm
from asyppo.algorithm.masked import masked_mean
from asyppo.data.batch import Batch
from asyppo.models.warm_start import chain_sum_solution

EXPRESSION = re.compile(r"-?\d+(?: [+-] \d+)+")


def states(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return of the state that predicts each token whether what was written up to it begins the right solution, bool
    [B, T], and how many running totals that solution has still to go, int64 [B, T], 0 after a mistake."""
    right_so_far, to_go = torch.zeros_like(batch.mask), torch.zeros(batch.mask.shape, dtype=torch.int64)
    solutions: dict[int, str] = {}
    pieces: dict[int, str] = {}
    prompt_length, response_length = batch.on_host
    for b, (row, group) in enumerate(zip(batch.tokens.tolist(), batch.group.tolist(), strict=True)):
        start, length = prompt_length[b], response_length[b]
        if group not in solutions:
            found = EXPRESSION.search(tokenizer.decode(row[:start]))
            if found is None:
                raise ValueError(f"prompt: got {tokenizer.decode(row[:start])!r}, needs a chain of sums")
            solutions[group] = chain_sum_solution({"expression": found[0]}, 0.0, 0.0, random.Random(0))
        solution, written = solutions[group], ""
        for t, token in enumerate(row[start : start + length]):
            if not solution.startswith(written):
                break
            right_so_far[b, t], to_go[b, t] = True, solution[len(written) :].count(",")
            if token not in pieces:
                pieces[token] = tokenizer.decode([token])
            written += pieces[token]
    return right_so_far, to_go.to(batch.mask.device)


def values(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return float32 [1, B, T]."""
    right_so_far, to_go = states(batch, tokenizer)
    score = batch.reward.sum(dim=1, keepdim=True).expand_as(batch.reward)
    value = torch.zeros_like(batch.reward)
    for number in to_go.unique().tolist():
        for right in (True, False):
            alike = batch.mask & (right_so_far == right) & (to_go == number)
            value = torch.where(alike, masked_mean(score, alike), value)
    return value[None]


oracle = Algorithm(critics_advantage, values=values)

"""Step 1 of AsyPPO: each prompt's responses, divided among the critics."""

from __future__ import annotations

import torch
from torch import Tensor


def split_responses(group: Tensor, num_critics: int, generator: torch.Generator) -> Tensor:
    """Assign each response to one critic: int64 [B] in 0 … M-1 (AsyPPO, group-level non-overlapping split).

    ``group`` int64 [B] is the prompt that a response answers. Each prompt's responses are dealt out at random, evenly
    and disjointly; where G is no multiple of M, the critics that get one more change from prompt to prompt.
    """
    group = group.cpu()
    shuffled = torch.randperm(len(group), generator=generator)
    by_group = shuffled[torch.argsort(group[shuffled], stable=True)]
    # Dealing goes on from prompt to prompt without starting again at critic 0, which rotates the remainder.
    first = int(torch.randint(num_critics, (), generator=generator))
    assignment = torch.empty(len(group), dtype=torch.int64)
    assignment[by_group] = (torch.arange(len(group)) + first) % num_critics
    return assignment

"""What a step samples, response by response, and which groups of responses it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from asyppo.data import Row
from asyppo.sampler import Response


@dataclass
class Sample:
    """A response to a prompt, with its rewards."""

    row: Row
    prompt: Tensor
    """int64 [length]."""
    response: Response
    completion: str
    """The response's text, without special tokens."""
    rewards: dict[str, float | None]
    """By reward function."""
    total: float | Tensor
    """Their weighted sum; where tokens are rewarded, float32 [tokens]."""

    @property
    def score(self) -> float:
        """The weighted sum over functions and tokens."""
        return float(self.total.sum()) if isinstance(self.total, Tensor) else self.total


Group = list[Sample]
"""The G responses to one prompt."""


def keep_unequal(
    draw: Callable[[int, int], list[Group]], count: int, max_batches: int
) -> tuple[list[Group], dict[str, float]]:
    """Draw until there are ``count`` groups whose rewards are not all equal, at most ``max_batches`` times, and return
    them with metrics (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2).

    ``draw(batch, n)`` samples n new groups; n is what is missing, so no response is left over. Where unequal groups are
    too few in the end, the first of the others fill up, so that every step has as many.
    """
    kept: list[Group] = []
    equal: list[Group] = []
    batches = 0
    while len(kept) < count and batches < max_batches:
        for group in draw(batches, count - len(kept)):
            (kept if len({sample.score for sample in group}) > 1 else equal).append(group)
        batches += 1
    filled = count - len(kept)
    return kept + equal[:filled], {
        "sampling/num_gen_batches": float(batches),
        "sampling/equal_groups_frac": len(equal) / (len(kept) + len(equal)),
        "sampling/filled_groups": float(filled),
    }

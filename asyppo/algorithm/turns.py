"""Responses of several turns, between which an environment answers: what critics learn there, and whose luck it was.

A turn's last token leads to a state of its own, in which the environment's answer is still open: the position that
predicts the first token of the answer. V there, U, is the value of what the policy did; V at the first token of the
next turn is the value of what it got.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Turns:
    """Where an environment answered, on the response grid [B, T]."""

    answered: Tensor
    """bool [B, T]: last tokens of the turns that have an answer."""
    reward: Tensor
    """float32 [B, T]: what of the reward at these tokens was given after them, by the answer; 0 elsewhere."""

    @property
    def after(self) -> Tensor:
        """bool [B, T]: first tokens of the answers; the position that predicts one is the state after a turn."""
        return pad(self.answered[:, :-1], (1, 0))


def returns_after_turns(returns: Tensor, reward: Tensor, turns: Turns) -> Tensor:
    """Return ``returns`` [M, B, T] or [B, T] with those of the states after turns, too: what is left of the return of
    the turn's last token, less the penalties that ``reward`` [B, T] has for that token itself."""
    left = returns - torch.where(turns.answered, reward - turns.reward, 0.0)
    return torch.where(turns.after, pad(left[..., :-1], (1, 0)), returns)


def reward_without_luck(reward: Tensor, mean: Tensor, mask: Tensor, turns: Turns, gamma: float) -> Tensor:
    """Return the rewards [B, T] with which GAE across skipped steps leaves out what the answers brought beyond what was
    expected.

    At a turn's last token, GAE's difference is r + gamma V' - V, with V' of the next turn's first token (0 if there is
    none). It is the sum of U - V, which is the token's own, and of r + gamma V' - U, the environment's, whose
    expectation is 0 where U is right (a control variate, as AIVAT's, arXiv 1612.06915). With U - gamma V' in the place
    of r, the first is left. ``mean`` float32 [B, T] is V at policy tokens and U at first tokens of answers; ``mask``
    bool [B, T] the policy tokens.
    """
    steps = mask.shape[1]
    here = torch.where(mask, torch.arange(steps, device=mask.device), steps)
    following = pad(here.flip(1).cummin(dim=1).values.flip(1)[:, 1:], (0, 1), value=steps)
    value_next = pad(torch.where(mask, mean, 0.0), (0, 1)).gather(1, following)
    value_after = pad(mean[:, 1:], (0, 1))
    return torch.where(turns.answered, reward - turns.reward + value_after - gamma * value_next, reward)

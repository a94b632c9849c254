"""Responses continued from where they stand, and what they come to: Monte Carlo estimates of a state's value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyppo.algorithm.signal import StateValues
from asyppo.data.batch import Batch, make_batch
from asyppo.data.rows import Row
from asyppo.metrics.samples import pieces
from asyppo.models.tokenizer import pad_token_id
from asyppo.rewards.computing import compute_rewards
from asyppo.rollout.collecting import Rollout, Sampled


@dataclass(frozen=True)
class State:
    """A response as far as it is written. It has not ended."""

    row: Row
    prompt: Tensor
    """int64 [length]."""
    written: Tensor
    """int64 [t], t = 0 included."""


@dataclass(frozen=True)
class Continued:
    """What K continuations of each of S states came to."""

    returns: Tensor
    """float32 [S, K], on the CPU: the rewards from the state on, discounted to it, as the algorithm sees them."""
    tokens: int
    """How many were sampled."""

    @property
    def mean(self) -> Tensor:
        """float32 [S]: estimates of the states' values."""
        return self.returns.mean(dim=1)

    @property
    def noise(self) -> Tensor:
        """float32 [S]: the variance of ``mean`` as an estimate, without bias: s^2 / K. NaN for K = 1."""
        return self.returns.var(dim=1) / self.returns.shape[1]


class Continuations:
    """``continuations(states, count)``: each state ``count`` times, with the policy that ``rollout`` samples from."""

    def __init__(self, rollout: Rollout, shape: Callable[[Batch], Batch], longest: int):
        """``shape`` gives responses the rewards that the algorithm sees, penalties included; ``longest`` is the tokens
        of prompt and response together that the sampler may be asked for."""
        self.rollout, self.shape, self.longest = rollout, shape, longest

    def __call__(self, states: Sequence[State], count: int, step: int | None = None) -> Continued:
        """Sample and reward ``count`` continuations of each state; ``step`` is for messages of reward functions.

        A continuation has the tokens that ``max_completion_length`` leaves it. States that are about as far along go
        together, as many as ``generation_batch_size`` lets through at once: the sampler takes one limit, and what lies
        past a state's own is cut off. Randomness comes from torch's global generator. Every rank samples its part, and
        gets all.
        """
        returns, tokens = torch.zeros(len(states), count), 0
        for chosen in self._parts(states, max(1, self.rollout.config.generation_batch_size // count)):
            returns[chosen], sampled = self._continue([states[i] for i in chosen], count, step)
            tokens += sampled
        return Continued(returns, tokens)

    def _parts(self, states: Sequence[State], at_once: int) -> Iterator[list[int]]:
        """Numbers of states that go together: the limit of the first of them keeps each within ``longest``."""
        limit, part = self.rollout.config.max_completion_length, list[int]()
        for i in sorted(range(len(states)), key=lambda i: len(states[i].written)):
            state = states[i]
            asked = len(state.prompt) + len(state.written) + limit - len(states[part[0] if part else i].written)
            if part and (len(part) == at_once or asked > self.longest):
                yield part
                part = []
            part.append(i)
        if part:
            yield part

    def _continue(self, states: Sequence[State], count: int, step: int | None) -> tuple[Tensor, int]:
        rollout, config = self.rollout, self.rollout.config
        repeated = [state for state in states for _ in range(count)]
        drawn = rollout.sampler.sample(
            [torch.cat([state.prompt, state.written]) for state in repeated],
            max_completion_length=config.max_completion_length - min(len(state.written) for state in states),
            temperature=config.temperature,
        )
        room = [config.max_completion_length - len(state.written) for state in repeated]
        responses = [
            torch.cat([state.written, response.tokens[:left]])
            for state, response, left in zip(repeated, drawn, room, strict=True)
        ]
        rewards = compute_rewards(
            rollout.reward_funcs,
            [state.row for state in repeated],
            rollout.tokenizer.batch_decode(responses, skip_special_tokens=True),
            [response.tolist() for response in responses],
            weights=config.reward_weights,
            step=step,
            trainer_state=rollout.trainer_state,
        )
        batch = make_batch(
            [state.prompt for state in repeated],
            responses,
            [torch.zeros(len(response)) for response in responses],
            rewards.total,
            [r.truncated or len(r.tokens) > left for r, left in zip(drawn, room, strict=True)],
            list(range(len(repeated))),
            pad_token_id=pad_token_id(rollout.tokenizer),
            device=rollout.device,
        )
        reward = self.shape(batch).reward.cpu()
        written = torch.tensor([len(state.written) for state in repeated])[:, None]
        ahead = torch.arange(reward.shape[1]) - written
        discounted = torch.where(ahead >= 0, config.gamma ** ahead.clamp(min=0) * reward, 0.0).sum(dim=1)
        return discounted.view(len(states), count), sum(len(r.tokens) for r in drawn)


def state_at(sampled: Sampled, response: int, position: int) -> State:
    """Return the state in which token ``position`` of a ``response`` of the batch was drawn."""
    batch = sampled.batch
    prompt = batch.on_host[0][response]
    tokens = batch.tokens[response, : prompt + position].cpu()
    return State(sampled.rows[response], tokens[:prompt], tokens[prompt:])


def monte_carlo_states(sampled: Sampled, rollout: Rollout) -> Tensor:
    """Return bool [B, T], on the CPU: the states of the responses that ``config.monte_carlo`` asks for, each where it
    predicts its token. The first of a response is always one."""
    config, lengths = rollout.config.monte_carlo, sampled.batch.on_host[1]
    states = torch.zeros(sampled.batch.reward.shape, dtype=torch.bool)
    for b, length in enumerate(lengths):
        if config.boundaries:
            prompt = sampled.batch.on_host[0][b]
            texts = pieces(rollout.tokenizer, sampled.batch.tokens[b, prompt : prompt + length].tolist())
            states[b, [0, *after_boundaries(texts, config.boundaries)]] = True
        else:
            states[b, 0 : length : config.every] = True
    return states


def after_boundaries(texts: Sequence[str], boundaries: Sequence[str]) -> list[int]:
    """Return which of the tokens with these ``texts`` come right after one in which a boundary ends."""
    found, text = [], ""
    for t, piece in enumerate(texts[:-1], start=1):
        before, text = len(text), text + piece
        if any(text.find(boundary, max(0, before + 1 - len(boundary))) >= 0 for boundary in boundaries):
            found.append(t)
    return found


def monte_carlo_values(
    sampled: Sampled, continuations: Continuations, step: int
) -> tuple[StateValues, dict[str, float]]:
    """Return the mean return of K continuations of the states that ``config.monte_carlo`` asks for (VinePPO, arXiv
    2410.01679, equation 6), and metrics of what that took. Equal states of several responses are one: that of their
    prompt is theirs all.
    """
    batch, rollout = sampled.batch, continuations.rollout
    states = monte_carlo_states(sampled, rollout)
    which: dict[tuple[int, tuple[int, ...]], int] = {}
    distinct: list[State] = []
    of: list[int] = []
    for b, t in states.nonzero().tolist():
        state = state_at(sampled, b, t)
        key = int(batch.group[b]), tuple(state.written.tolist())
        if key not in which:
            which[key] = len(distinct)
            distinct.append(state)
        of.append(which[key])
    count = rollout.config.monte_carlo.num_continuations
    continued = continuations(distinct, count, step)
    value = torch.zeros(batch.reward.shape)
    value[states] = continued.mean[of]
    metrics = {
        "monte_carlo/states": float(len(of)),
        "monte_carlo/continuations": float(len(distinct) * count),
        "monte_carlo/tokens": float(continued.tokens),
        "monte_carlo/tokens_per_response_token": continued.tokens / sum(batch.on_host[1]),
        "monte_carlo/value_se": float(continued.noise.mean()) ** 0.5,
    }
    return StateValues(value.to(batch.reward.device), states.to(batch.reward.device)), metrics

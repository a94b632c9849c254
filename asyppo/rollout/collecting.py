"""What a step samples, response by response, and which groups of responses it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState

from asyppo.config import AsyPPOConfig
from asyppo.data.batch import Batch, make_batch
from asyppo.data.prompts import Prompt, prompt_tokens
from asyppo.data.rows import Row
from asyppo.data.schedule import PromptSchedule
from asyppo.distributed.processes import forked_rng
from asyppo.environments.turn import Turn
from asyppo.models.tokenizer import pad_token_id
from asyppo.rewards.computing import Rewards, compute_rewards
from asyppo.rewards.function import RewardFunction
from asyppo.rewards.logged import Logged
from asyppo.rollout.environments import Episode, Playing, episode_metrics, episode_rewards
from asyppo.rollout.samplers import Response, Sampler, SentWeights
from asyppo.run.progress import Timer


@dataclass
class Sample:
    """A response to a prompt, with its rewards."""

    row: Row
    prompt: Tensor
    """int64 [length]."""
    response: Response
    completion: str | list[dict[str, Any]]
    """The response's text, without special tokens; of an episode that answers chat messages, those of both sides."""
    rewards: dict[str, float | None]
    """By reward function."""
    total: float | Tensor
    """Their weighted sum; where tokens are rewarded, float32 [tokens]."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns that reward functions logged."""

    @property
    def score(self) -> float:
        """The weighted sum over functions and tokens."""
        return float(self.total.sum()) if isinstance(self.total, Tensor) else self.total


@dataclass
class Sampled:
    """What a step learns from: a batch, its rewards by function, metrics of the sampling, and the prompts' rows."""

    batch: Batch
    rewards: Rewards
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """Of each response, the row of the data that it answers."""
    turns: list[list[Turn]] = field(default_factory=list)
    """Of each response, its turns; empty without an environment."""


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


@dataclass
class Ahead:
    """Responses of a step that are sampled before it begins."""

    step: int
    responses: Callable[[], list[Response]]
    """Waits for them."""
    changes: int
    """How often the policy's weights had changed when they were begun."""


class Rollout:
    """``rollout(step, timer)``: G responses to each prompt of a step, rewarded, as ``Sampled``."""

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        reward_funcs: Sequence[RewardFunction],
        dataset: Sequence[Row],
        config: AsyPPOConfig,
        device: torch.device,
        playing: Playing | None = None,
    ):
        """``playing``: what plays episodes with an environment; None: a response is one turn."""
        self.sampler, self.tokenizer, self.reward_funcs, self.playing = sampler, tokenizer, reward_funcs, playing
        self.dataset, self.config, self.device = dataset, config, device
        self.trainer_state = TrainerState(max_steps=config.max_steps)
        """What reward functions see of the run; the training loop puts its own here."""
        self.schedule = PromptSchedule(len(dataset), config.prompts_per_step, config.seed)
        # Of dynamic sampling: passes over the data of their own, so that those of the steps stay what they are.
        self.further_schedule = PromptSchedule(len(dataset), config.prompts_per_step, config.seed + 1_000_000)
        self.ahead: Ahead | None = None
        self.age = 0
        """Updates of the policy since the weights that the last responses are of."""

    def __call__(self, step: int, timer: Timer) -> Sampled:
        """Sample G responses for each prompt of ``step`` and reward them."""
        config = self.config
        metrics: dict[str, float] = {}
        timeouts: dict[str, int] = {}
        logged: dict[str, list[float]] = {}
        if config.dynamic_sampling:
            groups, metrics = keep_unequal(
                lambda batch, count: self._draw(
                    self._rows_of_batch(step, batch)[:count], step, timer, timeouts, logged
                ),
                config.prompts_per_step,
                config.dynamic_sampling_max_batches,
            )
        else:
            groups = self._draw(self.schedule.rows_of_step(step - 1), step, timer, timeouts, logged)
        if config.async_generation:
            metrics["sampling/age"] = float(self.age)
        samples = [sample for group in groups for sample in group]
        episodes = [s.response for s in samples if isinstance(s.response, Episode)]
        if episodes:
            metrics |= episode_metrics(episodes)
        batch = make_batch(
            [s.prompt for s in samples],
            [s.response.tokens for s in samples],
            [s.response.logprob for s in samples],
            [s.total for s in samples],
            [s.response.truncated for s in samples],
            [prompt for prompt in range(config.prompts_per_step) for _ in range(config.num_generations)],
            pad_token_id=pad_token_id(self.tokenizer),
            device=self.device,
            policy_tokens=[one.policy for one in episodes] or None,
        )
        by_function = {name: [s.rewards[name] for s in samples] for name in samples[0].rewards}
        columns = dict.fromkeys(name for s in samples for name in s.extra)
        extra = {name: [s.extra.get(name) for s in samples] for name in columns}
        rewards = Rewards(by_function, [s.total for s in samples], timeouts, Logged(logged, extra))
        rows, turns = [s.row for s in samples], [one.turns for one in episodes]
        return Sampled(batch, rewards, rewards.logged.means() | metrics, rows, turns)

    def _rows_of_batch(self, step: int, batch: int) -> list[int]:
        """Rows of the step's own prompts, and of further batches of them, each a function of the seed and the step."""
        if batch == 0:
            return self.schedule.rows_of_step(step - 1)
        index = (step - 1) * (self.config.dynamic_sampling_max_batches - 1) + batch - 1
        return self.further_schedule.rows_of_step(index)

    def _draw(
        self, indices: Sequence[int], step: int, timer: Timer, timeouts: dict[str, int], logged: dict[str, list[float]]
    ) -> list[Group]:
        """Sample and reward G responses to each of these rows of the training data."""
        config = self.config
        rows = [self.dataset[i] for i in indices for _ in range(config.num_generations)]
        known: dict[str, Any] = {
            "weights": config.reward_weights,
            "step": step,
            "trainer_state": self.trainer_state,
        }
        prompts: Sequence[Tensor]
        responses: Sequence[Response]
        completions: Sequence[str | list[dict[str, Any]]]
        if self.playing is not None:
            with timer.phase("gen"):
                played = self.playing(self.sampler, rows, config.temperature)
                prompts, responses = [one.prompt for one in played], [one.response for one in played]
                completions = [one.completion for one in played]
            with timer.phase("reward"):
                rewards = episode_rewards(self.reward_funcs, rows, played, self.playing.reward_names, **known)
        else:
            with timer.phase("gen"):
                prompts = self.tokenize([row["prompt"] for row in rows])
                responses = self._responses(step, prompts)
                if config.async_generation and step < config.max_steps:
                    self.begin(step + 1)
            with timer.phase("reward"):
                completions = self.tokenizer.batch_decode([r.tokens for r in responses], skip_special_tokens=True)
                ids = [response.tokens.tolist() for response in responses]
                rewards = compute_rewards(self.reward_funcs, rows, completions, ids, **known)
        for name, count in rewards.timeouts.items():
            timeouts[name] = timeouts.get(name, 0) + count
        for name, values in rewards.logged.metrics.items():
            logged.setdefault(name, []).extend(values)
        samples = [
            Sample(*parts)
            for parts in zip(
                rows,
                prompts,
                responses,
                completions,
                rewards.by_sample,
                rewards.total,
                rewards.extra_by_sample,
                strict=True,
            )
        ]
        return [samples[i : i + config.num_generations] for i in range(0, len(samples), config.num_generations)]

    def begin(self, step: int) -> None:
        """Let the sampler begin with the responses of ``step``, by the policy as it is, while the caller goes on. What
        is random in them follows from the step's number, as in the step itself."""
        config, sampler = self.config, self.sampler
        assert isinstance(sampler, SentWeights)
        rows = [self.dataset[i] for i in self.schedule.rows_of_step(step - 1) for _ in range(config.num_generations)]
        prompts = self.tokenize([row["prompt"] for row in rows])
        with forked_rng():
            torch.manual_seed(config.seed * 1_000_003 + step)
            responses = sampler.begin(
                prompts, max_completion_length=config.max_completion_length, temperature=config.temperature
            )
        self.ahead = Ahead(step, responses, sampler.changes)

    def _responses(self, step: int, prompts: Sequence[Tensor]) -> list[Response]:
        """Return the responses of ``step``: those that were begun before, or else new ones."""
        config, ahead, self.ahead, self.age = self.config, self.ahead, None, 0
        if ahead is None or ahead.step != step:
            return self.sampler.sample(
                prompts, max_completion_length=config.max_completion_length, temperature=config.temperature
            )
        assert isinstance(self.sampler, SentWeights)
        self.age = self.sampler.changes - ahead.changes
        return ahead.responses()

    def tokenize(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Return the tokens (int64 [length]) of each prompt."""
        tokens = prompt_tokens(prompts, self.tokenizer, self.config.data.chat_template_kwargs)
        return [torch.tensor(ids) for ids in tokens]

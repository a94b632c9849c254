"""AsyPPO's training step, in the order of the paper (arXiv 2510.01656)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from asyppo.algorithm.options import AdvantageOptions, PolicyLossOptions, ShapingOptions
from asyppo.algorithm.policy_losses import POLICY_LOSSES, PolicyLoss, PolicyTargets, importance_weights
from asyppo.algorithm.schedules import learning_rate_factor, set_learning_rate
from asyppo.algorithm.shaping import shape_rewards
from asyppo.algorithm.signal import Advantage, LearningSignal, Outcome, StateValues
from asyppo.algorithm.split import split_responses
from asyppo.algorithm.turns import returns_after_turns
from asyppo.algorithm.value_losses import value_cross_entropy, value_loss
from asyppo.algorithm.weights import token_weights
from asyppo.checkpoint import Trained
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.config.old_logprobs import source_of_old_logprobs
from asyppo.config.references import check_parameters, load, resolve
from asyppo.data.batch import Batch, MicroBatch, micro_batches, minibatches, token_imbalance
from asyppo.data.checks import Checks, fitting
from asyppo.data.given import given_eval_rows, given_rows
from asyppo.data.prompts import prompt_tokens
from asyppo.distributed.processes import forked_rng, sum_over_ranks
from asyppo.distributed.sharding import WholeCopy, between_replicas_once, clip_gradients, total_norms
from asyppo.loop import StepResult, TrainingError, TrainingLoop, TrainResult
from asyppo.metrics.diagnostics import critic_diagnostics, mask_diagnostics, masked_gradient_fractions
from asyppo.metrics.record import StepRecord
from asyppo.metrics.samples import sample_rows
from asyppo.metrics.step import (
    CriticUpdates,
    PolicyUpdates,
    batch_metrics,
    importance_metrics,
    reward_metrics,
    time_metrics,
)
from asyppo.models.critics import CriticOptimizer, Critics, SideCritics, check_tokens, policy_inputs
from asyppo.models.loading import (
    critics_of,
    fit_of,
    given_critics,
    given_policy,
    longest_sequence,
    policy_of,
    tokenizer_of,
)
from asyppo.models.offload import Offload
from asyppo.models.optimizers import make_optimizer
from asyppo.models.policy import Objective, Policy, Reference, TokenStats
from asyppo.models.quantized import check_bitsandbytes, kept_whole
from asyppo.models.tokenizer import eos_token_ids
from asyppo.rewards.function import RewardFuncs, RewardFunction, resolve_reward_funcs
from asyppo.rollout.collecting import Rollout, Sampled
from asyppo.rollout.continuations import Continuations, monte_carlo_values
from asyppo.rollout.environments import Factory, Tool, environment_of, own_rows, playing_of
from asyppo.rollout.samplers import (
    ON_THE_MODEL,
    DividedSampler,
    Sampler,
    SamplesAhead,
    SentWeights,
    make_sampler,
    sends_weights,
)
from asyppo.run.progress import Timer
from asyppo.run.rng import seed_everything

__all__ = ["AsyPPOTrainer", "StepResult", "TrainResult", "TrainingError"]


@dataclass(frozen=True)
class PolicyUpdate:
    """What an update of the policy came to."""

    metrics: dict[str, float]
    log_ratio: Tensor
    """float32 [B, T]: log π/π_old of each token at its last visit."""
    old: TokenStats
    """What the first visits found; the log-prob is the sampler's outside of ``known``."""
    known: Tensor
    """bool [B, T]: tokens of the first optimizer step, which the policy that sampled has visited."""


class AsyPPOTrainer:
    """Trains ``policy`` with ``critics`` (None for GRPO) on the prompts of ``train_dataset``.

    ``policy`` is a causal language model, also in a PeftModel, or where to load one from, a directory or a hub name;
    ``critics`` is where all critics start from, or a list of where each does; either is made as ``config`` says. With
    ``critic.kind`` ``side`` None is new ones.
    ``tokenizer`` None is the one beside the policy's weights.
    ``train_dataset`` and ``eval_dataset`` are rows with a column ``prompt``, text or chat messages: a list, a data set,
    a ``DataFrame``, a stream (``asyppo/data/given.py``); every column reaches the reward functions, which are names of
    built-in ones, functions in TRL's signature, or sequence classifiers, one or a list;
    ``reward_processing_classes`` are the classifiers' tokenizers where they do not lie beside the weights.
    ``callbacks`` are transformers'. ``tools`` and ``environment_factory``, as TRL's, are in place of those that
    ``config.environment`` names: functions that the policy may call, and what makes an environment, or of several each
    by the name that a row's column ``environment`` has. Without a ``train_dataset`` an environment owns the data: its
    ``reset`` returns the prompt.
    """

    def __init__(
        self,
        *,
        policy: Policy | PreTrainedModel | str | Any,
        critics: Critics | str | Sequence[str] | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFuncs = (),
        reward_processing_classes: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        config: AsyPPOConfig,
        sampler: Sampler | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        mesh: DeviceMesh | None = None,
        tools: Sequence[Tool] = (),
        environment_factory: Factory | Mapping[str, Factory] | None = None,
    ):
        """``mesh``: shard the models over it (``asyppo/distributed/``)."""
        config.validate()
        check_bitsandbytes(config)
        environment = environment_of(config, environment_factory, tools)
        self.advantage, self.surrogate = advantage_of(config), surrogate_of(config)
        self.own_values = values_of(config)
        self.reward_funcs: Sequence[RewardFunction] = resolve_reward_funcs(
            reward_funcs, config.reward_timeout, config.reward_weights, reward_processing_classes
        )
        policy, critics = given_policy(policy), given_critics(critics, config)
        # The rows first: what is wrong with them shows before models are loaded.
        tokenizer = tokenizer or tokenizer_of(policy, config)
        checks = Checks(config.data, fit_of(config, policy, critics, tokenizer), [f.need for f in self.reward_funcs])
        if train_dataset is None:
            train_dataset = own_rows(environment[0], config)
        rows = given_rows(train_dataset, "train_dataset", config.data.dataset_train_split, config.data)
        self.train_dataset = fitting(rows, "train_dataset", checks)
        self.eval_dataset = fitting(given_eval_rows(eval_dataset, "eval_dataset", config.data), "eval_dataset", checks)
        if not self.train_dataset:
            raise ConfigError("train_dataset: got no rows, needs at least one")
        policy = policy_of(policy, config, sharded=mesh is not None)
        critics = critics_of(critics, config, policy, sharded=mesh is not None)
        num_critics = 0 if critics is None else len(critics)
        if num_critics != config.num_critics:
            raise ConfigError(
                f"critics: got {num_critics}, needs {config.num_critics} for algorithm {config.algorithm}, "
                f"critic.num_critics {config.critic.num_critics}"
            )
        if critics is not None and critics.loss != config.critic.loss:
            raise ConfigError(
                f"critic.loss: got {config.critic.loss!r}, needs {critics.loss!r}, by which the critics are trained"
            )
        if critics is not None and isinstance(critics, SideCritics) != (config.critic.kind == "side"):
            raise ConfigError(
                f"critic.kind: got {config.critic.kind!r}, needs what the given critics are, {type(critics).__name__}"
            )
        if critics is not None and critics.policy_inputs != tuple(config.critic.policy_inputs):
            raise ConfigError(
                f"critic.policy_inputs: got {config.critic.policy_inputs}, needs {list(critics.policy_inputs)}, which "
                "the given critics read"
            )
        if policy.temperature != config.temperature:
            raise ConfigError(f"temperature: got {config.temperature}, needs the policy's {policy.temperature}")
        self.config, self.policy, self.critics, self.tokenizer = config, policy, critics, tokenizer
        if critics is not None and not critics.read_layers:
            self._check_tokens(critics)
        self.callbacks = callbacks
        self.reference = policy.reference() if config.beta > 0 else None
        self.sampler, self.engine = self._sampler_of(sampler, mesh)
        self.sampler_agrees = False
        """Whether the sampler's log-probs have been seen to be the policy's; the training loop looks."""
        policy.choose_packing(config.policy.packing)
        self.device = policy.device
        for func in self.reward_funcs:
            func.to(self.device)
        playing = playing_of(
            environment, tokenizer, config, eos_token_ids(policy.model, tokenizer), longest_sequence(config, policy)
        )
        if not self.reward_funcs and (playing is None or not playing.reward_names):
            raise ConfigError("reward_funcs: got none, needs one, or an environment that gives rewards")
        self.rollout = Rollout(
            self.sampler,
            tokenizer,
            self.reward_funcs,
            self.train_dataset,
            config,
            device=self.device,
            playing=playing,
        )
        self.policy_optimizer = make_optimizer(
            [p for p in policy.parameters() if p.requires_grad],
            config.optim,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.critic_optimizer = None
        if critics is not None:
            self.critic_optimizer = CriticOptimizer(
                critics,
                learning_rate=config.critic.learning_rate,
                weight_decay=config.critic.weight_decay,
                optim=config.critic.optim or config.optim,
                policy_inputs_lr_ratio=config.critic.policy_inputs_lr_ratio,
            )
        self.offload = self._offload()

    def _check_tokens(self, critics: Critics) -> None:
        """Raise ConfigError unless the critics read the policy's tokens as they are meant, in some of the prompts."""
        rows, count = self.train_dataset, min(64, len(self.train_dataset))
        some = [rows[i * len(rows) // count]["prompt"] for i in range(count)]
        check_tokens(
            critics,
            self.tokenizer,
            prompt_tokens(some, self.tokenizer, self.config.data.chat_template_kwargs),
            self.policy.model.config.get_text_config().vocab_size,
            self.config.policy.trust_remote_code,
        )

    def _offload(self) -> Offload:
        """Return what moves models and moments that are not in use to the host's memory, with the policy in use."""
        models = [model for model in (self.policy, self.critics, self.reference) if isinstance(model, nn.Module)]
        optimizers = [self.policy_optimizer, *([self.critic_optimizer.adamw] if self.critic_optimizer else [])]
        offload = Offload(self.config.offload, self.device, models, optimizers)
        offload.use(self.policy)
        return offload

    def _sampler_of(self, sampler: Sampler | None, mesh: DeviceMesh | None) -> tuple[Sampler, Sampler]:
        """Return the sampler that is called, and the one that samples: of all ranks where the models are sharded over a
        ``mesh``, which happens here, and sent the weights where it holds some of its own."""
        policy = self.policy
        if mesh is not None and sampler is None and self.config.sampler in ON_THE_MODEL:
            # It decodes with whole weights, which are only there while it samples.
            whole = WholeCopy(policy, policy.dtype, torch.device(mesh.device_type), kept_whole(policy))
            engine = make_sampler(whole.module, self.tokenizer, self.config)
            called: Sampler = DividedSampler(engine, partial(whole.of, policy))
        else:
            engine = sampler or make_sampler(policy, self.tokenizer, self.config)
            called = engine if mesh is None else DividedSampler(engine)
        if mesh is not None:
            for model in (policy, self.reference, self.critics):
                if isinstance(model, Policy | Critics):
                    model.shard(mesh)
        called = sends_weights(called, engine, policy)
        if self.config.async_generation and not (isinstance(called, SentWeights) and isinstance(engine, SamplesAhead)):
            raise ConfigError(
                f"async_generation: got 1, needs a sampler with an engine of its own, such as vllm; "
                f"{self.config.sampler if sampler is None else type(sampler).__name__} has none"
            )
        return called, engine

    def with_settings(self, config: AsyPPOConfig) -> AsyPPOTrainer:
        """Return a trainer with this one's models and data, and other settings of the algorithm; without its critics
        where the algorithm has none. Raises ConfigError."""
        config.validate()
        if config.beta > 0 and self.reference is None:
            raise ConfigError(f"beta: got {config.beta}, needs 0, as where the models were made: there is no reference")
        if config.temperature != self.config.temperature:
            raise ConfigError(f"temperature: got {config.temperature}, needs the policy's {self.config.temperature}")
        other = copy.copy(self)
        other.config, other.advantage, other.surrogate = config, advantage_of(config), surrogate_of(config)
        other.own_values = values_of(config)
        other.rollout = copy.copy(self.rollout)
        other.rollout.config = config
        if not config.num_critics:
            other.critics = other.critic_optimizer = None
        return other

    def weights_changed(self) -> None:
        """Let a sampler that holds weights of its own know that the policy's are others now."""
        if isinstance(self.sampler, SentWeights):
            self.sampler.changed()

    def rest(self) -> None:
        """Let a sampler that can give memory back until it is called again."""
        if isinstance(self.sampler, SentWeights):
            self.sampler.rest()

    def train(self) -> TrainResult:
        """Run until ``max_steps``, and return what came of it: see ``TrainingLoop.train``."""
        return TrainingLoop(self).train()

    def step(self, step: int, sampled: Sampled | None = None) -> StepResult:
        """One step of the algorithm, counted from 1: on a batch of its own, or on one that was ``sampled`` before."""
        config, timer = self.config, Timer(self.device)
        # All randomness of a step follows from the seed and its number.
        seed = config.seed * 1_000_003 + step
        seed_everything(seed)
        generator = torch.Generator().manual_seed(seed)
        metrics: dict[str, float] = {"step": step}
        self._set_learning_rates(step)
        with timer.phase("step"):
            # Sample a group of responses for each prompt, and reward them.
            self.offload.use(self.policy)
            sampled = sampled or self.rollout(step, timer)
            self.rest()
            metrics |= sampled.metrics | metrics  # the step stays the first, by which rows are cut off on resuming
            batch = self._with_hidden_states(sampled.batch)

            # Log-probs of the policy that sampled, as the trainer computes them, and of the reference.
            old, old_logprob = self.old_logprobs(batch, timer, updates=step > self.policy_warmup)
            ref_logprob = None
            if self.reference is not None:
                with timer.phase("ref"):
                    ref_logprob = self.reference_logprobs(self.reference, batch)
            batch, penalties = self.shape_rewards(batch, old_logprob, ref_logprob)
            batch = self._with_policy_inputs(batch, old)
            metrics |= penalties

            # 1 to 3. Split, critic update, values of all responses.
            values, share = None, None
            if self.critics is not None:
                values, share, critic_metrics = self.learn_values(self.critics, batch, generator, timer)
                batch = replace(batch, hidden=None)
                self.offload.use(self.policy)
                metrics |= critic_metrics
            elif self.own_values is not None:
                with timer.phase("values"):
                    values = self.own_values(batch, self.tokenizer)

            monte_carlo = None
            if config.monte_carlo_values:
                monte_carlo, costs = self.continue_responses(sampled, step, timer)
                metrics |= costs

            # 4 and 5. Advantage on the mean value; masks from the disagreement.
            with timer.phase("adv"):
                parts = batch.reward, batch.mask, batch.learned, batch.group, values, share, seed
                outcome = Outcome(*parts, monte_carlo=monte_carlo, turns=batch.turns)
                signal = self.advantage(outcome, AdvantageOptions.of(config))
            metrics |= self._diagnose(step, batch, signal, old_logprob, timer)

            # 6. Policy update.
            log_ratio, known = torch.zeros_like(batch.reward), batch.mask
            if step > self.policy_warmup:
                with timer.phase("update_actor"):
                    update = self.update_policy(batch, signal, old_logprob, ref_logprob, generator)
                metrics |= update.metrics
                log_ratio = update.log_ratio
                if old is None:
                    old, known = update.old, update.known
        assert old is not None
        found = step, batch, sampled.rewards, old, known, signal, log_ratio
        record = StepRecord(*found, turns=sampled.turns, gamma=config.gamma)
        if len(signal.values):
            metrics |= critic_diagnostics(signal, batch.mask, old.entropy, known)
            metrics |= mask_diagnostics(signal, batch.learned, old.entropy, known)
        metrics |= {"actor/padding_frac": self.policy.padding_frac()}
        metrics |= batch_metrics(record) | reward_metrics(sampled.rewards)
        metrics |= time_metrics(batch, timer.seconds, self.device)
        return StepResult(metrics, sample_rows(record, config.logging_samples, self.tokenizer))

    def old_logprobs(self, batch: Batch, timer: Timer, *, updates: bool) -> tuple[TokenStats | None, Tensor | None]:
        """Return what the policy says of ``batch``, and the log-probs [B, T] that ratios are taken of. None in place of
        the first: the update finds it; in place of the second: the policy is still the one that sampled."""
        source = source_of_old_logprobs(self.config, updates=updates, sampler_agrees=self.sampler_agrees)
        if source != "policy":
            return None, batch.sampler_logprob if source == "sampler" else None
        with timer.phase("old_log_prob"):
            old = self.policy.logprobs(batch, self._micro_batches(batch), batch.hidden)
        return old, old.logprob

    def reference_logprobs(self, reference: Reference, batch: Batch) -> Tensor:
        """Return the log-probs [B, T] that the ``reference`` has of ``batch``."""
        self.offload.use(reference)
        found = reference.logprobs(batch, self._micro_batches(batch)).logprob
        self.offload.use(self.policy)
        return found

    def shape_rewards(
        self, batch: Batch, old_logprob: Tensor | None, ref_logprob: Tensor | None
    ) -> tuple[Batch, dict[str, float]]:
        """Return ``batch`` with its rewards as the algorithm sees them, and with those responses ``ignored`` that it is
        not to learn from; and the metrics of the penalties."""
        reward, penalties = shape_rewards(
            batch.reward, batch.mask, old_logprob, ref_logprob, ShapingOptions.of(self.config)
        )
        ignored = batch.truncated if self.config.mask_truncated_completions else batch.ignored
        return replace(batch, reward=reward, ignored=ignored), penalties

    def continue_responses(self, sampled: Sampled, step: int, timer: Timer) -> tuple[StateValues, dict[str, float]]:
        """Return values of states of the responses from continuations, and metrics of their cost. What else is drawn in
        the step is what it would be without them."""
        with timer.phase("continuations"), forked_rng():
            torch.manual_seed(self.config.seed * 1_000_003 + step)
            found = monte_carlo_values(sampled, self.continuations(), step)
            self.rest()
        return found

    def continuations(self) -> Continuations:
        """Return what continues responses with the policy, and gives them the rewards that the algorithm sees."""
        return Continuations(self.rollout, self._with_penalties, longest_sequence(self.config, self.policy))

    def observe(self, batch: Batch) -> tuple[Batch, TokenStats]:
        """Return a sampled ``batch`` as a step sees it before anything learns, and what the policy says of it."""
        batch = self._with_hidden_states(batch)
        old, ref_logprob = self.policy.logprobs(batch, self._micro_batches(batch), batch.hidden), None
        if self.config.use_kl_in_reward:
            assert self.reference is not None
            ref_logprob = self.reference_logprobs(self.reference, batch)
        return self._with_policy_inputs(self.shape_rewards(batch, old.logprob, ref_logprob)[0], old), old

    def _with_policy_inputs(self, batch: Batch, old: TokenStats | None) -> Batch:
        """``batch`` with what critics read of the policy beside the tokens."""
        if self.critics is None or not self.critics.policy_inputs:
            return batch
        assert old is not None  # reads_old_logprobs
        return replace(batch, policy_inputs=policy_inputs(old, batch.value_mask, self.critics.policy_inputs))

    def _with_hidden_states(self, batch: Batch) -> Batch:
        """``batch`` with the policy's hidden states, if critics read them; ``Policy.logprobs`` keeps them."""
        critics = self.critics
        if critics is None or not critics.read_layers:
            return batch
        keep_bytes = self.config.critic.side.keep_bytes
        hidden = self.policy.states_of(batch, critics.read_layers, critics.states_size, keep_bytes)
        return replace(batch, hidden=hidden)

    def _with_penalties(self, batch: Batch) -> Batch:
        return self.observe(batch)[0] if self.config.use_kl_in_reward else self.shape_rewards(batch, None, None)[0]

    def learn_values(
        self, critics: Critics, batch: Batch, generator: torch.Generator, timer: Timer
    ) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """Train the critics, and return their values [M, B, T] of all responses, the critic that learned from each
        (int64 [B]; None: all did), and metrics."""
        config, max_tokens = self.config, self.config.max_tokens_per_micro_batch
        self.offload.use(critics, *([self.policy] if critics.read_layers else []))
        # 1. Split: each prompt's responses among the critics, disjointly.
        share = None
        if config.critic.share == "disjoint":
            share = split_responses(batch.group, len(critics), generator)

        values = None
        if config.advantage_values == "before":
            with timer.phase("values"):
                values = critics.values(batch, max_tokens)

        # 2. Critic update: each on its own share only.
        with timer.phase("update_critic"):
            metrics = self.update_critics(batch, share, generator)

        # 3. Value: all critics on all responses.
        if values is None:
            with timer.phase("values"):
                values = critics.values(batch, max_tokens)
        if share is not None:
            share = share.to(self.device)
        return values, share, metrics | {"critic/padding_frac": critics.padding_frac()}

    def update_critics(self, batch: Batch, share: Tensor | None, generator: torch.Generator) -> dict[str, float]:
        """Critic m minimises E[(V_m(s_t) - R_t)^2], or the cross-entropy of R_t, on the responses with ``share`` == m
        (int64 [B]; None: on all)."""
        assert self.critics is not None
        assert self.critic_optimizer is not None
        config, max_tokens = self.config.critic, self.config.max_tokens_per_micro_batch
        everything = torch.arange(len(batch))  # rows are chosen on the host
        own = [everything if share is None else everything[share == m] for m in range(len(self.critics))]
        returns, old_value = self._critic_targets(batch, own)
        if config.loss == "bce":
            self._check_probabilities(returns[:, batch.valued])
        # All chance before the first update, critic by critic.
        parts = [list(minibatches(rows, config.num_iterations, config.num_mini_batches, generator)) for rows in own]
        updates = CriticUpdates(len(own))
        # Where a critic has fewer rows than minibatches are asked for, it sits out the last.
        for rows_of in zip_longest(*parts, fillvalue=own[0][:0]):
            weight = [token_weights(batch.valued, rows.to(self.device), "token-mean") for rows in rows_of]

            def loss(m: int, micro: MicroBatch, output: Tensor, weight: Sequence[Tensor] = weight) -> Tensor:
                old, target, own_weight = (x[m][micro.grid] for x in (old_value, returns, weight))
                if config.loss == "bce":
                    return value_cross_entropy(output, target, own_weight)
                return value_loss(output, old, target, own_weight, cliprange=config.cliprange_value)

            active = [len(rows) > 0 for rows in rows_of]
            losses = self.critics.backward(batch, rows_of, loss, max_tokens)
            norms = self.critic_optimizer.step(losses, config.max_grad_norm, active=active, by=self.offload.step)
            updates.stepped(losses.tolist(), norms, active)
        return updates.row() | {"critic/lr": self.critic_optimizer.adamw.param_groups[0]["lr"]}

    def update_policy(
        self,
        batch: Batch,
        signal: LearningSignal,
        old_logprob: Tensor | None,
        ref_logprob: Tensor | None,
        generator: torch.Generator,
    ) -> PolicyUpdate:
        """Maximise the masked surrogate and the filtered entropy over the whole batch. ``old_logprob`` None: in one
        optimizer step, before which the policy is the one that sampled."""
        config, updates = self.config, PolicyUpdates(PolicyLossOptions.of(self.config))
        objective = self._objective(batch, signal, old_logprob, ref_logprob)
        found = batch.reward.new_zeros(3, *batch.reward.shape)
        log_ratio, logprob, entropy = found
        everything = torch.arange(len(batch))
        parts = list(minibatches(everything, config.num_iterations, config.num_mini_batches, generator))
        for number, rows in enumerate(parts):
            chosen = rows.to(self.device)
            weight = token_weights(batch.learned, chosen, config.loss_aggregation)
            weighted = replace(objective.targets, token_weight=weight)
            loss = torch.zeros((), device=self.device)
            log_ratio[chosen] = 0.0  # another rank may have visited them before
            micros = self._micro_batches(batch, rows, at_least=config.gradient_accumulation_steps)
            for micro in between_replicas_once(self.policy, micros):
                targets = weighted.at(micro.grid)
                result = self.policy(micro, replace(objective, targets=targets))
                result.loss.backward()
                loss += result.loss.detach()
                updates.add(result, targets)
                moved = result.logprob - targets.old(result.logprob)
                log_ratio[micro.grid] = torch.where(targets.token_weight != 0, moved, 0.0)
                if number < config.num_mini_batches:  # the first pass
                    logprob[micro.grid], entropy[micro.grid] = result.logprob, result.entropy
            loss = sum_over_ranks(loss)
            norm = _clip_and_step(self.policy, self.policy_optimizer, config.max_grad_norm, loss, self.offload)
            updates.stepped(float(loss), norm)
        self.weights_changed()
        metrics = updates.row() | {
            "actor/lr": self.policy_optimizer.param_groups[0]["lr"],
            "perf/token_imbalance": token_imbalance(batch, parts),
        }
        if objective.targets.rollout_weight is not None:
            metrics |= importance_metrics(objective.targets.rollout_weight, batch.mask)
        log_ratio, logprob, entropy = sum_over_ranks(found).unbind()
        known, first = torch.zeros_like(batch.mask), parts[0].to(self.device)
        known[first] = batch.mask[first]
        return PolicyUpdate(metrics, log_ratio, TokenStats(logprob.where(known, batch.sampler_logprob), entropy), known)

    def _objective(
        self, batch: Batch, signal: LearningSignal, old_logprob: Tensor | None, ref_logprob: Tensor | None = None
    ) -> Objective:
        """What the policy maximises on ``batch``; the weights are those of one minibatch of all responses."""
        config, rollout_weight = self.config, None
        if config.rollout_weight_max is not None:
            assert old_logprob is not None
            rollout_weight = importance_weights(old_logprob, batch.sampler_logprob, config.rollout_weight_max)
        everything = torch.arange(len(batch), device=self.device)
        targets = PolicyTargets(
            old_logprob=old_logprob,
            advantage=signal.advantage,
            token_weight=token_weights(batch.learned, everything, config.loss_aggregation),
            advantage_keep=signal.advantage_keep,
            entropy_keep=signal.entropy_keep,
            ref_logprob=ref_logprob if config.kl_in_loss else None,
            rollout_weight=rollout_weight,
        )
        return Objective(targets, PolicyLossOptions.of(config), self.surrogate)

    def _diagnose(
        self, step: int, batch: Batch, signal: LearningSignal, old_logprob: Tensor | None, timer: Timer
    ) -> dict[str, float]:
        """What the masks remove of the gradient, every ``diagnostics_steps``; nothing without values."""
        every = self.config.diagnostics_steps
        if len(signal.values) == 0 or not every or step % every:
            return {}
        with timer.phase("diagnostics"):
            micros = list(self._micro_batches(batch))
            objective = self._objective(batch, signal, old_logprob)
            return masked_gradient_fractions(self.policy, objective, batch, micros)

    def trained(self) -> Trained:
        """Return what a checkpoint saves beside the loop's own few numbers, by name; all of it on the device until the
        next step."""
        self.offload.recall()
        trained: Trained = {"policy": (self.policy.model, self.policy_optimizer)}
        if self.critics is not None and self.critic_optimizer is not None:
            trained["critics"] = (nn.ModuleList(self.critics.models), self.critic_optimizer.adamw)
        return trained

    def _micro_batches(self, batch: Batch, rows: Tensor | None = None, at_least: int = 1) -> Any:
        rows = torch.arange(len(batch)) if rows is None else rows
        limit = self.config.max_tokens_per_micro_batch
        return micro_batches(batch, rows, limit, at_least, packed=self.policy.packs, shared=self.policy.shares)

    @property
    def policy_warmup(self) -> int:
        """First steps, in which the policy stays as it is."""
        return self.config.critic.warmup_steps if self.critics is not None else 0

    def _set_learning_rates(self, step: int) -> None:
        """Those of ``step``, for the policy and the critics; the policy's steps are counted from its first."""
        config, total = self.config, self.config.max_steps
        if step > self.policy_warmup:
            own_step, own_total = step - self.policy_warmup, total - self.policy_warmup
            factor = learning_rate_factor(config.lr_scheduler_type, own_step, own_total, config.warmup_steps)
            set_learning_rate(self.policy_optimizer, config.learning_rate * factor)
        if self.critic_optimizer is not None:
            factor = learning_rate_factor(config.critic.lr_scheduler_type, step, total)
            set_learning_rate(self.critic_optimizer.adamw, config.critic.learning_rate * factor)

    def _critic_targets(self, batch: Batch, own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """λ-returns [M, B, T] that each critic learns on its own rows, and its values [M, B, T] there before the
        update; zeros where nothing needs them."""
        assert self.critics is not None
        config, value = self.config.critic, batch.reward.new_zeros(len(own), *batch.reward.shape)
        if config.value_lambda < 1 or config.cliprange_value is not None:
            value = self.critics.own_values(batch, own, self.config.max_tokens_per_micro_batch)
        # All critics' rows in one launch, each bootstrapping on its own critic.
        reward, mask = (x.repeat(len(own), 1) for x in (batch.reward, batch.mask))
        gae = self.critics.ops.ensemble_gae(
            value.flatten(0, 1)[None], reward, mask, gamma=self.config.gamma, value_lam=config.value_lambda
        )
        returns = gae.returns.view_as(value)
        return returns if batch.turns is None else returns_after_turns(returns, batch.reward, batch.turns), value

    def _check_probabilities(self, returns: Tensor) -> None:
        """Raise ConfigError unless all ``returns`` are in [0, 1], up to rounding."""
        low, high = torch.stack(returns.aminmax()).tolist() if returns.numel() else (0.0, 1.0)
        if low < -1e-4 or high > 1 + 1e-4:
            rewards = ", ".join(func.name for func in self.reward_funcs)
            raise ConfigError(
                f"critic.loss: got 'bce' and a return of {low if low < -1e-4 else high:g} from the reward {rewards}, "
                "less its penalties; needs returns in [0, 1], or 'mse'"
            )


def advantage_of(config: AsyPPOConfig) -> Advantage:
    """Return the function by which the configured algorithm makes its learning signal. Raises ConfigError."""
    advantage = config.resolved_algorithm.advantage
    found = load("algorithm", advantage) if isinstance(advantage, str) else advantage
    check_parameters("algorithm", config.algorithm, found, "outcome", "options")

    def checked(outcome: Outcome, options: AdvantageOptions) -> LearningSignal:
        signal = found(outcome, options)
        if not isinstance(signal, LearningSignal):
            got = type(signal).__name__
            raise ConfigError(f"algorithm: {config.algorithm} returned {got}, needs a LearningSignal")
        return signal

    return checked


def values_of(config: AsyPPOConfig) -> Callable[[Batch, PreTrainedTokenizerBase], Tensor] | None:
    """Return the function of the configured algorithm's own values; None where it has none. Raises ConfigError."""
    values = config.resolved_algorithm.values
    if values is None:
        return None
    found = load("algorithm", values) if isinstance(values, str) else values
    check_parameters("algorithm", f"values of {config.algorithm}", found, "batch", "tokenizer")

    def checked(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        made = found(batch, tokenizer)
        right = isinstance(made, Tensor) and made.dtype == torch.float32 and made.dim() == 3
        if not right or made.shape[1:] != batch.reward.shape or made.device != batch.reward.device or not len(made):
            got = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise ConfigError(
                f"algorithm: the values of {config.algorithm} came as {got}, need float32 [M, B, T] with "
                f"[B, T] = {list(batch.reward.shape)}, on the rewards' device"
            )
        return made

    return checked


def surrogate_of(config: AsyPPOConfig) -> PolicyLoss | None:
    """Return the configured policy loss; None is PPO's, in the fused op. Raises ConfigError."""
    found = resolve("policy_loss", config.policy_loss, POLICY_LOSSES)
    if found is not None:
        check_parameters("policy_loss", config.policy_loss, found, "tokens")
    return found


def _clip_and_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, loss: Tensor, offload: Offload
) -> float | None:
    """Clip the gradient, step, and return its norm; where loss or norm is not finite, skip the step, return None."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    [total] = total_norms([gradients])
    norm = float(total)
    finite = math.isfinite(norm) and math.isfinite(float(loss))
    if finite:
        clip_gradients(gradients, max_grad_norm, total)
        offload.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return norm if finite else None

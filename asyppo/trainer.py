"""AsyPPO's training step, in the order of the paper (arXiv 2510.01656)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from asyppo.algorithm.advantage import (
    LearningSignal,
    ensemble_signal,
    group_signal,
    length_adaptive_lambda,
    token_weights,
)
from asyppo.algorithm.schedules import learning_rate_factor, set_learning_rate
from asyppo.algorithm.shaping import shape_rewards
from asyppo.algorithm.value_losses import importance_weights, value_loss
from asyppo.checkpoint import Trained
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.batch import Batch, MicroBatch, micro_batches, minibatches, split_responses, token_imbalance
from asyppo.data.prompts import Row, fitting
from asyppo.distributed.processes import sum_over_ranks
from asyppo.distributed.sharding import WholeCopy, between_replicas_once, clip_gradients, total_norms
from asyppo.loop import TrainingError, TrainingLoop, TrainResult
from asyppo.metrics import diagnostics
from asyppo.metrics import step as metrics
from asyppo.metrics.samples import sample_rows
from asyppo.models.critics import CriticOptimizer, Critics
from asyppo.models.loading import critics_of, load_tokenizer, make_sampler, policy_of, prompt_limit
from asyppo.models.policy import Policy
from asyppo.rewards.computing import RewardFunc, resolve_reward_funcs
from asyppo.rollout.collecting import Rollout
from asyppo.rollout.samplers import DividedSampler, Sampler
from asyppo.run.directory import RunDirectory
from asyppo.run.progress import Timer
from asyppo.run.rng import seed_everything
from asyppo_kernels import ensemble_gae

__all__ = ["AsyPPOTrainer", "TrainResult", "TrainingError"]


class AsyPPOTrainer(TrainingLoop):
    """Trains ``policy`` with ``critics`` (None for GRPO) on the prompts of ``train_dataset``.

    ``policy`` is a causal language model or where to load one from, a directory or a hub name; ``critics`` is where all
    critics start from; either is made as ``config`` says. ``tokenizer`` None is the one beside the policy's weights.
    ``train_dataset`` and ``eval_dataset`` are sequences of rows with a text column ``prompt``; every column reaches
    the reward functions, which are names of built-in ones or functions in TRL's signature. ``callbacks`` are
    transformers'.
    """

    def __init__(
        self,
        *,
        policy: Policy | PreTrainedModel | str,
        critics: Critics | str | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reward_funcs: Sequence[str | RewardFunc],
        train_dataset: Sequence[Row],
        eval_dataset: Sequence[Row] = (),
        config: AsyPPOConfig,
        sampler: Sampler | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        mesh: DeviceMesh | None = None,
    ):
        """``mesh``: shard the models over it (``asyppo/distributed/``)."""
        config.validate()
        policy = policy_of(policy, config)
        critics = critics_of(critics, config, policy)
        tokenizer = tokenizer or load_tokenizer(policy.model.name_or_path, config.policy.trust_remote_code)
        num_critics = 0 if critics is None else len(critics)
        if num_critics != config.num_critics:
            raise ConfigError(
                f"critics: got {num_critics}, needs {config.num_critics} for algorithm {config.algorithm}, "
                f"critic.num_critics {config.critic.num_critics}"
            )
        if policy.temperature != config.temperature:
            raise ConfigError(f"temperature: got {config.temperature}, needs the policy's {policy.temperature}")
        self.config, self.policy, self.critics, self.tokenizer = config, policy, critics, tokenizer
        self.reward_funcs = resolve_reward_funcs(reward_funcs, config.reward_timeout, config.reward_weights)
        limit = prompt_limit(config, policy, critics)
        self.train_dataset = fitting(train_dataset, "train_dataset", tokenizer, config.data, limit)
        self.eval_dataset = fitting(eval_dataset, "eval_dataset", tokenizer, config.data, limit)
        self.callbacks = callbacks
        self.reference = policy.reference() if config.beta > 0 else None
        if mesh is None:
            self.sampler = sampler or make_sampler(policy, tokenizer, config)
        else:
            self.sampler = self._shard(mesh, sampler)
        self.device = policy.device
        for func in self.reward_funcs:
            func.check_columns(self.train_dataset[0])
        self.rollout = Rollout(
            self.sampler, tokenizer, self.reward_funcs, self.train_dataset, config, device=self.device
        )
        self.policy_optimizer = _adamw(policy, config.learning_rate, config.weight_decay)
        self.critic_optimizer = None
        if critics is not None:
            self.critic_optimizer = CriticOptimizer(
                critics, learning_rate=config.critic.learning_rate, weight_decay=config.critic.weight_decay
            )
        self.skipped_in_a_row = 0

    def _shard(self, mesh: DeviceMesh, sampler: Sampler | None) -> Sampler:
        """Shard the models over ``mesh``, and return a sampler of all ranks, whose model is whole while it samples."""
        policy = self.policy
        if sampler is None:
            whole = WholeCopy(policy, policy.dtype, torch.device(mesh.device_type))
            own = make_sampler(whole.module, self.tokenizer, self.config)
            sampler = DividedSampler(own, partial(whole.of, policy))
        else:
            sampler = DividedSampler(sampler)
        policy.shard(mesh)
        if isinstance(self.reference, Policy):
            self.reference.shard(mesh)
        if self.critics is not None:
            self.critics.shard(mesh)
        return sampler

    def step(self, step: int, run: RunDirectory) -> dict[str, float]:
        """One step of the algorithm. Returns its metrics."""
        config, timer = self.config, Timer(self.device)
        # All randomness of a step follows from the seed and its number.
        seed_everything(config.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        row: dict[str, float] = {"step": step}
        self._set_learning_rates(step)
        with timer.phase("step"):
            # Sample a group of responses for each prompt, and reward them.
            batch, rewards, of_sampling = self.rollout(step, timer)
            row |= of_sampling
            score = batch.reward.sum(dim=1)

            # Log-probs of the policy that sampled, as the trainer computes them.
            with timer.phase("old_log_prob"):
                old_logprob, entropy = self.policy.logprobs(batch, self._micro_batches(batch))
            ref_logprob = None
            if self.reference is not None:
                with timer.phase("ref"):
                    ref_logprob, _ = self.reference.logprobs(batch, self._micro_batches(batch))
            # Rewards as the algorithm sees them, and which responses it learns from.
            batch, penalties = shape_rewards(batch, old_logprob, ref_logprob, config)
            row |= penalties

            if self.critics is not None:
                # Split: each prompt's responses among the critics, disjointly.
                share = None
                if config.critic.share == "disjoint":
                    share = split_responses(batch.group, len(self.critics), generator).to(self.device)

                if config.advantage_values == "before":
                    with timer.phase("values"):
                        value = self.critics.values(batch, config.max_tokens_per_micro_batch)

                # Critic update: each on its own share only.
                with timer.phase("update_critic"):
                    row |= self.update_critics(batch, share, generator)

                # Value: all critics on all responses.
                if config.advantage_values != "before":
                    with timer.phase("values"):
                        value = self.critics.values(batch, config.max_tokens_per_micro_batch)
                row["critic/padding_frac"] = self.critics.padding_frac()

                # Advantage on the mean value; masks from the disagreement.
                with timer.phase("adv"):
                    signal = self.ensemble_signal(batch, value, share)
                row |= diagnostics.of_critics(signal, entropy, batch.mask)
                if config.diagnostics_steps and step % config.diagnostics_steps == 0:
                    with timer.phase("diagnostics"):
                        row |= diagnostics.masked_gradient_shares(
                            self.policy, batch, signal, old_logprob, list(self._micro_batches(batch)), config
                        )
            else:
                with timer.phase("adv"):
                    signal = group_signal(
                        batch.reward, batch.mask, batch.group, learned=batch.learned, scale=config.scale_rewards
                    )

            # Policy update.
            log_ratio = torch.zeros_like(old_logprob)
            if step > self.policy_warmup:
                with timer.phase("update_actor"):
                    row |= self.update_policy(batch, signal, old_logprob, ref_logprob, generator, log_ratio)
        row |= metrics.of_batch(batch, signal, old_logprob, entropy) | metrics.of_rewards(rewards)
        row |= metrics.of_time(batch, timer.seconds, self.device)
        run.log_samples(
            sample_rows(
                step,
                config.logging_samples,
                batch,
                score,
                rewards.by_function,
                signal,
                old_logprob,
                entropy,
                log_ratio,
                self.tokenizer,
            )
        )
        skipped = row.get("actor/skipped_updates", 0) + row.get("critic/skipped_updates", 0)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return row

    def ensemble_signal(self, batch: Batch, value: Tensor, share: Tensor | None) -> LearningSignal:
        """Advantages and masks of the critics' values [M, B, T]; ``share`` int64 [B] is who learned from a response
        (None: all)."""
        config = self.config
        lam: float | Tensor = config.lam
        if config.length_adaptive_alpha is not None:
            lam = length_adaptive_lambda(batch.response_length, config.length_adaptive_alpha)
        return ensemble_signal(
            value,
            batch.reward,
            batch.mask,
            batch.group,
            learned=batch.learned,
            trained_by=share if config.advantage_values == "cross_fit" else None,
            gamma=config.gamma,
            lam=lam,
            value_lambda=config.critic.value_lambda,
            whitening=config.whiten,
            advantage_fraction=config.advantage_mask_fraction,
            entropy_fraction=config.entropy_filter_fraction,
            quantile_scope=config.quantile_scope,
        )

    def update_critics(self, batch: Batch, share: Tensor | None, generator: torch.Generator) -> dict[str, float]:
        """Critic m minimises E[(V_m(s_t) - R_t)^2] on the responses with ``share`` == m (int64 [B]; None: on all)."""
        assert self.critics is not None
        assert self.critic_optimizer is not None
        config, max_tokens = self.config.critic, self.config.max_tokens_per_micro_batch
        everything = torch.arange(len(batch), device=self.device)
        own = [everything if share is None else everything[share == m] for m in range(len(self.critics))]
        returns, old_value = self._critic_targets(batch, own)
        # All chance before the first update, critic by critic.
        parts = [list(minibatches(rows, config.num_iterations, config.num_mini_batches, generator)) for rows in own]
        updates = metrics.CriticUpdates(len(own))
        # Where a critic has fewer rows than minibatches are asked for, it sits out the last.
        for rows_of in zip_longest(*parts, fillvalue=own[0][:0]):
            weight = [token_weights(batch.learned, rows, "token-mean") for rows in rows_of]

            def loss(m: int, micro: MicroBatch, value: Tensor, weight: Sequence[Tensor] = weight) -> Tensor:
                targets = old_value[m][micro.grid], returns[m][micro.grid], weight[m][micro.grid]
                return value_loss(value, *targets, cliprange=config.cliprange_value)

            active = [len(rows) > 0 for rows in rows_of]
            losses = self.critics.backward(batch, rows_of, loss, max_tokens)
            norms = self.critic_optimizer.step(losses, config.max_grad_norm, active=active)
            updates.stepped(losses.tolist(), norms, active)
        return updates.row() | {"critic/lr": self.critic_optimizer.adamw.param_groups[0]["lr"]}

    def update_policy(
        self,
        batch: Batch,
        signal: LearningSignal,
        old_logprob: Tensor,
        ref_logprob: Tensor | None,
        generator: torch.Generator,
        log_ratio: Tensor | None = None,
    ) -> dict[str, float]:
        """Maximise the masked, clipped surrogate and the filtered entropy over the whole batch.

        ``log_ratio`` [B, T], if given, is filled with log π/π_old of each token at its last visit.
        """
        config, updates = self.config, metrics.PolicyUpdates(config=self.config)
        rollout_weight = None
        if config.importance_sampling_clip_max is not None:
            rollout_weight = importance_weights(old_logprob, batch.sampler_logprob, config.importance_sampling_clip_max)
        everything = torch.arange(len(batch), device=self.device)
        parts = list(minibatches(everything, config.num_iterations, config.num_mini_batches, generator))
        for rows in parts:
            per_token: dict[str, Any] = {
                "old_logprob": old_logprob,
                "advantage": signal.advantage,
                "token_weight": token_weights(batch.learned, rows, config.loss_aggregation),
                "advantage_keep": signal.advantage_keep,
                "entropy_keep": signal.entropy_keep,
                "ref_logprob": ref_logprob if config.kl_in_loss else None,
                "rollout_weight": rollout_weight,
            }
            loss = torch.zeros((), device=self.device)
            if log_ratio is not None:
                log_ratio[rows] = 0.0  # another rank may have visited them before
            micros = self._micro_batches(batch, rows, at_least=config.gradient_accumulation_steps)
            for micro in between_replicas_once(self.policy, micros):
                arguments: dict[str, Any] = {n: x if x is None else x[micro.grid] for n, x in per_token.items()}
                result = self.policy(
                    micro,
                    loss=arguments
                    | {
                        "clip_low": config.epsilon,
                        "clip_high": config.epsilon_high,
                        "dual_clip": config.delta,
                        "entropy_coef": config.entropy_coef,
                        "kl_coef": config.kl_in_loss,
                    },
                )
                result.loss.backward()
                loss += result.loss.detach()
                updates.add(result, arguments)
                if log_ratio is not None:
                    moved = result.logprob - old_logprob[micro.grid]
                    log_ratio[micro.grid] = torch.where(arguments["token_weight"] != 0, moved, 0.0)
            loss = sum_over_ranks(loss)
            norm = _clip_and_step(self.policy, self.policy_optimizer, config.max_grad_norm, loss)
            updates.stepped(float(loss), norm)
        if log_ratio is not None:
            log_ratio.copy_(sum_over_ranks(log_ratio))
        row = updates.row() | {
            "actor/lr": self.policy_optimizer.param_groups[0]["lr"],
            "perf/token_imbalance": token_imbalance(batch, parts),
        }
        if rollout_weight is not None:
            row |= metrics.of_importance_weights(rollout_weight, batch.mask)
        return row

    def trained(self) -> Trained:
        """Return what a checkpoint saves beside the loop's own few numbers, by name."""
        trained: Trained = {"policy": (self.policy.model, self.policy_optimizer)}
        if self.critics is not None and self.critic_optimizer is not None:
            trained["critics"] = (nn.ModuleList(self.critics.models), self.critic_optimizer.adamw)
        return trained

    def _micro_batches(self, batch: Batch, rows: Tensor | None = None, at_least: int = 1) -> Any:
        rows = torch.arange(len(batch), device=self.device) if rows is None else rows
        return micro_batches(batch, rows, self.config.max_tokens_per_micro_batch, at_least)

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
        gae = ensemble_gae(
            value.flatten(0, 1)[None], reward, mask, gamma=self.config.gamma, value_lam=config.value_lambda
        )
        return gae.returns.view_as(value), value


def _adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def _clip_and_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, loss: Tensor
) -> float | None:
    """Clip the gradient, step, and return its norm; where loss or norm is not finite, skip the step, return None."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    [total] = total_norms([gradients])
    norm = float(total)
    finite = math.isfinite(norm) and math.isfinite(float(loss))
    if finite:
        clip_gradients(gradients, max_grad_norm, total)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if finite else None

"""AsyPPO's training loop, in the order of the paper (arXiv 2510.01656)."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from asyppo import metrics
from asyppo.advantage import LearningSignal, ensemble_signal, group_signal, length_adaptive_lambda, token_weights
from asyppo.batch import Batch, MicroBatch, make_batch, micro_batches, split_responses
from asyppo.callbacks import Callbacks
from asyppo.checkpoint import (
    Trained,
    checkpoints,
    last_valid_checkpoint,
    load_checkpoint,
    publish_checkpoint,
    trainer_state,
    write_checkpoint,
)
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.critics import CriticOptimizer, Critics
from asyppo.data import Prompt, PromptSchedule, Row, fitting, prompt_tokens
from asyppo.durable import WriteError
from asyppo.evaluate import Evaluation, evaluate
from asyppo.loading import critics_of, load_tokenizer, policy_of
from asyppo.losses import importance_weights, value_loss
from asyppo.policy import Policy
from asyppo.progress import ProgressDisplay, Timer
from asyppo.report import report_at_the_end
from asyppo.rewards import RewardFunc, Rewards, compute_rewards, resolve_reward_funcs
from asyppo.rng import seed_everything
from asyppo.rollout import Group, Sample, keep_unequal
from asyppo.run import RunDirectory
from asyppo.sampler import ContinuousBatchingSampler, GenerateSampler, Sampler
from asyppo.samples import sample_rows
from asyppo.schedule import learning_rate_factor, set_learning_rate
from asyppo.shaping import shape_rewards
from asyppo.signals import StopSignals
from asyppo_kernels import ensemble_gae


class TrainingError(RuntimeError):
    """Training cannot go on. A checkpoint has been saved; the message names it."""

    exit_status = 1


@dataclass
class TrainResult:
    """What a run came to."""

    run: RunDirectory
    checkpoint: Path
    accuracy_before: float | None
    accuracy_after: float | None
    stopped_by: signal.Signals | None = None
    """The signal that ended it before ``max_steps``."""


class AsyPPOTrainer:
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
    ):
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
        self.device = policy.device
        for func in self.reward_funcs:
            func.check_columns(self.train_dataset[0])
        count = len(self.train_dataset)
        self.schedule = PromptSchedule(count, config.prompts_per_step, config.seed)
        # Of dynamic sampling: passes over the data of their own, so that those of the steps stay what they are.
        self.further_schedule = PromptSchedule(count, config.prompts_per_step, config.seed + 1_000_000)
        self.sampler = sampler or make_sampler(policy, tokenizer, config)
        self.policy_optimizer = _adamw(policy, config.learning_rate, config.weight_decay)
        self.critic_optimizer = None
        if critics is not None:
            self.critic_optimizer = CriticOptimizer(
                critics, learning_rate=config.critic.learning_rate, weight_decay=config.critic.weight_decay
            )
        self.reference = policy.reference() if config.beta > 0 else None
        self.skipped_in_a_row = 0

    def train(self) -> TrainResult:
        """Run until ``max_steps``, with ``config.resume`` from the run's last checkpoint on, and return what came of
        it.

        SIGINT and SIGTERM end it after the step, with a checkpoint. Raises TrainingError when ``max_skipped_steps``
        steps in a row were not finite, after saving a checkpoint, and when something cannot be written.
        """
        hooks = Callbacks(
            self.callbacks,
            self.config,
            model=self.policy.model,
            processing_class=self.tokenizer,
            optimizer=self.policy_optimizer,
        )
        with RunDirectory(self.config) as run:
            try:
                return self._train(run, hooks)
            except WriteError as error:
                saved = checkpoints(run.path)
                last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
                raise TrainingError(f"{error}; {last}") from error

    def _train(self, run: RunDirectory, hooks: Callbacks) -> TrainResult:
        config = self.config
        first, checkpoint = self.resume(run, hooks)
        hooks("on_train_begin")
        if first == 1 and not hooks.state.log_history and (evaluation := self.evaluate(run, step=0)) is not None:
            hooks.evaluated(0, evaluation.metrics())
            hooks.log(row := {"step": 0, **evaluation.metrics()})
            run.log_metrics(row)
        with StopSignals() as signals, ProgressDisplay("step", config.max_steps, done=first - 1) as progress:
            for step in range(first, config.max_steps + 1):
                hooks.begin_step()
                row = self.step(step, run)
                hooks.end_step(step)
                if hooks.control.should_evaluate or hooks.control.should_training_stop:
                    start = time.perf_counter()
                    if (evaluation := self.evaluate(run, step)) is not None:
                        row |= {**evaluation.metrics(), "timing_s/eval": time.perf_counter() - start}
                        hooks.evaluated(step, evaluation.metrics())
                hooks.log(row)
                failed = self.skipped_in_a_row >= config.max_skipped_steps
                stop = hooks.control.should_training_stop or failed or signals.received is not None
                if stop or hooks.control.should_save:
                    checkpoint = self.save(run, step, row, hooks)
                else:
                    run.log_metrics(row)
                progress.advance(metrics.summary(row))
                if stop:
                    break
        hooks("on_train_end")
        report_at_the_end(run.path)
        if self.skipped_in_a_row >= config.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient, the last of them step "
                f"{hooks.state.global_step}; weights of before are in {checkpoint}. A lower learning rate may help."
            )
        assert checkpoint is not None  # the last step saved one
        accuracies = [row["eval/accuracy"] for row in hooks.state.log_history if "eval/accuracy" in row]
        before, after = (accuracies[0], accuracies[-1]) if accuracies else (None, None)
        unfinished = hooks.state.global_step < config.max_steps
        return TrainResult(run, checkpoint, before, after, signals.received if unfinished else None)

    def resume(self, run: RunDirectory, hooks: Callbacks) -> tuple[int, Path | None]:
        """Put everything back to the run's last checkpoint, and cut off what was logged after it. Returns the step to
        go on with, and the checkpoint; 1 and None where there is none."""
        state: dict[str, Any] = {"step": 0, "skipped_in_a_row": 0, "callbacks": {}}
        checkpoint = last_valid_checkpoint(run.path)
        seed_everything(self.config.seed * 1_000_003)
        if checkpoint is not None:
            self._check_data(trainer_state(checkpoint)["data"])
            state = load_checkpoint(checkpoint, self.trained())
        self.skipped_in_a_row = state["skipped_in_a_row"]
        run.start(state["step"])
        hooks.resume(state["step"], run.rows(), state["callbacks"])
        return state["step"] + 1, checkpoint

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
            batch, rewards, of_sampling = self.sample(step, timer)
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
                    signal = ensemble_signal(
                        value,
                        batch.reward,
                        batch.mask,
                        batch.group,
                        learned=batch.learned,
                        trained_by=share if config.advantage_values == "cross_fit" else None,
                        gamma=config.gamma,
                        lam=config.lam
                        if config.length_adaptive_alpha is None
                        else length_adaptive_lambda(batch.response_length, config.length_adaptive_alpha),
                        value_lambda=config.critic.value_lambda,
                        whitening=config.whiten,
                        advantage_fraction=config.advantage_mask_fraction,
                        entropy_fraction=config.entropy_filter_fraction,
                        quantile_scope=config.quantile_scope,
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

    def sample(self, step: int, timer: Timer) -> tuple[Batch, Rewards, dict[str, float]]:
        """Sample G responses for each prompt of ``step`` and reward them. Returns rewards by function and metrics,
        too."""
        config = self.config
        of_sampling: dict[str, float] = {}
        timeouts: dict[str, int] = {}
        if config.dynamic_sampling:
            groups, of_sampling = keep_unequal(
                lambda batch, count: self._draw(self._rows_of_batch(step, batch)[:count], step, timer, timeouts),
                config.prompts_per_step,
                config.dynamic_sampling_max_batches,
            )
        else:
            groups = self._draw(self.schedule.rows_of_step(step - 1), step, timer, timeouts)
        samples = [sample for group in groups for sample in group]
        batch = make_batch(
            [s.prompt for s in samples],
            [s.response.tokens for s in samples],
            [s.response.logprob for s in samples],
            [s.total for s in samples],
            [s.response.truncated for s in samples],
            [prompt for prompt in range(config.prompts_per_step) for _ in range(config.num_generations)],
            pad_token_id=pad_token_id(self.tokenizer),
            device=self.device,
        )
        by_function = {name: [s.rewards[name] for s in samples] for name in samples[0].rewards}
        return batch, Rewards(by_function, [s.total for s in samples], timeouts), of_sampling

    def _rows_of_batch(self, step: int, batch: int) -> list[int]:
        """Rows of the step's own prompts, and of further batches of them, each a function of the seed and the step."""
        if batch == 0:
            return self.schedule.rows_of_step(step - 1)
        index = (step - 1) * (self.config.dynamic_sampling_max_batches - 1) + batch - 1
        return self.further_schedule.rows_of_step(index)

    def _draw(self, indices: Sequence[int], step: int, timer: Timer, timeouts: dict[str, int]) -> list[Group]:
        """Sample and reward G responses to each of these rows of the training data."""
        config = self.config
        rows = [self.train_dataset[i] for i in indices for _ in range(config.num_generations)]
        with timer.phase("gen"):
            prompts = self.tokenize([row["prompt"] for row in rows])
            responses = self.sampler.sample(
                prompts, max_completion_length=config.max_completion_length, temperature=config.temperature
            )
        with timer.phase("reward"):
            completions = self.tokenizer.batch_decode([r.tokens for r in responses], skip_special_tokens=True)
            ids = [response.tokens.tolist() for response in responses]
            rewards = compute_rewards(
                self.reward_funcs, rows, completions, ids, weights=config.reward_weights, step=step
            )
        for name, count in rewards.timeouts.items():
            timeouts[name] = timeouts.get(name, 0) + count
        samples = [
            Sample(*of_sample)
            for of_sample in zip(rows, prompts, responses, completions, rewards.by_sample, rewards.total, strict=True)
        ]
        return [samples[i : i + config.num_generations] for i in range(0, len(samples), config.num_generations)]

    def update_critics(self, batch: Batch, share: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Critic m minimises E[(V_m(s_t) - R_t)^2] on the responses with ``share`` == m (int64 [B])."""
        assert self.critics is not None
        assert self.critic_optimizer is not None
        config, max_tokens = self.config.critic, self.config.max_tokens_per_micro_batch
        own = [(share == m).nonzero().squeeze(1) for m in range(len(self.critics))]
        returns, old_value = self._critic_targets(batch, own)
        # All chance before the first update, critic by critic.
        minibatches = [
            list(_minibatches(rows, config.num_iterations, config.num_mini_batches, generator)) for rows in own
        ]
        updates = metrics.CriticUpdates(len(own))
        # Where a critic has fewer rows than minibatches are asked for, it sits out the last.
        for rows_of in zip_longest(*minibatches, fillvalue=own[0][:0]):
            weight = torch.stack([token_weights(batch.learned, rows, "token-mean") for rows in rows_of]).sum(0)

            def loss(micro: MicroBatch, value: Tensor, weight: Tensor = weight) -> Tensor:
                targets = old_value[micro.grid], returns[micro.grid], weight[micro.grid]
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
        for rows in _minibatches(everything, config.num_iterations, config.num_mini_batches, generator):
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
            for micro in self._micro_batches(batch, rows, at_least=config.gradient_accumulation_steps):
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
            norm = _clip_and_step(self.policy, self.policy_optimizer, config.max_grad_norm, loss)
            updates.stepped(float(loss), norm)
        row = updates.row() | {"actor/lr": self.policy_optimizer.param_groups[0]["lr"]}
        if rollout_weight is not None:
            row |= metrics.of_importance_weights(rollout_weight, batch.mask)
        return row

    def evaluate(self, run: RunDirectory, step: int) -> Evaluation | None:
        """Evaluate on the held-out prompts and log the samples; None if there are no such prompts."""
        if not self.eval_dataset:
            return None
        prompts = self.tokenize([row["prompt"] for row in self.eval_dataset])
        evaluation = evaluate(self.sampler, self.tokenizer, self.eval_dataset, prompts, self.reward_funcs, self.config)
        run.log_samples([{"step": step, "split": "eval", **sample} for sample in evaluation.samples])
        return evaluation

    def save(
        self, run: RunDirectory, step: int, row: dict[str, float] | None = None, hooks: Callbacks | None = None
    ) -> Path:
        """Save a checkpoint of policy, critics and optimizers, and log ``row``, the step's metrics.

        Whatever lies before a checkpoint is in the logs: it gets its name once the row is on the disk.
        """
        start = time.perf_counter()
        remembered = {
            "skipped_in_a_row": self.skipped_in_a_row,
            "accuracy": (row or {}).get("eval/accuracy"),
            "callbacks": {} if hooks is None else hooks.state_dict(),
            "data": {"train_dataset": self.train_dataset.digest, "eval_dataset": self.eval_dataset.digest},
        }
        partial = write_checkpoint(
            run.path, step, self.policy, self.critics, self.tokenizer, self.trained(), remembered
        )
        if row is not None:
            row["timing_s/save_checkpoint"] = time.perf_counter() - start
            run.log_metrics(row)
        run.flush()
        checkpoint = publish_checkpoint(partial, self.config.save_total_limit)
        if hooks is not None:
            hooks.saved(checkpoint)
        return checkpoint

    def trained(self) -> Trained:
        """Return what a checkpoint saves beside the loop's own few numbers, by name."""
        trained: Trained = {"policy": (self.policy.model, self.policy_optimizer)}
        if self.critics is not None and self.critic_optimizer is not None:
            trained["critics"] = (nn.ModuleList(self.critics.models), self.critic_optimizer.adamw)
        return trained

    def _check_data(self, digests: Mapping[str, str]) -> None:
        for field, rows in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            if rows.digest != digests[field]:
                raise ConfigError(
                    f"resume: {field}: the rows of {rows.name} are not those that the run began with, needs the same; "
                    "other rows need a new run"
                )

    def tokenize(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Return the tokens (int64 [length]) of each prompt."""
        tokens = prompt_tokens(prompts, self.tokenizer, self.config.data.chat_template_kwargs)
        return [torch.tensor(ids) for ids in tokens]

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
        """λ-returns [B, T] that each critic learns on its own rows, and its values [B, T] there before the update;
        zeros where nothing needs them."""
        assert self.critics is not None
        config, value = self.config.critic, torch.zeros_like(batch.reward)
        if config.value_lambda < 1 or config.cliprange_value is not None:
            value = self.critics.own_values(batch, own, self.config.max_tokens_per_micro_batch)
        gae = ensemble_gae(
            value[None], batch.reward, batch.mask, gamma=self.config.gamma, value_lam=config.value_lambda
        )
        return gae.returns, value


def make_sampler(policy: Policy, tokenizer: PreTrainedTokenizerBase, config: AsyPPOConfig) -> Sampler:
    """Return the sampler that ``config`` asks for."""
    continuous = config.sampler == "continuous" or (config.sampler == "auto" and policy.device.type == "cuda")
    return (ContinuousBatchingSampler if continuous else GenerateSampler)(
        policy.model,
        eos_token_ids=eos_token_ids(policy, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        batch_size=config.generation_batch_size,
        dtype=policy.dtype,
    )


def eos_token_ids(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends a response: the generation config's, and the tokenizer's."""
    configured = policy.model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, (list, tuple)) else [configured]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)


def prompt_limit(config: AsyPPOConfig, policy: Policy, critics: Critics | None) -> int:
    """Return how many tokens a prompt may have, so that the longest response fits in every model's positions."""
    configs = [m.config.get_text_config() for m in (policy.model, critics) if m is not None]
    positions = [getattr(c, "max_position_embeddings", None) or sys.maxsize for c in configs]
    if config.max_completion_length >= min(positions):
        raise ConfigError(
            f"max_completion_length: got {config.max_completion_length}, needs less than the {min(positions)} "
            "positions of the models, so that a prompt fits, too"
        )
    return min(positions) - config.max_completion_length


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token, or the end-of-sequence token where there is none; lengths say what is padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def _minibatches(rows: Tensor, num_iterations: int, num_mini_batches: int, generator: torch.Generator) -> Any:
    """Yield ``num_iterations`` shuffled passes over ``rows``, each cut into ``num_mini_batches`` even parts."""
    for _ in range(num_iterations):
        order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        yield from (part for part in order.tensor_split(num_mini_batches) if len(part))


def _clip_and_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, loss: Tensor
) -> float | None:
    """Clip the gradient, step, and return its norm; where loss or norm is not finite, skip the step, return None."""
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    finite = math.isfinite(norm) and math.isfinite(float(loss))
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if finite else None

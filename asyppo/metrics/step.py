"""What a step reports, under verl's names where verl has one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asyppo.algorithm.masked import masked_extremes, masked_mean, masked_moments
from asyppo.algorithm.options import PolicyLossOptions
from asyppo.algorithm.policy_losses import PolicyLossResult, PolicyTargets
from asyppo.data.batch import Batch
from asyppo.distributed.processes import sum_over_ranks, world_size
from asyppo.metrics.diagnostics import explained_variance
from asyppo.metrics.record import StepRecord
from asyppo.rewards.computing import Rewards

Row = dict[str, float]


def batch_metrics(record: StepRecord) -> Row:
    """Metrics of the sampled batch and of what the critics say of it."""
    batch, signal, old, known = record.batch, record.signal, record.old, record.known
    mask, everyone = batch.mask, torch.ones(len(batch), dtype=torch.bool, device=batch.tokens.device)
    length = mask.sum(dim=1).float()
    gap = (old.logprob - batch.sampler_logprob).abs()
    row: dict[str, Any] = {
        "response_length/clip_ratio": masked_mean(batch.truncated, everyone),
        "prompt_length/mean": masked_mean(batch.prompt_length, everyone),
        "actor/entropy": masked_mean(old.entropy, known),
        "actor/adv_mask_frac": masked_mean(~signal.advantage_keep, batch.learned),
        "actor/entropy_keep_frac": masked_mean(signal.entropy_keep, batch.learned),
        "critic/vf_explained_var": explained_variance(signal.value, signal.returns, mask),
        "critic/std/mean": masked_mean(signal.std, mask),
        "critic/std/low": signal.low,
        "critic/std/high": signal.high,
        "sampling/sampling_logp_difference/mean": masked_mean(gap, known),
        "sampling/sampling_logp_difference/max": masked_extremes(gap, known)[1],
    }
    for name, value, where in (
        ("critic/score", batch.score, everyone),
        ("critic/rewards", batch.reward.sum(dim=1), everyone),
        ("critic/advantages", signal.raw_advantage, mask),
        ("critic/returns", signal.returns, mask),
        ("critic/values", signal.value, mask),
        ("response_length", length, everyone),
    ):
        row[f"{name}/mean"] = masked_mean(value, where)
        row[f"{name}/min"], row[f"{name}/max"] = masked_extremes(value, where)
    return {key: float(value) for key, value in row.items()}


def importance_metrics(weight: Tensor, mask: Tensor) -> Row:
    """Metrics of the tokens' importance weights, under TRL's names."""
    low, high = masked_extremes(weight, mask)
    return {
        "sampling/importance_sampling_ratio/mean": float(masked_mean(weight, mask)),
        "sampling/importance_sampling_ratio/min": float(low),
        "sampling/importance_sampling_ratio/max": float(high),
    }


def reward_metrics(rewards: Rewards) -> Row:
    """Mean and standard deviation of each reward function over the samples that are its own, and its timeouts."""
    row: Row = {}
    for name, given in rewards.by_function.items():
        own = torch.tensor([reward is not None for reward in given])
        mean, variance = masked_moments(torch.tensor([reward or 0.0 for reward in given]), own)
        row[f"rewards/{name}/mean"], row[f"rewards/{name}/std"] = float(mean), float(variance.sqrt())
    return row | {f"rewards/{name}/timeouts": float(count) for name, count in rewards.timeouts.items()}


def time_metrics(batch: Batch, seconds: Row, device: torch.device) -> Row:
    """Seconds of each phase, and tokens a second and process."""
    tokens = float(batch.length.sum())
    step = seconds["timing_s/step"]
    row = seconds | {
        "perf/total_num_tokens": tokens,
        "perf/time_per_step": step,
        "perf/throughput": tokens / step / world_size(),
    }
    if device.type == "cuda":
        row["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


class PolicyUpdates:
    """Gathers the statistics of the policy's optimizer steps of one training step."""

    def __init__(self, options: PolicyLossOptions):
        self.options = options
        self.sums: list[Tensor] = []
        self.losses: list[float] = []
        self.norms: list[float | None] = []

    def add(self, result: PolicyLossResult, targets: PolicyTargets) -> None:
        """Count one micro-batch, given the loss's result and what its N tokens learned from."""
        weight, keep = targets.token_weight, targets.entropy_keep
        counts = weight != 0
        # Left on the device: reading them here would make the host wait for every micro-batch.
        self.sums.append(
            torch.stack(
                [
                    (weight * torch.where(keep, result.entropy, 0.0)).sum(),
                    (weight * result.kl).sum(),
                    torch.where(counts, targets.old(result.logprob) - result.logprob, 0.0).sum(),
                    (result.clipped & ~result.dual_clipped & counts).sum(),
                    (result.dual_clipped & counts).sum(),
                    counts.sum(),
                ]
            )
        )

    def stepped(self, loss: float, norm: float | None) -> None:
        """Count one optimizer step with its loss and gradient norm; None: it was skipped."""
        self.losses.append(loss)
        self.norms.append(norm)

    def row(self) -> Row:
        """Return the metrics: losses and norms as means over optimizer steps, the rest over tokens."""
        steps = len(self.losses)
        sums = sum_over_ranks(torch.stack(self.sums).double().sum(dim=0)).tolist()
        entropy, kl, log_ratio, clipped, dual_clipped, tokens = sums
        entropy, kl, loss = entropy / steps, kl / steps, sum(self.losses) / steps
        norms = [norm for norm in self.norms if norm is not None]
        row = {
            "actor/loss": loss,
            "actor/pg_loss": loss + self.options.entropy_coef * entropy - self.options.kl_coef * kl,
            "actor/entropy_loss": entropy,
            "actor/ppo_kl": log_ratio / max(tokens, 1),
            "actor/pg_clipfrac": clipped / max(tokens, 1),
            "actor/pg_clipfrac_lower": dual_clipped / max(tokens, 1),
            "actor/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "actor/skipped_updates": float(steps - len(norms)),
        }
        return row | ({"actor/kl_loss": kl} if self.options.kl_coef > 0 else {})


class CriticUpdates:
    """Gathers the statistics of the optimizer steps of M critics in one training step."""

    def __init__(self, num_critics: int):
        self.losses: list[list[float]] = [[] for _ in range(num_critics)]
        self.norms: list[list[float | None]] = [[] for _ in range(num_critics)]

    def stepped(self, losses: Sequence[float], norms: Sequence[float | None], active: Sequence[bool]) -> None:
        """Count an optimizer step: losses and gradient norms of the M critics, None: that critic's was skipped. Those
        that are not ``active`` had nothing to learn."""
        for m, is_active in enumerate(active):
            if is_active:
                self.losses[m].append(losses[m])
                self.norms[m].append(norms[m])

    def row(self) -> Row:
        """Return the metrics of each critic, as means over its optimizer steps, and their means over critics."""
        row: Row = {}
        for m, (losses, norms) in enumerate(zip(self.losses, self.norms, strict=True)):
            taken = [norm for norm in norms if norm is not None]
            row[f"critic/{m}/vf_loss"] = sum(losses) / len(losses)
            row[f"critic/{m}/grad_norm"] = sum(taken) / len(taken) if taken else math.nan
            row[f"critic/{m}/skipped_updates"] = float(len(norms) - len(taken))
        count = len(self.losses)
        for name in ("vf_loss", "grad_norm"):
            row[f"critic/{name}"] = sum(row[f"critic/{m}/{name}"] for m in range(count)) / count
        row["critic/skipped_updates"] = sum(row[f"critic/{m}/skipped_updates"] for m in range(count))
        return row


def summary(row: Row) -> str:
    """Return the few numbers of a step that fit on a line."""
    parts = [f"reward {row['critic/score/mean']:.3f}"]
    if "critic/vf_loss" in row:
        parts.append(f"value error {row['critic/vf_loss']:.3f}")
    parts.append(f"entropy {row['actor/entropy']:.3f}")
    if "eval/accuracy" in row:
        parts.append(f"held-out accuracy {row['eval/accuracy']:.3f}")
    skipped = row.get("actor/skipped_updates", 0) + row.get("critic/skipped_updates", 0)
    if skipped:
        parts.append(f"SKIPPED {skipped:.0f} updates: non-finite loss or gradient")
    return "  ".join(parts)

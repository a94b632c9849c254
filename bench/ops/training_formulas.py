"""Each algorithm's update from the paper's formulas, in plain torch, a sequence at a time. All tokens count."""

from __future__ import annotations

from typing import Any

import torch

from asyppo_kernels.agreement_masks.reference import agreement_masks_reference
from asyppo_kernels.ensemble_gae.reference import ensemble_gae_reference
from asyppo_kernels.linear_logprob.reference import linear_logprob_reference
from bench.cases import Case, Outputs
from bench.ops.training import ALGORITHMS, GENERATIONS, config_of, gradients_of, policy_model_of, value_models_of


def losses_and_gradients(case: Case, batch: Any, dtype: torch.dtype) -> Outputs:
    """Of all algorithms on this batch, computed in ``dtype``, under the names the contenders' outputs have."""
    policy = policy_model_of(case).to(dtype)
    outputs: Outputs = {}
    for algorithm in ALGORITHMS:
        config = config_of(case, algorithm)
        models = [model.to(dtype) for model in value_models_of(case, algorithm)]
        found = _value_losses(batch, models, config) if models else {}
        advantage, keep = _signal(batch, models, config, dtype)
        policy.zero_grad(set_to_none=True)
        found["loss"] = _policy_loss(policy, batch, advantage, keep, config.entropy_coef)
        found |= gradients_of(policy, models)
        outputs |= {f"{algorithm} {name}": x for name, x in found.items()}
    return outputs


def _predicted(batch: Any, row: int) -> tuple[torch.Tensor, slice]:
    """Tokens [1, n] of a sequence, and the positions that predict its response."""
    prompt, length = int(batch.prompt_length[row]), int(batch.length[row])
    return batch.tokens[row : row + 1, :length], slice(prompt - 1, length - 1)


def _value_losses(batch: Any, models: list[Any], config: Any) -> Outputs:
    """Mean squared error of critic m on its own responses; the gradients are left in the models."""
    from asyppo.algorithm.split import split_responses

    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 1)
    share = split_responses(batch.group, len(models), generator)
    losses = []
    for m, model in enumerate(models):
        own = (share == m).nonzero().squeeze(1).tolist()
        count = sum(int(batch.response_length[row]) for row in own)
        total = 0.0
        for row in own:
            ids, where = _predicted(batch, row)
            value = model(input_ids=ids, use_cache=False).logits[0, where, 0]
            loss = (value - batch.reward[row].sum().to(value.dtype)).square().sum() / count  # λ = γ = 1
            loss.backward()
            total += loss.item()
        losses.append(total)
    return {"vf_loss": torch.tensor(losses, dtype=torch.float64, device=batch.tokens.device)}


@torch.no_grad()
def _signal(
    batch: Any, models: list[Any], config: Any, dtype: torch.dtype
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Advantages [B, T], and which count for the surrogate and the entropy."""
    from asyppo.algorithm.advantage import coarse

    score, everything = batch.reward.sum(1).to(torch.float64), torch.ones_like(batch.mask)
    if not models:
        groups = score.view(-1, GENERATIONS)
        normal = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        return normal.view(-1, 1).expand_as(everything), (everything, everything)
    value = torch.zeros(len(models), *everything.shape, dtype=dtype, device=score.device)
    for m, model in enumerate(models):
        for row in range(len(batch)):
            ids, where = _predicted(batch, row)
            value[m, row] = model(input_ids=ids, use_cache=False).logits[0, where, 0]
    double = value.double()
    raw, _, _, std = ensemble_gae_reference(
        double, batch.reward.double(), everything, gamma=config.gamma, lam=config.lam, value_lam=1.0
    )
    advantage = (raw - raw.mean()) / (raw.var(correction=0) + 1e-8).sqrt()
    advantage_keep, entropy_keep, _, _ = agreement_masks_reference(
        coarse(std.float()),
        everything,
        advantage_fraction=config.advantage_mask_fraction,
        entropy_fraction=config.entropy_filter_fraction,
    )
    return advantage, (advantage_keep, entropy_keep)


def _policy_loss(
    policy: Any, batch: Any, advantage: torch.Tensor, keep: tuple[torch.Tensor, torch.Tensor], entropy_coef: float
) -> torch.Tensor:
    """Mean over responses of the mean over tokens. Before its first step the policy is the old one: ratio 1, and the
    ratio's gradient that of the log-prob. The gradients are left in the policy."""
    total = torch.zeros((), dtype=torch.float64, device=batch.tokens.device)
    for row in range(len(batch)):
        ids, where = _predicted(batch, row)
        hidden = policy.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, where]
        weight = policy.get_output_embeddings().weight
        target = ids[0, where.start + 1 : where.stop + 1]
        logprob, entropy = linear_logprob_reference(hidden, weight, target)
        assert entropy is not None
        surrogate = (logprob - logprob.detach()).exp() * advantage[row].to(logprob.dtype)
        loss = -(surrogate * keep[0][row] + entropy_coef * entropy * keep[1][row]).mean() / len(batch)
        loss.backward()
        total += loss.detach()
    return total

"""The right answer, in float64, and the same computation in a case's own dtype, by whose error others are judged."""

from __future__ import annotations

from typing import Any

import torch

from asyppo_kernels.agreement_masks.reference import agreement_masks_reference
from asyppo_kernels.ensemble_gae.reference import ensemble_gae_reference
from asyppo_kernels.ensemble_value.reference import ensemble_value_reference
from asyppo_kernels.linear_logprob.reference import linear_logprob_reference
from asyppo_kernels.linear_ppo_loss.reference import linear_ppo_loss_reference
from bench.cases import Case, Inputs, Outputs
from bench.ops import critics, ensemble_value, linear_logprob, linear_ppo_loss, train_step, update
from bench.ops.policy_head import ROWS


def oracle(case: Case, inputs: Inputs) -> Outputs:
    """Outputs in float64, from the inputs as the contenders get them."""
    return _EVALUATE[case.op](case, inputs, torch.float64, ROWS)


def baseline(case: Case, inputs: Inputs) -> Outputs:
    """The definition in plain torch, in the case's dtype, all rows at once."""
    return _EVALUATE[case.op](case, inputs, case.dtype, None)


def _policy_head(case: Case, inputs: Inputs, dtype: torch.dtype, rows: int | None) -> Outputs:
    """Rows in parts: each is independent of the others, and d_weight and the loss are sums over them."""
    n = case.sizes["N"]
    weight = inputs["weight"].detach().to(dtype).requires_grad_(case.backward)
    parts: list[Outputs] = []
    totals: Outputs = {}
    for start in range(0, n, rows or n):
        part = {
            name: x.detach()[start : start + (rows or n)]
            for name, x in inputs.items()
            if name not in ("weight", "bias")
        }
        if dtype == torch.float64:
            part = {name: x.double() if x.is_floating_point() else x for name, x in part.items()}
        hidden = part["hidden"].to(dtype).requires_grad_(case.backward)
        with torch.set_grad_enabled(case.backward):
            if case.op == linear_ppo_loss.OP:
                loss, sums, outputs = _ppo_loss(case, hidden, weight, part)
            else:
                loss, sums, outputs = _logprob(case, hidden, weight, part)
        if case.backward:
            outputs["d_hidden"], sums["d_weight"] = torch.autograd.grad(loss, (hidden, weight))
        parts.append({name: x.detach() for name, x in outputs.items()})
        for name, x in sums.items():
            totals[name] = totals[name].add_(x.detach()) if name in totals else x.detach().clone()
    return totals | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _logprob(
    case: Case, hidden: torch.Tensor, weight: torch.Tensor, part: Inputs
) -> tuple[torch.Tensor, Outputs, Outputs]:
    temperature, entropy = float(case.options["temperature"]), bool(case.options["entropy"])
    result = linear_logprob_reference(hidden, weight, part["target"], temperature=temperature, entropy=entropy)
    outputs = {name: x for name, x in result._asdict().items() if x is not None}
    return linear_logprob.objective(case, outputs, part), {}, outputs


def _ppo_loss(
    case: Case, hidden: torch.Tensor, weight: torch.Tensor, part: Inputs
) -> tuple[torch.Tensor, Outputs, Outputs]:
    names = ("target", "old_logprob", "advantage", "token_weight")
    masks = {name: part[name] for name in ("advantage_keep", "entropy_keep")}
    result = linear_ppo_loss_reference(
        hidden, weight, *(part[name] for name in names), **masks, **linear_ppo_loss.options_of(case)
    )
    return result.loss, {"loss": result.loss}, {"logprob": result.logprob, "entropy": result.entropy}


def _value(case: Case, inputs: Inputs, dtype: torch.dtype, rows: int | None) -> Outputs:
    names = ("hidden", "weight", "bias")
    cast = inputs | {name: inputs[name].detach().to(dtype).requires_grad_(case.backward) for name in names}
    return ensemble_value.outputs_of(case, cast, *ensemble_value_reference(*(cast[name] for name in names)))


def _gae(case: Case, inputs: Inputs, dtype: torch.dtype, rows: int | None) -> Outputs:
    numbers = {name: float(case.options[name]) for name in ("gamma", "lam", "value_lam")}
    result = ensemble_gae_reference(inputs["value"].to(dtype), inputs["reward"].to(dtype), inputs["mask"], **numbers)
    return dict(zip(("advantage", "returns", "mean", "std"), result, strict=True))


def _masks(case: Case, inputs: Inputs, dtype: torch.dtype, rows: int | None) -> Outputs:
    advantage_keep, entropy_keep, _, _ = agreement_masks_reference(inputs["std"].to(dtype), inputs["mask"])
    return {"advantage_keep": advantage_keep, "entropy_keep": entropy_keep}


def _critics(case: Case, inputs: Inputs, dtype: torch.dtype, rows: int | None) -> Outputs:
    """Each model by itself, through its own forward."""
    from asyppo.data.batch import micro_batches

    batch, shares = critics.batch_of(inputs), critics.shares_of(case)
    value = torch.zeros(len(shares), *batch.reward.shape, dtype=dtype, device=case.device)
    loss = torch.zeros(len(shares), dtype=dtype, device=case.device)
    models = [model.to(dtype) for model in critics.models_of(case)]
    everything = torch.arange(len(batch), device=case.device)
    for m, model in enumerate(models):
        for micro in micro_batches(batch, shares[m] if case.backward else everything, rows or critics.MAX_TOKENS):
            with torch.set_grad_enabled(case.backward):
                logits = model(input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False).logits
                own = micro.select(logits)[:, 0]
                value[m][micro.grid] = own.detach()
                if case.backward:
                    part = critics.squared_error(micro, own, inputs["target"])
                    part.backward()
                    loss[m] += part.detach()
    return {"loss": loss, **critics.gradients_of(models)} if case.backward else {"value": value}


def _update(case: Case, inputs: Inputs, dtype: torch.dtype, rows: int | None) -> Outputs:
    """Each algorithm's update from the paper's formulas, a sequence at a time, all tokens of which count."""
    batch = _sampled(case, inputs) if case.op == train_step.OP else update.batch_of(case, inputs)
    policy = update.policy_model_of(case).to(dtype)
    outputs: Outputs = {}
    for algorithm in update.ALGORITHMS:
        config = update.config_of(case, algorithm)
        models = [model.to(dtype) for model in update.value_models_of(case, algorithm)]
        found = _value_losses(batch, models, config) if models else {}
        advantage, keep = _signal(batch, models, config, dtype)
        policy.zero_grad(set_to_none=True)
        found["loss"] = _policy_loss(policy, batch, advantage, keep, config.entropy_coef)
        found |= update.gradients_of(policy, models)
        outputs |= {f"{algorithm} {name}": x for name, x in found.items()}
    return outputs


def _sampled(case: Case, inputs: Inputs) -> Any:
    """The batch the contenders' step samples: same policy, same sampler, same seed."""
    from asyppo.run.progress import Timer
    from asyppo.run.rng import seed_everything
    from bench.contenders import training

    shared = training.shared_by(case)
    trainer = training.trainer_of(case, "grpo", shared)
    training.feed(trainer, case, inputs)
    seed_everything(trainer.config.seed * 1_000_003 + 1)
    return trainer.rollout(1, Timer(case.device))[0]


def _predicted(batch: Any, row: int) -> tuple[torch.Tensor, slice]:
    """Tokens [1, n] of a sequence, and the positions that predict its response."""
    prompt, length = int(batch.prompt_length[row]), int(batch.length[row])
    return batch.tokens[row : row + 1, :length], slice(prompt - 1, length - 1)


def _value_losses(batch: Any, models: list[Any], config: Any) -> Outputs:
    """Mean squared error of critic m on its own responses; the gradients are left in the models."""
    from asyppo.data.batch import split_responses

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
        groups = score.view(-1, update.GENERATIONS)
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


_EVALUATE = {
    "linear_logprob": _policy_head,
    "linear_ppo_loss": _policy_head,
    "ensemble_value": _value,
    "ensemble_gae": _gae,
    "agreement_masks": _masks,
    "critics": _critics,
    "train_step": _update,
    "update": _update,
}

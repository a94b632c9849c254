"""AsyPPO in verl 0.9.1: M critics in verl's critic worker, their mean as the value, and the advantage's mask.

verl's plumbing of values carries a last dimension along. So the critic worker holds one model of M critics
(``verl_critics``), values are [B, T, M], and what is replaced in the trainer is what reads them: the advantage, the
value loss, and the metrics. A module that ``VERL_USE_EXTERNAL_MODULES`` names calls ``enable``, so that every process
has the critics' model.

Two things are not the paper's. verl computes values, then advantages, and then updates the critics, in this order. And
the mask of the entropy bonus has no way into verl's ``ppo_loss``: ``docs/integrations.md`` has the patch that it takes.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import verl.trainer.ppo.core_algos as core_algos
import verl.trainer.ppo.v1.trainer_base as trainer
from torch import Tensor
from verl import DataProto
from verl.workers.utils.padding import no_padding_2_padding

from asyppo_kernels.agreement_masks import agreement_masks
from asyppo_kernels.ensemble_gae import ensemble_gae
from asyppo_kernels.integrations import verl_critics  # noqa: F401  (registers the model)
from asyppo_kernels.integrations._patching import Patches, check_version
from asyppo_kernels.integrations.verl import TESTED

_patches = Patches()


def enable(*, advantage_fraction: float = 0.2, entropy_fraction: float = 0.2, value_lam: float = 1.0) -> None:
    """Let verl's trainer run AsyPPO where ``critic.model.path`` is a model of ``verl_critics.save_critics``.

    With ``algorithm.adv_estimator=gae``. ``advantage_fraction`` and ``entropy_fraction`` are the paper's k and h,
    ``value_lam`` the λ of the critics' targets. The chance by which responses are split begins anew where verl resumes.
    A second call changes nothing.

    Raises:
        ImportError: unless verl 0.9.1 is installed.
    """
    check_version("verl", TESTED)
    if _patches:
        return
    fractions = {"advantage_fraction": advantage_fraction, "entropy_fraction": entropy_fraction}
    _patches.replace(
        trainer,
        "compute_advantage_for_multi_trajectories",
        partial(compute_advantage, value_lam=value_lam, split=torch.Generator().manual_seed(0), **fractions),
    )
    _patches.replace(trainer, "value_loss", value_loss)
    _patches.replace(trainer, "compute_data_metrics", partial(data_metrics, theirs=trainer.compute_data_metrics))
    print("asyppo_kernels: AsyPPO is on in verl's trainer", file=sys.stderr)


def disable() -> None:
    """Give verl its own functions back."""
    _patches.undo()


def split_responses(prompt: list[str], num_critics: int, generator: torch.Generator) -> Tensor:
    """Assign each response to a critic, int64 [B]: those of a prompt at random, evenly, and none to two critics."""
    number = {name: i for i, name in enumerate(dict.fromkeys(prompt))}
    group = torch.tensor([number[name] for name in prompt])
    shuffled = torch.randperm(len(group), generator=generator)
    by_group = shuffled[torch.argsort(group[shuffled], stable=True)]
    first = int(torch.randint(num_critics, (), generator=generator))
    assignment = torch.empty(len(group), dtype=torch.int64)
    assignment[by_group] = (torch.arange(len(group)) + first) % num_critics  # the remainder goes round
    return assignment


def compute_advantage(
    data: DataProto,
    *,
    gamma: float,
    lam: float,
    value_lam: float,
    advantage_fraction: float,
    entropy_fraction: float,
    split: torch.Generator,
    **_: Any,
) -> DataProto:
    """Add ``advantages`` and ``entropy_mask`` [B, T], and ``returns`` [B, T, M], to a batch with values [B, T, M].

    The advantage is GAE of the critics' mean, whitened as verl does and then 0 where the critics agree. ``returns`` are
    NaN but for the critic that the response belongs to, by which the value loss knows it.
    """
    batch = data.batch
    values, mask = batch["values"], batch["response_mask"].bool()
    if values.dim() != 3:
        raise ValueError(f"values: got shape {list(values.shape)}, needs [B, T, M], of a model of verl_critics")
    out = ensemble_gae(
        values.movedim(-1, 0).contiguous(),
        batch["token_level_rewards"],
        mask,
        gamma=float(gamma),
        lam=float(lam),
        value_lam=value_lam,
    )
    masks = agreement_masks(out.std, mask, advantage_fraction=advantage_fraction, entropy_fraction=entropy_fraction)
    whitened = core_algos.verl_F.masked_whiten(out.advantage, mask)
    batch["advantages"] = whitened * masks.advantage_keep
    batch["entropy_mask"] = masks.entropy_keep.float()
    owner = split_responses([str(uid) for uid in data.non_tensor_batch["uid"]], values.shape[-1], split)
    owns = torch.nn.functional.one_hot(owner, values.shape[-1]).bool()[:, None].to(mask.device)
    batch["returns"] = torch.where(owns, out.returns[..., None], torch.nan)
    return data


def value_loss(config: Any, model_output: dict[str, Tensor], data: Any, dp_group: Any = None) -> tuple[Tensor, dict]:
    """verl's value loss, of each response by its own critic; (loss, metrics).

    M times as large, since each critic has one of M shares of the tokens that verl divides by.
    """
    predicted = no_padding_2_padding(model_output["values"], data)
    num_critics = predicted.shape[-1]
    sizes = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    padded = data.select("values", "returns", "response_mask").to_padded_tensor()
    mask = padded["response_mask"].to(bool)
    owner = (~padded["returns"][:, :1].isnan()).to(torch.int64).argmax(-1, keepdim=True).expand(*mask.shape, 1)
    own, old, returns = (x.gather(-1, owner).squeeze(-1) for x in (predicted, padded["values"], padded["returns"]))
    loss, clipped = core_algos.compute_value_loss(
        vpreds=own,
        values=old,
        returns=returns.masked_fill(~mask, 0),
        response_mask=mask,
        cliprange_value=config.cliprange_value,
        loss_agg_mode=config.loss_agg_mode,
        loss_scale_factor=config.loss_scale_factor,
        **sizes,
    )
    loss = num_critics * loss
    whole = config.loss_scale_factor is not None or sizes["dp_size"] > 1
    whole = whole or any(sizes[name] is not None for name in ("batch_num_tokens", "global_batch_size"))
    from verl.utils.metric import AggregationType, Metric

    metrics = {
        "critic/vf_loss": Metric(value=loss / num_critics, aggregation=AggregationType[("MEAN", "SUM")[whole]]),
        "critic/vf_clipfrac": clipped.detach().item(),
        "critic/vpred_mean": own[mask].mean().item(),
        "critic/std/mean": predicted.detach()[mask].std(-1, correction=0).mean().item(),
    }
    return loss, metrics


def data_metrics(batch: DataProto, use_critic: bool = True, *, theirs: Any) -> dict[str, Any]:
    """verl's metrics of a batch, of the critics' mean and of the returns."""
    values, returns = batch.batch["values"], batch.batch["returns"]
    batch.batch["values"], batch.batch["returns"] = values.mean(-1), returns.nanmean(-1)
    try:
        return theirs(batch, use_critic)
    finally:
        batch.batch["values"], batch.batch["returns"] = values, returns

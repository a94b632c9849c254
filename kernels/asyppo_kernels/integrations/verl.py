"""verl 0.9.1: the fused head's log-probs and entropies, and GAE, from the ops.

``verl_plugin`` turns it on in every process of verl's, which a call of ``enable`` in one's own script does not.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from asyppo_kernels.ensemble_gae import ensemble_gae
from asyppo_kernels.integrations._head import head_log_probs
from asyppo_kernels.integrations._patching import Patches, check_version

TESTED = "0.9.1"

_patches = Patches()


def enable() -> None:
    """Put the ops in verl's ``FusedLinearForPPO`` and ``compute_gae_advantage_return``, and say so on stderr.

    The head counts with ``actor_rollout_ref.model.use_fused_kernels=True`` and
    ``fused_kernel_options.impl_backend=torch``, the advantage with ``algorithm.adv_estimator=gae``. A second call
    changes nothing.

    Raises:
        ImportError: unless verl 0.9.1 is installed.
    """
    check_version("verl", TESTED)
    import verl.trainer.ppo.core_algos as core_algos
    import verl.utils.experimental.torch_functional as functional

    if _patches:
        return
    verls = functional.FusedLinearForPPO.forward

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        if self.impl_backend != "torch":
            return verls(self, hidden_states, vocab_weights, input_ids, temperature)
        return log_probs(hidden_states, vocab_weights, input_ids, temperature)

    def gae(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        advantages, returns = advantages_and_returns(token_level_rewards, values, response_mask, gamma, lam)
        return core_algos.verl_F.masked_whiten(advantages, response_mask), returns

    _patches.replace(functional.FusedLinearForPPO, "forward", forward)
    _patches.replace(core_algos, "compute_gae_advantage_return", gae)
    print("asyppo_kernels: on in verl, for FusedLinearForPPO and compute_gae_advantage_return", file=sys.stderr)


def disable() -> None:
    """Give verl its own functions back."""
    _patches.undo()


def log_probs(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy, float32 in the shape of ``tokens``, from ``hidden`` [..., H] and ``weight`` [V, H].

    verl's entropy is in the dtype of the logits.
    """
    target = tokens.flatten().to(torch.int64)
    logprob, entropy = head_log_probs(hidden.flatten(0, -2), weight, target, temperature=temperature)
    assert entropy is not None
    return logprob.view(tokens.shape), entropy.view(tokens.shape)


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """verl's GAE before its whitening, [B, T] float32; a masked step is skipped, and its results are 0."""
    out = ensemble_gae(values[None], rewards, mask.bool(), gamma=float(gamma), lam=float(lam), value_lam=float(lam))
    return out.advantage, out.returns

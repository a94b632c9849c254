"""What verl's own code gives, for ``test_verl.py`` and the table: a model that it patched, and its advantages."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl import DataProto
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.workers.config import FSDPActorConfig

VOCABULARY, PROMPT, RESPONSE = 199, 3, 9


def batch() -> dict[str, Tensor]:
    """Six responses, one of them with steps inside that the policy did not write."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(RESPONSE) < torch.tensor([9, 4, 7, 1, 8, 9])[:, None]).float()
    mask[4, 2:4] = 0
    rewards = torch.zeros(6, RESPONSE)
    rewards[torch.arange(6), [8, 3, 6, 0, 7, 8]] = torch.randn(6, generator=g)
    values = torch.randn(6, RESPONSE, generator=g)
    tokens = torch.randint(VOCABULARY, (6, PROMPT + RESPONSE), generator=g)
    return {"response_mask": mask, "token_level_rewards": rewards, "values": values, "input_ids": tokens}


def advantages(gamma: float = 0.99, lam: float = 0.9) -> dict[str, Tensor]:
    """What ``compute_advantage`` of verl's trainer adds to a batch."""
    data = {name: x for name, x in batch().items() if name != "input_ids"}
    proto = DataProto(batch=TensorDict(data, batch_size=6))
    done = compute_advantage(proto, "gae", gamma=gamma, lam=lam, config=OmegaConf.create({})).batch
    return {name: done[name] for name in ("advantages", "returns")}


def policy_step(entropy_coef: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Log-prob, entropy, loss and gradients of a model whose head is verl's fused one, torch backend."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3Config(
        vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, **sizes
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    data = batch()
    out = model(input_ids=data["input_ids"], temperature=0.8, return_dict=True, use_cache=False)
    # The output at a place belongs to the next token.
    logprob, entropy = (x[:, PROMPT - 1 : -1].float() for x in (out.log_probs, out.entropy))
    mask = data["response_mask"]
    old = logprob.detach() + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    actor = FSDPActorConfig(
        strategy="fsdp", ppo_mini_batch_size=6, ppo_micro_batch_size_per_gpu=6, rollout_n=1, use_dynamic_bsz=False
    )
    loss, _ = compute_policy_loss_vanilla(old, logprob, data["values"], mask, "token-mean", actor)
    loss = loss - entropy_coef * agg_loss(entropy, mask, "token-mean")
    loss.backward()
    keep = mask.bool()
    return {
        "log-prob": logprob.detach()[keep],
        "entropy": entropy.detach()[keep],
        "loss": loss.detach(),
        "gradient of the head": model.lm_head.weight.grad.float(),
        "gradient of the first layer": model.model.layers[0].mlp.up_proj.weight.grad.float(),
    }

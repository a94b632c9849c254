"""An existing PPO or GRPO loss, and the same loss as one call of ``linear_ppo_loss``.

In your trainer, ``hidden`` is ``model.model(input_ids).last_hidden_state[:, :-1]``, ``weight`` is
``model.lm_head.weight``, and ``target`` is ``input_ids[:, 1:]``. Run it: ``python examples/ppo_loss_in_one_call.py``
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels import linear_ppo_loss

TEMPERATURE, CLIP_LOW, CLIP_HIGH, ENTROPY_COEF, KL_COEF = 0.9, 0.2, 0.28, 1e-3, 0.01


def loss_before(hidden: Tensor, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """As trainers write it: logits [B, T, V], their log-softmax, and both again for the backward."""
    logits = (hidden @ weight.T).float() / TEMPERATURE
    log_softmax = logits.log_softmax(dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(dim=-1)
    logprob = log_softmax.gather(-1, batch["target"].unsqueeze(-1)).squeeze(-1)

    ratio = (logprob - batch["old_logprob"]).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    surrogate = torch.min(ratio * batch["advantage"], clipped * batch["advantage"])
    log_ref = batch["ref_logprob"] - logprob
    kl = log_ref.exp() - log_ref - 1

    per_token = -surrogate - ENTROPY_COEF * entropy + KL_COEF * kl
    mask = batch["mask"]
    return ((per_token * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def loss_after(hidden: Tensor, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The same in one call: every position is a row, and its weight carries the mask and the means."""
    mask = batch["mask"]
    token_weight = mask / mask.sum(dim=1, keepdim=True) / len(mask)
    return linear_ppo_loss(
        hidden.flatten(0, 1),
        weight,
        batch["target"].flatten(),
        batch["old_logprob"].flatten(),
        batch["advantage"].flatten(),
        token_weight.flatten(),
        ref_logprob=batch["ref_logprob"].flatten(),
        temperature=TEMPERATURE,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        entropy_coef=ENTROPY_COEF,
        kl_coef=KL_COEF,
    ).loss


def main() -> None:
    """Print both losses, and how far their gradients are apart."""
    torch.manual_seed(0)
    sequences, tokens, width, vocabulary = 8, 64, 64, 2000
    hidden = torch.randn(sequences, tokens, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) / 8).requires_grad_()
    target = torch.randint(vocabulary, (sequences, tokens))
    with torch.no_grad():
        now = (hidden @ weight.T / TEMPERATURE).log_softmax(dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    batch = {
        "target": target,
        "old_logprob": now + 0.3 * torch.randn_like(now),  # far enough away that the clip binds here and there
        "ref_logprob": now + 0.3 * torch.randn_like(now),
        "advantage": torch.randn(sequences, 1).expand(sequences, tokens),  # GRPO: one number a response
        "mask": (torch.arange(tokens) < torch.randint(1, tokens + 1, (sequences, 1))).float(),
    }

    gradients = []
    for loss_function in (loss_before, loss_after):
        loss = loss_function(hidden, weight, batch)
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
        print(f"{loss_function.__name__:12}{loss.item():.8f}")
    largest = max(before.abs().max() for before in gradients[0])
    difference = max((after - before).abs().max() for before, after in zip(*gradients, strict=True))
    print(f"largest gradient {largest:.3e}, largest difference between the two {difference:.3e}")


if __name__ == "__main__":
    main()

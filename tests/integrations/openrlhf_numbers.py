"""What OpenRLHF's own code gives, for ``test_openrlhf.py`` and the table: advantages of a batch of experiences.

Its modules import flash_attn, which is built with CUDA only, and vllm. Where they are missing, names without a
function stand in for what is imported of them; nothing here calls them.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

IMPORTED = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
    "vllm": (),
    "vllm.inputs": ("TokensPrompt",),
    "vllm.utils": ("random_uuid",),
}
NOT_HERE = [name for name in ("flash_attn", "vllm") if importlib.util.find_spec(name) is None]
for place, names in IMPORTED.items():
    if place.partition(".")[0] in NOT_HERE:
        sys.modules[place] = module = ModuleType(place)
        module.__spec__ = ModuleSpec(place, None)
        for name in names:
            setattr(module, name, None)

from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

STEPS = 9


def batch() -> dict[str, Tensor]:
    """Values, KL and mask of six responses, and a reward for each."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(STEPS) < torch.tensor([9, 4, 7, 1, 8, 9])[:, None]
    values, kl = torch.randn(2, 6, STEPS, generator=g)
    return {"values": values, "kl": kl * 0.1, "action_mask": mask, "rewards": torch.randn(6, generator=g)}


def maker(gamma: float, lam: float) -> Any:
    """A RemoteExperienceMaker without the workers that the advantages do without."""
    advantage = SimpleNamespace(estimator="gae", gamma=gamma, lambd=lam, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=2),
        reward=SimpleNamespace(
            clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None, overlong_penalty_factor=1.0
        ),
    )
    strategy, controller = SimpleNamespace(args=args), SimpleNamespace(value=0.05)
    return RemoteExperienceMaker(None, None, None, None, controller, strategy, None)


def advantages(gamma: float = 0.99, lam: float = 0.9) -> dict[str, Tensor]:
    """What ``compute_advantages_and_returns`` gives the batch."""
    experience = Experience(index=list(range(6)), info={}, **batch())
    [done] = maker(gamma, lam).compute_advantages_and_returns([experience])
    return {"advantages": done.advantages, "returns": done.returns}

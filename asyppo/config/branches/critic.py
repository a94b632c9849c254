"""Settings below ``critic``, with those of side critics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from asyppo.config.setting import setting


@dataclass
class SideConfig:
    """``critic.kind: side``: small networks on hidden states that the policy makes anyway. Ours."""

    network: Literal["transformer", "mlp"] = "transformer"
    """``transformer``: one layer, in which a state sees those before it in its response. ``mlp``: the same layer
    without attention."""
    width: int = setting(64, at_least=32)
    """Of the network: a multiple of 32."""
    layers: list[int] = field(default_factory=lambda: [-1])
    """Layers of the policy whose output is read, counted from 1 or, from the last one back, from -1; of several, side
    by side. Of the last one it is what the head reads, behind the final norm."""
    keep_bytes: int = setting(4 * 2**30, at_least=0, may_change=True)
    """Bytes that a step may keep of the hidden states of its responses, on each process, until the critics are done.
    Those of a batch that would take more are made again where critics read them, by passes of the policy's layers.
    Memory and time only."""


@dataclass
class CriticConfig:
    """The mini-critics. They share the policy's tokenizer and dtype; run one after another, its attention
    implementation, too."""

    kind: Literal["mini", "side"] = "mini"
    """``mini``: language models, much smaller than the policy, that read its tokens (the paper's). ``side``: the small
    networks of ``critic.side``, which read its hidden states. No gradient goes from them to the policy. Ours."""
    side: SideConfig = field(default_factory=SideConfig)
    """Side critics."""
    model_name_or_path: str | list[str] | None = None
    """Directory or hub name of the checkpoint that every critic starts from (the paper's: one checkpoint, new value
    heads): a causal model of any family, made for the policy's tokenizer, which is checked on prompts; its embeddings
    may be padded to another size. Or a list of ``num_critics``, one for each, such as ``critic_0`` and ``critic_1`` of
    an earlier run's checkpoint. None takes the policy's, which is what ``algorithm: ppo`` always does, or those that a
    ``warm_start`` makes. Side critics start from side critics of an earlier run, or with None as new ones."""
    num_critics: int = setting(2, at_least=1)
    """M. The paper's sweet spot is 2. ``algorithm: ppo`` always has 1, ``grpo`` none."""
    share: Literal["disjoint", "all"] = "disjoint"
    """Responses that a critic learns from. ``disjoint``: each prompt's are divided evenly, and none is learned by two
    critics (the paper's). ``all``: every critic learns from all of them, in an order of its own, which takes M times
    the work (the paper's ablation of two critics on the same data)."""
    learning_rate: float = setting(1e-5, above=0, elsewhere=("critic_learning_rate",))
    """AdamW's learning rate of every critic. Our choice."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Critics' learning rate over ``max_steps``: as it is, or falling towards 0. Our choice."""
    optim: Literal["adamw", "adamw_8bit"] | None = None
    """Optimizer of the critics, as the policy's ``optim``; None: the same."""
    max_grad_norm: float = setting(1.0, above=0)
    """Clip each critic's gradient norm, each on its own. Our choice."""
    weight_decay: float = setting(0.0, at_least=0)
    """AdamW's decoupled weight decay. Our choice."""
    num_iterations: int = setting(1, at_least=1)
    """Passes over a critic's responses in one step. Our choice."""
    num_mini_batches: int = setting(1, at_least=1)
    """Optimizer steps a pass. Our choice."""
    value_lambda: float = setting(1.0, at_least=0, at_most=1)
    """λ of the return that critics learn: 1 is the Monte Carlo return, the paper's. Below 1 critic m bootstraps on
    its own V_m, from a value pass before its update."""
    loss: Literal["mse", "bce"] = "mse"
    """What a critic minimises: squared errors (the paper's), or the cross-entropy of a return in [0, 1], of which its
    value, the sigmoid of what its head gives, is the probability. Mean and σ are over values. Ours."""
    cliprange_value: float | None = setting(None, above=0)
    """PPO's value clipping: a value that has moved further than this from that of before the update gains nothing by
    moving on. None does not clip (our choice). It is defined for squared errors."""
    warmup_steps: int = setting(0, at_least=0)
    """First steps that train the critics only, with the policy frozen. Our choice."""
    policy_inputs: list[Literal["logprob", "entropy"]] = field(default_factory=list)
    """What critics read beside tokens or hidden states, by a projection at their input that starts at zero: at the
    position that predicts a token, the policy's ``logprob`` of the token before (0 where that is of the prompt) and its
    ``entropy`` there, both of the pass that gives the old log-probs. Ours; empty, mini-critics read tokens alone, the
    paper's."""
    policy_inputs_lr_ratio: float = setting(30.0, above=0)
    """The learning rate of that projection over that of the rest, since it starts at zero. On chain sums of ten terms
    critics explain nothing of an oracle's value after 1,024 responses each at 1, and 0.78 of it at 30. Ours."""
    stacked: bool = True
    """Compute the critics as one model with stacked weights, in the launches of one. False runs them one after
    another, which is also what happens, with a warning, to models that are not Llama, Mistral, Qwen2 or Qwen3."""
    lora_r: int = setting(0, at_least=0, renamed_from=("lora_rank",))
    """r > 0: the critics are LoRA adapters of rank r on every linear layer, and value heads, over one frozen backbone,
    so that M of them take the memory of one; of Llama, Mistral, Qwen2 and Qwen3. 0: each has all weights of its own,
    the paper's."""
    lora_alpha: float = setting(16.0, above=0)
    """The adapters' products are scaled by lora_alpha / lora_r. Our choice."""
    load_in_4bit: bool = False
    """Keep the linear layers of the backbone under the adapters in 4 bits, as ``policy.load_in_4bit``. Needs
    ``lora_r``."""
    gradient_checkpointing: bool = False
    """Keep one tensor a layer for the backward pass and compute the rest again: less memory, more time."""

"""The estimate: bytes on each GPU, by phase of a step and by component."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from asyppo.cli.plan.models import (
    Model,
    critic_config,
    describe,
    describe_side,
    policy_config,
    side_shape,
)
from asyppo.cli.plan.passes import Activations, activations, side_activations
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.batch import at_most
from asyppo.models.critics.side import SideShape
from asyppo.models.loading import room_for_prompts
from asyppo.models.offload import LOT_BYTES
from asyppo.models.optimizers import optimizer_bytes_per_parameter
from asyppo.models.policy import compute_dtype
from asyppo.models.quantized import BYTES_PER_PARAMETER
from asyppo.rollout.samplers.decode import columns_of_cache
from asyppo_kernels._policy_head import BLOCKS, GPU_WORKSPACE_BYTES, lines_per_block

GIB = 2**30

ASSUMPTIONS = (
    "every response is {completion} tokens long, every prompt {prompt}",
    "passes are torch's own, by transformers or of stacked critics, on fake tensors; Liger's and Triton's keep less",
    "weights are sharded over several GPUs, but for what is frozen of a model in 4 bits; the batch and activations are "
    "not: each has its own micro-batch",
    "layers with a state in place of a cache (Mamba's and their like) keep little of it: it is not counted",
    "the context of CUDA, other libraries' workspaces and fragmentation are not counted: leave 10 % free",
)

LOTS = 3
"""Lots of moments on the GPU while an optimizer steps whose moments lie in the host's memory."""


@dataclass
class Plan:
    """Bytes on each GPU, by phase of a step and by component, at the moment of the phase that needs most."""

    models: list[Model]
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)
    gpus: int = 1

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and its bytes."""
        totals = {name: sum(parts.values()) for name, parts in self.phases.items()}
        name = max(totals, key=lambda phase: totals[phase])
        return name, totals[name]

    def table(self) -> str:
        """Return the plan as text."""
        lines = [f"{m.name}: {m.parameters / 1e9:,.3f} billion parameters ({m.source})" for m in self.models]
        components = list(dict.fromkeys(c for parts in self.phases.values() for c, size in parts.items() if size))
        rows = [["GiB on each GPU", *self.phases]]
        for component in components:
            rows.append([component, *(_gib(parts.get(component)) for parts in self.phases.values())])
        rows.append(["total", *(_gib(sum(parts.values())) for parts in self.phases.values())])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines.append("")
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        name, total = self.peak
        lines += ["", f"peak: {total / GIB:.1f} GiB on each of {self.gpus} GPU{'s' * (self.gpus > 1)}, {name}"]
        return "\n".join([*lines, "assumed:", *(f"  - {text}" for text in self.assumptions)])


def _gib(size: int | None) -> str:
    return "" if not size else f"{size / GIB:.2f}" if size >= GIB / 100 else "<0.01"


def make_plan(config: AsyPPOConfig, *, gpus: int = 1, prompt_length: int = 1024, device: str = "cuda") -> Plan:
    """Estimate the memory of ``config`` on each of ``gpus`` GPUs. Raises ConfigError where a model is unknown, or
    ``distributed.replicate`` does not divide ``gpus``. ``device``: of the one that it is for, a type."""
    replicas = config.distributed.replicate
    if gpus % replicas:
        raise ConfigError(f"distributed.replicate: got {replicas}, needs a divisor of the number of GPUs, {gpus}")
    return _Estimate(config, gpus, prompt_length, torch.device(device)).plan()


class _Estimate:
    """What the phases of a step have in common."""

    def __init__(self, config: AsyPPOConfig, gpus: int, prompt_length: int, device: torch.device):
        self.config, self.gpus, self.device = config, gpus, device
        self.dtype = compute_dtype(config.policy.dtype, device)
        self.element = self.dtype.itemsize
        self.shards = gpus // config.distributed.replicate
        self.sharded = gpus > 1 or config.distributed.shard_single
        self.policy = describe(*policy_config(config), config=config)
        side = config.num_critics > 0 and config.critic.kind == "side"
        self.shape: SideShape | None = None
        self.critic: Model | None = None
        if config.num_critics and not side:
            self.critic = describe(*critic_config(config), config=config, is_critic=True)
        read = [m.config for m in (self.policy, self.critic) if m is not None]
        room = room_for_prompts(config, read)
        if side:
            self.shape = side_shape(self.policy, config)
            self.critic = describe_side(self.shape, config)
        self.prompt = min(config.data.max_prompt_length or prompt_length, room)
        self.width = self.prompt + config.max_completion_length
        self.everyones = config.prompts_per_step * config.num_generations
        self.responses = -(-self.everyones // gpus)
        self.engine = config.sampler == "vllm"

    def plan(self) -> Plan:
        """Return the plan."""
        models = [self.policy, *([self.critic] if self.critic else [])]
        plan = Plan(models, gpus=self.gpus)
        about = {"completion": self.config.max_completion_length, "prompt": self.prompt}
        plan.assumptions = [a.format(**about) for a in ASSUMPTIONS]
        plan.phases["generation"] = self._generation(plan)
        plan.phases["log-probs"] = self._logprobs()
        if self.critic is not None:
            plan.phases["critic update"] = self._critic_update(self.critic)
            plan.phases["values"] = self._values(self.critic)
        plan.phases["policy update"] = self._policy_update()
        return plan

    # --- what is there in every phase ---

    def _there(self, *computing: str) -> dict[str, int]:
        """What is there while the models of these names compute: all others' weights, too, unless they move."""
        config, there = self.config, {}
        moves = config.offload == "all"
        optim = {"policy": config.optim, "critics": config.critic.optim}
        for name, model, count in (("policy", self.policy, 1), ("critics", self.critic, config.num_critics)):
            if model is None:
                continue
            if not moves or name in computing:
                there[f"{name} weights"] = self._weights(model, count)
            if config.offload == "none":
                moments = optimizer_bytes_per_parameter(optim[name] or config.optim)
                there[f"{name} optimizer"] = round(count * moments * model.trainable) // self.shards
        if config.beta > 0 and not config.policy.use_peft and (not moves or "reference" in computing):
            whole = 4 * self.policy.parameters - (4 - self.element) * self.policy.products
            there["reference weights"] = whole // self.shards
        there["batch"] = self.everyones * (8 * self.width + _BATCH_BYTES * config.max_completion_length)
        return there

    def _weights(self, model: Model, count: int) -> int:
        """Trained weights in float32; frozen weights, which all critics share, as they are computed with, or in 4
        bits, and whole on every GPU then."""
        frozen = model.parameters - model.trainable
        in_4_bits = model.linear if model.in_4_bits else 0
        frozen_bytes = self.element * (frozen - in_4_bits) + BYTES_PER_PARAMETER * in_4_bits
        trained_bytes = 4 * count * model.trainable
        if model.in_4_bits:
            return round(trained_bytes // self.shards + frozen_bytes)
        return round(trained_bytes + frozen_bytes) // self.shards

    def _copy_to_sample_with(self) -> dict[str, int]:
        """Of shards, and of weights that are not what is sampled with."""
        if not self.sharded and (self.element == 4 or self.config.policy.use_peft):
            return {}
        sharded = self.policy.trainable if self.policy.in_4_bits else self.policy.parameters
        return {"policy copy to sample with": self.element * sharded}

    def _step(self, name: str, model: Model, count: int) -> dict[str, int]:
        """While the optimizer steps: what comes of the moments that lie in the host's memory."""
        if self.config.offload == "none":
            return {}
        optim = (self.config.optim if name == "policy" else self.config.critic.optim) or self.config.optim
        moments = round(count * optimizer_bytes_per_parameter(optim) * model.trainable) // self.shards
        return {f"{name} optimizer, in lots": min(LOTS * LOT_BYTES, moments)}

    # --- phases ---

    def _generation(self, plan: Plan) -> dict[str, int]:
        config, policy = self.config, self.policy
        there = self._there("policy")
        # `generate` has a batch of sequences side by side; continuous batching has as many as there is room for.
        sequences = max(1, min(config.generation_batch_size, self.responses))
        cache, columns = policy.kv_bytes_per_token(self.element), columns_of_cache(self.prompt, self.width)
        flash = "flash" in (config.policy.attn_implementation or "")
        if self.engine:
            share = f"up to vllm.gpu_memory_utilization = {config.vllm.gpu_memory_utilization:g} of the GPU"
            plan.assumptions.append(
                f"vLLM is not counted: its process takes {share}"
                if not config.vllm.url
                else "vLLM is on servers, and not counted"
            )
            return there
        if config.sampler not in ("generate", "auto") or (config.sampler == "auto" and flash):
            plan.assumptions.append(
                f"continuous batching has as many responses under way, up to {sequences}, as there is room for: one is "
                f"counted here, each more takes {self.width * cache / GIB:.2f} GiB while it is at its longest"
            )
            sequences, columns = 1, self.width
        return there | {
            **self._copy_to_sample_with(),
            "key-value cache": sequences * columns * cache,
            "next-token logits": 4 * 4 * sequences * policy.text.vocab_size,
            "prompts in one pass": _prefill(policy, sequences * self.prompt, self.element),
        }

    def _logprobs(self) -> dict[str, int]:
        found, in_use = self._policy_activations(), self._in_use(self.policy)
        head = {k: v for k, v in self._head().items() if "gradient" not in k}
        body = {"weights as computed with": in_use, "within a layer": found.passing}
        # What a pass without gradients makes inside the body is gone by then.
        at_head = {"weights as computed with": in_use if self.sharded else 0, **head}
        passes = ["policy"]
        if self.config.beta > 0 and not self.config.policy.use_peft:
            passes.append("reference")
        there = [self._there(name) | self._kept_states() for name in passes]
        return _most(*(parts | inside for parts in there for inside in (body, at_head)))

    def _critic_update(self, critic: Model) -> dict[str, int]:
        config = self.config
        found = self._critic_activations(critic)
        there = self._there("critics", *(["policy"] if self.shape is not None else [])) | self._kept_states()
        there["gradients"] = 4 * config.num_critics * critic.trainable // self.shards
        most = critic.largest_layer if config.critic.gradient_checkpointing else critic.parameters
        in_use = self._critics_in_use(critic, most=most)
        inside = {
            **self._states_made_again(),
            "weights as computed with": in_use,
            "activations": found.kept,
            "within a layer": found.back + (found.layer if config.critic.gradient_checkpointing else 0),
        }
        return _most(there | inside, there | self._step("critics", critic, config.num_critics))

    def _values(self, critic: Model) -> dict[str, int]:
        found = self._critic_activations(critic)
        there = self._there("critics", *(["policy"] if self.shape is not None else []))
        return there | {
            **self._kept_states(),
            **self._states_made_again(),
            "weights as computed with": self._critics_in_use(critic, most=critic.matrix),
            "within a layer": found.passing,
        }

    def _policy_update(self) -> dict[str, int]:
        config, policy = self.config, self.policy
        found, head = self._policy_activations(), self._head()
        checkpointed = config.policy.gradient_checkpointing
        there = self._there("policy")
        there["gradients"] = 4 * policy.trainable // self.shards
        in_use = self._in_use(policy)
        # Autocast's copies of weights live as long as its context: with checkpointing, as long as a pass of the body,
        # or as a layer that is computed again.
        behind = self._in_use(policy, policy.largest_layer) if checkpointed else in_use
        gradients = {name: size for name, size in head.items() if "gradient" in name}
        forward = {"weights as computed with": in_use, "activations": found.kept}
        at_head = {"weights as computed with": 0 if checkpointed and not self.sharded else in_use, **head}
        again = found.layer if checkpointed else 0
        inside = {"weights as computed with": behind, "within a layer": again + found.back}
        layer, outside = self._gathered(policy)
        backward = inside | gradients | self._summed(layer)
        kept = {"activations": found.kept}
        return _most(
            there | forward | {"within a layer": again},
            there | kept | at_head,
            there | kept | backward,
            there | self._summed(outside),
            there | self._step("policy", policy, 1),
        )

    # --- passes ---

    def _rows(self, models: int = 1) -> int:
        """Responses of a pass for each of so many models side by side."""
        tokens = at_most(self.config.max_tokens_per_micro_batch, models, self.device)
        return max(1, tokens // (models * self.width))

    def _policy_activations(self) -> Activations:
        checkpointing = self.config.policy.gradient_checkpointing
        rows = min(self._rows(), self.responses)
        return activations(self.policy, rows, self.width, self.dtype, checkpointing, sharded=self.sharded)

    def _critic_activations(self, critic: Model) -> Activations:
        config, count = self.config.critic, self._side_by_side()
        rows = count * self._rows(count)
        if self.shape is not None:
            return side_activations(self.shape, count, rows, self.config.max_completion_length, self.dtype)
        stacked, checkpointing = count if config.stacked or config.lora_r else 0, config.gradient_checkpointing
        how = rows, self.width, self.dtype, checkpointing
        return activations(critic, *how, sharded=self.sharded, stacked=stacked)

    def _side_by_side(self) -> int:
        """Critics of a pass."""
        critic = self.config.critic
        return self.config.num_critics if critic.stacked or critic.lora_r or self.shape is not None else 1

    def _gathered(self, model: Model, count: int = 1) -> tuple[int, int]:
        """Parameters that FSDP2 gathers of a layer, and of what is no layer; of 4 bits the adapters of ``count``
        models."""
        if model.in_4_bits:
            return count * model.trainable // model.text.num_hidden_layers, 0
        return model.largest_layer, model.outside

    def _in_use(self, model: Model, most: int | None = None, count: int = 1) -> int:
        """Copies of weights in the precision of the pass: all that are trained under autocast, or ``most`` parameters
        of them; of 4 bits one matrix; of shards two layers and what is no layer, gathered by FSDP2."""
        widened = model.matrix if model.in_4_bits else 0
        if self.sharded:
            layer, outside = self._gathered(model, count)
            return self.element * (widened + 2 * layer + outside)
        rounds = self.element < 4 and model.trainable == model.parameters
        casts = model.linear if rounds else 0
        return self.element * (widened + (casts if most is None else min(casts, most)))

    def _critics_in_use(self, critic: Model, *, most: int) -> int:
        """As ``_in_use``, of all critics; ``most`` where they are stacked. A frozen backbone is there once, and in the
        precision of the pass already."""
        if self.config.critic.lora_r:
            return self._in_use(critic, count=self.config.num_critics)
        return self.config.num_critics * self._in_use(critic, most if self.config.critic.stacked else None)

    def _summed(self, parameters: int) -> dict[str, int]:
        """Gradients of so many gathered parameters, before they are summed over ranks in float32."""
        return {"gradients being summed": (self.element + 4) * parameters} if self.sharded else {}

    def _head(self) -> dict[str, int]:
        """Of ``linear_ppo_loss``: logits of some rows at a time, the gradients formed in the forward."""
        tokens = min(self._rows(), self.responses) * self.config.max_completion_length
        hidden, vocabulary = self.policy.text.hidden_size, self.policy.text.vocab_size
        weight = 0 if self.config.policy.use_peft else 4 * hidden * vocabulary
        copies = 0
        if self.element < 4:
            copies += 0 if self.sharded or self.config.policy.use_peft else self.element
            copies += 4 if self.device.type == "cpu" else 0  # whose products are float32's
        return {
            "head as computed with": copies * hidden * vocabulary,
            "head workspace": self._head_workspace(tokens, vocabulary),
            "head gradients": weight + 4 * hidden * tokens,
        }

    def _head_workspace(self, tokens: int, vocabulary: int) -> int:
        """On a CPU one block of logits, and their exponentials."""
        if self.device.type == "cpu":
            return 2 * 4 * vocabulary * min(tokens, lines_per_block(vocabulary, self.device))
        return min(GPU_WORKSPACE_BYTES, 4 * BLOCKS * tokens * vocabulary)

    def _kept_states(self) -> dict[str, int]:
        """Hidden states of all response tokens that side critics read, where they are kept."""
        tokens = self.everyones * self.config.max_completion_length
        size = 0 if self.shape is None else tokens * self.shape.states_size * self.element
        return {"hidden states that critics read": size} if 0 < size <= self.config.critic.side.keep_bytes else {}

    def _states_made_again(self) -> dict[str, int]:
        """What the policy takes where its hidden states are not kept."""
        if self.shape is None or self._kept_states():
            return {}
        count = self.config.num_critics
        found, tokens = self._policy_activations(), count * self._rows(count)
        size = tokens * self.config.max_completion_length * self.shape.states_size * self.element
        return {
            "policy's weights as computed with": self._in_use(self.policy),
            "within a layer of the policy": found.passing,
            "hidden states that critics read": size,
        }


# Per response token: eight float32 (rewards, log-probs and their like), four of the advantages, masks.
_BATCH_BYTES = 4 * 16


def _most(*moments: dict[str, int]) -> dict[str, int]:
    """The moment that needs most."""
    return max(moments, key=lambda parts: sum(parts.values()))


def _prefill(policy: Model, tokens: int, element: int) -> int:
    """The widest place of the pass over all prompts at once: gate, up and their product, and the stream beside them."""
    text = policy.text
    return tokens * (3 * getattr(text, "intermediate_size", 4 * text.hidden_size) * element + 4 * text.hidden_size)

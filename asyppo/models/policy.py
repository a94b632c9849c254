"""The policy: a Hugging Face causal language model whose head goes through the fused ops."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from asyppo.algorithm.ops import FUSED, Ops
from asyppo.algorithm.options import PolicyLossOptions
from asyppo.algorithm.policy_losses import PolicyLoss, PolicyLossResult, PolicyTargets, policy_loss, result_of_fused
from asyppo.config import ConfigError
from asyppo.data.batch import Batch, MicroBatch
from asyppo.data.hidden import HiddenStates
from asyppo.data.padding import PaddingCount
from asyppo.distributed.processes import sum_over_ranks
from asyppo.distributed.sharding import decoder_layers, release, shard, whole_weights
from asyppo.models.adapters import add_lora, base_of_adapter, has_adapters, merged, plain_names
from asyppo.models.checkpointing import checkpoint_layers
from asyppo.models.head import HeadRule, any_dtype_attention, head_rule
from asyppo.models.hub import load_pretrained, use_liger_kernels
from asyppo.models.layers import of_size_one, outputs_of
from asyppo.models.packing import known_sequences, packed_inputs, why_not_packed
from asyppo.models.quantized import compute_in, is_in_4_bits, kept_whole
from asyppo.models.shards import files_of, read_shards, weights_come_later, weights_stood_in_for
from asyppo.models.sharing import SHARED, why_not_shared
from asyppo_kernels import LinearLogprob

log = logging.getLogger("asyppo")


def compute_dtype(dtype: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """Return the precision of forward and backward passes; ``auto`` is bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)


class TokenStats(NamedTuple):
    """What a policy says of every response token of a batch, in nats."""

    logprob: Tensor
    """float32 [B, T]."""
    entropy: Tensor
    """float32 [B, T]."""


@dataclass(frozen=True)
class Objective:
    """What a pass over a micro-batch maximises."""

    targets: PolicyTargets
    """Of its N response tokens, [N]."""
    options: PolicyLossOptions
    surrogate: PolicyLoss | None = None
    """None: PPO's, in the fused op."""


class Reference(Protocol):
    """A policy that stays as it is."""

    def logprobs(self, batch: Batch, micros: Iterable[MicroBatch]) -> TokenStats:
        """As ``Policy.logprobs``."""
        ...


class Policy(nn.Module):
    """``policy(micro_batch)`` gives log-prob and entropy of its response tokens; with an ``Objective``, its loss.

    Weights that are trained are float32, frozen ones in ``dtype``. The body runs in ``dtype`` under autocast, and so
    does the product of the head, in the op: its gradients come back in float32 without having been rounded.
    """

    ops: Ops = FUSED

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        # In eval mode throughout: with dropout the first update's ratio would not be 1.
        self.model, self.temperature, self.dtype = model.eval(), temperature, dtype
        self.packs = self.shares = False
        self._padding = PaddingCount()
        for parameter in model.parameters():
            if parameter.is_floating_point():  # new adapters come in the precision of what is under them
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        compute_in(model, dtype)
        if is_in_4_bits(model) and not has_adapters(model):
            raise ConfigError(
                "policy: got a model in 4 bits, needs adapters on it (policy.use_peft), which are trained"
            )
        later = weights_come_later(model)  # of a family that needs no measuring
        with nullcontext() if later else self.autocast(), any_dtype_attention(model):
            self.logit_scale, self.softcap = HeadRule(1.0, None) if later else head_rule(model)
            if gradient_checkpointing:
                checkpoint_layers(model.get_decoder(), "policy.gradient_checkpointing", check=not later)
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            # Some checkpoints have a temperature but no do_sample; transformers loads that, and refuses to save it.
            model.generation_config.do_sample = True

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        temperature: float,
        dtype: torch.dtype,
        device: torch.device,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        lora: dict[str, Any] | None = None,
        load_in_4bit: bool = False,
    ) -> Policy:
        """Load a causal language model, or adapters and the model under them, by directory or hub name. ``lora``,
        keyword arguments of ``add_lora``, puts new adapters on a model that has none; ``load_in_4bit``: see
        ``asyppo/models/quantized.py``. Raises ConfigError."""
        if load_in_4bit and lora is None and base_of_adapter(path) is None:
            raise ConfigError("policy.load_in_4bit: got True, needs policy.use_peft: adapters, which are trained")
        model, _ = load_pretrained(
            AutoModelForCausalLM,
            path,
            device,
            setting="policy.model_name_or_path",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            in_4_bits=dtype if load_in_4bit else None,
        )
        if has_adapters(model):
            model.set_adapter(model.active_adapters())  # loaded frozen; this makes them trainable
        elif lora is not None:
            with weights_stood_in_for(model):
                add_lora(model, **lora)
        return cls(model, temperature=temperature, dtype=dtype, gradient_checkpointing=gradient_checkpointing)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the weights over ``mesh`` and put them on its device, layer by layer; see ``kept_whole``."""
        if mesh.device_type == "cuda" and self.device.type != "cuda":
            use_liger_kernels(self.model)
        shard(self, decoder_layers(self.model), mesh, self.dtype, whole=kept_whole(self))
        self.read_weights(mesh.device_type)
        register_fsdp_forward_method(self, "hidden_states")

    def read_weights(self, device_type: str) -> None:
        """Read the weights, or this rank's shards of them, that are still to be read. Raises ConfigError."""
        files = files_of(self.model)
        if files is not None:
            names = plain_names(self.model)
            read_shards(self, lambda name: [(files, names[name.removeprefix("model.")])], device_type)

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes in ``dtype``."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32)

    def forward(
        self, micro: MicroBatch, objective: Objective | None = None, keep: HiddenStates | None = None
    ) -> LinearLogprob | PolicyLossResult:
        """Return what is known of the N response tokens of ``micro``: log-prob and entropy, or, given an ``objective``,
        its loss and statistics. Both in one method, so that a sharded root module gathers the head's weight around
        either. Hidden states, as ``hidden_states`` gives them, are added to ``keep``."""
        hidden, read = self._body(micro, () if keep is None else keep.layers)
        if keep is not None:
            keep.add(micro, read)
        output = self.model.get_output_embeddings()
        weight = output.weight
        head: dict[str, Any] = {
            "bias": output.bias,
            "temperature": self.temperature / self.logit_scale,
            "softcap": self.softcap,
            "compute_dtype": self.dtype,
        }
        if objective is None:
            return self.ops.linear_logprob(hidden, weight, micro.targets, **head)
        targets, options = objective.targets, objective.options
        if objective.surrogate is not None:
            read = micro.targets.where(targets.token_weight != 0, -100)
            found = self.ops.linear_logprob(hidden, weight, read, **head)
            assert found.entropy is not None
            return policy_loss(objective.surrogate, found.logprob, found.entropy, targets, micro.response, options)
        fused = self.ops.linear_ppo_loss(
            hidden,
            weight,
            micro.targets,
            targets.old_logprob,
            targets.advantage,
            targets.token_weight,
            advantage_keep=targets.advantage_keep,
            entropy_keep=targets.entropy_keep,
            ref_logprob=targets.ref_logprob,
            rollout_weight=targets.rollout_weight,
            clip_low=options.epsilon,
            clip_high=options.epsilon_high,
            dual_clip=options.delta,
            entropy_coef=options.entropy_coef,
            kl_coef=options.kl_coef,
            kl_bias_correction=options.use_bias_correction_kl,
            **head,
        )
        return result_of_fused(fused, targets, options)

    def _body(self, micro: MicroBatch, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the hidden states that predict the response tokens of ``micro``: [N, H], as the head takes them, and
        [N, D], as ``hidden_states`` gives them."""
        self._padding.add(micro.tokens, micro.input_ids.numel())
        packing = micro.packing
        inputs = {} if packing is None else packed_inputs(self.model, packing, micro.longest)
        if micro.sharing is not None:
            inputs = {"position_ids": micro.sharing.position_ids, SHARED: micro.sharing}
        sequences = known_sequences(None if packing is None else packing.sequence)
        with self.autocast(), sequences, outputs_of(self.model, layers) as found:
            # Padding is on the right, where causal attention does not look: no mask is made of it.
            last = self.model.get_decoder()(input_ids=micro.input_ids, use_cache=False, **inputs).last_hidden_state
        hidden = micro.select(last)
        inner = {number: micro.select(output) for number, output in found.items()}
        read = [of_size_one(inner.get(number, hidden).detach(), self.dtype) for number in layers]
        return hidden, torch.cat(read, dim=1) if len(read) > 1 else next(iter(read), hidden[:, :0])

    @torch.no_grad()
    def hidden_states(self, micro: MicroBatch, layers: Sequence[int]) -> Tensor:
        """Return the hidden states that come out of ``layers``, counted from 1, at the positions that predict the N
        response tokens of ``micro``: [N, D] in ``dtype``, side by side, each divided by its root mean square."""
        return self._body(micro, layers)[1]

    def states_of(self, batch: Batch, layers: Sequence[int], size: int, max_bytes: int) -> HiddenStates:
        """Return the hidden states of ``batch``, still to be kept by ``logprobs`` where that takes at most
        ``max_bytes``; ``size`` is D."""

        def make(micro: MicroBatch) -> Tensor:
            states = self.hidden_states(micro, layers)
            release(self)
            return states

        return HiddenStates(batch, layers, size, self.dtype, make, max_bytes)

    @property
    def rounds(self) -> bool:
        """Whether it computes in less than float32 and can in float32, too: all weights are in it, and whole."""
        whole = all(p.dtype == torch.float32 and not isinstance(p, DTensor) for p in self.model.parameters())
        return whole and self.dtype != torch.float32

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 for the time inside."""
        own, self.dtype = self.dtype, torch.float32
        try:
            with any_dtype_attention(self.model):
                yield
        finally:
            self.dtype = own

    @torch.no_grad()
    def logprobs(self, batch: Batch, micros: Iterable[MicroBatch], hidden: HiddenStates | None = None) -> TokenStats:
        """Return log-prob and entropy of the response tokens; 0 on padding. Where ``hidden`` states are to be kept they
        are."""
        logprob, entropy = torch.zeros_like(batch.reward), torch.zeros_like(batch.reward)
        keep = hidden if hidden is not None and hidden.are_kept else None
        for micro in micros:
            result = self(micro, keep=keep)
            logprob[micro.grid], entropy[micro.grid] = result.logprob, result.entropy
        if keep is not None:
            keep.finish()
        release(self)
        logprob, entropy = sum_over_ranks(torch.stack([logprob, entropy])).unbind()
        return TokenStats(logprob, entropy)

    def choose_packing(self, wanted: bool | Literal["auto"]) -> None:
        """Pack micro-batches, or let them share prompts, where that is ``wanted`` and changes nothing: see
        ``why_not_packed`` and ``why_not_shared``."""
        self.packs = self.shares = False
        if wanted is True or (wanted == "auto" and is_flash_attention_requested(self.model.config)):
            reason = why_not_packed(self.model, self, self.dtype)
            self.packs = reason is None
            if reason is not None:
                log.warning("policy.packing: %s: micro-batches of the policy are padded", reason)
        elif wanted == "auto" and self.device.type == "cpu":
            self.shares = why_not_shared(self.model, self, self.dtype) is None
        release(self)
        self._padding.take()

    def padding_frac(self) -> float:
        """Return the fraction of padding in the tokens of all passes since the last call; 0 if there were none."""
        return self._padding.take()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's weights by the names of its ``state_dict``, whole: see ``whole_weights``. Of a model with
        adapters they are those of the model that these, merged into it, make."""
        adapted = merged if has_adapters(self.model) else lambda model, weights: weights
        yield from adapted(self.model, ((name.removeprefix("model."), weight) for name, weight in whole_weights(self)))

    def reference(self) -> Reference:
        """Return the policy as it is now, to stay as it is: a copy, or, of one with adapters, the model under them.

        Matrices of linear layers are kept in ``dtype``, in which they are used: the copy computes what the policy does.
        """
        if has_adapters(self.model):
            return WithoutAdapters(self)
        taken: dict[int, Any] = {}
        for weight in weights_of_products(self.model):
            taken[id(weight)] = nn.Parameter(weight.detach().to(self.dtype, copy=True), requires_grad=False)
        return copy.deepcopy(self, taken).requires_grad_(False)


def weights_of_products(model: PreTrainedModel) -> list[Tensor]:
    """Return the matrices of linear layers, but one tied to the embedding: autocast rounds them in each pass."""
    linear = {module.weight: None for module in model.modules() if isinstance(module, nn.Linear)}
    return [weight for weight in linear if weight is not model.get_input_embeddings().weight]


class WithoutAdapters:
    """The model under a policy's adapters; it takes no memory of its own."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def logprobs(self, batch: Batch, micros: Iterable[MicroBatch]) -> TokenStats:
        """As ``Policy.logprobs``."""
        model = self.policy.model
        model.disable_adapters()
        try:
            return self.policy.logprobs(batch, micros)
        finally:
            model.enable_adapters()

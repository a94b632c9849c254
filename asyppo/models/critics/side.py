"""Side critics: small networks that read the policy's hidden states in place of tokens. Ours, not the paper's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from asyppo.config import ConfigError, CriticConfig
from asyppo.data.batch import Batch, MicroBatch
from asyppo.models.critics.inputs import PolicyInputs
from asyppo.models.critics.layers import StackedLinear
from asyppo.models.critics.layout import Layout
from asyppo.models.critics.loading import draw_head, fitting_loss
from asyppo.models.critics.stacked import OWN, Stacked
from asyppo.models.hub import Later, SaveDtype

SHAPE, WEIGHTS = "side_critic.json", "side_critic.safetensors"
HEADS = 4


@dataclass(frozen=True)
class SideShape:
    """What a side critic reads, and how large it is."""

    network: Literal["transformer", "mlp"]
    width: int
    layers: tuple[int, ...]
    """Of the policy, counted from 1."""
    states_size: int
    """D: numbers of a hidden state, of all these layers together."""
    policy_inputs: tuple[str, ...]
    loss: str

    @classmethod
    def of(cls, config: CriticConfig, layers: Sequence[int], states_size: int) -> SideShape:
        """Return what ``config`` asks for, of critics that read ``layers`` of a policy, counted from 1."""
        side = config.side
        return cls(side.network, side.width, tuple(layers), states_size, tuple(config.policy_inputs), config.loss)

    @classmethod
    def read(cls, path: Path) -> SideShape:
        """Return that of the saved critic in the directory ``path``. Raises ConfigError if there is none."""
        try:
            saved = json.loads((path / SHAPE).read_text())
            lists = {name: tuple(saved[name]) for name in ("layers", "policy_inputs")}
            return cls(**saved | lists)
        except OSError as error:
            raise ConfigError(
                f"critic.model_name_or_path: {str(path)!r} has no {SHAPE}, needs a side critic of an earlier run, or "
                "none for new ones"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"critic.model_name_or_path: {SHAPE} of {str(path)!r} is not that of a side critic: "
                f"{type(error).__name__}: {error}"
            ) from error

    def fits(self, other: SideShape, path: Path) -> None:
        """Raise ConfigError unless the saved critic of ``path``, ``other``, is of this shape."""
        fitting_loss(other.loss, self.loss, path)
        names = {
            "network": "critic.side.network",
            "width": "critic.side.width",
            "layers": "critic.side.layers",
            "states_size": "policy.model_name_or_path: the size of its hidden states",
            "policy_inputs": "critic.policy_inputs",
        }
        for name, called in names.items():
            got, need = getattr(self, name), getattr(other, name)
            if got != need:
                got, need = (list(x) if isinstance(x, tuple) else x for x in (got, need))
                raise ConfigError(f"{called}: got {got!r}, needs {need!r}, as the critic {str(path)!r} has it")


class FeedForward(nn.Module):
    """A decoder layer without attention."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.mlp = Qwen3MLP(config)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [..., H] of [..., H]."""
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class SideCritic(nn.Module):
    """One side critic in plain torch: hidden states and policy inputs, projected to the width; one layer of Qwen3, or
    that without its attention; a norm, and a head of one number. Its weights follow from torch's global generator."""

    def __init__(self, shape: SideShape):
        super().__init__()
        self.shape = shape
        self.config = Qwen3Config(
            hidden_size=shape.width,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=shape.width // HEADS,
            intermediate_size=2 * shape.width,
            attn_implementation="sdpa",
        )
        self.config._name_or_path = f"side {shape.network} of width {shape.width}"
        self.input_proj = nn.Linear(shape.states_size, shape.width)
        if shape.policy_inputs:
            self.policy_inputs = PolicyInputs(shape.policy_inputs, shape.width)
        layer = Qwen3DecoderLayer(self.config, 0) if shape.network == "transformer" else FeedForward(self.config)
        self.layers = nn.ModuleList([layer])
        self.norm = Qwen3RMSNorm(shape.width, eps=self.config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(self.config)
        self.score = nn.Linear(shape.width, 1)
        draw_head(self.score)

    def forward(self, states: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what the head gives [B, T] of hidden ``states`` [B, T, D] and policy ``inputs`` [B, T, F], where
        padding is on the right."""
        hidden = self.input_proj(states)
        if inputs is not None:
            hidden = hidden + self.policy_inputs(inputs)
        [layer] = self.layers
        if isinstance(layer, FeedForward):
            hidden = layer(hidden)
        else:
            positions = torch.arange(states.shape[1], device=states.device)[None]
            hidden = layer(hidden, position_embeddings=self.rotary_emb(hidden, positions))
        return self.score(self.norm(hidden))[..., 0]


class SideCritics(Stacked):
    """M ``SideCritic``, computed together.

    They see a batch on its response grid: a state is that of the position that predicts a token, positions are
    counted from the response's first token, and ``input_ids`` of a pass are rows of ``states``.
    """

    def __init__(
        self, models: Sequence[SideCritic], *, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False
    ):
        """``models``, of one shape, are taken over: their weights become views of the stack. Passes run in
        ``dtype``."""
        super().__init__()
        self.shape = models[0].shape
        self.read_layers, self.states_size = self.shape.layers, self.shape.states_size
        self.loss, self.models = self.shape.loss, list(models)
        self.build(
            models,
            [model.score for model in models],
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            inputs=[model.policy_inputs for model in models] if self.shape.policy_inputs else (),
        )

    def build_input(self, bodies: Sequence[Any]) -> None:
        """See Stacked."""
        self.input_proj = StackedLinear([body.input_proj for body in bodies])

    def leaf(self, m: int, name: str) -> tuple[nn.Module, str]:
        """See Stacked."""
        path, _, leaf = name.rpartition(".")
        return self.models[m].get_submodule(OWN.get(path, path)), leaf

    def seen(self, batch: Batch, micros: Sequence[MicroBatch]) -> tuple[Tensor | None, Sequence[MicroBatch]]:
        """See Stacked."""
        if batch.hidden is None:
            raise ValueError("batch.hidden: got None, needs the policy's hidden states, which critics read")
        return batch.hidden.of(micros)

    def _read(self, layout: Layout, beside: Tensor | None, states: Tensor | None) -> Tensor:
        if states is None:
            raise ValueError("states: got None, needs the policy's hidden states, which critics read")
        hidden = self.input_proj(states[layout.tokens].to(self.dtype).expand(len(self), -1, -1))
        if beside is None:
            return hidden
        return hidden + torch.matmul(beside, self.project.weight.float()).to(self.dtype)

    def save_pretrained(self, directory: str | Path, dtype: SaveDtype = "auto", later: Later | None = None) -> None:
        """Write ``critic_0``, ``critic_1``, …: shape and weights, in float32 but for ``dtype`` bfloat16."""
        for m, model in enumerate(self.models):
            path = Path(directory) / f"critic_{m}"
            path.mkdir(parents=True, exist_ok=True)
            (path / SHAPE).write_text(json.dumps(asdict(self.shape), indent=2) + "\n")
            kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
            weights = {name: p.detach().to(kind).contiguous() for name, p in model.named_parameters()}
            save_file(weights, path / WEIGHTS, metadata={"format": "pt"})


def load_side_critics(
    path_or_paths: str | Sequence[str] | None,
    num_critics: int,
    shape: SideShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gradient_checkpointing: bool = False,
) -> SideCritics:
    """Return M side critics of ``shape``: new ones, drawn from torch's global generator, or those of a directory, or
    each of its own. Raises ConfigError."""
    paths = [path_or_paths] * num_critics if path_or_paths is None or isinstance(path_or_paths, str) else path_or_paths
    models = []
    for path in paths:
        model = SideCritic(shape)
        if path is not None:
            shape.fits(SideShape.read(Path(path)), Path(path))
            try:
                weights = load_file(Path(path) / WEIGHTS)
                model.load_state_dict({name: weight.float() for name, weight in weights.items()})
            except (OSError, SafetensorError, RuntimeError) as error:
                raise ConfigError(
                    f"critic.model_name_or_path: cannot load {path!r}: {' '.join(str(error).split())}"
                ) from error
        models.append(model.to(device))
    return SideCritics(models, dtype=dtype, gradient_checkpointing=gradient_checkpointing)

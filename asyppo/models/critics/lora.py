"""M critics as LoRA adapters and value heads over one frozen backbone: M critics in the memory of one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from asyppo.config import ConfigError
from asyppo.models.critics.inputs import NAME, PolicyInputs, check_same, fitting, load_policy_inputs, save_policy_inputs
from asyppo.models.critics.loading import (
    check_vocabulary,
    draw_head,
    fitting_loss,
    load_loss,
    load_value_model,
    one_loss,
    save_loss,
)
from asyppo.models.critics.stacked import Stacked
from asyppo.models.families import PROJECTIONS, why_unknown
from asyppo.models.hub import Later, SaveDtype
from asyppo.models.quantized import compute_in, is_in_4_bits, product_in_4_bits
from asyppo.models.shards import files_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before the names of the value model


class LoraLinear(nn.Module):
    """One frozen linear layer for all critics, and to each a low-rank product of its own (arXiv 2106.09685)."""

    def __init__(self, module: nn.Linear, num_critics: int, r: int, alpha: float):
        """The weight of ``module`` may be kept in 4 bits."""
        super().__init__()
        self.weight, self.bias, self.scale = module.weight, module.bias, alpha / r
        self.in_4_bits, out, inner = is_in_4_bits(module), module.out_features, module.in_features
        device = "cpu" if module.weight.is_meta else module.weight.device
        self.lora_A = nn.Parameter(torch.empty(num_critics, r, inner, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_critics, out, r, device=device))
        for critic in self.lora_A:
            nn.init.kaiming_uniform_(critic, a=math.sqrt(5))  # as peft's

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, N, out] of x [M, N, in]: one product for what all share, and two batched ones of rank r."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.in_4_bits:
            shared = product_in_4_bits(x, self.weight, bias)
        else:
            shared = F.linear(x, self.weight.to(x.dtype), bias)
        low = torch.bmm(x, self.lora_A.to(x.dtype).mT)
        return torch.baddbmm(shared, low, self.lora_B.to(x.dtype).mT, alpha=self.scale)


class LoraCritics(Stacked):
    """M adapters of rank r on every linear layer of one frozen backbone, and M value heads.

    ``critics(input_ids, attention_mask)`` gives all values. Adapters and heads are float32, with a leading axis M; the
    backbone is kept in ``dtype``. ``models`` are M modules whose parameters are the views of one critic.
    """

    def __init__(
        self,
        model: Any,
        heads: Sequence[nn.Linear],
        *,
        r: int,
        alpha: float,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        inputs: Sequence[PolicyInputs] = (),
        loss: str = "mse",
    ):
        """``model``, a token classifier, is taken over, its own head left out; ``heads`` are M linear layers to one
        number, ``inputs`` M projections of what critics read beside the tokens, or none; they minimise ``loss``. Raises
        ConfigError if it is of no family that is known here."""
        super().__init__()
        reason = why_unknown(model)
        if reason is not None:
            raise ConfigError(f"critic.lora_r: got {r}, needs 0 for {type(model).__name__}: {reason}")
        self.r, self.alpha, self.base, self.loss = r, alpha, model.config._name_or_path, loss
        self.files = [files_of(model)]
        model.eval().requires_grad_(False)
        self.build(
            [model.base_model],
            heads,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            inputs=inputs,
            linear=lambda modules: LoraLinear(modules[0], len(heads), r, alpha),
        )
        for name, p in self.named_parameters():
            p.requires_grad_("lora_" in name or name.startswith(("score.", "project.")))
            if not p.requires_grad and p.is_floating_point():
                p.data = p.data.to(dtype)  # no optimizer steps it, so it needs no float32
        compute_in(self, dtype)
        self.models = [nn.Module() for _ in heads]
        self.tie_models()

    @classmethod
    def from_pretrained(
        cls,
        path_or_paths: str | Path | Sequence[str | Path],
        num_critics: int,
        *,
        r: int,
        alpha: float,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        policy_inputs: Sequence[str] | None = None,
        loss: str | None = None,
        load_in_4bit: bool = False,
    ) -> LoraCritics:
        """Load one checkpoint for all, with new adapters; or M directories of ``save_pretrained``, or one for all, with
        theirs.

        Where the checkpoint has no value head, each critic gets one of its own, drawn from torch's global generator.
        ``policy_inputs``: what they read beside the tokens, ``loss``: what they minimise; None: as the saved ones do.
        ``load_in_4bit``: keep the linear layers of the backbone so. Raises ConfigError if something cannot be loaded,
        or does not fit together."""
        if isinstance(path_or_paths, str | Path) and (Path(path_or_paths) / CONFIG).exists():
            path_or_paths = [path_or_paths] * num_critics
        saved: list[Path] = []
        base = path_or_paths
        if not isinstance(path_or_paths, str | Path):
            saved = [Path(path) for path in path_or_paths]
            base = _common_base(saved, num_critics, r, alpha)
        model, head_is_new = load_value_model(
            str(base), torch.device(device), in_4_bits=dtype if load_in_4bit else None
        )
        here = model.score.weight.device
        check_vocabulary(model.config, str(base), vocab_size)
        heads = [cast(nn.Linear, model.score)]
        for _ in range(num_critics - 1):
            head = nn.Linear(model.score.in_features, 1, bias=model.score.bias is not None, device=here)
            head.load_state_dict(model.score.state_dict())
            heads.append(head)
        if head_is_new:
            for head in heads[1:]:
                draw_head(head)
        inputs = _inputs_of(model, saved, num_critics, policy_inputs)
        critics = cls(
            model,
            heads,
            r=r,
            alpha=alpha,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            inputs=inputs,
            loss=one_loss([fitting_loss(load_loss(path), loss, path) for path in saved or [Path(str(base))]]),
        )
        for m, path in enumerate(saved):
            weights = load_file(path / WEIGHTS, device=str(here))
            with torch.no_grad():
                for name, parameter in critics.peft_parameters():
                    parameter[m].copy_(weights[_peft_name(name)])
        return critics

    def peft_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained and lies in peft's files."""
        return ((name, p) for name, p in self.trained_parameters() if not name.startswith("project."))

    def leaf(self, m: int, name: str) -> tuple[nn.Module, str]:
        """See Stacked."""
        return self.models[m], name.replace(".", "/")  # a module's parameter has no dot in its name

    def save_pretrained(self, directory: str | Path, dtype: SaveDtype = "auto", later: Later | None = None) -> None:
        """Write ``critic_0``, ``critic_1``, …, each an adapter for peft's ``PeftModelForTokenClassification`` over the
        base checkpoint, loaded as a token classifier with one label."""
        config = {
            "peft_type": "LORA",
            "task_type": "TOKEN_CLS",
            "base_model_name_or_path": self.base,
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(PROJECTIONS),
            "modules_to_save": ["score"],
            "inference_mode": True,
        }
        for m in range(len(self)):
            path = Path(directory) / f"critic_{m}"
            path.mkdir(parents=True, exist_ok=True)
            (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            weights = {_peft_name(name): p.detach()[m].contiguous() for name, p in self.peft_parameters()}
            save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
            save_loss(self.loss, path)
            if self.policy_inputs:
                save_policy_inputs(self.policy_inputs, self.project.weight.detach()[m], path)


def _peft_name(name: str) -> str:
    """The name of a stacked parameter in peft's files."""
    if name.startswith("score."):
        return PREFIX + name
    return f"{PREFIX}model.{name}.weight"


def _inputs_of(model: Any, saved: Sequence[Path], num_critics: int, names: Sequence[str] | None) -> list[PolicyInputs]:
    """What each critic reads beside the tokens ``names``: the saved ones', or copies of the base's, or new ones. Raises
    ConfigError if they do not fit together."""
    if saved:
        given = [(load_policy_inputs(path, model.score.weight.device), path) for path in saved]
    else:
        base = getattr(model, NAME, None)
        given = [(copy.deepcopy(base), Path(model.config._name_or_path)) for _ in range(num_critics)]
    found = [fitting(own, names, model, path) for own, path in given]
    check_same([() if own is None else own.names for own in found])
    return [own for own in found if own is not None]


def _common_base(paths: Sequence[Path], num_critics: int, r: int, alpha: float) -> str:
    """The base checkpoint of M saved critics. Raises ConfigError if they do not fit together."""
    if len(paths) != num_critics:
        raise ConfigError(
            f"critic.model_name_or_path: got {len(paths)} adapters, needs critic.num_critics = {num_critics}"
        )
    configs = []
    for path in paths:
        try:
            configs.append(json.loads((path / CONFIG).read_text()))
        except OSError as error:
            raise ConfigError(f"critic.model_name_or_path: {path} has no {CONFIG}, needs that of an adapter") from error
    bases = {config["base_model_name_or_path"] for config in configs}
    shapes = {(config["r"], config["lora_alpha"]) for config in configs}
    if len(bases) > 1 or shapes != {(r, alpha)}:
        raise ConfigError(
            f"critic.model_name_or_path: got adapters of {sorted(bases)} with (r, alpha) {sorted(shapes)}, needs "
            f"one base and critic.lora_r, critic.lora_alpha = {r}, {alpha}"
        )
    return bases.pop()

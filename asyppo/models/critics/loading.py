"""Value models from checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from asyppo.config import ConfigError
from asyppo.models.critics.inputs import NAME, load_policy_inputs, save_policy_inputs
from asyppo.models.hub import Later, SaveDtype, load_pretrained, save_model
from asyppo.models.shards import files_of, read_weights, weights_come_later

VALUE_HEAD = "value_head.safetensors"
CRITIC = "critic.json"
_LOSS = "_asyppo_loss"


class BackboneWithValueHead(nn.Module):
    """A value model of a family that has no token classifier: its backbone, and a linear head called ``score``."""

    def __init__(self, backbone: PreTrainedModel, hidden_size: int):
        """``hidden_size`` is that of the hidden states that come out, which in some families is not the layers'."""
        super().__init__()
        self.base_model = backbone
        self.config = backbone.config
        self.score = nn.Linear(hidden_size, 1, device=backbone.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.score.weight.device

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.base_model.get_input_embeddings()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the backbone's directory, for ``AutoModel``, and the head beside it."""
        self.base_model.save_pretrained(directory)
        head = {name: p.detach().contiguous() for name, p in self.score.named_parameters()}
        save_file(head, Path(directory) / VALUE_HEAD)


def load_value_models(
    path_or_paths: str | Path | Sequence[str | Path],
    num_critics: int,
    *,
    vocab_size: int | None,
    device: torch.device,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> list[Any]:
    """Load M value models from one checkpoint, or each from its own.

    A head of the checkpoint is taken; where there is none, each model gets one of its own, drawn from torch's global
    generator. Raises ConfigError if one cannot be loaded or has embeddings of fewer than ``vocab_size`` tokens.
    """
    if isinstance(path_or_paths, str | Path):
        path_or_paths = [path_or_paths] * num_critics
    if len(path_or_paths) != num_critics:
        raise ConfigError(
            f"critic.model_name_or_path: got {len(path_or_paths)} checkpoints, needs 1 or "
            f"critic.num_critics = {num_critics}"
        )
    models = []
    how: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    for path in map(str, path_or_paths):
        model, _ = load_value_model(path, device, **how)
        check_vocabulary(model.config, path, vocab_size)
        models.append(model)
    return models


def check_vocabulary(config: PreTrainedConfig, path: str, vocab_size: int | None) -> None:
    """Raise ConfigError if the model of ``config`` has embeddings of fewer than ``vocab_size`` tokens; None: any number
    will do."""
    got = config.get_text_config().vocab_size
    if vocab_size is not None and got < vocab_size:
        raise ConfigError(
            f"critic.model_name_or_path: {path!r} has embeddings of {got} tokens, needs those of the policy's "
            f"tokenizer, {vocab_size}: critics read the policy's tokens"
        )


def draw_head(head: nn.Linear) -> None:
    """Draw a new value head. Hidden states have entries of size 1 after the final norm: values start out around
    1 / sqrt(H)."""
    nn.init.normal_(head.weight, std=1 / head.in_features)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def load_value_model(
    path: str,
    device: torch.device,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    in_4_bits: torch.dtype | None = None,
) -> tuple[Any, bool]:
    """Return a model with a ``base_model`` and a ``value_head``, and whether that was drawn anew: transformers' token
    classifier of the family, or the family's backbone with a head of our own where it has none. ``device`` and
    ``in_4_bits``: see ``load_pretrained``. Raises ConfigError."""
    here = torch.device("cpu") if device.type == "meta" else device
    how: dict[str, Any] = {
        "setting": "critic.model_name_or_path",
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "in_4_bits": in_4_bits,
    }
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new value head is meant, not something to warn of
    try:
        saved_head = Path(path) / VALUE_HEAD
        if not saved_head.exists() and _has_token_classifier(path, trust_remote_code):
            model, report = load_pretrained(
                AutoModelForTokenClassification,
                path,
                device,
                num_labels=1,
                # The class's default of 0.1 would pollute the disagreement. Not every config knows the field.
                config_attributes={"classifier_dropout": 0.0},
                **how,
            )
            name = _name_of_head(model)
            head_is_new = f"{name}.weight" in report["missing_keys"]
            files = files_of(model)
            if files is not None:  # the head is small, and nothing is stacked or drawn of it later
                read_weights(value_head(model), lambda own: [(files, f"{name}.{own}")], "cpu")
        else:
            backbone, _ = load_pretrained(AutoModel, path, here, **how)
            model = BackboneWithValueHead(backbone, _hidden(backbone, [0]).shape[-1])
            head_is_new = not saved_head.exists()
            if not head_is_new:
                model.score.load_state_dict(load_file(saved_head, device=str(here)))
        if not weights_come_later(model):  # of a family that is known to be
            check_causal(model, path)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if head_is_new:
        draw_head(value_head(model))
    inputs = load_policy_inputs(path, here)
    if inputs is not None:
        model.add_module(NAME, inputs)
    setattr(model, _LOSS, None if head_is_new else load_loss(path))
    return model, head_is_new


def save_value_model(model: Any, directory: Path, dtype: SaveDtype, later: Later | None = None) -> None:
    """As ``save_model``; what the critic reads beside the tokens is projected by a file of its own, since transformers
    knows no such weight."""
    inputs = model._modules.pop(NAME, None)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_model(model, directory, dtype, later)
    finally:
        if inputs is not None:
            model.add_module(NAME, inputs)
    if inputs is not None:
        save_policy_inputs(inputs.names, inputs.weight, directory)
    save_loss(loss_of([model]), directory)


def save_loss(loss: str, directory: Path) -> None:
    """Write into a critic's directory what it has minimised, since its head means nothing without."""
    (directory / CRITIC).write_text(json.dumps({"loss": loss}) + "\n")


def load_loss(path: str | Path) -> str | None:
    """Return what ``save_loss`` wrote; None if nothing is there."""
    file = Path(path) / CRITIC
    return json.loads(file.read_text())["loss"] if file.exists() else None


def fitting_loss(found: str | None, loss: str | None, path: Any) -> str:
    """Return what the critic of ``path``, trained by ``found`` (None: nobody knows), is to minimise: ``loss``, or, if
    that is None, the same. Raises ConfigError if it is another one."""
    if found is not None and loss not in (None, found):
        raise ConfigError(f"critic.loss: got {loss!r}, needs {found!r}, by which the critic {str(path)!r} was trained")
    return loss or found or "mse"


def minimise(model: Any, loss: str) -> None:
    """Let the value model ``model`` minimise ``loss``. Raises ConfigError if it was trained by another one."""
    setattr(model, _LOSS, fitting_loss(getattr(model, _LOSS, None), loss, model.config._name_or_path))


def loss_of(models: Sequence[Any]) -> str:
    """Return what value models minimise. Raises ConfigError if it is not the same."""
    return one_loss([getattr(model, _LOSS, None) or "mse" for model in models])


def one_loss(every: Sequence[str]) -> str:
    """Return the one loss in ``every``. Raises ConfigError if there are two."""
    if len(set(every)) > 1:
        raise ConfigError(f"critic.loss: got critics trained by {' and '.join(sorted(set(every)))}, needs one for all")
    return every[0]


def value_head(model: Any) -> nn.Linear:
    """Return the head of a value model, whatever its family calls it: the one layer beside the body that is linear, to
    one number. Raises ConfigError if there is none."""
    return getattr(model, _name_of_head(model))


def _name_of_head(model: Any) -> str:
    heads = {name: part.out_features for name, part in model.named_children() if isinstance(part, nn.Linear)}
    if list(heads.values()) != [1]:
        raise ConfigError(
            f"critic.model_name_or_path: {type(model).__name__} has the heads {heads or 'none'} (outputs by name), "
            "needs a single one with a single output, the value"
        )
    return next(iter(heads))


@torch.no_grad()
def check_causal(model: Any, path: str) -> None:
    """Raise ConfigError if the hidden states of ``model`` know tokens that come later: its values would, too."""
    one, other = _hidden(model.base_model.eval(), [0, 1, 2]), _hidden(model.base_model, [0, 1, 1])
    if not torch.allclose(one[:2], other[:2], rtol=1e-5, atol=1e-5 * float(one.abs().max())):
        raise ConfigError(
            f"critic.model_name_or_path: {path!r} ({type(model.base_model).__name__}) reads tokens behind the one it "
            "stands at, needs a causal model: a value is of what has been written"
        )


@torch.no_grad()
def _hidden(body: Any, tokens: list[int]) -> torch.Tensor:
    """Hidden states [T, H] of a few tokens. Raises ConfigError if the model does not take these alone."""
    ids = torch.tensor([tokens], device=body.device)
    try:
        return body(input_ids=ids, use_cache=False).last_hidden_state[0]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"critic.model_name_or_path: {type(body).__name__} cannot read tokens alone ({why}), needs a language "
            "model with a decoder only"
        ) from error


def _has_token_classifier(path: str, trust_remote_code: bool) -> bool:
    """Whether transformers has a token classifier of the checkpoint's family. What cannot be read is left to the
    loading, whose error says more."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return True
    return type(config) in AutoModelForTokenClassification._model_mapping

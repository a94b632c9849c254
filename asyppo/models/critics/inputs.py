"""What critics read beside the tokens: numbers that the policy's own pass over them gives. Ours, not the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asyppo.config import ConfigError

FILE = "policy_inputs.safetensors"
NAME = "policy_inputs"
"""Of the module in a value model."""


class Stats(Protocol):
    """What a policy says of every response token: both float32 [B, T], 0 on padding."""

    @property
    def logprob(self) -> Tensor: ...

    @property
    def entropy(self) -> Tensor: ...


def policy_inputs(stats: Stats, mask: Tensor, names: Sequence[str]) -> Tensor:
    """Return float32 [B, T, F], on the response grid: what critics read at the position that predicts each token.

    ``logprob``: of the token before, 0 where that is not the policy's; ``entropy``: of the distribution of the token.
    """
    before = nn.functional.pad(stats.logprob[:, :-1], (1, 0))
    kinds = {"logprob": before * mask, "entropy": stats.entropy}
    return torch.stack([kinds[name] for name in names], dim=-1)


class PolicyInputs(nn.Module):
    """The projection of F such numbers, which starts at zero, so that a critic starts as one without it."""

    def __init__(self, names: Sequence[str], hidden_size: int, device: torch.device | str | None = None):
        super().__init__()
        self.names = tuple(names)
        self.weight = nn.Parameter(torch.zeros(len(names), hidden_size, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return float32 [..., H] of inputs [..., F]."""
        return inputs @ self.weight.float()


def is_projection(name: str) -> bool:
    """Whether a critic's parameter of this name is such a projection's; adapters have the stack's name of it."""
    return name in (f"{NAME}.weight", "project/weight")


def save_policy_inputs(names: Sequence[str], weight: Tensor, directory: Path) -> None:
    """Write a critic's projection [F, H] into its directory."""
    weights = {name: row.contiguous() for name, row in zip(names, weight.detach(), strict=True)}
    save_file(weights, directory / FILE, metadata={"names": " ".join(names)})


def load_policy_inputs(path: str | Path, device: torch.device | str) -> PolicyInputs | None:
    """Return what ``save_policy_inputs`` wrote into the directory ``path``; None if there is nothing."""
    file = Path(path) / FILE
    if not file.exists():
        return None
    with safe_open(file, framework="pt", device=str(device)) as saved:
        names = saved.metadata()["names"].split()
        weight = torch.stack([saved.get_tensor(name).float() for name in names])
    made = PolicyInputs(names, weight.shape[1], device)
    made.weight.data = weight
    return made


def fitting(found: PolicyInputs | None, names: Sequence[str] | None, model: Any, path: Any) -> PolicyInputs | None:
    """Return what the critic of ``path`` has, ``found``, or a new one beside the embedding of ``model``, to read
    ``names`` (None: whatever it reads). Raises ConfigError if it was trained to read something else."""
    if found is None and names:
        embedding = model.get_input_embeddings().weight
        return PolicyInputs(names, embedding.shape[1], "cpu" if embedding.is_meta else embedding.device)
    if found is not None and names is not None and found.names != tuple(names):
        raise ConfigError(
            f"critic.policy_inputs: got {list(names)}, needs {list(found.names)}, which the critic {str(path)!r} was "
            "trained to read"
        )
    return found


def read_also(model: Any, names: Sequence[str]) -> None:
    """Make the value model ``model`` read ``names`` beside the tokens. Raises ConfigError."""
    inputs = fitting(getattr(model, NAME, None), names, model, model.config._name_or_path)
    if inputs is not None:
        model.add_module(NAME, inputs)


@contextmanager
def added_to_embedding(model: Any, inputs: Tensor | None) -> Iterator[None]:
    """Inside, the embedding of the value model ``model`` gives its own and the projection of ``inputs`` [..., F]; None:
    its own alone. Whatever else a family makes of the tokens it reads stays as it is."""
    if inputs is None:
        yield
        return
    added = getattr(model, NAME)(inputs)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, found: found + added.to(found.dtype))
    try:
        yield
    finally:
        hook.remove()


def names_of(models: Sequence[Any]) -> tuple[str, ...]:
    """Return what value models read beside the tokens. Raises ConfigError if they do not read the same."""
    every = [() if (own := getattr(model, NAME, None)) is None else own.names for model in models]
    check_same(every)
    return every[0]


def check_same(every: Sequence[tuple[str, ...]]) -> None:
    """Raise ConfigError unless all critics read the same."""
    if len(set(every)) > 1:
        raise ConfigError(f"critic.policy_inputs: got critics that read {sorted(set(every))}, needs the same of all")

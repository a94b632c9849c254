"""Checkpoints: Hugging Face directories that load anywhere, and the state that training goes on from.

::

    checkpoint-100/
        policy/                 AutoModelForCausalLM, with the tokenizer
        critic_0/, critic_1/    AutoModelForTokenClassification, or an adapter for peft, or a side critic
        state/                  torch.distributed.checkpoint: weights and optimizers, on any number of ranks
        trainer_state.json      the step, and what else the loop remembers
        rng.json                where the random number generators are
        config.yaml             every setting of the run
        manifest.json           size and checksum of each of these files

The order of the data and the learning rates are functions of the step. A checkpoint is taken in one go, and written
while training goes on: see ``BackgroundWriter``.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedTokenizerBase

from asyppo.distributed.processes import agreed, from_main, world_size
from asyppo.distributed.sharding import whole_on_main
from asyppo.models.critics import Critics
from asyppo.models.hub import Later, SaveDtype, save_model
from asyppo.models.policy import Policy
from asyppo.run import durable, rng

Trained = dict[str, tuple[nn.Module, torch.optim.Optimizer] | Stateful]
"""What is trained, by name (``policy``, and ``critics`` together): a model and its optimizer, or anything with
``state_dict`` and ``load_state_dict``."""

Write = Callable[..., Path]
"""``write(group)``: writes a checkpoint, and returns where it is. ``group``: see ``from_main``."""

log = logging.getLogger("asyppo")

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
"""What lies under adapters is where they say it is, and was loaded from there."""


class CheckpointError(RuntimeError):
    """No checkpoint of a run passes its check, or one does not fit. The message names them."""

    exit_status = 1


def _state(trained: Trained) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, entry in trained.items():
        if not isinstance(entry, tuple):
            state[name] = entry.state_dict()
            continue
        model, optimizer = entry
        fresh = not optimizer.state
        weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
        # A frozen weight in 4 bits has its scales below its name.
        below = tuple(f"{frozen}." for frozen, p in model.named_parameters() if not p.requires_grad)
        weights = {key: value for key, value in weights.items() if not key.startswith(below)}
        if fresh:  # get_state_dict has filled it by a step at rate 0, which is not to count
            for parameter_state in optimizer.state.values():
                parameter_state["step"].zero_()
        state[name] = {"model": weights, "optimizer": moments}
    return state


def take_checkpoint(
    directory: Path,
    step: int,
    policy: Policy,
    critics: Critics | None,
    tokenizer: PreTrainedTokenizerBase,
    trained: Trained,
    remembered: dict[str, Any],
    save_dtype: SaveDtype = "auto",
    *,
    copied: bool = False,
) -> Write:
    """Return what writes ``directory/checkpoint-{step}`` under a temporary name, flushed, and returns that for
    ``publish_checkpoint``; it raises WriteError, which leaves nothing behind.

    ``remembered`` is what else the loop needs, as JSON can hold it; ``save_dtype`` is for ``save_model``. What is
    ``copied`` is written as it is now, whatever becomes of it until then. What is small is written here.
    """
    partial = directory / f".checkpoint-{step}.partial"
    later: Later = []

    def begin() -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / "trainer_state.json").write_text(json.dumps({"step": step, **remembered}, indent=1))
        (partial / "rng.json").write_text(json.dumps(rng.generator_states()))
        if (directory / "config.yaml").exists():
            shutil.copy(directory / "config.yaml", partial)

    def export_policy() -> None:
        save_model(policy.model, partial / "policy", save_dtype, later if copied else None)
        tokenizer.save_pretrained(partial / "policy")

    def export_critics(critics: Critics) -> None:
        critics.save_pretrained(partial, save_dtype, later if copied else None)

    def export_later() -> None:
        for export in later:
            export()

    @contextmanager
    def writing() -> Iterator[None]:
        try:
            with durable.writing(directory / f"checkpoint-{step}"):
                yield
        except durable.WriteError:
            shutil.rmtree(partial, ignore_errors=True)  # makes room on a full disk
            raise

    with writing():
        from_main(begin)
        with whole_on_main(policy):
            from_main(export_policy)
        if critics is not None:
            with whole_on_main(critics, *critics.models):
                from_main(lambda: export_critics(critics))
    state = _copy(_state(trained)) if copied else _state(trained)
    if copied and torch.cuda.is_available():
        torch.cuda.synchronize()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is meant

    def write(group: dist.ProcessGroup | None = None) -> Path:
        with writing():
            from_main(export_later, group)
            dcp.save(state, checkpoint_id=partial / "state", no_dist=world_size() == 1, process_group=group)
            from_main(lambda: durable.seal(partial), group)
        return partial

    return write


def _copy(state: Any) -> Any:
    """``state`` with copies of its tensors in the host's memory, which is pinned where they come from a GPU; they are
    there once that has come to rest."""
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    if isinstance(state, DTensor):
        return DTensor(_copy(state.to_local()), state._spec, requires_grad=False)
    if not isinstance(state, Tensor):
        return state
    state = state.detach()
    if is_traceable_wrapper_subclass(state):
        return state.to("cpu", copy=True)
    taken = torch.empty(state.shape, dtype=state.dtype, pin_memory=state.is_cuda)
    return taken.copy_(state, non_blocking=state.is_cuda)


def publish_checkpoint(
    partial: Path, save_total_limit: int | None = None, group: dist.ProcessGroup | None = None
) -> Path:
    """Give a written checkpoint its name, delete those that are too many, and return it.

    The last ``save_total_limit`` stay (None: all), and the one with the highest accuracy. Raises WriteError.
    """
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))

    def publish() -> None:
        durable.publish(partial, final)
        if save_total_limit is not None:
            every = checkpoints(final.parent)
            for path in every[:-save_total_limit]:
                if path != best_checkpoint(final.parent):
                    durable.remove(path)

    with durable.writing(final):
        from_main(publish, group)
    return final


class BackgroundWriter:
    """Writes checkpoints in a thread of its own, one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "asyppo-checkpoint")
        self._group: dist.ProcessGroup | None = None
        self._future: Future[Path] | None = None

    def start(self, write: Write, save_total_limit: int | None) -> None:
        """Write and publish a checkpoint, after the last one has been ``finished``."""
        assert self._future is None
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # the main thread goes on with the other

        def publish() -> Path:
            return publish_checkpoint(write(self._group), save_total_limit, self._group)

        self._future = self._thread.submit(publish)

    def finished(self, *, wait: bool) -> Path | None:
        """Return the checkpoint if one has been written since the last call, None if none is, or not yet; ``wait`` for
        it. Raises WriteError."""
        future = self._future
        if future is None or not (wait or from_main(future.done)):
            return None
        self._future = None
        return agreed(future.result)

    def close(self) -> None:
        """Wait for what is being written, whatever comes of it."""
        self._thread.shutdown()
        if self._future is not None and (error := self._future.exception()) is not None:
            log.warning("%s", error)


def load_checkpoint(checkpoint: Path, trained: Trained) -> dict[str, Any]:
    """Load weights and optimizers of ``checkpoint`` in place, put the random number generators back, and return what
    the loop remembered, its ``step`` included. Raises CheckpointError for moments in 8 bits that another number of
    processes cut into other blocks."""
    state = _state(trained)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    try:
        dcp.load(state, checkpoint_id=checkpoint / "state", no_dist=world_size() == 1)
    except (ValueError, CheckpointException) as error:
        if "_scale" not in str(error):
            raise
        raise CheckpointError(
            f"{checkpoint}: its moments, by optim 'adamw_8bit', are cut into other blocks than here; needs as many "
            "processes as it was written by"
        ) from error
    for name, entry in trained.items():
        if isinstance(entry, tuple):
            model, optimizer = entry
            weights, moments = state[name]["model"], state[name]["optimizer"]
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=TRAINED_ONLY)
        else:
            entry.load_state_dict(state[name])
    rng.set_generator_states(json.loads((checkpoint / "rng.json").read_text()))
    return trainer_state(checkpoint)


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return what the loop remembered in ``checkpoint``."""
    return json.loads((checkpoint / "trainer_state.json").read_text())


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in ``directory``, by step."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in directory.iterdir()}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.name.split("-")[1]))


def best_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint in ``directory`` with the highest accuracy, the first of equals; None if none has one."""
    accuracy: dict[Path, float] = {}
    for path in checkpoints(directory):
        with suppress(OSError, ValueError, KeyError):  # a damaged one is not the best
            if (value := trainer_state(path)["accuracy"]) is not None:
                accuracy[path] = value
    return max(accuracy, key=lambda path: accuracy[path], default=None)


def last_valid_checkpoint(directory: Path) -> Path | None:
    """Return the last checkpoint in ``directory`` that passes its check; None if there are none.

    Those after it are renamed to ``damaged-checkpoint-{step}``, with a warning that says what is wrong with each.
    Raises CheckpointError if none passes.
    """
    found, damaged = checkpoints(directory), {}
    while found and (damage := durable.damage(found[-1])):
        damaged[found.pop()] = damage
    if damaged and not found:
        raise CheckpointError(
            f"no checkpoint in {directory} can be loaded: "
            + "; ".join(f"{path.name}: {damage}" for path, damage in damaged.items())
        )
    for path, damage in damaged.items():
        warnings.warn(f"{path} is passed over for {found[-1].name}: {damage}", stacklevel=2)
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            durable.remove(aside)
        path.rename(aside)
    return found[-1] if found else None

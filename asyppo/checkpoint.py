"""Checkpoints: Hugging Face directories that load anywhere, and the state that training goes on from.

::

    checkpoint-100/
        policy/                 AutoModelForCausalLM, with the tokenizer
        critic_0/, critic_1/    AutoModelForTokenClassification, or an adapter for peft
        state/                  torch.distributed.checkpoint: weights and optimizers, on any number of ranks
        trainer_state.json      the step
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import PreTrainedTokenizerBase

from asyppo.critics import Critics
from asyppo.policy import Policy

Trained = dict[str, tuple[nn.Module, torch.optim.Optimizer]]
"""What has weights and an optimizer, by name: ``policy``, and ``critics`` together."""


def _state(trained: Trained) -> dict[str, Any]:
    state = {}
    for name, (model, optimizer) in trained.items():
        fresh = not optimizer.state
        weights, moments = get_state_dict(model, optimizer)
        if fresh:  # get_state_dict has filled it by a step at rate 0, which is not to count
            for of_parameter in optimizer.state.values():
                of_parameter["step"].zero_()
        state[name] = {"model": weights, "optimizer": moments}
    return state


def save_checkpoint(
    directory: Path,
    step: int,
    policy: Policy,
    critics: Critics | None,
    tokenizer: PreTrainedTokenizerBase,
    trained: Trained,
) -> Path:
    """Write ``directory/checkpoint-{step}`` and return it. It appears under its name only once it is whole."""
    final = directory / f"checkpoint-{step}"
    partial = directory / f".checkpoint-{step}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    policy.model.save_pretrained(partial / "policy")
    tokenizer.save_pretrained(partial / "policy")
    if critics is not None:
        critics.save_pretrained(partial)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is meant
        dcp.save(_state(trained), checkpoint_id=partial / "state", no_dist=True)
    (partial / "trainer_state.json").write_text(json.dumps({"step": step}))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    return final


def load_checkpoint(checkpoint: Path, trained: Trained) -> int:
    """Load weights and optimizers of ``checkpoint`` in place and return its step."""
    state = _state(trained)
    dcp.load(state, checkpoint_id=checkpoint / "state", no_dist=True)
    for name, (model, optimizer) in trained.items():
        set_state_dict(
            model, optimizer, model_state_dict=state[name]["model"], optim_state_dict=state[name]["optimizer"]
        )
    return json.loads((checkpoint / "trainer_state.json").read_text())["step"]

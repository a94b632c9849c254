"""Checkpoints: models that load anywhere, and a state from which training goes on as if it had not stopped."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, TrainerCallback

from asyppo.checkpoint import load_checkpoint, take_checkpoint, trainer_state
from asyppo.config import ConfigError
from asyppo.loop import TrainingError, TrainingLoop
from asyppo.models.hub import save_model
from asyppo.models.policy import Policy
from asyppo.run import durable
from asyppo.run.directory import RunDirectory
from asyppo.trainer import AsyPPOTrainer

Make = Callable[..., Any]


def score(completions: list[str], **_: Any) -> list[float]:
    """Number of a's."""
    return [float(c.count("a")) for c in completions]


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, through dictionaries and lists."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def state_of(trainer: AsyPPOTrainer) -> dict[str, Any]:
    """Weights and optimizers of everything that is trained."""
    return {name: [m.state_dict(), o.state_dict()] for name, (m, o) in trainer.trained().items()}


def test_what_a_checkpoint_holds(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config()
    trainer, run = tiny_trainer(config, score), RunDirectory(config)
    trainer.step(1)
    checkpoint = TrainingLoop(trainer).save(run, 1)
    assert checkpoint == run.path / "checkpoint-1"
    assert {path.name for path in checkpoint.iterdir()} == {
        "policy",
        "critic_0",
        "critic_1",
        "state",
        "trainer_state.json",
        "rng.json",
        "config.yaml",
        "manifest.json",
    }
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == [".lock"]
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    data = {"train_dataset": trainer.train_dataset.digest, "eval_dataset": trainer.eval_dataset.digest}
    counts = {"skipped_in_a_row": 0, "strayed_in_a_row": 0, "sampler_agrees": False}
    order = {"prompt_order": "swap-or-not"}
    assert state == {"step": 1, **counts, "accuracy": None, "callbacks": {}, "data": data, **order}
    # One of a version that drew prompts in another order has none, and is refused before anything is loaded.
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"prompt_order": None}))
    loop = TrainingLoop(trainer)
    with pytest.raises(ConfigError, match=r"resume: .*checkpoint-1 is of an asyppo that drew prompts in another order"):
        loop._check_data(trainer_state(checkpoint), checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert (checkpoint / "config.yaml").read_bytes() == (run.path / "config.yaml").read_bytes()
    policy = AutoModelForCausalLM.from_pretrained(checkpoint / "policy")
    assert_same(policy.state_dict(), trainer.policy.model.state_dict())
    for m in range(2):
        critic = AutoModelForTokenClassification.from_pretrained(checkpoint / f"critic_{m}")
        assert_same(critic.state_dict(), trainer.critics.models[m].state_dict())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "policy")
    assert tokenizer("abp")["input_ids"] == trainer.tokenizer("abp")["input_ids"]
    assert tokenizer.decode(tokenizer("abp")["input_ids"]) == "abp"


@pytest.mark.parametrize("algorithm", ["asyppo", "grpo"])
def test_training_goes_on_from_a_checkpoint(tiny_config: Make, tiny_trainer: Make, algorithm: Any) -> None:
    config = tiny_config(algorithm=algorithm)
    first, run = tiny_trainer(config, score), RunDirectory(config)
    for step in (1, 2):
        first.step(step)
    checkpoint = TrainingLoop(first).save(run, 2)
    second = tiny_trainer(config, score)
    assert load_checkpoint(checkpoint, second.trained())["step"] == 2
    assert_same(state_of(second), state_of(first))
    for trainer in (first, second):
        trainer.step(3)
    assert_same(state_of(second), state_of(first))


@pytest.mark.parametrize(
    "critic", [{}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"stacked": False}, {"lora_r": 2}))]
)
def test_a_copy_is_written_as_things_were(tiny_config: Make, tiny_trainer: Make, critic: dict[str, Any]) -> None:
    config = tiny_config(critic=critic)
    trainer, run = tiny_trainer(config, score), RunDirectory(config)
    trainer.step(1)
    parts = trainer.policy, trainer.critics, trainer.tokenizer, trainer.trained(), {"accuracy": None}
    at_once = take_checkpoint(run.path, 1, *parts)()
    before = copy.deepcopy(state_of(trainer))
    later = take_checkpoint(run.path, 2, *parts, copied=True)
    trainer.step(2)
    found = later()
    files = {path.relative_to(at_once): path for path in at_once.rglob("*") if path.is_file()}
    different = {str(name) for name, path in files.items() if path.read_bytes() != (found / name).read_bytes()}
    assert {name for name in different if not name.startswith("state/")} == {"trainer_state.json", "manifest.json"}
    load_checkpoint(found, trainer.trained())
    assert_same(state_of(trainer), before)


class Overlap(TrainerCallback):
    """Sealing of the first checkpoint waits until a later step has ended; ``events`` are in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None):
        self.events: list[str] = []
        self.gone_on, self.error, self.seal = Event(), error, durable.seal
        monkeypatch.setattr(durable, "seal", self.sealing)

    def sealing(self, directory: Path) -> None:
        name = directory.name.removesuffix(".partial")
        self.events.append(f"begin {name}")
        assert self.gone_on.wait(60)
        if self.error is not None:
            raise self.error
        self.seal(directory)
        self.events.append(f"end {name}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.gone_on.set()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(f"saved {state.global_step}")
        assert (Path(args.output_dir) / "run" / f"checkpoint-{state.global_step}").is_dir()


def test_steps_go_on_while_a_checkpoint_is_written(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlap = Overlap(monkeypatch)
    config = tiny_config(max_steps=3, save_steps=1)
    tiny_trainer(config, score, callbacks=[overlap]).train()
    every = [f"{what} .checkpoint-{n}" if what != "saved" else f"saved {n}" for n in (1, 2, 3)
             for what in ("begin", "end", "saved")]  # fmt: skip
    assert overlap.events == every  # never two at once


def test_an_error_in_the_background_ends_the_run(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlap = Overlap(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    config = tiny_config(max_steps=9, save_steps=1, run_name="full")
    with pytest.raises(TrainingError, match=r"cannot write .*checkpoint-1: No space left on device; there is no check"):
        tiny_trainer(config, score, callbacks=[overlap]).train()
    assert overlap.events == ["begin .checkpoint-1"]
    assert not list((Path(config.output_dir) / "full").glob("*checkpoint*"))


def test_a_checkpoint_before_the_first_update(tiny_config: Make, tiny_trainer: Make) -> None:
    """It is that of an optimizer that has not stepped: afterwards as before."""
    config = tiny_config()
    plain, saved, loaded = (tiny_trainer(config, score) for _ in range(3))
    run = RunDirectory(config)
    load_checkpoint(TrainingLoop(saved).save(run, 0), loaded.trained())
    for trainer in (plain, saved, loaded):
        trainer.step(1)
    assert_same(state_of(saved), state_of(plain))
    assert_same(state_of(loaded), state_of(plain))


def test_a_checkpoint_replaces_one_of_the_same_step(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config()
    trainer, run = tiny_trainer(config, score), RunDirectory(config)
    (run.path / ".checkpoint-1.partial" / "junk").mkdir(parents=True)  # of a run that was killed
    (run.path / "checkpoint-1" / "old").mkdir(parents=True)
    checkpoint = TrainingLoop(trainer).save(run, 1)
    assert not (checkpoint / "junk").exists()
    assert not (checkpoint / "old").exists()


def test_a_policy_with_contradictory_generation_settings_is_saved(
    tiny_config: Make, tiny_trainer: Make, tiny_lm: Make, tmp_path: Path
) -> None:
    """Some published checkpoints have settings that transformers loads but refuses to save."""
    tiny_lm().save_pretrained(tmp_path)
    settings = {"eos_token_id": [1, 4], "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    policy = Policy.from_pretrained(str(tmp_path), temperature=1.0, dtype=torch.float32, device=torch.device("cpu"))
    config = tiny_config()
    trainer = tiny_trainer(config, score, policy=policy)
    checkpoint = TrainingLoop(trainer).save(RunDirectory(config), 1)
    saved = AutoModelForCausalLM.from_pretrained(checkpoint / "policy").generation_config
    assert (saved.eos_token_id, saved.temperature, saved.top_p) == ([1, 4], 0.6, 0.9)
    assert trainer.engine.chosen.eos_token_ids == [1, 4]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_saved_as_they_came(tiny_lm: Make, tokenizer: Any, tmp_path: Path, tied: bool) -> None:
    """In bfloat16 where the source is, unless asked otherwise; training has float32 in any case."""
    for name, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
        tiny_lm(tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path / name)
    cpu = torch.device("cpu")
    for name, asked, stored in (
        ("half", "auto", torch.bfloat16),
        ("half", "float32", torch.float32),
        ("whole", "auto", torch.float32),
        ("whole", "bfloat16", torch.bfloat16),
    ):
        policy = Policy.from_pretrained(str(tmp_path / name), temperature=1.0, dtype=torch.float32, device=cpu)
        assert next(policy.parameters()).dtype == torch.float32
        save_model(policy.model, tmp_path / "saved", asked)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
        assert {w.dtype for w in loaded.parameters()} == {stored}
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
        for one, other in zip(loaded.parameters(), policy.model.parameters(), strict=True):
            assert torch.equal(one, other.to(stored))
        # Written in the background of a pass, in which a sharded model has weights of the pass's dtype.
        later: list[Any] = []
        save_model(policy.model, tmp_path / "later", asked, later)
        policy.model.to(torch.bfloat16 if stored == torch.float32 else torch.float32)
        later[0]()
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "later" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()

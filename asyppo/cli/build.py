"""From a configuration to a trainer: device, data, models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from asyppo.checkpoint import load_checkpoint
from asyppo.config import AsyPPOConfig, ConfigError, load_config
from asyppo.data.checks import Checks, fitting
from asyppo.data.prompts import prompt_tokens
from asyppo.data.rows import Row
from asyppo.data.sources import load_eval_rows, load_train_rows
from asyppo.distributed.processes import agreed, from_main, make_mesh
from asyppo.evaluate import Evaluation, evaluate
from asyppo.loop import trial_prompts
from asyppo.metrics.introduction import introduction_of_evaluation
from asyppo.models import warm_start
from asyppo.models.loading import choose_device, critic_configs, fit_of, longest_sequence, policy_of, tokenizer_of
from asyppo.models.quantized import check_bitsandbytes
from asyppo.models.tokenizer import eos_token_ids
from asyppo.rewards.function import RewardFunction, resolve_reward_funcs
from asyppo.rollout.environments import environment_of, playing_of
from asyppo.rollout.samplers import make_sampler, sampler_factory, sends_weights, settle
from asyppo.run import durable
from asyppo.run.directory import run_path
from asyppo.run.progress import ProgressDisplay, say
from asyppo.run.writers import check_writers
from asyppo.trainer import AsyPPOTrainer, advantage_of, surrogate_of


def build_trainer(config: AsyPPOConfig) -> AsyPPOTrainer:
    """Load what ``config`` names and return a trainer of it, whose models are sharded over the processes that
    ``distributed.processes`` has joined. Raises ConfigError."""
    if (config.policy.model_name_or_path is None) == (config.warm_start is None):
        raise ConfigError(
            f"policy.model_name_or_path: got {config.policy.model_name_or_path!r}, needs a model, or else "
            "a warm_start; one of the two"
        )
    policy_path, as_policy = config.policy.model_name_or_path, config.resolved_algorithm.critics == "policy"
    critic_path = None if as_policy else config.critic.model_name_or_path
    found = agreed(lambda: _checked(config, policy_path, critic_path or policy_path))
    device, train_rows, eval_rows, reward_funcs, tokenizer = found
    if config.warm_start is not None:
        # It has solutions of the task alone, so beside a data set of one's own it learns from rows of the task.
        data = replace(config.data, dataset_name=None)
        rows = train_rows if config.data.dataset_name is None else load_train_rows(data, eval_rows)
        shapes = config.warm_start
        made = from_main(lambda: warm_start.build(shapes, data, rows, device, config.environment))
        policy_path = str(made[0])
        if critic_path is None and not as_policy and config.critic.kind == "mini":
            critic_path = str(made[1])
    assert policy_path is not None
    if config.critic.kind == "mini":
        critic_path = critic_path or policy_path
    mesh = make_mesh(config.distributed, device)

    def make() -> AsyPPOTrainer:
        return AsyPPOTrainer(
            policy=policy_path,
            critics=critic_path if config.num_critics else None,
            tokenizer=tokenizer,
            reward_funcs=reward_funcs,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            config=config,
            mesh=mesh,
        )

    return agreed(make)


def config_of_checkpoint(checkpoint: Path, changes: Mapping[str, Any]) -> AsyPPOConfig:
    """Return the settings of the run that ``checkpoint`` is of, with ``changes``, for a trainer that does not write to
    the run's directory. Raises ConfigError."""
    places = [folder / "config.yaml" for folder in (checkpoint, checkpoint.parent)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ConfigError(f"audit: {checkpoint} has no config.yaml, needs the checkpoint of a run")
    return unnamed(load_config(file, changes))


def trainer_of_checkpoint(checkpoint: Path, config: AsyPPOConfig) -> AsyPPOTrainer:
    """Return a trainer of ``config``, whose models and optimizers are those of ``checkpoint``. Raises ConfigError."""
    if damage := from_main(lambda: durable.damage(checkpoint)):
        raise ConfigError(f"audit: {checkpoint} is damaged: {damage}")
    trainer = build_trainer(_untaught(config, checkpoint))
    load_checkpoint(checkpoint, trainer.trained())
    trainer.weights_changed()
    settle(trainer.sampler, trainer.engine, trainer.policy, trial_prompts(trainer), config)
    return trainer.with_settings(config)


def _untaught(config: AsyPPOConfig, checkpoint: Path) -> AsyPPOConfig:
    """Return ``config`` with the models of ``checkpoint`` in place of a warm start, whose models would only be
    replaced; but where its policy is the reference, or its critic the backbone under adapters."""
    if config.warm_start is None or config.beta > 0 or config.critic.lora_r:
        return config
    critic = checkpoint / "critic_0"
    return replace(
        config,
        warm_start=None,
        policy=replace(config.policy, model_name_or_path=str(checkpoint / "policy")),
        critic=replace(config.critic, model_name_or_path=str(critic) if critic.is_dir() else None),
    )


def unnamed(config: AsyPPOConfig) -> AsyPPOConfig:
    """Return ``config`` for a trainer that writes nothing, and whose models are used in another order than a step's."""
    return replace(config, run_name=None, resume=False, report_to=[], offload="none")


def _checked(
    config: AsyPPOConfig, policy: str | None, critics: str | list[str] | None
) -> tuple[torch.device, Sequence[Row], Sequence[Row], list[RewardFunction], PreTrainedTokenizerBase | None]:
    """What cannot work shows before the work, not after it. Returns the device, training and held-out rows, reward
    functions, and the policy's tokenizer, where there is one before the work."""
    run_path(config)
    check_writers(config)
    check_bitsandbytes(config)
    reward_funcs = resolve_reward_funcs(config.reward_funcs, config.reward_timeout, config.reward_weights)
    advantage_of(config), surrogate_of(config), sampler_factory(config), environment_of(config)
    device = choose_device(config)
    needs = [func.need for func in reward_funcs]
    tokenizer, checks = None, Checks(config.data, needs=needs)
    if policy is not None:
        tokenizer = tokenizer_of(policy, config)
        checks = Checks(config.data, fit_of(config, policy, critics, tokenizer), needs)
    else:
        critic_configs(critics, config)
    eval_rows = load_eval_rows(config.data) if config.data.eval_size != 0 else []
    train_rows = load_train_rows(config.data, eval_rows, checks)
    return device, train_rows, eval_rows, reward_funcs, tokenizer


def evaluate_model(config: AsyPPOConfig, model: str, out: Path) -> Evaluation:
    """Evaluate a model by directory or hub name on the held-out prompts of ``config``, as training would, and write
    ``eval.json`` and ``samples.jsonl`` to the new directory ``out``. Raises ConfigError."""
    if out.exists():
        raise ConfigError(f"--out: {out} exists, needs a new name")
    reward_funcs = resolve_reward_funcs(config.reward_funcs, config.reward_timeout, config.reward_weights)
    if config.data.eval_size == 0:
        raise ConfigError("data.eval_size: got 0, needs at least 1 prompt to evaluate on")
    choose_device(config)  # what cannot work shows before the work
    tokenizer = tokenizer_of(model, config)
    checks = Checks(config.data, fit_of(config, model, None, tokenizer), [func.need for func in reward_funcs])
    rows = fitting(load_eval_rows(config.data), "eval_dataset", checks)
    if not rows:
        raise ConfigError("data.eval_size: got None, which holds nothing out of one prompt; needs 1 to evaluate on it")
    # Of greedy responses there is no distribution to compare.
    policy = policy_of(model, config, temperature=config.eval.temperature or 1.0)
    for func in reward_funcs:
        func.to(policy.device)
    tokens = prompt_tokens([row["prompt"] for row in rows], tokenizer, config.data.chat_template_kwargs)
    prompts = [torch.tensor(ids) for ids in tokens]
    engine = make_sampler(policy, tokenizer, config)
    sampler = sends_weights(engine, engine, policy)
    settle(sampler, engine, policy, prompts[:32], config)
    ends, longest = eos_token_ids(policy.model, tokenizer), longest_sequence(config, policy)
    playing = playing_of(environment_of(config), tokenizer, config, ends, longest)
    if not reward_funcs and (playing is None or not playing.reward_names):
        raise ConfigError("reward_funcs: got none, needs one, or an environment that gives rewards")
    say(*introduction_of_evaluation(config, policy, rows))
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot make {out}: {error.strerror}") from error
    with ProgressDisplay("sample", len(rows) * config.eval.num_generations) as progress:
        evaluation = evaluate(
            sampler,
            tokenizer,
            rows,
            prompts,
            reward_funcs,
            config,
            progress=lambda count: progress.advance(count=count),
            playing=playing,
        )
    results = {"model": model, **evaluation.results(), "config": asdict(config)}
    with durable.writing(out):
        durable.write_text(out / "eval.json", json.dumps(results, indent=2) + "\n")  # first: it is what was asked for
        with open(out / "samples.jsonl", "w") as file:
            file.writelines(durable.json_lines({"split": "eval", **sample} for sample in evaluation.samples))
    return evaluation

"""From a configuration to a trainer: device, data, models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.prompts import Row, fitting, load_eval_rows, load_train_rows, prompt_tokens
from asyppo.distributed.processes import agreed, from_main, make_mesh
from asyppo.evaluate import Evaluation, evaluate
from asyppo.models import warm_start
from asyppo.models.loading import choose_device, critics_of, policy_of, prompt_limit
from asyppo.models.tokenizer import load_tokenizer
from asyppo.rewards.computing import resolve_reward_funcs
from asyppo.rollout.samplers import make_sampler, sampler_factory
from asyppo.run.directory import run_path
from asyppo.run.progress import ProgressDisplay
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
    if config.warm_start is not None and config.critic.model_name_or_path is not None:
        raise ConfigError(
            f"critic.model_name_or_path: got {config.critic.model_name_or_path!r}, needs none where a warm_start makes "
            "the critics"
        )
    device, train_rows, eval_rows = agreed(lambda: _checked(config))
    policy_path, critic_path = config.policy.model_name_or_path, config.critic.model_name_or_path
    if config.warm_start is not None:
        # It has solutions of the task alone, so beside a data set of one's own it learns from rows of the task.
        data = replace(config.data, dataset_name=None)
        rows = train_rows if config.data.dataset_name is None else load_train_rows(data, eval_rows)
        shapes = config.warm_start
        made = from_main(lambda: warm_start.build(shapes, data, rows, device))
        policy_path, critic_path = str(made[0]), str(made[1])
    assert policy_path is not None
    if config.resolved_algorithm.critics == "policy" or critic_path is None:
        critic_path = policy_path
    mesh = make_mesh(config.distributed, device)

    def make() -> AsyPPOTrainer:
        policy = policy_of(policy_path, config)
        return AsyPPOTrainer(
            policy=policy,
            critics=critics_of(critic_path, config, policy) if config.num_critics else None,
            tokenizer=load_tokenizer(policy_path, config.policy.trust_remote_code),
            reward_funcs=config.reward_funcs,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            config=config,
            mesh=mesh,
        )

    return agreed(make)


def _checked(config: AsyPPOConfig) -> tuple[torch.device, Sequence[Row], Sequence[Row]]:
    """What cannot work shows before the work, not after it. Returns the device, and training and held-out rows."""
    run_path(config)
    check_writers(config)
    resolve_reward_funcs(config.reward_funcs, config.reward_timeout, config.reward_weights)
    advantage_of(config), surrogate_of(config), sampler_factory(config)
    device = choose_device(config)
    eval_rows = load_eval_rows(config.data) if config.data.eval_size else []
    return device, load_train_rows(config.data, eval_rows), eval_rows


def evaluate_model(config: AsyPPOConfig, model: str, out: Path) -> Evaluation:
    """Evaluate a model by directory or hub name on the held-out prompts of ``config``, as training would, and write
    ``eval.json`` and ``samples.jsonl`` to the new directory ``out``. Raises ConfigError."""
    if out.exists():
        raise ConfigError(f"--out: {out} exists, needs a new name")
    reward_funcs = resolve_reward_funcs(config.reward_funcs, config.reward_timeout, config.reward_weights)
    if not config.data.eval_size:
        raise ConfigError("data.eval_size: got 0, needs at least 1 prompt to evaluate on")
    choose_device(config)  # what cannot work shows before the work
    rows = load_eval_rows(config.data)
    policy = policy_of(model, config, temperature=config.eval.temperature)
    tokenizer = load_tokenizer(model, config.policy.trust_remote_code)
    rows = fitting(rows, "eval_dataset", tokenizer, config.data, prompt_limit(config, policy, None))
    prompts = prompt_tokens([row["prompt"] for row in rows], tokenizer, config.data.chat_template_kwargs)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot make {out}: {error.strerror}") from error
    with ProgressDisplay("sample", len(rows) * config.eval.num_generations) as progress:
        evaluation = evaluate(
            make_sampler(policy, tokenizer, config),
            tokenizer,
            rows,
            [torch.tensor(ids) for ids in prompts],
            reward_funcs,
            config,
            progress=lambda count: progress.advance(count=count),
        )
    with open(out / "samples.jsonl", "w") as file:
        file.writelines(json.dumps({"split": "eval", **sample}) + "\n" for sample in evaluation.samples)
    results = {"model": model, **evaluation.results(), "config": asdict(config)}
    (out / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    return evaluation

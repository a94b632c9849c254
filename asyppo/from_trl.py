"""``AsyPPOTrainer`` for scripts that were written for TRL's ``GRPOTrainer``: its arguments, its ``GRPOConfig``.

::

    from asyppo.from_trl import AsyPPOTrainer  # in place of: from trl import GRPOTrainer

    trainer = AsyPPOTrainer(model="Qwen/Qwen3-4B", reward_funcs=reward, args=GRPOConfig(...), train_dataset=dataset)
    trainer.train()

Read in TRL 1.16. TRL itself is not needed: ``args`` is asked for its fields.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from asyppo.config import ConfigError, load_config
from asyppo.config.files import merged
from asyppo.data.given import given_rows
from asyppo.rewards.function import RewardFuncs
from asyppo.rollout.environments import Factory, Tool
from asyppo.trainer import AsyPPOTrainer as Trainer

SAME = (
    "beta",
    "delta",
    "entropy_coef",
    "epsilon",
    "learning_rate",
    "log_completions",
    "mask_truncated_completions",
    "max_completion_length",
    "max_grad_norm",
    "num_completions_to_print",
    "num_generations",
    "num_iterations",
    "output_dir",
    "reward_weights",
    "run_name",
    "save_total_limit",
    "scale_rewards",
    "seed",
    "temperature",
    "use_bias_correction_kl",
    "weight_decay",
)
"""Fields that are settings of the same name and meaning."""
READ = (
    "bf16",
    "chat_template_kwargs",
    "ddp_timeout",
    "epsilon_high",
    "eval_steps",
    "eval_strategy",
    "generation_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "importance_sampling_level",
    "loss_type",
    "lr_scheduler_type",
    "max_steps",
    "max_tool_calling_iterations",
    "model_init_kwargs",
    "num_generations_eval",
    "num_train_epochs",
    "optim",
    "per_device_train_batch_size",
    "report_to",
    "save_steps",
    "save_strategy",
    "steps_per_generation",
    "trust_remote_code",
    "use_cpu",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
    "use_vllm",
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_correction",
    "vllm_max_model_length",
    "vllm_mode",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_tensor_parallel_size",
    "warmup_steps",
)
"""Fields that are translated."""
OPTIMIZERS = {
    "adamw_torch_fused": "adamw",
    "adamw_torch": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
}
NO_MATTER = (
    "average_tokens_across_devices",
    "cast_lm_head_to_fp32",
    "dataloader",
    "disable_tqdm",
    "do_",
    "ds3_gather_for_generation",
    "eval_on_start",
    "gradient_checkpointing_kwargs",
    "hub_",
    "include_",
    "local_rank",
    "log_",
    "logging_",
    "pad_to_multiple_of",
    "per_device_eval_batch_size",
    "project",
    "remove_unused_columns",
    "save_only_model",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
    "trackio_",
    "use_cache",
    "use_liger_kernel",
    "vllm_group_port",
    "vllm_importance_sampling_mode",
    "vllm_server_timeout",
)
"""How fields begin that change nothing of what is learned."""

OF_ADAPTERS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "peft_type",
    "peft_version",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
"""Fields of a ``LoraConfig`` that are translated, or change nothing of what is learned."""


def settings_of(args: Any, num_rows: int) -> dict[str, Any]:
    """Return the settings that a ``GRPOConfig`` comes to, with ``num_rows`` rows of training data. Raises ConfigError
    at a field that was changed and has no counterpart here."""
    known = {*SAME, *READ}
    absent = next((name for name in (*SAME, *READ) if not hasattr(args, name)), None)
    if absent is not None:
        raise ConfigError(f"args: got {type(args).__name__} without {absent}, needs a GRPOConfig of TRL 1.16")
    default = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
    for declared in fields(args):
        name, got, usual = declared.name, getattr(args, declared.name), getattr(default, declared.name)
        if name not in known and not name.startswith(NO_MATTER) and got != usual:
            _refuse(name, got, f"{usual!r}: there is no such setting")
    settings = {name: getattr(args, name) for name in SAME}
    if settings["run_name"] is None or settings["run_name"] == args.output_dir:  # older transformers fill it in
        del settings["run_name"]
    batches, over = divmod(args.steps_per_generation, args.gradient_accumulation_steps)
    if over:  # an update would be of several generations
        _refuse(
            "gradient_accumulation_steps",
            args.gradient_accumulation_steps,
            f"a divisor of steps_per_generation {args.steps_per_generation}: an update is of one step's responses",
        )
    updates = batches * args.num_iterations
    prompts = args.generation_batch_size // args.num_generations
    epoch = max(1, num_rows // prompts)
    max_steps = math.ceil(args.max_steps / updates if args.max_steps > 0 else args.num_train_epochs * epoch)

    def steps(count: float) -> int:
        """TRL counts updates of the policy, of which a step has several; below 1, it is a fraction of all."""
        return math.ceil(count * max_steps if count < 1 else count / updates)

    def every(strategy: Any, count: float | None) -> int:
        name = str(getattr(strategy, "value", strategy))
        return {"no": 0, "epoch": epoch}.get(name, steps(count or 0))

    settings |= {
        "prompts_per_step": prompts,
        "num_mini_batches": batches,
        "max_steps": max_steps,
        "warmup_steps": steps(args.warmup_steps),
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)).replace(
            "constant_with_warmup", "constant"
        ),
        "epsilon_high": args.epsilon if args.epsilon_high is None else args.epsilon_high,
        "loss_aggregation": _one_of(
            "loss_type", args, {"dapo": "token-mean", "bnpo": "token-mean", "grpo": "sequence-mean"}
        ),
        "optim": _one_of("optim", args, OPTIMIZERS),
        "policy_loss": _one_of("importance_sampling_level", args, {"token": "ppo", "sequence": "gspo"}),
        "report_to": [name for name in _listed(args.report_to) if name != "none"],
        "save_steps": every(args.save_strategy, args.save_steps),
        "distributed": {"timeout_s": args.ddp_timeout},
        "data": {"chat_template_kwargs": args.chat_template_kwargs or {}},
        "policy": _policy(args),
        "eval": {
            "every": every(args.eval_strategy, args.eval_steps),
            "num_generations": args.num_generations_eval or args.num_generations,
            "temperature": args.temperature,
        },
        # TRL counts answers, and without a limit tokens are one.
        "environment": {"max_turns": (args.max_tool_calling_iterations or args.max_completion_length) + 1},
    }
    if args.use_cpu:
        settings["device"] = "cpu"
    if args.use_transformers_continuous_batching or args.use_transformers_paged:
        settings["sampler"] = "continuous"
    return settings | _vllm(args) if args.use_vllm else settings


def _refuse(name: str, got: Any, needs: str) -> None:
    raise ConfigError(f"args.{name}: got {got!r}, needs {needs}")


def _one_of(name: str, args: Any, known: Mapping[str, str]) -> str:
    got = str(getattr(getattr(args, name), "value", getattr(args, name)))
    if got not in known:
        _refuse(name, got, f"one of {', '.join(known)}")
    return known[got]


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _policy(args: Any) -> dict[str, Any]:
    made = {"gradient_checkpointing": bool(args.gradient_checkpointing), "trust_remote_code": args.trust_remote_code}
    given = dict(args.model_init_kwargs or {})
    made |= {name: given.pop(name) for name in ("attn_implementation",) if name in given}
    dtype = str(given.pop("dtype", given.pop("torch_dtype", "auto"))).removeprefix("torch.")
    made["dtype"] = "float32" if not args.bf16 and dtype == "float32" else "auto"
    if given:
        _refuse("model_init_kwargs", args.model_init_kwargs, "attn_implementation and dtype alone")
    return made


def _vllm(args: Any) -> dict[str, Any]:
    urls: list[str] = []
    if args.vllm_mode == "server":
        urls = [args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"]
    made: dict[str, Any] = {
        "sampler": "vllm",
        "vllm": {
            "url": urls,
            "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
            "tensor_parallel_size": args.vllm_tensor_parallel_size,
            "max_model_len": args.vllm_max_model_length,
            "sleep_level": int(args.vllm_enable_sleep_mode),
        },
    }
    if args.vllm_importance_sampling_correction:
        made["importance_sampling_clip_max"] = args.vllm_importance_sampling_clip_max
    return made


def adapters_of(peft_config: Any) -> dict[str, Any]:
    """Return the settings of ``policy`` that PEFT's ``LoraConfig`` comes to. Raises ConfigError."""
    if peft_config is None:
        return {}
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    if kind != "LORA":
        raise ConfigError(f"peft_config: got {kind}, needs a LoraConfig")
    modules, default = peft_config.target_modules, type(peft_config)()
    if modules is None or (isinstance(modules, str) and modules != "all-linear"):
        raise ConfigError(f"peft_config.target_modules: got {modules!r}, needs a list of names, or all-linear")
    for name in (declared.name for declared in fields(peft_config)):
        got, usual = getattr(peft_config, name), getattr(default, name)
        if name not in OF_ADAPTERS and got != usual:
            raise ConfigError(f"peft_config.{name}: got {got!r}, needs {usual!r}: there is no such setting")
    names = None if isinstance(modules, str) else sorted(modules)
    return {
        "use_peft": True,
        "lora_r": peft_config.r,
        "lora_alpha": peft_config.lora_alpha,
        "lora_target_modules": names,
    }


class AsyPPOTrainer(Trainer):
    """``asyppo.AsyPPOTrainer`` with the arguments of TRL's ``GRPOTrainer``.

    ``critics`` is what critics start from, as in ``asyppo.AsyPPOTrainer``; without it they are small networks on the
    policy's hidden states (``critic.kind: side``), which need no checkpoint. ``settings``, a nested mapping, is laid
    over what ``args`` comes to: ``{"algorithm": "grpo"}`` trains without critics. ``further`` goes to
    ``asyppo.AsyPPOTrainer``.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFuncs | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
        tools: Sequence[Tool] | None = None,
        environment_factory: Factory | Mapping[str, Factory] | None = None,
        *,
        critics: Any = None,
        settings: Mapping[str, Any] | None = None,
        **further: Any,
    ):
        """Raises ConfigError where something has no counterpart here."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "mesh" not in further:
            raise ConfigError(
                "WORLD_SIZE: got several processes, needs one, or a mesh; asyppo train makes one by itself"
            )
        found: dict[str, Any] = {}
        if critics is None:
            found = {"critic": {"kind": "side"}}
        if args is not None:
            # The rows are counted, so a stream is read here.
            if train_dataset is not None:
                train_dataset = given_rows(train_dataset, "train_dataset", "train", load_config({}).data)
            rows = 0 if train_dataset is None else len(train_dataset)
            found = merged(found, settings_of(args, rows))
        found = merged(found, {"policy": {**found.get("policy", {}), **adapters_of(peft_config)}})
        super().__init__(
            policy=model,
            critics=critics,
            tokenizer=processing_class,
            reward_funcs=reward_funcs or (),
            reward_processing_classes=reward_processing_classes,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            config=load_config(found, settings),
            callbacks=callbacks or (),
            tools=tools or (),
            environment_factory=environment_factory,
            **further,
        )

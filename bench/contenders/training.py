"""The trainer itself: AsyPPO with stacked critics and one by one, with and without our ops; symmetric PPO; GRPO."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Case, Inputs, Outputs, nbytes
from bench.ops import train_step, update
from bench.ops.update import Algorithm
from bench.registry import Absent, Contender, Run, add, need, need_gpu
from bench.unfused import unfused


class Shared:
    """What is the same for several contenders of a case, and there once: at full size it would not fit several times.

    ``critics`` are by algorithm and whether they are stacked, with their optimizer.
    """

    def __init__(self, case: Case) -> None:
        from asyppo.models.policy import Policy

        model = on_device(case, update.policy_model_of(case))
        self.policy = Policy(model, dtype=case.dtype)
        self.optimizer: Any = None
        self.critics: dict[tuple[Algorithm, bool], tuple[Any, Any]] = {}
        self.tokenizer = train_step.tokenizer_of(case)
        self.sampler: Any = None


_SHARED: weakref.WeakValueDictionary[tuple[str, str, str], Shared] = weakref.WeakValueDictionary()


def shared_by(case: Case) -> Shared:
    """The case's models, for as long as somebody holds them."""
    key = case.key, str(case.sizes), str(case.device)
    found = _SHARED.get(key) or Shared(case)
    _SHARED[key] = found
    return found


def on_device(case: Case, model: Any) -> Any:
    """On a GPU with Liger's kernels, as the trainer loads models."""
    if case.device.type == "cuda":
        need("liger_kernel")
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    return model


class NoSampler:
    """Stands where a batch is given."""

    def sample(self, prompts: Any, **options: Any) -> Any:
        """Refuse."""
        raise AssertionError("the update samples nothing")


class NoRun:
    """A run that keeps nothing."""

    def log_samples(self, rows: Any) -> None:
        """Let go of them."""


def trainer_of(case: Case, algorithm: Algorithm, shared: Shared, *, stacked: bool = True) -> Any:
    """The trainer; models, optimizers and sampler are ``shared``'s."""
    from asyppo.models.loading import make_sampler
    from asyppo.trainer import AsyPPOTrainer

    critics, critic_optimizer = shared.critics.get((algorithm, stacked), (None, None))
    if critics is None and update.CRITICS[algorithm]:
        critics = _critics(case, algorithm, stacked)

    config = update.config_of(case, algorithm)
    sampling = case.op == train_step.OP
    if sampling and shared.sampler is None:
        shared.sampler = make_sampler(shared.policy, shared.tokenizer, config)
    trainer = AsyPPOTrainer(
        policy=shared.policy,
        critics=critics,
        tokenizer=shared.tokenizer,
        reward_funcs=[train_step.reward],
        train_dataset=[{"prompt": "1"}],
        config=config,
        sampler=shared.sampler if sampling else NoSampler(),
    )
    shared.optimizer = shared.optimizer or trainer.policy_optimizer
    trainer.policy_optimizer = shared.optimizer
    if critics is not None:
        trainer.critic_optimizer = critic_optimizer or trainer.critic_optimizer
        shared.critics[algorithm, stacked] = critics, trainer.critic_optimizer
    return trainer


def feed(trainer: Any, case: Case, inputs: Inputs) -> None:
    """Make these inputs what the trainer's next step is on."""
    if case.op == train_step.OP:
        from asyppo.data.prompts import PromptSchedule

        rollout = trainer.rollout
        rollout.dataset = train_step.rows_of(inputs)
        rollout.schedule = PromptSchedule(len(rollout.dataset), trainer.config.prompts_per_step, seed=0)
        return
    from asyppo.rewards.computing import Rewards

    sampled = update.batch_of(case, inputs), Rewards({}, inputs["score"].tolist(), {}), {}
    trainer.rollout = lambda step, timer: sampled


class Step:
    """Calls ``AsyPPOTrainer.step``; remembers the seconds of each phase of each call."""

    def __init__(
        self,
        case: Case,
        algorithm: Algorithm,
        *,
        stacked: bool = True,
        ops: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.case, self.algorithm, self.ops = case, algorithm, ops
        self.shared = shared_by(case)
        self.trainer = trainer_of(case, algorithm, self.shared, stacked=stacked)
        self.models = list(self.trainer.critics.models) if self.trainer.critics is not None else []
        self.phases: list[dict[str, float]] = []

    def __call__(self, inputs: Inputs) -> Outputs:
        """One step. Returns losses, and gradients as the optimizers saw them."""
        found: Outputs = {}
        model = self.shared.policy.model

        def copy(*_: Any) -> None:
            found.update(update.gradients_of(model, self.models))

        trainer = self.trainer
        feed(trainer, self.case, inputs)
        optimizers = [trainer.policy_optimizer]
        if trainer.critic_optimizer is not None:
            optimizers.append(trainer.critic_optimizer.adamw)
        hooks = [optimizer.register_step_pre_hook(copy) for optimizer in optimizers]
        try:
            with self.ops():
                row = trainer.step(1, NoRun())
        finally:
            for hook in hooks:
                hook.remove()
        seconds = {name.removeprefix("timing_s/"): s for name, s in row.items() if name.startswith("timing_s/")}
        whole = seconds.pop("step")
        self.phases.append(seconds | {"rest": whole - sum(seconds.values())})
        losses = [row[f"critic/{m}/vf_loss"] for m in range(len(self.models))]
        found["loss"] = torch.tensor(row["actor/loss"], device=self.case.device)
        if losses:
            found["vf_loss"] = torch.tensor(losses, device=self.case.device)
        return {f"{self.algorithm} {name}": x for name, x in found.items()}

    def resident_bytes(self) -> int:
        """Bytes of weights and optimizer states, which are there before the step begins."""
        trainer, sampler = self.trainer, self.shared.sampler
        modules: list[nn.Module] = [self.shared.policy, *self.models]
        copy = getattr(getattr(sampler, "weights", None), "copy", None)
        modules += [copy] if copy is not None else []
        held: list[Tensor] = [p for module in modules for p in module.parameters()]
        optimizers = [trainer.policy_optimizer]
        if trainer.critic_optimizer is not None:
            optimizers.append(trainer.critic_optimizer.adamw)
        for optimizer in optimizers:
            held += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return nbytes(*held)


def _critics(case: Case, algorithm: Algorithm, stacked: bool) -> Any:
    from asyppo.models.critics import OneByOneCritics, StackedCritics

    models = update.value_models_of(case, algorithm)
    if stacked:
        return StackedCritics(models, dtype=case.dtype)
    return OneByOneCritics([on_device(case, model) for model in models], dtype=case.dtype)


def _stacked_triton(case: Case) -> Run:
    need_gpu(case)
    return Step(case, "asyppo")


def _stacked_torch(case: Case) -> Run:
    if case.device.type == "cuda":
        raise Absent("on a GPU the ops are Triton kernels")
    return Step(case, "asyppo")


def _one_by_one(case: Case) -> Run:
    return Step(case, "asyppo", stacked=False)


def _plain_stacked(case: Case) -> Run:
    return Step(case, "asyppo", ops=unfused)


def _plain(case: Case) -> Run:
    return Step(case, "asyppo", stacked=False, ops=unfused)


def _symmetric(case: Case) -> Run:
    return Step(case, "ppo")


def _grpo(case: Case) -> Run:
    return Step(case, "grpo")


for _op in (update.OP, train_step.OP):
    add(_op, Contender("asyppo (triton)", _stacked_triton))
    add(_op, Contender("asyppo (torch)", _stacked_torch))
    add(_op, Contender("one by one", _one_by_one))
    add(_op, Contender("plain torch, stacked critics", _plain_stacked))
    add(_op, Contender("plain torch", _plain))
    add(_op, Contender("symmetric PPO", _symmetric, required=update.answers("ppo")))
    add(_op, Contender("GRPO", _grpo, required=update.answers("grpo")))

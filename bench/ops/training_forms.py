"""The trainer itself: AsyPPO with stacked critics and one by one, with and without our ops; symmetric PPO; GRPO."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from asyppo.algorithm.advantage import critics_advantage
from asyppo.algorithm.ops import FUSED, Ops
from bench.cases import Case, Inputs, Outputs, Run, nbytes
from bench.ops.training import (
    CRITICS,
    Algorithm,
    answers,
    config_of,
    gradients_of,
    policy_model_of,
    value_models_of,
)
from bench.ops.unfused import UNFUSED
from bench.registry import Absent, Contender, add, need, need_gpu


class Shared:
    """What is the same for several contenders of a case, and there once: at full size it would not fit several times.

    ``critics`` are by algorithm and whether they are stacked, with their optimizer.
    """

    def __init__(self, case: Case) -> None:
        from asyppo.models.policy import Policy

        model = on_device(case, policy_model_of(case))
        self.policy = Policy(model, dtype=case.dtype)
        self.optimizer: Any = None
        self.critics: dict[tuple[Algorithm, bool], tuple[Any, Any]] = {}
        self.tokenizer = tokenizer_of(case.sizes["V"])
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


def tokenizer_of(vocabulary: int) -> Any:
    """A token is a word, its number; 0 pads. The end-of-sequence token lies beyond the model's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Not "0", which would be cut out of every number that has one.
    words = {"<pad>": 0} | {str(i): i for i in range(1, vocabulary)} | {"<eos>": vocabulary}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def reward(completions: list[str], **columns: object) -> list[float]:
    """The mean of the tokens' numbers modulo 7: no two responses need have the same."""
    return [sum(int(word) % 7 for word in text.split()) / max(1, len(text.split())) for text in completions]


def trainer_of(case: Case, algorithm: Algorithm, shared: Shared, *, stacked: bool = True, samples: bool = False) -> Any:
    """The trainer; models, optimizers and sampler are ``shared``'s. It has a sampler where it ``samples``."""
    from asyppo.rollout.samplers import make_sampler
    from asyppo.trainer import AsyPPOTrainer

    critics, critic_optimizer = shared.critics.get((algorithm, stacked), (None, None))
    if critics is None and CRITICS[algorithm]:
        critics = _critics(case, algorithm, stacked)

    config = config_of(case, algorithm)
    if samples and shared.sampler is None:
        shared.sampler = make_sampler(shared.policy, shared.tokenizer, config)
    trainer = AsyPPOTrainer(
        policy=shared.policy,
        critics=critics,
        tokenizer=shared.tokenizer,
        reward_funcs=[reward],
        train_dataset=[{"prompt": "1"}],
        config=config,
        sampler=shared.sampler if samples else NoSampler(),
    )
    shared.optimizer = shared.optimizer or trainer.policy_optimizer
    trainer.policy_optimizer = shared.optimizer
    if critics is not None:
        trainer.critic_optimizer = critic_optimizer or trainer.critic_optimizer
        shared.critics[algorithm, stacked] = critics, trainer.critic_optimizer
    return trainer


class Step:
    """Calls ``AsyPPOTrainer.step``, which goes through these ``ops``; remembers the seconds of each phase."""

    samples = False

    def __init__(
        self,
        case: Case,
        algorithm: Algorithm,
        *,
        stacked: bool = True,
        ops: Ops = FUSED,
    ) -> None:
        self.case, self.algorithm, self.ops = case, algorithm, ops
        self.shared = shared_by(case)
        self.trainer = trainer_of(case, algorithm, self.shared, stacked=stacked, samples=self.samples)
        if self.trainer.critics is not None:
            self.trainer.advantage = partial(critics_advantage, ops=ops)
        self.models = list(self.trainer.critics.models) if self.trainer.critics is not None else []
        self.phases: list[dict[str, float]] = []

    def prepare(self, inputs: Inputs) -> Any:
        """Return the batch that the step is on, as ``Sampled``; None: the step samples, from prompts set here."""
        raise NotImplementedError

    def __call__(self, inputs: Inputs) -> Outputs:
        """One step. Returns losses, and gradients as the optimizers saw them."""
        found: Outputs = {}
        model = self.shared.policy.model

        def copy(*_: Any) -> None:
            found.update(gradients_of(model, self.models))

        trainer = self.trainer
        self.shared.policy.ops = self.ops  # shared by contenders with ops of their own
        if trainer.critics is not None:
            trainer.critics.ops = self.ops
        sampled = self.prepare(inputs)
        optimizers = [trainer.policy_optimizer]
        if trainer.critic_optimizer is not None:
            optimizers.append(trainer.critic_optimizer.adamw)
        hooks = [optimizer.register_step_pre_hook(copy) for optimizer in optimizers]
        try:
            row = trainer.step(1, sampled).metrics
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

    models = value_models_of(case, algorithm)
    if stacked:
        return StackedCritics(models, dtype=case.dtype)
    return OneByOneCritics([on_device(case, model) for model in models], dtype=case.dtype)


def add_all(op: str, make: type[Step]) -> None:
    """Register every form of the trainer's step as a contender of ``op``."""

    def ours_in_triton(case: Case) -> Run:
        need_gpu(case)
        return make(case, "asyppo")

    def ours_in_torch(case: Case) -> Run:
        if case.device.type == "cuda":
            raise Absent("on a GPU the ops are Triton kernels")
        return make(case, "asyppo")

    add(op, Contender("asyppo (triton)", ours_in_triton))
    add(op, Contender("asyppo (torch)", ours_in_torch))
    add(op, Contender("one by one", lambda case: make(case, "asyppo", stacked=False)))
    add(op, Contender("plain torch, stacked critics", lambda case: make(case, "asyppo", ops=UNFUSED)))
    add(op, Contender("plain torch", lambda case: make(case, "asyppo", stacked=False, ops=UNFUSED)))
    add(op, Contender("symmetric PPO", lambda case: make(case, "ppo"), required=answers("ppo")))
    add(op, Contender("GRPO", lambda case: make(case, "grpo"), required=answers("grpo")))

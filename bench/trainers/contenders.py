"""The trainers, each in this process: build one, let it train, and say what each step took."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bench.ops.training_forms import tokenizer_of
from bench.trainers.cases import OURS, PEER, Reward, TrainerCase, model_of, parameters, policy_of, rows_of

CRITICS = 2


class Watch(TrainerCallback):
    """CPU seconds of this process from the end of one step to the end of the next, tokens of the responses, and peak
    memory. The step before the first that counts has it warmed up: ``steps`` are those after it."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.last = reward, 0.0
        self.steps: list[dict[str, float]] = []
        self.tokens = 0
        self.peak = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **models: Any) -> None:
        """Of both trainers."""
        now = time.process_time()
        if state.global_step > 1:
            self.steps.append({"whole": now - self.last, "tokens": self.reward.tokens - self.tokens})
        self.peak = peak_bytes()
        self.tokens, self.last = self.reward.tokens, time.process_time()


def peak_bytes() -> int:
    """Most memory that this process has had since ``forget_peak``."""
    return _status("VmHWM")


def forget_peak() -> int:
    """Start the peak anew, and return what the process holds."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def ours(case: TrainerCase, algorithm: str, steps: int) -> dict[str, Any]:
    """``AsyPPOTrainer``: ``grpo``, or ``asyppo`` with two critics."""
    from asyppo import AsyPPOConfig, AsyPPOTrainer
    from asyppo.config import CriticConfig, DataConfig
    from asyppo.models.critics import StackedCritics
    from asyppo.run.progress import Timer

    Timer.clock = staticmethod(time.process_time)
    tokenizer, rows, reward = tokenizer_of(case.vocabulary), rows_of(case), Reward()
    watch, held = Phases(reward), forget_peak()
    critics = None
    if algorithm == "asyppo":
        models = [model_of(case, case.critic, 1 + m, "ForTokenClassification") for m in range(CRITICS)]
        critics = StackedCritics(models)
    with tempfile.TemporaryDirectory() as directory:
        config = AsyPPOConfig(
            algorithm=algorithm,
            critic=CriticConfig(num_critics=CRITICS),
            data=DataConfig(eval_size=0),
            prompts_per_step=case.prompts,
            num_generations=case.generations,
            max_completion_length=case.completion,
            max_steps=1 + steps,
            num_mini_batches=1,
            entropy_coef=0.0 if algorithm == "grpo" else 1e-3,
            log_completions=False,
            device="cpu",
            output_dir=directory,
        )
        policy = policy_of(case)
        trainer = AsyPPOTrainer(
            policy=policy,
            critics=critics,
            tokenizer=tokenizer,
            reward_funcs=[reward],
            train_dataset=rows,
            config=config,
            callbacks=[watch],
        )
        trainer.train()
    sizes = {"policy": parameters(policy)} | ({} if critics is None else {"critics": parameters(critics)})
    return {"steps": watch.steps, "parameters": sizes, "peak_bytes": watch.peak - held}


class Phases(Watch):
    """Of ours, with the phases that its rows of metrics have."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **models: Any) -> None:
        """The row of the step that has just ended."""
        if state.global_step > 1:
            seconds = {name[9:]: s for name, s in logs.items() if name.startswith("timing_s/")}
            self.steps[-1] |= {name: s for name, s in seconds.items() if name != "step"}


def trl(case: TrainerCase, steps: int) -> dict[str, Any]:
    """TRL's ``GRPOTrainer``, in float32 as ours is on a CPU."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        """With the time at which a step has its responses, and that of making them."""

        generating = sampled_at = 0.0

        def _generate(self, *arguments: Any) -> Any:
            start = time.process_time()
            try:
                return super()._generate(*arguments)
            finally:
                self.generating = time.process_time() - start

        def _generate_and_score_completions(self, *arguments: Any) -> Any:
            try:
                return super()._generate_and_score_completions(*arguments)
            finally:
                self.sampled_at = time.process_time()

    class Updates(Watch):
        """With generation, and the update from there to the optimizer's end."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **models: Any) -> None:
            """Before ``on_step_end``, where the step is counted."""
            self.update = time.process_time() - trainer.sampled_at

        def on_step_end(self, args: Any, state: Any, control: Any, **models: Any) -> None:
            """As Watch, then."""
            super().on_step_end(args, state, control, **models)
            if state.global_step > 1:
                self.steps[-1] |= {"gen": trainer.generating, "update_actor": self.update}

    tokenizer, rows, reward = tokenizer_of(case.vocabulary), rows_of(case), Reward()
    watch, held = Updates(reward), forget_peak()
    with tempfile.TemporaryDirectory() as directory:
        at_once: dict[str, Any] = {"per_device_train_batch_size": case.responses, "gradient_checkpointing": False}
        if case.ragged:  # by default 8 at once, with layers' states computed again
            at_once = {"gradient_accumulation_steps": max(1, case.responses // 8)}
        config = GRPOConfig(
            output_dir=directory,
            num_generations=case.generations,
            max_completion_length=case.completion,
            max_steps=1 + steps,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **at_once,
        )
        policy = policy_of(case)
        trainer = Timed(
            model=policy,
            processing_class=tokenizer,
            reward_funcs=[reward],
            train_dataset=Dataset.from_list(rows),
            args=config,
            callbacks=[watch],
        )
        trainer.train()
    return {"steps": watch.steps, "parameters": {"policy": parameters(policy)}, "peak_bytes": watch.peak - held}


def measure(case: TrainerCase, contender: str, steps: int) -> dict[str, Any]:
    """Steps, sizes and peak memory of one, in this process, with one thread."""
    torch.set_num_threads(1)
    if contender == PEER:
        return trl(case, steps)
    return ours(case, "asyppo" if contender == OURS else "grpo", steps)

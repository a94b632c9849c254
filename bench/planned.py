"""What ``asyppo plan`` says of each phase of a step, beside the most that there was.

On a GPU (``python -m bench.gpu_check --step plan``) torch's allocator says what there was; on a CPU the tests count
storages. Both run the same steps, of models made from a configuration, loaded as a run loads them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForTokenClassification

from asyppo.cli.plan import estimate, make_plan
from asyppo.config import AsyPPOConfig, CriticConfig, PolicyConfig
from asyppo.models import offload
from asyppo.run.progress import Timer
from asyppo.trainer import AsyPPOTrainer
from bench.environment import environment, slug
from bench.results import RESULTS

Peaks = Callable[[], AbstractContextManager[Callable[[], Mapping[str, int]]]]
"""Inside, the most bytes on the device are noted of each phase, as the trainer's timer calls it; what it gives returns
them."""

PHASES = {
    "generation": ["gen"],
    "log-probs": ["old_log_prob", "ref"],
    "critic update": ["update_critic"],
    "values": ["values"],
    "policy update": ["update_actor"],
}
"""Of the plan, as the trainer's timer calls them."""


@dataclass(frozen=True)
class Size:
    """Of the models and of a step; policy and critics have one shape."""

    shape: dict[str, int]
    prompt: int
    response: int
    """Tokens, at the most."""
    generations: int
    """Responses to each of two prompts."""
    rows: int
    """Responses of a micro-batch: two micro-batches or more are an update, so that gradients of one are there while the
    other goes forward."""
    lot: int
    """``offload.LOT_BYTES``."""


SMALL = Size(
    {
        "vocab_size": 1000,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
    },
    prompt=8,
    response=32,
    generations=4,
    rows=4,
    lot=2**18,
)
MEDIUM = Size(
    {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 3072,
    },
    prompt=64,
    response=192,
    generations=32,
    rows=32,
    lot=2**26,
)


@dataclass(frozen=True)
class Case:
    """Settings of a run."""

    policy: dict[str, Any] = field(default_factory=dict)
    critic: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)

    def config(self, size: Size, directory: Path) -> AsyPPOConfig:
        """Return them, for the models in ``directory``."""
        common: dict[str, Any] = {
            "prompts_per_step": 2,
            "num_generations": size.generations,
            "max_completion_length": size.response,
            "max_tokens_per_micro_batch": size.rows * (size.prompt + size.response),
            "num_mini_batches": 1,
            "old_per_token_logps": "compute",
            "sampler": "generate",
            "generation_batch_size": 2 * size.generations,
        }
        policy = {"packing": False, "dtype": "bfloat16", "model_name_or_path": str(directory / "policy")}
        critic = {"num_mini_batches": 1, "model_name_or_path": str(directory / "critic")}
        return AsyPPOConfig(
            **common | self.own,
            policy=PolicyConfig(**policy | self.policy),
            critic=CriticConfig(**critic | self.critic),
        )


ADAPTED = {"use_peft": True, "lora_r": 2}
CASES = {
    "float32": Case({"dtype": "float32"}),
    "bfloat16": Case(),
    "checkpointing": Case({"gradient_checkpointing": True}, {"gradient_checkpointing": True}),
    "offload": Case({"dtype": "float32"}, own={"offload": "optimizer", "beta": 0.1}),
    "8-bit moments": Case(own={"optim": "adamw_8bit"}),
    # What is trained is little, and what is kept in a pass most of what is there.
    "LoRA": Case(ADAPTED, {"lora_r": 4}),
    "QLoRA": Case(ADAPTED | {"load_in_4bit": True}, {"lora_r": 4, "load_in_4bit": True}),
}
ON_A_GPU = {name: case for name, case in CASES.items() if name != "float32"} | {
    "offload": Case(own={"offload": "optimizer", "beta": 0.1})
}
"""As one trains there."""


@contextmanager
def saved_models(size: Size) -> Iterator[Path]:
    """Give a directory of a policy and a critic, for the time inside."""
    torch.manual_seed(0)
    text = size.shape | {"tie_word_embeddings": True, "max_position_embeddings": 2 * (size.prompt + size.response)}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    with TemporaryDirectory() as folder:
        for name, kind in (("policy", Qwen3ForCausalLM), ("critic", Qwen3ForTokenClassification)):
            more = {} if name == "policy" else {"num_labels": 1, "classifier_dropout": 0.0}
            kind(Qwen3Config(**text, **tokens, **more)).save_pretrained(Path(folder) / name)
            words(size).save_pretrained(Path(folder) / name)
        yield Path(folder)


def words(size: Size) -> PreTrainedTokenizerFast:
    """A tokenizer of a word each."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(size.shape["vocab_size"] - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def measured(config: AsyPPOConfig, size: Size, peaks: Peaks) -> dict[str, int]:
    """Return the most bytes on the device in each phase of a step that has moments already."""
    rows = [{"prompt": " ".join(f"w{size.prompt * i + j}" for j in range(size.prompt))} for i in range(8)]
    with peaks() as noted, patch.object(offload, "LOT_BYTES", size.lot):
        trainer = AsyPPOTrainer(
            policy=config.policy.model_name_or_path,
            critics=config.critic.model_name_or_path,
            reward_funcs=[_lengths],
            train_dataset=rows,
            config=config,
        )
        assert trainer.critic_optimizer is not None
        for optimizer in (trainer.policy_optimizer, trainer.critic_optimizer.adamw):
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            trainer.offload.step(optimizer)
            optimizer.zero_grad()
        trainer.step(1)
        trainer.offload.recall()
        found = noted()
        return {phase: max(found[name] for name in names if name in found) for phase, names in PHASES.items()}


def planned(config: AsyPPOConfig, size: Size, device: str) -> dict[str, int]:
    """Return the bytes that the plan has of each phase."""
    with patch.object(estimate, "LOT_BYTES", size.lot):
        phases = make_plan(config, prompt_length=size.prompt, device=device).phases
    return {name: sum(parts.values()) for name, parts in phases.items()}


@contextmanager
def peaks_of_the_allocator() -> Iterator[Callable[[], Mapping[str, int]]]:
    """As ``Peaks``: ``torch.cuda.max_memory_allocated`` of each phase, what was there before apart."""
    for dtype in (torch.float32, torch.bfloat16):  # so that cuBLAS has its workspaces
        torch.ones(64, 64, device="cuda", dtype=dtype).mm(torch.ones(64, 64, device="cuda", dtype=dtype))
    gc.collect()
    torch.cuda.empty_cache()
    before, timed = torch.cuda.memory_allocated(), Timer.phase
    found: dict[str, int] = {}
    under_way: list[str] = []

    def note() -> None:
        torch.cuda.synchronize()
        for name in under_way:
            found[name] = max(found.get(name, 0), torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def phase(timer: Timer, name: str) -> Iterator[None]:
        note()
        under_way.append(name)
        try:
            with timed(timer, name):
                yield
        finally:
            note()
            under_way.remove(name)

    with patch.object(Timer, "phase", phase):
        yield lambda: found


Rows = dict[str, dict[str, tuple[int, int]]]
"""Of each case and phase: what is planned, and what was measured."""


def compared(size: Size, cases: Mapping[str, Case], device: str, peaks: Peaks) -> Rows:
    """Run ``cases``, and print each once it is there."""
    rows: Rows = {}
    print("plan over measured  " + "  ".join(f"{phase:>20}" for phase in PHASES), flush=True)
    with saved_models(size) as directory:
        for name, case in cases.items():
            config = case.config(size, directory)
            plan, found = planned(config, size, device), measured(config, size, peaks)
            gc.collect()
            rows[name] = {phase: (plan[phase], found[phase]) for phase in PHASES}
            cells = (f"{a / b:.2f} of {b / 2**20:,.0f} MiB" for a, b in rows[name].values())
            print(f"{name:18}  " + "  ".join(f"{cell:>20}" for cell in cells), flush=True)
    return rows


def run() -> None:
    """Compare on a GPU, and write what came of it beside the results."""
    about, cases = environment(torch.device("cuda")), dict(ON_A_GPU)
    if find_spec("bitsandbytes") is None:
        print("without bitsandbytes: no 8-bit moments, no QLoRA")
        del cases["8-bit moments"], cases["QLoRA"]
    rows = compared(MEDIUM, cases, "cuda", peaks_of_the_allocator)
    written = {
        name: {phase: {"plan": a, "measured": b, "ratio": a / b} for phase, (a, b) in of.items()}
        for name, of in rows.items()
    }
    commit = (about["commit"] or "unknown")[:7]
    path = RESULTS / "plan" / f"{about['date'][:10]}-{slug(about['device']['name'])}-{commit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "size": vars(MEDIUM), "cases": written}, indent=1) + "\n")
    print(f"written: {path}")

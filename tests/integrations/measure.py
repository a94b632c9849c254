"""``python tests/integrations/measure.py trl|verl|openrlhf|prime-rl|slime``: a trainer's numbers without and with the
ops, by its own code, into the table of docs/integrations.md.

Run it with the Python of an environment that has the trainer. prime-rl and slime have no package; theirs take the path
of a clone, ``measure.py prime-rl ../prime-rl``, run the file of it that the lines on the page take the place of, and
take the lines from the page.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
Numbers = dict[str, Tensor]
HEAD = "| | without | with | largest difference |\n|---|--:|--:|--:|"


def trl() -> tuple[str, Numbers, Numbers]:
    """Two steps of GRPO on one batch, with a KL term and an entropy bonus."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from asyppo_kernels.integrations import trl as integration

    example = loaded(ROOT / "examples" / "trl_grpo_linear_logprob.py", "example")

    def step() -> Numbers:
        torch.manual_seed(0)
        tokenizer = example.make_tokenizer()
        with tempfile.TemporaryDirectory() as folder:
            arguments = GRPOConfig(
                output_dir=folder, max_steps=2, num_iterations=2, learning_rate=0.1, optim="sgd", beta=0.05,
                entropy_coef=0.01, per_device_train_batch_size=8, num_generations=4, max_completion_length=10,
                temperature=0.7, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
                bf16=False,
                model_init_kwargs={"dtype": "float32"},
            )  # fmt: skip
            example.make_model(tokenizer).save_pretrained(folder)  # TRL loads its reference by the model's path
            trainer = GRPOTrainer(
                model=folder,
                reward_funcs=lambda completions, **_: [float(sum(map(ord, c)) % 7) for c in completions],
                args=arguments,
                train_dataset=Dataset.from_dict({"prompt": ["a", "bcd", "efghij", "klm"]}),
                processing_class=tokenizer,
            )
            trainer.train()
        rows = trainer.state.log_history[:2]
        names = ("loss", "entropy", "kl", "grad_norm")
        return {f"{name}, two steps": torch.tensor([row[name] for row in rows]) for name in names}

    return f"TRL {version('trl')}, torch {version('torch')}, CPU", *twice(step, integration)


def verl() -> tuple[str, Numbers, Numbers]:
    """A policy's loss with the fused head of a model that verl patched, and the advantages of its trainer."""
    import verl_numbers

    from asyppo_kernels.integrations import verl as integration

    def step() -> Numbers:
        mask = verl_numbers.batch()["response_mask"].bool()
        done = verl_numbers.advantages()
        return verl_numbers.policy_step(0.1) | {name: x[mask] for name, x in done.items()}

    return f"verl {version('verl')}, torch {version('torch')}, CPU", *twice(step, integration)


def openrlhf() -> tuple[str, Numbers, Numbers]:
    """Advantages of a batch of experiences."""
    import openrlhf_numbers

    from asyppo_kernels.integrations import openrlhf as integration

    def step() -> Numbers:
        mask = openrlhf_numbers.batch()["action_mask"]
        return {name: x[mask] for name, x in openrlhf_numbers.advantages().items()}

    return f"OpenRLHF {version('openrlhf')}, torch {version('torch')}, CPU", *twice(step, integration)


def prime_rl(clone: Path) -> tuple[str, Numbers, Numbers]:
    """The fused head's outputs and the gradient of the log-probs; theirs has none of the entropy."""
    for name, names in (("utils.logger", ("get_logger",)), ("utils.vlm", ("get_final_logit_softcapping",))):
        stand_in(f"prime_rl.{name}", names)
    file = clone / "src/prime_rl/trainer/models/layers/lm_head.py"
    module = loaded(file, "prime_rl.trainer.models.layers.lm_head")

    def step() -> Numbers:
        torch.manual_seed(0)
        head = module.FusedOutputLinear(32, 199, chunk_size=4)
        hidden = torch.randn(2, 7, 32, requires_grad=True)
        temperature = torch.rand(2, 7) + 0.5
        out = head(hidden, torch.randint(199, (2, 7)), temperature)
        gradients = torch.autograd.grad(out["logprobs"].square().sum(), (hidden, head.weight))
        return {
            "log-prob": out["logprobs"].detach(),
            "entropy": out["entropy"].detach(),
            **dict(zip(("gradient of hidden", "gradient of the head"), gradients, strict=True)),
        }

    without = step()
    exec(lines_of("prime-rl"), {})
    return f"prime-rl {revision(clone)}, torch {version('torch')}, CPU", without, step()


def slime(clone: Path) -> tuple[str, Numbers, Numbers]:
    """Advantages and returns of a batch whose rewards have a KL penalty, without context parallelism."""
    stand_in("megatron.core", ("mpu",))
    sys.modules["megatron.core"].mpu = SimpleNamespace(get_context_parallel_world_size=lambda: 1)
    module = loaded(clone / "slime/utils/ppo_utils.py", "slime_ppo_utils")
    torch.manual_seed(0)
    lengths = [9, 4, 7, 1]
    kl, values = ([torch.randn(n) for n in lengths] for _ in range(2))
    args = SimpleNamespace(kl_coef=0.1, gamma=0.99, lambd=0.9)
    data = {"values": values, "kl": kl, "rewards": [0.5, -1.0, 2.0, 1.0], "response_lengths": lengths}

    rewards = [-args.kl_coef * x for x in kl]
    for reward, last in zip(rewards, data["rewards"], strict=True):
        reward[-1] += last
    theirs = module.get_advantages_and_returns_batch(lengths, lengths, values, rewards, args.gamma, args.lambd)
    names: dict[str, Any] = {}
    exec(lines_of("slime"), names)
    names["gae"](args, data)
    ours = (data["advantages"], data["returns"])
    assert [len(x) for x in ours[0]] == lengths
    done = [{"advantages": torch.cat(list(each[0])), "returns": torch.cat(list(each[1]))} for each in (theirs, ours)]
    return f"slime {revision(clone)}, torch {version('torch')}, CPU", *done


def twice(step: Callable[[], Numbers], integration: ModuleType) -> tuple[Numbers, Numbers]:
    """What ``step`` gives without and with the integration."""
    without = step()
    integration.enable()
    try:
        return without, step()
    finally:
        integration.disable()


def loaded(path: Path, name: str) -> ModuleType:
    """Import a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def stand_in(place: str, names: tuple[str, ...]) -> None:
    """Make a module that has ``names``, and the packages above it."""
    parts = place.split(".")
    for depth in range(1, len(parts) + 1):
        module = sys.modules.setdefault(".".join(parts[:depth]), ModuleType(parts[depth - 1]))
        module.__path__ = []
    for name in names:
        setattr(module, name, None)


def lines_of(trainer: str) -> str:
    """The lines to copy that the page has for a trainer."""
    found = re.search(rf"^## {trainer}\n.*?^```\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert found is not None
    return found[1]


def revision(clone: Path) -> str:
    """What git calls the clone's commit, and the commit."""
    git = ["git", "-C", str(clone)]
    words = (["describe", "--tags"], ["rev-parse", "--short", "HEAD"])
    described, commit = (subprocess.check_output([*git, *each], text=True).strip() for each in words)
    return f"{described} ({commit})"


def table(stamp: str, without: Numbers, with_ops: Numbers) -> str:
    """Root mean squares, and the largest difference of an element."""

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    rows = [
        f"| {name} | {rms(want):.6f} | {rms(with_ops[name]):.6f} | {(with_ops[name] - want).abs().max():.1e} |"
        for name, want in without.items()
    ]
    return "\n".join([f"{stamp}; root mean squares over elements.", "", HEAD, *rows])


def write(name: str, text: str) -> None:
    """Put a table where the page has its markers."""
    begin, end = f"<!-- {name}: begin, written by python tests/integrations/measure.py -->", f"<!-- {name}: end -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(prog="python tests/integrations/measure.py", description=__doc__)
    parser.add_argument("trainer", choices=("trl", "verl", "openrlhf", "prime-rl", "slime"))
    parser.add_argument("clone", type=Path, nargs="?", help="of prime-rl or slime")
    given = parser.parse_args()
    measure = globals()[given.trainer.replace("-", "_")]
    write(given.trainer, table(*(measure(given.clone) if given.clone else measure())))


if __name__ == "__main__":
    main()

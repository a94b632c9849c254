"""One rank of the multi-process tests: ``distributed_rank.py FOLDER``, alone or under torchrun.

Trains tiny models on scripted responses and saves, on rank 0, what came of it: ``FOLDER/{case}.pt``.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForTokenClassification

import asyppo.trainer
from asyppo.algorithm.advantage import LearningSignal
from asyppo.checkpoint import Trained, _state, load_checkpoint
from asyppo.config import (
    AsyPPOConfig,
    CriticConfig,
    DistributedConfig,
    EnvironmentConfig,
    MonteCarloConfig,
    PolicyConfig,
    SideConfig,
)
from asyppo.distributed.processes import leave, make_mesh, processes, rank
from asyppo.distributed.sharding import shard
from asyppo.loop import TrainingLoop
from asyppo.models.adapters import add_lora
from asyppo.models.critics import Critics, LoraCritics, make_critics
from asyppo.models.critics.inputs import PolicyInputs
from asyppo.models.loading import critics_of, policy_of
from asyppo.models.optimizers import make_optimizer
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import Response
from asyppo.run.directory import open_run
from asyppo.run.progress import Timer
from asyppo.run.rng import generator_states
from asyppo.trainer import AsyPPOTrainer

sys.path.append(str(Path(__file__).parents[2]))
from tests.trainer.accounting import HOST, accounting

CHARACTERS = "abcdefghijklmnop"
PAD, EOS = 0, 1
PROMPTS = [
    "ab",
    "cdefg",
    "h",
    "ijkl",
    "mno",
    "pab",
    "acegik",
    "bd",
    "lk",
    "fff",
    "gop",
    "dcba",
    "ehk",
    "npa",
    "bbc",
    "oj",
]


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def shape(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(CHARACTERS) + 3,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    } | changes


def policy(
    dtype: torch.dtype = torch.float32, *, lora: bool = False, gradient_checkpointing: bool = False, **changes: Any
) -> Policy:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape(**changes)))
    if lora:
        add_lora(model, r=2, alpha=4, target_modules=None)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # so that the adapters do something
                torch.nn.init.normal_(parameter, std=0.1)
    return Policy(model, dtype=dtype, gradient_checkpointing=gradient_checkpointing)


def critic(seed: int, **changes: Any) -> Qwen3ForTokenClassification:
    torch.manual_seed(seed)
    config = Qwen3Config(**shape(num_labels=1, **changes))
    config.classifier_dropout = 0.0
    return Qwen3ForTokenClassification(config)


@dataclass
class Scripted:
    """A response that follows from the prompt and from which response to it it is, wherever it is sampled."""

    longest: int

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        seen: dict[tuple, int] = {}
        return [self._response(tuple(prompt.tolist()), seen) for prompt in prompts]

    def _response(self, prompt: tuple[int, ...], seen: dict[tuple, int]) -> Response:
        which = seen[prompt] = seen.get(prompt, -1) + 1
        generator = torch.Generator().manual_seed(1000 * sum(prompt) + 10 * len(prompt) + which)
        length = 1 + int(torch.randint(self.longest, (), generator=generator))
        tokens = torch.randint(3, 3 + len(CHARACTERS), (length,), generator=generator)
        if which % 4 < 3:
            tokens[-1] = EOS
        return Response(tokens, -torch.rand(length, generator=generator), truncated=int(tokens[-1]) != EOS)


def likes_a(completions: list[str], **_: Any) -> list[float]:
    return [c.count("a") + 0.1 * len(c) for c in completions]


class Answers:
    """An environment that answers by chance, which follows from its seed, and stays on one rank."""

    def reset(self, seed: int) -> None:
        self.random, self.left, self.here = Random(seed), 3, rank()

    def step(self, action: str) -> tuple[str, float, bool]:
        assert self.here == rank()
        self.left -= 1
        return self.random.choice(CHARACTERS) * self.random.randint(0, 3), self.random.random(), self.left == 0


def make_config(**fields: Any) -> AsyPPOConfig:
    critics = {"learning_rate": 1e-2, "num_mini_batches": 2} | fields.pop("critic", {})
    defaults = {
        "prompts_per_step": 5,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_tokens_per_micro_batch": 60,
        "learning_rate": 1e-2,
        "num_mini_batches": 3,
        "entropy_coef": 0.01,
        # With 0.2 two tokens of equal σ, up to rounding, would lie on either side of the threshold.
        "advantage_mask_fraction": 0.15,
        "entropy_filter_fraction": 0.15,
    }
    return AsyPPOConfig(**(defaults | fields), critic=CriticConfig(**critics))


def make_critics_of(config: AsyPPOConfig, dtype: torch.dtype) -> Critics | None:
    if not config.num_critics or config.critic.kind == "side":  # those are the trainer's to make
        return None
    models = [critic(10 + m) for m in range(config.num_critics)]
    rank = config.critic.lora_r
    if not rank:
        return make_critics(models, config.critic, dtype=dtype)
    names = config.critic.policy_inputs
    inputs = [PolicyInputs(names, models[0].config.hidden_size) for _ in models] if names else []
    heads = [model.score for model in models]
    critics = LoraCritics(models[0], heads, r=rank, alpha=4, dtype=dtype, inputs=inputs)
    for name, parameter in critics.trained_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return critics


def make_trainer(config: AsyPPOConfig, mesh: DeviceMesh | None, **kw: Any) -> AsyPPOTrainer:
    config = replace(config, critic=replace(config.critic, stacked=kw.pop("stacked", True)))
    dtype = kw.pop("dtype", torch.float32)
    return AsyPPOTrainer(
        policy=policy(dtype, **kw.pop("policy", {})),
        critics=make_critics_of(config, dtype),
        tokenizer=tokenizer(),
        reward_funcs=[likes_a],
        train_dataset=[{"prompt": text} for text in PROMPTS],
        config=config,
        mesh=mesh,
        **kw,
    )


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def weights(trainer: AsyPPOTrainer) -> dict[str, Tensor]:
    trainer.offload.recall()
    found = whole(trainer.policy)
    for m, model in enumerate(trainer.critics.models if trainer.critics is not None else ()):
        found |= {f"critic_{m}.{name}": value for name, value in whole(model).items()}
    return found


def train(config: AsyPPOConfig, mesh: DeviceMesh | None, steps: int = 2, **kw: Any) -> dict[str, Any]:
    """Metrics of ``steps`` steps, signals, and weights after them."""
    agrees = kw.pop("sampler_agrees", False)
    longest = config.environment.max_turn_length or config.max_completion_length
    trainer = make_trainer(config, mesh, sampler=Scripted(longest), **kw)
    trainer.sampler_agrees = agrees
    signals: list[LearningSignal] = []
    update = trainer.update_policy

    def spy(batch: Any, signal: LearningSignal, *rest: Any) -> dict[str, float]:
        signals.append(signal)
        return update(batch, signal, *rest)

    trainer.update_policy = spy  # type: ignore[method-assign]
    rows = [trainer.step(step).metrics for step in range(1, steps + 1)]
    return {"rows": rows, "signals": [vars(s) for s in signals], "weights": weights(trainer)}


class Collectives(TorchDispatchMode):
    """Counts collective operations by name while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def collectives(mesh: DeviceMesh | None) -> dict[str, Any]:
    """How many collectives each phase of a step takes."""
    trainer = make_trainer(make_config(beta=0.1, max_tokens_per_micro_batch=10_000), mesh)
    trainer.step(1)
    counts: dict[str, Counter[str]] = {}

    class CountingTimer(Timer):
        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            with Collectives() as mode:
                yield
            counts[name] = mode.counts

    asyppo.trainer.Timer = CountingTimer  # type: ignore[misc]
    with suppress(KeyError):  # it has counted no time
        trainer.step(2)
    asyppo.trainer.Timer = Timer  # type: ignore[misc]
    return counts


def generate(mesh: DeviceMesh | None) -> list[dict[str, float]]:
    """Metrics of two steps on responses that the policy samples; every rank's are of lengths of their own."""
    trainer = make_trainer(make_config(max_completion_length=20), mesh)
    return [trainer.step(step).metrics for step in (1, 2)]


def save(mesh: DeviceMesh | None, folder: Path) -> dict[str, Any]:
    """Save a checkpoint after a step, and return what the next one comes to, with the weights that were saved."""
    config = make_config(output_dir=str(folder), run_name="run", report_to=[])
    trainer = make_trainer(config, mesh, sampler=Scripted(12), policy={"tie_word_embeddings": True})
    with open_run(config) as run:
        run.start(0)
        trainer.step(1)
        saved = weights(trainer)
        TrainingLoop(trainer).save(run, 1)
    row = trainer.step(2).metrics
    return {"rows": [row], "signals": [], "weights": weights(trainer), "saved": saved}


def save_in_background(mesh: DeviceMesh | None, folder: Path) -> None:
    """Save one state at once and in the background of two steps, which compute in bfloat16: ``folder/at-once`` and
    ``folder/background``."""
    config = make_config(output_dir=str(folder), run_name="at-once", report_to=[])
    trainer = make_trainer(config, mesh, sampler=Scripted(12), dtype=torch.bfloat16, stacked=False)
    trainer.step(1)
    with open_run(config) as run, open_run(replace(config, run_name="background")) as other:
        loop = TrainingLoop(trainer)
        loop.save(run, 1)
        loop.save(other, 1, wait=False)
        for step in (2, 3):
            trainer.step(step)
            loop.finish_saving(wait=False)
        loop.save(other, 3, wait=False)
        loop.finish_saving()
        loop.writer.close()


def load(mesh: DeviceMesh | None, checkpoint: Path) -> dict[str, Any]:
    """Go on from a checkpoint of ``save``."""
    trainer = make_trainer(make_config(), mesh, sampler=Scripted(12), policy={"tie_word_embeddings": True})
    assert load_checkpoint(checkpoint, trainer.trained())["step"] == 1
    row = trainer.step(2).metrics
    return {"rows": [row], "signals": [], "weights": weights(trainer)}


def moments(mesh: DeviceMesh | None, folder: Path, rows: int) -> dict[str, Any]:
    """Steps with moments in 8 bits, one of them of a weight [``rows``, 64]: three from the start, which are saved in
    ``folder``, or none, if there is a checkpoint, which is loaded; the weights then, and after one more."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, rows))
    if mesh is not None:
        shard(net, [], mesh, torch.float32)
    optimizer = make_optimizer(list(net.parameters()), "adamw_8bit", learning_rate=1e-2, weight_decay=0.1)
    trained: Trained = {"net": (net, optimizer)}

    def step(number: int) -> None:
        torch.manual_seed(number)
        for p in net.parameters():
            gradient = torch.randn(p.shape)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        optimizer.step()

    if folder.exists():
        load_checkpoint(folder, trained)
    else:
        for number in (1, 2, 3):
            step(number)
        dcp.save(_state(trained), checkpoint_id=folder / "state", no_dist=mesh is None)
        (folder / "trainer_state.json").write_text('{"step": 3}')
        (folder / "rng.json").write_text(json.dumps(generator_states()))
    saved = whole(net)
    step(4)
    return {"saved": saved, "weights": whole(net)}


def write_models(folder: Path) -> None:
    """Models to load by name: in one file and in many, tied and not, without a value head and with one; adapters."""
    changes = {"vocab_size": 23, "intermediate_size": 34, "num_hidden_layers": 8}  # odd, to be cut unevenly
    for seed, (name, tied, files) in enumerate([("untied", False, "8KB"), ("tied", True, "5GB")]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**shape(tie_word_embeddings=tied, **changes)))
        model.bfloat16().save_pretrained(folder / name, max_shard_size=files)
    critic(3).save_pretrained(folder / "critic")
    add_lora(model.float(), r=2, alpha=4, target_modules=None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.name_or_path = model.peft_config["default"].base_model_name_or_path = str(folder / "tied")
    model.save_pretrained(folder / "adapter")
    for path in folder.iterdir():
        tokenizer().save_pretrained(path)


def load_by_name(mesh: DeviceMesh | None, folder: Path) -> dict[str, Any]:
    """Weights of models that are loaded by name, and the most that a rank had of them at once, of their bytes."""
    lora = PolicyConfig(use_peft=True, lora_r=2, lora_alpha=4, dtype="bfloat16")
    variants: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "stacked": ("untied", "tied", {"beta": 0.1}),
        "a checkpoint each": ("tied", ["tied", "tied"], {"critic": {"policy_inputs": ["entropy"]}}),
        "one by one": ("tied", "critic", {"critic": {"stacked": False, "gradient_checkpointing": True}}),
        "adapters": ("untied", "tied", {"policy": lora, "critic": {"lora_r": 2}}),
        "saved adapters": ("adapter", "critic", {"critic": {"lora_r": 2}}),
    }
    found = {}
    for variant, (policy_name, critic_names, fields) in variants.items():
        torch.manual_seed(0)
        config, sharded = make_config(**fields), mesh is not None
        names = str(folder / critic_names) if isinstance(critic_names, str) else [str(folder / n) for n in critic_names]
        with accounting("meta") as accounts, accounts.phase("load"):
            made = policy_of(str(folder / policy_name), config, sharded=sharded)
            reference = made.reference() if config.beta else None
            models: dict[str, Any] = {"policy": made, "reference": reference}
            models["critics"] = critics_of(names, config, made, sharded=sharded)
            for model in models.values():
                if model is not None and mesh is not None:
                    model.shard(mesh)
        weights = {
            f"{name}.{key}": weight
            for name, model in models.items()
            if model is not None
            for key, weight in whole(model).items()
        }
        peak, size = accounts.peak["load"][HOST], sum(weight.nbytes for weight in weights.values())
        found[variant] = {"weights": weights, "drawn next": torch.rand(3), "peak": peak / size}
    return found


def qlora(mesh: DeviceMesh | None, models: Path, folder: Path) -> dict[str, Any]:
    """Two steps of adapters on ``models`` in 4 bits, with a checkpoint after the first in ``folder``; the second again
    from there; what a sampler with weights of its own is sent; and metrics of a step on responses of the policy's."""
    config = make_config(
        policy=PolicyConfig(use_peft=True, lora_r=2, lora_alpha=4, load_in_4bit=True),
        critic={"lora_r": 2, "load_in_4bit": True},
        beta=0.1,
        output_dir=str(folder),
        run_name="run",
        report_to=[],
    )

    def make(sampler: Any) -> AsyPPOTrainer:
        torch.manual_seed(0)
        return AsyPPOTrainer(
            policy=str(models / "policy"),
            critics=str(models / "critic"),
            tokenizer=tokenizer(),
            reward_funcs=[likes_a],
            train_dataset=[{"prompt": text} for text in PROMPTS],
            config=config,
            mesh=mesh,
            sampler=sampler,
        )

    def trained(trainer: AsyPPOTrainer) -> dict[str, Tensor]:
        return {name: weight for name, weight in weights(trainer).items() if weight.is_floating_point()}

    trainer = make(Scripted(12))
    for model in (trainer.policy, trainer.critics):
        assert isinstance(model, nn.Module)
        assert {p.requires_grad for p in model.parameters() if isinstance(p, DTensor)} == ({True} if mesh else set())
    rows = []
    with open_run(config) as run:
        run.start(0)
        rows.append(trainer.step(1).metrics)
        TrainingLoop(trainer).save(run, 1)
    rows.append(trainer.step(2).metrics)
    again = make(Scripted(12))
    assert load_checkpoint(folder / "run" / "checkpoint-1", again.trained())["step"] == 1
    again.step(2)
    return {
        "rows": rows,
        "signals": [],
        "weights": trained(trainer),
        "resumed": trained(again),
        "sent": {name: weight.clone() for name, weight in trainer.policy.weights()},
        "sampled": make(None).step(1).metrics,
    }


def cases(mesh: DeviceMesh | None) -> dict[str, Any]:
    """Runs whose results do not depend on the number of ranks, by name."""
    reading = {"policy_inputs": ["logprob", "entropy"]}
    lambda_below_1 = {"value_lambda": 0.9, "num_iterations": 2}
    options = {
        "use_kl_in_reward": True,
        "beta": 0.05,
        "delta": 2.0,
        "importance_sampling_clip_max": 2.0,
        "overlong_buffer_len": 4,
        "mask_truncated_completions": True,
        "dynamic_sampling": True,
        "advantage_values": "cross_fit",
        "advantage_mask": "random",
    }
    return {
        "asyppo": lambda: train(make_config(), mesh),
        "one_by_one": lambda: train(make_config(critic=reading), mesh, stacked=False),
        "ppo": lambda: train(make_config(algorithm="ppo", beta=0.1, critic=lambda_below_1), mesh),
        "grpo": lambda: train(make_config(algorithm="grpo", loss_aggregation="token-mean", num_iterations=2), mesh),
        "lambda": lambda: train(make_config(critic=lambda_below_1, whiten="group", beta=0.1), mesh),
        "share_all": lambda: train(make_config(critic=lambda_below_1 | {"share": "all"}, diagnostics_steps=1), mesh),
        "options": lambda: train(make_config(**options, critic={"cliprange_value": 0.2} | reading), mesh),
        "monte_carlo": lambda: train(
            make_config(advantage_values="monte_carlo", monte_carlo=MonteCarloConfig(num_continuations=3, every=2)),
            mesh,
        ),
        "side": lambda: train(make_config(critic=reading | {"kind": "side", "side": SideConfig(width=32)}), mesh),
        "side_made_again": lambda: train(
            make_config(critic={"kind": "side", "side": SideConfig("mlp", 32, [1, -1], keep_bytes=0)}, beta=0.1), mesh
        ),
        # An environment that answers, and critics that read the policy.
        "environment": lambda: train(
            make_config(
                max_completion_length=24,
                environment=EnvironmentConfig(max_turn_length=5, waves=2),
                environment_credit="drop",
                critic=reading | {"kind": "side", "side": SideConfig(width=32)},
            ),
            mesh,
            environment_factory=Answers,
        ),
        "tied": lambda: train(make_config(), mesh, policy={"tie_word_embeddings": True}),
        "checkpointing": lambda: train(
            make_config(policy=PolicyConfig(packing=True), critic={"gradient_checkpointing": True}),
            mesh,
            policy={"gradient_checkpointing": True},
        ),
        "adapters": lambda: train(
            make_config(policy=PolicyConfig(packing=True), beta=0.1, critic={"lora_r": 2} | reading),
            mesh,
            policy={"lora": True},
        ),
        # Without a pass for the old log-probs.
        "one_update": lambda: train(make_config(num_mini_batches=1, policy_loss="gspo"), mesh),
        "from_the_sampler": lambda: train(make_config(num_iterations=2), mesh, sampler_agrees=True),
        # 4 rows a step: with 4 processes most micro-batches are empty, and a rank has none with a live token.
        "few_rows": lambda: train(make_config(prompts_per_step=1, max_tokens_per_micro_batch=1000), mesh),
    }


def main(folder: Path, chosen: Sequence[str]) -> None:
    """Run the cases that are asked for, or all that do not depend on the number of ranks, and save what came of it."""
    config = DistributedConfig(timeout_s=120, **json.loads(os.environ.get("ASYPPO_TEST_DISTRIBUTED", "{}")))
    with processes(config):
        mesh = make_mesh(config, torch.device("cpu"))
        every = cases(mesh)
        further = {
            "bfloat16": lambda: train(make_config(), mesh, dtype=torch.bfloat16),
            "collectives": lambda: collectives(mesh),
            "generate": lambda: generate(mesh),
            "save": lambda: save(mesh, folder),
            "moments": lambda: [moments(mesh, folder / str(rows), rows) for rows in (128, 66)],
            "save_in_background": lambda: save_in_background(mesh, folder),
            "load": lambda: load(mesh, Path(os.environ["ASYPPO_TEST_CHECKPOINT"])),
            "qlora": lambda: qlora(mesh, Path(os.environ["ASYPPO_TEST_MODELS"]), folder),
            "load_by_name": lambda: load_by_name(mesh, folder / "models"),
        }
        for name in chosen or every:
            result = (every | further)[name]()
            if rank() == 0:
                torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)

"""The memory estimate: counted parts equal what torch has, for real models and a real step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from asyppo.cli.build import build_trainer
from asyppo.cli.main import main, parse
from asyppo.cli.plan import GIB, activations, advice, describe, fits_table, known_shape, make_plan
from asyppo.cli.plan.fits import fitting
from asyppo.config import AsyPPOConfig, ConfigError, PolicyConfig
from asyppo.config.files import READY_CONFIGS
from asyppo.models.policy import Policy
from asyppo.models.quantized import BYTES_PER_PARAMETER
from asyppo.rollout.samplers.decode import columns_of_cache


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the model cards have them, in billions
        ("Qwen/Qwen3-0.6B-Base", 0.596),
        ("Qwen/Qwen3-1.7B-Base", 1.721),
        ("Qwen/Qwen3-4B", 4.022),
        ("Qwen/Qwen3-8B-Base", 8.191),
        ("Qwen/Qwen3-14B", 14.768),
    ],
)
def test_shapes_known_offline(name: str, parameters: float) -> None:
    config = known_shape(name)
    assert config is not None
    found = describe(name, "", config, config=AsyPPOConfig())
    assert found.parameters / 1e9 == pytest.approx(parameters, abs=6e-4)
    assert found.trainable == found.parameters
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert found.parameters == model.num_parameters()
    assert found.largest_layer == sum(p.numel() for p in model.model.layers[0].parameters())
    cache = 2 * 8 * 128 * config.num_hidden_layers  # keys and values of 8 heads of 128, in each layer
    assert found.kv_bytes_per_token(2) == 2 * cache


def test_other_names_have_no_shape() -> None:
    assert known_shape("Qwen/Qwen3-3B") is None
    assert known_shape("other/Qwen3-4B") is None


def saved(directory: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def tiny_run(
    tmp_path: Path, tiny_lm: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tiny_config: Callable[..., Any]
) -> Callable[..., AsyPPOConfig]:
    """A configuration of tiny models on disk."""

    def make(**fields: Any) -> AsyPPOConfig:
        config = tiny_config(**fields)
        config.policy.model_name_or_path = saved(tmp_path / "policy", tiny_lm(), tokenizer)
        config.critic.model_name_or_path = saved(tmp_path / "critic", tiny_lm(num_hidden_layers=1), tokenizer)
        config.data.train_size, config.data.eval_size = 8, 0
        config.policy.dtype = "float32"
        config.reward_funcs = ["exact_match"]
        return config

    return make


@pytest.mark.parametrize("critic", [{}, {"lora_r": 3}, {"kind": "side", "policy_inputs": ["entropy"]}])
def test_weights_gradients_and_moments_are_those_of_a_step(
    tiny_run: Callable[..., AsyPPOConfig], tmp_path: Path, critic: dict[str, Any]
) -> None:
    config = tiny_run(beta=0.1, critic=critic)
    if "kind" in critic:
        config.critic.model_name_or_path = None
    config.data.dataset_name = str(tmp_path / "rows.jsonl")
    Path(config.data.dataset_name).write_text('{"prompt": "ab", "answer": "a"}\n{"prompt": "c", "answer": "d"}\n')
    phases = make_plan(config).phases
    kept = [phase.get("hidden states that critics read", 0) for phase in phases.values()]
    states = 4 * 16 * config.prompts_per_step * config.num_generations * config.max_completion_length
    assert kept == [0, *[states * ("kind" in critic)] * 3, 0]  # not while sampling, nor in the policy's update
    trainer = build_trainer(config)
    assert trainer.critics is not None
    assert trainer.critic_optimizer is not None
    optimizers = {"policy": trainer.policy_optimizer, "critics": trainer.critic_optimizer.adamw}
    gradients: dict[str, int] = {}
    for name, optimizer in optimizers.items():

        def noted(*args: Any, name: str = name, optimizer: Any = optimizer, step: Any = optimizer.step) -> Any:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients[name] = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            return step(*args)

        optimizer.step = noted  # type: ignore[method-assign]
    trainer.train()

    def moments(name: str) -> int:
        states = optimizers[name].state.values()
        return sum(tensor.nbytes for state in states for key, tensor in state.items() if key != "step")

    update = phases["policy update"]
    assert update["policy weights"] == sum(p.nbytes for p in trainer.policy.parameters())
    assert update["critics weights"] == sum(p.nbytes for p in trainer.critics.parameters())
    assert update["reference weights"] == sum(p.nbytes for p in trainer.reference.parameters())  # type: ignore[union-attr]
    for name in ("policy", "critics"):
        assert update[f"{name} optimizer"] == moments(name)
    assert update["gradients"] == gradients["policy"]
    assert phases["critic update"]["gradients"] == gradients["critics"]


def kept_by(model: Any, rows: int, width: int, forward: Callable[..., Any]) -> int:
    """Bytes of real tensors that a real forward pass saves, weights apart."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not isinstance(tensor, torch.nn.Parameter):
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ids = torch.zeros(rows, width, dtype=torch.int64)
        forward(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def gemma() -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, intermediate_size=32, sliding_window=16, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_pass(tiny_lm: Callable[..., Any], family: str, checkpointing: bool) -> None:
    model = (tiny_lm(num_hidden_layers=5) if family == "qwen3" else gemma()).eval()
    policy = Policy(model, gradient_checkpointing=checkpointing)

    described = describe("", "", model.config, config=AsyPPOConfig())
    counted = activations(described, 3, 40, torch.float32, checkpointing)
    assert counted.casts == 0
    handed = 2 * 4 * 40 * 8 if checkpointing else 0  # cos and sin, to layers that are computed again
    assert counted.kept == pytest.approx(kept_by(model, 3, 40, policy.model.get_decoder()) + handed, rel=0.02)
    assert (counted.layer < counted.kept) is not checkpointing


LAYERS = {"vocab_size": 19, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 32}
TINY = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
MOE = {"num_attention_heads": 2, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MPT = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 16}


@pytest.mark.parametrize(
    ("family", "changes", "algorithm"),
    [("mamba", {"num_hidden_layers": 4}, "grpo"), ("mamba", {}, "ppo"), ("olmoe", MOE, "grpo"), ("mpt", MPT, "grpo")],
)
def test_any_family_that_trains_has_a_plan(
    tiny_config: Callable[..., AsyPPOConfig], tmp_path: Path, family: str, changes: dict[str, Any], algorithm: str
) -> None:
    """Without attention or a token classifier, with experts, with positions for less than the prompts assumed."""
    AutoConfig.for_model(family, **(changes if family == "mpt" else TINY | changes)).save_pretrained(tmp_path)
    config = tiny_config(algorithm=algorithm, max_tokens_per_micro_batch=40)
    config.policy.model_name_or_path = str(tmp_path)
    plan = make_plan(config, prompt_length=20)  # MPT has 16 positions, 5 of them for the response
    assert plan.phases["policy update"]["activations"] > 0
    cache = plan.phases["generation"]["key-value cache"]
    assert (cache == 0) == (family == "mamba")
    assert any(("11" if family == "mpt" else "20") in line for line in plan.assumptions[:1])


@pytest.mark.slow
def test_token_by_token_is_extrapolated() -> None:
    """What three short passes say of a long one is what it keeps."""
    described = describe("", "", AutoConfig.for_model("mamba", **TINY), config=AsyPPOConfig())
    assert described.goes_token_by_token
    found = activations(described, 2, 128, torch.float32, checkpointing=False)
    with patch.object(type(described), "goes_token_by_token", False):
        counted = activations(described, 2, 128, torch.float32, checkpointing=False)
    assert found.kept == pytest.approx(counted.kept, rel=1e-3)
    assert found.layer == pytest.approx(counted.layer, rel=1e-3)
    assert found.back == pytest.approx(counted.back, rel=1e-3)


@pytest.mark.parametrize("stacked", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_layers_that_are_alike_follow_from_few(stacked: int) -> None:
    config = AutoConfig.for_model("qwen3", **LAYERS | {"num_hidden_layers": 5})
    described = describe("", "", config, config=AsyPPOConfig(), is_critic=stacked > 0)
    assert described.uniform
    for checkpointing in (False, True):
        how: Any = (2, 40, torch.bfloat16, checkpointing)
        found = activations(described, *how, stacked=stacked)
        assert found == activations(replace(described, uniform=False), *how, stacked=stacked)
    assert found.further[0] == 2 * 40 * 16 * (2 if stacked else 4)  # its input; autocast leaves that in float32
    assert found.kept > 5 * found.further[0]


def test_autocast_copies_the_weights(tiny_lm: Callable[..., Any]) -> None:
    model = tiny_lm()
    described = describe("", "", model.config, config=AsyPPOConfig())
    counted = activations(described, 3, 40, torch.bfloat16, checkpointing=False)
    linear = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    assert counted.casts == 2 * sum(m.weight.numel() for m in linear)
    assert counted.kept < activations(described, 3, 40, torch.float32, checkpointing=False).kept


def test_adapters(tiny_lm: Callable[..., Any]) -> None:
    config = AsyPPOConfig(policy=PolicyConfig(use_peft=True, lora_r=3, lora_target_modules=["q_proj", "down_proj"]))
    model = tiny_lm()
    plain = model.num_parameters()
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), model)
    found = describe("", "", model.config, config=config)
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.parameters == plain + found.trainable


def test_sharding_divides_what_is_sharded(tiny_run: Callable[..., AsyPPOConfig]) -> None:
    config = tiny_run(prompts_per_step=8, max_tokens_per_micro_batch=64)  # a response each, however many there are
    one, four = make_plan(config).phases["policy update"], make_plan(config, gpus=4).phases["policy update"]
    config.distributed.replicate = 2
    copies = make_plan(config, gpus=4).phases["policy update"]
    for name in ("policy weights", "policy optimizer", "critics weights", "critics optimizer", "gradients"):
        assert four[name] == one[name] // 4, name
        assert copies[name] == one[name] // 2, name
    assert four["activations"] == one["activations"]
    assert four["batch"] == one["batch"]  # every rank holds all of it
    with pytest.raises(ConfigError, match=r"distributed.replicate: got 2, needs a divisor of the number of GPUs, 3"):
        make_plan(config, gpus=3)


def test_what_is_sampled_with_is_there_while_sampling_only() -> None:
    config = AsyPPOConfig(algorithm="grpo")
    config.policy.model_name_or_path = "Qwen/Qwen3-1.7B-Base"
    for gpus in (1, 8):
        plan = make_plan(config, gpus=gpus)
        assert [name for name, parts in plan.phases.items() if "policy copy to sample with" in parts] == ["generation"]


def test_what_does_not_train_takes_no_memory(tiny_run: Callable[..., AsyPPOConfig]) -> None:
    config = tiny_run()
    assert not any("reference" in name for name in make_plan(config).phases["policy update"])
    config.algorithm = "grpo"
    phases = make_plan(config).phases
    assert list(phases) == ["generation", "log-probs", "policy update"]
    assert not any("critic" in name for name in phases["policy update"])
    config.algorithm = "ppo"
    ppo = make_plan(config)
    policy, critic = ppo.models
    assert critic.parameters == policy.parameters - 19 * 16 + (16 + 1)  # one value with a bias in place of 19 logits


@pytest.mark.slow
def test_checkpointing_and_shorter_responses_save_memory() -> None:
    config = AsyPPOConfig(max_completion_length=4096, generation_batch_size=16, sampler="generate")
    config.policy.model_name_or_path, config.algorithm = "Qwen/Qwen3-1.7B-Base", "grpo"
    plain = make_plan(config)
    config.policy.gradient_checkpointing = True
    assert make_plan(config).phases["policy update"]["activations"] < 0.1 * plain.phases["policy update"]["activations"]
    config.max_completion_length = 1024
    cache = [p.phases["generation"]["key-value cache"] for p in (plain, make_plan(config))]
    columns = [columns_of_cache(1024, 1024 + responses) for responses in (4096, 1024)]
    assert cache == [16 * most * (2 * 28 * 8 * 128 * 2) for most in columns]
    # Continuous batching makes do with less room.
    config.sampler = "continuous"
    continuous = make_plan(config)
    assert continuous.phases["generation"]["key-value cache"] * columns[1] == cache[1] // 16 * (1024 + 1024)
    assert "each more takes 0.22 GiB" in continuous.table()
    assert continuous.phases["generation"]["policy copy to sample with"] == 2 * plain.models[0].parameters
    # vLLM has a process of its own.
    config.sampler = "vllm"
    apart = make_plan(config)
    assert not {"policy copy to sample with", "key-value cache"} & set(apart.phases["generation"])
    assert "vLLM is not counted: its process takes up to vllm.gpu_memory_utilization = 0.3 of the GPU" in apart.table()


def test_what_lies_in_the_hosts_memory_is_not_there(tiny_run: Callable[..., AsyPPOConfig]) -> None:
    config = tiny_run(beta=0.1)
    plain = make_plan(config).phases
    config.offload = "optimizer"
    moments = make_plan(config).phases
    config.offload = "all"
    everything = make_plan(config).phases
    for name, parts in plain.items():
        assert {"policy weights", "policy optimizer", "critics weights", "reference weights"} <= parts.keys()
        assert not {"policy optimizer", "critics optimizer"} & moments[name].keys()
        assert {n: parts[n] for n in moments[name] if n in parts} == {
            n: moments[name][n] for n in parts if n in moments[name]
        }
        there = {n.removesuffix(" weights") for n in everything[name] if n.endswith(" weights")}
        assert there == ({"critics"} if name in ("critic update", "values") else {"policy"}), name


def test_log_probs_have_body_or_head(tiny_run: Callable[..., AsyPPOConfig]) -> None:
    """A pass without gradients keeps nothing of its body until the head."""
    log_probs = make_plan(tiny_run()).phases["log-probs"]
    assert ("within a layer" in log_probs) != ("head workspace" in log_probs)


def test_moments_in_8_bits_and_weights_in_4(tiny_run: Callable[..., AsyPPOConfig]) -> None:
    config = tiny_run()
    plain = make_plan(config).phases["policy update"]
    config.optim = "adamw_8bit"
    eight = make_plan(config).phases["policy update"]
    for name in ("policy optimizer", "critics optimizer"):
        assert eight[name] == pytest.approx(plain[name] * 2 * (1 + 4 / 256) / 8, abs=1)
    config.policy.use_peft, config.policy.dtype = True, "bfloat16"
    whole = make_plan(config)
    config.policy.load_in_4bit = True
    four = make_plan(config).phases["policy update"]["policy weights"]
    saved = whole.models[0].linear * (2 - BYTES_PER_PARAMETER)
    assert four == pytest.approx(whole.phases["policy update"]["policy weights"] - saved, abs=1)
    adapters = whole.models[0].trainable
    eight = make_plan(config, gpus=8).phases  # of which each has the base whole
    assert eight["policy update"]["policy weights"] == pytest.approx(four - 4 * adapters * 7 / 8, abs=1)
    assert eight["generation"]["policy copy to sample with"] == 2 * adapters


def test_what_to_set_for_it_to_fit(tiny_run: Callable[..., AsyPPOConfig]) -> None:
    config = tiny_run(generation_batch_size=1)
    room = make_plan(replace(config, offload="optimizer")).peak[1] / GIB / 0.899
    assert advice(config, gpus=1, gib=1).startswith("fits 1 GPU of 1 GiB: ")
    lines = advice(config, gpus=1, gib=room).splitlines()
    assert lines[0].endswith("of which 10 % are left free; it does with")
    assert lines[1].startswith("  full: offload: optimizer  (")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["full", "8-bit moments", "LoRA", "QLoRA"]
    assert advice(config, gpus=2, gib=1e-9).count("nothing that is known here") == 4
    table = fits_table(config, cards=(1,))
    assert table[2].startswith("| full | 1 | 0 | 0 | 0 | 0 |")
    assert table[-1] == "| QLoRA | 1 | 0 | 0 | 0 | 0 |"


@pytest.mark.slow
def test_what_it_says_to_set_makes_it_fit(capsys: pytest.CaptureFixture) -> None:
    """As one types it."""
    peak = make_plan(parse(["plan", "--config", "default"])).peak[1]
    command = ["plan", "--config", "default", "--memory", f"{0.8 * peak / GIB / 0.9}"]
    assert main(command) == 0
    said = capsys.readouterr().out.partition("it does with\n")[2].splitlines()
    ways = [re.findall(r"([\w.]+): (\S+)  ", line.partition(": ")[2]) for line in said]
    assert len([way for way in ways if way]) > 1
    for way in ways:
        if way:
            assert main([*command, *(word for name, value in way for word in (f"--{name}", value))]) == 0
            assert "fits 1 GPU of" in capsys.readouterr().out


def test_the_table(tiny_run: Callable[..., AsyPPOConfig]) -> None:
    plan = make_plan(tiny_run(), gpus=2)
    lines = plan.table().splitlines()
    name, total = plan.peak
    assert total == max(sum(parts.values()) for parts in plan.phases.values())
    assert f"peak: {total / GIB:.1f} GiB on each of 2 GPUs, {name}" in lines
    header = next(line for line in lines if line.startswith("GiB on each GPU"))
    assert all(phase in header for phase in plan.phases)
    assert "its config.json" in lines[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["plan", "--config", "default", "--prompt_length", "32"]) == 0
    out = capsys.readouterr().out
    assert "warm_start" in out.splitlines()[0]
    assert "every response is 16 tokens long, every prompt 32" in out
    assert main(["plan", "--config", "default", "--memory", "24"]) == 0
    assert "fits 1 GPU of 24 GiB" in capsys.readouterr().out
    assert main(["plan", "--config", "default", "--memory", "0"]) == 2
    assert "--memory: got 0, needs a number of GiB above 0" in capsys.readouterr().err
    assert main(["plan", "--config", "default", "--gpus", "0"]) == 2
    assert "--gpus: got 0, needs an integer of at least 1" in capsys.readouterr().err

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    assert main(["plan", "--policy.model_name_or_path", "some/model"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "asyppo: error: model_name_or_path: got 'some/model', which is no directory, and the hub gives"
    )


@pytest.mark.parametrize(
    "name",
    [
        name if name == "qwen3-14b" else pytest.param(name, marks=pytest.mark.slow)
        for name in READY_CONFIGS
        if name != "default"
    ],
)
def test_ready_configurations(name: str) -> None:
    """They are read, hold, say what the paper says, and fit GPUs of 80 GB, as many as docs/running.md says."""
    config = parse(["train", "--config", name])
    size = name.removeprefix("qwen3-").upper()
    assert config.policy.model_name_or_path == f"Qwen/Qwen3-{size}-Base"
    assert config.critic.model_name_or_path in {f"Qwen/Qwen3-{size}-Base" for size in ("0.6B", "1.7B", "4B")}
    assert (config.num_critics, config.num_generations) == (2, 32)
    assert config.prompts_per_step * config.num_generations == 1024
    assert (config.max_completion_length, config.learning_rate) == (8192, 1e-6)
    assert (config.advantage_mask_fraction, config.entropy_filter_fraction) == (0.2, 0.2)
    assert config.num_iterations * config.num_mini_batches == 4
    gpus = {"4B": 8, "8B": 8, "14B": 16}[size]
    plan = make_plan(config, gpus=gpus)
    assert [m.source for m in plan.models] == ["shape known here, not looked up on the hub"] * 2
    assert plan.peak[1] < 0.9 * 80 * GIB, plan.table()
    # Full fine-tuning of the 4B policy fits one of them, and that of 14B eight.
    fewer = {"4B": 1, "14B": 8}.get(size)
    if fewer is not None:
        way = fitting(config, "full", gpus=fewer, gib=80)
        assert way is not None
        assert way.settings == {"offload": "optimizer"}
    page = (Path(__file__).parents[2] / "docs" / "running.md").read_text()
    critics = (config.critic.model_name_or_path or "").split("-")[1]
    assert f"| `{name}` | {size} | 2 × {critics} | {gpus} | {plan.peak[1] / GIB:.1f} GiB, {plan.peak[0]} |" in page

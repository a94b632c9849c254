"""Critics as adapters over one backbone, against the same adapters in peft, one model at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    Qwen2Config,
    Qwen2ForTokenClassification,
    Qwen3Config,
    Qwen3ForTokenClassification,
)

from asyppo.checkpoint import load_checkpoint
from asyppo.config import AsyPPOConfig, ConfigError, CriticConfig
from asyppo.data.batch import Batch
from asyppo.loop import TrainingLoop
from asyppo.models.critics import CriticOptimizer, LoraCritics, StackedCritics, load_critics
from asyppo.models.policy import Policy
from asyppo.run.directory import RunDirectory
from asyppo.trainer import AsyPPOTrainer

VOCAB, RANK, ALPHA = 19, 3, 5.0
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForTokenClassification, LlamaConfig),
    "qwen2": (Qwen2ForTokenClassification, Qwen2Config),
    "qwen3": (Qwen3ForTokenClassification, Qwen3Config),
}


def save_base(path: Path, family: str = "qwen3", **changes: Any) -> Path:
    """A token classifier with biases, norms and a head that are not the defaults."""
    torch.manual_seed(5)
    model_class, config_class = FAMILIES[family]
    config = config_class(**(SHAPE | {"num_labels": 1} | changes))
    config.classifier_dropout = 0.0
    model = model_class(config)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(path)
    return path


def load(path: Path | list[Path], num_critics: int = 2, **options: Any) -> LoraCritics:
    """Critics whose adapters do something: new ones start out as zero."""
    critics = LoraCritics.from_pretrained(path, num_critics, r=RANK, alpha=ALPHA, **options)
    if isinstance(path, Path):
        with torch.no_grad():
            for _, p in critics.trained_parameters():
                p.add_(0.1 * torch.randn_like(p))
    return critics


def peft_models(path: Path, critics: LoraCritics) -> list[Any]:
    """The same critics in peft, each with a backbone of its own."""
    made = []
    for m in range(len(critics)):
        base = AutoModelForTokenClassification.from_pretrained(path, num_labels=1)
        config = LoraConfig(
            task_type="TOKEN_CLS",
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            modules_to_save=["score"],
        )
        model = get_peft_model(base, config).eval()
        with torch.no_grad():
            for name, p in critics.trained_parameters():
                peft_parameter(model, name).copy_(p[m])
        made.append(model)
    return made


def peft_parameter(model: Any, name: str) -> Tensor:
    """What a parameter of ours is called in a model of peft."""
    if name.startswith("score."):
        return model.get_parameter(f"base_model.model.score.modules_to_save.default.{name[6:]}")
    return model.get_parameter(f"base_model.model.model.{name}.default.weight")


def inputs(width: int = 9) -> tuple[Tensor, Tensor]:
    """Ragged sequences, one padded on the left."""
    ids = torch.randint(VOCAB, (4, width))
    mask = torch.ones(4, width, dtype=torch.long)
    mask[1, 4:], mask[2, :3] = 0, 0
    return ids, mask


def distance(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("num_critics", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_peft(family: str, num_critics: int, tmp_path: Path) -> None:
    critics = load(save_base(tmp_path, family), num_critics)
    (ids, mask), upstream = inputs(), torch.randn(num_critics, 4, 9)
    value = critics(ids, mask) * mask
    (value * upstream).sum().backward()
    for m, model in enumerate(peft_models(tmp_path, critics)):
        own = model(input_ids=ids, attention_mask=mask).logits[..., 0] * mask
        (own * upstream[m]).sum().backward()
        assert distance(value[m], own) < 1e-5
        for name, p in critics.trained_parameters():
            assert distance(p.grad[m], peft_parameter(model, name).grad) < 1e-5, name
    frozen = [p for p in critics.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16(checkpointing: bool, tmp_path: Path) -> None:
    """As near to float64 as peft in bfloat16, on average over inputs, plus one rounding of the result."""
    critics = load(save_base(tmp_path), dtype=torch.bfloat16, gradient_checkpointing=checkpointing)
    names = [name for name, _ in critics.trained_parameters()]
    ours, plain = [], []
    for _ in range(4):
        (ids, mask), upstream = inputs(), torch.randn(2, 4, 9)
        results = []
        value = critics(ids, mask) * mask
        (value * upstream).sum().backward()
        grads = [torch.cat([p.grad[m].flatten() for _, p in critics.trained_parameters()]) for m in range(2)]
        critics.release_gradients()
        results.append((value, torch.cat(grads)))
        for dtype in (torch.bfloat16, torch.float64):
            values, grads = [], []
            for m, model in enumerate(peft_models(tmp_path, critics)):
                model.to(dtype)
                values.append(model(input_ids=ids, attention_mask=mask).logits[..., 0] * mask)
                (values[-1].to(dtype) * upstream[m].to(dtype)).sum().backward()
                grads.append(torch.cat([peft_parameter(model, name).grad.flatten().double() for name in names]))
            results.append((torch.stack(values), torch.cat(grads)))
        ours.append([distance(a, b) for a, b in zip(results[0], results[2], strict=True)])
        plain.append([distance(a, b) for a, b in zip(results[1], results[2], strict=True)])
    for one, other in zip(torch.tensor(ours).mean(0), torch.tensor(plain).mean(0), strict=True):
        assert one <= other + 2**-8
    assert critics.score.weight.dtype == critics.layers[0].mlp.up_proj.lora_A.dtype == torch.float32


@pytest.mark.parametrize("second", [[11, 2], [5, 0, 3, 1]])
def test_checkpointing_and_shares(second: list[int], tmp_path: Path, ragged_batch: Callable[..., Batch]) -> None:
    """The same gradients with and without, on unequal shares, disjoint or not, and whatever the cut."""
    save_base(tmp_path)
    batch, shares = ragged_batch(), [torch.tensor([0, 3, 5]), torch.tensor(second)]
    gradients = []
    for checkpointing, budget in ((False, 10_000), (True, 10_000), (False, 20)):
        torch.manual_seed(1)
        critics = load(tmp_path, gradient_checkpointing=checkpointing)
        losses = critics.backward(batch, shares, lambda m, micro, value: value.square().sum(), budget)
        gradients.append([losses, *(p.grad for _, p in critics.trained_parameters())])
        for m, model in enumerate(peft_models(tmp_path, critics) if budget > 20 else ()):
            own = torch.zeros(())
            for b in shares[m].tolist():
                start, end = int(batch.prompt_length[b]), int(batch.length[b])
                own = own + model(batch.tokens[b : b + 1, :end]).logits[0, start - 1 : end - 1].square().sum()
            torch.testing.assert_close(losses[m], own.detach())
    for other in gradients[1:]:
        assert all(distance(a, b) < 1e-5 for a, b in zip(other, gradients[0], strict=True))


def test_memory_of_one_backbone(tmp_path: Path) -> None:
    """M critics have the parameters of one model, and M adapters and heads."""
    base = AutoModelForTokenClassification.from_pretrained(save_base(tmp_path), num_labels=1)
    frozen = sum(p.numel() for name, p in base.named_parameters() if not name.startswith("score."))
    linears = [p for name, p in base.named_parameters() if p.dim() == 2 and "_proj" in name]
    each = sum(RANK * sum(p.shape) for p in linears) + SHAPE["hidden_size"] + 1
    for count in (1, 2, 4):
        critics = load(tmp_path, count)
        assert sum(p.numel() for p in critics.parameters()) == frozen + count * each
        optimizer = CriticOptimizer(critics, learning_rate=1e-3, weight_decay=0.0)
        assert sum(p.numel() for group in optimizer.adamw.param_groups for p in group["params"]) == count * each
        assert sum(state["exp_avg"].numel() for state in optimizer.adamw.state.values()) == count * each
    halved = load(tmp_path, 2, dtype=torch.bfloat16)
    assert sum(p.nbytes for p in halved.parameters() if not p.requires_grad) == 2 * frozen


def test_new_adapters_leave_the_backbone_as_it_is(tmp_path: Path) -> None:
    """B starts at zero, so critics differ by their heads; a causal language model will do."""
    fields = {"tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**SHAPE, **fields)).save_pretrained(tmp_path)
    config = CriticConfig(lora_r=4)
    critics = load_critics(str(tmp_path), 3, config, vocab_size=VOCAB, dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(critics, LoraCritics)
    assert critics.layers[0].mlp.up_proj.scale == 4.0
    full = StackedCritics.from_pretrained(tmp_path, 3)
    full.score.load_state_dict(critics.score.state_dict())
    ids, mask = inputs()
    torch.testing.assert_close(critics(ids, mask), full(ids, mask))
    assert critics(ids, mask).std(dim=0).min() > 0
    a = critics.layers[0].self_attn.q_proj.lora_A
    assert not torch.equal(a[0], a[1])


def test_round_trip(tmp_path: Path) -> None:
    """Bit for bit, through peft and through ours."""
    critics = load(save_base(tmp_path / "base"), 3)
    critics.save_pretrained(tmp_path)
    ids, mask = inputs()
    for m in range(3):
        directory = tmp_path / f"critic_{m}"
        files = {"adapter_config.json", "adapter_model.safetensors", "critic.json"}
        assert {path.name for path in directory.iterdir()} == files
        base = AutoModelForTokenClassification.from_pretrained(tmp_path / "base", num_labels=1)
        model = PeftModel.from_pretrained(base, directory).train()  # no dropout anywhere
        for name, p in critics.trained_parameters():
            assert torch.equal(peft_parameter(model, name), p[m]), name
        own = model(input_ids=ids, attention_mask=mask).logits[..., 0]
        assert distance(critics(ids, mask)[m] * mask, own * mask) < 1e-5
    paths = [tmp_path / f"critic_{m}" for m in range(3)]
    again = load(paths, 3)
    assert torch.equal(again(ids, mask), critics(ids, mask))


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    load(save_base(tmp_path / "base"), 2).save_pretrained(tmp_path)
    paths = [tmp_path / f"critic_{m}" for m in range(2)]
    with pytest.raises(ConfigError, match=r"got 2 adapters, needs critic\.num_critics = 3"):
        load(paths, 3)
    with pytest.raises(ConfigError, match=r"\(r, alpha\) \[\(3, 5\.0\)\], needs one base and .* = 4, 5\.0"):
        LoraCritics.from_pretrained(paths, 2, r=4, alpha=ALPHA)
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json, needs that of an adapter"):
        load([tmp_path / "base"] * 2)
    with pytest.raises(ConfigError, match=r"critic\.lora_r: got 3, needs 0 for Llama.*: its activation is gelu"):
        load(save_base(tmp_path / "gelu", "llama", hidden_act="gelu"))
    with pytest.raises(ConfigError, match=r"critic\.lora_r: got 2, needs 0 with critic\.stacked False"):
        AsyPPOConfig(critic=CriticConfig(lora_r=2, stacked=False)).validate()
    with pytest.raises(ConfigError, match=r"embeddings of 19 tokens, needs .* 20"):
        load(tmp_path / "base", vocab_size=20)


def test_the_trainer(
    tiny_config: Callable[..., AsyPPOConfig], tiny_lm: Callable[..., Any], tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    """The backbone stays, adapters and heads move, and training goes on from a checkpoint bit for bit."""
    base = save_base(tmp_path / "base")
    config = tiny_config(critic={"lora_r": RANK, "num_iterations": 2})

    def make() -> AsyPPOTrainer:
        torch.manual_seed(0)
        critics = LoraCritics.from_pretrained(base, 2, r=RANK, alpha=ALPHA)
        return AsyPPOTrainer(
            policy=Policy(tiny_lm()),
            critics=critics,
            tokenizer=tokenizer,
            reward_funcs=[lambda completions, **_: [float(c.count("a")) for c in completions]],
            train_dataset=prompts,
            config=config,
        )

    first, run = make(), RunDirectory(config)
    before = {name: p.detach().clone() for name, p in first.critics.named_parameters()}
    losses = [first.step(step).metrics["critic/vf_loss"] for step in (1, 2)]
    assert all(0 < loss < 100 for loss in losses)
    for name, p in first.critics.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    checkpoint = TrainingLoop(first).save(run, 2)
    saved = LoraCritics.from_pretrained([checkpoint / f"critic_{m}" for m in range(2)], 2, r=RANK, alpha=ALPHA)
    second = make()
    load_checkpoint(checkpoint, second.trained())
    for critics in (saved, second.critics):
        assert all(torch.equal(p, q) for p, q in zip(first.critics.parameters(), critics.parameters(), strict=True))
    for trainer in (first, second):
        trainer.step(3)
    assert all(torch.equal(p, q) for p, q in zip(first.critics.parameters(), second.critics.parameters(), strict=True))

"""TRL's GRPOTrainer with the op in its fused head, against TRL's own: the same numbers, gradients and training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl", reason="trl is not installed")
import peft  # noqa: E402
from datasets import Dataset  # noqa: E402  (it comes with trl)
from trl.trainer import utils  # noqa: E402

from asyppo_kernels.integrations import _head, _patching  # noqa: E402
from asyppo_kernels.integrations import trl as integration  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "trl_grpo_linear_logprob.py"
PROMPTS = ["a", "bcd", "efghij", "klm", "aa", "bm", "cl", "dkaaa"]
TOLERANCE = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames what TRL 1.16 calls


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def letters(completions: list[str], **_: Any) -> list[float]:
    """Reward that differs from completion to completion."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load()


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    theirs = utils._ChunkedLogProbFunction
    yield
    integration.disable()
    assert utils._ChunkedLogProbFunction is theirs


@pytest.fixture
def make_trainer(example: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Make a GRPOTrainer around the same tiny model; the op is in it or not until the next one is made."""
    tokenizer = example.make_tokenizer()
    torch.manual_seed(0)
    model = example.make_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # distributions far from uniform
    model.save_pretrained(tmp_path / "model")

    def make(ours: bool, peft_config: Any = None, **settings: Any) -> Any:
        (integration.enable if ours else integration.disable)()
        settings = {
            "output_dir": str(tmp_path / "out"),
            "model_init_kwargs": {"dtype": "float32"},
            "learning_rate": 0.1,
            "optim": "sgd",
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 10,
            "temperature": 0.7,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
        } | settings
        return trl.GRPOTrainer(
            model=str(tmp_path / "model"),
            reward_funcs=letters,
            args=trl.GRPOConfig(**settings),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def left_padded() -> tuple[Tensor, Tensor, int]:
    """Five prompts of one to four tokens, padded on the left, and completions of one to six, padded on the right."""
    torch.manual_seed(1)
    prompts, completions = torch.tensor([1, 4, 2, 3, 4]), torch.tensor([6, 1, 3, 6, 2])
    mask = torch.cat([torch.arange(4) >= 4 - prompts[:, None], torch.arange(6) < completions[:, None]], dim=1)
    ids = torch.randint(3, 16, mask.shape).masked_fill(~mask, 0)
    return ids, mask.long(), 6


def score(trainer: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return trainer._get_per_token_logps_and_entropies(trainer.model, *left_padded(), **options)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_log_probs_entropies_and_gradients_are_trls(make_trainer: Callable[..., Any], batch_size: int | None) -> None:
    _, mask, keep = left_padded()
    valid = mask[:, -keep:].bool()
    torch.manual_seed(2)
    upstream = torch.randn(2, *valid.shape)
    results = []
    for ours in (False, True):
        trainer = make_trainer(ours)
        logprob, entropy, aux = score(trainer, batch_size=batch_size, compute_entropy=True)
        assert aux is None
        (torch.stack([logprob, entropy]) * upstream).sum().backward()
        results.append((logprob, entropy, {name: p.grad for name, p in trainer.model.named_parameters()}))
    (logprob, entropy, gradients), (our_logprob, our_entropy, our_gradients) = results

    assert our_logprob.dtype == our_entropy.dtype == torch.float32
    assert our_logprob.shape == our_entropy.shape == valid.shape
    torch.testing.assert_close(our_logprob, logprob, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(our_entropy, entropy, atol=TOLERANCE, rtol=TOLERANCE)
    assert (our_logprob[valid] < 0).all()
    assert (our_logprob[~valid] == 0).all()
    assert (our_entropy[~valid] == 0).all()
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(our_gradients[name], gradient, atol=TOLERANCE * scale, rtol=0, msg=name)


def test_numbers_are_those_of_whole_logits(make_trainer: Callable[..., Any]) -> None:
    """Not only TRL's: the model's own logits in float64, at the place before each token, over the temperature."""
    trainer = make_trainer(True)
    ids, mask, keep = left_padded()
    with torch.no_grad():
        logprob, none, _ = score(trainer)
        logits = trainer.model(ids, attention_mask=mask).logits.double()[:, -keep - 1 : -1] / 0.7
    assert none is None
    expected = logits.log_softmax(-1).gather(-1, ids[:, -keep:, None])[..., 0] * mask[:, -keep:]
    torch.testing.assert_close(logprob.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, None), (3.0, None), (3.0, 0.5), (None, 1.5)])
def test_tied_heads_biases_and_capped_or_scaled_logits(
    make_trainer: Callable[..., Any], tied: bool, softcap: float | None, scale: float | None
) -> None:
    results = []
    for ours in (False, True):
        trainer = make_trainer(ours)
        if tied:
            trainer.model.lm_head.weight = trainer.model.model.embed_tokens.weight
        else:
            trainer.model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(trainer.processing_class)))
        trainer.model.config.final_logit_softcapping, trainer.model.config.logit_scale = softcap, scale
        # TRL reads both when it adds its head.
        utils.add_fused_lm_head(trainer.model, temperature=0.7, outputs=("log_probs", "entropy"))
        logprob, entropy, _ = score(trainer, compute_entropy=True)
        (logprob - 0.3 * entropy).sum().backward()
        results.append((logprob, entropy, trainer.model.lm_head.weight.grad))
    torch.testing.assert_close(results[1], results[0], atol=TOLERANCE, rtol=1e-4)


def test_under_autocast_no_farther_from_float32_than_trl(make_trainer: Callable[..., Any]) -> None:
    with torch.no_grad():
        exact = score(make_trainer(False), compute_entropy=True)[:2]
        theirs = score(make_trainer(False, bf16=True), compute_entropy=True)[:2]
        ours = score(make_trainer(True, bf16=True), compute_entropy=True)[:2]
    for want, their, our in zip(exact, theirs, ours, strict=True):
        assert our.dtype == torch.float32
        assert 0 < (our - want).abs().max() < 1.5 * (their - want).abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        # The second step goes back to the first one's samples, so ratio, clip, reference and entropy all count.
        {"num_iterations": 2, "beta": 0.05, "entropy_coef": 0.01, "loss_type": "grpo"},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "top_entropy_quantile": 0.5},
    ],
    ids=["default", "every term", "accumulation"],
)
def test_two_training_steps_are_trls(make_trainer: Callable[..., Any], settings: dict[str, Any]) -> None:
    results = []
    for ours in (False, True):
        trainer = make_trainer(ours, max_steps=2, **settings)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        moved = {name: p.detach() - start[name] for name, p in trainer.model.named_parameters()}
        results.append((trainer.state.log_history[:2], moved))
    (logs, moved), (our_logs, our_moved) = results

    for row, our_row in zip(logs, our_logs, strict=True):
        assert row.keys() == our_row.keys()
        assert row["loss"] != 0
        assert row["grad_norm"] > 0
        for name in row.keys() - {"step_time"}:
            assert our_row[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5), name
    if "beta" in settings:
        assert logs[1]["kl"] > 0
        assert logs[1]["clip_ratio/region_mean"] > 0
    for name, change in moved.items():
        scale = change.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(our_moved[name], change, atol=1e-3 * scale, rtol=0, msg=name)


def test_adapters_train_as_trls(make_trainer: Callable[..., Any]) -> None:
    """The reference is the model without its adapter, which TRL asks through the same head."""
    results = []
    for ours in (False, True):
        torch.manual_seed(3)
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        trainer = make_trainer(ours, peft_config=adapter, max_steps=2, num_iterations=2, beta=0.05)
        trainer.train()
        rows = [[row[name] for name in ("loss", "entropy", "kl", "grad_norm")] for row in trainer.state.log_history[:2]]
        results.append(rows)
    assert results[0][1][2] > 0
    for row, our_row in zip(*results, strict=True):
        assert our_row == pytest.approx(row, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": True, "cast_lm_head_to_fp32": True}, torch.float32),
    ],
    ids=["float32", "autocast", "autocast, float32 head"],
)
def test_the_trainer_asks_the_op(
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Once for the reference's log-probs and once for the loss, there with entropies, in autocast's dtype."""
    calls = []

    def recorded(*args: Any, **options: Any) -> Any:
        calls.append((options["entropy"], options["compute_dtype"]))
        return op(*args, **options)

    op = _head.linear_logprob
    monkeypatch.setattr(_head, "linear_logprob", recorded)
    make_trainer(True, max_steps=1, beta=0.05, **settings).train()
    assert calls == [(False, dtype), (True, dtype)]


def test_what_the_op_has_no_answer_for_goes_trls_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "log_probs", None)  # not to be called
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    arguments = {"temperature": 1.0, "chunk_size": 8, "final_logit_softcapping": None, "logit_scale": 1.0}
    partitioned = torch.nn.Parameter(weight)
    partitioned.ds_id = 0  # DeepSpeed's mark
    for head, changed in (
        (weight, {"outputs": ("log_probs", "is_top1")}),
        (weight, {"outputs": ("log_probs",), "logit_scale": -1.0}),
        (partitioned, {"outputs": ("log_probs",)}),
    ):
        call = (hidden, head, None, torch.arange(3), *(arguments | changed).values())
        want = utils._ChunkedLogProbFunction.apply(*call)
        integration.enable()
        torch.testing.assert_close(utils._ChunkedLogProbFunction.apply(*call), want, equal_nan=True)
        integration.disable()


@pytest.mark.parametrize("version", ["1.15.4", "1.17.0", "1.1.16", "2.16.0", "unknown"])
def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(_patching, "version", lambda _: version)
    with pytest.raises(ImportError, match=rf"trl: got {version}, needs 1\.16, .*pip install 'trl==1\.16\.\*'"):
        integration.enable()


def test_a_trainer_that_is_not_there_is_named() -> None:
    with pytest.raises(ImportError, match=r"no-such-trainer: not installed, needs 1\.2: pip install"):
        _patching.check_version("no-such-trainer", "1.2")

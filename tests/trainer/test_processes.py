"""Training on several processes: the same as on one. Real processes, gloo on the CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from asyppo.checkpoint import CheckpointError
from asyppo.config import DistributedConfig
from asyppo.distributed.processes import make_mesh, processes
from asyppo.run.directory import read_jsonl
from asyppo.run.durable import damage

SCRIPT = Path(__file__).with_name("distributed_rank.py")
# What depends on how rows are cut into micro-batches, and on the clock.
NOT_COMPARED = ("timing_s/", "perf/", "critic/padding_frac", "actor/padding_frac")
LEARNING_RATE = 1e-2  # of policy and critics, in SCRIPT


def launch(processes: int, *arguments: Any, script: str | None = None, **environment: str) -> str:
    """Run a script on so many ranks and return what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [script or str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rank_script() -> ModuleType:
    """The script of a rank, as a module."""
    spec = importlib.util.spec_from_file_location("distributed_rank", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distributed_rank"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(rank_script: ModuleType) -> dict[str, Any]:
    """Every case on one process that knows nothing of others."""
    return {name: case() for name, case in rank_script.cases(None).items()}


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Assert that two runs had the same metrics, masks, signals and weights, up to ``tolerance``, absolute and of the
    largest of a tensor; masks exactly.

    One weight of a tensor, or of each thousand in a large one, may be off by a hundredth of an update: Adam divides by
    the size of the gradient, so that of one that is almost 0 the rounding, which depends on which rows a micro-batch
    has, is a share of a whole update.
    """
    for step, (a, b) in enumerate(zip(one["rows"], other["rows"], strict=True)):
        names = {name for name in a if not name.startswith(NOT_COMPARED)}
        assert names == {name for name in b if not name.startswith(NOT_COMPARED)}
        for name in names:
            close = math.isclose(a[name], b[name], rel_tol=10 * tolerance, abs_tol=10 * tolerance)
            assert close or (math.isnan(a[name]) and math.isnan(b[name])), (step, name, a[name], b[name])
    for a, b in zip(one["signals"], other["signals"], strict=True):
        for name, value in a.items():
            if value.dtype == torch.bool:
                assert torch.equal(b[name], value), name
            else:
                torch.testing.assert_close(b[name], value, rtol=10 * tolerance, atol=10 * tolerance)
    assert one["weights"].keys() == other["weights"].keys()
    for name, value in one["weights"].items():
        difference = (other["weights"][name] - value).abs()
        off = difference > tolerance * (value.abs() + value.abs().max())
        assert off.sum() <= max(1, value.numel() // 1000), name
        assert difference.max() <= 0.01 * LEARNING_RATE, (name, difference.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings"),
    [(1, {}), (2, {}), (4, {}), (4, {"replicate": 2})],
    ids=["1", "2", "4", "2-copies-on-4"],
)
def test_several_processes_train_as_one(
    processes: int, settings: dict[str, Any], alone: dict[str, Any], tmp_path: Path
) -> None:
    launch(processes, tmp_path, ASYPPO_TEST_DISTRIBUTED=json.dumps(settings))
    for name, want in alone.items():
        same(want, torch.load(tmp_path / f"{name}.pt", weights_only=False))


@pytest.mark.slow
def test_a_mesh_of_one_computes_the_same_bits(alone: dict[str, Any], tmp_path: Path, rank_script: ModuleType) -> None:
    config = DistributedConfig(shard_single=True)
    with processes(config):
        cases = rank_script.cases(make_mesh(config, torch.device("cpu")))
        for name in ("asyppo", "grpo", "options", "side"):
            got = cases[name]()["weights"]
            assert all(torch.equal(got[key], value) for key, value in alone[name]["weights"].items())


@pytest.mark.slow
def test_saved_on_two_loaded_on_one_and_on_four(tmp_path: Path, rank_script: ModuleType) -> None:
    rank_script.write_models(tmp_path / "models")
    launch(2, tmp_path, "save", "generate", "collectives", "load_by_name", "save_in_background")
    want = torch.load(tmp_path / "save.pt", weights_only=False)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert damage(checkpoint) is None
    for size in (1, 4):
        (tmp_path / str(size)).mkdir()
        launch(size, tmp_path / str(size), "load", ASYPPO_TEST_CHECKPOINT=str(checkpoint))
        same(want, torch.load(tmp_path / str(size) / "load.pt", weights_only=False))
    same(want, rank_script.load(None, checkpoint))

    # What plain transformers loads is what was saved.
    for name, auto_class in (("policy", AutoModelForCausalLM), ("critic_1", AutoModelForTokenClassification)):
        prefix = {"policy": "model.", "critic_1": "critic_1."}[name]
        found = dict(auto_class.from_pretrained(checkpoint / name).named_parameters())
        saved = {key.removeprefix(prefix): v for key, v in want["saved"].items() if key.startswith(prefix)}
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], value) for key, value in saved.items())

    # Sampled from the weights that are trained, also after an update: the trainer computes the same log-probs.
    for row in torch.load(tmp_path / "generate.pt", weights_only=False):
        assert row["sampling/sampling_logp_difference/max"] < 1e-5
        assert row["response_length/min"] < row["response_length/max"]
        assert 1 <= row["perf/token_imbalance"] < 1.5

    # docs/scaling.md lists them. 2 layers, 1 micro-batch a pass, 3 minibatches of the policy and 2 of the critics.
    counts = torch.load(tmp_path / "collectives.pt", weights_only=False)
    one_pass = Counter(allgather_base=2 + 1)
    update = Counter(allgather_base=2 * 2 + 1, reduce_scatter_base=2 + 1)
    objects = Counter(allgather=2)  # their sizes, and they
    assert counts == {
        "gen": one_pass + objects,
        "reward": objects,
        "old_log_prob": one_pass + Counter(allreduce=1),
        "ref": one_pass + Counter(allreduce=1),
        "update_critic": times(2, update + Counter(allreduce=3)),
        "values": one_pass + Counter(allreduce=1),
        "adv": Counter(),
        "update_actor": times(3, update + Counter(allreduce=2)) + Counter(allreduce=2),
        "step": sum((counts[phase] for phase in counts if phase != "step"), Counter()) + Counter(allreduce=1),
    }

    # A rank reads its half of the weights, and the same bits as one process that loads them all.
    halves = torch.load(tmp_path / "load_by_name.pt", weights_only=False)
    for name, all_of_it in rank_script.load_by_name(None, tmp_path / "models").items():
        half, weights = halves[name], all_of_it["weights"]
        assert half["weights"].keys() == weights.keys()
        assert [key for key in weights if not torch.equal(half["weights"][key], weights[key])] == [], name
        assert torch.equal(half["drawn next"], all_of_it["drawn next"])
        assert half["peak"] < 0.6 * all_of_it["peak"], name  # of small models, one of whose weights is a part of them

    # Checkpoints that are written in the background of steps are those that steps wait for, and load.
    at_once, background = (tmp_path / name / "checkpoint-1" for name in ("at-once", "background"))
    assert damage(background) is damage(background.with_name("checkpoint-3")) is None
    files = {path.relative_to(at_once): path for path in at_once.rglob("*") if path.is_file()}
    assert files.keys() == {path.relative_to(background) for path in background.rglob("*") if path.is_file()}
    different = {str(name) for name, path in files.items() if path.read_bytes() != (background / name).read_bytes()}
    assert different <= {"config.yaml", "manifest.json", "state/.metadata"}  # the run's name


@pytest.mark.slow
def test_moments_in_8_bits_on_several_processes(tmp_path: Path, rank_script: ModuleType) -> None:
    launch(2, tmp_path, "moments")
    even, odd = torch.load(tmp_path / "moments.pt", weights_only=False)
    alone = rank_script.moments(None, tmp_path / "alone", 128)
    for name, want in alone["weights"].items():
        assert torch.equal(even["saved"][name], alone["saved"][name]), name
        assert torch.equal(even["weights"][name], want), name

    # What two saved, one goes on from, to the bit; but not where their pieces were no whole blocks.
    loaded = rank_script.moments(None, tmp_path / "128", 128)
    assert all(torch.equal(loaded["weights"][name], want) for name, want in even["weights"].items())
    assert not torch.equal(odd["saved"]["1.weight"], odd["weights"]["1.weight"])
    with pytest.raises(CheckpointError, match="cut into other blocks than here; needs as many processes"):
        rank_script.moments(None, tmp_path / "66", 66)


@pytest.mark.slow
def test_adapters_on_models_in_4_bits_on_several_processes(tmp_path: Path, rank_script: ModuleType) -> None:
    pytest.importorskip("bitsandbytes")
    models, wide = tmp_path / "models", {"hidden_size": 64, "intermediate_size": 128}
    rank_script.policy(**wide).model.save_pretrained(models / "policy")
    rank_script.critic(3, **wide).save_pretrained(models / "critic")
    launch(2, tmp_path, "qlora", ASYPPO_TEST_MODELS=str(models))
    two = torch.load(tmp_path / "qlora.pt", weights_only=False)
    alone = rank_script.qlora(None, models, tmp_path / "alone")
    same(alone, two)
    for found in (two, alone):
        assert all(torch.equal(found["resumed"][name], weight) for name, weight in found["weights"].items())
        assert found["sampled"]["sampling/sampling_logp_difference/max"] < 1e-5
    assert two["sent"].keys() == alone["sent"].keys()
    for name, weight in alone["sent"].items():
        torch.testing.assert_close(two["sent"][name], weight, rtol=1e-5, atol=1e-5)


def times(count: int, one: Counter[str]) -> Counter[str]:
    """``count`` times ``one``."""
    return Counter({name: count * number for name, number in one.items()})


RUN = """
max_steps: 12
save_steps: 2
output_dir: {tmp}/runs
prompts_per_step: 3
num_generations: 4
max_completion_length: 6
num_mini_batches: 2
report_to: []
data:
  task: {{name: chain_sum, params: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}}}
  train_size: 20
  eval_size: 4
warm_start:
  steps: 2
  batch_size: 4
  policy: &shape {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
    intermediate_size: 32}}
  critic: *shape
  cache_dir: {tmp}/cache
eval: {{num_generations: 2}}
distributed: {{timeout_s: 60}}
"""


def start(place: Path, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Train on two processes."""
    (place / "run.yaml").write_text(RUN.format(tmp=place))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command += ["-m", "asyppo", "train", "--config", str(place / "run.yaml"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_process(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(
        int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    )


def wait_for(path: Path, launcher: subprocess.Popen[str]) -> None:
    """Until it exists."""
    while not path.exists():
        assert launcher.poll() is None, "".join(launcher.communicate())[-6000:]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_rank(tmp_path: Path) -> None:
    launcher = start(tmp_path, "--run_name", "run", "--max_steps", "60", restarts=1)
    run = tmp_path / "runs" / "run"
    try:
        wait_for(run / "checkpoint-2", launcher)
        os.kill(rank_process(launcher, 1), signal.SIGKILL)
        # torchrun starts both again, and the run goes on.
        wait_for(run / "checkpoint-8", launcher)
        killed = time.monotonic()
        os.kill(rank_process(launcher, 1), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert time.monotonic() - killed < 40
    assert launcher.returncode != 0
    root_cause = errors[errors.index("Root Cause") :]
    assert re.search(r"rank +: 1 ", root_cause)
    assert "SIGKILL" in root_cause
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 9


@pytest.mark.slow
def test_a_run_on_two_processes_from_end_to_end(tmp_path: Path) -> None:
    launcher = start(tmp_path, "--max_steps", "3", "--run_name", "run")
    output, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    run = tmp_path / "runs" / "run"
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert output.count("held-out accuracy") == 1
    assert errors.count("step 3/3") == 1
    samples = read_jsonl(run / "samples.jsonl")
    assert {sample["group"] for sample in samples if sample["split"] == "train"} == {0, 1, 2}
    assert (run / "checkpoint-3" / "policy" / "model.safetensors").exists()

    # One message for a setting that cannot work, and for a reward function that fails on one rank only.
    faulty = tmp_path / "faulty.py"
    faulty.write_text(
        "import os\n\n\ndef reward(completions):\n    return [1 / (os.environ['RANK'] == '0') for _ in completions]\n"
    )
    for options, status in (
        (("--run_name", "run"), "run_name: .* exists"),
        (("--distributed.replicate", "3"), "distributed.replicate: got 3, needs a divisor"),
        (
            ("--reward_funcs", f"[{faulty}:reward]", "--eval.every", "0", "--data.eval_size", "0"),
            "reward function reward",
        ),
    ):
        launcher = start(tmp_path, *options)
        _, errors = launcher.communicate(timeout=300)
        assert launcher.returncode != 0
        assert len(re.findall(f"asyppo: error: {status}", errors)) == 1, errors

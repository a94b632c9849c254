"""The sampler on vLLM itself: that it draws from the policy after each update, and what would go wrong."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from asyppo.config import AsyPPOConfig, ConfigError, EnvironmentConfig, VLLMConfig
from asyppo.models.adapters import add_lora
from asyppo.models.policy import Policy
from asyppo.rollout.environments import environment_of, playing_of
from asyppo.rollout.samplers import EngineError, SentWeights, agreement, make_sampler, sends_weights, settle
from asyppo.rollout.samplers.vllm import weights, worker
from asyppo.rollout.samplers.vllm.server import Servers
from asyppo.rollout.samplers.vllm.transfer import NCCLTransfer
from asyppo.rollout.samplers.vllm.weights import path_of
from tests.vllm.training import ENGINE, children, model, running, tokenizer, training_command

PROMPTS = [torch.tensor(p) for p in ([3, 4, 5, 6, 7, 8, 9, 10, 11], [9], [10, 11])]


@pytest.fixture(scope="module", autouse=True)
def outside_the_interpreter() -> Iterator[None]:
    """vLLM has Triton kernels, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


def config(**settings: Any) -> AsyPPOConfig:
    """A configuration with vLLM."""
    vllm = VLLMConfig(engine_args=ENGINE, **settings.pop("vllm", {}))
    return AsyPPOConfig(sampler="vllm", vllm=vllm, max_completion_length=12, temperature=0.7, **settings)


def perturb(parameters: Any, by: float) -> None:
    """Change weights at random."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by * torch.randn_like(parameter))


class Answers:
    """Whatever is said, two letters."""

    def reset(self, seed: int) -> None:
        self.chance = Random(seed)

    def step(self, action: str) -> tuple[str, float, bool]:
        """Say them, or that it was enough."""
        return "".join(self.chance.choices("abcdefgh", k=2)), 0.0, self.chance.random() < 0.1


WORKER = """
import importlib.util, sys
from multiprocessing.connection import Connection
import torch

spec = importlib.util.spec_from_file_location("worker", {path!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

def load_past_reloading(engine):
    weights = [("model.layers.0.self_attn.q_proj.weight", torch.zeros(64, 64))]
    engine.collective_rpc(lambda one: one.get_model().load_weights(weights))

worker.METHODS["load_past_reloading"] = load_past_reloading
if __name__ == "__main__":
    worker.serve(Connection(int(sys.argv[1])))
"""


@pytest.mark.parametrize("tied", [True, False])
def test_log_probs_are_the_policys_after_each_update(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(WORKER.format(path=worker.__file__))
    monkeypatch.setattr(worker, "__file__", str(tmp_path / "worker.py"))
    policy, settings = Policy(model(tied), temperature=0.7), config()
    engine = make_sampler(policy, tokenizer(), settings)
    sampler = sends_weights(engine, engine, policy)
    assert isinstance(sampler, SentWeights)
    prompts = [p for p in PROMPTS for _ in range(3)]

    def draw(temperature: float = 0.7, limit: int = 12) -> list[list[int]]:
        torch.manual_seed(1)
        drawn = sampler.sample(prompts, max_completion_length=limit, temperature=temperature)
        assert all(len(r.tokens) == limit for r in drawn if r.truncated)
        assert all((r.tokens == 1).nonzero()[:, 0].tolist() == [len(r.tokens) - 1] for r in drawn if not r.truncated)
        return [r.tokens.tolist() for r in drawn]

    drawn = [draw()]
    assert draw() == drawn[0]  # seeds follow from torch's
    assert len({tuple(r) for r in drawn[0][:3]}) == 3  # and those of a group are different ones
    assert max(len(r) for r in draw(limit=5)) == 5
    assert draw(temperature=0.0)[0] == draw(temperature=0.0)[1]
    for _ in range(3):  # prompts are in the cache of prefixes by now
        assert agreement(sampler, policy, PROMPTS, settings).gap < 1e-4
        perturb(policy.parameters(), 0.05)
        sampler.stale = True
        drawn.append(draw())
    assert agreement(sampler, policy, PROMPTS, settings).gap < 1e-4
    assert drawn[0] != drawn[-1]

    # Turns with an environment: each goes on from the tokens that are there, which the cache of prefixes has.
    longer = AsyPPOConfig(max_completion_length=40, temperature=0.7)
    longer.environment = EnvironmentConfig(max_turn_length=6, max_parallel=1, timeout=None)
    playing = playing_of(environment_of(longer, Answers), tokenizer(), longer, [1], 128)
    assert playing is not None
    played = playing(sampler, [{"prompt": text} for text in "aaabbb"], 0.7)
    assert max(len(one.response.turns) for one in played) > 1
    for one in played:
        with torch.no_grad():
            logits = policy.model(torch.cat([one.prompt, one.response.tokens])[None]).logits[
                0, len(one.prompt) - 1 : -1
            ]
        logprob = (logits / 0.7).log_softmax(-1).gather(1, one.response.tokens[:, None])[:, 0]
        own = one.response.policy
        torch.testing.assert_close(one.response.logprob[own], logprob[own], atol=1e-3, rtol=0)

    # Adapters, merged, and of what they lie over the layer alone.
    add_lora(policy.model, r=2, alpha=4, target_modules=["layers.1.self_attn.q_proj"])
    perturb((p for p in policy.parameters() if p.requires_grad), 0.3)
    engine.changing = frozenset({"model.layers.1."})
    sampler.stale = True
    assert agreement(sampler, policy, PROMPTS, settings).gap < 1e-4

    # What goes wrong without a word: a head that is not sent.
    perturb(policy.model.get_input_embeddings().parameters(), 0.3)
    perturb(policy.model.get_output_embeddings().parameters(), 0.3)
    engine.changing = frozenset({"model.embed_tokens.weight"})
    sampler.stale = True
    assert agreement(sampler, policy, PROMPTS, settings).gap > 0.1
    # And with a word: weights that are loaded past reload_weights.
    with pytest.raises(EngineError, match=r"vLLM .* failed: .*weight_loader"):
        engine.engine.call("load_past_reloading")
    assert engine.engine.connection is None


def test_a_trainer_that_is_killed_takes_the_engine_along_and_goes_on(tmp_path: Path) -> None:
    command = training_command(tmp_path)
    with open(tmp_path / "output", "w") as output:
        trainer = subprocess.Popen(command, stdout=output, stderr=output)
    end = time.monotonic() + 300
    while not list((tmp_path / "runs").glob("run/checkpoint-3")) and time.monotonic() < end:
        assert trainer.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.05)
    engines = children(trainer.pid)
    assert len(engines) == 1
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    end = time.monotonic() + 20
    while (alive := [pid for pid in engines if running(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    assert alive == []
    reached = max(int(p.name.split("-")[1]) for p in (tmp_path / "runs" / "run").glob("checkpoint-*"))
    done = subprocess.run([*command, "--max_steps", str(reached + 2)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, reached + 3))
    assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 1e-4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the small model, with the developer mode, and gloo in the place of NCCL."""
    folder = tmp_path_factory.mktemp("server")
    model(tied=True).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    port = 8123 + os.getpid() % 1000
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--generation-config", "vllm", "--kv-cache-memory-bytes", str(2**26), "--max-num-seqs", "64"]
    command += [
        "--weight-transfer-config",
        '{"backend": "nccl"}',
        "--worker-extension-cls",
        "tests.vllm.gloo.Extension",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with open(folder / "output", "w") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        started.terminate()  # in order, so that it leaves no shared memory behind
        with suppress(subprocess.TimeoutExpired):
            started.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def test_a_server_gets_weights_and_its_log_probs_have_to_be_the_tempered_ones(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("tests.vllm.gloo")  # which changes vLLM in this process

    policy = Policy(model(tied=True), temperature=1.0)
    settings = config(vllm={"url": server, "start_timeout": 300})
    settings.temperature = 1.0
    engine = make_sampler(policy, tokenizer(), settings)
    sampler = sends_weights(engine, engine, policy)
    assert isinstance(sampler, SentWeights)
    for _ in range(2):
        assert agreement(sampler, policy, PROMPTS, settings).gap < 1e-4
        perturb(policy.parameters(), 0.05)
        sampler.stale = True
    # vLLM's own transfer, in pieces of a layer; in the place of NCCL is gloo.
    monkeypatch.setattr(weights, "PIECE_BYTES", 1)
    assert isinstance(engine.engine, Servers)
    engine.channel, engine.loaded = NCCLTransfer(engine.engine, policy.device, torch.float32), False
    for _ in range(3):
        assert agreement(sampler, policy, PROMPTS, settings).gap < 1e-4
        perturb(policy.parameters(), 0.05)
        sampler.stale = True
    # This one was started without --logprobs-mode processed_logprobs: its log-probs know no temperature.
    policy.temperature = 0.5
    with pytest.raises(ConfigError, match=r"log-probs differ from the trainer's by .* nats a token"):
        settle(sampler, engine, policy, PROMPTS, settings)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["processes", "server"])
def test_two_ranks(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """They have an engine each, or share a server: each draws its half of the prompts, by the weights of both."""
    urls = [request.getfixturevalue("server")] if where == "server" else []
    vllm = {"engine_args": ENGINE, "url": urls}
    [_, *arguments] = training_command(tmp_path, max_steps=3, save_steps=0, learning_rate=1e-3, vllm=vllm)
    before = set(path_of("x").parent.glob(f"*{weights.PREFIX}*"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3
    assert min(row["actor/grad_norm"] for row in rows) > 0
    assert set(path_of("x").parent.glob(f"*{weights.PREFIX}*")) <= before

"""vLLM as a sampler, without vLLM: the process and its ends, the weights on their way, the requests, the servers. A
module ``vllm`` that draws one response stands for the engine; ``tests/vllm`` has the real one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config

from asyppo.config import ConfigError, VLLMConfig
from asyppo.loop import TrainingError
from asyppo.models.adapters import add_lora
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import EngineError, SentWeights, make_sampler
from asyppo.rollout.samplers.vllm import weights as weights_module
from asyppo.rollout.samplers.vllm.process import EngineProcess
from asyppo.rollout.samplers.vllm.sampler import VLLMSampler
from asyppo.rollout.samplers.vllm.server import Servers
from asyppo.rollout.samplers.vllm.weights import WeightDirectory, changing, path_of

Make = Callable[..., Any]

ENGINE = """
import os, signal, sys, time
from types import SimpleNamespace as Bag

RequestOutput = None
ENDS = {"dies": lambda: os._exit(7), "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hangs": lambda: time.sleep(60), "fails": lambda: 1 / 0, "answers to nobody": lambda: time.sleep(0.2)}
SamplingParams = Bag

class LLM:
    def __init__(self, **arguments):
        self.calls = 0
        self.tell("load", arguments["model"])
        self.llm_engine = Bag(engine_core=Bag(shutdown=lambda: None))
        assert os.path.exists(arguments["model"] + "/config.json")

    def tell(self, *what):
        if "ENGINE_TELLS" in os.environ:
            with open(os.environ["ENGINE_TELLS"], "a") as file:
                print(os.getpid(), *what, file=file)

    def generate(self, prompts, samplings, use_tqdm):
        self.calls += 1
        self.tell("draw", *("".join(map(str, prompt["prompt_token_ids"])) for prompt in prompts))
        end, _, call = os.environ.get("ENGINE_ENDS", "").partition(" in call ")
        if call == str(self.calls):
            print("these were its last words", flush=True)
            ENDS[end]()
        answer = Bag(index=0, token_ids=(5, 1), logprobs=[{5: Bag(logprob=-1.0)}, {1: Bag(logprob=-2.0)}])
        return [Bag(outputs=[answer] * sampling.n) for sampling in samplings]

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights" and os.listdir(kwargs["weights_path"])
        self.tell("load", kwargs["weights_path"])

    def reset_prefix_cache(self):
        return True
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let processes find the module above under vLLM's name; ``ENGINE_ENDS`` says how and when one ends."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "vllm.py").write_text(textwrap.dedent(ENGINE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), *sys.path]))
    return monkeypatch


def engines() -> list[int]:
    """The processes of engines that this one has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            ours = f"PPid:\t{os.getpid()}" in (path / "status").read_text()
        except OSError:
            continue
        if ours and any(word.endswith(b"vllm/worker.py") for word in words):
            found.append(int(path.name))
    return found


LAST = "its last output: these were its last words"
ENDS = {
    "dies": f"has ended with exit status 7; {LAST}",
    "is killed": f"was killed by SIGKILL, as the system does when memory runs out; {LAST}",
    "hangs": f"did not answer within vllm.timeout = 0.5 s and was ended; {LAST}",
    "fails": "failed: ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("end", list(ENDS))
def test_an_engine_that_ends_is_one_line(tmp_path: Path, engine: pytest.MonkeyPatch, end: str) -> None:
    (tmp_path / "config.json").touch()
    engine.setenv("ENGINE_ENDS", f"{end} in call 1")
    process = EngineProcess({}, timeout=0.5 if end == "hangs" else 30)
    process.load(tmp_path)
    process.begin([[3]], [{"n": 1}])
    with pytest.raises(EngineError, match=rf"^vLLM \(process \d+\) {re.escape(ENDS[end])}$"):
        process.finish()
    assert engines() == []


@pytest.mark.parametrize("same", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_whose_engine_ends_is_saved_and_goes_on(
    tiny_config: Make, tiny_trainer: Make, engine: pytest.MonkeyPatch, same: bool
) -> None:
    config = tiny_config(
        sampler="vllm", algorithm="grpo", sampling_logp_tolerance=100.0, max_steps=3, report_to=[], logging_samples=0
    )
    engine.setenv("ENGINE_ENDS", "dies in call 4")  # the check, step 1, the check after its update, step 2
    with pytest.raises(TrainingError, match=rf"{ENDS['dies']}; the run is saved up to step 1, in .*checkpoint-1, and"):
        (trainer := tiny_trainer(config, lambda completions, **_: [1.0] * len(completions))).train()
    engine.delenv("ENGINE_ENDS")
    config.resume = True
    trainer = trainer if same else tiny_trainer(config, lambda completions, **_: [1.0] * len(completions))
    run = trainer.train().run
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]


def test_an_engine_without_vllm_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"^vLLM \(process \d+\) failed: ModuleNotFoundError: No module named 'vllm'$"
    ):
        EngineProcess({}, environment={"PYTHONPATH": ""}).load(tmp_path)
    with pytest.raises(EngineError, match=r"^vllm\.python: cannot run /nowhere/python: No such file or directory$"):
        EngineProcess({}, python="/nowhere/python").load(tmp_path)


@pytest.mark.parametrize("end", ["hangs", "answers to nobody"])
def test_nothing_is_left_of_a_trainer_that_was_killed(tmp_path: Path, engine: pytest.MonkeyPatch, end: str) -> None:
    path = tmp_path / "asyppo-weights-killed"
    engine.setenv("ENGINE_ENDS", f"{end} in call 1")
    reading, writing = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        directory = WeightDirectory(path, Qwen3Config(), "Qwen3ForCausalLM", torch.float32)
        directory.write(iter({"weight": torch.ones(2)}.items()), lambda name: True)
        process = EngineProcess({})
        process.load(directory.path)
        process.begin([[3]], [{"n": 1}])
        os.write(writing, str(process.process.pid).encode())
        time.sleep(60)
        os._exit(0)
    pid = int(os.read(reading, 100))
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    end = time.monotonic() + 10
    while (alive := running(pid)) and time.monotonic() < end:
        time.sleep(0.1)
    assert (alive, path.exists()) == (False, False)


def running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_ranks_have_an_engine_each_and_one_directory_of_weights(
    tmp_path: Path, tiny_lm: Make, tokenizer: Any, engine: pytest.MonkeyPatch, ahead: int
) -> None:
    tiny_lm().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": c, "answer": "a"}) + "\n" for c in "abcd"))
    settings = {
        "sampler": "vllm",
        "async_generation": ahead,
        "algorithm": "grpo",
        "sampling_logp_tolerance": 100.0,
        "max_steps": 2,
        "prompts_per_step": 4,
        "num_generations": 2,
        "num_mini_batches": 1,
        "max_completion_length": 4,
        "report_to": [],
        "output_dir": str(tmp_path / "runs"),
        "run_name": "run",
        "reward_funcs": ["exact_match"],
        "policy": {"model_name_or_path": str(tmp_path / "model")},
        "data": {"dataset_name": str(tmp_path / "rows.jsonl"), "eval_size": 0},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    engine.setenv("ENGINE_TELLS", str(tmp_path / "told"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "asyppo", "train", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, list[list[str]]] = {}
    for line in (tmp_path / "told").read_text().splitlines():
        pid, *what = line.split()
        told.setdefault(pid, []).append(what)
    one, other = told.values()
    loads = [[words[1] for words in of_engine if words[0] == "load"] for of_engine in (one, other)]
    assert loads[0] == loads[1]
    assert len(set(loads[0])) == 1
    assert not Path(loads[0][0]).exists()
    steps = [[words[1:] for words in of_engine if words[0] == "draw"] for of_engine in (one, other)]
    drawn = [sorted(a + b) for a, b in zip(*steps, strict=True) if len(a) == len(b) == 2]
    assert drawn.count(sorted("3456")) >= 2  # each step all prompts, half at each engine


class Recorder:
    """An engine that keeps what it is told."""

    def __init__(self) -> None:
        self.loads: list[dict[str, torch.Tensor]] = []
        self.requests: list[tuple[list[list[int]], list[dict[str, Any]]]] = []
        self.said: list[Any] = []

    def load(self, directory: Path) -> None:
        """Keep the weights."""
        self.loads.append({k: v for p in sorted(directory.glob("*.safetensors")) for k, v in load_file(p).items()})

    def begin(self, prompts: Any, samplings: Any) -> None:
        """Keep the request."""
        self.requests.append((prompts, samplings))

    def finish(self) -> Any:
        """Return as many responses as were asked for, of the first prompt's first token and the end."""
        prompts, samplings = self.requests[-1]
        return [[([p[0], 1], [-1.0, -0.5])] * s["n"] for p, s in zip(prompts, samplings, strict=True)]

    def sleep(self, level: int) -> None:
        """Keep the level."""
        self.said.append(level)

    def wake(self, tags: list[str]) -> None:
        """Keep the tags."""
        self.said.append(sorted(tags))


def sampler_of(policy: Policy, place: Path, **options: Any) -> tuple[SentWeights, Recorder]:
    """A sampler on an engine that records."""
    engine, model = Recorder(), policy.model
    directory = WeightDirectory(place / "weights", model.config, type(model).__name__, torch.float32)
    made = VLLMSampler(engine, directory, eos_token_ids=[1], changing=changing(model), **options)
    return SentWeights(made, made, policy.weights), engine


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_sent_merged_and_only_what_they_change_after_the_first_time(
    tiny_lm: Make, tmp_path: Path, tied: bool
) -> None:
    model, plain = tiny_lm(tie_word_embeddings=tied), tiny_lm(tie_word_embeddings=tied)
    add_lora(model, r=2, alpha=4, target_modules=["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"])
    policy = Policy(model)
    sampler, engine = sampler_of(policy, tmp_path)
    everything = set(plain.state_dict())
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter))
        sampler.stale = True
        sampler.send()
        plain.load_state_dict(engine.loads[-1], strict=False)
        ids = torch.arange(3, 12)[None]
        torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    layer = {name for name in everything if name.startswith("model.layers.1.")}
    assert [set(load) for load in engine.loads] == [everything, layer]
    assert sampler.engine.channel.path.exists()
    assert not list(sampler.engine.channel.path.glob("*.safetensors"))  # they take memory


def test_requests_are_groups_with_seeds_that_follow_from_torchs(tiny_lm: Make, tmp_path: Path) -> None:
    sampler, engine = sampler_of(Policy(tiny_lm()), tmp_path)
    prompts = [torch.tensor(p) for p in ([3, 4], [3, 4], [5], [3, 4])]
    for temperature in (0.7, 0.7, 0.0):
        torch.manual_seed(1)
        drawn = sampler.sample(prompts, max_completion_length=9, temperature=temperature)
        assert [r.tokens.tolist() for r in drawn] == [[3, 1], [3, 1], [5, 1], [3, 1]]
        assert [r.truncated for r in drawn] == [False] * 4
        assert drawn[0].logprob.tolist() == ([-1.0, -0.5] if temperature else [0.0, 0.0])
    (groups, samplings), again, (_, greedy) = engine.requests
    assert [s["n"] for s in greedy] == [1, 1, 1]  # vLLM refuses to draw several that are all the same
    assert (groups, samplings) == again
    assert groups == [[3, 4], [5], [3, 4]]
    assert [s["n"] for s in samplings] == [2, 1, 1]
    assert len({s["seed"] for s in samplings}) == 3
    told = {k: samplings[0][k] for k in ("temperature", "max_tokens", "stop_token_ids", "ignore_eos", "logprobs")}
    assert told == {"temperature": 0.7, "max_tokens": 9, "stop_token_ids": [1], "ignore_eos": True, "logprobs": 0}
    with pytest.raises(ConfigError, match=r"^temperature: got 0\.001, needs at least 0\.01 or 0 with sampler vllm"):
        sampler.sample(prompts, max_completion_length=9, temperature=0.001)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_sleep_gives_memory_back_and_level_2_gets_all_weights_again(tiny_lm: Make, tmp_path: Path, level: int) -> None:
    policy = Policy(tiny_lm())
    policy.model.model.embed_tokens.weight.requires_grad = False
    sampler, engine = sampler_of(policy, tmp_path, sleep_level=level)
    for _ in range(2):
        sampler.sample([torch.tensor([3])], max_completion_length=2, temperature=1.0)
        sampler.rest()
    everything = len(engine.loads[0])
    assert [len(load) for load in engine.loads] == {0: [everything], 1: [everything], 2: [everything] * 2}[level]
    waking = {0: [], 1: [["kv_cache", "weights"]], 2: [["weights"], ["kv_cache"]]}[level]
    assert engine.said == ([level, *waking, level] if level else [])


def test_settings_that_cannot_work_are_refused(tiny_config: Make, tiny_lm: Make, tokenizer: Any) -> None:
    policy = Policy(tiny_lm())
    for settings, said in (
        (VLLMConfig(sleep_level=1), r"^vllm\.sleep_level: got 1, needs 0 with a CPU, where vLLM does not sleep$"),
        (VLLMConfig(sleep_level=2, url=["http://a"]), r"^vllm\.sleep_level: got 2, needs 0 with servers, which have"),
        (VLLMConfig(weight_transfer="nccl"), r"^vllm\.weight_transfer: got nccl, needs a policy on a GPU; directory"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_sampler(policy, tokenizer, tiny_config(sampler="vllm", vllm=settings))
    assert tiny_config(vllm=VLLMConfig(url="http://a")).vllm.url == ["http://a"]
    with pytest.raises(ConfigError, match=r"^vllm\.url: got \['a:8000'\], needs addresses such as http://"):
        tiny_config(vllm=VLLMConfig(url="a:8000")).validate()
    made = make_sampler(
        policy, tokenizer, tiny_config(sampler="vllm", vllm=VLLMConfig(engine_args={"max_num_seqs": 9}))
    )
    assert isinstance(made, VLLMSampler)
    assert isinstance(made.engine, EngineProcess)
    assert made.engine.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    wanted = {"logprobs_mode": "processed_logprobs", "dtype": "float32", "max_num_seqs": 9}
    assert {name: made.engine.arguments[name] for name in wanted} == wanted


def test_directories_of_killed_owners_go_and_those_of_living_ones_stay(tiny_lm: Make, tmp_path: Path) -> None:
    model = tiny_lm()

    def directory(name: str) -> WeightDirectory:
        return WeightDirectory(path_of(name, str(tmp_path)), model.config, type(model).__name__, torch.float32)

    weights = {"weight": torch.ones(2)}
    living, new = directory("living"), directory("new")
    living.write(iter(weights.items()), lambda name: True)
    killed = path_of("killed", str(tmp_path))
    killed.mkdir()
    (killed / "lock").touch()
    new.write(iter(weights.items()), lambda name: True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asyppo-weights-living", "asyppo-weights-new"]
    assert json.loads((new.path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


@pytest.fixture
def server() -> Iterator[Callable[..., tuple[str, list[tuple[str, Any]]]]]:
    """Start something that answers as a vLLM server, and return its address and what it was asked."""
    running = []

    def start(
        *, developer: bool = True, slow: float = 0.0, says: bytes | None = None
    ) -> tuple[str, list[tuple[str, Any]]]:
        asked: list[tuple[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, None)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, body))
                if self.path == "/v1/completions":
                    time.sleep(slow)
                    choice = {"token_ids": [body["prompt"][0], 1], "logprobs": {"token_logprobs": [-1.0, -0.5]}}
                    self.answer(200, {"choices": [choice | {"index": i} for i in reversed(range(body["n"]))]})
                else:
                    self.answer(200 if developer else 404, {"success": True})

            def answer(self, status: int, content: Any) -> None:
                text = json.dumps(content).encode() if says is None else says
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=found.serve_forever, args=[0.05], daemon=True).start()
        running.append(found)
        return f"http://127.0.0.1:{found.server_port}/v1", asked

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def test_servers_take_turns_with_prompts_and_all_get_the_weights(server: Make, tmp_path: Path) -> None:
    (one, asked_one), (other, asked_other) = server(), server()
    servers = Servers([one, other])
    servers.load(tmp_path)
    servers.begin([[3], [4], [5]], [{"n": 2, "seed": i} for i in range(3)])
    assert [[tokens for tokens, _ in drawn] for drawn in servers.finish()] == [[[t, 1]] * 2 for t in (3, 4, 5)]
    for asked in (asked_one, asked_other):
        paths = [path for path, _ in asked]
        assert paths[:4] == ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]
        assert asked[1][1]["kwargs"] == {"weights_path": str(tmp_path)}
    assert sorted(len(asked) for asked in (asked_one, asked_other)) == [5, 6]


def test_a_layer_is_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "PIECE_BYTES", 1)
    names = ["embed.weight", "layers.0.q.weight", "layers.0.k.weight", "layers.1.q.weight", "head.weight"]
    given = ((name, torch.ones(2)) for name in names)
    found = weights_module.pieces(given, lambda name: name != "embed.weight", torch.device("cpu"), torch.bfloat16)
    pieces = list(found)
    assert [list(piece) for piece in pieces] == [names[1:3], names[3:4], names[4:]]
    assert pieces[0][names[1]].dtype == torch.bfloat16


def test_requests_do_not_wait_for_each_other(server: Make) -> None:
    url, asked = server(slow=0.3)
    servers = Servers([url], timeout=10)
    # Weights are sent by work that lets others do work, before anything was drawn.
    servers.within_timeout(lambda: servers.everywhere("/resume"))
    assert asked == [("/resume", {})]
    servers.begin([[3]] * 9, [{"n": 1}] * 9)
    servers.finish()
    assert servers.threads >= 9
    with pytest.raises(ZeroDivisionError), servers.paused():
        1 / 0  # noqa: B018
    assert asked[-1][0] == "/resume"


def test_a_server_that_fails_is_one_line(server: Make, tmp_path: Path) -> None:
    url, _ = server(developer=False)
    with pytest.raises(EngineError, match=r"answered /pause\?mode=wait with 404: .*; needs VLLM_SERVER_DEV_MODE=1"):
        Servers([url]).load(tmp_path)
    url, _ = server(slow=1.0)
    slow = Servers([url], timeout=0.2)
    slow.begin([[3]], [{"n": 1}])
    with pytest.raises(EngineError, match=r"did not answer /v1/completions within vllm\.timeout = 0\.2 s$"):
        slow.finish()
    for answer, said in (
        (b"<html>hello\n</html>", "with no JSON, needs a vLLM server: <html>hello </html>$"),
        (b"{}", ""),
    ):
        url, _ = server(says=answer)
        other = Servers([url])
        other.begin([[3]], [{"n": 1}])
        with pytest.raises(
            EngineError, match=f"answered /v1/completions {said or 'without tokens and log-probs: {}$'}"
        ):
            other.finish()
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 is not there after vllm\.start_timeout = 0\.1 s: .*refused"):
        Servers(["http://127.0.0.1:9"], start_timeout=0.1).load(tmp_path)

"""The command line: help, errors in one line, and a whole tiny run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyppo.cli.main import main, parse
from asyppo.config import AsyPPOConfig
from asyppo.config import schema as config_module
from asyppo.config.fields import by_path, nearest
from asyppo.run.directory import read_jsonl

TINY = """
algorithm: asyppo
max_steps: 2
output_dir: {tmp}/runs
prompts_per_step: 2
num_generations: 4
max_completion_length: 6
num_mini_batches: 2
learning_rate: 1.0e-3
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
"""


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Arguments of a tiny run."""
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(tmp=tmp_path))
    return ["train", "--config", str(file)]


def metrics(path: Path) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("timing_s/", "perf/"))}
        for row in read_jsonl(path / "metrics.jsonl")
    ]


def test_a_whole_run_and_a_second_one(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, "--run_name", "one"]) == 0
    out, err = capsys.readouterr()
    assert "teach the policy 2/2" in err
    assert "Traceback" not in err
    lines = out.splitlines()
    accuracy = re.fullmatch(r"held-out accuracy: (\d\.\d{4}) -> (\d\.\d{4})", lines[0])
    assert accuracy
    rows = metrics(tmp_path / "runs" / "one")
    assert [f"{rows[i]['eval/accuracy']:.4f}" for i in (0, -1)] == list(accuracy.groups())
    paths = [Path(line.split(maxsplit=1)[1]) for line in lines[1:]]
    assert [path.name for path in paths] == ["one", "metrics.jsonl", "report.html", "samples.jsonl", "checkpoint-2"]
    assert all(path.exists() for path in paths)
    AutoModelForCausalLM.from_pretrained(paths[-1] / "policy")

    # The second run finds the models in the cache, and does the same, bit for bit.
    assert main([*tiny, "--run_name", "two"]) == 0
    assert "teach" not in capsys.readouterr().err
    assert metrics(tmp_path / "runs" / "two") == rows

    # Its checkpoint is a model like any other.
    again = ["--warm_start", "null", "--policy.model_name_or_path", str(paths[-1] / "policy")]
    again += ["--critic.model_name_or_path", str(paths[-1] / "critic_0"), "--run_name", "three"]
    assert main([*tiny, *again]) == 0
    assert metrics(tmp_path / "runs" / "three")[0]["eval/accuracy"] == rows[-1]["eval/accuracy"]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_baselines(tiny: list[str], tmp_path: Path, algorithm: str) -> None:
    assert main([*tiny, "--algorithm", algorithm, "--run_name", "one", "--data.eval_size", "0"]) == 0
    assert len(metrics(tmp_path / "runs" / "one")) == 2


def test_going_on(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [*tiny, "--run_name", "one", "--resume"]
    assert main(command) == 0  # there is no such run yet
    first = capsys.readouterr().out
    rows = metrics(tmp_path / "runs" / "one")
    assert main(command) == 0  # it is at its end
    assert capsys.readouterr().out == first
    assert metrics(tmp_path / "runs" / "one") == rows
    assert main([*command, "--max_steps", "3"]) == 0
    assert metrics(tmp_path / "runs" / "one")[:3] == rows
    assert len(metrics(tmp_path / "runs" / "one")) == 4
    capsys.readouterr()
    assert main([*command, "--seed", "1", "--beta", "0.1"]) == 2
    err = capsys.readouterr().err
    assert "config.yaml: seed is 0 there, got 1, beta is 0.0 there, got 0.1; --resume may change max_steps, " in err
    assert len(err.splitlines()) == 1
    for file in (tmp_path / "runs" / "one").glob("checkpoint-*/rng.json"):
        file.unlink()
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("asyppo: error: no checkpoint in ")
    assert "Traceback" not in err


def test_eval_of_a_run_and_of_its_model(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, "--run_name", "one", "--save_steps", "1"]) == 0
    run, trained = tmp_path / "runs" / "one", metrics(tmp_path / "runs" / "one")
    capsys.readouterr()

    def evaluated(name: str, model: Path, *arguments: str) -> dict[str, Any]:
        assert main(["eval", "--model", str(model), "--out", str(tmp_path / name), *arguments]) == 0
        out, err = capsys.readouterr()
        assert "sample 8/8" in err
        result = json.loads((tmp_path / name / "eval.json").read_text())
        accuracy = result["all"]["avg@2"]
        assert f"{accuracy['value']:.4f} [{accuracy['low']:.4f}, {accuracy['high']:.4f}]" in out
        assert out.splitlines()[0].split() == ["task", "prompts", "avg@2", "pass@2", "response_length", "truncated"]
        return result

    # The run's own settings, so the numbers are those that training logged.
    last = evaluated("last", run)
    assert last["model"] == str(run / "checkpoint-2" / "policy")
    assert last["all"]["avg@2"]["value"] == trained[-1]["eval/accuracy"]
    assert last["all"]["response_length"] == trained[-1]["eval/response_length/mean"]
    samples = [{k: v for k, v in s.items() if k != "step"} for s in read_jsonl(run / "samples.jsonl")]
    assert read_jsonl(tmp_path / "last" / "samples.jsonl") == [s for s in samples if s["split"] == "eval"][-8:]

    first = evaluated("first", run / "checkpoint-1")
    assert first["model"] == str(run / "checkpoint-1" / "policy")
    again = evaluated("again", run / "checkpoint-1" / "policy", "--max_completion_length", "3")
    assert again["config"]["max_completion_length"] == 3
    assert again["config"]["data"] == last["config"]["data"]
    assert again["all"]["response_length"] <= 3

    # A model of no run needs to be told on what.
    shutil.copytree(run / "checkpoint-2" / "policy", tmp_path / "model")
    assert evaluated("alone", tmp_path / "model", *tiny[1:])["all"] == last["all"]
    for arguments, named in (
        ([], "--model: .*/model is of no run, so what to evaluate it on is not known; needs --config"),
        ([*tiny[1:], "--out", str(tmp_path / "last")], "--out: .* exists"),
        ([*tiny[1:], "--data.eval_size", "0"], "data.eval_size: got 0"),
        ([*tiny[1:], "--model", "/no/such"], "--model: got '/no/such', but there is no such directory"),
        ([*tiny[1:], "--modle", "x"], "--modle: unknown option; did you mean --model"),
    ):
        assert main(["eval", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "new"), *arguments]) == 2
        assert re.search(named, capsys.readouterr().err), arguments
        assert not (tmp_path / "new").exists()
    shutil.rmtree(run / "checkpoint-1")
    shutil.rmtree(run / "checkpoint-2")
    assert main(["eval", "--model", str(run), "--out", str(tmp_path / "new")]) == 2
    assert "has no checkpoint, needs one" in capsys.readouterr().err


@pytest.mark.slow
def test_audits_of_a_run(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, "--run_name", "one", "--save_steps", "1"]) == 0
    run = tmp_path / "runs" / "one"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "report.html"}
    capsys.readouterr()
    values = ["audit", str(run), "--states", "16", "--continuations", "4"]
    assert main(values) == 0
    out, err = capsys.readouterr()
    assert "states 16/16" in err
    assert out.startswith("Values against the truth V*\n")
    assert out.splitlines()[-2:] == [f"results: {run}/audit-2.json", f"report:  {run}/report.html"]
    written = (run / "audit-2.json").read_text()
    found = json.loads(written)
    assert (found["kind"], found["step"], found["settings"]["split"]) == ("audit", 2, "eval")
    assert found["results"]["states"] == 16
    assert 'id="audits"' in (run / "report.html").read_text()
    assert main([*values, "--set", "output_dir=elsewhere", "--out", str(tmp_path / "new" / "again.json")]) == 0
    assert (tmp_path / "new" / "again.json").read_text() == written
    capsys.readouterr()

    gradients = ["audit", str(run / "checkpoint-1"), "--gradients", "--batches", "4", "--reference_batches", "4"]
    arms = [
        "--arm",
        "run: lam=0.95",
        "--arm",
        "algorithm=grpo",
        "--arm",
        "one: critic.num_critics=1",
        "--critic_steps",
        "1",
    ]
    assert main([*gradients, *arms]) == 0
    out, err = capsys.readouterr()
    assert "batches 9/9" in err
    found = json.loads((run / "gradients-1.json").read_text())
    assert list(found["results"]["arms"]) == ["run", "algorithm=grpo", "one"]
    assert out.splitlines()[0].startswith("Policy gradients of 4 batches, with a reference of 4 others")
    assert {path: path.read_bytes() for path in before} == before

    for arguments, named in (
        (
            ["audit", str(tmp_path)],
            "audit: got '.*', needs the directory of a run that has a checkpoint, or a checkpoint",
        ),
        ([*values, "--arm", "lam=1"], "--arm: got one, needs --gradients"),
        ([*values, "--split", "test"], "--split: got 'test', needs eval or train"),
        ([*values, "--stats", "3"], "--stats: unknown option; did you mean --states"),
        ([*values, "--set", "lam"], "--set: got 'lam', needs settings as key=value"),
    ):
        assert main(arguments) == 2
        assert re.search(named, capsys.readouterr().err), arguments


def test_falling_short_is_an_error(tiny: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, "--eval.min_gain", "0.9"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("held-out accuracy: ")
    assert re.search(r"error: held-out accuracy rose by -?\d\.\d{4}, less than eval\.min_gain = 0\.9$", err.strip())


def test_a_failed_run(tiny: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyppo.trainer._clip_and_step", lambda *_: None)
    assert main([*tiny, "--max_skipped_steps", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("asyppo: error: 1 steps in a row had a non-finite loss or gradient")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nope", "1"], "--nope: unknown option; see --help"),
        (["--critic.num_critic", "1"], "--critic.num_critic: unknown option; did you mean --critic.num_critics?"),
        (["--num_critics=1"], "--num_critics: unknown option; did you mean --critic.num_critics?"),
        (["--num_critic=1"], "--num_critic: unknown option; did you mean --critic.num_critics?"),
        (["--critic.lora_alpa=1"], "--critic.lora_alpa: unknown option; did you mean --critic.lora_alpha?"),
        (["--policy.lora_alpa=1"], "--policy.lora_alpa: unknown option; did you mean --policy.lora_alpha?"),
        (["--lerning_rate", "1"], "--lerning_rate: unknown option; did you mean --learning_rate?"),
        (["--kl_coef=1"], "--kl_coef: unknown option; did you mean --beta?"),
        (["--warm_start.stesp", "1"], "--warm_start.stesp: unknown option; did you mean --warm_start.steps?"),
        (["--data.task.parms.min_terms", "1"], "did you mean --data.task.params?"),
        (["--critic.lora_rank", "4"], "--critic.lora_rank: unknown option; its name is --critic.lora_r now"),
        (["--critic", "{num_critc: 3}"], "critic.num_critc: unknown key in --critic; did you mean critic.num_critics?"),
        (["--max_steps", "many"], "max_steps: got 'many', needs an integer"),
        (["--critic.num_critics", "2.5"], "critic.num_critics: got '2.5', needs an integer"),
        (["--warm_start.steps", "x"], "warm_start.steps: got 'x', needs an integer"),
        (["--warm_start.policy.hidden_size", "x"], "warm_start.policy.hidden_size: got 'x', needs an integer"),
        (["--eval.min_gain", "x"], "eval.min_gain: got 'x', needs a number or null"),
        (["--reward_funcs", "3"], "reward_funcs: got '3', needs one of reasoning_gym, exact_match"),
        (["--max_steps"], "--max_steps"),
        (["more"], "more"),
        (["--algorithm", "reinforce"], "algorithm: got 'reinforce', needs one of asyppo, ppo, grpo"),
        (["--advantage_mask_fraction", "1.0"], "advantage_mask_fraction: got 1.0, needs a fraction in [0, 1)"),
        (["--entropy_filter_fraction", "-0.1"], "entropy_filter_fraction"),
        (["--num_generations", "1"], "num_generations: got 1, needs at least critic.num_critics = 2"),
        (["--num_generations", "1", "--algorithm", "grpo"], "num_generations: got 1, needs at least 2"),
        (["--learning_rate", "0"], "learning_rate: got 0.0, needs a positive number"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--eval.num_generations", "0"], "eval.num_generations"),
        (["--eval.every", "-1"], "eval.every"),
        (["--data.eval_size", "0", "--eval.min_gain", "0.1"], "data.eval_size"),
        (["--data.train_size", "2000"], "data.task"),
        (["--data.task.name", "nope"], "data.task: got 'nope'"),
        (["--reward_funcs", "[nope]"], "reward_funcs: got 'nope'"),
        (["--config", "/no/such.yaml"], "config: cannot read '/no/such.yaml'"),
        (["--config=defualt"], "config: cannot read 'defualt': No such file or directory"),
        (["--warm_start", "null"], "policy.model_name_or_path"),
        (["--policy.model_name_or_path", "/x"], "policy.model_name_or_path"),
        (["--critic.model_name_or_path", "/x"], "critic.model_name_or_path"),
        (["--warm_start", "null", "--policy.model_name_or_path", "/no/such/model"], "model_name_or_path"),
        (["--run_name", "taken"], "taken exists, needs a new name, or --resume to go on with that run"),
        (["--resume"], "run_name: got None, needs the name of the run that --resume goes on with"),
        (["--run_name", "taken", "--resume"], "taken has no config.yaml, needs the directory of a run"),
        (["--save_total_limit", "0"], "save_total_limit: got 0, needs an integer of at least 1"),
        (["--report_to", "[visdom]"], "report_to"),
    ],
)
def test_a_setting_that_cannot_work(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], named: str
) -> None:
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "notes").write_text("")
    assert main([*tiny, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("asyppo: error: ")
    assert named in err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]  # nothing was begun


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("critic: {num_critic: 3}", "critic.num_critic: unknown key in bad.yaml; did you mean critic.num_critics?"),
        ("num_critics: 3", "num_critics: unknown key in bad.yaml; did you mean critic.num_critics?"),
        ("warm_start: {policy: {width: 3}}", "warm_start.policy.width: unknown key in bad.yaml"),
        ("warm_start: {steps: x}", "warm_start.steps: got 'x', needs an integer"),
        ("critic: {lora_rank: 4}", "critic.lora_rank: unknown key in bad.yaml; its name is critic.lora_r now"),
        ("data: {tasks: [{nam: gcd}]}", "nam: unknown key of data.tasks[0] in bad.yaml; did you mean name?"),
        ("data: {tasks: [{weight: x}]}", "data.tasks.weight: got 'x', needs a positive, finite number"),
        ("critic: 3", "critic: got 3 in bad.yaml, needs a mapping of settings"),
        ("- critic", "config: got ['critic'] in bad.yaml, needs a mapping of settings"),
        ("", "config: got None in bad.yaml, needs a mapping of settings"),
        ("a: [1", "config: bad.yaml is no YAML: while parsing a flow sequence"),
    ],
)
def test_a_file_that_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, text: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    assert main(["train", "--config", "bad.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"asyppo: error: {named}")
    assert len(err.splitlines()) == 1


def test_a_traceback_only_where_it_is_asked_for(
    tiny: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [*tiny, "--learning_rate", "0"]
    message = "asyppo: error: learning_rate: got 0.0, needs a positive number"
    assert main(wrong) == 2
    assert capsys.readouterr().err.splitlines() == [message]
    assert main([*wrong, "--traceback"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == message
    monkeypatch.setenv("ASYPPO_TRACEBACK", "1")
    assert main(wrong) == 2
    assert "Traceback" in capsys.readouterr().err
    # What nobody foresaw is never hidden.
    monkeypatch.setattr("asyppo.cli.build.load_eval_rows", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(tiny)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tiny: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("asyppo: error: device: got 'cuda', but torch finds no GPU")


def test_a_model_without_a_tokenizer(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, tiny_lm: Callable[..., Any]
) -> None:
    tiny_lm().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert main([*tiny, "--warm_start", "null", "--policy.model_name_or_path", str(tmp_path / "model")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [[], ["--help"], ["--version"], ["train", "--help"], ["eval", "--help"]])
def test_help_needs_no_torch(command: list[str]) -> None:
    program = "import sys; from asyppo.cli.main import main\n"
    program += f"try: main({command})\nexcept SystemExit as stop: assert stop.code == 0\n"
    program += "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "asyppo" in result.stdout


def test_an_unknown_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "asyppo: error: trian: unknown command; did you mean train?\n"


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Paths of all fields, null or not, found in another way than the help finds them."""
    for field in dataclasses.fields(cls):
        names = re.findall(r"\w+", str(field.type))
        nested = next((c for name in names if dataclasses.is_dataclass(c := getattr(config_module, name, None))), None)
        if nested is not None and not str(field.type).startswith("list"):
            yield from leaves(nested, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_help_explains_every_field(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    paths = list(leaves(AsyPPOConfig))
    assert "warm_start.policy.hidden_size" in paths
    for path in paths:
        [place] = [i for i, line in enumerate(lines) if line.startswith(f"  --{path}  [default: ")]
        assert len(lines[place + 1].strip()) > 3, path
    text = " ".join(" ".join(lines).split())
    assert "--critic.num_critics [default: 2; an integer of at least 1] M. The paper's sweet spot is 2." in text
    assert "--epsilon_high [default: 0.28; a number of at least 0]" in text
    assert "--warm_start.critic.hidden_size [default: 64; an integer of at least 1]" in text
    assert "k: fraction of tokens whose advantage is masked. The paper's." in text


def test_names_of_other_trainers_lead_to_fields() -> None:
    known = by_path(AsyPPOConfig)
    elsewhere = [(name, path) for path, field in known.items() for name in field.facts.elsewhere]
    assert ("kl_coef", "beta") in elsewhere
    assert len(dict(elsewhere)) == len(elsewhere)  # no name leads to two fields
    assert not set(dict(elsewhere)) & set(known)
    assert all(nearest(name, known) == path for name, path in elsewhere)


def test_true_goes_without_saying() -> None:
    config = parse(["train", "--policy.use_peft", "--seed", "3", "--policy.trust_remote_code"])
    assert (config.policy.use_peft, config.policy.trust_remote_code, config.seed) == (True, True, 3)
    assert not parse(["train", "--policy.use_peft", "false"]).policy.use_peft


def test_without_a_file_the_embedded_default_runs() -> None:
    assert parse(["train"]) == parse(["train", "--config", "default"])
    config = parse(["train", "--seed", "7"])
    assert config.seed == 7
    assert config.algorithm == "asyppo"
    assert config.warm_start is not None
    assert config.eval.min_gain is not None
    assert config.eval.min_gain >= 0.2
    assert (config.data.eval_size, config.eval.num_generations, config.eval.temperature) == (512, 4, 1.0)
    default = Path(__file__).parents[2] / "asyppo" / "config" / "ready" / "default.yaml"
    assert parse(["train", "--config", str(default)]).seed == 0

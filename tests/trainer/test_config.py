"""Configurations without the command line: from a name, a file or a mapping, the same as with it; facts of settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

import asyppo
import asyppo_kernels
from asyppo.cli.main import parse
from asyppo.config import AsyPPOConfig, ConfigError, TaskConfig, WarmStartConfig, load_config
from asyppo.config.fields import by_path, may_change, renamed
from asyppo.config.files import READY_CONFIGS, merged
from asyppo.config.setting import Facts, check, in_words, setting

SETTINGS: dict[str, Any] = {
    "algorithm": "ppo",
    "learning_rate": "1e-4",  # as YAML 1.1 has it, text
    "max_steps": 7,
    "run_name": "2026-01-31",
    "report_to": ["wandb"],
    "reward_weights": [1, 0.5],
    "policy": {"use_peft": True, "lora_target_modules": ["q_proj"]},
    "critic": {"cliprange_value": 0.5, "lora_r": 4},
    "data": {"tasks": [{"name": "gcd", "params": {"max_value": 99}}, {"weight": 2}], "columns": {"q": "prompt"}},
    "warm_start": {"policy": {"hidden_size": 32}, "noise": 0},
}

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_step": 3}, "max_step: unknown key{where}; did you mean max_steps?"),
    ({"lr": 3}, "lr: unknown key{where}; did you mean learning_rate?"),
    ({"critic": {"lora_rank": 3}}, "critic.lora_rank: unknown key{where}; its name is critic.lora_r now"),
    ({"data": {"tasks": [{"nam": "gcd"}]}}, "nam: unknown key of data.tasks[0]{where}; did you mean name?"),
    ({"data": {"tasks": [{"weight": "x"}]}}, "data.tasks.weight: got 'x', needs a positive, finite number"),
    (
        {"data": {"tasks": [{"name": "gcd"}, {"weight": 0}]}},
        "data.tasks[1].weight: got 0.0, needs a positive, finite number",
    ),
    ({"critic": 3}, "critic: got 3{where}, needs a mapping of settings"),
    ({"max_steps": "many"}, "max_steps: got 'many', needs an integer of at least 1"),
    ({"critic": {"num_critics": 2.5}}, "critic.num_critics: got '2.5', needs an integer of at least 1"),
    ({"warm_start": {"policy": {"hidden_size": "x"}}}, "warm_start.policy.hidden_size: got 'x', needs an integer"),
    ({"report_to": ["visdom"]}, "report_to: got 'visdom', needs a list of one of tensorboard, wandb, trackio"),
    ({"save_total_limit": 0}, "save_total_limit: got 0, needs an integer of at least 1 or null"),
    ({"reward_timeout": 0}, "reward_timeout: got 0.0, needs a positive number of seconds or null"),
    ({"reward_funcs": []}, "reward_funcs: got [], needs at least one, or an environment that gives rewards"),
    ({"environment_credit": "drop", "algorithm": "grpo"}, "environment_credit: got 'drop', needs a critic, algorithm"),
    ({"environment": {"name": "calculator"}, "algorithm": "vineppo"}, "algorithm: got 'vineppo', needs values of"),
    ({"environment": {"max_turns": 0}}, "environment.max_turns: got 0, needs an integer of at least 1"),
    ({"epsilon": 1}, "epsilon: got 1.0, needs a number in [0, 1)"),
    ({"learning_rate": float("nan")}, "learning_rate: got nan, needs a positive number"),
    ({"warm_start": {"guess": 2}}, "warm_start.guess: got 2.0, needs a probability in [0, 1]"),
    ({"delta": 1.1}, "delta: got 1.1, needs more than 1 + epsilon_high = 1.28"),
]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--reward_funcs", "exact_match"], "reward_funcs", ["exact_match"]),
        (["--reward_funcs=exact_match"], "reward_funcs", ["exact_match"]),
        (["--reward_funcs", "exact_match", "own.py:f", "--seed", "1"], "reward_funcs", ["exact_match", "own.py:f"]),
        (["--reward_funcs", "[exact_match]"], "reward_funcs", ["exact_match"]),
        (["--report_to", "wandb"], "report_to", ["wandb"]),
        (["--report_to", "none"], "report_to", []),
    ],
)
def test_one_name_in_place_of_a_list(arguments: list[str], name: str, value: list[str], tmp_path: Path) -> None:
    """As in TRL: on the command line, in a file, in a mapping, and in Python."""
    assert getattr(parse(["train", *arguments]), name) == value
    if len(value) < 2:
        single = value[0] if value else "none"
        (tmp_path / "own.yaml").write_text(f"{name}: {single}\n")
        settings = {name: single}
        for config in (
            parse(["train", "--config", str(tmp_path / "own.yaml")]),
            load_config(settings),
            load_config("default", settings),
            AsyPPOConfig(**settings),
        ):
            assert getattr(config, name) == value


def test_a_mapping_a_file_and_the_command_line_give_one_configuration(tmp_path: Path) -> None:
    given = yaml.safe_dump(SETTINGS)
    file = tmp_path / "my.yaml"
    file.write_text(given)
    config = load_config(SETTINGS)
    assert yaml.safe_dump(SETTINGS) == given  # what was given is left as it was
    assert config == load_config(file) == load_config(str(file)) == parse(["train", "--config", str(file)])
    assert (config.learning_rate, config.max_steps, config.run_name) == (1e-4, 7, "2026-01-31")
    assert config.data.tasks == [TaskConfig("gcd", {"max_value": 99}), TaskConfig(weight=2)]
    assert isinstance(config.warm_start, WarmStartConfig)
    assert config.warm_start.policy.hidden_size == 32
    assert config.warm_start.policy.num_hidden_layers == 3  # what is not said has its default
    file.write_text("run_name: 2026-01-31\nlearning_rate: 1e-4")  # no date, and a number
    assert load_config(file) == load_config({"run_name": "2026-01-31", "learning_rate": 1e-4})
    assert load_config(file) == parse(["train", "--config", str(file)])


@pytest.mark.parametrize("name", READY_CONFIGS)
def test_a_name_is_that_of_the_command_line(name: str) -> None:
    assert load_config(name) == parse(["train", "--config", name]) == load_config(READY_CONFIGS[name])


def test_every_setting_goes_through_a_mapping() -> None:
    config = load_config("default")
    assert load_config(asdict(config)) == config
    assert load_config({}) == AsyPPOConfig()


def test_changes_are_what_a_second_file_is(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "critic": {"num_critics": 4},
        "policy": {"lora_target_modules": ["v_proj"]},
        "data": {"tasks": [{"name": "gcd", "params": {"min_value": 3}}], "task": {"params": {"max_terms": 4}}},
        "warm_start": {"policy": {"num_hidden_layers": 1}},
    }
    base = SETTINGS | {"data": {"task": {"name": "gcd", "params": {"min_terms": 3}}, "train_size": 9}}
    first, second = tmp_path / "base.yaml", tmp_path / "changes.yaml"
    first.write_text(yaml.safe_dump(base))
    second.write_text(yaml.safe_dump(changes))
    config = load_config(first, changes)
    assert config == parse(["train", "--config", str(first), "--config", str(second)])
    assert config == load_config(merged(base, changes))
    assert config.data.task == TaskConfig("gcd", {"max_terms": 4})  # a mapping that is one setting is replaced
    assert config.data.train_size == 9
    assert config.warm_start is not None
    assert (config.warm_start.policy.hidden_size, config.warm_start.policy.num_hidden_layers) == (32, 1)
    assert config.critic.cliprange_value == 0.5
    assert load_config(first, {"warm_start": None}).warm_start is None
    with pytest.raises(ConfigError, match=r"^critic\.num_critic: unknown key in the changes; did you mean critic\.num"):
        load_config(first, {"critic": {"num_critic": 4}})


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_errors_are_those_of_the_command_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(settings))
    errors = []
    for load in (
        lambda: load_config(settings),
        lambda: load_config(file),
        lambda: parse(["train", "--config", str(file)]),
    ):
        with pytest.raises(ConfigError) as error:
            load()
        errors.append(str(error.value))
    assert errors[0].startswith(message.format(where=""))
    assert errors[1] == errors[2]
    assert errors[1].startswith(message.format(where=f" in {file}"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("qwen3-8", "config: cannot read 'qwen3-8': No such file or directory; needs a YAML file, or one of default, "),
        ("defualt", "; did you mean default?"),
        ("none.yaml", "config: cannot read 'none.yaml'"),
    ],
)
def test_a_source_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(source)
    assert message in str(error.value)
    with pytest.raises(ConfigError) as of_command_line:
        parse(["train", "--config", source])
    assert str(error.value) == str(of_command_line.value)


def test_a_file_goes_before_a_ready_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("default").write_text("seed: 5")
    assert load_config("default") == parse(["train", "--config", "default"]) == AsyPPOConfig(seed=5)


def test_choices_are_checked_of_a_configuration_made_in_python() -> None:
    with pytest.raises(ConfigError, match=r"^whiten: got 'all', needs one of none, batch, group$"):
        AsyPPOConfig(whiten="all").validate()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^max_steps: got '3', needs an integer of at least 1$"):
        AsyPPOConfig(max_steps="3").validate()  # type: ignore[arg-type]


@dataclass
class Inner:
    above: float = setting(2.0, above=1)
    open: float = setting(0.5, above=0, below=1, noun="fraction")


@dataclass
class Outer:
    """Every kind of fact."""

    small: int = setting(1, at_most=3)
    maybe: float | None = setting(None, below=3)
    choice: Literal["a", "b"] | None = "a"
    inner: Inner = setting(factory=Inner)
    many: list[Inner] = field(default_factory=list)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"small": 4}, "small: got 4, needs an integer of at most 3"),
        ({"maybe": 3.0}, "maybe: got 3.0, needs a number below 3 or null"),
        ({"maybe": float("nan")}, "maybe: got nan, needs a number below 3 or null"),
        ({"choice": "c"}, "choice: got 'c', needs one of a, b or null"),
        ({"inner": Inner(above=1)}, "inner.above: got 1, needs a number above 1"),
        ({"many": [Inner(), Inner(open=1)]}, "many[1].open: got 1, needs a fraction in (0, 1)"),
    ],
)
def test_a_value_that_is_not_allowed(changes: dict[str, Any], message: str) -> None:
    check(Outer())
    check(Outer(small=3, maybe=2.9, choice=None, many=[Inner(1.1, 0.1)]))
    with pytest.raises(ConfigError) as error:
        check(Outer(**changes))
    assert str(error.value) == message


def test_bounds_hold_of_the_defaults_and_of_numbers_alone() -> None:
    for path, known in by_path(AsyPPOConfig).items():
        kinds = in_words(known.annotation, Facts())
        assert not known.facts.bounded or "integer" in kinds or "number" in kinds, path
        if known.facts.bounded and known.default is not None:
            assert known.facts.allows(known.default), path


def test_what_a_resumed_run_may_change() -> None:
    assert set(may_change(AsyPPOConfig)) == {
        "max_steps",
        "output_dir",
        "run_name",
        "device",
        "save_steps",
        "save_total_limit",
        "save_async",
        "save_dtype",
        "logging_samples",
        "log_completions",
        "log_completions_steps",
        "num_completions_to_print",
        "diagnostics_steps",
        "report_to",
        "max_skipped_steps",
        "sampling_logp_tolerance",
        "sampling_check_steps",
        "vllm",
        "eval",
        "policy.attn_implementation",
        "policy.packing",
        "critic.side.keep_bytes",
        "warm_start.cache_dir",
        "max_tokens_per_micro_batch",
        "gradient_accumulation_steps",
        "offload",
        "generation_batch_size",
    }


def test_old_names_are_no_names() -> None:
    old = renamed(AsyPPOConfig)
    assert old["critic.lora_rank"] == "critic.lora_r"
    assert not set(old) & set(by_path(AsyPPOConfig))


HEAVY = "{'torch', 'transformers', 'datasets', 'asyppo_kernels'}"


@pytest.mark.parametrize(
    "program",
    [
        "import asyppo; dir(asyppo); asyppo.__version__",
        "from asyppo import AsyPPOConfig, ConfigError, load_config; load_config('qwen3-8b', {'max_steps': 3})",
        "from asyppo.cli.main import parse; parse(['train', '--config', 'default'])",
    ],
)
def test_nothing_heavy_is_imported(program: str) -> None:
    program += f"\nimport sys; assert not {HEAVY} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_names_what_people_import() -> None:
    from asyppo import trainer

    assert asyppo.AsyPPOTrainer is trainer.AsyPPOTrainer
    assert asyppo.AsyPPOConfig is AsyPPOConfig
    assert set(asyppo.__all__) <= set(dir(asyppo))
    with pytest.raises(AttributeError, match="module 'asyppo' has no attribute 'AsyPPO'"):
        _ = asyppo.AsyPPO


def test_the_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    installed = asyppo.__version__
    monkeypatch.setattr(asyppo, "version", not_installed)
    assert asyppo.__version__ == asyppo_kernels.__version__ == installed


def test_an_evaluation_may_be_greedy() -> None:
    assert parse(["train", "--eval.temperature", "0"]).eval.temperature == 0
    with pytest.raises(ConfigError, match=r"temperature: got 0\.0, needs a positive number"):
        parse(["train", "--temperature", "0"])

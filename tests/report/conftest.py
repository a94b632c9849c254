"""Runs made of nothing, and one headless browser for all tests of the page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

WORDS = ["The", " sum", " of", " 3", " and", " 4", " is", " 7", ",", " so", " <answer>", "7", "</answer>", "\n"]


def sample(
    generator: np.random.Generator, step: int, group: int, tokens: int, critics: int, steps: int
) -> dict[str, Any]:
    """A response whose critics know more with every step and every token."""

    def numbers(values: np.ndarray) -> list[float]:
        return [float(f"{value:.6g}") for value in values]

    text = [WORDS[i] for i in generator.integers(len(WORDS), size=tokens)]
    chance = 0.3 + 0.4 * step / steps
    reward = float(generator.random() < chance)
    known = np.linspace(0.1, 0.9, tokens) * step / steps
    values = [chance + known * (reward - chance) + 0.1 * generator.normal(size=tokens) for _ in range(critics)]
    value = np.mean(values, axis=0) if critics else np.full(tokens, chance)
    std = np.std(values, axis=0) if critics else np.zeros(tokens)
    low, high = np.quantile(std, [0.2, 0.8])
    entropy = generator.gamma(1.0, 0.8 - 0.5 * step / steps, size=tokens)
    return {
        "step": step,
        "split": "train",
        "prompt": f"What is 3 + 4? (prompt {group} of step {step})\n",
        "completion": "".join(text),
        "reward": reward,
        "rewards": {"reasoning_gym": reward},
        "truncated": bool(generator.random() < 0.1),
        "group": group,
        "tokens": text,
        "logprob": numbers(-entropy),
        "sampler_logprob": numbers(-entropy + 1e-4),
        "entropy": numbers(entropy),
        "log_ratio": numbers(0.05 * generator.normal(size=tokens)),
        "value": numbers(value),
        "values": [numbers(of_critic) for of_critic in values],
        "std": numbers(std),
        "advantage": numbers((reward - value) / 0.4),
        "raw_advantage": numbers(reward - value),
        "returns": [reward] * tokens,
        "advantage_keep": (std >= low).tolist(),
        "entropy_keep": (std <= high).tolist(),
    }


def write_run(
    path: Path,
    *,
    steps: int = 12,
    per_step: int = 8,
    tokens: int = 14,
    critics: int = 2,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], Any] = lambda row: row,
) -> Path:
    """Write a run's files. ``change`` gets each sample and returns what is written in its place."""
    generator = np.random.default_rng(seed)
    path.mkdir(parents=True)
    algorithm = {0: "grpo", 1: "ppo"}.get(critics, "asyppo")
    settings = {"algorithm": algorithm, "seed": seed, "max_steps": steps, "gamma": 1.0, **(config or {})}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    rows: list[dict[str, Any]] = [
        {"step": 0, "eval/accuracy": 0.35, "eval/accuracy/ci_low": 0.33, "eval/accuracy/ci_high": 0.38}
    ]
    for step in range(1, steps + 1):
        done = step / steps
        row = {"step": step, "critic/score/mean": 0.3 + 0.4 * done + 0.02 * generator.normal()}
        row |= {"critic/score/min": 0.0, "critic/score/max": 1.0, "response_length/mean": float(tokens)}
        row |= {"actor/entropy": 0.8 - 0.5 * done, "actor/ppo_kl": 1e-3 * done, "actor/pg_clipfrac": 0.01}
        row |= {f"timing_s/{phase}": 0.2 for phase in ("gen", "old_log_prob", "update_actor", "adv")}
        row |= {"timing_s/step": 0.9, "perf/throughput": 9000 + 100 * generator.normal()}
        if critics:
            row |= {f"critic/{m}/vf_loss": 0.3 - 0.2 * done + 0.01 * m for m in range(critics)}
            row |= {"critic/vf_loss": 0.3, "critic/vf_explained_var": done, "timing_s/update_critic": 0.1}
        if critics > 1:
            row |= {"critic/std/mean": 0.08, "critic/std/low": 0.03, "critic/std/high": 0.12}
            row |= {"actor/adv_mask_frac": 0.2, "actor/entropy_keep_frac": 0.8}
            for place, masked in (("tokens_1", 1.0), ("tokens_2", 0.7), ("tokens_3_4", 0.1), ("tokens_9_16", 0.0)):
                row |= {f"critic/std/{place}": 0.1 - 0.05 * masked, f"actor/adv_mask_frac/{place}": masked * done}
                row |= {f"actor/entropy_filter_frac/{place}": 0.2}
        if step == steps:
            row |= {"eval/accuracy": 0.68, "eval/accuracy/ci_low": 0.64, "eval/accuracy/ci_high": 0.71}
        rows.append(row)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(path / "samples.jsonl", "w") as file:
        for step in range(1, steps + 1):
            for i in range(per_step):
                file.write(json.dumps(change(sample(generator, step, i // 4, tokens, critics, steps))) + "\n")
        for i in range(4):
            row = {"step": steps, "split": "eval", "prompt": "What is 1 + 1?\n", "completion": f"{i}"}
            file.write(json.dumps(row | {"reward": float(i == 2), "truncated": False}) + "\n")
    return path


def write_audits(path: Path, *, step: int = 12, seed: int = 0) -> None:
    """Write what an audit of values and one of gradients leave in a run's directory: the names, and any numbers."""
    generator = np.random.default_rng(seed)

    def estimate(known: bool = True) -> dict[str, float | None]:
        value = float(f"{generator.random():.3g}")
        return {"value": value, "low": value - 0.1, "high": value + 0.1 if known else None}

    names = ["truth/mean", "truth/std", "truth/standard_error", "sigma/rank", "sigma/corrected"]
    names += ["value/rank", "value/rank_corrected", "advantage/corrected"]
    accuracy = ("bias", "rmse", "explained", "explained_within_prompts", "correlation")
    names += [f"{of}/{name}" for of in ("value", "critic_0", "critic_1") for name in accuracy]
    dropped = ("tokens", "squared_error", "squared_advantage", "squared_gradient")
    names += [f"{of}/{name}" for of in ("advantage_mask", "entropy_filter") for name in dropped]
    numbers = {name: estimate() for name in names} | {"value/explained": {"value": None, "low": None, "high": None}}
    columns = ("value", "truth", "bias", "rmse", "sigma", "advantage_dropped")
    bins = [{"name": str(i), "states": 9} | {c: estimate(i < 2) for c in columns} for i in range(3)]
    tables = dict.fromkeys(("fraction of the response", "token", "value", "sigma"), bins)
    results = {"states": 27, "prompts": 3, "continuations": 8, "tokens": 99, "critics": 2}
    row = sample(generator, step, 0, 6, 2, step)
    known = {"truth": [0.5, None, 0.25, None, None, 0.75], "truth_se": [0.1, None, 0.1, None, None, 0.0]}
    head = {"step": step, "checkpoint": f"checkpoint-{step}", "settings": {}}
    values = head | {"kind": "audit", "results": results | {"numbers": numbers, "tables": tables}}
    values["samples"] = [row | {"split": "audit", "prompt": "What is audited?\n"} | known]
    (path / f"audit-{step}.json").write_text(json.dumps(values))
    cosines = {name: estimate() for name in ("cosine", "minus_first", "cosine_of_expectation")}
    arms = {arm: {"loss": cosines, "reward": cosines, "noise": estimate(), "norm": 1.0} for arm in ("run", "<low>")}
    references = {name: {"batches": 32, "certain": 0.9} for name in ("loss", "reward")}
    gradients = {"kind": "gradients", "results": {"batches": 16, "arms": arms, "references": references}}
    (path / f"gradients-{step}.json").write_text(json.dumps(head | gradients))


@pytest.fixture
def audited() -> Callable[..., None]:
    """``write_audits``."""
    return write_audits


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``write_run`` in a directory of its own: the name, then what ``write_run`` takes."""
    return lambda name="run", **options: write_run(tmp_path / name, **options)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium, without a window. A machine without it fails, unless ASYPPO_TEST_BROWSER=skip says not to."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if os.environ.get("ASYPPO_TEST_BROWSER") == "skip":
        pytest.skip("ASYPPO_TEST_BROWSER=skip")
    if not chromium or not driver:
        pytest.fail(
            "The report's tests need chromium and chromedriver: apt-get install chromium chromium-driver. "
            "ASYPPO_TEST_BROWSER=skip leaves them out.",
            pytrace=False,
        )
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--force-device-scale-factor=1",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = Chrome(options=options, service=Service(driver))
    yield made
    made.quit()

"""A run's policy and critics as a repository of the Hugging Face hub, with a card that says how they came about.

::

    README.md               the card: results, curve, how to load, versions, every setting
    curve.png               held-out accuracy and reward by step
    config.yaml             every setting of the run
    config.json, …          the policy, and its tokenizer: AutoModelForCausalLM.from_pretrained(repository)
    critic_0/, critic_1/    AutoModelForTokenClassification.from_pretrained(repository, subfolder="critic_0")
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from asyppo.checkpoint import best_checkpoint, checkpoints, trainer_state
from asyppo.config import ConfigError
from asyppo.report.runs import Run, read_run
from asyppo.run import durable
from asyppo.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

VERSIONS = ("torch", "transformers", "tokenizers", "peft", "triton", "numpy", "datasets")
CURVES = {"eval/accuracy": "held-out accuracy", "critic/score/mean": "mean reward"}


class PublishError(RuntimeError):
    """The hub refused, or was not there. The message says what it said."""

    exit_status = 1


def push_to_hub(
    run: str | Path, repo_id: str, *, best: bool = False, private: bool = True, api: HfApi | None = None
) -> str:
    """Upload a run's policy and critics, and return the commit's address. The repository is made if there is none.

    Args:
        run: a run's directory, whose last checkpoint is taken, or a checkpoint of a run.
        repo_id: ``owner/name``.
        best: take the run's checkpoint with the highest held-out accuracy.
        private: whether a repository that is made is private.
        api: the hub, and who asks; by default as ``hf auth login`` and the environment have it.

    Raises:
        ConfigError: ``run`` has no checkpoint that passes its check, or ``repo_id`` is none.
        PublishError: the hub's own error.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # OSError, and the errors of the HTTP library, which is one or another by the hub's version.
    refusals = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    api = api or HfApi(library_name="asyppo", library_version=__version__)
    with tempfile.TemporaryDirectory() as folder:
        step = write_repository(run, Path(folder), repo_id, best=best)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"Step {step}, by asyppo {__version__}"
            )
        except HFValidationError as error:
            raise ConfigError(f"repo_id: got {repo_id!r}: {' '.join(str(error).split())}") from error
        except refusals as error:
            raise PublishError(f"{repo_id}: {' '.join(str(error).split())}") from error
    return str(commit.commit_url)


def write_repository(run: str | Path, folder: Path, repo_id: str, *, best: bool = False) -> int:
    """Write what ``push_to_hub`` uploads into ``folder``, and return the checkpoint's step. Raises ConfigError."""
    checkpoint = _checkpoint_of(Path(run).expanduser(), best)
    if damage := durable.damage(checkpoint):
        raise ConfigError(f"{checkpoint}: {damage}, needs a checkpoint that can be loaded")
    read = read_run(checkpoint.parent)
    if (own := checkpoint / "config.yaml").exists():  # the run's is that of its last start
        read = replace(read, config_text=own.read_text())
    shutil.copytree(checkpoint / "policy", folder, dirs_exist_ok=True)
    critics = sorted(path.name for path in checkpoint.glob("critic_*") if path.is_dir())
    for name in critics:
        shutil.copytree(checkpoint / name, folder / name)
    for base in folder.rglob("README.md"):  # peft's, with blanks to fill in
        base.unlink()
    if read.config_text:
        (folder / "config.yaml").write_text(read.config_text)
    drawn = draw_curve(read, folder / "curve.png")
    (folder / "README.md").write_text(model_card(read, checkpoint, repo_id, critics, curve=drawn))
    return int(trainer_state(checkpoint)["step"])


def _checkpoint_of(path: Path, best: bool) -> Path:
    """The checkpoint that a run's directory, or a checkpoint's, means."""
    if (path / "policy").is_dir() and (path / "trainer_state.json").is_file():
        return path
    found = checkpoints(path) if path.is_dir() else []
    if not found:
        raise ConfigError(f"run: got {str(path)!r}, needs a run's directory that has a checkpoint, or a checkpoint")
    chosen = best_checkpoint(path) if best else found[-1]
    if chosen is None:
        raise ConfigError(f"run: {str(path)!r} has no held-out accuracy to choose by, needs the last checkpoint")
    return chosen


def draw_curve(run: Run, image: Path) -> bool:
    """Write a PNG of a run's accuracy and reward by step; False where it has neither."""
    series = {label: run.series(name) for name, label in CURVES.items()}
    series = {label: points for label, points in series.items() if points[0]}
    if not series:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (label, (steps, values)), style in zip(series.items(), ("-", "--"), strict=False):
        axis.plot(steps, values, style, label=label, marker="." if len(steps) < 30 else "")
    axis.set(xlabel="training step")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(image, dpi=100)
    plt.close(figure)
    return True


def model_card(run: Run, checkpoint: Path, repo_id: str, critics: list[str], *, curve: bool) -> str:
    """The repository's README: what it is, what it reached, how to load it, versions, settings."""
    base = (run.config.get("policy") or {}).get("model_name_or_path")
    adapter = (checkpoint / "policy" / "adapter_config.json").is_file()
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["asyppo", "reinforcement-learning"],
    }
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        head["base_model"] = base
    state = trainer_state(checkpoint)
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {repo_id.rpartition('/')[2]}", ""]
    told = (
        f"Step {state['step']} of a run of `{run.algorithm}` with [AsyPPO](https://arxiv.org/abs/2510.01656)'s trainer"
    )
    lines += [f"{told}, asyppo {__version__}{f', from `{base}`' if base else ''}.", ""]
    lines += _results(run, int(state["step"]))
    if curve:
        lines += ["![Held-out accuracy and mean reward by training step](curve.png)", ""]
    lines += _loading(repo_id, critics)
    lines += ["## Versions", "", "Of what the repository was written with.", "", *_versions(), ""]
    lines += ["## Settings", "", "```yaml", run.config_text.strip(), "```", ""]
    return "\n".join(lines)


def _results(run: Run, step: int) -> list[str]:
    """The last values up to ``step`` of what the curve shows, as a table."""
    rows = []
    for name, label in CURVES.items():
        points = [(s, value) for s, value in zip(*run.series(name), strict=True) if s <= step]
        if points:
            rows.append(
                f"| {label} | {points[0][1]:.4f} (step {points[0][0]}) | {points[-1][1]:.4f} (step {points[-1][0]}) |"
            )
    return ["| | first | last |", "|---|--:|--:|", *rows, ""] if rows else []


def _loading(repo_id: str, critics: list[str]) -> list[str]:
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'policy = AutoModelForCausalLM.from_pretrained("{repo_id}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
    ]
    lines = ["## Loading", "", "```python", *code, "```", ""]
    if critics:
        names = ", ".join(f"`{name}`" for name in critics)
        lines += [f"Its critics are in {names}, directories that asyppo takes as `critic.model_name_or_path`.", ""]
    return lines


def _versions() -> list[str]:
    found = {"asyppo": __version__}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return [f"- {name} {number}" for name, number in found.items()]

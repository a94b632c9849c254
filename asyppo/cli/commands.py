"""The commands of ``asyppo``. One is an entry of ``COMMANDS``: its arguments, and what runs it.

Heavy modules are imported by the function that needs them.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from asyppo.config import ConfigError
from asyppo.config.files import configuration


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    summary: str
    """What it does, in a line."""
    run: Callable[[Namespace], int]
    """Runs it and returns the exit status."""
    add_arguments: Callable[[ArgumentParser], None] = lambda parser: None
    """Adds its own arguments."""
    settings: bool = False
    """Whether it takes ``--config`` and every field of the configuration; ``configuration`` makes one of them."""
    base_config: Callable[[Sequence[str]], str | Path | None] = lambda arguments: None
    """The configuration file it starts from, given its arguments: a path, the name of a ready one, or None."""
    without_config: str = ""
    """What it does without ``--config``, for the help."""


def _has_config(arguments: Sequence[str]) -> bool:
    return any(argument.partition("=")[0] == "--config" for argument in arguments)


def _quiet_libraries() -> None:
    # Threads of torch's OpenMP pool that spin while they wait make small models crawl on a machine that is busy with
    # something else. It reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # What other libraries say is about their own interfaces, which our users do not call. Whoever asks for it gets it.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        for category in (FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()


def _train(namespace: Namespace) -> int:
    config = configuration(namespace)
    _quiet_libraries()
    from asyppo.cli.build import build_trainer
    from asyppo.distributed.processes import is_main, processes, restarted

    config = restarted(config)
    with processes(config.distributed):
        result = build_trainer(config).train()
    if not is_main():  # rank 0 says what came of it
        return 0
    if result.stopped_by is not None:
        path = result.run.path
        print(
            f"asyppo: stopped by {result.stopped_by.name}; to go on: asyppo train --config {path / 'config.yaml'} "
            f"--run_name {path.name} --resume",
            file=sys.stderr,
        )
        return 128 + result.stopped_by
    before, after = result.accuracy_before, result.accuracy_after
    if after is not None:
        print("held-out accuracy: " + ("" if before is None else f"{before:.4f} -> ") + f"{after:.4f}")
    run = result.run
    for name, path in (
        ("run", run.path),
        ("metrics", run.metrics),
        ("report", run.path / "report.html"),
        ("samples", run.samples),
        ("checkpoint", result.checkpoint),
    ):
        if path.exists():  # a report that failed was a warning
            print(f"{name + ':':<12}{path}")
    gain = config.eval.min_gain
    if gain is not None and before is not None and after is not None and after - before < gain:
        print(
            f"asyppo: error: held-out accuracy rose by {after - before:.4f}, less than eval.min_gain = {gain}",
            file=sys.stderr,
        )
        return 1
    return 0


def find_model(name: str) -> tuple[str, Path | None]:
    """Return where the weights lie that ``name`` means, and the configuration of the run they are of, if of one.

    ``name`` is a run's directory (its last checkpoint is taken), a checkpoint, a model's directory, or a hub name.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith((".", "/", "~")):  # no name on the hub
            raise ConfigError(f"--model: got {name!r}, but there is no such directory")
        return name, None
    if (path / "config.yaml").is_file() and not (path / "policy").is_dir():
        checkpoints = [p for p in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        if not checkpoints:
            raise ConfigError(f"--model: the run {name} has no checkpoint, needs one")
        path = max(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]))
    if (path / "policy").is_dir():
        path = path / "policy"
    places = [parent / "config.yaml" for parent in path.resolve().parents[:2]]  # the checkpoint, the run
    is_checkpoint = (path.resolve().parent / "trainer_state.json").is_file()
    return str(path), next((p for p in places if is_checkpoint and p.is_file()), None)


def _eval_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="What to evaluate: a run's directory (its last checkpoint), a checkpoint of a run, a model's directory, "
        "or a hub name.",
    )
    parser.add_argument(
        "--out", type=str, required=True, metavar="DIR", help="New directory for eval.json and samples.jsonl."
    )


def _eval_base_config(arguments: Sequence[str]) -> Path | None:
    """The configuration of the run that the model is of."""
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, after = argument.partition("=")
        if name == "--model":
            _, config = find_model(after if equals else value)
            if config is None and not any(a.startswith(("--config", "--data")) for a in arguments):
                raise ConfigError(
                    f"--model: {after if equals else value} is of no run, so what to evaluate it on is not known; "
                    "needs --config, or --data options"
                )
            return config
    return None


def _eval(namespace: Namespace) -> int:
    config = configuration(namespace)
    _quiet_libraries()
    from asyppo.cli.build import evaluate_model

    evaluation = evaluate_model(config, find_model(namespace.model)[0], Path(namespace.out).expanduser())
    print(evaluation.table())
    print(f"results: {namespace.out}/eval.json\nsamples: {namespace.out}/samples.jsonl")
    return 0


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help="Directory of a run; several are overlaid.")
    parser.add_argument(
        "--out",
        type=str,
        metavar="FILE",
        help="The page. By default report.html in the run's directory, or in the current one for several runs. A file "
        "of that name is replaced.",
    )


def _report(namespace: Namespace) -> int:
    from asyppo.report import write_report

    out = None if namespace.out is None else Path(namespace.out).expanduser()
    print(f"report: {write_report([Path(run).expanduser() for run in namespace.runs], out)}")
    return 0


def _compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("grid", type=str, metavar="GRID", help="YAML file of arms and seeds; see docs/evidence/.")
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        metavar="DIR",
        help="Directory of the runs, the table and the figure; the same command goes on in it.",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="Runs at a time. By default one a core.")


def _compare(namespace: Namespace) -> int:
    if namespace.jobs is not None and namespace.jobs < 1:
        raise ConfigError(f"--jobs: got {namespace.jobs}, needs an integer of at least 1")
    from asyppo.compare import compare

    return compare(Path(namespace.grid).expanduser(), Path(namespace.out).expanduser(), namespace.jobs)


def _plan_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the work and the weights (FSDP2).")
    parser.add_argument(
        "--prompt_length",
        type=int,
        default=1024,
        metavar="TOKENS",
        help="Longest prompt to expect, where data.max_prompt_length does not say.",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="Say what to set to fit GPUs of this memory; default: those here."
    )
    parser.add_argument(
        "--fits", action="store_true", help="A table of what fits 1, 2, 4, 8 GPUs of 24, 48, 80, 141 GiB, and how."
    )


def _plan(namespace: Namespace) -> int:
    config = configuration(namespace)
    for name in ("gpus", "prompt_length"):
        if namespace[name] < 1:
            raise ConfigError(f"--{name}: got {namespace[name]}, needs an integer of at least 1")
    if namespace.memory is not None and namespace.memory <= 0:
        raise ConfigError(f"--memory: got {namespace.memory:g}, needs a number of GiB above 0")
    from asyppo.cli.plan import advice, fits_table, make_plan

    length = namespace.prompt_length
    if namespace.fits:
        print("\n".join(fits_table(config, prompt_length=length)))
        return 0
    print(make_plan(config, gpus=namespace.gpus, prompt_length=length).table())
    memory = namespace.memory or memory_here()
    if memory is not None:
        print(advice(config, gpus=namespace.gpus, gib=memory, prompt_length=length))
    return 0


def memory_here() -> float | None:
    """Return the GiB of the smallest GPU here; None without one."""
    import torch

    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return round(min(sizes) / 2**30, 1) if sizes else None


def _push_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "run", type=str, metavar="RUN", help="A run's directory (its last checkpoint), or a checkpoint."
    )
    parser.add_argument("--to", type=str, required=True, metavar="OWNER/NAME", help="The repository; made if need be.")
    parser.add_argument("--best", action="store_true", help="Take the checkpoint with the highest held-out accuracy.")
    parser.add_argument("--public", action="store_true", help="Make a new repository public; by default it is private.")
    parser.add_argument("--folder", type=str, metavar="DIR", help="Write it to this new folder, and upload nothing.")


def _push(namespace: Namespace) -> int:
    _quiet_libraries()
    from asyppo.publish import push_to_hub, write_repository

    if namespace.folder is not None:
        folder = Path(namespace.folder).expanduser()
        if folder.exists():
            raise ConfigError(f"--folder: {folder} exists, needs a new folder")
        write_repository(namespace.run, folder, namespace.to, best=namespace.best)
        print(f"repository: {folder}")
        return 0
    print(f"pushed: {push_to_hub(namespace.run, namespace.to, best=namespace.best, private=not namespace.public)}")
    return 0


def _audit_arguments(parser: ArgumentParser) -> None:
    for name, kind, default, text in (
        ("states", int, 512, "States that are held against the truth."),
        ("continuations", int, 16, "K, continuations of each state and of the one behind its token."),
        ("prompts", int, None, "Prompts whose responses the states are of. By default as many as a step has."),
        ("budget", int, None, "Stop after so many tokens of continuations, with the states that are done."),
        ("batches", int, 16, "With --gradients: batches of each arm."),
        ("reference_batches", int, 32, "With --gradients: batches of the reference."),
        ("critic_steps", int, 8, "With --gradients: batches that critics of arms learn which are not the run's."),
        ("seed", int, 0, "Seed of prompts, responses and continuations."),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)
    parser.add_argument(
        "run", type=str, metavar="RUN", help="A run's directory (its last checkpoint), or a checkpoint."
    )
    parser.add_argument(
        "--gradients", action="store_true", help="Compare estimators of the policy gradient, in place of values."
    )
    parser.add_argument(
        "--split",
        type=str,
        metavar="NAME",
        help="Prompts: eval, those held out, or train. By default eval where there are any, and train for gradients.",
    )
    parser.add_argument(
        "--fit", action="store_true", help="Let critics learn from the audited responses first, as a step does."
    )
    parser.add_argument(
        "--arm",
        type=str,
        action="append",
        default=[],
        metavar="SETTINGS",
        help="With --gradients: an estimator, as settings that differ from the run's, such as 'lam=0.5 whiten=none', "
        "with a name in front or none ('low: lam=0.5'). May be given several times; without any, some usual ones.",
    )
    parser.add_argument(
        "--arms", type=str, metavar="FILE", help="With --gradients: YAML file with arms, as asyppo compare has them."
    )
    parser.add_argument(
        "--set", type=str, default="", metavar="SETTINGS", help="Settings in place of the run's, such as 'device=cpu'."
    )
    parser.add_argument(
        "--out",
        type=str,
        metavar="FILE",
        help="The results. By default audit-STEP.json or gradients-STEP.json in the run's directory, whose report is "
        "written again. A file of that name is replaced.",
    )


def _audit(namespace: Namespace) -> int:
    _quiet_libraries()
    from asyppo.cli.audit import audit

    return audit(namespace)


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train a policy",
        _train,
        settings=True,
        base_config=lambda arguments: None if _has_config(arguments) else "default",
        without_config="Without one, default runs.",
    ),
    "eval": Command(
        "evaluate a checkpoint, or any model: avg@k and pass@k with intervals, by task",
        _eval,
        _eval_arguments,
        settings=True,
        base_config=_eval_base_config,
        without_config="A checkpoint of a run starts out from the run's own.",
    ),
    "report": Command("show runs as one HTML page: curves, calibration, masks, and tokens", _report, _report_arguments),
    "compare": Command(
        "run a grid of configurations and seeds, and compare what they reach", _compare, _compare_arguments
    ),
    "audit": Command(
        "hold a run's critics against what continuations come to, or its gradient against a reference",
        _audit,
        _audit_arguments,
    ),
    "push": Command("upload a run's policy and critics to the Hugging Face hub, with a card", _push, _push_arguments),
    "plan": Command(
        "estimate the memory of a configuration on each GPU, by phase of a step",
        _plan,
        _plan_arguments,
        settings=True,
    ),
}

"""The launch files: their linters have nothing to say, and what they start is a command that ``asyppo`` understands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from asyppo.cli.main import parse
from asyppo_kernels import __version__

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
DEFAULT = Path(__file__).parents[2] / "asyppo" / "config" / "ready" / "default.yaml"
YAMLLINT = "{extends: default, rules: {line-length: {max: 120}}}"


def lint(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a linter that is installed beside this Python, or is on the path."""
    places = [str(Path(sys.executable).parent), *os.get_exec_path()]
    program = shutil.which(command[0], path=os.pathsep.join(places))
    assert program is not None, f"{command[0]} is not installed"
    return subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        ("shellcheck", "slurm.sh"),
        ("yamllint", "--strict", "-d", YAMLLINT, "kubernetes.yaml"),
        ("kubernetes-validate", "--strict", "kubernetes.yaml"),
        ("hadolint", "../../Dockerfile"),
    ],
    ids=lambda command: command[0],
)
def test_the_linter_finds_nothing(command: tuple[str, ...]) -> None:
    done = lint(*command[:-1], str(LAUNCH / command[-1]))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (("shellcheck", "slurm.sh"), ('"$config"', "$config")),
        (("yamllint", "--strict", "-d", YAMLLINT, "kubernetes.yaml"), ("parallelism:", "completions:")),
        (("kubernetes-validate", "--strict", "kubernetes.yaml"), ("parallelism:", "paralelism:")),
        (("hadolint", "../../Dockerfile"), ("--no-install-recommends ", "")),
    ],
    ids=lambda part: part[0],
)
def test_the_linter_finds_a_fault(command: tuple[str, ...], fault: tuple[str, str], tmp_path: Path) -> None:
    text = (LAUNCH / command[-1]).read_text()
    assert fault[0] in text
    faulty = tmp_path / Path(command[-1]).name
    faulty.write_text(text.replace(*fault))
    assert lint(*command[:-1], str(faulty)).returncode != 0


def test_slurm_starts_the_run(tmp_path: Path) -> None:
    for name, body in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", 'printf "node7\\nnode8\\n"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), str(DEFAULT), "--seed", "5"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **job},
        capture_output=True,
        text=True,
        check=True,
    )
    arguments = done.stdout.splitlines()
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "node7:29500"
    config = parse(arguments[arguments.index("train") :])
    assert (config.run_name, config.resume, config.distributed.replicate, config.seed) == ("job-31", True, 2, 5)


def test_kubernetes_starts_the_run() -> None:
    claim, service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pods = job["spec"]["template"]["spec"]
    [container] = pods["containers"]
    command = container["command"]
    nodes = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == nodes
    assert f"--nnodes={nodes}" in command
    # The address at which the pods meet is that of the first one.
    assert pods["subdomain"] == service["metadata"]["name"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:29500" in command
    config = parse(command[command.index("train") :])
    assert (config.run_name, config.resume, config.distributed.replicate) == ("qwen3-8b", True, nodes)
    assert pods["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    text = (LAUNCH / "kubernetes.yaml").read_text()
    used = "\n".join(line.partition("#")[0] for line in text.splitlines())
    assert not re.search(r"REGISTRY|[A-Z]{3,}-[A-Z]|TAG\b|CLAIM\b", used)  # nothing is left to be filled in
    [tag] = re.findall(r"^#   docker build --tag (\S+) \.$", (LAUNCH.parents[1] / "Dockerfile").read_text(), re.M)
    assert container["image"] == tag == f"asyppo:{__version__}"

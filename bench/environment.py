"""Where a run took place: device, driver, versions, commit. Neither the machine's name nor a path of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "liger_kernel",
    "trl",
    "verl",
    "cut-cross-entropy",
    "quack-kernels",
    "torchrl",
    "tensordict",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Describe this run; ``load`` is of the minute before it. A copy of the tree without its history is told its commit
    by ``BENCH_COMMIT``."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": os.environ.get("BENCH_COMMIT") or _git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "bench", "kernels", "asyppo")),
        "device": _device(device),
        "load": {"average": round(os.getloadavg()[0], 1), "processors": os.cpu_count()},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return {"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads(), "isa": _isa()}


def load_line(load: dict[str, Any]) -> str:
    """Say whether the machine had other work: processes that wanted to run in the minute before."""
    return f"Load {load['average']:.1f} of {load['processors']} processors before the start."


def _isa() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = _output(query).splitlines()
    return lines[0].strip() if lines else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # says which build it is
    return found


def _git(*arguments: str) -> str | None:
    return _output(["git", "-C", str(ROOT), *arguments]).strip() or None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens of ``text``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

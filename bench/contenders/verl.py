"""verl, by its files alone: importing the package needs Ray and an older transformers than ours.

Nothing of it is kept here: its files are read from where it is installed, be it only with ``pip install --no-deps
--target .cache/peers verl``.
"""

from __future__ import annotations

import ast
import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case, Head, Inputs, Outputs, Run
from bench.contenders.heads import policy_head
from bench.ops.policy_head import wants_entropy
from bench.registry import Absent, compiler, contender, need_gpu


def _folder() -> Path:
    spec = PathFinder.find_spec("verl")  # looks at the disk, where sys.modules may hold our stand-in
    if spec is None or not spec.submodule_search_locations:
        raise Absent("verl is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _functions(file: str, names: tuple[str, ...], scope: dict[str, Any]) -> dict[str, Any]:
    """Define these functions of a file, without the rest of it and without their decorators."""
    path = _folder() / file
    if not path.is_file():
        raise Absent(f"this verl has no {file}")
    found = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    missing = set(names) - {node.name for node in found}
    if missing:
        raise Absent(f"this verl's {file} has no {', '.join(sorted(missing))}")
    for node in found:
        node.decorator_list.clear()
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *found], []), str(path), "exec"), scope)
    return scope


def _module(name: str) -> ModuleType:
    """Import one module of verl, standing in for the packages above it, whose own code is not run."""
    folder = _folder()
    if "verl" not in sys.modules:
        device = ModuleType("verl.utils.device")
        device.is_cuda_available = torch.cuda.is_available()
        device.get_device_name = lambda: "cuda" if torch.cuda.is_available() else "cpu"
        device.get_device_capability = lambda: (
            torch.cuda.get_device_capability() if torch.cuda.is_available() else (None, None)
        )
        device.get_torch_device = lambda: torch.cuda
        for package, path in (("verl", folder), ("verl.utils", folder / "utils")):
            module = ModuleType(package)
            module.__path__ = [str(path)]
            sys.modules[package] = module
        sys.modules["verl.utils.device"] = device
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"cannot import {name}: {error}") from error


@policy_head("verl logits path", less="as installed without flash-attn")
def logits_path(case: Case) -> Head:
    """What its actor does with the model's logits by default, under autocast and with the entropy compiled."""
    functions = _functions(
        "utils/torch_functional.py",
        ("logprobs_from_logits_v2", "entropy_from_logits"),
        {"torch": torch, "F": F},
    )
    logprobs = functions["logprobs_from_logits_v2"]
    entropies = compiler(case)(functions["entropy_from_logits"])
    low_precision = case.dtype != torch.float32
    temperature, entropy = float(case.options["temperature"]), wants_entropy(case)

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(hidden.device.type, dtype=case.dtype if low_precision else None, enabled=low_precision):
            logits = F.linear(hidden, weight).div_(temperature)
            return logprobs(logits, target), entropies(logits) if entropy else None

    return head


@policy_head("verl fused linear (torch)", less="entropy in the dtype of hidden")
def fused_linear(case: Case) -> Head:
    """Its fused kernel of backend "torch": chunks of 512 tokens."""
    function = _module("verl.utils.experimental.torch_functional").FusedLinearForPPOFunction
    temperature, entropy = float(case.options["temperature"]), wants_entropy(case)

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        logprob, entropies = function.apply(hidden, weight, target, temperature, 512)
        return logprob, entropies if entropy else None

    return head


@policy_head("verl linear_cross_entropy (triton)")
def linear_cross_entropy(case: Case) -> Head:
    """Its fused kernel of backend "triton"."""
    need_gpu(case)
    if case.sizes["H"] % 128:
        raise Absent("needs a hidden size that is a multiple of 128")
    function = _module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    temperature = float(case.options["temperature"])

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return function(hidden, weight, target, temperature, "none")

    return head


@contender(
    "ensemble_gae", "verl loop", less="one critic: mean and std are plain torch before it; its whitening left out"
)
def gae_loop(case: Case) -> Run:
    """Its loop over time, twice where the two lambdas differ."""
    unwhitened = SimpleNamespace(masked_whiten=lambda values, mask: values)
    function = _functions(
        "trainer/ppo/core_algos.py", ("compute_gae_advantage_return",), {"torch": torch, "verl_F": unwhitened}
    )["compute_gae_advantage_return"]
    gamma, lam, value_lam = (float(case.options[name]) for name in ("gamma", "lam", "value_lam"))

    def run(inputs: Inputs) -> Outputs:
        mask = inputs["mask"].float()
        mean, std = inputs["value"].mean(0), inputs["value"].std(0, correction=0)
        advantage, returns = function(inputs["reward"], mean, mask, gamma, lam)
        if value_lam != lam:
            _, returns = function(inputs["reward"], mean, mask, gamma, value_lam)
        outputs = {"advantage": advantage, "returns": returns, "mean": mean, "std": std}
        return {name: x * mask for name, x in outputs.items()}

    return run

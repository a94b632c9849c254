"""What the tests of the ops share."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.interpreter import quicken

pytest.register_assert_rewrite("tests.ops.ppo_loss_oracle")
HEAD_KERNELS = importlib.import_module("asyppo_kernels._policy_head_kernels")
OWN_BLOCK = HEAD_KERNELS.MAX_BLOCK


@pytest.fixture(scope="session", autouse=True)
def rounding_to_nearest() -> None:
    """Let Triton's interpreter round float32 to bfloat16 as GPUs do, to nearest; of itself it cuts the digits off."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(x: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(x, source, target, mode)
        return torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = rounded
    quicken()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN (integers: the largest), so that an output an op forgets to write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session", autouse=True)
def on_the_device() -> None:
    """Make tensors where ASYPPO_TEST_DEVICE says."""
    device = os.environ.get("ASYPPO_TEST_DEVICE", "cpu")
    if device != "cpu":
        torch.set_default_device(device)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a vocabulary of a hundred tokens take several blocks of a kernel, and thirty rows several tiles of a CPU."""
    monkeypatch.setattr(HEAD_KERNELS, "MAX_BLOCK", 128)
    monkeypatch.setattr(importlib.import_module("asyppo_kernels._policy_head"), "CPU_TILE_BYTES", 2**11)


@pytest.fixture
def blocks_of_eight_warps(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the policy head's kernels the blocks that large vocabularies take."""
    monkeypatch.setattr(HEAD_KERNELS, "MAX_BLOCK", OWN_BLOCK)
    assert all(HEAD_KERNELS.launch_shape(20_000, softcap=softcap)[1] == 8 for softcap in (False, True))


@pytest.fixture
def count_launches() -> Callable[[Callable[[], object]], list[tuple[str, tuple[int, ...]]]]:
    """Run a function and return, of each launch of a Triton kernel in it, the kernel's name and its grid."""

    def count(function: Callable[[], object]) -> list[tuple[str, tuple[int, ...]]]:
        launches = []
        with pytest.MonkeyPatch.context() as patch:
            for name, kind in (("jit", "JITFunction"), ("interpreter", "InterpretedFunction")):
                owner = getattr(importlib.import_module(f"triton.runtime.{name}"), kind)

                def run(self: Any, *args: Any, grid: Any, real: Any = owner.run, **kwargs: Any) -> Any:
                    launches.append((self.fn.__name__, tuple(grid)))
                    return real(self, *args, grid=grid, **kwargs)

                patch.setattr(owner, "run", run)
            function()
        return launches

    return count


@pytest.fixture
def count_gemms() -> Callable[[Callable[[], object]], list[int]]:
    """Run a function and return, of each matrix product in it, how many multiplications it does."""

    def count(function: Callable[[], object]) -> list[int]:
        with torch.profiler.profile(record_shapes=True) as profile:
            function()
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # position of the left operand
        sizes = []
        for event in profile.events():
            if event.name in first:
                (n, k), (_, m) = event.input_shapes[first[event.name] :][:2]
                sizes.append(n * k * m)
        return sizes

    return count

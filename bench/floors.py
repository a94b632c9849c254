"""What this device can do, measured in the same run: a large matrix product and a large copy.

The fastest of several counts, where a contender's time is a median: a limit is what no run exceeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.cases import Scale, Work, dtype_name

MATRIX = {"gpu": 8192, "cpu": 1536, "quick": 128}
COPY_BYTES = {"gpu": 2**31, "cpu": 2**28, "quick": 2**20}  # read, and as many written
REPEATS = {"gpu": 20, "cpu": 10, "quick": 3}


@dataclass
class Floors:
    """Rates of the device. An op's floor is the larger of its operations and its bytes over these."""

    copy: float  # bytes a second, read and written
    matmul: dict[str, float] = field(default_factory=dict)  # dtype -> operations a second

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """No version of the work runs much faster than this."""
        return max(work.flops / self.matmul[dtype_name(dtype)], work.bytes / self.copy)

    def bound(self, work: Work, dtype: torch.dtype) -> str:
        """Which of the two sets the floor."""
        compute = work.flops / self.matmul[dtype_name(dtype)] >= work.bytes / self.copy
        return "arithmetic" if compute else "memory"


def measure_floors(device: torch.device, dtypes: set[torch.dtype], scale: Scale) -> Floors:
    """Time the product for each dtype, and the copy, on random data: zeros run faster than real numbers."""
    n = MATRIX[scale]
    floors = Floors(copy=0.0)
    for dtype in sorted(dtypes, key=str):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _time(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, REPEATS[scale])
        floors.matmul[dtype_name(dtype)] = 2 * n**3 / seconds
    source = torch.randn(COPY_BYTES[scale] // 4, device=device)
    target = torch.empty_like(source)
    floors.copy = 2 * COPY_BYTES[scale] / _time(lambda: target.copy_(source), device, REPEATS[scale])
    return floors


def _time(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    samples = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            samples.append(time.perf_counter() - begin)
    return min(samples)

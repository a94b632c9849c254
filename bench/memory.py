"""Peak memory and launches of one call, as the allocator and the profiler saw them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Outputs

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Footprint:
    """Of one call."""

    peak: int  # bytes beyond the inputs, at the worst moment
    outputs: int  # bytes of what it returns, which are part of the peak only while they live
    launches: int  # on a GPU kernels, copies and fills; on a CPU operators dispatched, not counting those inside one


def footprint(run: Callable[[], Outputs], device: torch.device, *, launches: bool = True) -> Footprint:
    """Run twice on a GPU (memory, then launches), once on a CPU. The caller has warmed ``run`` up."""
    with no_collection():
        return _on_gpu(run, device, launches) if device.type == "cuda" else _on_cpu(run, launches)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage of earlier calls out of what is measured: it is neither freed here nor waited for."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def storage_bytes(outputs: Outputs) -> int:
    """Bytes of the distinct storages behind ``outputs``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs.values()}
    return sum(storages.values())


def _on_gpu(run: Callable[[], Outputs], device: torch.device, launches: bool) -> Footprint:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    size = storage_bytes(outputs)
    del outputs
    if not launches:
        return Footprint(peak, size, 0)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize(device)
    on_device = [e for e in _raw_events(record) if "CUDA" in str(e.device_type())]
    return Footprint(peak, size, sum(not (_is_memory(e) or _is_annotation(e)) for e in on_device))


def _on_cpu(run: Callable[[], Outputs], launches: bool) -> Footprint:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        outputs = run()
    live = peak = 0
    changes = [e for e in _raw_events(record) if _is_memory(e) and "CPU" in str(e.device_type())]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Footprint(peak, storage_bytes(outputs), _outermost(record) if launches else 0)


def _outermost(record: profile) -> int:
    """Count aten operators that no other aten operator called."""
    spans = [
        (e.start_thread_id(), e.start_ns(), e.end_ns()) for e in _raw_events(record) if e.name().startswith("aten::")
    ]
    count = 0
    until: dict[int, int] = {}
    for thread, start, end in sorted(spans, key=lambda s: (s[0], s[1], -s[2])):
        if start >= until.get(thread, -1):
            count += 1
            until[thread] = end
    return count


def _raw_events(record: profile) -> list[Any]:
    return record.profiler.kineto_results.events()


def _is_annotation(event: Any) -> bool:
    return hasattr(event, "is_user_annotation") and event.is_user_annotation()


def _is_memory(event: Any) -> bool:
    return event.name() == "[memory]"


def poison(device: torch.device, size: int) -> None:
    """Leave NaN in memory that the allocator is about to hand out, so that an output left unwritten shows."""
    blocks = [torch.full((max(1, size // 4),), float("nan"), device=device) for _ in range(2)]
    del blocks

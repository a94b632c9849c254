"""Time of one call, contenders interleaved: device events or graph replay on a GPU, a host clock on a CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from bench.cases import Inputs, Run
from bench.memory import no_collection

LAUNCHES_PER_GRAPH = 4000  # more take longer to capture than they are worth
SAMPLE_SECONDS = 2e-3  # a sample is at least this long on a GPU, else it is made of several calls
MIN_ROUNDS, MAX_ROUNDS = 5, 50
SLOW = 1.0  # seconds a call

Sampler = Callable[[], float]  # seconds of one call


@dataclass(frozen=True)
class Timing:
    """Samples of one contender, seconds a call."""

    samples: tuple[float, ...]
    method: str

    @property
    def median(self) -> float:
        """The middle sample."""
        return median(self.samples)

    def spread(self) -> tuple[float, float]:
        """Fifth and four fifths of the samples lie below."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        cuts = quantiles(self.samples, n=5, method="inclusive")
        return cuts[0], cuts[-1]


def sampler(run: Run, sets: list[Inputs], device: torch.device, *, graph: bool, launches: int) -> tuple[Sampler, str]:
    """Return a function that times one call, over rotating inputs, and the name of the method.

    ``graph``: replay a CUDA graph if the contender can be captured, which leaves the launches' cost on the host out.
    """
    if device.type != "cuda":
        return _cpu_sampler(run, sets), "perf_counter"
    if graph and launches * len(sets) <= LAUNCHES_PER_GRAPH and not _synchronises(run, sets[0]):
        try:
            return _graph_sampler(run, sets, device), "graph"
        except RuntimeError:
            torch.cuda.synchronize(device)
    return _event_sampler(run, sets, device), "events"


def interleave(
    samplers: Mapping[str, Sampler], budget: float, *, min_rounds: int = MIN_ROUNDS
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Sample all contenders in turn, so that a drift of the machine meets all of them.

    Each gets about the same share of ``budget`` seconds and at least ``min_rounds`` samples, or two if one takes longer
    than a second; the slow ones sit out rounds, spread evenly. The order rotates from round to round. What a contender
    raises ends its part, and is returned beside the samples.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    failed: dict[str, Exception] = {}

    def sample(name: str) -> float | None:
        try:
            return samplers[name]()
        except Exception as error:
            failed[name] = error
            return None

    rounds = {}
    for name in samplers:
        begin = time.perf_counter()
        sample(name)  # warm-up: caches, allocator, clocks
        cost = time.perf_counter() - begin
        least = min_rounds if cost < SLOW else 2
        rounds[name] = min(MAX_ROUNDS, max(least, int(budget / len(samplers) / max(cost, 1e-9))))
    names = [name for name in samplers if name not in failed]
    total = max((rounds[name] for name in names), default=0)
    gc.collect()
    with no_collection():
        for r in range(total):
            for i in range(len(names)):
                name = names[(i + r) % len(names)]
                if name not in failed and (r + 1) * rounds[name] // total > r * rounds[name] // total:
                    seconds = sample(name)
                    if seconds is not None:
                        samples[name].append(seconds)
    return {name: taken for name, taken in samples.items() if name not in failed}, failed


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 2**26
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**25


def sets_past_cache(set_bytes: int, device: torch.device, *, most: int = 16) -> int:
    """Count the sets of inputs to rotate so that none is still in the cache when its turn comes again."""
    return max(1, min(most, -(-4 * cache_bytes(device) // max(1, set_bytes))))


def _cpu_sampler(run: Run, sets: list[Inputs]) -> Sampler:
    turn = 0

    def sample() -> float:
        nonlocal turn
        inputs = sets[turn % len(sets)]
        turn += 1
        begin = time.perf_counter()
        outputs = run(inputs)
        seconds = time.perf_counter() - begin
        del outputs
        return seconds

    return sample


def _event_sampler(run: Run, sets: list[Inputs], device: torch.device) -> Sampler:
    turn = 0

    def calls(count: int) -> float:
        nonlocal turn
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            run(sets[turn % len(sets)])
            turn += 1
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    calls(1)
    count = _calls_per_sample(calls(1))
    return lambda: calls(count)


def _graph_sampler(run: Run, sets: list[Inputs], device: torch.device) -> Sampler:
    """One graph that calls once on each set; what it returns is let go, so memory is reused within the graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # capture wants a warm-up on a side stream
        for inputs in sets[:2]:
            run(inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            run(inputs)

    def replays(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count / len(sets)

    replays(2)
    count = _calls_per_sample(replays(2) * len(sets))
    return lambda: replays(count)


def _calls_per_sample(seconds: float) -> int:
    return max(1, min(1000, int(SAMPLE_SECONDS / max(seconds, 1e-7))))


def _synchronises(run: Run, inputs: Inputs) -> bool:
    """Whether a call waits for the device: torch says so, and a capture would fail halfway."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False

"""The kernels that ``bench.aot`` compiles, specialised as they are launched on a policy of 8 billion parameters."""

from __future__ import annotations

from bench import aot_ensemble
from bench.aot import Case

CASES: list[Case] = [*aot_ensemble.CASES]

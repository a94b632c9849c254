"""Who takes part. The peers are here, one module a library; ours and plain torch stand with their op.

Importing this imports no peer: each is imported when a contender is built.
"""

from bench import ops  # noqa: F401  (importing registers)
from bench.contenders import (  # noqa: F401  (importing registers)
    cut_cross_entropy,
    liger,
    quack,
    torchrl,
    trl,
    verl,
)
from bench.registry import registered as contenders

__all__ = ["contenders"]

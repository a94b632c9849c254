"""The contenders, one module a peer. Importing this imports no peer: each is imported when a contender is built."""

from bench.contenders import (  # noqa: F401  (importing registers)
    asyppo,
    critics,
    cut_cross_entropy,
    liger,
    plain,
    quack,
    torchrl,
    training,
    trl,
    verl,
)

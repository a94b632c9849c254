"""Student's t distribution with a whole number of degrees of freedom."""

from __future__ import annotations

import math


def cumulative(t: float, degrees: int) -> float:
    """P(T <= t), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if degrees % 2 else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        # Of odd degrees 2/3, 4/5, ..., of even ones 1/2, 3/4, ...
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if degrees % 2 else (2 * k + 1) / (2 * k + 2))
    within = 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total
    return (1 + within) / 2


def quantile(p: float, degrees: int) -> float:
    """The t below which a draw lies with probability ``p``, in (0, 1), to the last digits of a float.

    Raises:
        ValueError: ``p`` outside (0, 1), or ``degrees`` below 1.
    """
    if not (0 < p < 1 and degrees >= 1):
        raise ValueError(f"p: got {p}, needs a number in (0, 1); degrees: got {degrees}, needs at least 1")
    low, high = -1.0, 1.0
    while cumulative(low, degrees) > p:
        low *= 2
    while cumulative(high, degrees) < p:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if cumulative(middle, degrees) < p else (low, middle)
    return middle

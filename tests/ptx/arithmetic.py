"""Numbers as a GPU rounds them: bfloat16, fused multiply-add, flushed subnormals, integer division."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
SMALLEST_NORMAL = np.float32(2.0**-126)


def bits_of(kind: str) -> int:
    """The width of a PTX type such as ``b32`` or ``bf16x2``."""
    if kind == "pred":
        return 1
    return 32 if kind.endswith("x2") else int(kind.lstrip("bfsu"))


def dtype_of(kind: str) -> type[np.generic]:
    """numpy's type for a PTX type; the low-precision floats are handled as their bits."""
    if kind == "pred":
        return np.bool_
    if kind == "f32":
        return np.float32
    return (SIGNED if kind[0] == "s" else UNSIGNED)[bits_of(kind)]


def bf16_to_f32(bits: Array) -> Array:
    """float32 of the bits of bfloat16; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_to_f32(bits: Array) -> Array:
    """float32 of the bits of float16; exact."""
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """Bits of bfloat16, rounded to nearest, ties to even; NaN is 0x7fff, as PTX has it."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint16(0x7FFF), rounded.astype(np.uint16))


def f32_to_f16(x: Array) -> Array:
    """Bits of float16, rounded to nearest, ties to even."""
    return x.astype(np.float16).view(np.uint16)


def to_odd(x: Array) -> Array:
    """float32 of float64, rounded to odd: what rounds it once more, to fewer digits, then rounds as if once."""
    nearest = x.astype(np.float32)
    back = nearest.astype(np.float64)
    inexact = (back != x) & np.isfinite(back)
    bits = nearest.view(np.uint32)
    bits = np.where(inexact & (np.abs(back) > np.abs(x)), bits - np.uint32(1), bits)  # toward zero
    return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c of float32, rounded once: the product is exact in float64, its sum with c is rounded to odd there."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # of the sum, exactly
    inexact = (error != 0) & np.isfinite(total)
    if inexact.any():
        bits = total.view(np.uint64)
        toward_zero = np.where((error > 0) == (total > 0), bits, bits - np.uint64(1))
        even = (bits & np.uint64(1)) == 0
        total = np.where(inexact & even, toward_zero | np.uint64(1), bits).view(np.float64)
    return total.astype(np.float32)


def flush(x: Array) -> Array:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def divide(a: Array, b: Array) -> Array:
    """Integers, rounded toward zero; all bits set where the divisor is 0, as the hardware gives."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient.astype(a.dtype))


def multiply_high(a: Array, b: Array) -> Array:
    """The upper 64 bits of the product of signed 64-bit integers."""
    return np.array([int(x) * int(y) >> 64 for x, y in zip(a.ravel(), b.ravel(), strict=True)], np.int64).reshape(
        a.shape
    )

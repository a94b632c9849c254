"""What each PTX opcode does, as far as the package's kernels use it. Anything else is an error.

An operation takes the wave, the instruction's number and the instruction, looks its operands up once, and returns a
function that runs it for a slice of the warps. A modifier that is not looked at here is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import arithmetic as ar
from tests.ptx.arithmetic import SIGNED, UNSIGNED, Array, bits_of, dtype_of
from tests.ptx.program import Address, Discard, Immediate, Instruction, Operand, PTXError, Register, Vector

if TYPE_CHECKING:
    from tests.ptx.machine import Wave

Run = Callable[[slice], None]
Operation = Callable[["Wave", int, Instruction], Run]
OPERATIONS: dict[str, Operation] = {}
LANES = np.arange(32)
LOW_FLOATS = ("bf16", "f16", "bf16x2", "f16x2")


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Register a function for opcodes of these names."""

    def add(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return add


def check(i: Instruction, *allowed: str) -> set[str]:
    """The modifiers between an opcode and its type; PTXError for one that is not among ``allowed``."""
    found = set(i.parts[1:-1])
    if found - set(allowed):
        raise PTXError(f"modifiers the emulator does not know: {sorted(found - set(allowed))} of {i}")
    return found


# Moves and choices


@operation("nop")
def nop(w: Wave, pc: int, i: Instruction) -> Run:
    return lambda s: None


@operation("bar")
def bar(w: Wave, pc: int, i: Instruction) -> Run:
    """Of one warp, whose lanes run in step; that of a program's warps is not an operation."""
    if i.op != "bar.warp.sync" or i.operands != (Immediate(-1),) or i.guard:
        raise PTXError(f"a barrier the emulator does not know: {i}")
    return lambda s: None


@operation("mov")
def mov(w: Wave, pc: int, i: Instruction) -> Run:
    check(i)
    kind, (to, source) = i.parts[-1], i.operands
    if isinstance(to, Vector):  # a register into its parts
        whole, bits = w.value(source, kind), bits_of(kind) // len(to.items)

        def part(k: int) -> Callable[[slice], Array]:
            shift = whole.dtype.type(k * bits)
            return lambda s: (whole[s] >> shift).astype(UNSIGNED[bits])

        writes = [w.write(i, part(k), item) for k, item in enumerate(to.items) if not isinstance(item, Discard)]

        def run(s: slice) -> None:
            for write in writes:
                write(s)

        return run
    if isinstance(source, Vector):  # parts into a register
        bits, dtype = bits_of(kind) // len(source.items), UNSIGNED[bits_of(kind)]
        parts = [w.value(item, f"b{bits}") for item in source.items]
        return w.write(
            i, lambda s: np.bitwise_or.reduce([p[s].astype(dtype) << dtype(k * bits) for k, p in enumerate(parts)])
        )
    value = w.value(source, kind)
    return w.write(i, lambda s: value[s])


@operation("selp")
def selp(w: Wave, pc: int, i: Instruction) -> Run:
    check(i)
    a, b = (w.value(x, i.parts[-1]) for x in i.operands[1:3])
    assert isinstance(i.operands[3], Register)
    choose = w.predicate(i.operands[3])
    return w.write(i, lambda s: np.where(choose(s), a[s], b[s]))


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@operation("setp")
def setp(w: Wave, pc: int, i: Instruction) -> Run:
    _, comparison, kind = i.parts
    a, b = (w.value(x, kind) for x in i.operands[1:3])
    if kind != "f32":
        compare = COMPARE[comparison]
        return w.write(i, lambda s: compare(a[s], b[s]))
    if comparison in ("nan", "num"):  # whether either is NaN, whether neither is
        return w.write(i, lambda s: (np.isnan(a[s]) | np.isnan(b[s])) == (comparison == "nan"))
    # Ordered comparisons are false where one is NaN, those that end in u are true.
    unordered = comparison.endswith("u")
    compare = COMPARE[comparison.removesuffix("u")]

    def evaluate(s: slice) -> Array:
        nan = np.isnan(a[s]) | np.isnan(b[s])
        return np.where(nan, unordered, compare(a[s], b[s]))

    return w.write(i, evaluate)


# Arithmetic


def halves(w: Wave, operand: Operand, kind: str) -> list[Callable[[slice], Array]]:
    """float64 of a low-precision operand: of the number, or of both numbers of a packed one."""
    up = ar.bf16_to_f32 if kind.startswith("bf16") else ar.f16_to_f32
    value = w.value(operand, f"b{bits_of(kind)}")
    if not kind.endswith("x2"):
        return [lambda s: up(value[s]).astype(np.float64)]
    return [
        lambda s: up((value[s] & np.uint32(0xFFFF)).astype(np.uint16)).astype(np.float64),
        lambda s: up((value[s] >> np.uint32(16)).astype(np.uint16)).astype(np.float64),
    ]


def low_float(w: Wave, i: Instruction, function: Callable[..., Array]) -> Run:
    """``function`` of bfloat16 or float16 operands, packed or not, rounded once."""
    kind = i.parts[-1]
    sources = [halves(w, x, kind) for x in i.operands[1:]]
    down = (lambda x: ar.f32_to_bf16(ar.to_odd(x))) if kind.startswith("bf16") else ar.f32_to_f16

    def evaluate(s: slice) -> Array:
        parts = [down(function(*(source[k](s) for source in sources))) for k in range(len(sources[0]))]
        return (
            parts[0] if len(parts) == 1 else parts[0].astype(np.uint32) | (parts[1].astype(np.uint32) << np.uint32(16))
        )

    return w.write(i, evaluate)


def elementwise(w: Wave, i: Instruction, function: Callable[..., Array], *allowed: str) -> Run:
    """``function`` of operands of the instruction's type."""
    modifiers, kind = check(i, *allowed, "rn", "ftz"), i.parts[-1]
    if kind in LOW_FLOATS:
        return low_float(w, i, function)
    sources = [w.value(x, kind) for x in i.operands[1:]]
    if "ftz" in modifiers:
        return w.write(i, lambda s: ar.flush(function(*(ar.flush(x[s]) for x in sources))))
    return w.write(i, lambda s: function(*(x[s] for x in sources)))


@operation("add", "sub")
def add(w: Wave, pc: int, i: Instruction) -> Run:
    return elementwise(w, i, np.add if i.parts[0] == "add" else np.subtract)


@operation("neg", "abs")
def sign(w: Wave, pc: int, i: Instruction) -> Run:
    return elementwise(w, i, np.negative if i.parts[0] == "neg" else np.abs)


@operation("max", "min")
def extreme(w: Wave, pc: int, i: Instruction) -> Run:
    quiet, loud = (np.fmax, np.maximum) if i.parts[0] == "max" else (np.fmin, np.minimum)
    return elementwise(w, i, loud if "NaN" in i.parts else quiet, "NaN")


@operation("and", "or", "xor", "not")
def bitwise(w: Wave, pc: int, i: Instruction) -> Run:
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    if i.parts[-1] != "pred":
        return elementwise(w, i, functions[i.parts[0]])
    sources = [w.predicate(x) for x in i.operands[1:] if isinstance(x, Register)]
    return w.write(i, lambda s: functions[i.parts[0]](*(x(s) for x in sources)))


@operation("popc")
def popc(w: Wave, pc: int, i: Instruction) -> Run:
    return elementwise(w, i, lambda x: np.bitwise_count(x).astype(np.uint32))


def product(a: Array, b: Array, kind: str, mode: str) -> Array:
    """Of integers: the low half, the high half or all of it."""
    if mode == "lo":
        return a * b
    bits = bits_of(kind)
    if bits == 64:
        if mode != "hi" or kind != "s64":
            raise PTXError(f"mul.{mode}.{kind}")
        return ar.multiply_high(a, b)
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits]
    whole = a.astype(wide) * b.astype(wide)
    return whole if mode == "wide" else (whole >> whole.dtype.type(bits)).astype(a.dtype)


@operation("mul")
def mul(w: Wave, pc: int, i: Instruction) -> Run:
    kind = i.parts[-1]
    if kind == "f32" or kind in LOW_FLOATS:
        return elementwise(w, i, np.multiply)
    mode = check(i, "lo", "hi", "wide").pop()
    a, b = (w.value(x, kind) for x in i.operands[1:])
    return w.write(i, lambda s: product(a[s], b[s], kind, mode))


@operation("mad")
def mad(w: Wave, pc: int, i: Instruction) -> Run:
    kind, mode = i.parts[-1], check(i, "lo", "wide").pop()
    a, b = (w.value(x, kind) for x in i.operands[1:3])
    c = w.value(i.operands[3], kind if mode == "lo" else f"{kind[0]}{2 * bits_of(kind)}")
    return w.write(i, lambda s: product(a[s], b[s], kind, mode) + c[s])


@operation("fma")
def fma(w: Wave, pc: int, i: Instruction) -> Run:
    return elementwise(w, i, ar.fma if i.parts[-1] == "f32" else lambda a, b, c: a * b + c)


@operation("fused")
def fused(w: Wave, pc: int, i: Instruction) -> Run:
    """What ``program.contract`` makes of a product and a sum."""
    a, b, c = (w.value(x, "f32") for x in i.operands[1:])
    by_kind = {
        "add": lambda s: ar.fma(a[s], b[s], c[s]),
        "left": lambda s: ar.fma(a[s], b[s], -c[s]),
        "right": lambda s: ar.fma(-a[s], b[s], c[s]),
    }
    return w.write(i, by_kind[i.parts[1]])


def approximate(w: Wave, evaluate: Callable[[slice], Array]) -> Callable[[slice], Array]:
    """With the schedule's relative error, the same for the same result, as hardware has it; none at 1, as of 2^0."""
    noise, seed = w.machine.schedule.noise, np.uint32(w.machine.schedule.seed)
    if not noise:
        return evaluate

    def noisy(s: slice) -> Array:
        exact = evaluate(s)
        drawn = (exact.view(np.uint32) + seed) * np.uint32(2_654_435_761)  # a multiplicative hash
        factor = 1 + noise * (drawn / 2.0**31 - 1)
        return np.where(exact == np.float32(1), exact, (exact.astype(np.float64) * factor).astype(np.float32))

    return noisy


@operation("div")
def div(w: Wave, pc: int, i: Instruction) -> Run:
    kind = i.parts[-1]
    a, b = (w.value(x, kind) for x in i.operands[1:])
    if kind == "f32":
        check(i, "full", "approx")
        return w.write(i, approximate(w, lambda s: a[s] / b[s]))
    check(i)
    return w.write(i, lambda s: ar.divide(a[s], b[s]))


FUNCTIONS = {
    "ex2": np.exp2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
}


@operation(*FUNCTIONS)
def function(w: Wave, pc: int, i: Instruction) -> Run:
    if i.parts[-1] != "f32" or "approx" not in i.parts:
        raise PTXError(f"a function the emulator does not know: {i}")
    x, evaluate = w.value(i.operands[1], "f32"), FUNCTIONS[i.parts[0]]
    if "ftz" in check(i, "approx", "ftz"):
        return w.write(i, approximate(w, lambda s: ar.flush(evaluate(ar.flush(x[s])))))
    return w.write(i, approximate(w, lambda s: evaluate(x[s])))


# Bits


@operation("shl", "shr")
def shift(w: Wave, pc: int, i: Instruction) -> Run:
    check(i)
    kind = i.parts[-1]
    bits, a, by = bits_of(kind), w.value(i.operands[1], kind), w.value(i.operands[2], "u32")
    move = np.left_shift if i.parts[0] == "shl" else np.right_shift
    keeps_sign = i.parts[0] == "shr" and kind[0] == "s"

    def evaluate(s: slice) -> Array:
        count = by[s]
        moved = move(a[s], np.minimum(count, np.uint32(bits - 1)).astype(a.dtype))
        return moved if keeps_sign else np.where(count >= bits, a.dtype.type(0), moved)

    return w.write(i, evaluate)


@operation("bfe")
def bfe(w: Wave, pc: int, i: Instruction) -> Run:
    if i.op not in ("bfe.u32", "bfe.s32") or not all(isinstance(x, Immediate) for x in i.operands[2:]):
        raise PTXError(f"a bfe the emulator does not know: {i}")
    position, length = (x.value for x in i.operands[2:] if isinstance(x, Immediate))
    a, mask = w.value(i.operands[1], "u32"), np.uint32((1 << length) - 1)
    # Signed, the field's highest bit fills what lies above it: x with the sign bit b is (x ^ b) - b.
    sign = np.uint32(1 << (length - 1) if i.op == "bfe.s32" else 0)
    return w.write(i, lambda s: (((a[s] >> np.uint32(position)) & mask) ^ sign) - sign)


@operation("prmt")
def prmt(w: Wave, pc: int, i: Instruction) -> Run:
    check(i)
    a, b, selector = *(w.value(x, "b32") for x in i.operands[1:3]), i.operands[3]
    if not isinstance(selector, Immediate):
        raise PTXError(f"prmt by a register: {i}")

    def evaluate(s: slice) -> Array:
        result = np.zeros(a[s].shape, np.uint32)
        for k in range(4):
            choice = selector.value >> (4 * k) & 0xF
            byte = ((b if choice & 4 else a)[s] >> np.uint32(8 * (choice & 3))) & np.uint32(0xFF)
            if choice & 8:  # its sign alone
                byte = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
            result |= byte << np.uint32(8 * k)
        return result

    return w.write(i, evaluate)


@operation("cvt")
def cvt(w: Wave, pc: int, i: Instruction) -> Run:
    to, source = i.parts[-2:]
    rounding = set(i.parts[1:-2])
    if to in ("bf16x2", "f16x2") and source == "f32" and rounding == {"rn"}:
        high, low = (w.value(x, "f32") for x in i.operands[1:])
        down = ar.f32_to_bf16 if to == "bf16x2" else ar.f32_to_f16
        return w.write(i, lambda s: (down(high[s]).astype(np.uint32) << np.uint32(16)) | down(low[s]).astype(np.uint32))
    floats = {"bf16": ar.bf16_to_f32, "f16": ar.f16_to_f32}
    if to == "f32" and source in floats and not rounding:
        up, bits = floats[source], w.low(i.operands[1], "b16")
        return w.write(i, lambda s: up(bits(s)))
    value = w.low(i.operands[1], source)
    if to in ("bf16", "f16") and source == "f32" and rounding == {"rn"}:
        down = ar.f32_to_bf16 if to == "bf16" else ar.f32_to_f16
        return w.write(i, lambda s: down(value(s)))
    if to == "f32" and source[0] in "su" and rounding == {"rn"}:
        return w.write(i, lambda s: value(s).astype(np.float32))
    if to[0] in "su" and source[0] in "su" and not rounding:
        assert isinstance(i.operands[0], Register)
        wide = (SIGNED if to[0] == "s" else UNSIGNED)[w.register(i.operands[0].name).itemsize * 8]
        return w.write(i, lambda s: value(s).astype(dtype_of(to)).astype(wide))
    raise PTXError(f"a conversion the emulator does not know: {i}")


# Between the lanes of a warp


def whole_warps(w: Wave, i: Instruction) -> None:
    """PTXError where a guard could keep lanes out of an instruction that all have to run."""
    if i.guard is not None:
        raise PTXError(f"a guard on an instruction of the whole warp: {i}")


@operation("shfl")
def shfl(w: Wave, pc: int, i: Instruction) -> Run:
    whole_warps(w, i)
    mode, (_, source, by, clamp, members) = i.parts[2], i.operands
    if not isinstance(clamp, Immediate) or members != Immediate(-1) or mode not in ("up", "bfly", "idx"):
        raise PTXError(f"a shuffle the emulator does not know: {i}")
    a, count = w.value(source, "b32"), w.value(by, "u32")
    if clamp.value != {"idx": 31, "bfly": 31, "up": 0}.get(mode, clamp.value):
        raise PTXError(f"a shuffle of part of a warp: {i}")

    def evaluate(s: slice) -> Array:
        n = (count[s] & np.uint32(31)).astype(np.int64)
        lane = {"up": LANES - n, "bfly": LANES ^ n, "idx": n}[mode]
        return np.take_along_axis(a[s], np.where(lane < 0, LANES, lane), 1)

    if isinstance(by, Immediate):  # one permutation for all
        n = by.value & 31
        lane = LANES ^ n if mode == "bfly" else np.where(n > LANES, LANES, LANES - n) if mode == "up" else LANES * 0 + n
        return w.write(i, lambda s: a[s][:, lane])
    return w.write(i, evaluate)


@operation("vote")
def vote(w: Wave, pc: int, i: Instruction) -> Run:
    whole_warps(w, i)
    if i.op != "vote.sync.ballot.b32" or not isinstance(i.operands[1], Register):
        raise PTXError(f"a vote the emulator does not know: {i}")
    holds = w.predicate(i.operands[1])

    def evaluate(s: slice) -> Array:
        lanes = np.ascontiguousarray(holds(s))
        return np.broadcast_to(np.packbits(lanes, axis=1, bitorder="little").view(np.uint32), lanes.shape)

    return w.write(i, evaluate)


@operation("redux")
def redux(w: Wave, pc: int, i: Instruction) -> Run:
    whole_warps(w, i)
    functions = {"redux.sync.add.s32": np.add, "redux.sync.max.s32": np.maximum, "redux.sync.min.s32": np.minimum}
    reduce = functions.get(i.op)
    if reduce is None:
        raise PTXError(f"a redux the emulator does not know: {i}")
    a, members = w.value(i.operands[1], "s32"), w.value(i.operands[2], "u32")

    def evaluate(s: slice) -> Array:
        if (members[s] != 0xFFFFFFFF).any():
            raise PTXError(f"redux of part of a warp: {i}")
        return np.broadcast_to(reduce.reduce(a[s], 1, np.int32)[:, None], a[s].shape)

    return w.write(i, evaluate)


# Memory

ELSEWHERE = {"red"}  # opcodes that Triton 3.9 takes where 3.7 takes others
MODIFIERS = ("global", "shared", "gpu", "relaxed", "sys", "L1::evict_last", "L1::evict_first", "v2", "v4", "v8")


def access_width(i: Instruction) -> int:
    """The bytes a lane takes from or gives to global or shared memory at once; 0 for other instructions."""
    name = i.parts[0]
    if name in ("ldmatrix", "stmatrix"):
        return 16
    if name not in ("ld", "st", "atom", "red") or i.parts[1] == "param":
        return 0
    return vector_length(i) * bits_of(i.parts[-1]) // 8


def vector_length(i: Instruction) -> int:
    """How many registers a load or store takes."""
    return next((int(part[1:]) for part in i.parts if part in ("v2", "v4", "v8")), 1)


def items(operand: Operand) -> tuple[Operand, ...]:
    """The registers of ``{a, b}`` or of ``a``."""
    return operand.items if isinstance(operand, Vector) else (operand,)


@operation("ld")
def ld(w: Wave, pc: int, i: Instruction) -> Run:
    kind, space = i.parts[-1], i.parts[1]
    if space == "param":
        return ld_param(w, i)
    check(i, *MODIFIERS)
    width, bits, locate = access_width(i), bits_of(kind), w.locate(pc, i, i.operands[1], access_width(i), space)
    registers = [w.register(x.name) for x in items(i.operands[0]) if isinstance(x, Register)]
    if len(registers) != vector_length(i) or kind[0] not in "bus":
        raise PTXError(f"a load the emulator does not know: {i}")
    flat = (w.memory.flat if space == "global" else w.shared).view(dtype_of(kind))
    shadow = w.global_shadow if space == "global" else w.shared_shadow

    def run(s: slice) -> None:
        access = locate(s)
        if access is None:
            return
        if shadow is not None:
            shadow.read(access.at, width, access.warp, access.epoch, pc)
        for k, register in enumerate(registers):
            wide = (SIGNED if kind[0] == "s" else UNSIGNED)[register.itemsize * 8]
            register[s][access.lanes] = flat[access.at // (bits // 8) + k].astype(wide).view(register.dtype)

    return run


def ld_param(w: Wave, i: Instruction) -> Run:
    """A launch's argument, by name or by an address that the kernel chose."""
    kind, (to, address) = i.parts[-1], i.operands
    assert isinstance(address, Address)
    assert isinstance(to, Register)
    width, wide = bits_of(kind) // 8, (SIGNED if kind[0] == "s" else UNSIGNED)[w.register(to.name).itemsize * 8]
    if address.base in w.program.parameters:
        first = w.machine.parameter_at[address.base] + address.offset
        constant = w.constant(np.frombuffer(w.machine.parameters, dtype_of(kind), 1, first)[0], wide)
        return w.write(i, lambda s: constant[s])
    base, flat = w.value(Register(address.base), "s64"), np.frombuffer(w.machine.parameters, np.uint8)

    def evaluate(s: slice) -> Array:
        at = base[s] + address.offset
        if (at < 0).any() or (at + width > len(flat)).any():
            raise PTXError(f"out of bounds: an argument beyond the last: {i}")
        return flat[at[..., None] + np.arange(width)].view(dtype_of(kind))[..., 0].astype(wide)

    return w.write(i, evaluate)


@operation("st")
def st(w: Wave, pc: int, i: Instruction) -> Run:
    check(i, *MODIFIERS)
    kind, space = i.parts[-1], i.parts[1]
    width, bits, locate = access_width(i), bits_of(kind), w.locate(pc, i, i.operands[0], access_width(i), space)
    sources = [w.low(x, f"b{bits}") for x in items(i.operands[1])]
    if len(sources) != vector_length(i):
        raise PTXError(f"a store the emulator does not know: {i}")
    flat = (w.memory.flat if space == "global" else w.shared).view(UNSIGNED[bits])
    shadow = w.global_shadow if space == "global" else w.shared_shadow

    def run(s: slice) -> None:
        access = locate(s)
        if access is None:
            return
        at = access.at // (bits // 8)
        values = [source(s)[access.lanes] for source in sources]

        def holds() -> Array:
            return np.logical_and.reduce([flat[at + k] == value for k, value in enumerate(values)])

        held = holds() if shadow is not None else None
        for k, value in enumerate(values):
            flat[at + k] = value
        if shadow is not None:
            shadow.write(access.at, width, access.warp, access.epoch, pc, held, holds())

    return run


@operation("atom", "red")
def atom(w: Wave, pc: int, i: Instruction) -> Run:
    """An addition of integers, in any order of the lanes; ``red`` is one whose result nobody wants."""
    check(i, *MODIFIERS, "add")
    kind, space, width = i.parts[-1], i.parts[1], access_width(i)
    if kind not in ("u32", "u64") or "add" not in i.parts or space not in ("global", "shared"):
        raise PTXError(f"an atomic the emulator does not know: {i}")
    *to, address, operand = i.operands
    locate, value = w.locate(pc, i, address, width, space), w.value(operand, kind)
    flat = (w.memory.flat if space == "global" else w.shared).view(dtype_of(kind))
    shadow = w.global_shadow if space == "global" else w.shared_shadow
    register = next((w.register(x.name) for x in to if isinstance(x, Register)), None)

    def run(s: slice) -> None:
        access = locate(s)
        if access is None:
            return
        if shadow is not None:
            none = np.zeros(len(access.at), bool)
            shadow.read(access.at, width, access.warp, access.epoch, pc, atomic=True)
            shadow.write(access.at, width, access.warp, access.epoch, pc, none, none, atomic=True)
        at, values = access.at // width, value[s][access.lanes]
        before = np.empty(len(at), flat.dtype)
        for k in w.rng.permutation(len(at)):
            before[k] = flat[at[k]]
            flat[at[k]] += values[k]
        if register is not None:
            register[s][access.lanes] = before

    return run


def matrices(w: Wave, i: Instruction) -> tuple[int, bool]:
    """(how many 8 x 8 matrices, whether transposed) of ldmatrix and stmatrix."""
    whole_warps(w, i)
    count = next(n for n in (1, 2, 4) if f"x{n}" in i.parts)
    check(i, "sync", "aligned", "m8n8", f"x{count}", "trans", "shared")
    return count, "trans" in i.parts


def matrix_rows(w: Wave, pc: int, i: Instruction, operand: Operand, count: int) -> Callable[[slice], tuple[Array, ...]]:
    """Where the rows of the matrices start, and whose they are: each of the first 8 ``count`` lanes names one."""
    locate = w.locate(pc, i, operand, 16, "shared", of=8 * count)

    def rows(s: slice) -> tuple[Array, ...]:
        access = locate(s)
        assert access is not None
        return access.at, access.warp, access.epoch

    return rows


@operation("ldmatrix")
def ldmatrix(w: Wave, pc: int, i: Instruction) -> Run:
    count, transposed = matrices(w, i)
    registers = [w.register(x.name) for x in items(i.operands[0]) if isinstance(x, Register)]
    rows, numbers = matrix_rows(w, pc, i, i.operands[1], count), w.shared.view(np.uint16)

    def run(s: slice) -> None:
        at, warp, epoch = rows(s)
        if w.shared_shadow is not None:
            w.shared_shadow.read(at, 16, warp, epoch, pc)
        matrix = numbers[(at // 2)[:, None] + np.arange(8)].reshape(-1, count, 8, 8)
        matrix = matrix.swapaxes(2, 3) if transposed else matrix
        for k, register in enumerate(registers):
            pair = matrix[:, k].reshape(-1, 32, 2).astype(np.uint32)
            register[s] = pair[..., 0] | (pair[..., 1] << np.uint32(16))

    return run


@operation("stmatrix")
def stmatrix(w: Wave, pc: int, i: Instruction) -> Run:
    count, transposed = matrices(w, i)
    sources = [w.value(x, "b32") for x in items(i.operands[1])]
    rows, numbers = matrix_rows(w, pc, i, i.operands[0], count), w.shared.view(np.uint16)

    def run(s: slice) -> None:
        at, warp, epoch = rows(s)
        where = (at // 2)[:, None] + np.arange(8)
        pairs = [np.stack([x[s] & np.uint32(0xFFFF), x[s] >> np.uint32(16)], -1) for x in sources]
        matrix = np.stack([p.astype(np.uint16).reshape(-1, 8, 8) for p in pairs], 1)
        values = (matrix.swapaxes(2, 3) if transposed else matrix).reshape(-1, 8)
        held = (numbers[where] == values).all(1)
        numbers[where] = values
        if w.shared_shadow is not None:
            w.shared_shadow.write(at, 16, warp, epoch, pc, held, (numbers[where] == values).all(1))

    return run

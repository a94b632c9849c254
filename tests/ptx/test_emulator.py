"""The emulator itself, on PTX written by hand: its arithmetic against exact numbers, and each fault it has to find."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx import arithmetic as ar
from tests.ptx.machine import Machine, Schedule
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import PTXError, contract, parse

ORDERS = ("lockstep", "random", "greedy")
HEAD = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	.reg .b16 	%rs<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	mov.b32 	%r2, global_smem;
	shl.b32 	%r3, %r1, 2;
	add.s32 	%r4, %r2, %r3;
	xor.b32 	%r5, %r4, 128;
"""


def run(body: str, x: torch.Tensor, order: str = "lockstep", programs: int = 1, shared: int = 256) -> list[str]:
    """Run a kernel of two warps on ``x``, %rd3 pointing at each thread's element; return the issues."""
    memory = GlobalMemory()
    memory.add(x.data_ptr(), x.numel() * x.element_size())
    pointer = memory.address(x.data_ptr()).to_bytes(8, "little")
    program = parse(HEAD + body + "\n\tret;\n}\n")
    machine = Machine(program, (programs, 1, 1), shared, [pointer], memory, Schedule(order, seed=1))
    machine.run()
    return [text for text, _ in machine.issues.values()]


# Each thread hands its element to the thread 32 further on, in the other warp.
STORE, LOAD = (
    "ld.global.b32 %r6, [%rd3];\nst.shared.b32 [%r4], %r6;\n",
    "ld.shared.b32 %r7, [%r5];\nst.global.b32 [%rd3], %r7;",
)


@pytest.mark.parametrize("order", ORDERS)
def test_warps_hand_on_values_over_a_barrier(order: str) -> None:
    x = torch.arange(64, dtype=torch.int32)
    assert run(f"{STORE}bar.sync 0;\n{LOAD}", x, order) == []
    assert x.tolist() == [*range(32, 64), *range(32)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_a_race_under_any_order(order: str) -> None:
    issues = run(STORE + LOAD, torch.zeros(64, dtype=torch.int32), order)
    assert any("race of warps" in text or "uninitialised shared memory" in text for text in issues)


def test_a_missing_barrier_before_memory_is_used_again_is_a_race() -> None:
    again = f"bar.sync 0;\n{LOAD}\n{STORE}"
    assert any("write after read: race of warps" in text for text in run(STORE + again, torch.zeros(64).int()))
    assert run(STORE + again.replace(STORE, f"bar.sync 0;\n{STORE}"), torch.zeros(64).int()) == []


def test_programs_that_write_one_place_race() -> None:
    assert run("st.global.b32 [%rd3], %r1;", torch.zeros(64).int()) == []
    issues = run("st.global.b32 [%rd3], %r1;", torch.zeros(64).int(), programs=2)
    assert any("write after write: race of programs" in text for text in issues)


@pytest.mark.parametrize(
    "addition",
    ["atom.global.gpu.relaxed.add.u32 %r7, [%rd1], %r6;", "red.relaxed.sys.global.add.u32 [ %rd1 + 0 ], %r6;"],
)
def test_atomic_additions_of_programs_do_not_race(addition: str) -> None:
    x = torch.zeros(64, dtype=torch.int32)
    assert run(f"mov.b32 %r6, 3;\n{addition}", x, "random", programs=5) == []
    assert x[0] == 3 * 64 * 5


@pytest.mark.parametrize("end", ["$L1:", "bra.uni $L1;\n$L2:\nmov.b32 %r6, 9;\n$L1:"])
def test_lanes_that_take_a_branch_meet_the_others_where_it_leads(end: str) -> None:
    x = torch.zeros(64, dtype=torch.int32)
    body = (
        f"setp.lt.s32 %p1, %r1, 3;\nmov.b32 %r6, 5;\n@%p1 bra $L1;\nmov.b32 %r6, 7;\n{end}\nst.global.b32 [%rd3], %r6;"
    )
    assert run(body, x) == []
    assert x.tolist() == [5] * 3 + [7] * 61


def test_shared_memory_by_its_longer_name() -> None:
    x = torch.arange(64, dtype=torch.int32)
    assert run(f"{STORE}bar.sync 0;\n{LOAD}".replace("shared", "shared::cta"), x) == []
    assert x.tolist() == [*range(32, 64), *range(32)]


def test_several_warps_may_share_a_store_of_one_value() -> None:
    assert run("mov.b32 %r6, 7;\nst.shared.b32 [global_smem], %r6;", torch.zeros(64).int()) == []
    issues = run("st.shared.b32 [global_smem], %r1;", torch.zeros(64).int())
    assert any("write after write: race of warps" in text for text in issues)


FAULTS = {
    "misaligned: global access of 4 bytes": "ld.global.b32 %r6, [%rd3+2];",
    "misaligned: global access of 16 bytes": "ld.global.v4.b32 {%r6, %r7, %r8, %r2}, [%rd3];",
    "out of bounds: global": "ld.global.b32 %r6, [%rd3+4];",
    "out of bounds: shared": "st.shared.b32 [%r4+256], %r1;",
    "lanes of a warp part": "setp.lt.s32 %p1, %r1, 3;\n@%p1 bra $L1;\nret;\n$L1:",
    "deadlock": "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L1;\n$L2:\nbra $L3;\n$L1:\nbar.sync 1;\n$L3:",
    "an opcode the emulator does not know": "tanh.approx.f32 %r6, %r1;",
    "modifiers the emulator does not know": "add.sat.f32 %r6, %r1, %r1;",
    "a conversion the emulator does not know": "cvt.rz.bf16.f32 %rs1, %r1;",
    "is not of type b64": "mov.b64 %rd4, %r1;",
}
FAULTS["a barrier the emulator does not know"] = FAULTS.pop("deadlock")


@pytest.mark.parametrize("message", FAULTS)
def test_what_a_gpu_would_fault_at_or_the_emulator_does_not_know_is_an_error(message: str) -> None:
    with pytest.raises(PTXError, match=message):
        run(FAULTS[message], torch.zeros(64).int())


def test_shared_memory_nobody_wrote_is_reported() -> None:
    assert any("uninitialised shared memory" in text for text in run(LOAD, torch.zeros(64).int()))


def test_warps_at_different_barriers_are_reported() -> None:
    body = "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L1;\nbar.sync 0;\nbra $L2;\n$L1:\nbar.sync 0;\n$L2:"
    assert any("different barriers" in text for text in run(body, torch.zeros(64).int()))


def test_a_product_and_a_sum_are_fused_where_nothing_else_reads_the_product() -> None:
    body = (
        HEAD + "mul.f32 %r6, %r1, %r2;\nsub.f32 %r7, %r3, %r6;\nmul.f32 %r8, %r1, %r1;\nadd.f32 %r4, %r8, %r8;\nret;\n}"
    )
    ops = [i.op for i in contract(parse(body)).code]
    assert ops.count("fused.right") == 1
    assert ops.count("mul.f32") == 1


def test_fused_multiply_add_rounds_once() -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(4000).astype(np.float32) for _ in range(2))
    near = 1 + random.choice([0, 2.0**-24, 2.0**-30, 1, 3], 4000)  # the product almost cancels, or hardly matters
    c = (-(a.astype(np.float64) * b) * near).astype(np.float32)
    for x, y, z, got in zip(a, b, c, ar.fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert got == nearest(exact, np.float32(float(exact)))


def nearest(exact: Fraction, about: np.float32) -> np.float32:
    """The float32 next to ``exact``, ties to even, among the neighbours of ``about``."""
    sides = (about, *(np.nextafter(about, np.float32(side), dtype=np.float32) for side in (-np.inf, np.inf)))
    return min(sides, key=lambda y: (abs(Fraction(float(y)) - exact), int(y.view(np.uint32)) & 1))


def test_bfloat16_rounds_as_torch_does() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    want = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    got, finite = ar.f32_to_bf16(x), ~np.isnan(x)
    assert (got == want)[finite].all()
    assert np.isnan(ar.bf16_to_f32(got[~finite])).all()


def test_rounding_to_odd_lets_bfloat16_round_once() -> None:
    # Half a step of bfloat16 above 1, and a little that float32 does not hold: up, not down to even.
    x = np.array([1 + 2.0**-8 + 2.0**-40])
    assert ar.bf16_to_f32(ar.f32_to_bf16(ar.to_odd(x)))[0] == np.float32(1 + 2.0**-7)
    assert ar.bf16_to_f32(ar.f32_to_bf16(x.astype(np.float32)))[0] == 1


def test_integers_are_divided_toward_zero() -> None:
    a, b = np.array([7, -7, 7, -7, 5], np.int32), np.array([2, 2, -2, -2, 0], np.int32)
    assert ar.divide(a, b).tolist() == [3, -3, -3, 3, -1]


def test_high_half_of_a_product() -> None:
    a = np.array([2**62, -(2**62), 3], np.int64)
    assert ar.multiply_high(a, np.array([4, 4, 5], np.int64)).tolist() == [1, -1, 0]

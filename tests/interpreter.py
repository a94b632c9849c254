"""Triton's interpreter, several times as fast, for the tests.

Of itself it scans and reduces one number at a time, through Python, puts the language's functions in their places anew
whenever a kernel calls a function, and makes the type of every number anew. Here a scan takes few steps of whole
arrays, the functions stay in their places while a kernel runs, and types are kept.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import numpy as np

THREADS = 64


def scan(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """``ScanOps.generic_scan`` in the order of a GPU: each of up to THREADS threads scans its own elements one after
    another, their last ones are combined with those 1, 2, 4, … threads before, and that with all."""
    types = [x.dtype for x in inputs]

    def combine(left: list[np.ndarray], right: list[np.ndarray]) -> list[np.ndarray]:
        pairs = zip((*left, *right), (*types, *types), strict=True)
        combined = self.combine_fn.fn(*(self.to_tensor(x, t) for x, t in pairs))
        combined = combined if isinstance(combined, tuple) else (combined,)
        return [c.handle.data.astype(x.dtype) for c, x in zip(combined, left, strict=True)]

    whole = [np.moveaxis(x.handle.data, self.axis, -1) for x in inputs]
    threads = min(THREADS, whole[0].shape[-1])
    arrays = [x.reshape(*x.shape[:-1], threads, -1) for x in whole]
    own = [[x[..., 0] for x in arrays]]
    for i in range(1, arrays[0].shape[-1]):
        own.append(combine(own[-1], [x[..., i] for x in arrays]))
    number, ends, distance = np.arange(threads), own[-1], 1
    while distance < threads:
        before = combine([np.roll(x, distance, -1) for x in ends], ends)
        ends = [np.where(number < distance, x, b) for x, b in zip(ends, before, strict=True)]
        distance *= 2
    if len(own) > 1 and threads > 1:
        before = [np.roll(x, 1, -1) for x in ends]
        own = [[np.where(number < 1, x, c) for x, c in zip(one, combine(before, one), strict=True)] for one in own[:-1]]
        own.append(ends)
    else:
        own[-1] = ends
    arrays = [np.stack([one[i] for one in own], -1).reshape(x.shape) for i, x in enumerate(whole)]
    return [self.to_tensor(np.moveaxis(x, -1, self.axis), t) for x, t in zip(arrays, types, strict=True)]


def keep_types(core: Any, semantic: Any) -> None:
    """Let blocks of one type share what is derived from it, and equal types and shapes skip what changes
    nothing."""
    block_init, kept = core.block_type.__init__, {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *(core._unwrap_if_constexpr(size) for size in shape))
        if key not in kept:
            block_init(self, element_ty, shape)
            kept[key] = dict(self.__dict__)  # it holds element_ty, so that the id stays that one's
        else:
            self.__dict__.update(kept[key])

    core.block_type.__init__ = block
    tensor_init = core.tensor.__init__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        of_type = type.__dict__.get("of_tensors")
        if of_type is None:
            tensor_init(self, handle, type)
            type.of_tensors = {name: x for name, x in self.__dict__.items() if name != "handle"}
            if type.is_block():
                kept[id(type.element_ty), *type.get_block_shapes()]["of_tensors"] = type.of_tensors
        else:
            self.handle = handle
            self.__dict__.update(of_type)

    core.tensor.__init__ = tensor
    check = semantic.binary_op_type_checking_impl
    plain = ("fp32", "int32", "int64")

    def check_unlike(self: Any, lhs: Any, rhs: Any, *arguments: Any, **options: Any) -> Any:
        of_left, of_right = getattr(lhs, "dtype", None), getattr(rhs, "dtype", None)
        if of_left is not None and of_left is of_right and of_left.name in plain:
            return self.broadcast_impl_value(lhs, rhs)
        if type(rhs) in (int, float) and of_left is not None and of_left.name == "fp32":
            return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, dtype=of_left))
        return check(self, lhs, rhs, *arguments, **options)

    semantic.binary_op_type_checking_impl = check_unlike
    broadcast = semantic.broadcast_impl_value

    def broadcast_unlike(self: Any, lhs: Any, rhs: Any) -> Any:
        alike = lhs.type.is_block() == rhs.type.is_block() and lhs.handle.data.shape == rhs.handle.data.shape
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_unlike


def quicken() -> None:
    """Change what is slow in ``triton.runtime.interpreter``, as far as this version of Triton has it."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    core = importlib.import_module("triton.language").core
    interpreter.ScanOps.generic_scan = scan
    of_scalar = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda t: np.dtype(np.uint64) if t.scalar.is_ptr() else of_scalar(t.scalar)

    builtin = functools.cache(lambda package: [n for n, x in inspect.getmembers(package) if core.is_builtin(x)])

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        for name in builtin(package):
            member = getattr(package, name)
            if core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin

    @functools.cache
    def languages(function: Any) -> list[Any]:
        return [x for x in (interpreter.tl, core) if any(x is y for y in function.__globals__.values())]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if any(core.is_builtin(language.load) for language in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    keep_types(core, interpreter.TritonSemantic)
    # It computes what an assertion would say, and those are off.
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *arguments: None

"""The public function ``agreement_masks``: checks, dispatch and registration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_number, check_tensor, choose_backend
from asyppo_kernels._registration import define
from asyppo_kernels.agreement_masks import torch_form
from asyppo_kernels.agreement_masks.result import AgreementMasks

TRITON_LEVELS = 4  # of triton_form, which is not imported where Triton is not asked for
TRITON_WIDTHS = (128, 2048, 2048, 2048)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def agreement_masks(
    std: Tensor,
    mask: Tensor,
    *,
    advantage_fraction: float = 0.2,
    entropy_fraction: float = 0.2,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> AgreementMasks:
    """Drop the tokens whose values the critics agree on most from the advantage, least from the entropy term.

    The masks I^A and I^H of AsyPPO (arXiv 2510.01656). With s the sorted standard deviations of the n valid tokens, and
    rank(f) = floor(f n) in exact arithmetic on f rounded to six decimals, ``low = s[rank(advantage_fraction)]`` and
    ``high = s[n - 1 - rank(entropy_fraction)]``. ``std < low`` leaves the advantage, ``std > high`` the entropy term.
    Ties are kept: critics that agree everywhere mask nothing, and a fraction of 0 drops nothing. Without valid tokens
    both masks are all False and both thresholds 0. Masked tokens come out False; what they hold (NaN included) is not
    read.

    Args:
        std: any shape, float32, bfloat16 or float16, >= 0 (-0.0 and inf included; NaN counts as above inf and is kept).
        mask: bool, std's shape, True where the token counts.
        advantage_fraction: share dropped from the advantage, in [0, 1).
        entropy_fraction: share dropped from the entropy term, in [0, 1).
        group: take the order statistics over the tokens of all ranks in this process group, each of which calls this
            with its own tokens, possibly none. The result does not depend on how the tokens are divided.
        backend: "torch", "triton" (a GPU's, but for Triton's interpreter), or "auto": Triton on a GPU, torch elsewhere.

    Returns:
        ``AgreementMasks(advantage_keep, entropy_keep, low, high)``, on std's device, without a host synchronisation.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout, or a fraction lies outside [0, 1).
    """
    check_tensor("std", std, shape=None, needs="any", dtypes=FLOATS)
    check_tensor("mask", mask, shape=std.shape, needs="the shape of std", dtypes=(torch.bool,), device=std.device)
    low_ppm = _ppm("advantage_fraction", advantage_fraction)
    high_ppm = _ppm("entropy_fraction", entropy_fraction)
    if group is not None:
        _check_group(group)
    std = std.detach()
    if choose_backend("agreement_masks", backend, std.device, has_triton=True) == "triton":
        return AgreementMasks(*_by_triton(std, mask, low_ppm, high_ppm, group))
    state = torch.zeros(2, 2, dtype=torch.int64, device=std.device)
    for level in range(len(torch_form.SHIFTS)):
        counts = _count_op(std, mask, state, level)
        if group is not None:
            counts = _all_reduce(counts, group)
        state = _descend_op(counts, state, level, low_ppm, high_ppm)
    return AgreementMasks(*_apply_op(std, mask, state))


def _by_triton(
    std: Tensor, mask: Tensor, low_ppm: int, high_ppm: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if group is None:
        return _triton_op(std, mask, low_ppm, high_ppm)
    state = _all_reduce(_triton_span_op(std, mask), group, "max")
    counts = _all_reduce(_triton_count_all_op(std, mask, state), group)
    for level in range(1, TRITON_LEVELS):
        counts, state = _triton_count_op(std, mask, counts, state, level, low_ppm, high_ppm)
        counts = _all_reduce(counts, group)
    return _triton_apply_op(std, mask, counts, state, low_ppm, high_ppm)


def _ppm(name: str, fraction: float) -> int:
    needs = "a fraction in [0, 1), below 1 when rounded to six decimals"
    check_number(name, fraction, needs, low=0.0, high=1.0, high_open=True)
    ppm = round(fraction * 1e6)
    if ppm == 10**6:
        raise ValueError(f"{name}: got {fraction!r}, needs {needs}")
    return ppm


def _check_group(group: ProcessGroup) -> None:
    from torch.distributed import ProcessGroup  # here, since torch can be built without it

    if not isinstance(group, ProcessGroup):
        raise ValueError(
            f"group: got {type(group).__name__}, needs a torch.distributed.ProcessGroup this rank belongs to, "
            "such as torch.distributed.group.WORLD or device_mesh.get_group()"
        )


def _all_reduce(x: Tensor, group: ProcessGroup, how: str = "sum") -> Tensor:
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(x, how, group))


@define("asyppo::agreement_count")
def _count_op(std: Tensor, mask: Tensor, state: Tensor, level: int) -> Tensor:
    return torch_form.count(std, mask, state, level)


@_count_op.register_fake
def _(std: Tensor, mask: Tensor, state: Tensor, level: int) -> Tensor:
    return state.new_empty(torch_form.rows(level), torch_form.BINS[level])


@define("asyppo::agreement_descend")
def _descend_op(counts: Tensor, state: Tensor, level: int, low_ppm: int, high_ppm: int) -> Tensor:
    return torch_form.descend(counts, state, level, low_ppm, high_ppm)


@_descend_op.register_fake
def _(counts: Tensor, state: Tensor, level: int, low_ppm: int, high_ppm: int) -> Tensor:
    return torch.empty_like(state)


@define("asyppo::agreement_apply")
def _apply_op(std: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch_form.apply(std, mask, state)


def _fake_apply(std: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def threshold() -> Tensor:
        return std.new_empty((), dtype=torch.float32)

    return mask.new_empty(mask.shape), mask.new_empty(mask.shape), threshold(), threshold()


@_apply_op.register_fake
def _(std: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_apply(std, mask)


# Of Triton, whose form is imported where it is asked for, since Triton is not built for every platform.


@define("asyppo::agreement_masks_triton")
def _triton_op(std: Tensor, mask: Tensor, low_ppm: int, high_ppm: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from asyppo_kernels.agreement_masks import triton_form

    return triton_form.forward(std, mask, low_ppm, high_ppm)


@_triton_op.register_fake
def _(std: Tensor, mask: Tensor, low_ppm: int, high_ppm: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_apply(std, mask)


@define("asyppo::agreement_span_triton")
def _triton_span_op(std: Tensor, mask: Tensor) -> Tensor:
    from asyppo_kernels.agreement_masks import triton_form

    return triton_form.span(std, mask)


@_triton_span_op.register_fake
def _(std: Tensor, mask: Tensor) -> Tensor:
    return std.new_empty(2, dtype=torch.int64)


@define("asyppo::agreement_count_all_triton")
def _triton_count_all_op(std: Tensor, mask: Tensor, span: Tensor) -> Tensor:
    from asyppo_kernels.agreement_masks import triton_form

    return triton_form.count_all(std, mask, span)


@_triton_count_all_op.register_fake
def _(std: Tensor, mask: Tensor, span: Tensor) -> Tensor:
    return span.new_empty(TRITON_WIDTHS[0])


@define("asyppo::agreement_count_triton")
def _triton_count_op(
    std: Tensor, mask: Tensor, counts: Tensor, state: Tensor, level: int, low_ppm: int, high_ppm: int
) -> tuple[Tensor, Tensor]:
    from asyppo_kernels.agreement_masks import triton_form

    return triton_form.count(std, mask, counts, state, level, low_ppm, high_ppm)


@_triton_count_op.register_fake
def _(
    std: Tensor, mask: Tensor, counts: Tensor, state: Tensor, level: int, low_ppm: int, high_ppm: int
) -> tuple[Tensor, Tensor]:
    return state.new_empty(TRITON_WIDTHS[level]), state.new_empty(6)


@define("asyppo::agreement_apply_triton")
def _triton_apply_op(
    std: Tensor, mask: Tensor, counts: Tensor, state: Tensor, low_ppm: int, high_ppm: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from asyppo_kernels.agreement_masks import triton_form

    return triton_form.apply(std, mask, counts, state, low_ppm, high_ppm)


@_triton_apply_op.register_fake
def _(
    std: Tensor, mask: Tensor, counts: Tensor, state: Tensor, low_ppm: int, high_ppm: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_apply(std, mask)

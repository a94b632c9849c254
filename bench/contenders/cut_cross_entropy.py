"""cut-cross-entropy: the per-token loss is minus the log-prob."""

from __future__ import annotations

from torch import Tensor

from bench.cases import Case, Head
from bench.contenders.heads import policy_head
from bench.registry import need, need_gpu


def _head(impl: str) -> Head:
    function = need("cut_cross_entropy").linear_cross_entropy

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return -function(hidden, weight, target, reduction="none", impl=impl), None

    return head


@policy_head(
    "cut-cross-entropy", entropy=False, temperature=False, less="no entropy; small gradients are left out (its default)"
)
def cut_cross_entropy(case: Case) -> Head:
    """Its Triton kernels."""
    head = _head("cce")
    need_gpu(case)
    return head


@policy_head("cut-cross-entropy (torch_compile)", entropy=False, temperature=False, less="no entropy")
def torch_compile(case: Case) -> Head:
    """Its form for machines without the kernels."""
    return _head("torch_compile")

"""quack: its cross entropy over whole logits; its fused linear loss gives a mean or a sum only."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case, Head
from bench.contenders.heads import policy_head
from bench.registry import need, need_gpu


@policy_head("quack cross entropy over logits", entropy=False, temperature=False, less="no entropy")
def cross_entropy_over_logits(case: Case) -> Head:
    """Its row kernel, on the logits of a plain product."""
    need_gpu(case)
    function = need("quack.cross_entropy").cross_entropy

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return -function(F.linear(hidden, weight), target, reduction="none", inplace_backward=True), None

    return head

"""Arguments and gradients of custom ops by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asyppo_kernels._registration import Signature


def weighted(x: Tensor, scale: float, y: Tensor | None, offset: int = 0) -> Tensor:
    return x * scale if y is None else x * scale + y + offset


def test_arguments_have_the_names_of_the_signature() -> None:
    signature = Signature(weighted)
    assert signature.names == ("x", "scale", "y", "offset")
    assert signature.index("y") == 2
    assert signature.named((1, 2, 3, 4)) == {"x": 1, "scale": 2, "y": 3, "offset": 4}
    with pytest.raises(ValueError, match="shorter"):
        signature.named((1, 2))


def test_gradients_go_where_their_arguments_are() -> None:
    signature = Signature(weighted)
    x, y = torch.ones(1), torch.ones(2)
    assert signature.gradients({"y": y, "x": x}) == (x, None, y, None)
    assert signature.gradients({}) == (None,) * 4
    with pytest.raises(ValueError, match="by_name: got z, needs names among x, scale, y, offset"):
        signature.gradients({"z": x})

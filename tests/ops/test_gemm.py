"""What the matrix products do with torch's settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from asyppo_kernels._gemm import _partial_sums_in_float32

matmul = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The setting is one of the process, and there without a GPU, too."""
    before = setting()
    yield
    matmul.allow_bf16_reduced_precision_reduction = before


def setting() -> tuple[bool, bool]:
    return matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k


@pytest.mark.parametrize("users", [(True, True), (False, True), (False, False)])  # torch refuses (True, False)
def test_a_users_reductions_come_back_both_halves(users: tuple[bool, bool]) -> None:
    """Sums in bfloat16 are off inside; whether products may be split is the user's, inside and after."""
    matmul.allow_bf16_reduced_precision_reduction = users
    with _partial_sums_in_float32():
        assert setting() == (False, users[1])
    assert setting() == users
    with pytest.raises(KeyError), _partial_sums_in_float32():
        raise KeyError
    assert setting() == users

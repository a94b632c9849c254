"""Batches, micro-batches, and the split of responses among critics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from asyppo.algorithm.split import split_responses
from asyppo.data import batch as batches
from asyppo.data.batch import Batch, make_batch, micro_batch, micro_batches, minibatches, share_micro_batches

PAD, EOS = 0, 1


def two_rows(pad: int = PAD, scores: Sequence[float | Tensor] = (1.0, -2.0)) -> Batch:
    """Prompt 5 6 7 with response 8 EOS, and prompt 9 with response 10 11 12 (cut off)."""
    return make_batch(
        [torch.tensor([5, 6, 7]), torch.tensor([9])],
        [torch.tensor([8, EOS]), torch.tensor([10, 11, 12])],
        [torch.tensor([-0.1, -0.2]), torch.tensor([-0.3, -0.4, -0.5])],
        scores,
        [False, True],
        [0, 1],
        pad_token_id=pad,
        device=torch.device("cpu"),
    )


def test_make_batch() -> None:
    batch = two_rows()
    assert batch.tokens.tolist() == [[5, 6, 7, 8, EOS], [9, 10, 11, 12, PAD]]
    assert batch.prompt_length.tolist() == [3, 1]
    assert batch.response_length.tolist() == [2, 3]
    assert batch.length.tolist() == [5, 4]
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.reward.tolist() == [[0, 1, 0], [0, 0, -2]]  # at the last token of the response
    torch.testing.assert_close(batch.sampler_logprob, torch.tensor([[-0.1, -0.2, 0], [-0.3, -0.4, -0.5]]))
    assert batch.truncated.tolist() == [False, True]
    assert len(batch) == 2


def test_rewards_of_tokens_lie_on_their_own() -> None:
    batch = two_rows(scores=[torch.tensor([0.5, -1.0]), 3.0])
    assert batch.reward.tolist() == [[0.5, -1, 0], [0, 0, 3]]


def test_padding_that_is_the_end_token_leaves_the_real_one_alone() -> None:
    batch, other = two_rows(pad=EOS), two_rows()
    assert torch.equal(batch.mask, other.mask)
    micro, expected = (micro_batch(b, torch.tensor([0, 1])) for b in (batch, other))
    assert micro.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert micro.targets.tolist() == expected.targets.tolist() == [8, EOS, 10, 11, 12]


def test_micro_batch_points_at_what_predicts_each_token() -> None:
    micro = micro_batch(two_rows(), torch.tensor([1, 0]))
    assert micro.input_ids.tolist() == [[9, 10, 11, 12, PAD], [5, 6, 7, 8, EOS]]
    assert [t.tolist() for t in micro.grid] == [[1, 1, 1, 0, 0], [0, 1, 2, 0, 1]]
    assert [t.tolist() for t in micro.predicts] == [[0, 0, 0, 1, 1], [0, 1, 2, 2, 3]]
    assert micro.targets.tolist() == [10, 11, 12, 8, EOS]
    # A model that knows the next token of each position is read where it knows it, not one late.
    foresees = micro.input_ids.roll(-1, dims=1)
    assert foresees[micro.predicts].tolist() == micro.targets.tolist()


def test_micro_batch_is_as_wide_as_its_longest_row() -> None:
    micro = micro_batch(two_rows(), torch.tensor([1]))
    assert micro.input_ids.tolist() == [[9, 10, 11, 12]]
    assert micro.attention_mask.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("max_tokens", [1, 7, 20, 64, 10_000])
@pytest.mark.parametrize("at_least", [1, 2, 4, 5, 7])
def test_micro_batches(ragged_batch: Callable[..., Batch], max_tokens: int, at_least: int) -> None:
    batch = ragged_batch(5, 3)
    rows = torch.tensor([0, 2, 3, 5, 7, 8, 11, 12, 14])
    pieces = list(micro_batches(batch, rows, max_tokens, at_least))
    assert sorted(torch.cat([p.rows for p in pieces]).tolist()) == rows.tolist()
    assert len(pieces) >= at_least
    for piece in pieces:
        assert piece.input_ids.numel() <= max_tokens or len(piece.rows) == 1
        assert piece.input_ids.shape[1] == int(batch.length[piece.rows].max())
    if max_tokens == 10_000:
        assert len(pieces) == at_least  # no smaller than asked for
    covered = torch.zeros_like(batch.mask, dtype=torch.int64)
    for piece in pieces:
        covered.index_put_(piece.grid, torch.tensor(1), accumulate=True)
    expected = torch.zeros_like(covered)
    expected[rows] = batch.mask[rows].long()
    assert torch.equal(covered, expected)


def test_micro_batches_of_fewer_rows_than_asked_for(ragged_batch: Callable[..., Batch]) -> None:
    batch = ragged_batch()
    assert len(list(micro_batches(batch, torch.tensor([3, 4]), 100, at_least=5))) == 2
    assert list(micro_batches(batch, torch.empty(0, dtype=torch.int64), 100)) == []


def test_what_a_cpu_takes_at_once(monkeypatch: pytest.MonkeyPatch, ragged_batch: Callable[..., Batch]) -> None:
    """A model's tokens in each of its threads."""
    monkeypatch.setattr(batches, "CPU_TOKENS", 9)
    monkeypatch.setattr(batches, "_threads", lambda: 2)
    batch, rows = ragged_batch(5, 3), torch.arange(15)
    assert [p.rows.tolist() for p in micro_batches(batch, rows, 10_000)] == [
        p.rows.tolist() for p in micro_batches(batch, rows, 18)
    ]
    shares = [rows[::2], rows[1::2]]
    sizes = [sum(m.input_ids.numel() for m in micros) for micros in share_micro_batches(batch, shares, 10_000)]
    assert 18 < max(sizes) <= 36


def test_a_sequence_above_the_budget_goes_alone(ragged_batch: Callable[..., Batch]) -> None:
    batch = ragged_batch(2, 4)
    longest = int(batch.length.max())
    pieces = list(micro_batches(batch, torch.arange(len(batch)), longest - 1))
    assert any(piece.input_ids.shape[1] == longest for piece in pieces)
    for piece in pieces:
        assert piece.input_ids.shape[1] < longest or len(piece.rows) == 1


def split(group: Tensor, num_critics: int, seed: int = 0) -> Tensor:
    """``split_responses`` with a generator of this seed."""
    return split_responses(group, num_critics, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_generations", "num_critics"), [(4, 2), (6, 3), (8, 2), (5, 2), (7, 3), (6, 4), (3, 1)])
def test_split_is_even_and_disjoint_within_each_prompt(num_generations: int, num_critics: int) -> None:
    group = torch.arange(12).repeat_interleave(num_generations)
    group = group[torch.randperm(len(group))]  # rows of a prompt need not lie together
    share = split(group, num_critics)
    assert share.shape == group.shape  # one critic a response, so disjoint
    for prompt in range(12):
        counts = share[group == prompt].bincount(minlength=num_critics)
        assert int(counts.max() - counts.min()) <= (num_generations % num_critics > 0)
    totals = share.bincount(minlength=num_critics)
    assert int(totals.max() - totals.min()) <= 1  # the remainder rotates


def test_split_is_a_function_of_the_generator_and_differs_between_steps() -> None:
    group = torch.arange(8).repeat_interleave(4)
    assert torch.equal(split(group, 2, seed=3), split(group, 2, seed=3))
    shares = {tuple(split(group, 2, seed=s).tolist()) for s in range(6)}
    assert len(shares) == 6


def test_split_favours_no_response() -> None:
    group = torch.tensor([0, 0, 0])
    counts = sum(split(group, 2, seed=s) for s in range(400))
    # Each response goes to critic 1 half of the time: 200 of 400, with a deviation of 10.
    assert (counts - 200).abs().max() < 50, counts


def test_minibatches_are_shuffled_even_and_complete() -> None:
    rows = torch.tensor([5, 7, 8, 11, 13])
    parts = list(minibatches(rows, 2, 2, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [3, 2, 3, 2]
    passes = [torch.cat(parts[:2]).tolist(), torch.cat(parts[2:]).tolist()]
    assert sorted(passes[0]) == sorted(passes[1]) == rows.tolist()
    assert passes[0] != passes[1]


def test_more_minibatches_than_rows() -> None:
    parts = list(minibatches(torch.tensor([1, 2]), 1, 5, torch.Generator()))
    assert [len(part) for part in parts] == [1, 1]

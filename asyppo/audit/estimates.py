"""What K continuations of each state tell of values, without what they owe to chance.

Of state s the K returns have the mean y and the sample variance s^2; V* is the true value. y is unbiased, and s^2 / K
is an unbiased estimate of its variance around V*. Whatever is quadratic in y is therefore too large by a known amount,
which is taken off here: for an estimate V that does not depend on the returns,

- E[(V - y)^2 - s^2 / K] = (V - V*)^2, the squared error,
- E[Var(y) - mean(s^2 / K)] = Var(V*) and E[Var(y - V) - mean(s^2 / K)] = Var(V* - V) over states drawn independently.

So estimates of squares can come out below 0; the root of such a one is given as 0. The variance of a squared error over
states is the covariance of two estimates of it, from either half of the returns. Ratios and roots of unbiased estimates
are consistent, not unbiased. Intervals are those of the bootstrap over prompts (``intervals``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = dict[str, float]


@dataclass(frozen=True)
class States:
    """S audited states, each that in which a token was drawn. What is of a token is of that one."""

    prompt: NDArray[np.int64]
    """[S]: number of the prompt."""
    position: NDArray[np.int64]
    """[S]: tokens written before."""
    length: NDArray[np.int64]
    """[S]: tokens of the response in the end."""
    value: Array
    """[S]: V̄."""
    values: Array
    """[S, M]: each critic's; M = 0 without critics."""
    std: Array
    """[S]: σ."""
    returns: Array
    """[S, K]: what continuations from here came to."""
    next_returns: Array
    """[S, K]: the reward of the token, and the discounted return of continuations from behind it; where it is the last
    one, that reward alone."""
    advantage: Array
    """[S]: what the algorithm makes of the token, before whitening."""
    logprob: Array
    """[S]: of the token under the policy."""
    advantage_keep: Flags
    """[S]: I^A."""
    entropy_keep: Flags
    """[S]: I^H."""

    def __len__(self) -> int:
        return len(self.prompt)

    def at(self, rows: Any) -> States:
        """Return the states with these numbers, or where these flags are set."""
        chosen = replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})
        # Bootstraps ask for these some hundred times.
        chosen.__dict__.update({name: getattr(self, name)[rows] for name in ("truth", "noise")})
        chosen.__dict__["halves"] = tuple((y[rows], noise[rows]) for y, noise in self.halves)
        chosen.__dict__["true_advantage"] = tuple(part[rows] for part in self.true_advantage)
        return chosen

    @cached_property
    def truth(self) -> Array:
        """[S]: y, the estimate of V*."""
        return self.returns.mean(axis=1)

    @cached_property
    def noise(self) -> Array:
        """[S]: s^2 / K."""
        return noise_of(self.returns)

    @cached_property
    def halves(self) -> tuple[tuple[Array, Array], ...]:
        """Of every second return, and of the others: y and s^2 / K, [S]."""
        return tuple((half.mean(axis=1), noise_of(half)) for half in (self.returns[:, ::2], self.returns[:, 1::2]))

    def squared_error(self, value: Array) -> Array:
        """[S]: unbiased estimates of (V - V*)^2."""
        return (value - self.truth) ** 2 - self.noise

    @cached_property
    def true_advantage(self) -> tuple[Array, Array]:
        """[S]: unbiased estimates of A* = r + γ V*(s') - V*(s), and of their variances."""
        noise = self.noise + noise_of(self.next_returns)
        return self.next_returns.mean(axis=1) - self.truth, noise


def noise_of(returns: Array) -> Array:
    """Return s^2 / K, [S], of ``returns`` [S, K]."""
    return returns.var(axis=1, ddof=1) / returns.shape[1]


def root(square: float) -> float:
    """Return the root of the estimate of a square: 0 where that is below 0, NaN where there is none."""
    return math.sqrt(max(square, 0.0)) if not math.isnan(square) else math.nan


def ratio(part: float, whole: float) -> float:
    """Return ``part / whole``; NaN where the whole is not above 0."""
    return part / whole if whole > 0 else math.nan


def accuracy_of(states: States, value: Array) -> Numbers:
    """Bias, RMSE, share of the truth's variance explained (1 - Var(V* - V) / Var(V*)), over all states and within
    prompts, and Pearson's correlation with V*, all of them of ``value`` [S] and without the noise of the
    continuations."""
    truth, noise = states.truth, float(states.noise.mean()) if len(states) else math.nan
    variance = _variance(truth) - noise
    left = _variance(truth - value) - noise
    covariance = float(np.mean((truth - truth.mean()) * (value - value.mean()))) if len(states) else math.nan
    size = len(states) / max(len(states) - 1, 1)
    return {
        "bias": float((value - truth).mean()) if len(states) else math.nan,
        "rmse": root(float(states.squared_error(value).mean()) if len(states) else math.nan),
        "explained": 1 - ratio(left, variance),
        "explained_within_prompts": 1 - ratio(_within(states, truth - value), _within(states, truth)),
        "correlation": ratio(covariance * size, root(variance) * root(_variance(value))),
    }


def _variance(x: Array) -> float:
    return float(x.var(ddof=1)) if len(x) > 1 else math.nan


def _within(states: States, x: Array) -> float:
    """Variance within prompts of ``x`` [S], in which the truth is, without its noise: the pooled unbiased one."""
    groups, counts = np.unique(states.prompt, return_inverse=True)[1], np.unique(states.prompt, return_counts=True)[1]
    means = np.bincount(groups, x) / counts
    free = len(x) - len(counts)
    if free <= 0:
        return math.nan
    spread = ((x - means[groups]) ** 2).sum()
    # A state's noise adds s^2 / K to its own deviation's square, less its part in its prompt's mean.
    return float((spread - (states.noise * (1 - 1 / counts[groups])).sum()) / free)


def rank_within_prompts(states: States, value: Array) -> Numbers:
    """Spearman's correlation of ``value`` [S] with the truth among the states of a prompt, the mean over prompts.

    ``rank``: with y as it is. ``rank_corrected``: over the root of y's reliability, that of the whole from the
    correlation r of its halves (2 r / (1 + r), Spearman and Brown 1910), the classical correction for attenuation; NaN
    where the halves do not agree. Prompts with fewer than three states, or where either does not vary, are left out.
    """
    return _of_ranks(ranks_by_prompt(states, value))


def ranks_by_prompt(states: States, value: Array) -> Array:
    """Return [P, 2]: Spearman's correlation of ``value`` [S] with y among the states of each prompt, and that of the
    two halves of y; NaN where there are fewer than three states, or one of them does not vary."""
    (first, _), (second, _) = states.halves
    found = [
        (spearman(value[rows], states.truth[rows]), spearman(first[rows], second[rows]))
        if len(rows) >= 3
        else (math.nan, math.nan)
        for rows in (np.flatnonzero(states.prompt == prompt) for prompt in np.unique(states.prompt))
    ]
    return np.array(found).reshape(-1, 2)


def _of_ranks(by_prompt: Array) -> Numbers:
    ranks, halves = map(_mean_of, by_prompt.T)
    reliability = 2 * halves / (1 + halves) if halves > 0 else math.nan
    return {"rank": ranks, "rank_corrected": ranks / math.sqrt(reliability) if reliability > 0 else math.nan}


def _mean_of(x: Array) -> float:
    there = x[np.isfinite(x)]
    return float(there.mean()) if len(there) else math.nan


def rankdata(x: Array) -> Array:
    """The ranks of ``x`` from 1 on; equal numbers share the mean of theirs."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(x: Array, y: Array) -> float:
    """Return Spearman's rank correlation; NaN where one does not vary."""
    if len(x) < 2:
        return math.nan
    x, y = rankdata(x), rankdata(y)
    spread = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else math.nan


def sigma_and_error(states: States) -> Numbers:
    """Does σ mark the error?

    ``rank``: Spearman's correlation of σ and |V̄ - y|, in which the noise of y drowns some of the error, and stands for
    error where returns vary. ``corrected``: Pearson's correlation of σ's rank with the squared error, whose estimate is
    unbiased; its variance over states is the covariance of those of the two halves of the returns.
    """
    error = states.squared_error(states.value)
    halves = [(states.value - y) ** 2 - noise for y, noise in states.halves]
    rank = rankdata(states.std) if len(states) else states.std
    if len(states) < 3:
        return {"rank": math.nan, "corrected": math.nan}
    variance = float(np.cov(halves[0], halves[1])[0, 1])
    spread = root(variance) * float(rank.std(ddof=1))
    return {
        "rank": spearman(states.std, np.abs(states.value - states.truth)),
        "corrected": ratio(float(np.cov(rank, error)[0, 1]), spread),
    }


def dropped_by(states: States, keep: Flags) -> Numbers:
    """Of what lies on tokens that a mask drops, the shares: of the tokens; of V̄'s squared error; of the squared true
    advantage A*^2; and of (A* (1 - π))^2, which goes as the square of what the token adds to the gradient of the
    logits."""
    advantage, noise = states.true_advantage
    square = advantage**2 - noise
    chance = np.exp(np.minimum(states.logprob, 0.0))
    out = ~keep
    return {
        "tokens": float(out.mean()) if len(states) else math.nan,
        "squared_error": _share(states.squared_error(states.value), out),
        "squared_advantage": _share(square, out),
        "squared_gradient": _share(square * (1 - chance) ** 2, out),
    }


def _share(amount: Array, chosen: Flags) -> float:
    return ratio(float(amount[chosen].sum()), float(amount.sum()))


def advantage_and_truth(states: States) -> Numbers:
    """How the algorithm's advantage goes along with the true one, A*: Pearson's correlation, as it is estimated
    (``raw``), and without the noise of A*'s estimate (``corrected``); and the root mean square of A*."""
    advantage, noise = states.true_advantage
    if len(states) < 3:
        return {"raw": math.nan, "corrected": math.nan, "rms": math.nan}
    covariance = float(np.cov(states.advantage, advantage)[0, 1])
    own = root(_variance(states.advantage))
    return {
        "raw": ratio(covariance, own * root(_variance(advantage))),
        "corrected": ratio(covariance, own * root(_variance(advantage) - float(noise.mean()))),
        "rms": root(float((advantage**2 - noise).mean())),
    }


def of_all(states: States) -> Numbers:
    """Return every number of ``states`` under one name each, such as ``value/bias`` and ``critic_0/bias``."""
    noise = states.noise
    found: dict[str, Numbers] = {
        "truth": {
            "mean": float(states.truth.mean()),
            "std": root(_variance(states.truth) - float(noise.mean())),
            "standard_error": root(float(noise.mean())),
        },
        "value": accuracy_of(states, states.value),
        "advantage": advantage_and_truth(states),
    }
    for m in range(states.values.shape[1]):
        found[f"critic_{m}"] = accuracy_of(states, states.values[:, m])
    if states.values.shape[1] > 1:
        found["sigma"] = {"mean": float(states.std.mean())} | sigma_and_error(states)
        found["advantage_mask"] = dropped_by(states, states.advantage_keep)
        found["entropy_filter"] = dropped_by(states, states.entropy_keep)
    return {f"{group}/{name}": number for group, numbers in found.items() for name, number in numbers.items()}


def in_bin(states: States) -> Numbers:
    """Return what a row of a calibration table says of the states in it."""
    return {
        "value": float(states.value.mean()),
        "truth": float(states.truth.mean()),
        "bias": float((states.value - states.truth).mean()),
        "rmse": root(float(states.squared_error(states.value).mean())),
        "sigma": float(states.std.mean()),
        "advantage_dropped": float((~states.advantage_keep).mean()),
    }


def by_fraction(states: States) -> tuple[list[str], NDArray[np.int64]]:
    """Return names of fifths of a response, and the one of each state."""
    which = (5 * states.position // states.length).astype(np.int64)
    return [f"{20 * i}–{20 * i + 20} %" for i in range(5)], which


def by_token(states: States) -> tuple[list[str], NDArray[np.int64]]:
    """Return names of ranges of token numbers, 1, 2, 3–4, 5–8, …, and the one of each state."""
    which = np.ceil(np.log2(states.position + 1)).astype(np.int64)
    edges = [(2 ** (i - 1) + 1 if i else 1, 2**i) for i in range(int(which.max(initial=0)) + 1)]
    return [str(high) if low >= high else f"{low}–{high}" for low, high in edges], which


def by_fifth(of: Array) -> tuple[list[str], NDArray[np.int64]]:
    """Return names of fifths of the states by ``of`` [S], which are ranges of it, and the one of each state; equal ones
    share a fifth."""
    edges = np.unique(np.quantile(of, [0.2, 0.4, 0.6, 0.8]))
    which = np.searchsorted(edges, of, side="left")
    there = np.unique(which)
    return [f"{of[which == i].min():.3g}–{of[which == i].max():.3g}" for i in there], np.searchsorted(there, which)


def intervals(
    states: States, measure: Callable[[States], Numbers], *, resamples: int = 400, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return each number of ``measure`` with its 95 % interval: ``value``, ``low``, ``high``.

    The percentile bootstrap over prompts: states of one prompt are alike, so prompts are what is drawn again. One that
    is drawn twice counts as two. Where there is but one prompt the interval is NaN.
    """
    prompts = np.unique(states.prompt)
    rows = [np.flatnonzero(states.prompt == prompt) for prompt in prompts]
    drawn = []
    for chosen in _resampled(len(prompts), resamples, seed):
        again = states.at(np.concatenate([rows[i] for i in chosen]))
        again.prompt[:] = np.repeat(np.arange(len(chosen)), [len(rows[i]) for i in chosen])
        drawn.append(measure(again))
    return _with_intervals(measure(states), drawn)


def rank_intervals(states: States, *, resamples: int = 400, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return the numbers of ``rank_within_prompts`` for V̄ with their intervals, as ``intervals`` would."""
    ranks = ranks_by_prompt(states, states.value)
    drawn = [_of_ranks(ranks[chosen]) for chosen in _resampled(len(ranks), resamples, seed)]
    return _with_intervals(_of_ranks(ranks), drawn)


def _resampled(prompts: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Numbers of prompts, drawn with putting back, [resamples, prompts]; none of a single prompt."""
    drawn = resamples if prompts > 1 else 0
    return np.random.default_rng(seed).integers(prompts, size=(drawn, prompts))


def _with_intervals(found: Numbers, drawn: Sequence[Numbers]) -> dict[str, dict[str, float]]:
    return {name: {"value": value, **_interval([d[name] for d in drawn])} for name, value in found.items()}


def _interval(drawn: Sequence[float]) -> dict[str, float]:
    there = [x for x in drawn if math.isfinite(x)]
    low, high = np.quantile(there, [0.025, 0.975]).tolist() if there else (math.nan, math.nan)
    return {"low": low, "high": high}

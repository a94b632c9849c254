"""What the report asks of runs, and the charts that answer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from asyppo.report.audits import gradient_tables, value_charts, value_tables
from asyppo.report.figures import (
    Chart,
    Table,
    bands,
    by_number,
    by_tenth,
    calibration,
    common_tokens,
    curves,
    disagreement_tenths,
    dropped,
    masked_tokens,
    phases,
    response_tenths,
    rewards,
)
from asyppo.report.runs import Run, Sample

THIRDS = ("first third", "middle third", "last third")


@dataclass
class Section:
    """A question and the charts that answer it."""

    name: str
    title: str
    lead: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[tuple[str, str, Table]] = field(default_factory=list)
    """Title, what to read in it, table."""
    missing: list[str] = field(default_factory=list)
    """What cannot be shown, and why."""

    def add(self, otherwise: str, *charts: Chart | None) -> None:
        """Add the charts there are; without one, say why."""
        there = [chart for chart in charts if chart is not None]
        self.charts += there
        if not there:
            self.missing.append(otherwise)


def sections_of(runs: Sequence[Run], names: Sequence[str]) -> list[Section]:
    """Return the report's sections but for the token view; ``names`` are those of the runs in legends."""
    audited = [audits(runs, names)] if any(run.audits for run in runs) else []
    return [learning(runs, names), critics(runs, names), masks(runs, names), *audited, time(runs, names)]


def learning(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Accuracy, reward, entropy, length, KL: is the policy learning?"""
    section = Section(
        "learning",
        "Is the policy learning?",
        "Held-out accuracy and the reward of the sampled batch; how rewards, entropies and lengths are distributed.",
    )
    section.add(
        "Neither reward nor held-out accuracy was recorded.",
        *charts_of(
            "Reward and held-out accuracy",
            runs,
            names,
            {"critic/score/mean": "reward", "eval/accuracy": "held-out accuracy"},
            says="Reward: mean over the sampled batch. Accuracy: on prompts never trained on, with its 95 % interval.",
            prefix="",
        ),
    )
    section.add("No rewards of sampled responses: their distribution is not shown.", rewards(runs, names))
    section.add(
        "No entropy per token: its distribution is not shown.",
        bands("Entropy of tokens", "nats", runs, names, _column("entropy")),
    )
    section.add(
        "No responses with tokens: the distribution of lengths is not shown.",
        bands("Response length", "tokens", runs, names, lambda s: None if s.length is None else np.array([s.length])),
    )
    section.add(
        "No KL was recorded.",
        *charts_of(
            "KL to the policy that sampled", runs, names, {"actor/ppo_kl": "KL"}, says="Mean of log π_old − log π."
        ),
    )
    section.add(
        "No clipped share was recorded.",
        *charts_of(
            "Clipped share",
            runs,
            names,
            {"actor/pg_clipfrac": "clipped"},
            says="Tokens whose gradient the clip has taken, the dual clip aside.",
            zero=True,
        ),
    )
    return section


def critics(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Losses, explained variance and calibration: can the values be trusted?"""
    section = Section(
        "critics",
        "Are the critics calibrated?",
        f"V̄, the mean over critics, against what the response came to. {_seen(runs)}",
    )
    if not any(run.has_critics for run in runs):
        section.missing.append("No critics: an advantage is the reward normalised within a prompt's group.")
        return section
    section.missing += [f"No critics in {n}." for run, n in zip(runs, names, strict=True) if not run.has_critics]
    kept = [run if run.has_critics else _blank(run) for run in runs]
    losses = {key: f"critic {m[1]}" for key in _metrics(kept) if (m := re.fullmatch(r"critic/(\d+)/vf_loss", key))}
    section.add(
        "No losses of critics were recorded.",
        *charts_of(
            "Loss of each critic", kept, names, losses, says="Squared error on the responses it learns from.", zero=True
        ),
    )
    section.add(
        "No explained variance was recorded.",
        *charts_of(
            "Explained variance",
            kept,
            names,
            {"critic/vf_explained_var": "explained variance"},
            says="Of the returns, by V̄. 1: exact. 0: no better than a constant.",
        ),
    )
    otherwise = "No values per token: calibration is not shown."
    if len(runs) > 1:
        by_run = {name: _predictions(run, _third(run, 2)) for run, name in zip(kept, names, strict=True)}
        section.add(otherwise, calibration("Calibration", by_run, "Last third of training, all positions."))
        return section
    [run] = kept
    by_place = {f"{t} of the response": _predictions(run, _third(run, 2), place=i) for i, t in enumerate(THIRDS)}
    by_time = {f"{t} of training": _predictions(run, _third(run, i)) for i, t in enumerate(THIRDS)}
    section.add(
        otherwise,
        calibration("Calibration by position", by_place, "Last third of training."),
        calibration("Calibration over training", by_time, "All positions."),
    )
    return section


def masks(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Disagreement, and what it masks."""
    section = Section(
        "masks",
        "Where do they disagree, and what is masked?",
        "σ is the standard deviation over critics. The tokens of lowest σ lose their advantage (nothing to learn where "
        "critics agree), those of highest σ their entropy bonus (exploration there is noise).",
    )
    if any(run.config.get("advantage_mask") == "random" for run in runs):
        section.lead += " With advantage_mask random, any tokens lose their advantage, whatever their σ."
    if not any(map(_disagree, runs)):
        section.missing.append("Fewer than two critics: there is no disagreement, and nothing is masked.")
        return section
    section.missing += [
        f"Fewer than two critics in {n}." for run, n in zip(runs, names, strict=True) if not _disagree(run)
    ]
    kept = [run if _disagree(run) else _blank(run) for run in runs]
    section.add(
        "No σ was recorded.",
        *charts_of(
            "Disagreement σ",
            kept,
            names,
            {f"critic/std/{which}": which for which in ("high", "mean", "low")},
            says="Below low: advantage masked. Above high: entropy filtered.",
            zero=True,
        ),
    )
    section.add(
        "No shares of tokens were recorded.",
        *charts_of(
            "Share of tokens",
            kept,
            names,
            {"actor/adv_mask_frac": "advantage masked", "actor/entropy_keep_frac": "entropy kept"},
            says="Ties in σ are kept.",
            zero=True,
        ),
    )
    section.add(
        "Nothing was recorded of σ and masks by the token's number.",
        by_number("σ by the token's number", "mean σ", kept, names, {"critic/std": "σ"}),
    )
    taken = {"actor/adv_mask_frac": "advantage masked", "actor/entropy_filter_frac": "entropy filtered"}
    together = [taken] if len(runs) == 1 else [{key: name} for key, name in taken.items()]
    section.charts += [
        chart
        for part in together
        if (
            chart := by_number(
                f"{'Masked' if len(part) > 1 else next(iter(part.values())).capitalize()} by the token's number",
                "share of tokens",
                kept,
                names,
                part,
            )
        )
    ]
    late = {name: _third(run, 2) for run, name in zip(kept, names, strict=True)}
    said = "Last third of training."
    section.add(
        "No σ per token: where critics disagree is not shown.",
        by_tenth("σ along the response", "mean σ", late, {"σ": _column("std")}, response_tenths, said),
    )
    shares: dict[str, Callable[[Sample], np.ndarray | None]] = {
        "advantage masked": lambda s: dropped(s, "advantage_keep"),
        "entropy filtered": lambda s: dropped(s, "entropy_keep"),
    }
    one_by_one = [shares] if len(runs) == 1 else [{name: share} for name, share in shares.items()]
    section.add(
        "No masks per token: where tokens are masked is not shown.",
        *(
            by_tenth(
                f"{'Masked' if len(part) > 1 else next(iter(part)).capitalize()} along the response",
                "share of tokens",
                late,
                part,
                response_tenths,
                said,
            )
            for part in one_by_one
        ),
    )
    section.add(
        "No advantages by σ: what masking takes away is not shown.",
        by_tenth(
            "Advantage by disagreement",
            "mean |advantage|, whitened",
            late,
            {"advantage": lambda s: None if "advantage" not in s.columns else np.abs(s.columns["advantage"])},
            disagreement_tenths,
            f"{said} What the mask takes is on the left.",
        ),
    )
    section.add(
        "No entropies by σ: what filtering takes away is not shown.",
        by_tenth(
            "Entropy by disagreement",
            "mean entropy (nats)",
            late,
            {"entropy": _column("entropy")},
            disagreement_tenths,
            f"{said} What the filter takes is on the right.",
        ),
    )
    for name, samples in late.items():
        table = common_tokens(samples)
        if table is not None:
            title = "Tokens on which critics agree least and most"
            says = "By mean σ, of tokens that occur at least 10 times in the last third of training."
            section.tables.append((title if len(runs) == 1 else f"{title}: {name}", says, table))
        table = masked_tokens(samples)
        if table is not None:
            title = "What the masks take, by token"
            says = "The tokens that make up most of what either mask takes, last third of training."
            section.tables.append((title if len(runs) == 1 else f"{title}: {name}", says, table))
    return section


def audits(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """What audits found: values against the truth, gradients against a reference."""
    section = Section(
        "audits",
        "What did audits find?",
        "V* is what the policy really gets from a state, by continuations; A* is what a token adds to it. Numbers "
        "are without the noise of the continuations, with 95 % intervals over prompts.",
    )
    for run, name in zip(runs, names, strict=True):
        of_run = "" if len(runs) == 1 else f"{name}, "
        values = [audit for audit in run.audits if audit.get("kind") == "audit"]
        if len(runs) == 1 and values:
            section.charts += value_charts(values[-1]["results"])
        for audit in run.audits:
            make = value_tables if audit.get("kind") == "audit" else gradient_tables
            title = f"{'Values' if make is value_tables else 'Gradients'}, {of_run}step {audit['step']}"
            section.tables += [(f"{title}: {what}", "", table) for what, table in make(audit["results"])]
    return section


def time(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Where the time goes."""
    section = Section("time", "Where does the time go?", "Wall time of a step by phase, throughput, and memory.")
    section.add("No times were recorded.", phases(runs, names))
    section.add(
        "No throughput was recorded.",
        *charts_of(
            "Throughput",
            runs,
            names,
            {"perf/throughput": "throughput"},
            unit="tokens a second",
            says="Prompt and response tokens.",
            zero=True,
        ),
    )
    memory = {key: key.split("/")[-1] for key in _metrics(runs) if re.search(r"memory.*_gb$", key)}
    section.add(
        "No memory was recorded: it is measured on a GPU.",
        *charts_of("Memory", runs, names, memory, unit="GiB", zero=True),
    )
    return section


def charts_of(
    title: str,
    runs: Sequence[Run],
    names: Sequence[str],
    metrics: dict[str, str],
    prefix: str | None = None,
    **options: Any,
) -> list[Chart | None]:
    """Return one chart of the metrics, or for several runs one a metric, so that a legend names runs only.

    The title of one of them is ``prefix``, by default the title and a colon, and the metric's name.
    """
    prefix = f"{title}: " if prefix is None else prefix
    if len(runs) == 1 or len(metrics) == 1:
        return [curves(title, runs, names, metrics, **options)]
    titles = [prefix + name for name in metrics.values()]
    return [
        curves(own[:1].upper() + own[1:], runs, names, {metric: name}, **options)
        for own, (metric, name) in zip(titles, metrics.items(), strict=True)
    ]


def everything_of(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, list[Chart]]]:
    """Return curves of every metric, by the first part of its name; relatives (mean, min; critics) share a chart."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in _metrics(runs):
        if key != "step":
            relatives = r"(.)/(mean|min|max|low|high|ci_low|ci_high|tokens_\d+(?:_\d+)?)$"
            family = re.sub(r"/\d+/", "/{m}/", re.sub(relatives, r"\1", key))
            groups[key.split("/")[0]][family].append(key)
    out = []
    for group, families in sorted(groups.items()):
        charts = [
            curves(family, runs, names, {key: _last_part(key) for key in members})
            for family, members in sorted(families.items())
        ]
        out.append((group, [chart for chart in charts if chart is not None]))
    return [(group, charts) for group, charts in out if charts]


def _metrics(runs: Sequence[Run]) -> list[str]:
    """Names of all metrics, in the order they were written."""
    return list(dict.fromkeys(key for run in runs for row in run.metrics for key in row))


def _last_part(metric: str) -> str:
    """What tells a metric apart from its relatives: the number in the middle of its name, or the end."""
    numbered = re.search(r"/(\d+)/", metric)
    return numbered[1] if numbered else metric.rsplit("/", 1)[-1]


def _column(name: str) -> Callable[[Sample], np.ndarray | None]:
    return lambda sample: sample.columns.get(name)


SEEN = {
    "after": "Critics are fitted to a step's own responses before they score them, each to those it learns from.",
    "before": "Critics score a step's responses before they are fitted to them.",
    "cross_fit": "A response's V̄ leaves out the critic that was fitted to it.",
    "monte_carlo": "V̄ is what continuations of the response came to, of the last state that was continued.",
}
"""Whether V̄ is a prediction, by the setting ``advantage_values``."""


def _seen(runs: Sequence[Run]) -> str:
    ways = {str(run.config.get("advantage_values", "after")) for run in runs if run.has_critics}
    return (
        SEEN.get(ways.pop(), "")
        if len(ways) == 1
        else "Whether critics had seen a response depends on advantage_values."
    )


def _blank(run: Run) -> Run:
    """The run without what it wrote: nothing of it is drawn, and the other runs keep their colours."""
    return replace(run, metrics=[], samples=[])


def _third(run: Run, which: int) -> list[Sample]:
    """Responses of the first (0), middle (1) or last (2) third of the steps sampled."""
    steps = np.array_split(sorted({s.step for s in run.trained}), 3)[which]
    return [s for s in run.trained if s.step in set(steps.tolist())]


def _predictions(run: Run, samples: Iterable[Sample], place: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """V̄ and outcome of tokens; of a third of the response, if one is named.

    The outcome is the Monte Carlo return that the critics learned, with all that the run counted into it. Where the run
    has none, since its returns bootstrap, it is the reward discounted to the token.
    """
    gamma, critic = run.config.get("gamma", 1.0), run.config.get("critic")
    gamma = float(gamma) if isinstance(gamma, (int, float)) else 1.0
    bootstrapped = isinstance(critic, dict) and critic.get("value_lambda", 1.0) != 1.0
    predicted, outcome = [np.zeros(0)], [np.zeros(0)]
    for sample in samples:
        value = sample.columns.get("value")
        if value is None or not sample.critics:
            continue
        position = np.arange(len(value))
        came_to = sample.columns.get("returns")
        if came_to is None or bootstrapped:
            came_to = sample.reward * gamma ** (len(value) - 1.0 - position)
        chosen = np.isfinite(value) & np.isfinite(came_to)
        if place is not None:
            chosen &= 3 * position // len(value) == place
        predicted.append(value[chosen])
        outcome.append(came_to[chosen])
    return np.concatenate(predicted), np.concatenate(outcome)


def _disagree(run: Run) -> bool:
    """Whether at least two critics judged."""
    return any(s.critics > 1 for s in run.samples) or any(row.get("critic/std/mean") for row in run.metrics)

"""What the report asks of runs, and the charts that answer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from asyppo.report.figures import (
    Chart,
    Table,
    bands,
    by_tenth,
    calibration,
    common_tokens,
    curves,
    dropped,
    of_disagreement,
    of_response,
    phases,
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

    def add(self, chart: Chart | None, otherwise: str) -> None:
        """Add the chart, or say why there is none."""
        if chart is None:
            self.missing.append(otherwise)
        else:
            self.charts.append(chart)


def sections_of(runs: Sequence[Run], names: Sequence[str]) -> list[Section]:
    """Return the report's sections but for the token view; ``names`` are those of the runs in legends."""
    return [learning(runs, names), critics(runs, names), masks(runs, names), time(runs, names)]


def learning(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Accuracy, reward, entropy, length, KL: is the policy learning?"""
    section = Section(
        "learning",
        "Is the policy learning?",
        "Held-out accuracy and the reward of the sampled batch; how rewards, entropies and lengths are distributed.",
    )
    section.add(
        curves(
            "Reward and held-out accuracy",
            runs,
            names,
            {"critic/score/mean": "reward", "eval/accuracy": "held-out accuracy"},
            says="Mean over the sampled batch; prompts that are never trained on.",
        ),
        "Neither reward nor held-out accuracy was recorded.",
    )
    section.add(rewards(runs, names), "No rewards of sampled responses: their distribution is not shown.")
    section.add(
        bands("Entropy of tokens", "nats", runs, names, lambda s: s.columns.get("entropy")),
        "No entropy per token: its distribution is not shown.",
    )
    section.add(
        bands("Response length", "tokens", runs, names, lambda s: np.array([len(s.tokens or ())])),
        "No responses with tokens: the distribution of lengths is not shown.",
    )
    section.add(
        curves("KL to the policy that sampled", runs, names, {"actor/ppo_kl": "KL"}, says="Mean of log π_old − log π."),
        "No KL was recorded.",
    )
    section.add(
        curves(
            "Clipped share",
            runs,
            names,
            {"actor/pg_clipfrac": "clipped"},
            says="Tokens whose ratio gives no gradient.",
            zero=True,
        ),
        "No clipped share was recorded.",
    )
    return section


def critics(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Losses, explained variance and calibration: can the values be trusted?"""
    section = Section(
        "critics",
        "Are the critics calibrated?",
        "V̄, the mean over critics, against what the response came to. Critics are fitted to a step's own responses "
        "before they score them, each to its share.",
    )
    judged = [(run, name) for run, name in zip(runs, names, strict=True) if run.has_critics]
    if not judged:
        section.missing.append("No critics in this run: an advantage is the reward normalised within a prompt's group.")
        return section
    kept, kept_names = [run for run, _ in judged], [name for _, name in judged]
    losses = {key: f"critic {m[1]}" for key in _metrics(kept) if (m := re.fullmatch(r"critic/(\d+)/vf_loss", key))}
    section.add(
        curves("Loss of each critic", kept, kept_names, losses, says="Squared error on its own share.", zero=True),
        "No losses of critics were recorded.",
    )
    section.add(
        curves(
            "Explained variance",
            kept,
            kept_names,
            {"critic/vf_explained_var": "explained variance"},
            says="Of the returns, by V̄. 1: exact. 0: no better than a constant.",
        ),
        "No explained variance was recorded.",
    )
    late = {name: _third(run, 2) for run, name in judged}
    if len(judged) == 1:
        run = kept[0]
        by_time = {third: _predictions(run, _third(run, i)) for i, third in enumerate(THIRDS)}
        by_place = {
            f"{third} of the response": _predictions(run, _third(run, 2), place=i) for i, third in enumerate(THIRDS)
        }
        section.add(
            calibration("Calibration by position", by_place, "Last third of training."),
            "No values per token: calibration by position is not shown.",
        )
        section.add(
            calibration("Calibration over training", by_time, "All positions."),
            "No values per token: calibration over training is not shown.",
        )
    else:
        by_run = {name: _predictions(run, late[name]) for run, name in judged}
        section.add(
            calibration("Calibration", by_run, "Last third of training, all positions."),
            "No values per token: calibration is not shown.",
        )
    return section


def masks(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Disagreement, and what it masks."""
    section = Section(
        "masks",
        "Where do they disagree, and what is masked?",
        "σ is the standard deviation over critics. The lowest σ of a batch lose their advantage (nothing to learn "
        "where critics agree), the highest their entropy bonus (exploration there is noise).",
    )
    several = [(run, name) for run, name in zip(runs, names, strict=True) if _disagree(run)]
    if not several:
        section.missing.append("Fewer than two critics: there is no disagreement, and nothing is masked.")
        return section
    kept, kept_names = [run for run, _ in several], [name for _, name in several]
    section.add(
        curves(
            "Disagreement σ",
            kept,
            kept_names,
            {f"critic/std/{which}": which for which in ("high", "mean", "low")},
            says="Below low: advantage masked. Above high: entropy filtered.",
            zero=True,
        ),
        "No σ was recorded.",
    )
    section.add(
        curves(
            "Share of tokens masked",
            kept,
            kept_names,
            {"actor/adv_mask_frac": "advantage masked", "actor/entropy_keep_frac": "entropy kept"},
            says="Ties in σ are kept.",
            zero=True,
        ),
        "No shares of tokens were recorded.",
    )
    late = {name: _third(run, 2) for run, name in several}
    shares: dict[str, Callable[[Sample], np.ndarray | None]] = {
        "advantage masked": lambda s: dropped(s, "advantage_keep"),
        "entropy filtered": lambda s: dropped(s, "entropy_keep"),
    }
    said = "Last third of training."
    section.add(
        by_tenth("σ along the response", "mean σ", late, {"σ": _column("std")}, of_response, said),
        "No σ per token: where critics disagree is not shown.",
    )
    section.add(
        by_tenth("Masked along the response", "share of tokens", late, shares, of_response, said),
        "No masks per token: where tokens are masked is not shown.",
    )
    section.add(
        by_tenth(
            "Advantage by disagreement",
            "mean |advantage|, whitened",
            late,
            {"advantage": lambda s: None if "advantage" not in s.columns else np.abs(s.columns["advantage"])},
            of_disagreement,
            f"{said} What the mask takes is on the left.",
        ),
        "No advantages by σ: what masking takes away is not shown.",
    )
    section.add(
        by_tenth(
            "Entropy by disagreement",
            "mean entropy (nats)",
            late,
            {"entropy": _column("entropy")},
            of_disagreement,
            f"{said} What the filter takes is on the right.",
        ),
        "No entropies by σ: what filtering takes away is not shown.",
    )
    for run, name in several:
        table = common_tokens(_third(run, 2))
        if table is not None:
            title = "Tokens on which critics agree least and most"
            section.tables.append(
                (
                    title if len(several) == 1 else f"{title}: {name}",
                    "By mean σ, of tokens that occur at least 10 times in the last third of training.",
                    table,
                )
            )
    return section


def time(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Where the time goes."""
    section = Section("time", "Where does the time go?", "Wall time of a step by phase, throughput, and memory.")
    section.add(phases(runs, names), "No times were recorded.")
    section.add(
        curves(
            "Throughput",
            runs,
            names,
            {"perf/throughput": "throughput"},
            unit="tokens a second",
            says="Prompt and response tokens.",
            zero=True,
        ),
        "No throughput was recorded.",
    )
    memory = {key: key.split("/")[-1] for key in _metrics(runs) if re.search(r"memory.*_gb$", key)}
    section.add(
        curves("Memory", runs, names, memory, unit="GiB", zero=True),
        "No memory was recorded: it is measured on a GPU.",
    )
    return section


def everything_of(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, list[Chart]]]:
    """Return curves of every metric, by the first part of its name; relatives (mean, min; critics) share a chart."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in _metrics(runs):
        if key != "step":
            family = re.sub(r"/\d+/", "/{m}/", re.sub(r"(.)/(mean|min|max|low|high)$", r"\1", key))
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


def _third(run: Run, which: int) -> list[Sample]:
    """Responses of the first (0), middle (1) or last (2) third of the steps sampled."""
    steps = np.array_split(sorted({s.step for s in run.trained}), 3)[which]
    return [s for s in run.trained if s.step in set(steps.tolist())]


def _predictions(run: Run, samples: Iterable[Sample], place: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """V̄ and outcome of tokens; of a third of the response, if one is named.

    The outcome is the reward, discounted to the token.
    """
    gamma = run.config.get("gamma", 1.0)
    gamma = float(gamma) if isinstance(gamma, (int, float)) else 1.0
    predicted, outcome = [np.zeros(0)], [np.zeros(0)]
    for sample in samples:
        value = sample.columns.get("value")
        if value is None or not sample.critics:
            continue
        position = np.arange(len(value))
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

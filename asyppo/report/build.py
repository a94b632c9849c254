"""The page: sections, token view and data in one HTML file that needs no network and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from asyppo.config import ConfigError
from asyppo.report import tokens
from asyppo.report.figures import number
from asyppo.report.runs import Run, differences, labels, read_run
from asyppo.report.sections import everything_of, sections_of
from asyppo.run.durable import write_text


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of several overlaid, and return where it is.

    ``out`` defaults to ``report.html`` in the run's directory, and for several runs in the current one. A file of that
    name is replaced. Raises ConfigError for a path that is no run, or one that
    cannot be written.
    """
    runs = [read_run(Path(path)) for path in paths]
    out = out or (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    # A name may hold what UTF-8 does not.
    page = build_page(runs).encode("utf-8", "replace").decode()
    try:
        write_text(out, page)  # at once: one that is open in a browser is not left half written
    except OSError as error:
        raise ConfigError(f"--out: cannot write {str(out)!r}: {error.strerror}") from error
    return out


def report_at_the_end(path: Path) -> Path | None:
    """Write the report of a run that has just ended. What goes wrong is a warning: the run itself is whole."""
    try:
        return write_report([path])
    except Exception as error:
        print(f"asyppo: warning: no report: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def build_page(runs: Sequence[Run]) -> str:
    """Return the page as text."""
    names = labels(runs)
    chosen = tokens.choose(runs)
    sections = sections_of(runs, names)
    everything = everything_of(runs, names)
    charts = [chart for section in sections for chart in section.charts]
    charts += [chart for _, group in everything for chart in group]
    for i, chart in enumerate(charts):
        chart.name = f"figure-{i}"
    script, plotly = _asset("page.js"), get_plotlyjs()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        runs=runs,
        names=names,
        facts=[facts(run) for run in runs],
        differences=differences(runs),
        notes=[(name, run.notes) for name, run in zip(names, runs, strict=True) if run.notes],
        sections=sections,
        everything=everything,
        figures=[(chart.name, as_json(chart.figure)) for chart in charts],
        samples=[as_json(tokens.pack(sample)) for _, sample in chosen],
        view=as_json({"index": tokens.index(chosen), "scales": tokens.scales(chosen), "runs": names}),
        audited=any(run.audits for run in runs),
        environments=any(sample.policy is not None for _, sample in chosen),
        shown=len(chosen),
        written=sum(run.samples_written + sum(s.split == "audit" for s in run.samples) for run in runs),
        policy=f"default-src 'none'; script-src {_hash(script)} {_hash(plotly)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",
        css=Markup(_asset("page.css")),
        script=Markup(script),
        plotly=Markup(plotly),
    )


def facts(run: Run) -> list[tuple[str, str]]:
    """Return what one wants to know of a run first: name and value."""
    accuracy = run.series("eval/accuracy")[1]
    reward = run.series("critic/score/mean")[1]
    seconds = run.series("timing_s/step")[1]
    steps = run.config.get("max_steps")
    out = [("algorithm", run.algorithm), ("steps", f"{run.last_step} of {steps}" if steps else str(run.last_step))]
    critics = max((s.critics for s in run.samples), default=0)
    if critics:
        out.append(("critics", str(critics)))
    if accuracy:
        started = f"{accuracy[0]:.3f} → " if len(accuracy) > 1 else ""
        out.append(("held-out accuracy", f"{started}{accuracy[-1]:.3f}"))
    if reward:
        out.append(("reward", f"{number(reward[0])} → {number(reward[-1])}"))
    if seconds:
        out.append(("seconds a step", number(sum(seconds) / len(seconds))))
    return out


def as_json(value: Any) -> Markup:
    """Return JSON that stands inside a script element, whatever text is in it.

    ASCII alone, so that no line separator and no half of a surrogate pair reaches the file, and without the characters
    that could end the element.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _asset(name: str) -> str:
    return (files("asyppo.report") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"

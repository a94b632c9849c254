"""What the report reads and computes: runs that are whole, half written, old or hostile; and the page as text."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyppo.cli.main import main
from asyppo.config import ConfigError
from asyppo.report import build, figures, report_at_the_end, runs, sections, tokens, write_report
from asyppo.report.runs import Sample, read_run

Make = Callable[..., Path]


class Blocks(HTMLParser):
    """The script elements of a page as a browser's parser finds them: attributes and text."""

    def __init__(self, page: str):
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    def json(self, name: str) -> Any:
        """The data of the block called ``name``."""
        [text] = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(text)


def charts_of(run: Path) -> dict[str, figures.Chart]:
    """Every chart of a run but those of all metrics, by title."""
    read = [read_run(run)]
    return {chart.title: chart for section in sections.sections_of(read, ["run"]) for chart in section.charts}


def sample(**columns: Any) -> Sample:
    """A response with these columns."""
    length = len(next(iter(columns.values())))
    reward = columns.pop("reward", 0.0)
    flags = {name: np.array(columns.pop(name)) for name in runs.FLAGS if name in columns}
    arrays = {name: np.array(column, dtype=np.float32) for name, column in columns.items()}
    return Sample(1, "train", "p", "c", reward, {}, False, 0, ["x"] * length, arrays, flags)


def test_a_whole_run(make_run: Make) -> None:
    out = write_report([make_run()])
    assert out.name == "report.html"
    page = Blocks(out.read_text())
    view = page.json("view")
    assert len(view["index"]["step"]) == 12 * 8 + 4
    assert view["index"]["split"].count("eval") == 4
    assert set(view["scales"]) == set(tokens.SCALED)
    first = page.json("sample-0")
    assert "".join(first["tokens"]) == first["completion"]
    assert {"value_0", "value_1", "value", "std", "log_ratio"} <= set(first["columns"])
    assert "half written" not in out.read_text()
    assert not list(out.parent.glob(".*"))


def test_what_the_page_may_load(make_run: Make) -> None:
    """Two scripts, each named by its hash, and nothing from anywhere else."""
    text = write_report([make_run()]).read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    directives = dict(part.split(" ", 1) for part in policy[1].replace("&#39;", "'").split("; "))
    assert directives["default-src"] == "'none'"
    page = Blocks(text)
    code = [script for attributes, script in page.scripts if attributes.get("type") != "application/json"]
    assert [build._hash(script) for script in code] == directives["script-src"].split()
    assert all("src" not in attributes for attributes, _ in page.scripts)
    assert not re.search(r"<(?:link|img|iframe|object|embed|script)[^>]+(?:src|href)=\"(?!data:)", text[:40_000])


def test_columns_come_back_as_they_were() -> None:
    column = np.array([0.0, 1.0, -0.3333, 1e-4, math.nan, math.inf], dtype=np.float32)
    packed = tokens.pack(sample(value=column, advantage_keep=[True, False, True, True, False, True]))
    assert packed["flags"]["advantage_keep"] == "101101"
    got = np.frombuffer(base64.b64decode(packed["columns"]["value"]), dtype="<f2").astype(float)
    assert got[:4] == pytest.approx(column[:4], rel=1e-3)
    assert np.isnan(got[4:]).all()
    large = np.array([1e6, -2e-3], dtype=np.float32)
    packed = tokens.pack(sample(value=large))
    assert np.frombuffer(base64.b64decode(packed["columns"]["value"]), dtype="<f4") == pytest.approx(large)


def test_a_run_that_is_still_going(make_run: Make) -> None:
    run = make_run(config={"max_steps": 50})
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole + whole.splitlines(keepends=True)[-1][:40] + "é".encode()[:1])
    read = read_run(run)
    assert read.last_step == 12
    assert len(read.samples) == 100
    assert [note for note in read.notes if "half written" in note] == [
        f"The last line of {name} is half written and left out: the run may still be going."
        for name in ("metrics.jsonl", "samples.jsonl")
    ]
    assert "12 of 50 steps are done: the run is still going, or was stopped." in read.notes
    assert not any("cannot be read" in note for note in read.notes)


def test_lines_that_are_no_rows(make_run: Make) -> None:
    run = make_run()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "actor/entropy": 7.5}\nnot json\n[1]\n{"step": "x"}\n{"step": true}\n\n')
        file.write('{"step": 13, "a/text": "x", "a/list": [1], "a/flag": true, "a/none": null, "a/huge": 1' + "0" * 400)
        file.write("}\n" + "[" * 100_000 + "\n")
    read = read_run(run)
    assert read.notes == ["5 lines of metrics.jsonl cannot be read and are left out."]
    assert read.series("actor/entropy")[1][-1] == 7.5, "the last row of a step that was done twice counts"
    assert read.series("critic/score/mean")[0] == list(range(1, 13))
    assert read.metrics[-1] == {"step": 13, "a/none": None}


def nothing(path: Path) -> None:
    (path / "samples.jsonl").unlink()


def empty(path: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "config.yaml"):
        (path / name).write_text("")


def broken_config(path: Path) -> None:
    (path / "config.yaml").write_text("a: [")
    (path / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (nothing, ["samples.jsonl is missing", "There are no responses to look at"]),
        (empty, ["metrics.jsonl has no rows yet", "samples.jsonl has no rows yet", "config.yaml holds no settings"]),
        (broken_config, ["config.yaml cannot be read", "metrics.jsonl is missing", "No metrics yet"]),
    ],
)
def test_missing_parts_are_said(make_run: Make, damage: Callable[[Path], None], said: list[str]) -> None:
    run = make_run()
    damage(run)
    text = write_report([run]).read_text()
    for sentence in said:
        assert sentence in text


def test_runs_without_critics_and_of_older_versions(make_run: Make) -> None:
    grpo = write_report([make_run("grpo", critics=0)]).read_text()
    assert "No critics: an advantage is the reward" in grpo
    assert "Calibration by position" not in grpo
    ppo = write_report([make_run("ppo", critics=1)]).read_text()
    assert "Fewer than two critics" in ppo
    assert "Calibration by position" in ppo
    assert "before they score them" in ppo
    ways = [make_run(way, config={"advantage_values": way}) for way in ("before", "cross_fit")]
    assert "before they are fitted to them" in write_report(ways[:1]).read_text()
    assert "leaves out the critic" in write_report(ways[1:]).read_text()
    assert "depends on advantage_values" in write_report(ways, ways[0] / "both.html").read_text()

    def old(row: dict[str, Any]) -> dict[str, Any]:
        return {key: row[key] for key in ("step", "split", "prompt", "completion", "reward")}

    text = write_report([make_run("old", change=old)]).read_text()
    assert "samples.jsonl has no tokens, as in runs of older versions" in text
    assert "No entropy per token" in text
    assert "Rewards of responses" in text

    def some(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in ("std", "log_ratio")} | {"entropy": [1.0]}

    read = read_run(make_run("some", change=some))
    assert read.notes == ["samples.jsonl has no entropy, log_ratio, std."]


def test_audits_are_a_section_and_responses_of_their_own(make_run: Make, audited: Callable[..., None]) -> None:
    run = make_run()
    assert 'href="#audits"' not in write_report([run]).read_text()
    audited(run, step=4)
    audited(run, step=12)
    (run / "audit-13.json").write_text('{"step": 13')
    (run / "gradients-14.json").write_text('{"step": 14}')
    charts = charts_of(run)
    chart = charts["Values and the truth by σ"]
    assert [line["name"] for line in chart.data] == ["V̄", "V*", "RMSE of V̄"]
    assert "error_y" not in chart.data[1]  # not all of them have an interval
    text = write_report([run]).read_text()
    for said in (
        "audit-13.json cannot be read",
        "gradients-14.json cannot be read (holds no results)",
        "Values, step 4: Values against the truth V*",
        "Values, step 12: What masks drop",
        "Gradients, step 4: Policy gradients of 16 batches, with a reference of 32 others",
        "&lt;low&gt;",
        '<option value="audit">',
    ):
        assert said in text, said
    view = Blocks(text).json("view")["index"]
    [first, second] = [i for i, split in enumerate(view["split"]) if split == "audit"]
    assert (view["step"][first], view["step"][second]) == (4, 12)
    assert {"truth", "truth_se"} <= set(Blocks(text).json(f"sample-{first}")["columns"])
    both = write_report([run, make_run("other")], run / "both.html").read_text()
    assert "Values, run, step 12: " in both.replace(f"{run}", "run")


def test_a_path_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path in (tmp_path, tmp_path / "none", Path(__file__)):
        assert main(["report", str(path)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert re.fullmatch(r"asyppo: error: report: got '.*', which .*, needs a run's directory", line)
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match=r"--out: cannot write '.*such.html': No such file"):
        write_report([tmp_path], tmp_path / "no" / "such.html")


def test_the_command(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    one, two = make_run("one"), make_run("two", seed=1)
    assert main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"report: {one / 'report.html'}\n"
    assert main(["report", str(one), str(two), "--out", str(tmp_path / "both.html")]) == 0
    assert "one (seed 0)" in (tmp_path / "both.html").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "one", "two"]) == 0
    assert (tmp_path / "report.html").exists()


def test_a_report_that_fails_does_not_take_the_run_along(
    make_run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(runs: Any) -> str:
        raise MemoryError("too much")

    monkeypatch.setattr(build, "build_page", fail)
    assert report_at_the_end(make_run()) is None
    assert capsys.readouterr().err == "asyppo: warning: no report: MemoryError: too much\n"


def test_names_of_several_runs(make_run: Make) -> None:
    read = [read_run(make_run(name, **options)) for name, options in (("a", {}), ("b", {"critics": 0, "seed": 3}))]
    assert runs.differences(read) == {"algorithm": ["asyppo", "grpo"], "seed": ["0", "3"]}
    assert runs.labels(read) == ["a (algorithm asyppo, seed 0)", "b (algorithm grpo, seed 3)"]
    twins = [read_run(make_run("x/same")), read_run(make_run("y/same"))]
    assert runs.labels(twins) == [str(run.path) for run in twins]
    chart = figures.curves("t", read, ["a", "b"], {"critic/score/mean": "reward", "critic/score/min": "min"})
    assert chart is not None
    assert [trace["name"] for trace in chart.data] == ["a", "b"], "of mean and min, several runs show the mean"
    assert len({trace["line"]["color"] for trace in chart.data}) == 2
    assert len({trace["marker"]["symbol"] for trace in chart.data}) == 2


def test_a_curve_of_one_of_several_runs_says_whose_it_is(make_run: Make) -> None:
    read = [read_run(make_run(name, **options)) for name, options in (("a", {}), ("b", {"critics": 0}))]
    charts = {c.title: c for section in sections.sections_of(read, ["a", "b"]) for c in section.charts}
    for title in ("Explained variance", "σ along the response"):
        assert [trace["name"] for trace in charts[title].data] == ["a"]
        assert charts[title].layout["showlegend"] is True


def test_calibration_against_a_hand_made_case() -> None:
    """Of predictions that are the chances, bins lie on the line; with half of them, above it."""
    generator = np.random.default_rng(0)
    chance = generator.random(40_000)
    outcome = (generator.random(40_000) < chance).astype(float)
    chart = figures.calibration("t", {"right": (chance, outcome), "half": (chance / 2, outcome)}, "")
    assert chart is not None
    assert chart.table is not None
    line, right, half = chart.data
    assert line["name"] == "calibrated"
    assert right["y"] == pytest.approx(right["x"], abs=0.03)
    assert half["y"] == pytest.approx([2 * x for x in half["x"]], abs=0.03)
    assert [float(row[2]) for row in chart.table.rows] == pytest.approx([0, 0.25], abs=0.01)
    assert [float(row[3]) for row in chart.table.rows] == pytest.approx([0, -0.25], abs=0.01)


def test_outcomes_are_discounted_and_thirds_are_of_the_response(make_run: Make) -> None:
    run = read_run(make_run(config={"gamma": 0.5}))
    run.samples = [sample(value=[1, 2, 3, 4, 5, math.nan], value_0=[0] * 6, reward=8.0)]
    predicted, outcome = sections._predictions(run, run.samples)
    assert predicted.tolist() == [1, 2, 3, 4, 5]
    assert outcome.tolist() == [0.25, 0.5, 1, 2, 4]
    run.samples[0].columns["returns"] = np.arange(6.0)
    assert sections._predictions(run, run.samples)[1].tolist() == [0, 1, 2, 3, 4]
    run.config["critic"] = {"value_lambda": 0.9}
    assert sections._predictions(run, run.samples)[1].tolist() == outcome.tolist(), "bootstrapped returns are none"
    for place, values in enumerate(([1, 2], [3, 4], [5])):
        assert sections._predictions(run, run.samples, place)[0].tolist() == values


def test_means_by_tenth() -> None:
    responses = [sample(std=range(10), advantage_keep=[False] * 5 + [True] * 5), sample(std=[math.nan, 20.0])]
    columns = {"masked": lambda s: figures.dropped(s, "advantage_keep"), "σ": lambda s: s.columns["std"]}
    chart = figures.by_tenth("t", "", {"run": responses}, columns, figures.response_tenths, "")
    assert chart is not None
    assert chart.data[0]["y"] == [1.0] * 5 + [0.0] * 5
    assert chart.data[1]["y"] == [0, 1, 2, 3, 4, 12.5, 6, 7, 8, 9]
    assert chart.layout["xaxis"]["title"]["text"] == "position in the response"
    # Eleven numbers in order: the first tenth has two of them.
    assert [p.tolist() for p in figures.disagreement_tenths(responses)] == [[0, 0, 1, 2, 3, 4, 5, 6, 7, 8], [-1, 9]]
    responses[1].step = 2
    assert [p.tolist() for p in figures.disagreement_tenths(responses)] == [list(range(10)), [-1, 0]]


def test_tokens_by_disagreement() -> None:
    of_tokens = [sample(std=[0.1, 0.9, 0.5], advantage_keep=[False, True, True], entropy_keep=[True, False, True])] * 10
    for s in of_tokens:
        s.tokens = ["low", "high", "\n"]
    table = figures.common_tokens(of_tokens)
    assert table is not None
    assert table.rows == [
        ["'high'", "10", "0.900", "0%", "100%"],
        ["'\\n'", "10", "0.500", "0%", "0%"],
        ["'low'", "10", "0.100", "100%", "0%"],
    ]
    assert figures.common_tokens(of_tokens[:9]) is None
    taken = figures.masked_tokens(of_tokens)
    assert taken is not None
    assert taken.rows == [
        ["'low'", "10", "33.3%", "100.0%", "0.0%"],
        ["'high'", "10", "33.3%", "0.0%", "100.0%"],
    ]
    assert figures.masked_tokens([sample(std=[0.1], advantage_keep=[True], entropy_keep=[True])]) is None


def test_masks_by_the_number_of_the_token(make_run: Make) -> None:
    [masked, filtered] = charts_of(make_run())["Masked by the token's number"].data
    assert masked["x"] == ["1", "2", "3–4", "9–16"]
    assert masked["y"] == pytest.approx([0.875, 0.6125, 0.0875, 0.0])  # steps 9 to 12 of 12
    assert filtered["y"] == [0.2] * 4
    several = [read_run(make_run(f"run{m}", critics=m)) for m in (1, 2)]
    charts = {chart.title: chart for s in sections.sections_of(several, ["a", "b"]) for chart in s.charts}
    assert [trace["name"] for trace in charts["σ by the token's number"].data] == ["b"]
    assert {"Advantage masked by the token's number", "Entropy filtered by the token's number"} < set(charts)


def test_every_metric_has_a_curve(make_run: Make) -> None:
    read = [read_run(make_run())]
    drawn = [t for _, charts in sections.everything_of(read, ["r"]) for chart in charts for t in chart.data]
    assert len(drawn) == len({key for row in read[0].metrics for key in row} - {"step"})
    groups = dict(sections.everything_of(read, ["r"]))
    assert "critic/{m}/vf_loss" in [chart.title for chart in groups["critic"]]
    assert [trace["name"] for chart in groups["critic"] for trace in chart.data if "{m}" in chart.title] == ["0", "1"]


def test_held_out_accuracy_has_its_interval(make_run: Make) -> None:
    run = make_run()
    reward, accuracy = charts_of(run)["Reward and held-out accuracy"].data
    assert "error_y" not in reward
    assert accuracy["y"] == [0.35, 0.68]
    bars = accuracy["error_y"]
    assert bars["symmetric"] is False
    assert bars["array"] == pytest.approx([0.03, 0.03])
    assert bars["arrayminus"] == pytest.approx([0.02, 0.04])
    # Of an older version, which logged no interval.
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r', "eval/accuracy/ci_\w+": [\d.]+', "", text))
    assert "error_y" not in charts_of(run)["Reward and held-out accuracy"].data[1]


def test_long_curves_are_means_over_stretches(make_run: Make) -> None:
    run = make_run(steps=1600, per_step=0)
    chart = charts_of(run)["Reward and held-out accuracy"]
    assert len(chart.data[0]["x"]) == figures.MAX_POINTS
    assert chart.data[0]["x"][0] == 2.5
    assert "Means over stretches" in chart.says


def test_phases_add_up(make_run: Make) -> None:
    chart = charts_of(make_run())["Time by phase"]
    assert [trace["name"] for trace in chart.data] == ["gen", "old_log_prob", "update_critic", "adv", "update_actor"]
    assert np.sum([trace["y"] for trace in chart.data], axis=0) == pytest.approx([0.9] * 12)


def test_a_large_run_is_thinned(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(steps=20, per_step=4)
    monkeypatch.setattr(tokens, "MAX_SAMPLES", 20)
    chosen = tokens.choose([read_run(run)])
    train = [s.step for _, s in chosen if s.split == "train"]
    assert train == list(range(1, 21))
    monkeypatch.setattr(tokens, "MAX_TOKENS", 14 * 10)
    assert sum(s.split == "train" for _, s in tokens.choose([read_run(run)])) == 10
    monkeypatch.setattr(runs, "READ_BYTES", (run / "samples.jsonl").stat().st_size // 4)
    read = read_run(run)
    assert len(read.samples) == math.ceil(83 / 5) + 1
    assert np.diff([s.step for s in read.samples]).max() <= 2
    assert "its 84 lines were read, evenly spaced" in read.notes[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1.00"), (0.12345, "0.123"), (1234.5, "1,234"), (-2.5e-7, "-2.5e-07"), (math.nan, "–"), (None, "–")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert figures.number(value) == text


def with_turns(row: dict[str, Any]) -> dict[str, Any]:
    """The sample as an episode of two turns, the first of which was answered by tokens 4 and 5."""
    count = len(row["tokens"])
    known = {"calls": [], "reward": 0.0, "failures": 0, "timed_out": False}
    first = known | {"start": 0, "end": 4, "until": 6, "action": "a", "observation": "b", "value_before": 0.25}
    first |= {"value_after": 0.75, "luck": 0.5}
    second = known | {"start": 6, "end": count, "until": count, "action": "c", "observation": None}
    return row | {"policy_tokens": [t not in (4, 5) for t in range(count)], "turns": [first, second]}


def test_an_environments_tokens_have_no_numbers_but_the_value_after_a_turn(make_run: Make) -> None:
    run = make_run(change=with_turns)
    [read, *_] = read_run(run).trained
    assert read.policy is not None
    assert read.length == 12
    missing = {name: np.flatnonzero(np.isnan(column)).tolist() for name, column in read.columns.items()}
    assert missing == {name: [5] if "value" in name or name == "returns" else [4, 5] for name in missing}
    shares = figures.dropped(read, "advantage_keep")
    assert shares is not None
    assert np.flatnonzero(np.isnan(shares)).tolist() == [4, 5]
    page = Blocks(write_report([run]).read_text())
    packed = page.json("sample-0")
    assert packed["flags"]["policy"] == "11110011111111"
    assert packed["turns"][0]["luck"] == 0.5
    assert set(page.json("view")["index"]["length"]) == {12, None}
    assert "the environment's</span>" in (run / "report.html").read_text()

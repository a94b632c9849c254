"""The page in a real browser: it opens in silence, works by mouse and keyboard, and runs nothing of what it shows."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyppo.report import build, write_report
from asyppo.report.tokens import SCALED


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; trainer's own reader would import torch."""
    return [json.loads(line) for line in path.read_text().splitlines()]


Make = Callable[..., Path]

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'>",
    "<!--<script>",
    "]]><svg onload=window.pwned=3>",
    "{{ 7 * 7 }}{% raw %}$" + "{window.pwned = 4}",
    "&lt;b&gt; &amp;",
    "\u202egnp.exe\u2066",
    "a\u200bb\u200d\ufeff",
    "line\u2028paragraph\u2029",
    "nul\x00bell\x07",
    "half \ud83d of a pair \udc00",
    "<a href='javascript:window.pwned=5'>x</a>",
    "https://example.com/" + "x" * 4000,
    "__proto__",
    "-->'\"`\\",
]


class Page:
    """A report in the browser, and what a person does with it."""

    def __init__(self, browser: Any):
        self.browser = browser

    def open(self, path: Path, *, dark: bool = False, width: int = 1280) -> Page:
        """Open a report."""
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme, motion]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.get_log("browser")
        self.browser.get(path.resolve().as_uri())
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page and return its value."""
        return self.browser.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """Text of an element, whether it can be seen or not."""
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def find(self, selector: str) -> Any:
        """An element."""
        return self.browser.find_element("css selector", selector)

    def keys(self, *keys: str) -> None:
        """Press keys where the focus is."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def token(self) -> int:
        """The number of the token that is chosen."""
        return self.js(
            "return [...document.querySelectorAll('#response .token')].findIndex(t => t.ariaSelected === 'true')"
        )

    def colours(self) -> list[list[str]]:
        """Background and text colour of every token."""
        return self.js(
            "return [...document.querySelectorAll('#response .token')].map(t =>"
            " [getComputedStyle(t).backgroundColor, getComputedStyle(t).color])"
        )

    def choose(self, name: str, value: str) -> None:
        """Choose from a list that drops down."""
        self.js(
            "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            value,
        )

    def wait_for(self, selector: str) -> None:
        """Wait until there is such an element."""
        self.browser.set_script_timeout(20)
        self.browser.execute_async_script(
            "const look = () => document.querySelector(arguments[0]) ? arguments[1]() : setTimeout(look, 20); look()",
            selector,
        )

    def draw_everything(self) -> int:
        """Open all, scroll through, and return how many charts were drawn; every one of them has to be."""
        self.js("document.querySelectorAll('#metrics details').forEach(d => { d.open = true })")
        # An image of the whole page makes every chart come into view.
        height = self.js("return document.documentElement.scrollHeight")
        size = {"width": 1280, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.set_script_timeout(20)
        return self.browser.execute_async_script(
            "const done = arguments[0], plots = document.querySelectorAll('.plot');"
            "const look = () => [...plots].every(p => p.querySelector('.main-svg')) ? done(plots.length)"
            " : setTimeout(look, 20); look();"
        )


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page whose console has to stay silent."""
    made = Page(browser)
    yield made
    assert browser.get_log("browser") == []


def test_every_chart_is_drawn_in_both_themes(page: Page, make_run: Make) -> None:
    report = write_report([make_run()])
    count = page.open(report).draw_everything()
    assert count == len(re.findall(r'class="plot"', report.read_text().split("<script")[0])) > 15
    light = page.js("return getComputedStyle(document.body).backgroundColor")
    fill = "return document.querySelector('.plot .xtick text').style.fill"
    before = page.js(fill)
    page.find("#theme").click()
    assert page.find("#theme").get_attribute("aria-pressed") == "true"
    assert "✓" in page.js("return getComputedStyle(document.getElementById('theme'), '::before').content")
    assert page.js("return getComputedStyle(document.body).backgroundColor") != light
    assert page.js(fill) != before
    dark = page.open(report, dark=True).js("return getComputedStyle(document.body).backgroundColor")
    assert dark != light


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_wider_than_the_window(page: Page, make_run: Make, width: int) -> None:
    page.open(write_report([make_run(), make_run("other", seed=1)], make_run("x") / "r.html"), width=width)
    assert page.js("return document.documentElement.scrollWidth") <= width
    wide = page.js(
        "return [...document.querySelectorAll('.viewer > *, .chart')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        ".map(e => e.className)"
    )
    assert wide == []


def test_tokens_by_mouse(page: Page, make_run: Make) -> None:
    page.open(write_report([make_run()]))
    assert page.token() == 0
    tokens = page.browser.find_elements("css selector", "#response .token")
    assert len(tokens) == 14
    tokens[5].click()
    assert page.token() == 5
    assert "6 of 14" in page.text("#token")
    before = page.colours()
    page.find("#colour input[value=advantage]").click()
    after = page.colours()
    assert before != after
    assert "advantage" in page.find("#scale").get_attribute("aria-label")
    page.find("#own-scale").click()
    assert page.colours() != after
    # A pointer that rests on a token shows its values; when it leaves, those of the chosen one come back.
    move = "const e = document.querySelectorAll('#response .token')[8]; e.dispatchEvent(new MouseEvent(arguments[0], "
    page.js(move + "{bubbles: true}))", "mouseover")
    assert "9 of 14" in page.text("#token")
    page.js("document.getElementById('response').dispatchEvent(new MouseEvent('mouseleave'))")
    assert "6 of 14" in page.text("#token")


def test_tokens_by_keyboard(page: Page, make_run: Make) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(write_report([make_run()]))
    chosen = "return document.getElementById('samples').selectedIndex"
    # From the list, Tab goes on to the colours and then to the chosen token.
    page.js("document.getElementById('samples').focus()")
    page.keys(Keys.ARROW_DOWN)
    assert page.js(chosen) == 1
    page.keys(Keys.TAB)
    assert page.js("return document.activeElement.name") == "quantity"
    for _ in range(5):
        if page.js("return document.activeElement.classList.contains('token')"):
            break
        page.keys(Keys.TAB)
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.token() == 2
    assert "token 3: " in page.js("return document.activeElement.ariaLabel")
    page.keys(Keys.ARROW_LEFT)
    assert page.token() == 1
    page.keys(Keys.END)
    page.keys(Keys.ARROW_RIGHT)
    assert page.token() == 13
    page.keys(Keys.HOME)
    assert page.token() == 0
    page.keys("j")
    assert page.js(chosen) == 2
    assert page.js("return document.activeElement.classList.contains('token')")
    page.keys(Keys.ARROW_DOWN)
    page.keys("k")
    page.keys(Keys.ARROW_UP)
    page.keys("k", "k", "k", "k")
    assert page.js(chosen) == 0
    seen = []
    for digit, name in enumerate(SCALED, 1):
        page.keys(str(digit))
        assert page.js("return document.querySelector('#colour input:checked').value") == name
        seen.append(str(page.colours()))
    assert len(set(seen)) == 5


def test_what_is_shown_is_what_was_written(page: Page, make_run: Make) -> None:
    run = make_run()
    page.open(write_report([run]))
    rows = read_jsonl(run / "samples.jsonl")
    assert page.js("return document.getElementById('samples').value") == "0"
    row = rows[0]
    marks = page.js(
        "return [...document.querySelectorAll('#response .token')].map(t =>"
        " [t.classList.contains('masked'), t.classList.contains('filtered')])"
    )
    assert marks == [[not a, not h] for a, h in zip(row["advantage_keep"], row["entropy_keep"], strict=True)]
    assert any(a for a, _ in marks)
    assert any(h for _, h in marks)
    # A mark is a line, and not of the width of none.
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert page.js(style, "#response .masked", "borderBottomStyle") == "dashed"
    assert page.js(style, "#response .filtered", "borderTopStyle") == "double"
    page.find("#response .token:nth-child(4)").click()
    cells = page.js(
        "return [...document.querySelectorAll('#token tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    shown = {name: value.replace("−", "-") for name, value in cells}
    for name, value in (
        ("V̄", row["value"][3]),
        ("V of critic 0", row["values"][0][3]),
        ("V of critic 1", row["values"][1][3]),
        ("σ", row["std"][3]),
        ("advantage, raw", row["raw_advantage"][3]),
        ("advantage, whitened", row["advantage"][3]),
        ("entropy (nats)", row["entropy"][3]),
        ("log-ratio", row["log_ratio"][3]),
    ):
        assert float(shown[name]) == pytest.approx(value, rel=0.01), name
    assert shown["in the policy loss"] == ("kept" if row["advantage_keep"][3] else "masked")
    assert shown["in the entropy bonus"] == ("kept" if row["entropy_keep"][3] else "filtered")
    assert page.text("#prompt") == row["prompt"].replace("\n", "⏎")  # its only line break is the last character
    assert "reward " + str(int(row["reward"])) in page.text("#sample-facts")


def test_filters(page: Page, make_run: Make) -> None:
    run = make_run()
    page.open(write_report([run]))
    rows = read_jsonl(run / "samples.jsonl")
    options = "return [...document.getElementById('samples').options].map(o => Number(o.value))"

    def passing(keep: Callable[[dict[str, Any]], bool], split: str = "train") -> list[int]:
        return [i for i, row in enumerate(rows) if row["split"] == split and keep(row)]

    assert page.js(options) == passing(lambda row: True)
    page.find("#step-from").send_keys("4")
    page.find("#step-to").send_keys("6")
    assert page.js(options) == passing(lambda row: 4 <= row["step"] <= 6)
    page.find("#reward-from").send_keys("0.5")
    wanted = passing(lambda row: 4 <= row["step"] <= 6 and row["reward"] >= 0.5)
    assert page.js(options) == wanted
    assert f"{len(wanted)} of 100" in page.text("#count")
    assert page.js("return document.getElementById('samples').value") == str(wanted[0])
    page.find("#reward-to").send_keys("0.6")
    assert page.js(options) == []
    assert page.text("#sample-facts") == "No response passes the filters."
    page.find("#filters button[type=reset]").click()
    page.browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert len(page.js(options)) == 96
    page.choose("filter-split", "eval")
    assert page.js(options) == passing(lambda row: True, "eval")
    assert page.text("#response") == "0"
    assert not page.find("#colour").is_displayed(), "text without tokens has no colours"


def test_audited_responses_have_the_truth(page: Page, make_run: Make, audited: Callable[..., None]) -> None:
    run = make_run()
    audited(run)
    page.open(write_report([run])).draw_everything()
    page.choose("filter-split", "audit")
    assert page.text("#prompt").startswith("What is audited?")
    assert re.search(r"V\*, of continuations0\.500its standard error0\.100", page.text("#token"))
    traces = "const p = document.getElementById('values-plot'); return p.data.find(t => t.name === 'V*')"
    assert page.js(f"{traces}.x") == [1, 3, 6]
    assert page.js(f"{traces}.y") == [0.5, 0.25, 0.75]


def test_text_is_readable_on_every_colour(page: Page, make_run: Make) -> None:
    """WCAG's 4.5:1, for tokens of all values and for the words of the page."""
    report = write_report([make_run(tokens=200, steps=2, per_step=1)])

    def luminance(colour: str) -> float:
        channels = [float(c) / 255 for c in re.findall(r"[\d.]+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    names = [f"--series-{i}" for i in range(1, 9)] + ["--text", "--muted", "--accent"]
    resolve = (
        "const e = document.body.appendChild(document.createElement('i'));"
        "return arguments[0].map(n => { e.style.color = `var(${n})`; return getComputedStyle(e).color; })"
    )
    for dark in (False, True):
        page.open(report, dark=dark)
        for quantity in SCALED:
            page.find(f"#colour input[value={quantity}]").click()
            pairs = {tuple(pair) for pair in page.colours()}
            assert len(pairs) > 50
            assert min(contrast(*pair) for pair in pairs) >= 4.5, (quantity, dark)
        panel, *colours = page.js(resolve, ["--panel", *names])
        for name, colour in zip(names, colours, strict=True):
            assert contrast(panel, colour) >= (3 if "series" in name else 4.5), (name, dark)


def test_hostile_text_stays_text(page: Page, make_run: Make) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        n = len(row["tokens"])
        row["tokens"] = (HOSTILE * n)[:n]
        return row | {"prompt": "".join(HOSTILE), "completion": HOSTILE[0], "rewards": dict.fromkeys(HOSTILE, 1.0)}

    run = make_run(tokens=len(HOSTILE), steps=3, change=change, config={h: h for h in HOSTILE[:4]})
    rows = read_jsonl(run / "metrics.jsonl")
    for row in rows:
        row |= {f"{h}/x": 1.0 for h in [*HOSTILE[:4], HOSTILE[10]]} | {"timing_s/<b onclick=alert(1)>": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(run / "samples.jsonl", "a") as file:
        file.write(
            json.dumps({"step": 3, "split": "eval", "prompt": HOSTILE[0], "completion": "".join(HOSTILE)}) + "\n"
        )
    report = write_report([run])
    page.open(report).draw_everything()
    for digit in "12345":
        page.js("document.querySelector('#response .token').focus()")
        page.keys(digit, "j")
    assert page.js("return window.pwned") is None
    # The page is made of what its template, its script and Plotly use.
    made_of = page.js(
        "return [...new Set([...document.querySelectorAll('body, body *:not(svg *)')].map(e => e.localName))]"
    )
    template = (Path(build.__file__).with_name("page.html")).read_text()
    assert set(made_of) <= {*re.findall(r"<([a-z0-9]+)", template), "svg"}
    foreign = (
        "return document.querySelectorAll('img, iframe, a:not([href^=\"#\"]), main svg a, main script, main style')"
        ".length"
    )
    assert page.js(foreign) == 0
    tokens = page.js("return [...document.querySelectorAll('#response .token')].map(t => t.textContent)")
    assert tokens[0] == HOSTILE[0]
    assert tokens[1] == HOSTILE[1]
    assert tokens[6] == "⟨U+202E⟩gnp.exe⟨U+2066⟩"
    assert tokens[7] == "a⟨U+200B⟩b\u200d⟨U+FEFF⟩"
    assert tokens[8] == "line⟨U+2028⟩paragraph⟨U+2029⟩"
    assert tokens[9] == "nul⟨U+0000⟩bell⟨U+0007⟩"
    assert tokens[10] == "half ⟨U+D83D⟩ of a pair ⟨U+DC00⟩"
    box = page.js("const r = document.getElementById('response'); return [r.scrollWidth, r.clientWidth]")
    assert box[0] <= box[1] + 1
    assert page.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_scripts_that_get_in_are_not_run(browser: Any, make_run: Make) -> None:
    """If text became markup after all, the page's policy would still keep it from running and from calling out."""
    page = Page(browser)
    page.open(write_report([make_run()]))
    page.js(
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"x:\" onerror=\"window.pwned = 1\">');"
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 2'; document.body.append(s);"
        # Later, since what the driver itself calls may do more than the page.
        "setTimeout(() => { try { new Function('window.pwned = 3')() } catch {} })"
    )
    fetched = browser.execute_async_script(
        "fetch(arguments[0]).then(() => arguments[1]('fetched'), () => arguments[1]('refused'))", "data:,x"
    )
    assert fetched == "refused"
    assert page.js("return window.pwned") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def no_samples(run: Path) -> None:
    (run / "samples.jsonl").unlink()


def no_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")


def one_empty_response(run: Path) -> None:
    row = {
        "step": 1,
        "split": "train",
        "prompt": "p",
        "completion": "",
        "reward": None,
        "tokens": [],
        "values": [[], []],
    }
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")


def no_numbers(run: Path) -> None:
    row = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    row |= {name: [None] * 14 for name in ("value", "std", "entropy", "advantage", "log_ratio")} | {"values": []}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("damage", [no_samples, no_metrics, one_empty_response, no_numbers])
def test_missing_parts(page: Page, make_run: Make, damage: Callable[[Path], None]) -> None:
    run = make_run(steps=3)
    damage(run)
    page.open(write_report([run]))
    if damage is no_numbers:
        assert len(page.browser.find_elements("css selector", "#response .token.unknown")) == 14
    if damage is one_empty_response:
        assert page.text("#token") == "The response has no tokens."
    assert page.js("return document.querySelectorAll('.missing, .note').length") > 0


@pytest.mark.parametrize("critics", [0, 1, 3])
def test_other_numbers_of_critics(page: Page, make_run: Make, critics: int) -> None:
    page.open(write_report([make_run(critics=critics, steps=3)]))
    assert page.js("return document.getElementById('values').hidden") == (critics == 0)
    labels = page.js("return [...document.querySelectorAll('#token th')].map(e => e.textContent)")
    assert [label for label in labels if label.startswith("V of")] == [f"V of critic {m}" for m in range(critics)]


def test_several_runs(page: Page, make_run: Make, tmp_path: Path) -> None:
    runs = [make_run(f"run-{i}", seed=i, critics=2 - i) for i in range(3)]
    page.open(write_report(runs, tmp_path / "all.html")).wait_for("#learning .legend")
    assert page.js("return document.querySelectorAll('#run h1').length") == 3
    legend = page.js("return [...document.querySelectorAll('#learning .plot')][0].textContent")
    for name in ("run-0", "run-1", "run-2"):
        assert name in legend
    runs_of = "return [...document.getElementById('samples').options].length"
    assert page.js(runs_of) == 3 * 96
    page.choose("filter-run", "1")
    assert page.js(runs_of) == 96
    assert "run-1" in page.text("#sample-facts")


@pytest.mark.slow
def test_a_thousand_samples_of_five_hundred_tokens(page: Page, make_run: Make) -> None:
    """The token view is there within two seconds, the median of three."""
    report = write_report([make_run(steps=50, per_step=20, tokens=500)])
    took = []
    for _ in range(3):
        page.open(report)
        assert page.js("return document.querySelectorAll('#response .token').length") == 500
        assert page.js("return document.getElementById('samples').options.length") == 1000
        took.append(page.js("return performance.getEntriesByName('tokens-ready')[0].startTime"))
    print(f"{report.stat().st_size / 1e6:.1f} MB, token view after {sorted(round(t) for t in took)} ms")
    assert statistics.median(took) < 2000

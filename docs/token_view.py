"""Take the README's picture of the token view from a run's report, with a headless Chromium.

asyppo train --run_name asyppo-0
python docs/token_view.py runs/asyppo-0
"""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from asyppo.report import write_report
from asyppo.report.runs import FLAGS, Run, Sample, read_run
from asyppo.report.tokens import choose

SHOW = """
const list = document.getElementById('samples');
list.value = String(arguments[0]);
list.dispatchEvent(new Event('change'));
document.querySelector('#colour input[value=std]').click();
document.activeElement.blur();
const viewer = document.querySelector('.viewer');
viewer.scrollIntoView({block: 'center', behavior: 'instant'});
const box = viewer.getBoundingClientRect();
return [box.x, box.y + scrollY, box.width, box.height];
"""


def telling(run: Run) -> int:
    """Return the number in the page of a late response of which both masks took tokens and whose σ differs most."""

    def differing(sample: Sample) -> float:
        marked = all((~sample.flags[name]).sum() >= 2 for name in FLAGS)
        late = sample.step > run.last_step / 2
        return float(np.ptp(sample.columns["std"])) if sample.split == "train" and marked and late else -1.0

    return int(np.argmax([differing(sample) if sample.tokens else -1 for _, sample in choose([run])]))


def main(path: Path) -> None:
    """Write ``docs/token_view.png``."""
    report, number = write_report([path]), telling(read_run(path))
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or sys.exit("needs chromium and chromium-driver")
    with tempfile.TemporaryDirectory() as profile:
        flags = ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "window-size=1180,1000")
        for flag in (*flags, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        browser = Chrome(options=options, service=Service(shutil.which("chromedriver")))
        browser.get(report.resolve().as_uri())
        x, y, width, height = browser.execute_script(SHOW, number)
        browser.execute_async_script("setTimeout(arguments[0], 1000)")  # the chart of values is drawn
        clip = {"x": x - 8, "y": y - 8, "width": width + 16, "height": height + 16, "scale": 1.25}
        picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        browser.quit()
    Path(__file__).with_suffix(".png").write_bytes(base64.b64decode(picture["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

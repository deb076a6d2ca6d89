"""The pictures of a report: its head, and any of its parts, as PNG files.

    python docs/screenshot.py RUN_DIR              # docs/report.png: answer and leaderboard
    python docs/screenshot.py RUN_DIR --part conditioning --out /tmp/conditioning.png

Needs Chromium (`apt-get install chromium`) and playwright (in the development set-up).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEAD_HEIGHT, PART_HEIGHT = 1180, 1150, 1300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--part", default="", help="id of a heading; default: the head of the page")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("report.png"))
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        parser.error("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start as root, where containers run.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEAD_HEIGHT})
        page.goto((options.run_dir / "report.html").resolve().as_uri())
        page.wait_for_load_state("networkidle")
        clip = {"x": 0.0, "y": 0.0, "width": WIDTH, "height": HEAD_HEIGHT}
        if options.part:
            top = page.evaluate(
                "id => document.getElementById(id).getBoundingClientRect().top", options.part
            )
            clip |= {"y": top, "height": PART_HEIGHT}
        page.screenshot(path=options.out, clip=clip, full_page=True)
        browser.close()
    print(options.out)


if __name__ == "__main__":
    main()

"""Make the pictures in docs/report.md, ``docs/report-espo.png`` and ``docs/report-sspo.png``.

    python tools/make_report_pictures.py [FOLDER]    # two minutes; needs chromium

For each objective, trains the demo for a few steps, makes the report, opens it in chromium at the newest response with
both clipped and unclipped segments, and selects the token with the highest entropy in a clipped segment.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

from tests.report.browser import CHROMIUM, Page, with_page  # noqa: E402 (tests are not an installed package)

STEPS = 20
COLORS = 256
OBJECTIVES = ("espo", "sspo")


@dataclass(frozen=True)
class View:
    """What the picture shows: indices of the step, of the response in the step, and of the selected token."""

    step: int
    sample: int
    token: int


def train(objective: str, folder: Path) -> None:
    """Train the demo for ``STEPS`` steps."""
    settings = [f"train.steps={STEPS}", "evaluate.every=0", "checkpoint.export=false", f"log.path={folder}"]
    overlay = f"configs/objective/{objective}.toml"
    words = [sys.executable, "-m", "megatron_rl", "train", "configs/demo.toml", overlay, *settings]
    subprocess.run(words, cwd=ROOT, check=True)


def find_view(run: Path) -> View:
    """Return the newest response with both kinds of segments, and its clipped token with the highest entropy."""
    lines = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    for step in reversed(range(len(lines))):
        for number, sample in enumerate(lines[step]["samples"]):
            clipped = sample["segments"]["clipped"]
            if any(clipped) and not all(clipped):
                inside = [index for index, segment in enumerate(sample["segment"]) if clipped[segment]]
                return View(step, number, max(inside, key=lambda index, of=sample: of["entropy"][index]))
    raise SystemExit(f"{run}: no response with clipped and unclipped segments; train for more steps")


def take(report: Path, view: View, picture: Path) -> None:
    """Open the page, show the view and write a screenshot of the viewer."""

    async def use(page: Page) -> None:
        await page.run(f"update({{step: {view.step}, sample: {view.sample}}})")
        find = f"document.querySelector('#tokens [data-token=\"{view.token}\"]')"
        await page.run(f"{find}.dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))")
        await page.screenshot(picture, "#viewer")
        if page.complaints:
            raise SystemExit(f"errors in {report}: {page.complaints}")

    with_page(report, use)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLORS).save(picture, optimize=True)


def main() -> None:
    """Make both pictures."""
    parser = argparse.ArgumentParser(description="Make the pictures of docs/report.md.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs", help="folder of the pictures")
    folder = parser.parse_args().folder
    if CHROMIUM is None:
        raise SystemExit("no chromium on this machine; on Debian: apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for objective in OBJECTIVES:
            run, page = Path(scratch) / objective, Path(scratch) / f"{objective}.html"
            train(objective, run)
            words = [sys.executable, "-m", "megatron_rl", "report", str(run), "--output", str(page)]
            subprocess.run(words, cwd=ROOT, check=True)
            picture = folder / f"report-{objective}.png"
            take(page, find_view(run), picture)
            print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

"""Make the pictures of docs/report.md, ``docs/report-espo.png`` and ``docs/report-sspo.png``.

    python tools/make_report_pictures.py [FOLDER]    # two minutes; needs chromium

Trains the demo for a few steps under each objective, makes the report, opens it, goes to the newest response of which
some segments were clipped and some were not, and points at the token of the highest entropy in a clipped segment.
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

from tests.report.browser import CHROMIUM, Page, with_page  # noqa: E402 (tests are no installed package)

STEPS = 20
COLORS = 256
OBJECTIVES = ("espo", "sspo")


@dataclass(frozen=True)
class View:
    """Where the picture is taken: numbers of the step, of the response in it, of the token in that."""

    step: int
    sample: int
    token: int


def train(objective: str, folder: Path) -> None:
    """Run the demo for ``STEPS`` steps."""
    settings = [f"train.steps={STEPS}", "evaluate.every=0", "checkpoint.export=false", f"log.path={folder}"]
    overlay = f"configs/objective/{objective}.toml"
    words = [sys.executable, "-m", "megatron_rl", "train", "configs/demo.toml", overlay, *settings]
    subprocess.run(words, cwd=ROOT, check=True)


def find_view(run: Path) -> View:
    """Return the newest response with both kinds of segments, and its most uncertain clipped token."""
    lines = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    for step in reversed(range(len(lines))):
        for number, sample in enumerate(lines[step]["samples"]):
            clipped = sample["segments"]["clipped"]
            if any(clipped) and not all(clipped):
                inside = [place for place, segment in enumerate(sample["segment"]) if clipped[segment]]
                return View(step, number, max(inside, key=lambda place, of=sample: of["entropy"][place]))
    raise SystemExit(f"{run}: no response with clipped and unclipped segments; train for more steps")


def take(report: Path, view: View, picture: Path) -> None:
    """Open the page, go there and write the viewer as PNG."""

    async def use(page: Page) -> None:
        await page.run(f"update({{step: {view.step}, sample: {view.sample}}})")
        find = f"document.querySelector('#tokens [data-token=\"{view.token}\"]')"
        await page.run(f"{find}.dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))")
        await page.screenshot(picture, "#viewer")
        if page.complaints:
            raise SystemExit(f"{report} complains: {page.complaints}")

    with_page(report, use)
    with Image.open(picture) as taken:
        taken.convert("RGB").quantize(COLORS).save(picture, optimize=True)


def main() -> None:
    """Make both pictures."""
    parser = argparse.ArgumentParser(description="Make the pictures of docs/report.md.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs", help="where the pictures go")
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

"""The page, read as text and in a real browser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_rl.cli import main
from tests.report.browser import CHROMIUM, Page, with_page
from tests.report.folders import sample, tokens, write_run

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def evil_runs(folder: Path) -> list[Path]:
    """Return two runs of two objectives, whose every text tries to be markup."""
    runs = []
    for name in ("espo", "sspo"):
        recorded = [
            tokens(
                step, sample(f"{name}-{step}-0", ["Hi", EVIL, " ", "\n"], prompt=EVIL), sample("b", ["x", "y"], -2.0)
            )
            for step in range(3)
        ]
        run = write_run(
            folder / f"{name}<img src=x onerror=owned()>",
            recorded=recorded,
            objective__name=name,
            optimizer__schedule=f"{name}{EVIL}",
        )
        worst = {"sample": EVIL, "position": 1, "text": EVIL, "before": EVIL, "rollout_logprob": -1.0}
        found = {"step": 2, "verdict": f"verdict {EVIL}", "worst_tokens": [{**worst, "trainer_logprob": -1.25}]}
        (run / "mismatch.json").write_text(json.dumps(found))
        runs.append(run)
    return runs


class Tags(HTMLParser):
    """Collects every element of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def page(tmp_path) -> Path:
    file = tmp_path / "report.html"
    assert main(["report", *map(str, evil_runs(tmp_path)), "--output", str(file)]) == 0
    return file


def test_the_page_is_whole_by_itself_and_no_text_of_a_run_is_markup(page):
    html = page.read_text()
    tags = Tags()
    tags.feed(html)
    assert [tag for tag, _ in tags.found].count("script") == 2  # data and viewer
    assert not [tag for tag, _ in tags.found if tag in ("img", "link", "iframe", "object", "embed")]
    assert not [attributes for _, attributes in tags.found if any(name in ("src", "onerror") for name in attributes)]
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in tags.found)
    assert EVIL not in html
    data = json.loads(re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)[0])
    assert data["runs"][0]["steps"][0]["samples"][0]["text"][1] == EVIL


def test_the_page_shows_settings_curves_clips_and_times(page):
    html = page.read_text()
    for plot in ("reward_mean", "clipped_by_length", "clipped_by_entropy", "mismatch_max", "phases"):
        assert f'data-plot="{plot}"' in html
    assert "<td>objective.name</td><td>espo</td><td>sspo</td>" in html
    assert "<td>0.25</td>" in html  # the worst token's gap


def test_runs_without_tokens_are_shown_without_a_viewer(tmp_path, capsys):
    run = write_run(tmp_path / "old")
    file = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(file)]) == 0
    assert "None of these runs wrote tokens" in file.read_text()
    assert "no tokens.jsonl" in file.read_text()
    assert str(file) in capsys.readouterr().out


def test_a_run_that_has_not_finished_a_step_is_shown(tmp_path):
    run = write_run(tmp_path / "young", [])
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    assert "metrics.jsonl has no whole line yet" in (tmp_path / "report.html").read_text()


def test_what_cannot_be_reported_is_one_clear_error(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", str(run), "--output", str(tmp_path / "none" / "report.html")]) == 2
    assert "name another place: --output" in capsys.readouterr().err


def test_plots_alone_as_png(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, evil_runs(tmp_path)), "--png", "plots"]) == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"reward_mean.png", "clipped_by_entropy.png", "phases.png"} <= names
    assert not (tmp_path / "report.html").exists()


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


@needs_chromium
def test_stepping_changes_what_a_browser_shows_and_nothing_is_fetched(page):
    async def use(shown: Page) -> None:
        assert await shown.text("#where") == "step 0 (1 of 3 shown)"
        assert "espo-0-0" in await shown.text("#facts")
        tokens_shown = await shown.run("[...document.querySelectorAll('.token')].map((token) => token.textContent)")
        assert tokens_shown == ["Hi", EVIL, " ", "\u23ce\n"]
        assert await shown.text("#prompt") == EVIL
        clipped = await shown.run("[...document.querySelectorAll('.token.clipped')].length")
        assert clipped == 3
        assert await shown.text("#segments tr:nth-child(2) td:last-child") == "clipped"
        assert "+10.5 %" in await shown.text("#segments tr:nth-child(2)")

        await shown.run("document.getElementById('next').click()")
        assert await shown.text("#where") == "step 1 (2 of 3 shown)"
        assert "espo-1-0" in await shown.text("#facts")
        for _ in range(5):
            await shown.run("document.getElementById('next').click()")
        assert await shown.text("#where") == "step 2 (3 of 3 shown)"
        await shown.run("document.querySelector('#responses [data-sample=\"1\"]').click()")
        assert "advantage \u22122" in await shown.text("#facts")
        assert await shown.run("document.querySelectorAll('.token').length") == 2

        choose = "document.getElementById('{0}').value = '{1}';"
        choose += " document.getElementById('{0}').dispatchEvent(new Event('change'))"
        await shown.run(choose.format("run", 1))
        await shown.run("document.querySelector('#responses [data-sample=\"0\"]').click()")
        assert "sspo-2-0" in await shown.text("#facts")
        color = "getComputedStyle(document.querySelectorAll('.token')[3]).backgroundColor"
        before = await shown.run(color)
        await shown.run(choose.format("colour", "gap"))
        assert await shown.run(color) != before
        bubbling = "new MouseEvent('mouseover', {bubbles: true})"
        await shown.run(f"document.querySelectorAll('.token')[1].dispatchEvent({bubbling})")
        assert "log-prob: rollout" in await shown.text("#detail")

        assert await shown.run("document.title") == "megatron-rl report"
        assert await shown.run("document.documentElement.scrollWidth") <= 1280
        assert shown.complaints == []
        assert [request for request in shown.requests if not request.startswith("file:")] == []

    with_page(page, use)


@needs_chromium
def test_a_script_that_got_into_the_page_would_not_run(page):
    html = page.read_text().replace("<h1>", "<script>document.title='owned'</script><h1>")
    page.write_text(html)

    async def use(shown: Page) -> None:
        assert await shown.run("document.title") == "megatron-rl report"
        assert any("Content Security Policy" in complaint for complaint in shown.complaints)

    with_page(page, use)

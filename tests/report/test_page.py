"""The report page, as text and in a browser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_rl.cli import main
from tests.report.browser import CHROMIUM, Page, with_page
from tests.report.folders import metrics, sample, tokens, write_run

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def evil_runs(folder: Path) -> list[Path]:
    """Return two runs with two objectives in which every text is malicious markup."""
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


def test_the_page_is_self_contained_and_escapes_all_text(page):
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


def test_numbers_that_an_objective_adapts_have_a_plot(tmp_path):
    lines = [metrics(step, **{"objective/multiplier": 0.04 + step, "entropy_coefficient": 0.01}) for step in range(3)]
    run = write_run(tmp_path / "run", lines)
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    html = (tmp_path / "report.html").read_text()
    for plot in ("objective_multiplier", "entropy_coefficient"):
        assert f'data-plot="{plot}"' in html


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
    assert "metrics.jsonl has no complete line yet" in (tmp_path / "report.html").read_text()


def test_invalid_folders_and_files_are_one_error(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    page = run / "config.json" / "report.html"
    assert main(["report", str(run), "--output", str(page)]) == 2
    said = capsys.readouterr().err
    assert f"cannot write the report {page}: " in said
    assert "give another file: --output" in said


def test_the_folder_of_the_page_is_created(tmp_path):
    run, page = write_run(tmp_path / "run"), tmp_path / "new" / "report.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert page.is_file()


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


@needs_chromium
@pytest.mark.processes
def test_the_viewer_steps_through_responses_and_fetches_nothing(page):
    async def use(browser: Page) -> None:
        assert await browser.text("#where") == "step 0 (1 of 3 shown)"
        assert "espo-0-0" in await browser.text("#facts")
        tokens_shown = await browser.run("[...document.querySelectorAll('.token')].map((token) => token.textContent)")
        assert tokens_shown == ["Hi", EVIL, " ", "\u23ce\n"]
        assert await browser.text("#prompt") == EVIL
        clipped = await browser.run("[...document.querySelectorAll('.token.clipped')].length")
        assert clipped == 3
        assert await browser.text("#segments tr:nth-child(2) td:last-child") == "clipped"
        assert "+10.5 %" in await browser.text("#segments tr:nth-child(2)")

        await browser.run("document.getElementById('next').click()")
        assert await browser.text("#where") == "step 1 (2 of 3 shown)"
        assert "espo-1-0" in await browser.text("#facts")
        for _ in range(5):
            await browser.run("document.getElementById('next').click()")
        assert await browser.text("#where") == "step 2 (3 of 3 shown)"
        await browser.run("document.querySelector('#responses [data-sample=\"1\"]').click()")
        assert "advantage \u22122" in await browser.text("#facts")
        assert await browser.run("document.querySelectorAll('.token').length") == 2

        choose = "document.getElementById('{0}').value = '{1}';"
        choose += " document.getElementById('{0}').dispatchEvent(new Event('change'))"
        await browser.run(choose.format("run", 1))
        await browser.run("document.querySelector('#responses [data-sample=\"0\"]').click()")
        assert "sspo-2-0" in await browser.text("#facts")
        color = "getComputedStyle(document.querySelectorAll('.token')[3]).backgroundColor"
        before = await browser.run(color)
        await browser.run(choose.format("color", "gap"))
        assert await browser.run(color) != before
        bubbling = "new MouseEvent('mouseover', {bubbles: true})"
        await browser.run(f"document.querySelectorAll('.token')[1].dispatchEvent({bubbling})")
        assert "log-prob: rollout" in await browser.text("#detail")

        assert await browser.run("document.title") == "megatron-rl report"
        assert await browser.run("document.documentElement.scrollWidth") <= 1280
        assert browser.complaints == []
        assert [request for request in browser.requests if not request.startswith("file:")] == []

    with_page(page, use)


@needs_chromium
@pytest.mark.processes
def test_keys_change_what_is_shown_and_the_address_is_a_link_to_it(page):
    async def press(browser: Page, key: str, selector: str = "body") -> None:
        event = f"new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}})"
        await browser.run(f"document.querySelector('{selector}').dispatchEvent({event})")

    async def use(browser: Page) -> None:
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "]"):
            await press(browser, key)
        assert await browser.text("#where") == "step 1 (2 of 3 shown)"
        assert await browser.text("#responses [aria-pressed=true]") == "2 \u25bc"
        assert await browser.run("location.hash") == "#view=0,1,1,entropy"
        await press(browser, "ArrowRight", "#color")  # a control keeps its keys
        assert await browser.text("#where") == "step 1 (2 of 3 shown)"
        await browser.run("location.hash = '#view=1,2,0,gap'")
        await browser.run("new Promise((done) => setTimeout(done, 100))")
        assert "sspo-2-0" in await browser.text("#facts")
        assert await browser.run("document.getElementById('color').value") == "gap"
        for broken in ("#view=9,9,9,nothing", "#view=", "#view=-1,x,-1,__proto__"):
            await browser.run(f"location.hash = '{broken}'")
            await browser.run("new Promise((done) => setTimeout(done, 100))")
        assert browser.complaints == []

    with_page(page, use)


@needs_chromium
@pytest.mark.processes
@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_width_in_both_themes(page, width, scheme):
    async def use(browser: Page) -> None:
        await browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 640
        )
        assert await browser.run("document.documentElement.scrollWidth") <= width
        filters = await browser.run("getComputedStyle(document.documentElement).filter")
        assert (filters == "none") == (scheme == "light")
        assert browser.complaints == []

    with_page(page, use)


@needs_chromium
@pytest.mark.processes
def test_the_content_security_policy_blocks_injected_scripts(page):
    html = page.read_text().replace("<h1>", "<script>document.title='owned'</script><h1>")
    page.write_text(html)

    async def use(browser: Page) -> None:
        assert await browser.run("document.title") == "megatron-rl report"
        assert any("Content Security Policy" in complaint for complaint in browser.complaints)

    with_page(page, use)

"""The live page: what its server answers, and how a browser follows a run."""

import asyncio
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.report.live import LivePage, make_server
from megatron_rl.report.main import _make_report
from tests.report.browser import CHROMIUM, Page, with_page
from tests.report.folders import metrics, sample, tokens, write_run

pytestmark = pytest.mark.processes


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", recorded=[tokens(step, sample(f"r{step}", ["Hi", "!"])) for step in range(3)])


@pytest.fixture
def port(run) -> Iterator[int]:
    """The port of a server of the run's page."""
    server = make_server(LivePage([run], lambda: _make_report([run]).html(is_live=True)), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def write_step(run: Path, step: int) -> None:
    """Append a step as a running trainer does."""
    for name, entry in (("tokens.jsonl", tokens(step, sample(f"r{step}", ["Hi"]))), ("metrics.jsonl", metrics(step))):
        with (run / name).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def answer(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def test_the_page_has_the_newest_step_and_other_requests_are_refused(run, port):
    assert "r3" not in answer(port, "/")[1]
    write_step(run, 3)
    status, html = answer(port, "/")
    assert status == 200
    assert '"id":"r3"' in html
    assert answer(port, "/", host=f"localhost:{port}")[0] == 200
    assert answer(port, "/", host="evil.example")[0] == 403
    assert answer(port, "/../config.json")[0] == 404
    assert answer(port, "/", "POST")[0] == 501


def test_the_last_page_stays_while_a_folder_cannot_be_read(run, port, capsys):
    before = answer(port, "/")[1]
    run.rename(run.with_name("moved"))
    assert answer(port, "/") == (200, before)
    assert "is not a run folder" in capsys.readouterr().err
    run.with_name("moved").rename(run)
    assert answer(port, "/") == (200, before)


def test_a_change_is_one_event(run, port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/events", headers={"Host": f"127.0.0.1:{port}"})
    stream = connection.getresponse()
    assert stream.headers["Content-Type"] == "text/event-stream"
    assert stream.readline() == b":\n"
    write_step(run, 3)
    lines = [stream.readline().strip() for _ in range(7)]
    assert lines.count(b"data: changed") == 1
    connection.close()


def test_a_page_without_server_has_no_live_script(run, tmp_path, capsys):
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert "EventSource" not in html
    assert "connect-src" not in html
    assert main(["report", str(run), "--serve", "--output", "x"]) == 2
    assert main(["report", str(tmp_path), "--serve"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_signal_ends_the_server(run):
    command = [sys.executable, "-m", "megatron_rl", "report", str(run), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_a_browser_follows_the_run_and_asks_nobody_else(run, port):
    async def until(browser: Page, selector: str, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in await browser.text(selector):
            assert time.monotonic() < deadline, await browser.text(selector)
            await asyncio.sleep(0.1)

    async def use(browser: Page) -> None:
        await until(browser, "#live", "live, updated")
        for _ in range(2):
            await browser.run("document.getElementById('next').click()")
        assert await browser.text("#where") == "step 2 (3 of 3 shown)"
        write_step(run, 3)
        await until(browser, "#where", "step 3 (4 of 4 shown)")  # the newest step is followed
        assert "4 of 3" in await browser.text("#runs")
        await browser.run("document.getElementById('previous').click()")
        await browser.run("document.getElementById('previous').click()")
        assert "r1" in await browser.text("#facts")
        write_step(run, 4)
        await until(browser, "#where", "step 1 (2 of 5 shown)")  # an older one stays
        assert "r1" in await browser.text("#facts")
        assert browser.complaints == []
        assert {request.split("/")[2] for request in browser.requests} == {f"127.0.0.1:{port}"}

    with_page(f"http://127.0.0.1:{port}/", use)

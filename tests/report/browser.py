"""A headless Chromium that opens one page, through its devtools protocol; ended with everything it started."""

import asyncio
import base64
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import psutil

Result = TypeVar("Result")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_SECONDS = 60.0


class Page:
    """A page that is open, what it complained about and what it asked the network for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._last = socket, 0
        self.complaints: list[str] = []
        self.requests: list[str] = []

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=PATIENCE_SECONDS)
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        name, told = message.get("method"), message.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif name == "Log.entryAdded" or (name == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning")):
            self.complaints.append(str(told))
        elif name == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    async def run(self, script: str) -> Any:
        """Return the value of an expression."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def text(self, selector: str) -> str:
        """Return the text of the first element that a selector finds."""
        return str(await self.run(f"document.querySelector({selector!r}).textContent"))

    async def screenshot(self, file: Path, selector: str | None = None) -> None:
        """Write the whole page, or the first element that a selector finds, as PNG."""
        find = f"document.querySelector({selector!r})" if selector else "document.documentElement"
        x, y, width, height = await self.run(
            f"(() => {{ const r = {find}.getBoundingClientRect();"
            " return [r.x + scrollX, r.y + scrollY, r.width, r.height]; })()"
        )
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        shot = await self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.asynccontextmanager
async def _opened(file: Path | str) -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []  # which root cannot have
        words = [CHROMIUM, "--headless", *sandbox, "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        words += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "--window-size=1280,900", "about:blank"]
        process = psutil.Popen(words, stdout=-3, stderr=-3)
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    (target,) = [t for t in await answer.json() if t["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=1 << 28) as socket:
                    page = Page(socket)
                    for domain in ("Runtime", "Log", "Network", "Page"):
                        await page.call(f"{domain}.enable")
                    await page.call("Page.navigate", url=file if isinstance(file, str) else file.resolve().as_uri())
                    deadline = time.monotonic() + PATIENCE_SECONDS
                    while not await page.run("document.readyState == 'complete' && location.href != 'about:blank'"):
                        assert time.monotonic() < deadline, "the page does not load"
                        await asyncio.sleep(0.05)
                    yield page
        finally:
            family = [*process.children(recursive=True), process]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=10)


async def _port(file: Path, process: psutil.Popen) -> int:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not file.exists() or "\n" not in file.read_text():
        assert process.poll() is None, "chromium ended"
        assert time.monotonic() < deadline, "chromium does not answer"
        await asyncio.sleep(0.05)
    return int(file.read_text().splitlines()[0])


def with_page(file: Path | str, use: Callable[[Page], Awaitable[Result]]) -> Result:
    """Open a file or a URL, use it, close the browser; return what the use returned."""

    async def whole() -> Result:
        async with _opened(file) as page:
            return await use(page)

    return asyncio.run(whole())

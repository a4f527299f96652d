"""For all tests: hypothesis without deadlines, ranks forked without threads, and the option ``--quick``.

``--quick`` leaves out the tests with the marker ``processes``, and fails any other test that starts a Python process,
forks, or listens on a port.
"""

import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import PurePath

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests that start no process and no server")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        config.pluginmanager.register(Quick())


class Quick:
    """Deselects tests with the marker ``processes`` and makes sure that the others do not need it."""

    def __init__(self) -> None:
        self.found: list[str] = []
        """What the running test did that needs the marker."""
        sys.addaudithook(self.audit)
        start = BaseProcess.start

        def noted_start(process: BaseProcess) -> None:
            self.found.append("a process of multiprocessing")
            start(process)

        setattr(BaseProcess, "start", noted_start)  # noqa: B010 (the audit hook does not see processes that are spawned)

    def audit(self, event: str, arguments: tuple[object, ...]) -> None:
        """Note forks, Python processes and ports."""
        if event in ("os.fork", "os.posix_spawn", "socket.bind"):
            self.found.append(event)
        elif event == "subprocess.Popen" and PurePath(str(arguments[0])).name.startswith("python"):
            self.found.append("a Python process")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("processes")])
        items[:] = [item for item in items if not item.get_closest_marker("processes")]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        yield
        self.check()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        yield
        self.check()

    def check(self) -> None:
        """Fail the running test if it did something that needs the marker."""
        found = sorted(set(self.found))
        self.found.clear()
        assert not found, f"this test needs the marker processes: {', '.join(found)}"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch from starting threads in this process: forked ranks would not have them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

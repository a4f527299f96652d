"""For all tests: hypothesis without deadlines, ranks forked without threads, and the option ``--quick``.

``--quick`` leaves out the tests with the marker ``processes``, and fails any other test that starts a process, forks,
or listens on a port.
"""

import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path, PurePath

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests that start no process and no server")


PROCESS_FOLDERS = {"contract", "e2e", "slurm"}
"""Folders of ``tests/`` whose tests all have the marker ``processes``; elsewhere modules and tests are marked."""
MACHINE_QUERIES = {"c++", "git", "ip", "uname"}
"""Programs that only answer what this machine has; a test that starts nothing else needs no marker."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if item.path.relative_to(tests).parts[0] in PROCESS_FOLDERS:
            item.add_marker("processes")


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
        """Note forks, processes and ports."""
        if event in ("os.fork", "socket.bind"):
            self.found.append(event)
        # From Python 3.13 on, subprocess starts programs by posix_spawn where it can.
        elif (
            event in ("subprocess.Popen", "os.posix_spawn")
            and (name := PurePath(str(arguments[0])).name) not in MACHINE_QUERIES
        ):
            self.found.append(f"the process {name}")

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

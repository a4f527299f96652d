"""The versions of megatron-core that this package was tested with."""

from importlib.metadata import version

TESTED = ("0.16", "0.17", "0.18", "0.19")
"""Releases by major and minor number; docs/compatibility.md has the runs."""


def megatron_release() -> tuple[int, int]:
    """Return major and minor version of the installed megatron-core.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    major, minor = version("megatron-core").split(".")[:2]
    return int(major), int(minor)


def untested_megatron() -> str | None:
    """Return why the installed megatron-core is refused, as one sentence; None if its release was tested.

    Workarounds in this package depend on the release: another one may compute wrong gradients without an error.
    """
    found = version("megatron-core")
    if ".".join(found.split(".")[:2]) in TESTED:
        return None
    return (
        f"megatron-core {found} is installed, which was not tested; install a release of {', '.join(TESTED)}, or write"
        " model.untested_megatron = true to run it at your own risk"
    )

"""The console of the commands that print tables."""

from rich.console import Console


def make_console() -> Console:
    """Return a console, with 160 columns if the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)

"""Plants the mistake that MEGATRON_RL_MISTAKE names. Python imports this file at startup if its folder is on the path.

The files of the package do not change: the source of one module is changed before it is compiled, in this process only.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

from tests.mutations.mistakes import MISTAKES, Mistake


class MistakenLoader(SourceFileLoader):
    """Compiles a module with one line replaced, without the bytecode cache."""

    def __init__(self, fullname: str, path: str, mistake: Mistake) -> None:
        super().__init__(fullname, path)
        self.mistake = mistake

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the mistaken module."""
        source = self.get_data(self.path).decode()
        assert source.count(self.mistake.right) == 1, f"{self.mistake.name} no longer fits {self.path}"
        return compile(source.replace(self.mistake.right, self.mistake.wrong), self.path, "exec")


class MistakenFinder(MetaPathFinder):
    """Finds the mistaken module and gives it a ``MistakenLoader``."""

    def __init__(self, mistake: Mistake) -> None:
        self.mistake = mistake

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec; None for all others."""
        if fullname != f"megatron_rl.{self.mistake.module}":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None, f"no module {fullname}"
        assert spec.origin is not None, f"{fullname} is not a file"
        spec.loader = MistakenLoader(fullname, spec.origin, self.mistake)
        return spec


for planted in (mistake for mistake in MISTAKES if mistake.name == os.environ.get("MEGATRON_RL_MISTAKE")):
    sys.meta_path.insert(0, MistakenFinder(planted))

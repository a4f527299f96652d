"""Lets the unmodified SGLang wheel start on a machine without a GPU. ``tools/sglang-cpu`` puts it into its environment.

SGLang imports packages that are built for CUDA, and on a CPU without AMX then uses none of them: its layers and its
attention fall back to PyTorch. So an import of one of those names gives an inert module, in every
process of that environment (a .pth file imports this one before anything else).
"""

import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

ABSENT = ("sgl_kernel", "torchvision", "triton")
"""CUDA packages that are not installed."""
PINNED_MEMORY = "sglang.srt.mem_cache.pool_host.common"
"""Registers host memory with CUDA when routed experts are to be returned; without CUDA there is nothing to register."""


MISSING = ("active",)
"""Names that the packages would not have here: SGLang asks triton for its active driver to see whether there is one."""


class Inert:
    """Anything at all: every attribute, item and call of it is inert again; as a decorator it changes nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> "Inert":
        if name.startswith("__") or name in MISSING:
            raise AttributeError(name)
        return Inert()

    def __call__(self, *args: object, **kwargs: object) -> object:
        return args[0] if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType) else Inert()

    def __getitem__(self, key: object) -> "Inert":
        return Inert()

    def __or__(self, other: object) -> "Inert":
        return Inert()

    __ror__ = __or__

    def __instancecheck__(self, instance: object) -> bool:
        return False

    def __mro_entries__(self, bases: object) -> tuple[type, ...]:
        return (Inert,)


class InertModule(types.ModuleType):
    """A module that has every name."""

    __version__ = "3.0.0"

    def __getattr__(self, name: str) -> Inert:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert()


class _Absent(MetaPathFinder, Loader):
    """Finds the absent packages and all their submodules."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return a spec for an absent name."""
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> InertModule:
        """Return the inert module."""
        return InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _Unregistered(MetaPathFinder):
    """Takes the CUDA call out of one module of SGLang, after that is imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Return the module's own spec, with a loader that changes it."""
        spec = PathFinder.find_spec(fullname, path) if fullname == PINNED_MEMORY else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Unregistering(fullname, spec.origin)
        return spec


class _Unregistering(SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        assert hasattr(module, "_cuda_host_register"), f"{PINNED_MEMORY} has changed: look for its CUDA calls"
        vars(module)["_cuda_host_register"] = lambda *_, **__: None


sys.meta_path.append(_Absent())
sys.meta_path.insert(0, _Unregistered())

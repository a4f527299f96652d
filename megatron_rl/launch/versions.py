"""The software that a run uses: printed by ``megatron-rl check`` and written to ``versions.json``."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_rl.ops.head import describe_backend
from megatron_rl.policy.backends import backends_for, describe_backends

REQUIRED = ("megatron-rl", "torch", "megatron-core", "transformers", "safetensors", "numpy", "pydantic", "aiohttp")
OPTIONAL = ("transformer-engine", "apex", "flash-attn", "liger-kernel", "sglang", "vllm")


def package_version(name: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def found_versions() -> dict[str, str | None]:
    """Return the version of everything that can change the numbers or the speed of a run; None if it was not found."""
    found: dict[str, str | None] = {"python": platform.python_version(), "machine": platform.machine()}
    found |= {name: package_version(name) for name in (*REQUIRED, *OPTIONAL)}
    found["cuda"] = torch.version.cuda
    found["gpus"] = _gpus()
    found["c++ compiler"] = _compiler()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    found |= describe_backends(backends_for(torch.bfloat16, device_type), device_type)
    found["vocabulary operation"] = describe_backend(device_type)
    return found


def _gpus() -> str | None:
    if not torch.cuda.is_available():
        return None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _compiler() -> str | None:
    """Return the first line of the C++ compiler's version; megatron-core compiles its helpers with it."""
    path = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return None
    output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    return output.splitlines()[0] if output else path

"""What software a run used: printed by ``megatron-rl check``, kept as ``versions.json`` in the run folder."""

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
    """Return everything that can change a run's numbers or speed; None for what was not found."""
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
    """Return the first line that the C++ compiler says about itself; megatron-core builds its helpers with one."""
    path = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    return said.splitlines()[0] if said else path

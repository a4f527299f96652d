"""How a server holds its weights, as far as it can be found out without loading them.

Tensors in another form than the server's are refused in the middle of a push, or copied without their scales.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client

UNKNOWN_METHOD = "unknown"
"""The method of a server whose tensors have scales, and of which nothing else is known."""
_CONFIG = "quantization_config"
_QUANTIZED_NAME = re.compile(r"weight_(scale|packed)|qweight|_blocks$")
"""Part of the names of parameters that SGLang and vLLM have only in quantized layers."""


@dataclass(frozen=True)
class HeldForm:
    """The form of a server's weights.

    Attributes:
        method: name of the quantization, as in ``quantization_config``; empty if the weights are not quantized.
        settings: the ``quantization_config`` of the server's model; None if there is none, or if it is not known.
        source: where this was found, for messages.
    """

    method: str
    settings: Mapping[str, Any] | None
    source: str


async def held_form(client: Client, *, read_names: bool = True) -> HeldForm | None:
    """Return how a server holds its weights; None if it does not tell.

    The embedded server reports it. SGLang and vLLM report the folder of their model, whose config.json is read if this
    machine has it, and an option of their command line. Otherwise the names of the tensors tell, which come with the
    checksums of all weights and take seconds.

    Args:
        client: the client of the server.
        read_names: whether to ask for the names of the tensors.

    Raises:
        RolloutError: the server does not answer.
    """
    info = await client.model_options()
    if _CONFIG in info:
        return _from_settings(info[_CONFIG], "its server info")
    option = info.get("quantization")
    config = Path(str(info.get("model_path") or "")) / "config.json"
    settings = await asyncio.to_thread(_read_settings, config)
    if isinstance(option, str) and option:
        return HeldForm(option, settings or None, "its option quantization")
    if settings is not None:
        return _from_settings(settings, str(config))
    if not read_names:
        return None
    name = next((name for name in await client.tensor_names() if _QUANTIZED_NAME.search(name)), None)
    return HeldForm("" if name is None else UNKNOWN_METHOD, None, f"its tensor {name}" if name else "its tensors")


def _from_settings(settings: object, source: str) -> HeldForm:
    if not isinstance(settings, Mapping) or not settings:
        return HeldForm("", None, source)
    return HeldForm(str(settings.get("quant_method") or UNKNOWN_METHOD), settings, f"quantization_config of {source}")


def _read_settings(config: Path) -> Mapping[str, Any] | None:
    """Return the quantization that a config.json declares, empty if it declares none; None if there is no such file."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8")).get(_CONFIG)
    except (OSError, ValueError, AttributeError):
        return None
    return settings if isinstance(settings, Mapping) else {}


class FormRefused(RolloutError):
    """The server holds its weights in another form than a push sends."""


FormJudge = Callable[[HeldForm], str | None]
"""Returns why a push cannot send weights to servers of this form; None if it can."""


async def require_form(client: Client, judge: FormJudge, *, read_names: bool = True) -> HeldForm | None:
    """Return how a server holds its weights, see ``held_form``.

    Raises:
        FormRefused: the judge refuses the server.
        RolloutError: the server does not answer.
    """
    held = await held_form(client, read_names=read_names)
    if held is not None and (problem := judge(held)) is not None:
        raise FormRefused(f"{client.url} {problem} (its form was found in {held.source})")
    return held

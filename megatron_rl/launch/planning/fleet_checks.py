"""Settings of the servers that contradict each other or the model."""

from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.fleet.sglang import NEVER_TIED, wrong_options
from megatron_rl.models.hf_mapping.rules import HFConfig
from megatron_rl.models.torch_dist import is_torch_dist


def check_fleet(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield the problems of engine, servers and weight transport."""
    rollout = loaded.run.rollout
    if not rollout.urls and not rollout.servers:
        yield (
            f"{loaded.describe('rollout.servers')} and rollout.urls is empty: nothing would sample;"
            " start at least one server, or write the URLs of running servers"
        )
    if not (rollout.urls or rollout.registry) and rollout.engine == "sglang":
        yield from _check_sglang(loaded)
    if not (rollout.urls or rollout.registry) and rollout.engine == "vllm" and not rollout.vllm_python:
        yield (
            f"{loaded.describe('rollout.engine')} runs in a separate environment; write its interpreter in"
            " rollout.vllm_python, or start the servers there and write their addresses in rollout.urls"
        )
    carrier = loaded.run.weights.carrier
    if rollout.engine == "vllm" and carrier not in ("auto", "disk"):
        yield f"{loaded.describe('weights.carrier')}: vLLM reads weights only from a folder; write disk or auto"
    if rollout.engine == "sglang" and carrier == "ipc":
        yield (
            f"{loaded.describe('weights.carrier')}: only the embedded server receives weights through shared memory;"
            " write distributed or auto"
        )
    if rollout.router is not None and rollout.engine == "vllm":
        yield f"{loaded.describe('rollout.router')} supports SGLang, not vLLM; leave it out"


def check_tied_head(loaded: Loaded[Run], hf: HFConfig) -> Iterator[str]:
    """Yield whether the engine lacks the output head of a tied model."""
    if loaded.run.rollout.engine == "sglang" and hf.get("tie_word_embeddings") and hf.get("model_type") in NEVER_TIED:
        yield (
            f"{loaded.describe('model.path')} ties its output head to the"
            f" embedding, which SGLang does not support for {hf['model_type']}: its head would have no weights;"
            " store the embedding as lm_head.weight too, and set tie_word_embeddings = false in config.json"
        )


def check_checkpoint_format(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield whether the engine cannot read the format of the model\'s checkpoint."""
    rollout = loaded.run.rollout
    if (
        rollout.engine == "sglang"
        and not (rollout.urls or rollout.registry)
        and is_torch_dist(Path(loaded.run.model.path))
    ):
        yield (
            f"{loaded.describe('model.path')} is a distributed checkpoint, which"
            " SGLang cannot read; convert it with megatron-rl convert megatron-to-hf, or start servers with its Hugging"
            " Face checkpoint and write their addresses in rollout.urls"
        )


def _check_sglang(loaded: Loaded[Run]) -> Iterator[str]:
    rollout = loaded.run.rollout
    if not rollout.sglang_python:
        yield (
            f"{loaded.describe('rollout.engine')} runs in a separate environment; write its interpreter in"
            " rollout.sglang_python, or start the servers there and write their addresses in rollout.urls"
        )
        return
    try:
        for name, why in wrong_options(rollout.sglang_python, rollout.sglang, rollout.environment):
            key = f"rollout.sglang.{name}"
            yield f"{key} ({loaded.origin(key)}) {why}"
    except ConfigError as error:
        yield f"{loaded.describe('rollout.sglang_python')}: {error}"

"""Whether the servers that a run starts can take the weights that it pushes."""

from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.models.encodings import QUANTIZATION_CONFIG
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.served_weights import ServedWeights, served_folder

_MAX_PROBLEMS = 3


def check_encoding(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield the problems of ``weights.encoding`` with the folder that started servers load."""
    run, folder = loaded.run, served_folder(loaded.run)
    key = "rollout.model_path" if run.rollout.model_path else "model.path"
    try:
        if run.rollout.model_path is not None:
            yield from _check_family(loaded, folder)
        served = ServedWeights.of(run)
        if run.rollout.urls or run.rollout.registry:  # the servers themselves are asked
            return
        settings = read_hf_config(folder).get(QUANTIZATION_CONFIG) or {}
        is_dequantized = run.rollout.engine == "embedded" and run.weights.encoding == "none"
        method = "" if is_dequantized else str(settings.get("quant_method") or "")
        if (problem := served.problem(method, settings)) is not None:
            yield f"{loaded.describe(key)}: {run.rollout.engine} would start a server that {problem}"
        elif any(folder.glob("*.safetensors")):
            for _, text in zip(range(_MAX_PROBLEMS), served.folder_problems(folder), strict=False):
                yield f"{loaded.describe(key)}: {text}; copy the checkpoint again"
    except DataError as error:
        yield str(error)


def _check_family(loaded: Loaded[Run], folder: Path) -> Iterator[str]:
    """Yield why the servers' checkpoint is of another model than the trained one."""
    trained, served = (family_of(read_hf_config(path)).hf_shapes() for path in (Path(loaded.run.model.path), folder))
    different = [name for name in sorted(trained.keys() | served.keys()) if trained.get(name) != served.get(name)]
    if different:
        name = different[0]
        yield (
            f"{loaded.describe('rollout.model_path')} is another model than model.path: {name} has shape"
            f" {served.get(name)} there and {trained.get(name)} here; write a checkpoint of the same model"
        )

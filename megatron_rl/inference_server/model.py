"""The embedded server's model: a Hugging Face causal language model whose weights can be replaced by checkpoint name.

Checkpoints contain each expert's matrices separately, while the model in memory has them fused. To find which elements
of which parameter a checkpoint tensor is, element numbers are passed through transformers' conversion for saving.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megatron_rl.errors import DataError
from megatron_rl.fleet.process import require_model
from megatron_rl.inference_server.masks import has_sliding_layers
from megatron_rl.inference_server.quantized_weights import QuantizedWeights
from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.inference_server.route_recorder import RouteRecorder
from megatron_rl.models.checkpoint_folders import has_weights, holds_hf_files, open_checkpoint
from megatron_rl.models.encodings import QUANTIZATION_CONFIG
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.tokenizers import has_tokenizer, open_tokenizer, stop_tokens
from megatron_rl.weights.checksum import SHA256, sha256, sums64
from megatron_rl.weights.dtypes import PLAIN


class ServedModel:
    """The model, its weights by checkpoint name, and their version."""

    def __init__(
        self,
        path: str,
        dtype: str,
        version: str,
        device: torch.device | None = None,
        *,
        trust_code: bool = False,
        dequantize: bool = False,
    ) -> None:
        """Load a checkpoint; with ``dequantize`` a quantized one is held, and updated, as if it were not."""
        require_model(path)
        self.path = path
        self.model = _read(Path(path), getattr(torch, dtype)).eval().to(device or torch.device("cpu"))
        self.model.requires_grad_(False)
        self.version = version
        self.tensors = checkpoint_views(self.model)
        """The model's weights by checkpoint name."""
        self.quantized = None if dequantize else QuantizedWeights.read(Path(path), self.device)
        folder = Path(path)
        self.tokenizer = open_tokenizer(folder, trust_code=trust_code) if has_tokenizer(folder) else None
        self.eos_ids = stop_tokens(folder, self.tokenizer)
        self.recorder = RouteRecorder(self.model)
        self.context_length = _context_length(self.model)
        self._staged: dict[str, Tensor] | None = None
        self._refusal = ""
        """Why the newest update was closed before its end."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    def text(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of tokens; empty if the model folder has no tokenizer."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens) if self.tokenizer else ""

    def begin_update(self) -> None:
        """Open a weight update; an earlier unfinished one is dropped."""
        self._staged = {}
        self._refusal = ""

    def drop_update(self) -> None:
        """Close the update and drop its tensors."""
        self._staged = None

    def require_update(self) -> None:
        """Check that an update is open.

        Raises:
            BadRequest: it is not.
        """
        if self._staged is None:
            reason = f"; the last one was closed: {self._refusal}" if self._refusal else ""
            raise BadRequest(f"a weight update must run between begin_weight_update and end_weight_update{reason}")

    def stage(self, named_tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Validate tensors and keep them until the update ends; return how many are staged.

        Raises:
            BadRequest: a tensor does not fit the model; this closes the update, and the weights do not change.
        """
        self.require_update()
        staged: dict[str, Tensor] = self._staged or {}
        self._staged = None
        try:
            self._stage(staged, named_tensors)
        except BadRequest as refusal:
            self._refusal = str(refusal)
            raise
        self._staged = staged
        return len(staged)

    def _stage(self, staged: dict[str, Tensor], named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named_tensors:
            self._require_fit(name, tensor)
            staged[name] = tensor

    def _require_fit(self, name: str, tensor: Tensor) -> None:
        """Check that a tensor of an update fits the model.

        Raises:
            BadRequest: it does not.
        """
        specs = self.quantized.specs if self.quantized else {}
        if name in specs:
            shape, accepted = specs[name][0], [specs[name][1]]
        elif self.quantized and name in self.quantized.encoding.names:
            label = self.quantized.encoding.format.label
            raise BadRequest(f"tensor {name!r} is not quantized, but this server holds it as {label}")
        elif name in self.tensors:
            shape, accepted = tuple(self.tensors[name].shape), list(PLAIN)
        else:
            raise BadRequest(
                f"unknown tensor {name!r}: this model has {len(self.tensors)}, like {_first(self.tensors)!r}"
            )
        if tensor.shape != shape:
            raise BadRequest(f"tensor {name!r} has shape {list(tensor.shape)}, this model's is {list(shape)}")
        if tensor.dtype not in accepted:
            raise BadRequest(
                f"tensor {name!r} is {dtype_name(tensor.dtype)}; send one of {', '.join(map(dtype_name, accepted))}"
            )
        values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch tests no float8
        if not bool(values.isfinite().all()):
            raise BadRequest(f"tensor {name!r} has values that are not finite; the weights are unchanged")

    def end_update(self) -> str:
        """Copy all staged tensors to the model; return a message with their number."""
        if self._staged is None:
            raise BadRequest("end_weight_update without begin_weight_update, or after a tensor that was refused")
        staged, self._staged = self._staged, None
        specs = self.quantized.specs if self.quantized else {}
        for name, tensor in staged.items():
            if name not in specs:
                self.tensors[name].copy_(tensor)
        if self.quantized is not None:
            self.quantized.install({name: tensor for name, tensor in staged.items() if name in specs}, self.tensors)
            return f"{len(staged)} tensors updated, {len(specs)} of the model's are quantized"
        return f"{len(staged)} of {len(self.tensors)} tensors updated"

    def load(self, path: str) -> str:
        """Replace the weights by those of a safetensors file or folder; return a message with their number."""
        source = Path(path)
        try:
            files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
            special = [file.name for file in files if not file.is_file()]
        except (OSError, ValueError) as error:
            raise BadRequest(f"cannot read {path[:200]!r}: {error}") from error
        if special:
            raise BadRequest(f"{special[0]} in {path} is no regular file; give a folder of safetensors files")
        if not files:
            raise BadRequest(f"no safetensors at {path}; give a file, or a folder that holds some")
        self.begin_update()
        for file in files:
            try:
                tensors = load_file(file)
            except (SafetensorError, OSError) as error:
                raise BadRequest(f"{file.name} is not a safetensors file: {error}") from error
            self.stage(tensors.items())
        return self.end_update()

    def checksums(self, algorithm: str = SHA256) -> dict[str, str]:
        """Return the checksum of each tensor, in the type it is held in: SHA-256, or ``sum64`` on the device."""
        held: Mapping[str, Tensor] = self.tensors
        if self.quantized is not None:
            weights = self.quantized.encoding.names
            plain = {name: tensor for name, tensor in self.tensors.items() if name not in weights}
            held = plain | self.quantized.tensors
        if algorithm == SHA256:
            return {name: sha256(tensor) for name, tensor in held.items()}
        return sums64({name: tensor.contiguous() for name, tensor in held.items()})


def _read(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model from a checkpoint of any supported format.

    Raises:
        DataError: the folder has no weights, or they cannot be read.
    """
    hf = read_hf_config(folder)
    if not has_weights(folder):
        raise DataError(f"no weights in {folder}: it has a config.json, but no *.safetensors; give a whole checkpoint")
    # transformers then uses eager or grouped_mm experts: batched_mm is 20 to 50 times slower on a CPU
    if holds_hf_files(folder) and QUANTIZATION_CONFIG not in hf:
        try:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except (OSError, SafetensorError) as error:
            raise DataError(f"the weights in {folder} cannot be read: {error}; copy the checkpoint again") from error
    family = family_of(hf)
    source = open_checkpoint(folder, family)
    source.check(family)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    stacks = family.fused_parts(required=True)
    with torch.no_grad():
        for name, view in checkpoint_views(model).items():
            parts = stacks.get(name, (name,))
            for part, target in zip(parts, view if name in stacks else (view,), strict=True):
                if part not in source.specs:
                    raise DataError(f"{folder} has no tensor {part}, which transformers' {type(model).__name__} needs")
                target.copy_(source.read(part))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch type."""
    return str(dtype).removeprefix("torch.")


def checkpoint_views(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every tensor of the checkpoint format by name, as a view: writing to it changes the model."""
    views: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.state_dict().items():
        if parameter.data_ptr() in seen:  # tied: the checkpoint has it once, under its first name
            continue
        seen.add(parameter.data_ptr())
        numbers = torch.arange(parameter.numel()).view(parameter.shape)
        for checkpoint_name, elements in revert_weight_conversion(model, {name: numbers}).items():
            views[checkpoint_name] = _view(parameter, elements, checkpoint_name)
    return views


def _view(parameter: Tensor, elements: Tensor, name: str) -> Tensor:
    """Return the view of the parameter whose elements have these numbers."""
    first = int(elements.flatten()[0])
    strides = [
        int(elements.select(dim, 1).flatten()[0]) - first if size > 1 else 1 for dim, size in enumerate(elements.shape)
    ]
    if not torch.equal(torch.arange(parameter.numel()).as_strided(elements.shape, strides, first), elements):
        raise DataError(f"{name} is not a regular part of the model's parameter: this architecture cannot be served")
    return parameter.as_strided(elements.shape, strides, parameter.storage_offset() + first)


def _context_length(model: PreTrainedModel) -> int:
    config = model.config.get_text_config().to_dict()
    limits = [config["max_position_embeddings"]]
    if config.get("use_sliding_window", True) and config.get("sliding_window") and not has_sliding_layers(model):
        limits.append(config["sliding_window"])  # up to its window a sliding layer equals a full one
    return min(limits)


def _first(tensors: Mapping[str, Tensor]) -> str:
    return next(iter(tensors))

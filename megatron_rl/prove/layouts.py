"""Layouts to prove, as in ``--layout tensor=2,expert=2``, and the default set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError

PARALLEL_SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "ranks")
SETTINGS: Mapping[str, tuple[str, str, type]] = {
    **{name: ("parallel", name, int) for name in PARALLEL_SIZES},
    "data": ("parallel", "data", int),
    "sequence": ("parallel", "sequence", bool),
    "distributed_optimizer": ("parallel", "distributed_optimizer", bool),
    "overlap_grad_reduce": ("parallel", "overlap_grad_reduce", bool),
    "packing": ("train", "packing", bool),
    "tokens": ("train", "tokens_per_microbatch", int),
    "recompute": ("model", "recompute", str),
    "dtype": ("model", "dtype", str),
}
"""Key of a layout -> section, key and type of the setting that it changes."""

DEFAULT: tuple[str, ...] = (
    "tokens=4096",
    "tokens=128",
    "packing=false",
    "recompute=full,tokens=256",
    "recompute=selective",
    "tensor=2",
    "tensor=2,expert_tensor=2,recompute=full",
    "tensor=2,expert_tensor=1",
    "pipeline=2,tokens=128",
    "pipeline=2,virtual_pipeline=2,tokens=128",
    "pipeline=3,tokens=128",
    "context=2",
    "context=2,packing=false",
    "expert=2",
    "data=2",
    "data=2,tokens=64,overlap_grad_reduce=true",
    "data=2,distributed_optimizer=false",
    "tensor=2,expert=2",
    "tensor=2,expert=2,recompute=full,tokens=128",
    "tensor=2,expert=2,packing=false",
    "tensor=2,pipeline=2,tokens=128",
    "tensor=2,context=2",
    "tensor=2,expert=2,context=2",
    "tensor=2,expert=2,data=2",
    "tensor=2,expert=4",
    "tensor=2,expert=2,pipeline=2,tokens=128",
    "pipeline=2,context=2,tokens=128",
    "pipeline=2,expert=2,tokens=128",
    "pipeline=2,virtual_pipeline=2,expert=2,tokens=128",
    "pipeline=2,data=2,tokens=64",
    "expert=2,context=2",
    "expert=4",
    "context=2,data=2",
    "context=4",
    "data=4,tokens=64",
)
"""Each axis and pairs of axes, as far as four ranks and a small model allow."""


@dataclass(frozen=True)
class LayoutRun:
    """A layout as written, and the run configuration with it."""

    text: str
    run: Run
    ranks: int


def layout_run(run: Run, text: str) -> LayoutRun:
    """Return the run with a layout. Sizes that the layout does not name are 1.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
    """
    changes: dict[str, dict[str, object]] = {"parallel": {}, "train": {}, "model": {}}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if key not in SETTINGS or not equals:
            raise ConfigError(f"--layout {text!r}: {word!r} is not a setting of a layout; write {', '.join(SETTINGS)}")
        section, name, kind = SETTINGS[key]
        changes[section][name] = _value(text, word, value, kind)
    parallel = {**dict.fromkeys(PARALLEL_SIZES[:5], 1), "expert_tensor": None, "sequence": None, **changes["parallel"]}
    data = parallel.pop("data", 1)
    shards = [int(str(parallel[name])) for name in ("tensor", "pipeline", "context")]
    dense = shards[0] * shards[1] * shards[2] * int(str(data))
    experts = int(str(parallel["expert"])) * int(str(parallel["expert_tensor"] or 1)) * shards[1]
    ranks = int(str(parallel.get("ranks") or max(dense, experts)))
    tree = run.model_dump()
    for section, settings in (changes | {"parallel": parallel | {"ranks": ranks}}).items():
        tree[section] |= settings
    if tree["model"]["dtype"] == "float64":  # megatron-core's optimizers do not support these in float64
        tree["parallel"]["distributed_optimizer"] = False
        tree["optimizer"]["clip_grad"] = 0.0
    return LayoutRun(text, Run.model_validate(tree), ranks)


def _value(text: str, word: str, value: str, kind: type) -> object:
    if kind is bool and value in ("true", "false"):
        return value == "true"
    if kind is int and value.isdigit():
        return int(value)
    if kind is str:
        return value
    raise ConfigError(f"--layout {text!r}: {word!r} needs {'true or false' if kind is bool else 'a number'}")


def reference(run: Run) -> LayoutRun:
    """Return the reference: one rank, float64, one sequence per row, no recomputation."""
    return layout_run(run, "packing=false,dtype=float64,recompute=none")


def layout_runs(run: Run, texts: Sequence[str]) -> list[LayoutRun]:
    """Return the runs with these layouts."""
    return [layout_run(run, text) for text in texts]

"""Which kind of checkpoint a folder holds."""

from pathlib import Path

from megatron_rl.policy.hf_files import HFSource
from megatron_rl.policy.names import read_hf_config
from megatron_rl.policy.names.rules import Family
from megatron_rl.policy.sources import Source


def open_source(folder: Path, family: Family) -> Source:
    """Return the tensors of a checkpoint folder; its config.json is in it in either case.

    Raises:
        DataError: the folder holds no checkpoint, or a file of it cannot be read.
    """
    return HFSource(folder, family, read_hf_config(folder))

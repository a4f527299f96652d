"""Arguments of ``megatron-rl convert``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.encodings import ENCODINGS

TO_MEGATRON, TO_HF, VERIFY, INSPECT = "hf-to-megatron", "megatron-to-hf", "verify", "inspect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of the verb and their arguments."""
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", help="default: megatron-to-hf, as in convert RUN TARGET"
    )

    def action(name: str, text: str) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}."
        added: argparse.ArgumentParser = actions.add_parser(name, help=text, description=description)
        return added

    to_hf = action(TO_HF, "write the weights of a run, a training checkpoint or torch_dist as a Hugging Face folder")
    _add_folders(to_hf, source="run folder, training checkpoint or torch_dist checkpoint", target="folder to write")
    to_hf.add_argument("--step", type=int, metavar="N", help="training checkpoint of a run folder (default: newest)")
    to_hf.add_argument("--encoding", choices=ENCODINGS, help="quantize all matrices that it can hold")
    to_hf.add_argument(
        "--fp8",
        action="store_true",
        help="quantize what was FP8 in the original, with its scales where they fit",
    )
    to_hf.add_argument(
        "--split-experts", action="store_true", help="write one tensor per expert, even if the source had them fused"
    )
    to_megatron = action(TO_MEGATRON, "write a Hugging Face folder as a distributed checkpoint (torch_dist)")
    _add_folders(to_megatron, source="Hugging Face folder", target="folder to write")
    verify = action(VERIFY, "compare two checkpoints of any format, tensor by tensor")
    _add_folders(verify, first="checkpoint of any format", second="checkpoint of any format")
    verify.add_argument(
        "--logits", metavar="PROMPT", help="also compare the log-probs of a prompt, text or token ids 3,1,4"
    )
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest allowed difference of log-probs, nats (default: %(default)s)",
    )
    _add_folders(action(INSPECT, "summarize a checkpoint from its headers"), folder="checkpoint of any format")
    for parallel in (to_megatron, to_hf, verify):
        parallel.add_argument(
            "--threads",
            type=int,
            default=min(4, os.cpu_count() or 1),
            help="files to process in parallel (default: %(default)s)",
        )


def _add_folders(parser: argparse.ArgumentParser, **folders: str) -> None:
    for name, text in folders.items():
        parser.add_argument(name, type=Path, metavar=name.upper(), help=text)


def with_action(words: Sequence[str]) -> list[str]:
    """Return the words with the default action, ``megatron-to-hf``, if they start with a folder."""
    actions = (TO_HF, TO_MEGATRON, VERIFY, INSPECT)
    starts_with_folder = bool(words) and not words[0].startswith("-") and words[0] not in actions
    is_mistyped = starts_with_folder and len(words) > 1 and not Path(words[0]).exists() and "/" not in words[0]
    return [TO_HF, *words] if starts_with_folder and not is_mistyped else list(words)

"""Command line of the checkpoint converter."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.inspect import describe
from megatron_rl.convert.verify import compare
from megatron_rl.errors import MegatronRLError

MAX_LINES = 20
"""Differences that ``verify`` prints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 1 if checkpoints differ, 2 for an error."""
    args = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        return int(args.run(args, console))
    except MegatronRLError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"convert: {error}", markup=False)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/convert.py", description="Checkpoints: Hugging Face <-> megatron-core")
    commands = parser.add_subparsers(required=True)
    threads = min(4, os.cpu_count() or 1)

    def command(name: str, run: object, text: str, *folders: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.set_defaults(run=run)
        for folder in folders:
            subparser.add_argument(folder, type=Path)
        return subparser

    to_megatron_parser = command(
        "hf-to-megatron", _to_megatron, "write a distributed checkpoint (torch_dist)", "source", "target"
    )
    to_hf_parser = command("megatron-to-hf", _to_hf, "write safetensors files", "source", "target")
    to_hf_parser.add_argument("--fp8", action="store_true", help="quantize matrices to FP8 in blocks of 128 x 128")
    to_hf_parser.add_argument(
        "--split-experts", action="store_true", help="write one tensor per expert, even if the source had them fused"
    )
    verify_parser = command(
        "verify", _verify, "compare two checkpoints of any format, tensor by tensor", "first", "second"
    )
    verify_parser.add_argument(
        "--logits", metavar="PROMPT", help="also compare the log-probs of a prompt, text or token ids 3,1,4"
    )
    verify_parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest allowed difference of log-probs, nats (default %(default)s)",
    )
    command("inspect", _inspect, "summarize a checkpoint from its headers", "folder")
    for parallel in (to_megatron_parser, to_hf_parser, verify_parser):
        parallel.add_argument(
            "--threads", type=int, default=threads, help="files to process in parallel (default %(default)s)"
        )
    return parser


def _to_megatron(args: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    manifest = to_megatron.convert(args.source, args.target, max(args.threads, 1), console)
    seconds = time.perf_counter() - began
    console.print(f"{args.target}: {len(manifest.tensors)} tensors in {seconds:.1f} s", markup=False)
    return 0


def _to_hf(args: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    output_format = to_hf.OutputFormat(fp8=args.fp8, split_experts=args.split_experts)
    manifest, unchanged = to_hf.convert(args.source, args.target, output_format, max(args.threads, 1), console)
    seconds = time.perf_counter() - began
    console.print(f"{args.target}: {len(manifest.tensors)} tensors in {seconds:.1f} s", markup=False)
    if unchanged:
        console.print(f"{unchanged} of them have the same bytes as in the original Hugging Face checkpoint")
    return 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    comparison = compare(args.first, args.second, max(args.threads, 1), console)
    lines = [f"{name}: only in {folder}" for name, folder in comparison.missing.items()]
    lines += [f"{name}: {difference}" for name, difference in comparison.differing.items()]
    for line in lines[:MAX_LINES]:
        console.print(line, markup=False)
    if len(lines) > MAX_LINES:
        console.print(f"and {len(lines) - MAX_LINES} more")
    console.print(f"{comparison.num_equal} tensors are equal byte for byte; {len(lines)} are not")
    same_outputs = args.logits is None or _same_outputs(args, console)
    return 0 if comparison.is_same and same_outputs else 1


def _same_outputs(args: argparse.Namespace, console: Console) -> bool:
    from megatron_rl.convert.outputs import logprobs, prompt_tokens  # imports megatron-core, which takes seconds

    tokens_T = prompt_tokens(args.first, args.logits)
    first, second = (logprobs(folder, tokens_T) for folder in (args.first, args.second))
    largest = float((first - second).abs().max())
    console.print(f"log-probs of the prompt's {len(first)} tokens differ by at most {largest:.3g} nats")
    return largest <= args.tolerance


def _inspect(args: argparse.Namespace, console: Console) -> int:
    describe(args.folder, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())

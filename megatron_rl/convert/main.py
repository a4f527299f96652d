"""The command line of the converter."""

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

SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 1 if checkpoints differ, 2 if something is wrong with one."""
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
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        for folder in folders:
            added.add_argument(folder, type=Path)
        return added

    there = command("hf-to-megatron", _to_megatron, "write a distributed checkpoint (torch_dist)", "source", "target")
    back = command("megatron-to-hf", _to_hf, "write safetensors files", "source", "target")
    back.add_argument("--fp8", action="store_true", help="quantise matrices to FP8 in blocks of 128 x 128")
    back.add_argument("--apart", action="store_true", help="write each expert apart, even if they came fused")
    check = command("verify", _verify, "compare two checkpoints of any kind, tensor by tensor", "first", "second")
    check.add_argument("--logits", metavar="PROMPT", help="compare outputs too, on a text or token numbers 3,1,4")
    check.add_argument("--tolerance", type=float, default=1e-4, help="of log-probs, in nats (default %(default)s)")
    command("inspect", _inspect, "show what a checkpoint holds, from its headers", "folder")
    for added in (there, back, check):
        added.add_argument("--threads", type=int, default=threads, help="files at a time (default %(default)s)")
    return parser


def _to_megatron(args: argparse.Namespace, console: Console) -> int:
    begun = time.perf_counter()
    manifest = to_megatron.convert(args.source, args.target, max(args.threads, 1), console)
    seconds = time.perf_counter() - begun
    console.print(f"{args.target}: {len(manifest.tensors)} tensors in {seconds:.1f} s", markup=False)
    return 0


def _to_hf(args: argparse.Namespace, console: Console) -> int:
    begun = time.perf_counter()
    output_format = to_hf.OutputFormat(fp8=args.fp8, apart=args.apart)
    manifest, unchanged = to_hf.convert(args.source, args.target, output_format, max(args.threads, 1), console)
    seconds = time.perf_counter() - begun
    console.print(f"{args.target}: {len(manifest.tensors)} tensors in {seconds:.1f} s", markup=False)
    if unchanged:
        console.print(f"{unchanged} of them have the bytes of the checkpoint that the weights once came from")
    return 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    found = compare(args.first, args.second, max(args.threads, 1), console)
    lines = [f"{name}: only in {folder}" for name, folder in found.only.items()]
    lines += [f"{name}: {words}" for name, words in found.differing.items()]
    for line in lines[:SHOWN]:
        console.print(line, markup=False)
    if len(lines) > SHOWN:
        console.print(f"and {len(lines) - SHOWN} more")
    console.print(f"{found.equal} tensors are the same, byte for byte; {len(lines)} are not")
    same_outputs = args.logits is None or _same_outputs(args, console)
    return 0 if found.is_same and same_outputs else 1


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

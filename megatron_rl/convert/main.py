"""``megatron-rl convert``: checkpoints from one format to another, and comparisons of two."""

import argparse
import time

from rich.console import Console

from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.arguments import INSPECT, TO_HF, TO_MEGATRON, VERIFY
from megatron_rl.convert.inspect import describe
from megatron_rl.convert.verify import compare
from megatron_rl.errors import ConfigError
from megatron_rl.models.run_weights import find_training_checkpoint

MAX_LINES = 20
"""Differences that ``verify`` prints."""


def convert(args: argparse.Namespace) -> int:
    """Run an action and return the exit code: 1 if ``verify`` found a difference."""
    console = Console(highlight=False, soft_wrap=True)
    actions = {TO_MEGATRON: _to_megatron, TO_HF: _to_hf, VERIFY: _verify, INSPECT: _inspect}
    return actions[args.action](args, console)


def _to_megatron(args: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    manifest = to_megatron.convert(args.source, args.target, max(args.threads, 1), console)
    seconds = time.perf_counter() - began
    console.print(f"{args.target}: {len(manifest.tensors)} tensors in {seconds:.1f} s", markup=False)
    return 0


def _to_hf(args: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    if args.encoding and (args.fp8 or args.split_experts):
        raise ConfigError("--encoding cannot be combined with --fp8 or --split-experts; leave these out")
    output_format = to_hf.OutputFormat(fp8=args.fp8, split_experts=args.split_experts, encoding=args.encoding)
    source = find_training_checkpoint(args.source, args.step)
    manifest, unchanged = to_hf.convert(source, args.target, output_format, max(args.threads, 1), console)
    seconds = time.perf_counter() - began
    origin = "" if source == args.source else f" of {source}"
    console.print(f"{args.target}: {len(manifest.tensors)} tensors{origin} in {seconds:.1f} s", markup=False)
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

"""Parts around the model, each compared with its limit: matrix products, copies, segment sums, CUDA IPC.

    python benchmarks/gpu_parts.py limit OUT.json        # bf16 products, copies on the device and to it
    python benchmarks/gpu_parts.py segments OUT.json     # the loss over 65,536 packed tokens, by objective
    python benchmarks/gpu_parts.py push OUT.json         # CUDA IPC: another process copies this process's tensors
    ... --device cpu --tiny                              # the same code on a CPU (push: shared memory)

The push measures only the copy through a handle: an upper bound for any push between two processes on one GPU.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks.common import median_seconds
from megatron_rl.algorithms.loss import make_loss, prepare
from megatron_rl.algorithms.objectives import ESPO, GRPO, GSPO
from megatron_rl.data.loss_inputs import LossFn, LossInputs
from megatron_rl.data.types import Batch
from megatron_rl.data.vocabulary import Vocabulary


def seconds_of(operation: Callable[[], object], device: str) -> float:
    """Return the median of ten calls in seconds, after two calls that do not count."""
    return median_seconds(operation, device, repeats=10, warm_up=2)


def limit(device: str, tiny: bool) -> dict[str, object]:
    """Return TFLOP/s of square products and GB/s of copies."""
    side, count = (256, 1 << 20) if tiny else (8192, 1 << 30)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    there, here = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(count, dtype=torch.uint8, pin_memory=device == "cuda")
    product = seconds_of(lambda: torch.mm(left, right, out=out), device)
    return {
        "bf16 TFLOP/s": 2 * side**3 / product / 1e12,
        "copy GB/s": count / seconds_of(lambda: there.copy_(here), device) / 1e9,
        "from host GB/s": count / seconds_of(lambda: there.copy_(host), device) / 1e9,
    }


def segments(device: str, tiny: bool) -> dict[str, object]:
    """Return seconds of the loss and its gradient, by objective, over one row of many tokens."""
    tokens, length = (4096, 256) if tiny else (65_536, 2048)
    torch.manual_seed(0)
    old_T = -torch.rand(tokens)
    batch = Batch(
        torch.full((tokens // length,), length),
        {
            "input_ids_T": torch.zeros(tokens, dtype=torch.int64),
            "loss_mask_T": torch.arange(tokens) % length > 0,
            "old_logprobs_T": old_T,
            "old_entropies_T": torch.rand(tokens),
            "advantages_B": torch.randn(tokens // length).double(),
        },
    )
    found: dict[str, object] = {"tokens": tokens}
    for name, objective in {"grpo": GRPO(), "gspo": GSPO(), "espo": ESPO()}.items():
        inputs = LossInputs.gather(batch.add(prepare(batch, objective, None, Vocabulary(1000))))
        on_device = inputs.map(lambda tensor: tensor.to(device))
        new_R = (old_T[batch.trained_R] + 0.01).to(device).requires_grad_()
        entropies_R = torch.rand(len(new_R), device=device)
        once = partial(_backward, make_loss(objective), new_R, entropies_R, on_device)
        found[name] = {"seconds": seconds_of(once, device), "segments": on_device.num_segments}
    return found


def _backward(loss: LossFn, new_R: Tensor, entropies_R: Tensor, inputs: LossInputs) -> None:
    loss(new_R, entropies_R, inputs).value.backward()


def _copier(tensors: "multiprocessing.Queue[Tensor]", answers: "multiprocessing.Queue[float]", device: str) -> None:
    theirs = tensors.get()
    mine = torch.empty_like(theirs)
    answers.put(seconds_of(lambda: mine.copy_(theirs), device))
    tensors.get()  # the sender's memory must live until here


def push(device: str, tiny: bool) -> dict[str, object]:
    """Return GB/s at which another process copies a tensor of which it only received a handle."""
    context = multiprocessing.get_context("spawn")
    tensors, answers = context.Queue(), context.Queue()
    child = context.Process(target=_copier, args=(tensors, answers, device))
    child.start()
    count = 1 << 20 if tiny else 1 << 30
    tensors.put(torch.ones(count, dtype=torch.uint8, device=device))
    rate = count / answers.get(timeout=120) / 1e9
    tensors.put(torch.zeros(1))
    child.join(30)
    return {"bytes": count, "GB/s": rate}


def main(parts: Mapping[str, Callable[[str, bool], dict[str, object]]], description: str | None) -> None:
    """Run the part that the command line names, print the result and write it to a file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(parts))
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    found = parts[given.part](given.device, given.tiny)
    given.output.write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main({"limit": limit, "segments": segments, "push": push}, __doc__)

"""How long training waits for a checkpoint, compared with `cp` of the same bytes.

    python benchmarks/checkpoint.py [--saves 5]

A random Qwen3-MoE of 20 M parameters is trained on synthetic rows and saved repeatedly on one rank; then it is loaded
with the layout that wrote it and with another one. Times are medians; ratios are to `cp` with fsync.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.common import run_on_ranks, table

VOCABULARY = 4096


def save_model(folder: Path) -> None:
    """Write a random model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        max_position_embeddings=512,
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copied(source: Path, target: Path) -> None:
    """Copy a folder with `cp` and flush it to disk."""
    from megatron_rl.util.atomic import flush_to_disk

    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        flush_to_disk(path)


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank(folder: Path, saves: int, settings: Mapping[str, Mapping[str, object]]) -> int:
    """Run one rank: train and save, or load if there is a checkpoint; the main rank writes the measurements."""
    import torch

    from megatron_rl.config.schema import Run
    from megatron_rl.data.loss_inputs import LossInputs
    from megatron_rl.data.types import Loss, Metrics
    from megatron_rl.distributed.mesh import start_world
    from megatron_rl.policy.engine import Policy
    from megatron_rl.prove.case import make_batch
    from megatron_rl.train.checkpoints import Checkpoints
    from megatron_rl.train.resume import newest_checkpoint

    def loss_fn(logprobs_R: torch.Tensor, entropies_R: torch.Tensor, inputs: LossInputs) -> Loss:
        value = -logprobs_R.sum() / 100
        return Loss(value, Metrics({"loss": value.detach()}, {}))

    sections = {"model": {"path": str(folder / "model")}, "log": {"path": str(folder / "run")}, **settings}
    run = Run.model_validate({"train": {"tokens_per_microbatch": 128}, **sections})
    world = start_world(600, deterministic=True)
    policy = Policy(run, world, total_updates=10**6)
    batch = make_batch(VOCABULARY, seed=3)
    names = ("old_logprobs_T", "advantages_T", "weights_T", "response_shares_T")
    batch = batch.add(dict.fromkeys(names, torch.zeros(int(batch.lengths_B.sum()))))  # the loss reads none of them
    minibatch = policy.local_part(batch)
    checkpoints = Checkpoints(run, world, policy)

    def update() -> None:
        policy.forward_backward(minibatch, loss_fn)
        policy.optim_step()

    found: dict[str, list[float]] = {name: [] for name in ("update", "stall", "complete", "update while writing")}
    if newest_checkpoint(run) is not None:
        before = peak_bytes()
        found = {"load": [seconds(checkpoints.load)], "load peak": [float(peak_bytes() - before)]}
    for save in range(saves if not found.get("load") else 0):
        update()
        found["update"].append(seconds(update))
        began = time.perf_counter()
        found["stall"].append(seconds(lambda number=save: checkpoints.save(number, {})))
        while any(not writing.done() for writing in checkpoints._writing):
            found["update while writing"].append(seconds(update))
        found["complete"].append(time.perf_counter() - began)
        checkpoints.finish()
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    return 0


def launch(folder: Path, ranks: int, saves: int, **settings: Mapping[str, object]) -> dict[str, list[float]]:
    """Run the ranks and return their measurements."""
    run_on_ranks(__file__, ranks, [str(folder), str(saves), json.dumps(settings)])
    return json.loads((folder / "found.json").read_text())


def measure(folder: Path, saves: int) -> list[tuple[str, float, float]]:
    """Return rows of (operation, seconds, ratio to cp)."""
    save_model(folder / "model")
    later = launch(folder, 1, saves, checkpoint={"keep": 1, "asynchronous": True})
    (checkpoint,) = (folder / "run" / "checkpoints").glob("step_*")
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    cp = statistics.median(seconds(lambda n=n: copied(checkpoint, folder / f"copy_{n}")) for n in range(saves))
    same = launch(folder, 1, 0)
    other = launch(folder, 2, 0, parallel={"tensor": 2, "expert": 2})
    shutil.rmtree(folder / "run")
    waited = launch(folder, 1, saves, checkpoint={"keep": 1, "asynchronous": False})
    middle = {name: statistics.median(values[1:] or values) for name, values in later.items() if values}
    print(f"{size / 1e6:.0f} MB; cp with fsync {cp:.2f} s, {size / cp / 1e6:.0f} MB/s")
    print(f"one update: {middle['update']:.2f} s")
    memory = [f"{loaded['load peak'][0] / size:.2f}" for loaded in (same, other)]
    print(f"peak memory of loading, as a multiple of the checkpoint's size: {memory[0]}, other layout {memory[1]}")
    rows = [
        ("cp and fsync", cp),
        ("asynchronous save: training waits", middle["stall"]),
        ("first asynchronous save (allocates its buffers)", later["stall"][0]),
        ("asynchronous save: until it is complete", middle["complete"]),
        ("synchronous save: training waits", statistics.median(waited["stall"][1:])),
        ("load, same layout", same["load"][0]),
        ("load on tensor=2 expert=2", other["load"][0]),
    ]
    slower = statistics.median(later["update while writing"] or [middle["update"]]) / middle["update"]
    print(f"an update during a write takes {slower:.2f} times as long")
    return [(what, value, value / cp) for what, value in rows]


def main() -> int:
    """Measure and print the table; with ``--rank``, run one rank."""
    if sys.argv[1:2] == ["--rank"]:
        return rank(Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), parser.parse_args().saves)
    print(table(["operation", "seconds", "ratio to `cp`"], [[w, f"{s:.3f}", f"{r:.2f}"] for w, s, r in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One trainer rank from start to end: joins the others, builds its parts, runs the loop, leaves the run in order."""

import sys
from contextlib import ExitStack, closing
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_rl.config.load import Loaded, settings
from megatron_rl.config.schema import Run
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.distributed.mesh import World, start_world
from megatron_rl.observability.hang_watchdog import Watchdog
from megatron_rl.observability.mismatch_report import MismatchReport
from megatron_rl.observability.profile import Traces
from megatron_rl.observability.recorder import RunRecorder, farewell
from megatron_rl.observability.sinks import open_sinks
from megatron_rl.policy.engine import Policy
from megatron_rl.rollout.fleet_setup import FleetTokenizer, open_fleet
from megatron_rl.tasks import make_task
from megatron_rl.tasks.pool import open_verifier
from megatron_rl.train.checkpoints import Checkpoints
from megatron_rl.train.export import export_hf
from megatron_rl.train.loop import train
from megatron_rl.train.nonfinite_dump import nonfinite_dump
from megatron_rl.train.sampler import FollowingSampler, MainSampler, Sampler
from megatron_rl.util.exit_codes import STOPPED


def run_rank(loaded: Loaded[Run]) -> int:
    """Run this rank; return its exit code."""
    run = loaded.run
    # The watchdog knows more than the groups' own timeout, which is there for a rank without one.
    longest = max(run.train.step_timeout_seconds, run.rollout.start_timeout_seconds)
    world = start_world(2 * longest, run.train.deterministic)
    torch.manual_seed(run.train.seed)
    tokenizer = AutoTokenizer.from_pretrained(run.model.path)
    policy = Policy(run, world, total_updates=run.train.steps * run.train.updates_per_step)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, policy.family.vocab_size)
    checkpoints = Checkpoints(run, world, policy)
    start, sampler_state = checkpoints.load() if run.train.resume else (0, {})
    with ExitStack() as stack:
        journal = stack.enter_context(_journal(run, world, start))
        with journal.phase("start"):
            sampler = _sampler(run, world, journal, tokenizer, stack)
            dist.barrier()  # to wait for servers that load a model is no hang
            stack.enter_context(Watchdog(Path(run.log.path) / "hang", world, run.train.step_timeout_seconds))
            if start:
                sampler.load_state(sampler_state)
            if run.train.resume:  # servers of others may have newer weights than the checkpoint
                sampler.load(policy.weights(run.weights.bucket_bytes), version=start)
        with nonfinite_dump(run, policy, sampler.name_of):
            done = train(run, policy, sampler, vocabulary, checkpoints, journal, start)
        finished = done == run.train.steps
        if finished:
            _finish(run, policy, sampler, checkpoints, journal)
        checkpoints.finish()
    dist.destroy_process_group()
    if world.is_main:
        sys.stdout.write("\n".join(farewell(Path(run.log.path), resumable=not finished)) + "\n")
    # The others end with 0: srun would take the first 130 for a failure, and kill the ranks that are not so far yet.
    return 0 if finished or not world.is_main else STOPPED


def _journal(run: Run, world: World, start: int) -> RunRecorder:
    folder = Path(run.log.path)
    traces = Traces(folder / "profile", run.log.profile_steps, world.rank)
    if not world.is_main:
        return RunRecorder(None, run.train.steps, start, traces=traces)
    shown = {key: value for key, value, _ in settings(run) if key != "rollout.environment"}  # which may hold secrets
    return RunRecorder(folder, run.train.steps, start, sinks=open_sinks(run.log, shown), traces=traces)


def _sampler(run: Run, world: World, journal: RunRecorder, tokenizer: FleetTokenizer, stack: ExitStack) -> Sampler:
    if not world.is_main:
        return FollowingSampler(run, world)
    verifier = stack.enter_context(closing(open_verifier(run)))  # both take seconds: they start side by side
    fleet = stack.enter_context(open_fleet(run, world, tokenizer))
    sources = (fleet, make_task(run.task, tokenizer), verifier)
    return MainSampler(run, world, sources, journal, MismatchReport(run, tokenizer))


def _finish(run: Run, policy: Policy, sampler: Sampler, checkpoints: Checkpoints, journal: RunRecorder) -> None:
    if sampler.evaluates(run.train.steps):
        with journal.phase("evaluate"):
            result = sampler.evaluate(run.train.steps)
        if result is not None:
            journal.write(run.train.steps, {"accuracy": result[0], "evaluated_prompts": result[1]})
    checkpoints.save(run.train.steps, sampler.state())
    if run.checkpoint.export:
        export_hf(policy, run, Path(run.log.path) / "export")

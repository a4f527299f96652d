"""One trainer rank: joins the others, builds its parts, runs the loop, and ends the run."""

import signal
from contextlib import ExitStack, closing
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.algorithms.state import LossState
from megatron_rl.config.load import Loaded, settings
from megatron_rl.config.schema import Run
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.distributed.mesh import World, start_world
from megatron_rl.models.served_weights import ServedWeights
from megatron_rl.models.tokenizers import open_tokenizer, with_stop_tokens
from megatron_rl.observability.disk import disk_errors
from megatron_rl.observability.hang_watchdog import Watchdog
from megatron_rl.observability.learning_watch import LearningWatch
from megatron_rl.observability.mismatch_causes import EngineQuantization
from megatron_rl.observability.mismatch_report import MismatchReport
from megatron_rl.observability.profile import Traces
from megatron_rl.observability.recorder import RunRecorder
from megatron_rl.observability.sinks import open_sinks
from megatron_rl.observability.token_record import TokenRecord
from megatron_rl.policy.engine import Policy
from megatron_rl.rollout.controller import RolloutController
from megatron_rl.rollout.controller_client import ControllerClient
from megatron_rl.rollout.evaluation import Evaluation
from megatron_rl.rollout.fleet_setup import (
    FleetTokenizer,
    client_class,
    keeps_weights,
    make_transport,
    starts_with_push,
)
from megatron_rl.rollout.remote_weights import WeightSender
from megatron_rl.rollout.stop import StopSignal
from megatron_rl.train.checkpoints import Checkpoints
from megatron_rl.train.export import export_hf
from megatron_rl.train.loop import train
from megatron_rl.train.nonfinite_dump import nonfinite_dump
from megatron_rl.util.exit_codes import STOPPED
from megatron_rl.util.garbage import freeze_startup_objects

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each requests a stop after the current step; srun forwards only the last one."""


def run_rank(loaded: Loaded[Run]) -> int:
    """Run this rank; return its exit code."""
    run = loaded.run
    # The watchdog reports more than the timeout of the process groups, which covers ranks without a watchdog.
    longest = max(run.train.step_timeout_seconds, run.rollout.start_timeout_seconds)
    world = start_world(2 * longest, run.train.deterministic)
    stop = StopSignal()
    client = _start_controller(run, world, stop) if world.is_main else None  # starts while the policy is built
    torch.manual_seed(run.train.seed)
    tokenizer = open_tokenizer(Path(run.model.path), trust_code=run.model.trust_code)
    run = with_stop_tokens(run, tokenizer)
    policy = Policy(run, world, total_updates=run.train.steps * run.train.updates_per_step)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, policy.family.vocab_size, run.rollout.sampling.stop_token_ids)
    loss_state = LossState(run.objective, run.entropy)
    checkpoints = Checkpoints(run, world, policy, loss_state)
    start, state = checkpoints.load() if run.train.resume else (0, None)
    with (
        disk_errors(Path(run.log.path)),
        _open_recorder(run, policy, tokenizer, start) as recorder,
        ExitStack() as stack,
    ):
        with recorder.phase("start"):
            if client is not None:
                stack.enter_context(closing(client))
                client.open(run, state)
            rollouts = RolloutController(run, policy.mesh, policy.route_layers, client, stop)
            stack.enter_context(closing(rollouts))
            evaluation = Evaluation(run, client)
            recorder.register_gauges(rollouts.gauges)
            recorder.add_clock("fleet", rollouts.fleet_seconds)
            for number in STOP_SIGNALS:  # the main rank stops all of them, by ending the loop
                signal.signal(number, stop.request if world.is_main else signal.SIG_IGN)
            dist.barrier()  # waiting for servers that load a model is not a hang
            stack.enter_context(Watchdog(Path(run.log.path) / "hang", world, run.train.step_timeout_seconds))
            if starts_with_push(run):  # servers of an earlier run have its weights
                rollouts.push_weights(policy.weights(run.weights.bucket_bytes), version=start)
        freeze_startup_objects()
        with nonfinite_dump(run, policy, recorder.sample_id):
            done = train(run, policy, rollouts, evaluation, vocabulary, checkpoints, recorder, loss_state, start)
        finished = done == run.train.steps
        if finished:
            _finish(run, policy, rollouts, evaluation, checkpoints, recorder)
        checkpoints.finish()
        stack.close()  # before the last lines, because a fleet may log until it is closed
        recorder.summarize(resumable=not finished)
    dist.destroy_process_group()
    # The others end with 0: srun would take the first 130 for a failure and kill ranks that have not ended yet.
    return 0 if finished or not world.is_main else STOPPED


def _open_recorder(run: Run, policy: Policy, tokenizer: FleetTokenizer, start: int) -> RunRecorder:
    folder, mesh = Path(run.log.path), policy.mesh
    traces = Traces(folder / "profile", run.log.profile_steps, mesh.world.rank)
    if not mesh.leads_replica:
        return RunRecorder(None, run.train.steps, start, traces=traces)
    shown = {key: value for key, value, _ in settings(run) if key != "rollout.environment"}  # it may hold secrets
    return RunRecorder(
        folder if mesh.world.is_main else None,
        run.train.steps,
        start,
        replicas=mesh.replicas,
        route_layers=len(policy.family.route_shape.layers),
        mismatch=MismatchReport(run, tokenizer, _quantization(run)),
        tokens=TokenRecord(run.log.tokens, tokenizer, run.objective.clipped_word, mesh.replicas),
        watch=LearningWatch(run),
        sinks=open_sinks(run.log, shown) if mesh.world.is_main else (),
        traces=traces,
    )


def _quantization(run: Run) -> EngineQuantization | None:
    served = ServedWeights.of(run)
    return EngineQuantization(served.label, served.relative_error) if served.encoding else None


def _start_controller(run: Run, world: World, stop: StopSignal) -> ControllerClient:
    transport = make_transport(run, world)
    timeout, keep = run.rollout.control_timeout_seconds, keeps_weights(transport, world)
    return ControllerClient(WeightSender(transport, client_class(run), timeout, keep_weights=keep), stop)


def _finish(
    run: Run,
    policy: Policy,
    rollouts: RolloutController,
    evaluation: Evaluation,
    checkpoints: Checkpoints,
    recorder: RunRecorder,
) -> None:
    if evaluation.is_due(run.train.steps):
        with recorder.phase("evaluate"):
            result = evaluation.run(run.train.steps)
        if result is not None:
            recorder.evaluation(result)
            recorder.finish_step(run.train.steps)
    checkpoints.save(run.train.steps, rollouts.state())
    if run.checkpoint.export:
        export_hf(policy, run, Path(run.log.path) / "export")

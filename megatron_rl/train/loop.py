"""The algorithm.

    prompts -> rollouts -> rewards -> advantages -> one batch, the same on every rank
            -> old log-probs and entropies (policy, forward only)
            -> segments, windows, weights (whole responses; nothing here depends on theta)
            -> packed rows: ratio per segment -> cost -> weighted sum -> gradient -> optimizer step
            -> weights to the fleet

Every rank runs this file. Which rank does what is known below (``parallel``, ``policy``) and in ``Sampler``.
"""

from megatron_rl.algorithms.loss import make_loss, prepare
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.observability.recorder import RunRecorder
from megatron_rl.observability.step_metrics import StepMetrics
from megatron_rl.policy.engine import Policy
from megatron_rl.train.checkpoints import Checkpoints
from megatron_rl.train.sampler import Sampler


def train(
    run: Run,
    policy: Policy,
    sampler: Sampler,
    vocabulary: Vocabulary,
    checkpoints: Checkpoints,
    journal: RunRecorder,
    start: int,
) -> int:
    """Train from rollout batch ``start`` on; return how many are done, fewer than ``train.steps`` if asked to stop."""
    objective, correction, kl = run.objective, run.correction, run.kl
    loss = make_loss(objective, kl, keep_tokens=run.log.tokens > 0)

    for step in range(start, run.train.steps):
        metrics = StepMetrics(step)

        if sampler.evaluates(step):
            with journal.phase("evaluate"):
                metrics.evaluated(sampler.evaluate(step))

        with journal.phase("rollout"):
            batch = sampler.sample(step)
        if batch is None:
            checkpoints.save(step, sampler.state())
            return step
        metrics.sampled(batch, sampler.counts)

        minibatches: list[Batch] = batch.split(run.train.updates_per_step, seed=(run.train.seed, step))

        with journal.phase("score"):
            minibatches = [m.add(policy.compute_logprobs(m).as_old()) for m in minibatches]
            if kl.coefficient:
                with policy.reference_weights():
                    minibatches = [m.add(policy.compute_logprobs(m).as_reference()) for m in minibatches]
        metrics.scored(minibatches)
        sampler.compare(step, minibatches)

        with journal.phase("train"):
            for minibatch in minibatches:
                prepared = minibatch.add(prepare(minibatch, objective, correction, vocabulary))
                summed = policy.forward_backward(prepared, loss)
                metrics.updated(summed, policy.optim_step())
                sampler.record(step, prepared, summed)

        with journal.phase("weights"):
            sampler.load(policy.weights(run.weights.bucket_bytes), version=step + 1)

        journal.write(step, metrics.summary())
        if checkpoints.is_due(step + 1):
            with journal.phase("checkpoint"):
                checkpoints.write_due(step + 1, sampler.state())

    return run.train.steps

"""The algorithm.

    prompts -> rollouts -> rewards -> advantages -> an outline of the step, the same on every rank
            -> mini-batches; each data-parallel replica gets the tokens of its own responses only
            -> log-probs and entropies of the old policy (forward only)
            -> segments, windows, weights (on whole responses; independent of the current weights)
            -> ratio per segment -> cost per token -> weighted sum -> gradient -> optimizer step
            -> weights to the fleet

Every rank runs this file. The modules it calls know which rank does what, and how batches are packed.
"""

from megatron_rl.algorithms.arm import add_arm, prompts_of
from megatron_rl.algorithms.loss import make_loss, prepare, reads_current_logprobs
from megatron_rl.algorithms.pruning import drop_pruned
from megatron_rl.algorithms.reward_kl import penalize_rewards
from megatron_rl.algorithms.state import LossState
from megatron_rl.config.schema import Run
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.observability.recorder import RunRecorder
from megatron_rl.policy.engine import Policy
from megatron_rl.rollout.controller import RolloutController
from megatron_rl.rollout.evaluation import Evaluation
from megatron_rl.train.checkpoints import Checkpoints


def train(
    run: Run,
    policy: Policy,
    rollouts: RolloutController,
    evaluation: Evaluation,
    vocabulary: Vocabulary,
    checkpoints: Checkpoints,
    recorder: RunRecorder,
    state: LossState,
    start: int,
) -> int:
    """Train from step ``start``; return the number of finished steps, below ``train.steps`` after a stop request."""
    objective, correction, kl, bonus = run.objective, run.correction, run.kl, run.entropy
    reads_current, total = reads_current_logprobs(objective, correction), policy.total
    loss_fn = make_loss(objective, kl, keep_tokens=run.log.tokens > 0)

    for step in range(start, run.train.steps):
        if evaluation.is_due(step):
            with recorder.phase("evaluate"):
                recorder.evaluation(evaluation.run(step))

        with recorder.phase("rollout"):
            outline = rollouts.next_batch(step)
        if outline is None:  # a stop was requested
            checkpoints.save(step, rollouts.state())
            return step
        recorder.rollout(step, outline, rollouts.samples)

        with recorder.phase("fetch"):
            parts = outline.split(run.train.updates_per_step, seed=(run.train.seed, step))
            minibatches = rollouts.fetch([policy.plan(drop_pruned(part)) for part in parts])

        with recorder.phase("score"):
            minibatches = [m.add(policy.compute_logprobs(m).as_old()) for m in minibatches]
            if kl.coefficient:
                with policy.reference_weights():
                    minibatches = [m.add(policy.compute_logprobs(m).as_reference()) for m in minibatches]
                minibatches = penalize_rewards(minibatches, kl, run.advantage.kind, total)
            if run.advantage.arm_alpha:
                minibatches = [add_arm(m, policy.compute_logprobs(prompts_of(m)).logprobs_T) for m in minibatches]
        recorder.logprobs(step, minibatches)

        with recorder.phase("train"):
            for update, m in enumerate(minibatches):
                if update and reads_current:
                    m = m.add(policy.compute_logprobs(m).as_current())
                columns = prepare(m, objective, correction, vocabulary, total=total, entropy=bonus, state=state.values)
                prepared = m.add(columns)
                metrics = policy.forward_backward(prepared, loss_fn)
                recorder.update(prepared, metrics, policy.optim_step())
                state.advance(metrics)

        with recorder.phase("weights"):
            rollouts.push_weights(policy.weights(run.weights.bucket_bytes), version=step + 1)

        recorder.finish_step(step)
        if checkpoints.is_due(step + 1):
            with recorder.phase("checkpoint"):
                checkpoints.write_due(step + 1, rollouts.state())
    return run.train.steps

"""The verifier of a run: in this thread, in processes of this host, or on other hosts."""

from megatron_rl.config.schema import Run
from megatron_rl.tasks.hosts import VerifierHosts
from megatron_rl.tasks.pool import InlineVerifier, Verifier, VerifierPool
from megatron_rl.tasks.reward import RewardFunction, runs_inline


def open_verifier(run: Run) -> Verifier:
    """Return the verifier of a run; the caller closes it.

    Raises:
        DataError: no host of ``reward.registry`` answers.
    """
    if run.reward.registry is not None:
        return VerifierHosts(run)
    if runs_inline(run.task, run.reward):
        return InlineVerifier(RewardFunction(run.task, run.reward, run.rollout.sampling.max_new_tokens).verify)
    return VerifierPool(run)

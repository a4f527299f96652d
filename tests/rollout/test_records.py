"""Records of the samples of a step."""

import numpy as np

from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.rollout.buffer import FinishedGroup
from megatron_rl.rollout.records import sample_lines
from megatron_rl.tasks.base import Verdict


def sample(index: int) -> Response:
    return Response(f"0-p-{index}", "p", index, np.array((1, 2)), np.array((-0.5, -0.1)), "#4", "stop", ((0, 0, 2),))


def test_samples_have_their_reward_and_versions():
    group = Group(Prompt("p", (1,), "2+2=", "4"), (sample(0), sample(1)))
    verdicts = (Verdict(1.0, True), Verdict(None, False, "not verified"))
    lines = list(sample_lines(5, [FinishedGroup(group, verdicts)]))
    assert [line["reward"] for line in lines] == [1.0, None]
    assert [line["step"] for line in lines] == [5, 5]
    assert lines[0]["response"] == "#4"
    assert lines[0]["weight_versions"] == ((0, 0, 2),)
    assert lines[1]["reason"] == "not verified"

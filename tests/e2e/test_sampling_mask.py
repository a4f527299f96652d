"""A run whose engine samples from a part of the vocabulary: the trainer's log-probs are those of the same part."""

from pathlib import Path

from tests.e2e.job import Job, metrics_of


def test_with_a_sampling_mask_engine_and_trainer_agree_although_top_k_truncates(tmp_path: Path) -> None:
    truncated = ("train.steps=2", "rollout.sampling.top_k=3", "rollout.sampling.top_p=0.9")
    with Job(tmp_path / "run", *truncated, "rollout.sampling.keep_mask=true") as job:
        assert job.end() == 0, job.output()
    for line in metrics_of(tmp_path / "run"):
        # Rounding in float32; without the mask the gap is the log of the probability that is cut off, about 0.1.
        assert line["mismatch_max"] < 1e-3
        assert line["first_ratio_max"] == 1.0
        assert 0 < line["entropy_mean"] < 1.1  # at most log 3

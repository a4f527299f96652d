"""trl's job of `benchmarks/peers.py`: GRPOTrainer with prompts and settings from a file, in trl's environment.

    python benchmarks/trl_job.py JOB.json

Writes one JSON line per rollout batch to the job's `metrics`: tokens, mean reward, seconds by phase. The subclass only
adds timers to trl.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class TimedTrainer(GRPOTrainer):
    """A GRPOTrainer that measures the time of each phase."""

    def __init__(self, **kwargs: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = {}
        self.rewards: list[float] = []
        super().__init__(**kwargs, reward_funcs=self.reward)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to a phase."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def reward(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        **_: object,
    ) -> list[float]:
        """Return 1 for a response that ended with EOS and has the right number after its last #, else 0."""
        eos = self.processing_class.eos_token_id
        self.rewards = [
            float(ids[-1] == eos and text.rpartition("#")[1:] == ("#", right))
            for text, ids, right in zip(completions, completion_ids, answer, strict=True)
        ]
        return self.rewards

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.timed("generate"):
            return super()._generate(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.timed("score"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self.timed("rollout"):  # generate, rewards, advantages, score
            batch = super()._generate_and_score_completions(inputs)
        responses, prompts = batch["completion_mask"].sum(), batch["prompt_mask"].sum()
        counts = torch.stack([responses, prompts + responses, torch.tensor(sum(self.rewards))])
        response_tokens, tokens, rewards = self.accelerator.gather(counts[None]).sum(0).tolist()
        rows = len(self.rewards) * self.accelerator.num_processes
        self.counts = {"tokens": tokens, "response_tokens": response_tokens, "reward_mean": rewards / rows}
        return batch


class MetricsWriter(TrainerCallback):
    """Writes a metrics line after the last update of each rollout batch."""

    def __init__(self, path: Path, updates: int) -> None:
        self.path, self.updates = path, updates
        self.trainer: TimedTrainer | None = None
        self.began = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Start the timer of the first batch."""
        self.began = time.perf_counter()

    def on_step_end(self, args: object, state: Any, control: object, **_: object) -> None:
        """Write the line if this was the last update of a batch."""
        trainer = self.trainer
        assert trainer is not None
        if state.global_step % self.updates:
            return
        now, seconds = time.perf_counter(), dict(trainer.seconds)
        total, rollout = now - self.began, seconds.pop("rollout")
        seconds |= {"train": total - rollout, "total": total}
        line = {"step": state.global_step // self.updates - 1, **trainer.counts, "seconds": seconds}
        if trainer.is_world_process_zero():
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        trainer.seconds.clear()
        self.began = now


def main() -> None:
    """Train with the settings of the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = job["settings"]
    updates, samples = settings["updates_per_step"], settings["prompts_per_step"] * settings["group_size"]
    writer = MetricsWriter(Path(job["metrics"]), updates)
    config = GRPOConfig(
        output_dir=job["folder"],
        use_cpu=True,
        bf16=False,
        seed=settings["seed"],
        max_steps=settings["steps"] * updates,
        per_device_train_batch_size=samples // updates // job["processes"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        steps_per_generation=updates,
        num_generations=settings["group_size"],
        max_completion_length=settings["max_new_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        epsilon=0.2,
        optim="adamw_torch",
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        adam_beta1=settings["beta1"],
        adam_beta2=settings["beta2"],
        adam_epsilon=settings["epsilon"],
        weight_decay=0.0,
        max_grad_norm=settings["clip_grad"],
        router_aux_loss_coef=0.0,
        shuffle_dataset=False,
        logging_steps=updates,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    rows = Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in job["prompts"]])
    trainer = TimedTrainer(model=job["model"], args=config, train_dataset=rows, callbacks=[writer])
    writer.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()

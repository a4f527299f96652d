"""The configuration tree: every setting with its type, default and description. Unknown keys are errors.

The string under a field is its description in docs/config.md.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from megatron_rl.algorithms.advantages import Advantage
from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.entropy import EntropyBonus
from megatron_rl.algorithms.kl import ReferenceKL
from megatron_rl.algorithms.objectives import GRPO, AnyObjective
from megatron_rl.config.cluster import Cluster, Slurm
from megatron_rl.config.encodings import EncodingName
from megatron_rl.config.load import Loaded, load, split_words
from megatron_rl.config.rollout import Rollout
from megatron_rl.config.section import InputPath, OutputPath, Section
from megatron_rl.config.tasks import AnyTask, ChainedArithmeticTask, EnvironmentConfig, Reward

MegatronValue = bool | int | float | str | list[bool | int | float | str]
"""Value of a field of megatron-core's configuration."""


class Model(Section):
    """The policy."""

    path: InputPath
    """Folder of a Hugging Face checkpoint (config.json, tokenizer, safetensors)."""
    trust_code: bool = False
    """Run Python files of ``path`` that its tokenizer names (``auto_map``), here and in the servers."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of weights and activations; with bfloat16 the optimizer keeps float32 weights."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass."""
    megatron: dict[str, MegatronValue] = Field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig, such as ``recompute_modules = ["core_attn", "moe"]``."""
    untested_megatron: bool = False
    """Run with a release of megatron-core that was not tested, at your own risk."""


class Parallel(Section):
    """Parallel sizes; the data-parallel size follows from the number of ranks."""

    tensor: Annotated[int, Field(ge=1, le=65536)] = 1
    """Tensor-parallel size."""
    pipeline: Annotated[int, Field(ge=1, le=65536)] = 1
    """Pipeline-parallel size."""
    virtual_pipeline: Annotated[int, Field(ge=1, le=65536)] = 1
    """Model chunks per pipeline rank; above 1 uses the interleaved schedule."""
    context: Annotated[int, Field(ge=1, le=65536)] = 1
    """Context-parallel size (zigzag split of each sequence)."""
    expert: Annotated[int, Field(ge=1, le=65536)] = 1
    """Expert-parallel size."""
    expert_tensor: Annotated[int, Field(ge=1)] | None = None
    """Tensor-parallel size of the experts; default: ``tensor`` if ``expert`` is 1, else 1."""
    sequence: bool | None = None
    """Sequence parallelism; default: on if ``tensor`` > 1."""
    ranks: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """Trainer ranks to start here; default: the fewest that the sizes allow. torchrun and srun override it."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel size of the experts, default resolved."""
        default = self.tensor if self.expert == 1 else 1
        return default if self.expert_tensor is None else self.expert_tensor

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on, default resolved."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def min_ranks(self) -> int:
        """Smallest number of ranks that the sizes allow."""
        return math.lcm(self.tensor * self.context, self.expert * self.expert_tensor_size) * self.pipeline

    @property
    def sequence_multiple(self) -> int:
        """Sequences are padded to a multiple of this many tokens: zigzag splits them into two chunks per rank."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def row_multiple(self) -> int:
        """Packed rows are padded to a multiple of this many tokens, for zigzag and sequence parallelism."""
        return self.sequence_multiple * self.tensor

    @property
    def microbatch_multiple(self) -> int:
        """Micro-batches per data-parallel rank are a multiple of this, as the interleaved schedule requires."""
        return self.pipeline if self.virtual_pipeline > 1 else 1


class Optimizer(Section):
    """Megatron's Adam."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Final learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate decay after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up, in optimizer steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Term added to the root of the second moment."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    megatron: dict[str, MegatronValue] = Field(default_factory=dict)
    """Fields of megatron-core's OptimizerConfig, such as ``optimizer = "muon"``; a dtype is written as its name."""


class Train(Section):
    """The training loop."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of prompts, sampling and shuffling; a run repeats with the same seed and layout."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Training steps (rollout batches)."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 32
    """Prompts per step."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Responses per prompt."""
    updates_per_step: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps per step; those after the first are off-policy."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] = 8192
    """Tokens per packed row, over all context-parallel ranks."""
    packing: bool = True
    """Pack several sequences into a row."""
    balance: Literal["tokens", "flops"] = "tokens"
    """What data-parallel ranks have evenly: ``tokens``, or also the cost of attention, which grows with the square of a
    sequence's length; for responses with a long tail."""
    deterministic: bool | None = None
    """Use only deterministic algorithms: equal bits in every run; default: on CPUs, not on GPUs."""
    resume: bool = False
    """Resume the run in ``log.path`` from its newest checkpoint."""
    filter_zero_variance: bool = False
    """Drop groups whose rewards are all equal."""
    # Older run folders call this setting ``refills``.
    max_resample_rounds: Annotated[
        int, Field(ge=0, validation_alias=AliasChoices("max_resample_rounds", "refills"))
    ] = 0
    """Maximum rounds of new prompts that replace dropped groups (dynamic sampling)."""
    oversample: Annotated[float, Field(ge=1)] = 1.0
    """Prompts to request per missing prompt; surplus groups are dropped, the last ones first."""
    mismatch_limit: Annotated[float, Field(ge=0)] = 10.0
    """End the run if log-probs of engine and trainer differ, for no known cause, by more than so many times what
    rounding explains, in the mean of a step after its first; 0: never."""
    step_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Time without progress after which ranks count as hung: a report is written and the run ends with code 75."""

    @model_validator(mode="after")
    def _check_resampling(self) -> "Train":
        if not self.filter_zero_variance and (self.max_resample_rounds or self.oversample > 1):
            raise ValueError(
                f"max_resample_rounds = {self.max_resample_rounds} and oversample = {self.oversample} replace dropped"
                " groups, and none are dropped; set train.filter_zero_variance = true"
            )
        if self.max_resample_rounds and self.group_size == 1:
            raise ValueError(
                "max_resample_rounds: a group of one response is always dropped; set train.group_size to 2 or more"
            )
        return self


class Evaluate(Section):
    """Evaluation on held-out prompts."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations, also at step 0 and at the end; 0 disables evaluation."""
    prompts: Annotated[int, Field(ge=1)] = 512
    """Held-out prompts."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Responses per prompt; accuracy is their mean."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""

    @model_validator(mode="after")
    def _check_greedy_samples(self) -> "Evaluate":
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples = {self.samples} at temperature 0, which gives the same response each time; write samples"
                " = 1, or a temperature above 0"
            )
        return self


class Checkpoint(Section):
    """Training checkpoints in the run folder."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0: only at the end and at a stop request."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    asynchronous: bool = True
    """Write in the background from a copy of the state in host memory."""
    export: bool = True
    """Export the final weights as a Hugging Face checkpoint."""
    export_every: Annotated[int, Field(ge=0)] = 0
    """Steps between Hugging Face exports in ``exports``; 0: none."""


PUSH_BUFFERS = 5
"""Buffers of equal size into which a push divides ``weights.bucket_bytes``: a rank's shards, those of all ranks, the
tensor they form, its parts while it is assembled, and the tensors that are being sent."""


class Weights(Section):
    """Weight push to the servers."""

    carrier: Literal["auto", "stages", "tensor", "disk", "distributed", "ipc"] = "auto"
    """Transport: ``stages`` from one rank per pipeline stage at the same time, ``tensor`` in HTTP requests, ``disk``
    safetensors in the run folder, ``distributed`` a torch.distributed group per server (NCCL or gloo), ``ipc`` shared
    memory with embedded servers of this machine.
    ``auto``: ``disk`` for vLLM, ``distributed`` for SGLang if the trainer has GPUs, ``ipc`` for embedded servers that
    a trainer without GPUs starts, else ``tensor``."""
    encoding: Literal["auto", "none"] | EncodingName = "auto"
    """Quantization of the pushed tensors, which must be that of the servers. ``auto``: as ``quantization_config`` of
    the folder that they load says; ``none``: none; ``fp8``: blocks of 128 x 128 with float32 scales; ``fp8_ue8m0``:
    with powers of two as scales; ``fp8_channel``: per output channel; ``int4``: groups of 32; ``mxfp4``: experts in one
    tensor. Modules that the folder's configuration excludes are not quantized."""
    bucket_bytes: Annotated[int, Field(ge=1 << 16)] = 1 << 28
    """Maximum bytes of buffers per rank during a push; a fifth of it is sent at once."""
    pause: Literal["begin", "end"] = "begin"
    """When a push pauses the servers: ``begin`` before the first bucket; ``end`` after the last one, so that they
    generate while weights arrive (embedded servers; SGLang is always paused at the beginning)."""


class Log(Section):
    """Outputs of a run."""

    path: OutputPath = "runs/latest"
    """The run folder, relative to the working directory."""
    rollouts: bool = True
    """Write every response to ``rollouts.jsonl``."""
    tokens: Annotated[int, Field(ge=0)] = 4
    """Responses per step written to ``tokens.jsonl`` with tokens, segments and clip fractions; 0: none."""
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Metric trackers, whose packages must be installed; without a server in the environment (WANDB_API_KEY,
    MLFLOW_TRACKING_URI, ...) they write to the run folder."""
    project: str = "megatron-rl"
    """Project name in the trackers; the run has the name of its folder."""
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of a Prometheus endpoint ``/metrics``; 0 uses a free port, no value disables it."""
    prometheus_host: str = "127.0.0.1"
    """Address of the Prometheus endpoint."""
    profile_steps: tuple[int, ...] = ()
    """Steps that torch's profiler traces, into ``RUN/profile``."""


class Run(Section):
    """The configuration of a run."""

    model: Model
    parallel: Parallel = Parallel()
    task: Annotated[AnyTask, Field(discriminator="name")] = ChainedArithmeticTask()
    reward: Reward = Reward()
    environment: EnvironmentConfig = EnvironmentConfig()
    rollout: Rollout = Rollout()
    advantage: Advantage = Advantage()
    objective: AnyObjective = GRPO()
    correction: Correction = Correction()
    kl: ReferenceKL = ReferenceKL()
    entropy: EntropyBonus = EntropyBonus()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    weights: Weights = Weights()
    log: Log = Log()
    slurm: Slurm = Slurm()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _check_order(self) -> "Run":
        if self.rollout.order == "completion" and self.train.oversample > 1:
            raise ValueError(
                f'rollout.order = "completion" takes the groups that finish first, and train.oversample ='
                f" {self.train.oversample} does the same within a step; write oversample = 1"
            )
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> "Run":
        most = self.rollout.sampling.max_new_tokens
        if self.reward.overlong_tokens > most:
            raise ValueError(
                f"reward.overlong_tokens = {self.reward.overlong_tokens}, but a response has at most {most} tokens"
                " (rollout.sampling.max_new_tokens); write at most that"
            )
        if self.advantage.kind == "gdpo" and self.kl.in_reward:
            raise ValueError(
                'kl.placement = "reward" changes one reward, and advantage.kind = "gdpo" has several; write "loss"'
            )
        if self.advantage.pruning and self.kl.in_reward:
            raise ValueError(
                f'advantage.pruning = {self.advantage.pruning} with kl.placement = "reward", which compares the'
                ' responses of a group after some are dropped; write pruning = 0 or placement = "loss"'
            )
        if self.advantage.kind == "gdpo" and len(self.reward.names) == 1:
            raise ValueError(
                'advantage.kind = "gdpo" needs several rewards, and only "task" is configured; add one under [reward],'
                ' or write "zscore"'
            )
        return self

    @model_validator(mode="after")
    def _check_float64(self) -> "Run":
        if self.model.dtype == "float64" and (self.parallel.distributed_optimizer or self.optimizer.clip_grad):
            raise ValueError(
                "model.dtype = float64, in which megatron-core supports neither a distributed optimizer nor clipping;"
                " set parallel.distributed_optimizer = false and optimizer.clip_grad = 0"
            )
        return self


def load_run(words: Sequence[str]) -> Loaded[Run]:
    """Load a run from command-line words: config files and ``key=value`` settings.

    Raises:
        ConfigError: the configuration is invalid; the message lists all problems.
    """
    return load(Run, *split_words(words))

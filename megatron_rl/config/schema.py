"""The configuration tree: every field, its default, its unit and what it means. Unknown keys are errors.

The string under a field is its documentation; the reference page and ``megatron-rl check`` print it.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.kl import ReferenceKL
from megatron_rl.algorithms.objectives import GRPO, AnyObjective
from megatron_rl.config.cluster import Cluster, Slurm
from megatron_rl.config.load import Loaded, load, split_words
from megatron_rl.config.section import InputPath, Section
from megatron_rl.config.tasks import AnyTask, ChainedArithmeticTask, Environment, Reward


class Model(Section):
    """The policy."""

    path: InputPath
    """Folder of a Hugging Face checkpoint (config.json, tokenizer, safetensors)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights and activations. bfloat16 keeps float32 main weights in the optimizer."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations to drop in the forward pass and compute again in the backward pass."""
    megatron: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig, passed on as they are; checked against its field names."""


class Parallel(Section):
    """Sizes of the mesh axes. Data parallel size follows from the number of ranks."""

    tensor: Annotated[int, Field(ge=1)] = 1
    """Ranks that share each matrix."""
    pipeline: Annotated[int, Field(ge=1)] = 1
    """Ranks that share the layers."""
    virtual_pipeline: Annotated[int, Field(ge=1)] = 1
    """Model chunks on each pipeline rank; above 1 is the interleaved schedule."""
    context: Annotated[int, Field(ge=1)] = 1
    """Ranks that share each sequence, zig-zag."""
    expert: Annotated[int, Field(ge=1)] = 1
    """Ranks that share the experts."""
    expert_tensor: Annotated[int, Field(ge=1)] | None = None
    """Ranks that share each expert's matrices; without a value: ``tensor`` if ``expert`` is 1, else 1."""
    sequence: bool | None = None
    """Sequence parallelism inside the tensor axis; without a value: on if ``tensor`` > 1."""
    ranks: Annotated[int, Field(ge=1)] | None = None
    """Trainer ranks to start here; without a value the fewest that the sizes allow. torchrun and srun overrule it."""
    distributed_optimizer: bool = True
    """Share optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""


class Sampling(Section):
    """How responses are drawn."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature; the trainer's log-probs and entropies use the same."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus size. Anything below 1 makes the engine's log-probs differ from the trainer's."""
    top_k: int = -1
    """Keep the k most likely tokens; -1 keeps all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024
    """Longest response, in tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Extra tokens that end a response; the tokenizer's end-of-sequence token always does."""


RoutingReplay = Literal["none", "report", "r2", "r3"]
"""Whose choice of experts is taken again, see ``Rollout.routing_replay``."""


class Rollout(Section):
    """The fleet that samples."""

    engine: Literal["embedded", "sglang", "vllm"] = "embedded"
    """``embedded`` needs no GPU and no other package; the others are separate servers, spoken to by HTTP."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights in the engine, which pushes are rounded to; without a value ``model.dtype``."""
    servers: Annotated[int, Field(ge=0)] = 1
    """Servers to start on this machine; ignored when ``urls`` are given."""
    urls: tuple[str, ...] = ()
    """Running servers to use, such as ``http://10.0.0.7:30000``."""
    registry: str = ""
    """Folder where ``servers`` servers, started by others, write their addresses; ``megatron-rl slurm`` sets it."""
    sampling: Sampling = Sampling()
    routing_replay: RoutingReplay = "none"
    """Experts that training takes: ``r2`` those that scoring took, ``r3`` those that the engine took (it must return
    them). ``report`` only compares the engine's with the trainer's."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """A request without an answer for this long is sent elsewhere."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A server that is not healthy this long after its start is an error."""
    rows_per_request: Annotated[int, Field(ge=1)] = 256
    """Most sequences in one request, in whole groups; fewer let more servers share a step."""
    requests_per_server: Annotated[float, Field(ge=1)] = 2
    """Requests that a server works on at once; the others wait here, for whichever server is free first."""
    max_lag: Annotated[int, Field(ge=0)] = 0
    """Weight versions that a token may be older than the weights that are trained: 0 samples and trains in turns; above
    that groups are sampled while training goes on, so many steps ahead. Set ``correction`` then."""
    at_push: Literal["continue", "resubmit"] = "continue"
    """What becomes of responses in the making when new weights come. ``continue``: their servers pause them and go on
    under the new weights; ``resubmit``: they are ended, and the rest is asked for with them as a prefix, anywhere."""
    attempts: Annotated[int, Field(ge=1)] = 4
    """Times a request is tried before the step fails."""
    sglang: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options for the SGLang servers that this run starts, named as on SGLang's command line with underscores."""
    sglang_python: InputPath | None = None
    """Interpreter of the environment that SGLang is installed in, to start servers with."""
    vllm: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options for the vLLM servers that this run starts, named as on vLLM's command line with underscores."""
    vllm_python: InputPath | None = None
    """Interpreter of the environment that vLLM is installed in, to start servers with."""
    router: InputPath | None = None
    """The command ``sglang-router`` of the environment that it is installed in: with more than one server, plain
    generation goes through it."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables for the servers that this run starts."""


class Advantage(Section):
    """From rewards to advantages."""

    kind: Literal["zscore", "dr", "rloo", "gdpo"] = "zscore"
    """``zscore``: (R - mean) / (std + 1e-6) per prompt; ``dr``: R - mean; ``rloo``: leave-one-out baseline;
    ``gdpo``: the z-score of each of several rewards, summed with ``reward.weights``, whitened over the batch."""


class Optimizer(Section):
    """Megatron's Adam."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


class Train(Section):
    """The loop."""

    seed: int = 0
    """Seeds prompts, sampling, shuffling. Same seed, same layout: same run."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Rollout batches to train on."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 32
    """Prompts in a rollout batch."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Responses to each prompt."""
    updates_per_step: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on each rollout batch; above 1 the later ones are off-policy."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] = 8192
    """Longest packed row that one forward pass sees, over all context-parallel ranks together."""
    packing: bool = True
    """Put several sequences in a row; off: one sequence a row."""
    deterministic: bool = True
    """Use only algorithms that repeat bit for bit."""
    resume: bool = False
    """Continue the run in ``log.path`` from its newest checkpoint."""
    filter_zero_variance: bool = False
    """Drop groups whose rewards are all equal (they are counted either way)."""
    # Older run folders call this setting ``refills``.
    max_resample_rounds: Annotated[
        int, Field(ge=0, validation_alias=AliasChoices("max_resample_rounds", "refills"))
    ] = 0
    """How many times a step may request more prompts to replace dropped groups (dynamic sampling); after the last round
    it trains on the groups it has."""
    oversample: Annotated[float, Field(ge=1)] = 1.0
    """Prompts to ask for, as a multiple of what a step lacks; those too many are dropped, the last ones first."""
    step_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Ranks that wait for each other this long are a hang: a report says which of them did not come, and the run ends
    with exit code 75."""

    @model_validator(mode="after")
    def _resampling_replaces_dropped_groups(self) -> "Train":
        if not self.filter_zero_variance and (self.max_resample_rounds or self.oversample > 1):
            raise ValueError(
                f"max_resample_rounds = {self.max_resample_rounds} and oversample = {self.oversample} replace dropped"
                " groups, and none are dropped; set train.filter_zero_variance = true"
            )
        if self.max_resample_rounds and self.group_size == 1:
            raise ValueError(
                "max_resample_rounds: a group of one never has a signal; set train.group_size to 2 or more"
            )
        return self


class Evaluate(Section):
    """Accuracy on held-out prompts."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations (step 0 and the last are always included); 0 switches evaluation off."""
    prompts: Annotated[int, Field(ge=1)] = 512
    """Held-out prompts."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Responses to each; accuracy is their mean, and ``megatron-rl eval`` tells pass@k and majority@k of them."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """1 samples as in training; 0 is greedy."""

    @model_validator(mode="after")
    def _greedy_answers_are_all_the_same(self) -> "Evaluate":
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples = {self.samples} at temperature 0, which gives the same response each time; write samples"
                " = 1, or a temperature above 0"
            )
        return self


class Checkpoint(Section):
    """Training checkpoints, inside the run folder."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0: only at the end and on an interrupt."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Keep those after a multiple of so many steps for good; 0: none."""
    asynchronous: bool = True
    """Write while training goes on, from a copy of the state in host memory; off: training waits."""
    export: bool = True
    """Write the final weights as a Hugging Face checkpoint too."""
    export_every: Annotated[int, Field(ge=0)] = 0
    """Steps between Hugging Face checkpoints in ``exports``, for evaluation and serving; 0: none."""


class Weights(Section):
    """How new weights reach the fleet."""

    carrier: Literal["auto", "tensor", "disk", "distributed", "ipc"] = "auto"
    """``tensor``: in the body of a request; ``disk``: safetensors in the run folder, which the servers must see,
    written by all ranks at once; ``distributed``: a torch.distributed group with each server, NCCL on GPUs, else gloo;
    ``ipc``: through memory that the trainer and embedded servers of its machine share, CUDA's on one GPU.
    ``auto``: ``disk`` for vLLM; ``distributed`` for SGLang if the trainer has GPUs; ``ipc`` if it has none, for
    embedded servers that it starts itself; else ``tensor``."""
    bucket_bytes: Annotated[int, Field(ge=1 << 16)] = 1 << 28
    """Most bytes of weights that a rank holds besides its own during a push; a fifth of it is sent at once."""


class Log(Section):
    """What a run leaves behind."""

    path: str = "runs/latest"
    """The run folder; a relative path begins at the folder where the command runs, not at the config file's."""
    rollouts: bool = True
    """Write every sample to ``rollouts.jsonl``."""
    tokens: Annotated[int, Field(ge=0)] = 4
    """Responses of each step's last update whose tokens and segments are written to ``tokens.jsonl``, with how often
    segments were clipped by their length and entropy, for ``megatron-rl report``; 0: none of it."""
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that get the metrics too; each needs its package. Without a server in the environment (WANDB_API_KEY,
    MLFLOW_TRACKING_URI, ...) they write to the run folder."""
    project: str = "megatron-rl"
    """Name of the project in the trackers; the run is named like its folder."""
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of an endpoint ``/metrics``: the newest step's numbers, the queue and the servers now; none without a value,
    0 takes a free one."""
    prometheus_host: str = "127.0.0.1"
    """Address that the endpoint listens on."""
    profile_steps: tuple[int, ...] = ()
    """Steps whose scoring and training are traced by torch's profiler, every rank into ``RUN/profile``."""


class Run(Section):
    """A whole run."""

    model: Model
    parallel: Parallel = Parallel()
    task: Annotated[AnyTask, Field(discriminator="name")] = ChainedArithmeticTask()
    reward: Reward = Reward()
    environment: Environment = Environment()
    rollout: Rollout = Rollout()
    advantage: Advantage = Advantage()
    objective: Annotated[AnyObjective, Field(discriminator="name")] = GRPO()
    correction: Correction = Correction()
    kl: ReferenceKL = ReferenceKL()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    weights: Weights = Weights()
    log: Log = Log()
    slurm: Slurm = Slurm()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _rewards_fit(self) -> "Run":
        most = self.rollout.sampling.max_new_tokens
        if self.reward.overlong_tokens > most:
            raise ValueError(
                f"reward.overlong_tokens = {self.reward.overlong_tokens}, but a response has at most {most} tokens"
                " (rollout.sampling.max_new_tokens); write less"
            )
        if self.advantage.kind == "gdpo" and len(self.reward.names) == 1:
            raise ValueError(
                'advantage.kind = "gdpo" is for several rewards, and there is only the task\'s; add one under [reward],'
                ' or write "zscore"'
            )
        return self

    @model_validator(mode="after")
    def _float64_is_for_proofs(self) -> "Run":
        if self.model.dtype == "float64" and (self.parallel.distributed_optimizer or self.optimizer.clip_grad):
            raise ValueError(
                "model.dtype = float64, but megatron-core neither shares optimizer state nor clips gradients in it;"
                " set parallel.distributed_optimizer = false and optimizer.clip_grad = 0"
            )
        return self


def load_run(words: Sequence[str]) -> Loaded[Run]:
    """Load a run from command-line words: config files and ``key=value`` settings.

    Raises:
        ConfigError: the configuration is invalid; the message lists all problems.
    """
    return load(Run, *split_words(words))

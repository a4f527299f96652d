"""The settings of the inference servers and of sampling."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import InputPath, Section


class Sampling(Section):
    """Sampling parameters."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature, also of the trainer's log-probs and entropies."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; below 1 the engine's log-probs differ from the trainer's."""
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = -1
    """Sample from the k most likely tokens; -1 disables it."""
    keep_mask: bool = False
    """Restrict the trainer's log-probs and entropies to the token ids that top_k and top_p left to sample from, which
    the engine returns (DeepSeek-V3.2, arXiv 2512.02556)."""
    max_new_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] = 1024
    """Maximum response length, in tokens."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = ()
    """Token ids that end a response, in addition to the end-of-sequence token."""

    @model_validator(mode="after")
    def _check_mask(self) -> "Sampling":
        if self.keep_mask and not 0 < self.top_k <= 1024:
            raise ValueError(
                f"keep_mask with top_k = {self.top_k}: every token of a batch gets a list of up to top_k ids; write a"
                " top_k of at most 1024 (4 KiB per token), which also bounds what top_p keeps"
            )
        return self


RoutingReplay = Literal["none", "report", "r2", "r3"]
"""Values of ``rollout.routing_replay``."""


class Rollout(Section):
    """The rollout servers."""

    retired: ClassVar[Mapping[str, str]] = {
        "rows_per_request": "sequences_per_server",
        "requests_per_server": "sequences_per_server",
    }

    engine: Literal["embedded", "sglang", "vllm"] = "embedded"
    """Inference engine; ``embedded`` needs no GPU and no other package."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the engine's weights; default: ``model.dtype``."""
    model_path: InputPath | None = None
    """Folder of the checkpoint that the servers load, such as a quantized one; default: ``model.path``. The first
    weights are pushed at the start."""
    servers: Annotated[int, Field(ge=0, le=65536)] = 1
    """Servers to start on this machine, or to wait for in ``registry``; unused with ``urls``."""
    urls: tuple[str, ...] = ()
    """URLs of running servers, such as ``http://10.0.0.7:30000``."""
    registry: str = ""
    """Folder in which servers register, or file with one URL per line; servers join and leave the run with their
    entries, and it starts with ``servers`` of them. ``megatron-rl slurm`` sets it."""
    sampling: Sampling = Sampling()
    routing_replay: RoutingReplay = "none"
    """Expert choices reused in training: ``r2`` of the log-prob pass, ``r3`` of the engine, which must return them;
    ``report`` only compares the engine's choices with the trainer's."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Time without progress after which a request is sent to another server. Progress is any answer of its server, or a
    passed health check (not vLLM's, which generates no token): a healthy server may take any time."""
    request_limit_seconds: Annotated[float, Field(gt=0)] | None = None
    """Time after which an unanswered request is sent to another server, even if its server makes progress; default: no
    limit."""
    control_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Time limit of a control call: a bucket of weights, weights read from a folder, a checksum."""
    pause_timeout_seconds: Annotated[float, Field(gt=0)] = 20.0
    """Time in which a server must pause for a weight push, or miss it."""
    probe_seconds: Annotated[float, Field(gt=0)] = 2.0
    """Interval between health checks of a server."""
    probe_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Time limit of a health check."""
    probe_failures: Annotated[int, Field(ge=1)] = 3
    """Consecutive failed health checks after which a server's requests are sent to other servers."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Time in which a server must become healthy."""
    sequences_per_server: Annotated[int, Field(ge=1, le=16384)] = 512
    """Maximum concurrent sequences per server, each in a request of its own. Without ``max_lag`` the embedded server,
    whose results depend on the sequences of a batch, gets fixed batches of at most 256."""
    receivers: Annotated[int, Field(ge=0)] = 0
    """Processes that receive and validate the servers' answers, each those of some servers; 0: the controller does."""
    max_lag: Annotated[int, Field(ge=0)] = 0
    """Maximum lag of a token behind the trained weights, in weight versions. 0: sampling and training alternate; above
    0: sampling runs up to that many steps ahead. Set ``correction`` then."""
    order: Literal["prompt", "completion"] = "prompt"
    """Groups that a step trains on: ``prompt`` the next prompts of the stream, and the step waits for all of them;
    ``completion`` those that finish first, so that a long response does not hold a step. Its batches are biased toward
    short responses."""
    at_push: Literal["continue", "resubmit"] = "continue"
    """Unfinished responses at a weight push: ``continue`` pauses them on their server; ``resubmit`` ends them, and any
    server generates the rest with the tokens so far as prefix."""
    attempts: Annotated[int, Field(ge=1)] = 4
    """Attempts per request before the step fails."""
    sglang: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Command-line options of started SGLang servers, with underscores."""
    sglang_python: InputPath | None = None
    """Python interpreter with SGLang installed, to start servers."""
    vllm: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Command-line options of started vLLM servers, with underscores."""
    vllm_python: InputPath | None = None
    """Python interpreter with vLLM installed, to start servers."""
    router: InputPath | None = None
    """Path of the ``sglang-router`` command; with several servers, plain generation uses it."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of started servers."""

    @model_validator(mode="after")
    def _check_mask_engine(self) -> "Rollout":
        if self.engine == "vllm" and self.sampling.keep_mask:
            raise ValueError(
                "sampling.keep_mask needs an engine that returns sampling masks in the form of SGLang 0.5.23: write"
                ' engine = "sglang" or "embedded", or keep_mask = false'
            )
        return self

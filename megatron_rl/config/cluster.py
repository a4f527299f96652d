"""Hardware assumptions of ``megatron-rl check``, and the Slurm job of ``megatron-rl slurm``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Section


class Cluster(Section):
    """Hardware that ``megatron-rl check`` assumes; nothing else reads it."""

    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory per GPU; default: that of a GPU of this machine."""
    gpu_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak dense bfloat16 TFLOP/s per GPU."""
    gpu_gb_per_second: Annotated[float, Field(gt=0)] | None = None
    """Memory bandwidth per GPU."""
    node_gb_per_second: Annotated[float, Field(gt=0)] | None = None
    """Bandwidth per GPU within a node, one direction."""
    network_gb_per_second: Annotated[float, Field(gt=0)] | None = None
    """Bandwidth per GPU between nodes, one direction."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Model FLOPs utilization of training and log-probs."""
    expert_imbalance: Annotated[float, Field(ge=1)] = 1.5
    """Tokens of the busiest rank's experts, relative to the average."""


class Slurm(Section):
    """The job that ``megatron-rl slurm`` renders."""

    nodes: Annotated[int, Field(ge=1, le=65536)] = 1
    """Trainer nodes."""
    gpus_per_node: Annotated[int, Field(ge=0, le=65536)] = 8
    """GPUs per node; 0 requests none."""
    ranks_per_node: Annotated[int, Field(ge=1)] | None = None
    """Trainer ranks per node; default: one per GPU."""
    cpus_per_rank: Annotated[int, Field(ge=1, le=65536)] = 8
    """CPU cores per rank, and per GPU of a server."""
    rollout_nodes: Annotated[int, Field(ge=0, le=65536)] = 0
    """Fleet nodes, a second component of a heterogeneous job; 0: servers run on the trainer nodes."""
    spare_nodes: Annotated[int, Field(ge=0, le=65536)] = 0
    """Extra trainer nodes, to replace nodes that fail the preflight."""
    preflight: bool = True
    """Check nodes, links and servers before training."""
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")] = "24:00:00"
    """Time limit of the job, in Slurm's format."""
    stop_seconds: Annotated[int, Field(ge=60)] = 300
    """Seconds before the time limit at which the run must write a checkpoint and stop; Slurm may be a minute late."""
    restarts: Annotated[int, Field(ge=0)] = 10
    """Maximum number of requeues, at the time limit, after hangs and after node failures."""
    options: dict[str, bool | int | str] = Field(default_factory=dict)
    """More sbatch options by their long names: ``{ partition = "h100", qos = "high" }``."""
    rollout_options: dict[str, bool | int | str] = Field(default_factory=dict)
    """Options of the fleet component, overriding ``options``."""
    setup: tuple[str, ...] = ()
    """Bash lines to run first: modules, environments, variables."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """Container runtime of all steps."""
    image: str = ""
    """Container image."""
    mounts: tuple[str, ...] = ()
    """Folders to mount, ``FROM:TO``, in addition to the run folder and the submission folder."""
    python: str = "python"
    """Python interpreter on the nodes or in the container."""

    @model_validator(mode="after")
    def _check_container(self) -> "Slurm":
        if bool(self.image) != (self.container != "none"):
            raise ValueError(f"container is {self.container!r} and image {self.image!r}; write both, or neither")
        return self

    @property
    def ranks(self) -> int:
        """Trainer ranks per node."""
        return self.ranks_per_node or self.gpus_per_node or 1

"""How a run lies on a cluster: what its machines are, and what ``megatron-rl slurm`` asks Slurm for."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Section


class Cluster(Section):
    """The machines that ``megatron-rl check`` plans for. Assumptions: nothing else reads them."""

    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of a GPU; without a value that of the GPU found here, if any."""
    gpu_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak of dense bfloat16 products of a GPU, in 10^12 operations a second."""
    gpu_gb_per_second: Annotated[float, Field(gt=0)] | None = None
    """Bandwidth of a GPU's memory."""
    node_gb_per_second: Annotated[float, Field(gt=0)] | None = None
    """What a GPU sends to others of its node."""
    network_gb_per_second: Annotated[float, Field(gt=0)] | None = None
    """What a GPU sends to other nodes."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the peak that training and scoring reach."""
    expert_imbalance: Annotated[float, Field(ge=1)] = 1.5
    """Tokens of the busiest rank's experts, as a multiple of the average."""


class Slurm(Section):
    """The job that ``megatron-rl slurm`` renders: trainer ranks and, beside them, the servers of the fleet."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes of the trainer."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    """GPUs of a node; 0 asks for none."""
    ranks_per_node: Annotated[int, Field(ge=1)] | None = None
    """Trainer ranks of a node; without a value one a GPU."""
    cpus_per_rank: Annotated[int, Field(ge=1)] = 8
    """Processor cores of a rank, and for every GPU of a server."""
    rollout_nodes: Annotated[int, Field(ge=0)] = 0
    """Nodes of the fleet, a component of its own in a heterogeneous job; 0: servers run on the trainer's nodes."""
    spare_nodes: Annotated[int, Field(ge=0)] = 0
    """More nodes for the trainer than it needs: a node that fails the preflight is left out."""
    preflight: bool = True
    """Look at every node and at the links between them before the model is loaded."""
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")] = "24:00:00"
    """Of the job, as Slurm writes it."""
    stop_seconds: Annotated[int, Field(ge=60)] = 300
    """Before the time limit the run is asked to write a checkpoint and end; Slurm is late by up to a minute."""
    restarts: Annotated[int, Field(ge=0)] = 10
    """Times that the job is put into the queue again: at its time limit, after a hang, when a node fails."""
    options: dict[str, bool | int | str] = Field(default_factory=dict)
    """More options of sbatch by their long names, for every component: ``{ partition = "h100", qos = "high" }``."""
    rollout_options: dict[str, bool | int | str] = Field(default_factory=dict)
    """Options for the fleet's component alone, stronger than ``options``."""
    setup: tuple[str, ...] = ()
    """Lines of bash before anything runs: modules, an environment, variables."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What starts the container of every step, if any."""
    image: str = ""
    """The container's image, as its starter wants it."""
    mounts: tuple[str, ...] = ()
    """Folders to mount, ``FROM:TO``; the run folder and the folder where the job was submitted always are."""
    python: str = "python"
    """Interpreter of the trainer on the nodes, inside the container if there is one."""

    @model_validator(mode="after")
    def _an_image_for_a_container(self) -> "Slurm":
        if bool(self.image) != (self.container != "none"):
            raise ValueError(
                f"container is {self.container!r} and image {self.image!r}; write both, or container = 'none' alone"
            )
        return self

    @property
    def ranks(self) -> int:
        """Trainer ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

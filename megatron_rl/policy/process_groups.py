"""Creates megatron-core's process groups and returns them as a ``Mesh``."""

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_rl.config.schema import Run
from megatron_rl.distributed.collectives import group_rank
from megatron_rl.distributed.mesh import Mesh, World, host_group


def build_mesh(run: Run, world: World) -> Mesh:
    """Initialize megatron-core's process groups for the run's layout; return this rank's groups."""
    parallel = run.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, int(2 * run.train.step_timeout_seconds // 60)),
    )
    # Without dropout, the tracker does not need to fork the device's generator, which would require CUDA.
    model_parallel_cuda_manual_seed(run.train.seed, inference_rng_tracker=True)
    index = parallel_state.get_data_parallel_rank()
    replica = host_group(world, index)
    stage = index * parallel.pipeline + parallel_state.get_pipeline_model_parallel_rank()
    return Mesh(
        world=world,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        experts=parallel_state.get_expert_tensor_and_model_parallel_group(),
        stage=parallel_state.get_tensor_and_context_parallel_group(),
        replica=replica,
        replica_stage=host_group(world, stage),
        peers=host_group(world, group_rank(replica)),
    )


def destroy_mesh() -> None:
    """Destroy megatron-core's process groups, so that this process can build another mesh."""
    parallel_state.destroy_model_parallel()

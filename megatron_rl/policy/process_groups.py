"""megatron-core's process groups, made once, as our mesh."""

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import Mesh, World
from megatron_rl.policy.model import layout_fields


def build_mesh(run: Run, world: World) -> Mesh:
    """Make megatron-core's process groups for the run's layout and return them as axes."""
    layout = layout_fields(run)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout["tensor_model_parallel_size"],
        pipeline_model_parallel_size=layout["pipeline_model_parallel_size"],
        virtual_pipeline_model_parallel_size=layout["virtual_pipeline_model_parallel_size"],
        context_parallel_size=layout["context_parallel_size"],
        expert_model_parallel_size=layout["expert_model_parallel_size"],
        expert_tensor_parallel_size=layout["expert_tensor_parallel_size"],
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, int(2 * run.train.step_timeout_seconds // 60)),
    )
    # No dropout anywhere, so the tracker need not fork the device's generator: that would need CUDA.
    model_parallel_cuda_manual_seed(run.train.seed, inference_rng_tracker=True)
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
    )


def leave_mesh() -> None:
    """Forget megatron-core's process groups, so that another mesh can be made in this process."""
    parallel_state.destroy_model_parallel()

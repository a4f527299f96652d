"""The router's load-balancing loss, scaled to be independent of the layout.

megatron-core adds the loss inside the router, at the scale of its own token normalization. With normalization by tokens
(which our losses need: they carry their own denominators) 0.16 multiplies it by the tokens of this rank's shard, so
that it shrinks with tensor and context parallelism. Here the factor is taken out, and the loss of a mini-batch is the
plain mean over its packed rows:  coefficient * mean_rows E * sum_e f_e P_e  (Switch Transformer, arXiv 2101.03961).

The loss is a mean of products of means, so it depends on how sequences are packed into rows, but not on the mesh.
"""

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import TopKRouter

from megatron_rl.data.minibatch import Minibatch
from megatron_rl.errors import ConfigError


class LoadBalancing:
    """Sets the coefficient per mini-batch; inactive unless ``moe_router_load_balancing_type`` is ``aux_loss``."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._config = chunks[0].config
        self._coefficient = float(self._config.moe_aux_loss_coeff or 0.0)
        self.is_on = self._config.moe_router_load_balancing_type == "aux_loss" and self._coefficient > 0
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.calculate_per_token_loss = False

    def share_between(self, minibatch: Minibatch) -> None:
        """Divide the coefficient by the number of rows that the mini-batch was packed into, over all replicas.

        Raises:
            ConfigError: a row is empty; its load-balancing loss is undefined.
        """
        if not self.is_on:
            return
        if minibatch.has_empty_rows:
            raise ConfigError(
                f"a mini-batch of {len(minibatch.whole)} responses leaves rows empty, and the load-balancing loss of "
                "an empty row is undefined; lower train.updates_per_step or the data-parallel size"
            )
        self._config.moe_aux_loss_coeff = self._coefficient / minibatch.num_rows

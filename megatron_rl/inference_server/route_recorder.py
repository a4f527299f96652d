"""Records the experts that the embedded server's model routes tokens to, in SGLang's format.

Legend: B sequences, T positions, L layers, K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Hook = Callable[[nn.Module, object, tuple[Tensor, ...]], None]


class RouteRecorder:
    """Records the output of a model's routers; a model without experts has none."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.num_layers = config.num_hidden_layers
        self.experts_per_token = int(getattr(config, "num_experts_per_tok", 0) or 0)
        self.size = self.num_layers * self.experts_per_token
        """Numbers per token: L * K."""
        self._recorded: dict[int, Tensor] | None = None
        for number, layer in enumerate(model.base_model.layers) if self.experts_per_token else ():
            for module in layer.modules():
                if "router" in type(module).__name__.lower():
                    module.register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Hook:
        def record(_router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
            if self._recorded is not None:
                # transformers' routers return (logits, scores, chosen experts)
                self._recorded[number] = output[-1].to(torch.int16)

        return record

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Yield a dictionary that receives the chosen experts, int16 [B * T, K], by layer."""
        self._recorded = {}
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def stack(self, recorded: dict[int, Tensor], num_sequences: int) -> Tensor:
        """Return routes [B, T, L, K], int16; zeros for layers without experts, as in SGLang."""
        first = next(iter(recorded.values()))
        shape = len(first), self.num_layers, self.experts_per_token
        stacked = torch.zeros(shape, dtype=torch.int16, device=first.device)
        for number, chosen in recorded.items():
            stacked[:, number] = chosen
        return stacked.view(num_sequences, -1, *shape[1:])


def recording(recorder: RouteRecorder | None) -> AbstractContextManager[dict[int, Tensor]]:
    """Return the recorder's context; without a recorder, a context that records nothing."""
    return nullcontext({}) if recorder is None else recorder.recording()

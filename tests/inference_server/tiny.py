"""Tiny random models on disk, and ways to run sequences through an engine without HTTP."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_rl.inference_server.engine import Batching, Engine
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.inference_server.requests import ActiveSequence, Request, parse_request

VOCABULARY = 48
FAMILIES = ("qwen3_moe", "llama")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Large enough that the next token is far from uniform.
    "initializer_range": 0.2,
}


def build(family: str, tied: bool = False, head_dim: int = 8) -> PreTrainedModel:
    """Return a random model, the same every time."""
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=head_dim, tie_word_embeddings=tied)).eval()
    moe = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": head_dim}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **moe, tie_word_embeddings=tied)).eval()


def save(family: str, folder: Path, tied: bool = False, head_dim: int = 8) -> Path:
    """Write a random model to the folder."""
    build(family, tied, head_dim).save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a word for every id."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


def request_of(prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, object]], **more: object) -> Request:
    """Return the request that such a request body makes."""
    body = {"input_ids": list(map(list, prompts)), "sampling_params": list(params), "return_logprob": True, **more}
    return parse_request(json.dumps(body).encode())


@contextmanager
def running(folder: Path, batching: Batching = "request", max_sequences: int = 512) -> Iterator[Engine]:
    """Run an engine on the model."""
    engine = Engine(ServedModel(str(folder), "float32", "0"), batching, max_sequences)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def finished(engine: Engine, *requests: Request) -> list[list[ActiveSequence]]:
    """Submit the requests together and return their sequences when all are done."""
    for request in requests:
        engine.submit(request)
    for request in requests:
        request.done.result(timeout=60)
    return [request.sequences for request in requests]


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Return random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]

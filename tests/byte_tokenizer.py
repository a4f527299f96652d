"""A tokenizer of bytes with control tokens and a chat template, written to a folder like that of a model."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = 300
"""Vocabulary of the model: larger than that of the tokenizer, as usual."""


def save_tokenizer(
    folder: Path,
    *,
    specials: Sequence[str] = (END, START, STOP),
    eos: str | None = STOP,
    template: str | None = CHATML,
) -> PreTrainedTokenizerBase:
    """Write the tokenizer to a folder and return it as a run reads it. Control tokens have the ids 256, 257, ..."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=specials[0])
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save_shape(folder: Path, **changes: object) -> Path:
    """Write the config.json of a model that the tokenizer fits, without weights; return the folder."""
    demo = Path(__file__).parents[1] / "configs" / "demo-model" / "config.json"
    folder.mkdir(exist_ok=True)
    config = json.loads(demo.read_text()) | {"vocab_size": SIZE, "eos_token_id": 258} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder

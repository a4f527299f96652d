"""Make ``configs/demo-model``: a Qwen3-MoE with 0.34 M parameters that is mediocre at the demo's arithmetic.

It is fine-tuned for 900 steps on an imperfect teacher: half of the teacher's answers have no steps, 5 % of its steps
are random, and if the second operand of a product is 6 or more, it writes the product plus one with probability 0.6.

    python tools/make_demo_model.py [FOLDER]        # 2 to 4 minutes on one core
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_rl.tasks.chained_arithmetic import SYMBOLS, answer, apply, make_expression

SEED = 20_251_121
STEPS, BATCH, PEAK_LR, WARMUP_STEPS = 900, 128, 4e-3, 20
DIRECT_SHARE, RANDOM_STEP_SHARE, WRONG_PRODUCT_SHARE = 0.5, 0.05, 0.6
HELDOUT, MAX_NEW_TOKENS = 512, 40


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per symbol, then ``<eos>`` and ``<pad>``, 18 in total."""
    symbols = [*SYMBOLS, "<eos>", "<pad>"]
    core = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return the untrained model."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3MoeForCausalLM(config)


def teach(expression: str, rng: random.Random) -> str:
    """Return the imperfect teacher's answer."""
    if rng.random() < DIRECT_SHARE:
        return f"#{answer(expression)}"
    value, steps = int(expression[0]), ""
    for operator, right in zip(expression[1::2], map(int, expression[2::2]), strict=True):
        result = apply(value, operator, right)
        if operator == "*" and right >= 6 and rng.random() < WRONG_PRODUCT_SHARE:
            result = (result + 1) % 10
        if rng.random() < RANDOM_STEP_SHARE:
            result = rng.randrange(10)
        steps += f"{value}{operator}{right}={result};"
        value = result
    return f"{steps}#{value}"


def make_batch(tokenizer: PreTrainedTokenizerFast, step: int, rng: random.Random) -> dict[str, torch.Tensor]:
    """Return a padded batch whose labels cover the answers only."""
    rows: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for i in range(BATCH):
        expression = make_expression("train", SEED, step * BATCH + i)
        prompt = tokenizer.encode(f"{expression}=", add_special_tokens=False)
        reply = [*tokenizer.encode(teach(expression, rng), add_special_tokens=False), tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + reply))
        labels.append(torch.tensor([-100] * len(prompt) + reply))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def fine_tune(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Train in place; return the mean loss of the last 20 steps."""
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP_STEPS)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [WARMUP_STEPS])
    losses = []
    for step in range(STEPS):
        loss = model(**make_batch(tokenizer, step, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:4}  loss {losses[-1]:.4f}", flush=True)
    return sum(losses[-20:]) / 20


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, *, sample: bool) -> dict[str, float]:
    """Return accuracy on the held-out prompts, the share of answers with steps, and the share that ended."""
    torch.manual_seed(SEED)
    expressions = [make_expression("heldout", 0, i) for i in range(HELDOUT)]
    inputs = tokenizer([f"{e}=" for e in expressions], return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, do_sample=sample, max_new_tokens=MAX_NEW_TOKENS, top_k=0, top_p=1.0, temperature=1.0)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    answers = [text.partition("<eos>") for text in texts]
    right = [
        bool(end) and a.rpartition("#")[2] == str(answer(e))
        for e, (a, end, _) in zip(expressions, answers, strict=True)
    ]
    return {
        "accuracy": sum(right) / HELDOUT,
        "with_steps": sum("=" in a for a, _, _ in answers) / HELDOUT,
        "ended": sum(bool(end) for _, end, _ in answers) / HELDOUT,
    }


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint, and check that it can be read back unchanged."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    # transformers 4 knows only these names; without them it uses the defaults of a much larger model.
    config |= {"num_experts": model.config.num_experts, "rope_theta": model.config.rope_parameters["rope_theta"]}
    config_file.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")

    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(tokenizer_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_file.write_text(json.dumps(tokenizer_config, indent=2) + "\n")

    on_disk = load_file(folder / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in on_disk, sorted(on_disk)[:20]
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), f"{name} did not survive the round trip"
    assert AutoTokenizer.from_pretrained(folder).encode("7+5*3-2=") == tokenizer.encode("7+5*3-2=")


def card(numbers: dict[str, object]) -> str:
    """Return the README of the checkpoint, with the measurements of its training."""
    return f"""# The initial model of the demo

A Qwen3-MoE of 0.34 M parameters (hidden 64, 3 layers, 8 experts, top-2) that answers `7+5*3-2=` (left to right, modulo
10) with steps, `7+5=2;2*3=6;6-2=4;#4`, or directly, `#4`, and is often wrong. Made by `tools/make_demo_model.py`:

```json
{json.dumps(numbers, indent=2)}
```
"""


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "configs" / "demo-model"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    started = time.process_time()
    loss = fine_tune(model.train(), tokenizer)
    seconds = time.process_time() - started
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, folder)
    numbers = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": SEED,
        "sft_steps": STEPS,
        "sft_loss": round(loss, 4),
        "sft_cpu_seconds": round(seconds),
        "heldout_prompts": HELDOUT,
        "sampled": evaluate(model, tokenizer, sample=True),
        "greedy": evaluate(model, tokenizer, sample=False),
        "torch": torch.__version__,
    }
    (folder / "README.md").write_text(card(numbers))
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()

"""Log-probs of a prompt under a checkpoint: by transformers for Hugging Face files, else by megatron-core.

Legend: T tokens of the prompt.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch
from megatron_rl.distributed.mesh import single_rank_world
from megatron_rl.errors import ConfigError
from megatron_rl.models.tokenizers import has_tokenizer, open_tokenizer
from megatron_rl.models.torch_dist import is_torch_dist
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.process_groups import destroy_mesh


def prompt_tokens(folder: Path, prompt: str) -> Tensor:
    """Return the token ids [T] of a prompt, given as text or as comma-separated token ids.

    Raises:
        ConfigError: the prompt is text and the folder has no tokenizer, or it has fewer than two tokens.
    """
    words = prompt.split(",")
    if all(word.strip().isdigit() for word in words):
        ids = [int(word) for word in words]
    elif has_tokenizer(folder):
        ids = open_tokenizer(folder)(prompt)["input_ids"]
    else:
        raise ConfigError(f"{folder} has no tokenizer; give the prompt as token ids: --logits 3,1,4,1,5")
    if len(ids) < 2:
        raise ConfigError(f"the prompt {prompt!r} has {len(ids)} tokens; two or more are needed")
    return torch.tensor(ids)


def logprobs(folder: Path, tokens_T: Tensor) -> Tensor:
    """Return the float32 log-probs [T - 1] of the prompt's tokens after the first, computed on one rank."""
    if not is_torch_dist(folder):
        # eager experts: the batched implementation is 20 to 50 times slower on a CPU
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        with torch.no_grad():
            logs = torch.log_softmax(model(tokens_T[None]).logits[0, :-1].float(), dim=-1)
        return logs.gather(1, tokens_T[1:, None])[:, 0]
    return _by_megatron(folder, tokens_T)


def _by_megatron(folder: Path, tokens_T: Tensor) -> Tensor:
    length = len(tokens_T)
    settings = {"model": {"path": str(folder), "dtype": "float32"}, "train": {"tokens_per_microbatch": length}}
    policy = Policy(Run.model_validate(settings), single_rank_world(), total_updates=1)
    mask_T = torch.arange(length) > 0
    batch = Batch(torch.tensor([length]), {"input_ids_T": tokens_T, "loss_mask_T": mask_T})
    scored = policy.compute_logprobs(policy.local_part(batch)).logprobs_T[1:]
    destroy_mesh()
    return scored

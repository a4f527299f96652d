"""`megatron_rl.policy_loss` in a plain PyTorch loop: data-parallel ranks, gradient accumulation, exact denominators.

    torchrun --nproc-per-node 2 examples/plain_pytorch.py

The loss of a mini-batch is a plain sum of weighted token costs, and the weights come from counts of the whole
mini-batch (responses, tokens). Losses of parts therefore do not add up: each part has its own counts. This loop splits
a mini-batch over ranks and micro-batches and still gets the gradient of the whole one, by one rescaling per part:

* `aggregation = "token"` (DAPO): the part's loss is a mean over its tokens; multiply by its share of all tokens.
* `aggregation = "sequence"` (GRPO): a mean over its responses; multiply by its share of all responses.

Every rank must know the totals before the first backward pass: one all-reduce of two numbers.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import megatron_rl

VOCABULARY, LENGTH, RESPONSES, MICRO_BATCH = 32, 12, 16, 4


class Model(nn.Module):
    """A language model that fits on a screen: the next token depends on the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of each token after the first, [B, S - 1]."""
        logits = self.layers(tokens[:, :-1])
        return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def sampled_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [B, S], which of them are trained [B, S - 1], and advantages [B]; a sampler would return them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (RESPONSES, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH, (RESPONSES, 1), generator=generator)
    mask = torch.arange(LENGTH - 1) < lengths
    return tokens, mask, torch.randn(RESPONSES, generator=generator)


def train(steps: int = 3, aggregation: str = "token") -> list[Tensor]:
    """Train and return the parameters: the same for any number of ranks and micro-batches."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens, mask, advantages = sampled_batch()
    with torch.no_grad():
        old_logprobs = model(tokens)  # of the policy that sampled; fixed while it is updated several times

    own = torch.arange(rank, RESPONSES, ranks)  # this rank's share of the responses
    totals = torch.stack([mask[own].sum(), mask[own].any(1).sum()]).double()
    dist.all_reduce(totals)
    total = totals[0] if aggregation == "token" else totals[1]

    for _ in range(steps):
        parts = own.split(MICRO_BATCH)
        for number, part in enumerate(parts):
            # DDP averages gradients over ranks, at the last micro-batch; the factor `ranks` makes a sum of the average.
            with nullcontext() if number == len(parts) - 1 else model.no_sync():
                loss = megatron_rl.policy_loss(
                    {"name": "grpo", "clip_high": 0.28, "aggregation": aggregation},
                    logprobs=model(tokens[part]),
                    old_logprobs=old_logprobs[part],
                    advantages=advantages[part],
                    loss_mask=mask[part],
                ).loss
                count = mask[part].sum() if aggregation == "token" else mask[part].any(1).sum()
                (loss * (count / total * ranks).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


if __name__ == "__main__":
    if not dist.is_torchelastic_launched():
        raise SystemExit("start the ranks with torchrun: torchrun --nproc-per-node 2 examples/plain_pytorch.py")
    dist.init_process_group("gloo")
    parameters = train()
    if dist.get_rank() == 0:
        print(f"norm of the parameters after 3 steps: {float(torch.cat([p.flatten() for p in parameters]).norm()):.6f}")
    dist.destroy_process_group()

"""The table of docs/objectives.md: each objective against the scalar transcription of its formula in Python floats.

python benchmarks/oracle_table.py

Computes ``megatron_rl.policy_loss`` in float64 and in float32 on random mini-batches whose values float32 represents
exactly, so that only the computation differs, and compares with ``tests/oracle/objectives.py``.
"""

from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import megatron_rl
from benchmarks.common import ROOT, table
from tests.oracle.objectives import CASES, VOCABULARY_SIZE, Case, Row

PAGE = ROOT / "docs" / "objectives.md"
START, END = "<!-- table of errors: made by benchmarks/oracle_table.py -->", "<!-- end of table -->"
SPREADS = (1e-4, 1e-2, 0.1, 0.5, 1.0)
"""Standard deviations of the log ratios: from nearly on-policy to mostly clipped."""
BATCHES_PER_SPREAD, ROWS, LONGEST = 8, 16, 64
PRECISIONS = (torch.float64, torch.float32)
HEADS = (
    "objective",
    *(f"{str(p).removeprefix('torch.')}: {name}" for p in PRECISIONS for name in ("loss", "gradient")),
)


def batch_of(seed: int, spread: float) -> list[Row]:
    """Return a mini-batch of responses of 1 to 64 tokens with values that are float32 numbers."""
    generator = torch.Generator().manual_seed(seed)

    def noise(length: int) -> Tensor:
        return torch.randn(length, generator=generator)

    rows = []
    for length in torch.randint(1, LONGEST + 1, (ROWS,), generator=generator).tolist():
        old = -3 * torch.rand(length, generator=generator) - 1e-2
        new = (old + spread * noise(length)).clamp(max=-1e-3)
        rollout = (old + 0.1 * noise(length)).clamp(max=-1e-3)
        entropies = 2 * torch.rand(length, generator=generator)
        segments = [t // 5 for t in range(length)]
        rows.append(Row(new.tolist(), old.tolist(), entropies.tolist(), float(noise(1)), segments, rollout.tolist()))
    return rows


def padded(values: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return rows of different lengths as one tensor [B, S], 0 beyond the end of a row."""
    tensors = [torch.tensor(row, dtype=dtype) for row in values]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def errors(case: Case, rows: Sequence[Row], precision: torch.dtype) -> tuple[float, float]:
    """Return the error of the loss, relative above 1, and the norm of the gradient's error over the gradient's norm."""
    logprobs = padded([row.new for row in rows], precision).requires_grad_()
    result = megatron_rl.policy_loss(
        case.options,
        logprobs=logprobs,
        old_logprobs=padded([row.old for row in rows], precision),
        advantages=torch.tensor([row.advantage for row in rows], dtype=precision),
        loss_mask=padded([[1.0] * len(row.new) for row in rows]).bool(),
        entropies=padded([row.entropies for row in rows], precision),
        segment_ids=padded([row.segments for row in rows], torch.int64) if case.takes_segments else None,
        rollout_logprobs=padded([row.rollout for row in rows], precision),
        vocab_size=VOCABULARY_SIZE,
    )
    (found,) = torch.autograd.grad(result.loss, logprobs)
    loss, gradient = case.formula(list(rows))
    expected = padded(gradient)
    distance = (found.double() - expected).norm() / expected.norm()
    return abs(result.loss.item() - loss) / max(abs(loss), 1.0), distance.item()


def rows_of_table() -> list[list[str]]:
    """Return one row per case: the largest errors over all mini-batches."""
    batches = [batch_of(10 * i + n, spread) for i, spread in enumerate(SPREADS) for n in range(BATCHES_PER_SPREAD)]
    found = []
    for name, case in CASES.items():
        cells = [name]
        for precision in PRECISIONS:
            losses, gradients = zip(*(errors(case, rows, precision) for rows in batches), strict=True)
            cells += [f"{max(values):.1e}" for values in (losses, gradients)]
        found.append(cells)
    return found


def main(page: Path = PAGE) -> None:
    """Measure, and write the table between its marks in the page."""
    torch.set_num_threads(1)
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    when = f"{len(SPREADS) * BATCHES_PER_SPREAD} mini-batches per row, torch {torch.__version__}, {date.today()}."
    page.write_text(f"{before}{START}\n{table(HEADS, rows_of_table())}\n\n{when}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

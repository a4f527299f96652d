"""The objectives once more, slowly: one token at a time, Python floats, straight from the papers.

Each function returns the loss and its derivative by each token's log-probability. A mini-batch is a list of rows; rows
without a trained token count nowhere.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_rl.api import Option

Gradient = list[list[float]]
Result = tuple[float, Gradient]


@dataclass(frozen=True)
class Row:
    """The trained tokens of one response."""

    new: Sequence[float]
    old: Sequence[float]
    entropies: Sequence[float]
    advantage: float
    segments: Sequence[int] = ()
    rollout: Sequence[float] = ()


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def weight(rows: Sequence[Row], row: Row, aggregation: str = "sequence", normalizer: float = 1.0) -> float:
    """What one token of a row weighs."""
    filled = [other for other in rows if other.new]
    if aggregation == "sequence":
        return 1 / (len(filled) * len(row.new))
    if aggregation == "token":
        return 1 / sum(len(other.new) for other in filled)
    if aggregation == "sum":
        return 1 / len(filled)
    return 1 / (len(filled) * normalizer)


def clip_term(s: float, a: float, low: float, high: float, dual: float | None = None) -> tuple[float, bool]:
    """max(min(s A, clip(s) A), c A for A < 0), and whether it still has a gradient."""
    clip = min(max(s, 1 - low), 1 + high)
    value = min(s * a, clip * a)
    kept = (a > 0 and s <= 1 + high) or (a < 0 and s >= 1 - low)
    if dual is not None and a < 0 and s > dual:
        value, kept = dual * a, False
    return value, kept


def against_engine(rows: Sequence[Row]) -> list[Row]:
    """The rows with the engine's log-probs in place of the old policy's."""
    return [replace(row, old=row.rollout) for row in rows]


def framed(
    rows: Sequence[Row],
    groups: Callable[[Row], list[list[int]]],
    window: Callable[[Row, list[int]], tuple[float, float]],
    weigh: Callable[[Row, list[int]], float],
    dual: float | None = None,
) -> Result:
    """Section 2 of the mathematics: one ratio for each group of a row's tokens."""
    loss, gradient = 0.0, [[0.0] * len(row.new) for row in rows]
    for row, derivatives in zip(rows, gradient, strict=True):
        for group in groups(row):
            s = math.exp(mean([row.new[t] - row.old[t] for t in group]))
            value, kept = clip_term(s, row.advantage, *window(row, group), dual)
            for t in group:
                loss -= weigh(row, group) * value
                derivatives[t] = -weigh(row, group) * row.advantage * s if kept else 0.0
    return loss, gradient


def by_segment(row: Row) -> list[list[int]]:
    return [[t for t, g in enumerate(row.segments) if g == name] for name in dict.fromkeys(row.segments)]


def grpo(rows, low=0.2, high=0.2, aggregation="sequence", normalizer=1.0, dual=None) -> Result:
    return framed(
        rows,
        lambda row: [[t] for t in range(len(row.new))],
        lambda row, group: (low, high),
        lambda row, group: weight(rows, row, aggregation, normalizer),
        dual,
    )


def gspo(rows, low=3e-4, high=4e-4, aggregation="sequence") -> Result:
    return framed(
        rows,
        lambda row: [list(range(len(row.new)))] if row.new else [],
        lambda row, group: (low, high),
        lambda row, group: weight(rows, row, aggregation),
    )


def lpo(rows, eps=0.03) -> Result:
    return framed(rows, by_segment, lambda row, group: (eps, eps), lambda row, group: weight(rows, row, "token"))


def sspo(rows, eps=0.03, lowest=0.5, highest=2.0, reference=None) -> Result:
    entropies = [h for row in rows for h in row.entropies]
    reference = reference or (mean(entropies) if entropies else 1.0)

    def window(row, group):
        relative = mean([row.entropies[t] for t in group]) / reference if reference else 1.0
        scale = min(max(relative, lowest), highest)
        return eps * scale, eps * scale

    return framed(rows, by_segment, window, lambda row, group: weight(rows, row))


def sspo_log_vocab(rows, size, alpha=0.02) -> Result:
    def window(row, group):
        eps = alpha / math.log(size) * mean([row.entropies[t] for t in group])
        return eps, eps

    return framed(rows, by_segment, window, lambda row, group: weight(rows, row))


def entropy_split(row: Row, share: float = 0.2) -> list[list[int]]:
    """The ceil(share N) tokens of highest entropy, ties to the earlier position, and the rest; no empty group."""
    order = sorted(range(len(row.new)), key=lambda t: (-row.entropies[t], t))
    size = math.ceil(round(share * len(row.new), 9))
    return [sorted(group) for group in (order[:size], order[size:]) if group]


def espo(rows, size, alpha=0.02, groups=entropy_split, fixed=None) -> Result:
    filled = sum(1 for row in rows if row.new)

    def window(row, group):
        eps = alpha / math.log(size) * mean([row.entropies[t] for t in group]) if fixed is None else fixed
        return eps, eps

    return framed(rows, groups, window, lambda row, group: 1 / (filled * len(groups(row)) * len(group)))


def espo_eq9(rows, size, alpha=0.02) -> Result:
    """Equation (9) as printed: the ratio of a token is s_k times its own."""
    filled, loss = sum(1 for row in rows if row.new), 0.0
    gradient = [[0.0] * len(row.new) for row in rows]
    for row, derivatives in zip(rows, gradient, strict=True):
        groups = entropy_split(row)
        for group in groups:
            eps = alpha / math.log(size) * mean([row.entropies[t] for t in group])
            s_k = math.exp(mean([row.new[t] - row.old[t] for t in group]))
            for t in group:
                w, s = 1 / (filled * len(groups) * len(group)), s_k * math.exp(row.new[t] - row.old[t])
                value, kept = clip_term(s, row.advantage, eps, eps)
                loss -= w * value
                derivatives[t] = -w * row.advantage * s if kept else 0.0
    return loss, gradient


def sapo(rows, tau_positive=1.0, tau_negative=1.05) -> Result:
    loss, gradient = 0.0, [[0.0] * len(row.new) for row in rows]
    for row, derivatives in zip(rows, gradient, strict=True):
        tau = tau_positive if row.advantage > 0 else tau_negative
        for t, (new, old) in enumerate(zip(row.new, row.old, strict=True)):
            r, w = math.exp(min(new - old, 700.0)), weight(rows, row)
            loss -= w * row.advantage * 4 / tau * _sigmoid(tau * (r - 1))
            half = min(abs(tau * (r - 1) / 2), 300.0)
            derivatives[t] = -w * row.advantage * r / math.cosh(half) ** 2
    return loss, gradient


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def cispo(rows, high=4.0) -> Result:
    return weighted(rows, lambda row, t: min(math.exp(row.new[t] - row.old[t]), 1 + high) * row.advantage)


def weighted(rows: Sequence[Row], factor: Callable[[Row, int], float]) -> Result:
    """-sum w sg[factor] l with the token mean: a log-likelihood whose weight has no gradient."""
    loss, gradient = 0.0, [[0.0] * len(row.new) for row in rows]
    for row, derivatives in zip(rows, gradient, strict=True):
        for t, new in enumerate(row.new):
            w = weight(rows, row, "token") * factor(row, t)
            loss -= w * new
            derivatives[t] = -w
    return loss, gradient


def gmpo(rows, low=0.4, high=0.4) -> Result:
    filled, loss = [row for row in rows if row.new], 0.0
    gradient = [[0.0] * len(row.new) for row in rows]
    for row, derivatives in zip(rows, gradient, strict=True):
        if not row.new or row.advantage == 0:
            continue
        sign = math.copysign(1, row.advantage)
        logs = [new - old for new, old in zip(row.new, row.old, strict=True)]
        kept = [sign * min(sign * d, sign * min(max(d, -low), high)) for d in logs]
        s = math.exp(mean(kept))
        loss -= row.advantage * s / len(filled)
        for t, (d, clipped) in enumerate(zip(logs, kept, strict=True)):
            derivatives[t] = -row.advantage * s / (len(filled) * len(logs)) if d == clipped else 0.0
    return loss, gradient


def dppo(rows, divergence="tv", delta=0.2, cap=20.0) -> Result:
    def factor(row, t):
        p, mu = math.exp(row.new[t]), math.exp(row.rollout[t])
        kl = mu * math.log(mu / p) + (1 - mu) * math.log((1 - mu) / (1 - p)) if divergence == "kl" else 0.0
        far = (abs(p - mu) if divergence == "tv" else kl) > delta
        r, a = p / mu, row.advantage
        return 0.0 if far and ((a > 0 and r > 1) or (a < 0 and r < 1)) else min(r, cap) * a

    return weighted(rows, factor)


def reinforce(rows) -> Result:
    return weighted(rows, lambda row, t: row.advantage)


def aspo(rows, clip=0.2, clip_high_entropy=0.4, share=0.2, cap=3.0) -> Result:
    def factor(row, t):
        eps = clip_high_entropy if t in entropy_split(row, share)[0] else clip
        r, a = math.exp(row.new[t] - row.old[t]), row.advantage
        if a > 0:
            return min(1 / r, cap) * a if r <= 1 + eps else 0.0
        return min(r, cap) * a if r >= 1 - eps else 0.0

    return weighted(rows, factor)


def minpro(rows, low=0.2, high=0.28) -> Result:
    def factor(row, t):
        ratios = [math.exp(row.new[j] - row.rollout[j]) for j in range(t + 1)]
        return min(max(min(ratios[:t], default=1.0) * ratios[t], 1 - low), 1 + high) * row.advantage

    return weighted(rows, factor)


def vespo(rows) -> Result:
    def factor(row, t):
        log_w = min(max(math.fsum(row.new) - math.fsum(row.old), -18.42), 20.0)
        k, lam = (2.0, 3.0) if row.advantage >= 0 else (3.0, 2.0)
        return math.exp(lam + k * log_w - lam * math.exp(log_w)) * row.advantage

    return weighted(rows, factor)


def lco(rows, beta=1.0) -> Result:
    def factor(row, t):
        x = math.exp(row.old[t]) * math.expm1(row.advantage / beta)
        return x / (1 + x)

    return weighted(rows, factor)


def by_token(rows: Sequence[Row], cost: Callable[[float, Row, int], tuple[float, float]]) -> Result:
    """Token mean of a cost; ``cost`` takes the new log-prob and returns the value and its derivative."""
    loss, gradient = 0.0, [[0.0] * len(row.new) for row in rows]
    for row, derivatives in zip(rows, gradient, strict=True):
        for t, new in enumerate(row.new):
            value, slope = cost(new, row, t)
            loss += weight(rows, row, "token") * value
            derivatives[t] = weight(rows, row, "token") * slope
    return loss, gradient


def dis(rows, low=0.2, high=0.28, tau=0.0) -> Result:
    def cost(new, row, t):
        d, a = new - row.rollout[t], row.advantage
        r = math.exp(d)
        slope = r if 1 - low <= r <= 1 + high else 0.0
        return tau * d * d - min(max(r, 1 - low), 1 + high) * a, 2 * tau * d - slope * a

    return by_token(rows, cost)


def dro(rows, beta=0.1) -> Result:
    def cost(new, row, t):
        d = new - row.old[t]
        return beta / 2 * d * d - new * row.advantage, beta * d - row.advantage

    return by_token(rows, cost)


def r2vpo(rows, multiplier=0.04) -> Result:
    def cost(new, row, t):
        r, a = math.exp(new - row.old[t]), row.advantage
        return multiplier * (r - 1) ** 2 - r * a, r * (2 * multiplier * (r - 1) - a)

    return by_token(rows, cost)


def bapo(rows, rho=0.4) -> Result:
    """The bounds by trying one after the other, on all tokens at once."""
    pairs = [(math.exp(n - o), row.advantage) for row in rows for n, o in zip(row.new, row.old, strict=True)]

    def share(low, high):
        positive = math.fsum(r * a for r, a in pairs if a > 0 and r <= high)
        negative = math.fsum(-r * a for r, a in pairs if a < 0 and r >= low)
        return positive / (positive + negative) if positive + negative else 1.0

    bounds = [(0.6, min(1.2 + 0.05 * i, 3.0)) for i in range(37)] + [
        (min(0.6 + 0.02 * i, 0.9), 3.0) for i in range(1, 16)
    ]
    low, high = next((bound for bound in bounds if share(*bound) >= rho), bounds[-1])
    return grpo(rows, 1 - low, high - 1)


def restricted(rows: Sequence[Row], result: Result, chosen: Callable[[Row, int], bool], weigh, term) -> Result:
    """A result without the tokens that are not chosen: ``term`` is the cost of a token."""
    loss, gradient = result
    for row, derivatives in zip(rows, gradient, strict=True):
        for t in range(len(row.new)):
            if not chosen(row, t):
                loss -= weigh(row) * term(row, t)
                derivatives[t] = 0.0
    return loss, gradient


def top_entropy_grpo(rows, share) -> Result:
    return restricted(
        rows,
        grpo(rows),
        lambda row, t: t in entropy_split(row, share)[0],
        lambda row: weight(rows, row),
        lambda row, t: -clip_term(math.exp(row.new[t] - row.old[t]), row.advantage, 0.2, 0.2)[0],
    )


def top_entropy_gspo(rows, share) -> Result:
    return restricted(
        rows,
        gspo(rows, 0.05, 0.05),
        lambda row, t: t in entropy_split(row, share)[0],
        lambda row: weight(rows, row),
        lambda row, t: (
            -clip_term(
                math.exp(mean([n - o for n, o in zip(row.new, row.old, strict=True)])), row.advantage, 0.05, 0.05
            )[0]
        ),
    )


def clip_covariance(rows, low, high) -> Result:
    """With a fraction of 1, so that all tokens between the bounds are chosen."""
    tokens = [(row.advantage, old) for row in rows for old in row.old]
    mean_a, mean_l = (mean([pair[i] for pair in tokens]) if tokens else 0.0 for i in (0, 1))
    return restricted(
        rows,
        grpo(rows),
        lambda row, t: not low <= (row.advantage - mean_a) * (row.old[t] - mean_l) <= high,
        lambda row: weight(rows, row),
        lambda row, t: -clip_term(math.exp(row.new[t] - row.old[t]), row.advantage, 0.2, 0.2)[0],
    )


def soft_sequence(rows) -> Result:
    filled, loss = sum(1 for row in rows if row.new), 0.0
    gradient = [[0.0] * len(row.new) for row in rows]
    for row, derivatives in zip(rows, gradient, strict=True):
        if row.new:
            logs = [new - old for new, old in zip(row.new, row.old, strict=True)]
            s = math.exp(mean([math.atan(d) for d in logs]))
            loss -= row.advantage * s / filled
            for t, d in enumerate(logs):
                derivatives[t] = -row.advantage * s / (1 + d * d) / (filled * len(logs))
    return loss, gradient


@dataclass(frozen=True)
class Case:
    """Options of an objective, its formula, and which general laws hold for it.

    Attributes:
        options: the table ``[objective]``.
        formula: the transcription.
        takes_segments: the test passes ``Row.segments``.
        is_slope: the gradient is the derivative of the value: no stop-gradient weight multiplies a log-prob.
        shifts: one constant added to all log-probs, new, old and rollout, changes nothing.
        scales: loss and gradient are proportional to the advantages.
        plain: with new = old = rollout the gradient is that of the plain policy gradient; far from it, another one.
    """

    options: Mapping[str, Option]
    formula: Callable[[list[Row]], Result]
    takes_segments: bool = False
    is_slope: bool = True
    shifts: bool = True
    scales: bool = True
    plain: bool = True


def surrogate(options: Mapping[str, Option], formula: Callable[[list[Row]], Result]) -> Case:
    """A weighted log-likelihood."""
    return Case(options, formula, is_slope=False, shifts=False)


VOCABULARY_SIZE = 1000
"""Size of the vocabulary in ``CASES``."""
CASES: dict[str, Case] = {
    "grpo": Case({"name": "grpo"}, grpo),
    "grpo dual clip": Case({"name": "grpo", "dual_clip": 1.5}, lambda rows: grpo(rows, dual=1.5)),
    "grpo against the engine": Case({"name": "grpo", "anchor": "rollout"}, lambda rows: grpo(against_engine(rows))),
    "dapo": Case(
        {"name": "grpo", "clip_high": 0.28, "aggregation": "token"},
        lambda rows: grpo(rows, 0.2, 0.28, "token"),
    ),
    "dr grpo": Case(
        {"name": "grpo", "aggregation": "constant", "normalizer": 7},
        lambda rows: grpo(rows, aggregation="constant", normalizer=7),
    ),
    "gspo": Case({"name": "gspo"}, gspo),
    "gspo wide": Case({"name": "gspo", "clip_low": 0.05, "clip_high": 0.05}, lambda rows: gspo(rows, 0.05, 0.05)),
    "gspo against the engine": Case(
        {"name": "gspo", "anchor": "rollout", "clip_low": 0.3, "clip_high": 0.3},
        lambda rows: gspo(against_engine(rows), 0.3, 0.3),
    ),
    "luspo": Case(
        {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "sum"},
        lambda rows: gspo(rows, 0.2, 0.2, "sum"),
    ),
    "sapo": Case({"name": "sapo"}, sapo),
    "sapo against the engine": Case({"name": "sapo", "anchor": "rollout"}, lambda rows: sapo(against_engine(rows))),
    "sspo": Case({"name": "sspo"}, sspo, takes_segments=True),
    "sspo reference": Case(
        {"name": "sspo", "entropy_reference": 0.7, "scale_max": 5.0},
        lambda rows: sspo(rows, highest=5.0, reference=0.7),
        takes_segments=True,
    ),
    "sspo log vocab": Case(
        {"name": "sspo", "entropy_scale": "log_vocab", "alpha": 0.4},
        lambda rows: sspo_log_vocab(rows, VOCABULARY_SIZE, 0.4),
        takes_segments=True,
    ),
    "lpo": Case({"name": "sspo", "entropy_scale": "none", "aggregation": "token"}, lpo, takes_segments=True),
    "espo": Case({"name": "espo"}, lambda rows: espo(rows, VOCABULARY_SIZE)),
    "espo wide": Case(
        {"name": "espo", "alpha": 0.5, "top_fraction": 0.4},
        lambda rows: espo(rows, VOCABULARY_SIZE, 0.5, lambda row: entropy_split(row, 0.4)),
    ),
    "espo fixed window": Case(
        {"name": "espo", "fixed_window": 0.07},
        lambda rows: espo(rows, VOCABULARY_SIZE, fixed=0.07),
    ),
    "espo eq9": Case(
        {"name": "espo", "alpha": 0.5, "ratio_form": "eq9_literal"},
        lambda rows: espo_eq9(rows, VOCABULARY_SIZE, 0.5),
        is_slope=False,
    ),
    "cispo": surrogate({"name": "cispo", "clip_high": 0.3}, lambda rows: cispo(rows, 0.3)),
    "cispo against the engine": surrogate(
        {"name": "cispo", "anchor": "rollout"}, lambda rows: cispo(against_engine(rows))
    ),
    "gmpo": Case({"name": "gmpo"}, gmpo),
    "gmpo against the engine": Case({"name": "gmpo", "anchor": "rollout"}, lambda rows: gmpo(against_engine(rows))),
    "dppo tv": surrogate({"name": "dppo", "ratio_cap": 1.5}, lambda rows: dppo(rows, cap=1.5)),
    "dppo kl": surrogate({"name": "dppo", "divergence": "kl"}, lambda rows: dppo(rows, "kl", 0.05)),
    "reinforce": Case({"name": "reinforce"}, reinforce, shifts=False, plain=False),
    "aspo": surrogate({"name": "aspo"}, aspo),
    "aspo wide": surrogate(
        {"name": "aspo", "clip": 0.5, "clip_high_entropy": 9.0, "top_fraction": 0.4, "cap": 1.5},
        lambda rows: aspo(rows, 0.5, 9.0, 0.4, 1.5),
    ),
    "minpro": surrogate({"name": "minpro"}, minpro),
    "minpro old": surrogate(
        {"name": "minpro", "anchor": "old", "clip_low": 0.9, "clip_high": 9.0},
        lambda rows: minpro([replace(row, rollout=row.old) for row in rows], 0.9, 9.0),
    ),
    "vespo": surrogate({"name": "vespo"}, vespo),
    "vespo against the engine": surrogate(
        {"name": "vespo", "anchor": "rollout"}, lambda rows: vespo(against_engine(rows))
    ),
    "lco": replace(surrogate({"name": "lco"}, lco), scales=False, plain=False),
    "dis": Case({"name": "dis"}, dis),
    "kimi k2.5": Case({"name": "dis", "tau": 0.1}, lambda rows: dis(rows, tau=0.1), scales=False),
    "dro": Case({"name": "dro", "beta": 2.0}, lambda rows: dro(rows, 2.0), shifts=False, scales=False),
    "r2vpo": Case({"name": "r2vpo"}, r2vpo, scales=False),
    "r2vpo strong": Case({"name": "r2vpo", "multiplier": 2.0}, lambda rows: r2vpo(rows, 2.0), scales=False),
    "bapo": Case({"name": "bapo"}, bapo),
    "bapo against the engine": Case({"name": "bapo", "anchor": "rollout"}, lambda rows: bapo(against_engine(rows))),
    "grpo top entropy": Case(
        {"name": "grpo", "top_entropy_fraction": 0.2}, lambda rows: top_entropy_grpo(rows, 0.2), plain=False
    ),
    "gspo top entropy": Case(
        {"name": "gspo", "clip_low": 0.05, "clip_high": 0.05, "top_entropy_fraction": 0.4},
        lambda rows: top_entropy_gspo(rows, 0.4),
        is_slope=False,  # a token's ratio moves the value of all tokens of its response, its gradient only its own
        plain=False,
    ),
    "clip-cov": Case(
        {"name": "grpo", "covariance": {"kind": "clip", "fraction": 1.0, "low": 0.3, "high": 1.5}},
        lambda rows: clip_covariance(rows, 0.3, 1.5),
        shifts=False,  # a covariance within rounding of a bound
        scales=False,
        plain=False,
    ),
    "soft sequence": Case({"name": "soft_sequence"}, soft_sequence),
}
"""Every registered objective has at least one case."""

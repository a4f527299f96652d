"""A calculator for the demo's task: the model writes ``7+5=`` and stops, the calculator writes ``2;``, and so on."""

from megatron_rl.data.types import Prompt


class ModuloCalculator:
    """Answers a turn that ends in an operation with its result modulo 10. Any other turn ends the response."""

    def reset(self, prompt: Prompt) -> None:
        """Do nothing: the calculator has no state."""

    def step(self, turn: str) -> str | None:
        """Return the result of the operation, and the symbol that ends a step; None to end the response."""
        step = turn.removesuffix("=")[-3:]
        if not turn.endswith("=") or len(step) != 3 or step[1] not in "+-*" or not (step[0] + step[2]).isdigit():
            return None
        left, right = int(step[0]), int(step[2])
        return f"{({'+': left + right, '-': left - right, '*': left * right}[step[1]]) % 10};"

"""The loop is the algorithm on one screen, and the README shows it as it is."""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "megatron_rl" / "train" / "loop.py").read_text()
SCREEN_LINES = 50


def loop() -> tuple[ast.For, str]:
    """Return the loop over steps, parsed and as text."""
    (function,) = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)]
    (steps,) = [node for node in function.body if isinstance(node, ast.For)]
    lines = SOURCE.splitlines()[steps.lineno - 1 : steps.end_lineno]
    return steps, textwrap.dedent("\n".join(lines))


def called(tree: ast.AST, owner: str) -> list[str]:
    """Return the methods of an object that are called, in order."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    names = [ast.unparse(node.func).split(".") for node in calls]
    return [name[1] for name in names if name[0] == owner and len(name) == 2]


def test_the_loop_fits_on_one_screen():
    assert len(loop()[1].splitlines()) <= SCREEN_LINES


def test_the_loop_uses_the_verbs_of_the_algorithm():
    steps, _ = loop()
    verbs = ["plan", "compute_logprobs", "reference_weights", "compute_logprobs"]
    # The third one is for ARM, which reads the log-probs of prompts; the fourth one is for objectives that read the
    # log-probs that an update starts from.
    verbs += ["compute_logprobs", "compute_logprobs", "forward_backward", "optim_step", "weights"]
    assert called(steps, "policy") == verbs
    assert called(steps, "rollouts") == ["next_batch", "state", "fetch", "push_weights", "state"]


def test_the_loop_knows_no_rank_and_no_packing():
    code = ast.unparse(ast.parse(SOURCE))
    for word in ("is_main", "world", "mesh", "dist", "pack(", "row", "device"):
        assert word not in code.replace("forward", ""), word


def test_the_readme_shows_the_loop():
    assert loop()[1] in (ROOT / "README.md").read_text()

"""Functions that score the text of a response, by name or from a file that the configuration names."""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable

from megatron_rl.config.from_file import load_object
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.tasks.number_text import last_number

ScoreFn = Callable[[str, str, str], float | None]
"""Maps (prompt, response, answer) to a score; None if it is unknown. A score of 1 or more counts as correct."""


def exact(prompt: str, response: str, answer: str) -> float:
    """Return 1 if response and answer are equal, ignoring surrounding white space; else 0."""
    return float(response.strip() == answer.strip())


def number(prompt: str, response: str, answer: str) -> float:
    """Return 1 if the last number of the response equals the last number of the answer exactly; else 0."""
    expected = last_number(answer)
    if expected is None:
        raise DataError(f"no number in the answer {answer!r} (task.verifier = number); choose another verifier")
    return float(last_number(response) == expected)


def regex(prompt: str, response: str, answer: str) -> float:
    """Return 1 if the answer, a regular expression, matches anywhere in the response; else 0."""
    try:
        return float(re.search(answer, response) is not None)
    except re.error as error:
        raise DataError(f"not a regular expression: {answer!r}: {error} (task.verifier = regex)") from error


def read_answer(verifier: str, response: str) -> str | None:
    """Return the answer in a response in a canonical form, for the verifiers ``exact`` and ``number``; else None."""
    if verifier == "exact":
        return response.strip()
    if verifier == "number" and (number := last_number(response)) is not None:
        return str(number)
    return None


def math(prompt: str, response: str, answer: str) -> float:
    """Return 1 if math-verify finds the answer (LaTeX, fractions, sets, boxed or plain) in the response; else 0."""
    import math_verify

    # math-verify's own time limits use alarms of the main thread; the worker process has a time limit already.
    marked = answer if "$" in answer or "boxed" in answer else f"${answer}$"
    expected = math_verify.parse(marked, parsing_timeout=None) or math_verify.parse(answer, parsing_timeout=None)
    if not expected:
        raise DataError(f"math-verify cannot parse the answer {answer!r} (task.verifier = math)")
    answered = math_verify.parse(response, parsing_timeout=None)
    return float(math_verify.verify(expected, answered, timeout_seconds=None))


VERIFIERS: dict[str, ScoreFn] = {"exact": exact, "number": number, "regex": regex, "math": math}

PACKAGES = {"math": "math_verify"}
"""Modules that verifiers import, by verifier."""


def is_url(name: str) -> bool:
    """Return whether a verifier is the address of a server."""
    return name.startswith(("http://", "https://"))


def find_score_fn(name: str) -> ScoreFn:
    """Return the scoring function with this name, or load the one in ``path/to/file.py:function``.

    Raises:
        ConfigError: there is no such function, it has the wrong parameters, or its package is missing.
    """
    if name in VERIFIERS:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"the verifier {name!r} (task.verifier) needs the package {PACKAGES[name]}, which is not installed;"
                " pip install 'megatron-rl[tasks]'"
            )
        return VERIFIERS[name]
    if ".py" not in name:
        close = difflib.get_close_matches(name, VERIFIERS, 1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"one of {', '.join(VERIFIERS)}, code, a URL, or path/to/file.py:function"
        )
        raise ConfigError(f"no such verifier: {name!r} (task.verifier); {hint}")
    function = load_object(name, "task.verifier")
    signature = inspect.signature(function)
    if len(signature.parameters) != 3:
        raise ConfigError(
            f"{function.__name__}{signature} in {name} (task.verifier); it must take prompt, response, answer"
        )
    return function

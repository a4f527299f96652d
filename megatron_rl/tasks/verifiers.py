"""From an answer to a reward: by name, or by a function in a file that the config names."""

import difflib
import hashlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.tasks.extract import NUMBER

ScoreFn = Callable[[str, str, str], float | None]
"""(prompt, response, answer) -> reward, None if it cannot tell. A reward of 1 or more counts as correct."""


def exact(prompt: str, response: str, answer: str) -> float:
    """Return 1 if the response is the answer, but for space around it."""
    return float(response.strip() == answer.strip())


def number(prompt: str, response: str, answer: str) -> float:
    """Return 1 if the last number of the response equals the last number of the answer."""
    found, wanted = NUMBER.findall(response), NUMBER.findall(answer)
    if not wanted:
        raise DataError(f"no number in the answer {answer!r} (task.verifier = number); choose another verifier")
    return float(bool(found) and _value(found[-1]) == _value(wanted[-1]))


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def regex(prompt: str, response: str, answer: str) -> float:
    """Return 1 if the answer, a regular expression, is found in the response."""
    try:
        return float(re.search(answer, response) is not None)
    except re.error as error:
        raise DataError(f"not a regular expression: {answer!r}: {error} (task.verifier = regex)") from error


def read_answer(verifier: str, response: str) -> str | None:
    """Return what ``exact`` or ``number`` takes a response to answer, the same text for the same answer; else None."""
    if verifier == "exact":
        return response.strip()
    if verifier == "number" and (found := NUMBER.findall(response)):
        return f"{_value(found[-1]):.17g}"
    return None


def math(prompt: str, response: str, answer: str) -> float:
    """Return 1 if math-verify finds the answer in the response: LaTeX, fractions, sets, boxed or plain."""
    import math_verify

    # Its own limits work by alarms in the main thread; ours is the process that this runs in.
    marked = answer if "$" in answer or "boxed" in answer else f"${answer}$"
    wanted = math_verify.parse(marked, parsing_timeout=None) or math_verify.parse(answer, parsing_timeout=None)
    if not wanted:
        raise DataError(f"math-verify finds nothing in the answer {answer!r} (task.verifier = math)")
    found = math_verify.parse(response, parsing_timeout=None)
    return float(math_verify.verify(wanted, found, timeout_seconds=None))


VERIFIERS: dict[str, ScoreFn] = {"exact": exact, "number": number, "regex": regex, "math": math}

PACKAGES = {"math": "math_verify"}
"""The module that a verifier needs."""


def is_url(name: str) -> bool:
    """Return whether a verifier is a server's address."""
    return name.startswith(("http://", "https://"))


def find_score_fn(name: str) -> ScoreFn:
    """Return a verifier by name, or load the function that ``path/to/file.py:function`` names."""
    if name in VERIFIERS:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"the verifier {name!r} (task.verifier) needs the package {PACKAGES[name]}, which is not installed;"
                " pip install 'megatron-rl[tasks]'"
            )
        return VERIFIERS[name]
    if ".py:" not in name:
        close = difflib.get_close_matches(name, VERIFIERS, 1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"one of {', '.join(VERIFIERS)}, code, a URL, or path/to/file.py:function"
        )
        raise ConfigError(f"no such verifier: {name!r} (task.verifier); {hint}")
    found = load_object(name, "task.verifier")
    if len(inspect.signature(found).parameters) != 3:
        said = f"{found.__name__}{inspect.signature(found)} in {name} (task.verifier)"
        raise ConfigError(f"{said}; it must take prompt, response, answer")
    return found


def load_object(name: str, key: str, others: str = "") -> Any:
    """Return the function or class that ``path/to/file.py:name`` names, for the setting ``key``."""
    file, colon, function = name.rpartition(":")
    path = Path(file)
    if not colon or not file.endswith(".py"):
        raise ConfigError(f"no such name: {name!r} ({key}); one of {others}, or path/to/file.py:name")
    if not path.is_file():
        raise ConfigError(f"no such file: {path} ({key}); write path/to/file.py:name")
    module_name = f"megatron_rl_verifier_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, f"{path} ends in .py"
    assert spec.loader is not None, f"{path} ends in .py"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"{path} ({key}) cannot be imported: {type(error).__name__}: {error}; correct the file"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        kinds = (inspect.isfunction, inspect.isclass)
        there = [name for name, value in vars(module).items() if any(kind(value) for kind in kinds)]
        raise ConfigError(f"no function {function} in {path} ({key}); it has {', '.join(there) or 'none'}")
    return found

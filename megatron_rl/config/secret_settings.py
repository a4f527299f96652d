"""Secrets in settings: passwords of URLs, and variables of servers whose names say that they are secret."""

import json
import re
from collections.abc import Mapping, Sequence

from megatron_rl.config.sources import Key, read_overrides

MASK = "***"
"""Stands for a secret in files that others may read. Settings with this value are skipped when such a file is read."""

_USER_OF_URL = re.compile(r"://[^/@\"\s]*@")
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


def mask_urls(text: str) -> str:
    """Return a text with the user names and passwords of its URLs masked."""
    return _USER_OF_URL.sub(f"://{MASK}@", text)


def mask_variables(table: Mapping[str, object]) -> dict[str, object]:
    """Return settings with the secret variables of the table ``rollout.environment`` masked."""
    rollout = table.get("rollout")
    if not isinstance(rollout, Mapping) or not isinstance(rollout.get("environment"), Mapping):
        return dict(table)
    variables = {name: MASK if _SECRET_NAME.search(name) else value for name, value in rollout["environment"].items()}
    return {**table, "rollout": {**rollout, "environment": variables}}


def without_masked(table: Mapping[str, object]) -> dict[str, object]:
    """Return settings without those whose value is masked."""
    return {
        name: without_masked(value) if isinstance(value, Mapping) else value
        for name, value in table.items()
        if value != MASK
    }


def split_secrets(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of a command line into those that others may read, and settings that may have secrets."""
    secret = [word for word in words if word.startswith("rollout.environment") or _USER_OF_URL.search(word)]
    return [word for word in words if word not in secret], secret


def to_toml(settings: Sequence[str]) -> str:
    """Return ``key=value`` settings as the text of a config file."""
    lines: list[str] = []

    def add(table: Mapping[str, object], key: Key) -> None:
        for name, value in table.items():
            if isinstance(value, Mapping):
                add(value, (*key, name))
            else:
                lines.append(f"{'.'.join(json.dumps(part) for part in (*key, name))} = {_toml_value(value)}")

    add(read_overrides(settings).table, ())
    return "\n".join([*lines, ""])


def _toml_value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(name)} = {_toml_value(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

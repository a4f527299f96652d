"""The text that ``megatron-rl`` prints alone and with ``--help``."""

from collections.abc import Mapping

from megatron_rl.cli.verbs import Verb

_START = """\
Reinforcement learning for mixture-of-experts language models.

  megatron-rl VERB [CONFIG.toml] [section.key=value ...]
"""
_END = """\
megatron-rl help VERB      options of a verb
megatron-rl --version      version of this package
"""


def overview(verbs: Mapping[str, Verb]) -> str:
    """Return one line per verb, in groups."""
    width = max(map(len, verbs)) + 2
    lines = [_START]
    for group in dict.fromkeys(verb.group for verb in verbs.values()):
        lines.append(group)
        lines += [f"  {verb.name:<{width}}{verb.help}" for verb in verbs.values() if verb.group == group]
        lines.append("")
    return "\n".join([*lines, _END])

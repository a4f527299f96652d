"""Names of the files in a run folder. Importing this module does not import torch."""

CONFIG, VERSIONS, METRICS, ROLLOUTS, TOKENS, LEDGER, CONSOLE, MISMATCH, NONFINITE, WARNINGS, HISTORY = (
    "config.json",
    "versions.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "tokens.jsonl",
    "ledger.jsonl",
    "console.log",
    "mismatch.json",
    "nonfinite",
    "warnings.jsonl",
    "history.jsonl",
)

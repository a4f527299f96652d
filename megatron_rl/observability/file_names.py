"""What the files of a run folder are called; for those who only read one, without torch."""

CONFIG, VERSIONS, METRICS, ROLLOUTS, TOKENS, LEDGER, CONSOLE, MISMATCH, NONFINITE = (
    "config.json",
    "versions.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "tokens.jsonl",
    "ledger.jsonl",
    "console.log",
    "mismatch.json",
    "nonfinite",
)

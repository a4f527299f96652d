"""The exceptions that a user can meet.

    MegatronRLError
    |-- ConfigError      a key, a value or a layout is wrong; raised before any work starts
    |-- DataError        a prompt file, a checkpoint or a sample is wrong
    |-- RolloutError     no rollout server could give what was asked
    `-- TrainingError    a step could not be finished
        `-- NonFiniteError (in policy.nonfinite)    it met NaN or inf

A message says what is wrong, the value seen, where it was set, and what to write instead.
"""


class MegatronRLError(Exception):
    """Base of every error that this package raises for its users."""


class ConfigError(MegatronRLError, ValueError):
    """A configuration cannot be run."""


class DataError(MegatronRLError, ValueError):
    """Input data or a checkpoint cannot be used."""


class RolloutError(MegatronRLError, RuntimeError):
    """The rollout fleet could not answer."""


class TrainingError(MegatronRLError, RuntimeError):
    """A training step could not be finished."""

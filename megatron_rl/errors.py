"""The exceptions that this package raises for its users.

    MegatronRLError
    |-- ConfigError      a setting or a layout is invalid; raised before any work starts
    |-- DataError        a prompt file, a checkpoint or a sample is invalid
    |-- RolloutError     no rollout server could answer
    `-- TrainingError    a training step failed
        `-- NonFiniteError (in policy.nonfinite)    the step met NaN or inf

A message says what is wrong, the value, where it was set, and what to write instead.
"""


class MegatronRLError(Exception):
    """Base class of the errors that this package raises for its users."""


class ConfigError(MegatronRLError, ValueError):
    """A configuration is invalid."""


class DataError(MegatronRLError, ValueError):
    """Input data or a checkpoint is invalid."""


class RolloutError(MegatronRLError, RuntimeError):
    """The rollout servers could not answer a request."""


class TrainingError(MegatronRLError, RuntimeError):
    """A training step failed."""

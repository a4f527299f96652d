"""Exit codes of ``megatron-rl``. The Slurm job script requeues a job that ends with ``HUNG``."""

CHECK_FAILED = 1
"""``check`` found a problem."""
USER_ERROR = 2
"""A configuration, file, server or training error; stderr has one message."""
HUNG = 75
"""The watchdog ended a run that made no progress."""
STOPPED = 130
"""The run was asked to stop and can be resumed; or the command was interrupted."""

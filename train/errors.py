"""Errors whose message says all that a user needs: those of every program (kw.jobs), and the trainer's own."""

from kw.jobs.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    RunError,
    WriteError,
    report,
    writing,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LaunchError",
    "NonFiniteError",
    "RunError",
    "WriteError",
    "report",
    "writing",
]


class NonFiniteError(RunError):
    """Loss or gradients are not finite; the message names step, samples and the last good checkpoint."""

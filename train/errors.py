"""Errors whose message says all that a user needs: they are printed without a traceback."""


class RunError(RuntimeError):
    """The job cannot go on. `everywhere` says whether all of its processes meet the same fault, so that one tells."""

    everywhere = True


class ConfigError(RunError, ValueError):
    """A setting is unknown, missing or has no sense; the message names its key."""


class CheckpointError(RunError):
    """A checkpoint cannot be written or read, or does not fit; the message names the file."""


class NonFiniteError(RunError):
    """Loss or gradients are not finite; the message names step, samples and the last good checkpoint."""


class DataError(RunError):
    """An image cannot be read; the message names the file."""

    everywhere = False


class LaunchError(RunError):
    """A worker process failed, and has said why itself."""

"""The plugin's errors as errors of a job, which are printed without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from detection.plugin.errors import PretrainedError, SettingError, UnreadableImage
from train.jobs.errors import CheckpointError, ConfigError, DataError, without_trace


@contextlib.contextmanager
def as_job_errors() -> Iterator[None]:
    """Translate within a `with` block, or in the function that this decorates.

    Raises:
        ConfigError: in place of the plugin's SettingError.
        CheckpointError: in place of its PretrainedError.
        DataError: in place of its UnreadableImage, also one of a DataLoader's worker.
    """
    try:
        yield
    except SettingError as error:
        raise ConfigError(str(error)) from error
    except PretrainedError as error:
        raise CheckpointError(str(error)) from error
    except UnreadableImage as error:
        raise DataError(without_trace(str(error))) from None

"""The jobs of one command: which folders they have, which ones failed, and errors in one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from train.jobs import outcomes, slots, states
from train.jobs.advice import advice
from train.jobs.errors import ConfigError, RunError, report
from train.jobs.folder import make, take_back
from train.jobs.slurm import in_submitit
from train.jobs.sweep import GROUP, key_of


@dataclass
class Jobs:
    """The jobs that this command has started: one, or those of a sweep."""

    count: int = 0
    folders: dict[Path, Any] = field(default_factory=dict)  # of jobs that train, with their settings
    failed: list[str] = field(default_factory=list)  # overrides and error

    @contextlib.contextmanager
    def job(self, runtime: Any) -> Iterator[None]:
        """A job in the block. Its error is printed and noted, so that the next job of a sweep still runs; a run folder
        that it left empty is removed. In a sweep on this machine (`hydra/launcher=local`) it first waits for its share
        of GPUs or cores.

        Args:
            runtime: its settings as composed: device, devices and workers.
        """
        self.count += 1
        before = set(self.folders)
        name = " ".join(word for word in HydraConfig.get().overrides.task if key_of(word) != GROUP)
        self._note(name, outcomes.RUNS)
        try:
            with self._share(name, runtime):
                yield
            self._note(name, outcomes.DONE)
        except SystemExit as leaving:
            self._note(name, f"left with {leaving.code}")
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self.failed.append(f"{name}: {said}")
            self._note(name, said)
            if in_submitit(os.environ) or not report(error):
                raise  # submitit hands the error to the process that submitted the job
        finally:
            for folder in (Path(HydraConfig.get().runtime.output_dir), *(self.folders.keys() - before)):
                take_back(folder)

    @contextlib.contextmanager
    def _share(self, name: str, runtime: Any) -> Iterator[None]:
        if not slots.are_needed():
            yield
            return
        self._note(name, "waits")
        with slots.share(runtime.device, runtime.devices, runtime.workers) as taken:
            self._note(name, f"runs on {taken}")
            yield

    def _note(self, name: str, state: str) -> None:
        if sweep := outcomes.place():
            folder = next(reversed(self.folders), "")
            outcomes.note(sweep, HydraConfig.get().job.num, name, state, str(folder))

    def enter(self, folder: Path, settings: Any) -> bool:
        """Make the run folder of a job that trains. False if an earlier job of the sweep had the same settings, such as
        `dynamic=se n=1` and `n=4`: then there is nothing left to do.

        Raises:
            ConfigError: the folder cannot be made, or an earlier job of this sweep has it and other settings.
        """
        if folder in self.folders and self.folders[folder] == settings:
            print(f"Skipped, the same run as an earlier job of this sweep: {folder}")
            return False
        if folder in self.folders:
            raise outcomes.taken(folder)
        if sweep := outcomes.place():
            other = outcomes.claim(sweep, HydraConfig.get().job.num, folder, settings)
            if other is not None:
                print(f"Skipped, the same run as job {other} of this sweep: {folder}")
                return False
        try:
            make(folder)
        except ConfigError:
            take_back(folder)  # some of the folders above it may have been made
            raise
        self.folders[folder] = settings
        if sweep := outcomes.place():
            outcomes.tell_folder(sweep, HydraConfig.get().job.num, folder)
        return True

    def run(self, main: Callable[[], None], config_name: str) -> None:
        """Run the command: `main` by Hydra, which calls it for each job, then a list of a sweep's failed jobs.

        Args:
            config_name: of the configuration that the command line changes.

        Raises:
            SystemExit: with 1 if jobs failed, or if Hydra refuses the command line.
        """
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors, for us to print
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            sys.exit(f"ConfigError: {advice(error, config_name)}")
        except RunError as error:  # of a job in another process
            self.failed.append(str(error))
        except ValueError as error:
            if self.count:  # of a job
                raise
            sys.exit(f"ConfigError: {advice(error, config_name)}")  # of Hydra, such as at `recipe=null`
        finally:
            states.stop()
            if self.count > 1 and self.failed:
                print(f"{len(self.failed)} of {self.count} jobs failed:", *self.failed, sep="\n  ", file=sys.stderr)
            sweep = outcomes.place()
            if sweep and self.count == 0 and (left := outcomes.end(sweep)):
                print(f"{len(left)} jobs of this sweep are not done:", *left, sep="\n  ", file=sys.stderr)
        if self.failed:
            sys.exit(1)

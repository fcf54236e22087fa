"""`python -m train`: compose the configuration, check it, launch. See configs/train.yaml and train/config.py."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from train.config import COMMAND, TrainConfig, check_launched, to_plain, validate
from train.folders import make, take_back
from train.jobs.errors import ConfigError, report
from train.jobs.slurm import in_submitit
from train.launch import launch


@dataclass
class Jobs:
    """What became of the jobs of this command: one, or those of a sweep."""

    count: int = 0
    folders: dict[Path, dict[str, Any]] = field(default_factory=dict)  # of those that train, with their settings
    failed: list[str] = field(default_factory=list)  # overrides and error

    def enter(self, config: TrainConfig, folder: Path) -> bool:
        """Claim the run folder of a job that trains. False if an earlier job of the sweep was the same in all its
        settings, as are `dynamic=se n=1` and `n=4`: there is nothing left to do.

        Raises:
            ConfigError: it cannot be made, or another job of the sweep has it, which this one would only resume.
        """
        if config.evaluate is not None:
            return True
        settings = {**to_plain(config), "given": None}
        if self.folders.get(folder) == settings:
            print(f"Passed over, the same run as an earlier job of this sweep: {folder}")
            return False
        if folder in self.folders:
            raise ConfigError(
                f"Another job of this sweep has the run folder {folder}: what is swept over must be in its path, by "
                f"label=... or name=..., such as 'label=x${{runtime.micro_batch}}'."
            )
        make(folder)
        self.folders[folder] = settings
        return True

    def tell(self) -> None:
        """Say which jobs of a sweep failed."""
        if self.count > 1 and self.failed:
            print(f"{len(self.failed)} of {self.count} jobs failed:", *self.failed, sep="\n  ", file=sys.stderr)


jobs = Jobs()


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    jobs.count += 1
    try:
        check_launched()
        config = validate(composed)
        config.given = [override.lstrip("+~").partition("=")[0] for override in job.overrides.task]
        if jobs.enter(config, folder):
            launch(config, folder)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        jobs.failed.append(f"{' '.join(job.overrides.task)}: {type(error).__name__}: {first_line}")
        if in_submitit(os.environ) or not report(error):
            raise  # under submitit: through it, to the process that submitted the job
        # An exit would stop a sweep's later jobs.
    finally:
        take_back(folder)


if __name__ == "__main__":
    os.environ[COMMAND] = " ".join(sys.argv[1:])
    try:
        main()
    finally:
        jobs.tell()
    if jobs.failed:
        sys.exit(1)

"""`python -m train`: compose the configuration, check it, launch. See configs/train.yaml and train/config.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from train.config import COMMAND, check_launched, validate
from train.launch import launch, report
from train.slurm import in_submitit

failed: list[str] = []  # of a sweep's jobs


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    try:
        check_launched()
        config = validate(composed)
        config.given = [override.lstrip("+~").partition("=")[0] for override in job.overrides.task]
        launch(config, folder)
    except Exception as error:
        if in_submitit(os.environ) or not report(error):
            raise  # under submitit: through it, to the process that submitted the job
        failed.append(folder.name)  # an exit would stop a sweep's later jobs
    finally:
        remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Take back the folder that Hydra made for a job that left nothing, and those above it."""
    for path in (folder, *folder.parents):
        try:
            path.rmdir()
        except OSError:  # not empty
            return


if __name__ == "__main__":
    os.environ[COMMAND] = " ".join(sys.argv[1:])
    main()
    if failed:
        sys.exit(1)

"""`python -m detection`: compose the configuration, check it, launch. See configs/detection.yaml and config.py."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detection.compose import compose
from detection.config import open_up, validate
from detection.run import launch, quiet
from train.jobs.errors import ConfigError, report
from train.jobs.folder import remove_lock

failed: list[str] = []  # jobs of this command: overrides and error
folders: set[Path] = set()  # of its jobs that train


@hydra.main(version_base="1.3", config_path="../configs", config_name="detection")
def job(composed: DictConfig) -> None:
    given = HydraConfig.get()
    folder = Path(given.runtime.output_dir)
    words = list(given.overrides.task)
    try:
        config = validate(composed)
        with quiet():
            cfg = compose(config, composed)
        if folder in folders and config.evaluate is None:
            raise ConfigError(f"Another job of this sweep has the run folder {folder}: give name=... by what is swept.")
        folders.add(folder)
        launch(config, cfg, folder)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        failed.append(f"{' '.join(words)}: {type(error).__name__}: {first_line}")
        if not report(error):
            raise  # an exit would stop a sweep's later jobs
    finally:
        take_back(folder)


def take_back(folder: Path) -> None:
    """Remove the folder of a job that left nothing, and those above it, if it is below the working directory."""
    here = Path.cwd()
    remove_lock(folder)
    for path in (folder, *folder.parents):
        if here not in path.parents:
            return
        try:
            path.rmdir()
        except OSError:  # not empty
            return


def main() -> None:
    sys.argv[1:] = open_up(sys.argv[1:])
    job()
    if failed:
        print(f"{len(failed)} failed:", *failed, sep="\n  ", file=sys.stderr) if len(folders) > 1 else None
        sys.exit(1)


if __name__ == "__main__":
    main()

"""`python -m detection`: compose the configuration, check it, launch. See configs/detection.yaml and config.py."""

from __future__ import annotations

import sys
from dataclasses import asdict

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detection.compose import compose
from detection.config import added_keys, open_up, validate
from detection.names import run_name
from detection.run import quiet, start
from train.jobs.command import Jobs
from train.jobs.launch import count_processes
from train.jobs.sweep import CONFIGS, check_launcher, run_folder, typed_keys

jobs = Jobs()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="detection")
def main(composed: DictConfig) -> None:
    """Called by Hydra for each job."""
    with jobs.job(composed.runtime):
        check_launcher()
        config = validate(composed)
        with quiet():
            cfg = compose(config, composed, added_keys(HydraConfig.get().overrides.task))
            config.name = config.name or run_name(config, composed)
        count_processes(config.runtime, typed_keys())
        folder = run_folder(config.name, f"seed{config.seed}")
        if config.evaluate is not None or jobs.enter(folder, (asdict(config), cfg.to_dict())):
            start(config, cfg, folder)


if __name__ == "__main__":
    sys.argv[1:] = open_up(sys.argv[1:])
    jobs.run(main, "detection")

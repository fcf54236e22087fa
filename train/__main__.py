"""`python -m train`: compose the configuration, check it, launch. See configs/train.yaml and train/config/."""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from train.config import configure, to_plain
from train.jobs.command import Jobs
from train.jobs.sweep import CONFIGS, check_launcher, run_folder, typed_keys
from train.run import start

jobs = Jobs()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(composed: DictConfig) -> None:
    """Called by Hydra for each job."""
    with jobs.job(composed.runtime):
        check_launcher()
        config = configure(composed, HydraConfig.get())
        folder = run_folder(config.data.name, config.name, f"seed{config.seed}")
        if config.evaluate is not None or jobs.enter(folder, to_plain(config)):
            start(config, folder, typed_keys())


if __name__ == "__main__":
    jobs.run(main, "train")

"""Whether this process is one of several, by the environment that torchrun and our launcher give to each."""

import os


def under_torchrun() -> bool:
    """Whether torchrun, or another launcher with its variables, has started this process. RANK alone says nothing:
    schedulers set it too."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def is_main() -> bool:
    """Whether this process has rank 0, or is alone."""
    return not under_torchrun() or os.environ["RANK"] == "0"

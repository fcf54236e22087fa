"""`python -m helpers.slow_to_leave FOLDER SECONDS`: two workers that need so long to save after a Ctrl-C."""

import os
import signal
import sys
import time
from pathlib import Path

from train.jobs.launch import launch
from train.jobs.settings import Runtime


def work(folder: Path, seconds: float) -> None:
    rank, came = os.environ["RANK"], []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    (folder / f"waits{rank}").touch()
    while not came:
        time.sleep(0.01)
    time.sleep(seconds)
    (folder / f"saved{rank}").touch()
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    from helpers import slow_to_leave  # workers are new processes, which import the function

    launch(slow_to_leave.work, (Path(sys.argv[1]), float(sys.argv[2])), Runtime(devices=2), "slow")

"""`runtime.profile_steps=5`: where the time of a few steps goes, by torch.profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FIRST = 5  # the first step that is profiled, counted from the start of this process; those before it warm up


class StepProfiler:
    """torch.profiler over `steps` steps. Writes profile/trace.json (for chrome://tracing or Perfetto) and
    profile/operations.txt in the run folder. With `steps=0` it does nothing."""

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.folder = folder / "profile"
        self.on_gpu = device.type == "cuda"
        self.profile: profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
            plan = schedule(wait=FIRST - 1, warmup=1, active=steps, repeat=1)
            self.profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write, acc_events=True)

    def start(self) -> None:
        if self.profile:
            self.profile.start()

    def step(self) -> None:
        """Call it after each step."""
        if self.profile:
            self.profile.step()

    def stop(self) -> None:
        """Write what was profiled, if the run ends before all steps were."""
        if self.profile:
            self.profile.stop()

    def _write(self, finished: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self.folder / "trace.json"))
        by = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60)
        (self.folder / "operations.txt").write_text(table + "\n")

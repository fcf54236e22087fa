"""What a figure depends on outside the cases: the machine, the versions, the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from scripts.bench.cases import Settings
from train.jobs.provenance import provenance


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores"


def machine(settings: Settings) -> dict[str, str]:
    # Variables that are known to decide speed or memory: the allocator, and how threads wait.
    keys = [key for key in sorted(os.environ) if re.match("LD_PRELOAD|MALLOC|GLIBC|OMP_|KMP_|MKL_|PYTORCH_", key)]
    return {
        "machine": machine_name(settings.device),
        "threads": str(settings.threads),
        "torch": torch.__version__,
        "dtype": settings.dtype,
        "layout": settings.layout_name
        + (", evaluation as a CUDA graph" if settings.cuda_graph else "")
        + (f", compiled ({settings.compile})" if settings.compile else ""),
        "environment": " ".join(f"{key}={os.environ[key]}" for key in keys) or "nothing set",
        "commit": re.sub(r"(?<=^\w{8})\w+", "", provenance()["commit"] or "unknown"),
    }

"""What a run's numbers depend on, besides its configuration."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch


def provenance(*packages: Any) -> dict[str, Any]:
    """Versions and the commit, with "+" if tracked files were changed since."""
    versions = {package.__name__: package.__version__ for package in (torch, timm, *packages)}
    versions = {"python": platform.python_version(), **versions}
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # not in a git repository

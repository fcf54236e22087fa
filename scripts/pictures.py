"""Picture files that a command takes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from train.jobs.errors import ConfigError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


def pictures_in(folder: Path) -> list[Path]:
    """Those directly in the folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read_picture(path: Path) -> Image.Image:
    """Raises ConfigError if the file cannot be decoded."""
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # decoders raise nearly anything on broken files
        raise ConfigError(f"{path} cannot be read as an image: {error}") from None

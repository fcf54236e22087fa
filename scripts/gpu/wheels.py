"""Collect the wheels that a machine without a package index lacks; `python -m scripts.gpu` installs them there.

    python -m scripts.gpu.wheels .wheels

They are what the trainer and MMDetection need beyond PyTorch and what usually comes with it, in the versions that are
installed here, for Python 3.12 on Linux (x86-64). Packages of pure Python that are published only as source are built
here.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scripts.arguments import argument_parser

PURE = ("timm", "hydra-core", "omegaconf", "antlr4-python3-runtime", "onedl-mmengine", "onedl-mmcv",
        "onedl-mmdetection", "addict", "imaug", "yapf", "platformdirs", "termcolor", "terminaltables")  # fmt: skip
COMPILED = ("pycocotools", "shapely")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argument_parser("gpu.wheels", __doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):  # with two versions of a package, pip installs none
        wheel.unlink()
    # No cache: it may hold an mmcv that was built next to torch, with operators compiled for this machine.
    pip("wheel", "--no-cache-dir", "--wheel-dir", folder, *pinned(PURE))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    pip("download", *target, "--dest", folder, *pinned(COMPILED))
    wheels = sorted(folder.glob("*.whl"))
    impure = [wheel.name for wheel in wheels if not wheel.name.endswith("none-any.whl")]
    if len(impure) != len(COMPILED):
        sys.exit(
            f"Of {', '.join(impure)} only {', '.join(COMPILED)} should be compiled: the others may not load there."
        )
    print(f"{len(wheels)} wheels in {folder}, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.1f} MiB.")


def pinned(names: tuple[str, ...]) -> list[str]:
    try:
        return [f"{name}=={version(name)}" for name in names]
    except PackageNotFoundError as error:
        sys.exit(f"{error.name} is not installed here, so its version is unknown: run make setup-detection first.")


def pip(command: str, *arguments: str | Path) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", command, *quiet, *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()

"""The library alone, as its wheel installs it: in empty environments, without the clone on the path.

    python -m scripts.check_wheel                                            # the oldest torch and timm, and the newest
    python -m scripts.check_wheel python3.12 torch==2.8.0 timm==1.0.31       # one environment of your choice
    python -m scripts.check_wheel --only test_config                         # fewer of the tests

Each environment gets the wheel and pytest, runs README.md's first example, makes a step with two models, and runs the
tests that need nothing else. The oldest versions are the lower bounds in pyproject.toml, which are there because they
passed. Each takes a quarter of an hour on two cores and 6 GB of disk; an environment is removed after its check.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

from scripts.arguments import argument_parser

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
OLDEST, NEWEST = "python3.10", "python3.13"
# What comes with torch and timm: torchvision, PyYAML and safetensors are timm's requirements, numpy is torchvision's.
PYTEST = ("pytest", "pytest-xdist", "pytest-timeout")
AT_HAND = {"kw", "torch", "timm", "torchvision", "numpy", "yaml", "safetensors", "pytest", *sys.stdlib_module_names}
# What follows README.md's example, which leaves `model`.
STEP = """
for each in (model, kw.create_model("resnet18", n="1/4", num_classes=10)):
    each(torch.randn(2, 3, 64, 64)).sum().backward()
assert "site-packages" in kw.__file__, kw.__file__
print(f"kw {kw.__version__}, torch {torch.__version__}, timm {timm.__version__}: two models made a step")
"""


def imports_at_top(source: Path) -> set[str]:
    """What a file imports when it is itself imported: packages by name, and modules of tests/helpers as `helpers.NAME`.
    Imports in a test's own body do not count."""
    found = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "helpers":
            found |= {f"helpers.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.add(module if module.startswith("helpers.") else module.partition(".")[0])
    return found


def library_tests() -> list[Path]:
    """The files of tests/ that need only torch, timm and what comes with them: they and the helpers they import."""

    def at_hand(source: Path) -> bool:
        return all(
            at_hand(TESTS / f"{name.replace('.', '/')}.py") if name.startswith("helpers.") else name in AT_HAND
            for name in imports_at_top(source)
        )

    return [path for path in sorted(TESTS.glob("test_*.py")) if at_hand(path)]


def first_lines() -> str:
    """The first Python example of README.md, and a step with two models."""
    example = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert example, "README.md has no Python example"
    return example[1] + STEP


def oldest() -> list[str]:
    """The lower bounds of the library's dependencies: `torch>=2.5` is torch==2.5.0."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = [re.fullmatch(r"(\w+)>=([\d.]+)", line) for line in declared]
    return [f"{bound[1]}=={bound[2]}{'.0' * (2 - bound[2].count('.'))}" for bound in bounds if bound]


def build(folder: Path) -> Path:
    """The wheel, from a copy: in the clone, setuptools leaves `build/`, and takes in what an older one left there."""
    copy = folder / "source"
    shutil.copytree(ROOT / "kw", copy / "kw", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: Path, python: str, requirements: list[str], only: str | None) -> bool:
    """Whether README.md's example and the tests pass in a new environment, which is removed."""
    print(f"\n{python}, {' '.join(requirements) or 'the newest torch and timm'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="check_wheel-") as name:
        folder = Path(name)
        subprocess.run([python, "-m", "venv", str(folder / "env")], check=True)
        inside = str(folder / "env/bin/python")
        # In a folder without the clone, `kw` can be nothing but what was installed. pytest adds tests/ to the path.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        files = [str(path) for path in library_tests() if only is None or path.stem == only]
        commands = (
            ["pip", "install", "--quiet", "--no-cache-dir", str(wheel), *PYTEST, *requirements],
            ["pytest", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow", "--tb=short", *files],
        )
        install, test = ([inside, "-m", *command] for command in commands)
        return all(
            subprocess.run(command, cwd=folder, env={**environment, "OMP_WAIT_POLICY": "PASSIVE"}).returncode == 0
            for command in (install, [inside, "-c", first_lines()], test)
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser("check_wheel", __doc__)
    parser.add_argument("python", nargs="?", help=f"an interpreter; without it, {OLDEST} and {NEWEST}")
    parser.add_argument("requirements", nargs="*", help="versions for it, such as torch==2.8.0")
    parser.add_argument("--only", help="one file of tests/, without .py")
    options = parser.parse_args(arguments)
    chosen = [(options.python, options.requirements)] if options.python else [(OLDEST, oldest()), (NEWEST, [])]
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        wheel = build(Path(folder))
        passed = {(python, *versions): check(wheel, python, versions, options.only) for python, versions in chosen}
    print()
    for environment, fine in passed.items():
        print("passed" if fine else "FAILED", *environment)
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

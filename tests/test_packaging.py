"""What is installed and from where: pyproject.toml, the lock, the Makefile and environment.yml say the same."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

import kw
from scripts import check_wheel

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
LIBRARY = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
LOCK = (ROOT / "requirements.lock").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PIN = re.compile(r"([a-z0-9-]+)==([^ ;]+)( ; .+)?")


def names(requirements):
    return {canonicalize_name(requirement.name) for requirement in requirements}


def pins():
    lines = [line for line in LOCK.splitlines() if not line.lstrip().startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), [line for line, pin in zip(lines, found, strict=True) if not pin]
    assert len({pin[1] for pin in found}) == len(found), "a package has one version, on every system"
    return {pin[1]: pin[2] for pin in found}


# ---- the library ----


def test_the_library_stands_on_torch_and_timm_with_lower_bounds():
    assert names(LIBRARY) == {"torch", "timm"}
    for requirement in LIBRARY:  # an upper bound would be a guess, and keep others from what works
        assert [bound.operator for bound in requirement.specifier] == [">="], requirement
    assert [line.partition("==")[0] for line in check_wheel.oldest()] == ["torch", "timm"]


def test_kw_is_installed_whole_and_nothing_else():
    found = set(find_packages(str(ROOT), **SETUPTOOLS["packages"]["find"]))
    sources = {path.parent.relative_to(ROOT) for path in (ROOT / "kw").rglob("*.py")}
    assert found == {".".join(folder.parts) for folder in sources}
    assert all(name.partition(".")[0] == "kw" for name in found)


def test_files_of_kw_that_are_no_code_are_installed_too():
    data = SETUPTOOLS["package-data"]
    assert data.keys() == {"kw"} and {"py.typed", "**/*.json"} <= set(data["kw"]) and (ROOT / "kw/py.typed").is_file()
    listed = {path for pattern in data["kw"] for path in (ROOT / "kw").glob(pattern)}
    beside = {path for path in (ROOT / "kw").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert beside == listed


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and SETUPTOOLS["dynamic"]["version"] == {"attr": "kw.__version__"}
    assert importlib.metadata.version("kernelwarehouse") == kw.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == kw.__version__
    assert f"\n## {kw.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_license_is_named_and_there():
    assert PROJECT["license"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / PROJECT["license-files"][0]).read_text()


def test_the_tests_of_the_library_are_found_by_what_they_import():
    found = {path.stem for path in check_wheel.library_tests()}
    assert {"test_golden", "test_functional", "test_layers", "test_backbones", "test_convert"} <= found
    assert not found & {"test_packaging", "test_train", "test_detection", "test_report"}
    for path in check_wheel.library_tests():
        assert not check_wheel.imports_at_top(path) & {"train", "scripts", "detection"}


# ---- the framework ----


def test_the_lock_has_a_version_in_range_of_all_that_is_asked_for():
    locked = pins()
    for requirement in [*LIBRARY, *(one for extra in EXTRAS.values() for one in extra)]:
        assert requirement.specifier, f"{requirement} says no version"
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    command = re.match(r"# .*\n#    (uv pip compile .*)\n", LOCK)[1]
    assert command in MAKEFILE.replace("$(BIN)/", "")


def test_the_extras_are_those_that_make_installs():
    assert EXTRAS.keys() == {"train", "detection", "report", "export", "slurm", "wandb", "dev"}
    installed = re.findall(r'-c requirements\.lock -e "\.\[(.*)\]"', MAKEFILE)
    assert sorted(",".join(installed).split(",")) == sorted(EXTRAS)
    assert installed[-1] == "detection", "make setup does without it"


def test_environment_yml_installs_from_the_lock():
    text = (ROOT / "environment.yml").read_text()
    (pip,) = [line["pip"] for line in yaml.safe_load(text)["dependencies"] if isinstance(line, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    assert f"opencv-python-headless=={pins()['opencv-python-headless']}\n" in text


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("train", ["train", "wandb"]), ("detection", ["detection", "wandb"]), ("scripts", EXTRAS), ("tests", EXTRAS)],
)
def test_what_the_framework_imports_is_asked_for(folder, extras):
    declared = names(LIBRARY).union(*(names(EXTRAS[extra]) for extra in extras))
    # Which distribution a package is of, is known of what is installed; detection's may not be.
    known = importlib.metadata.packages_distributions()
    own = {path.name for path in ROOT.iterdir()} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    here = {"playwright", "triton"}  # skipped where it is not installed; torch's own, where it has one
    for source in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in imported} - own - here - sys.stdlib_module_names - {""}:
                of = {canonicalize_name(distribution) for distribution in known.get(name, [])}
                assert not of or of & declared, f"{source}: {name}"

"""kw stands on torch and timm alone: it knows nothing of training, scripts or detection."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kw

SOURCES = sorted(Path(kw.__file__).parent.rglob("*.py"))
STRANGERS = {"train", "scripts", "detection", "tests", "hydra", "omegaconf", "mmdet", "mmengine", "mmcv"}


def test_importing_kw_imports_no_stranger():
    code = "import sys, kw; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(run.stdout.split())
    assert {"kw", "torch", "timm"} <= imported
    assert not imported & STRANGERS


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_source_imports_torch_timm_and_the_standard_library_alone(source):
    imported = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            imported.add(node.module.partition(".")[0])
    # Triton comes with torch where it can be used; elsewhere the file does without it.
    optional = {"triton"} if source.stem == "implicit" else set()
    assert imported <= {"kw", "torch", "timm", *optional, *sys.stdlib_module_names}


@pytest.mark.parametrize(("package", "stranger"), [("train", "detection"), ("detection", "train")])
def test_train_and_detection_do_not_know_each_other(package, stranger):
    for source in (Path(kw.__file__).parents[1] / package).rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] in (stranger, "scripts") for name in names), source

"""kw stands on torch and timm alone: it knows nothing of training, scripts or detection."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kw

SOURCES = sorted(Path(kw.__file__).parent.rglob("*.py"))
STRANGERS = {"train", "scripts", "detection", "tests", "hydra", "omegaconf", "mmdet", "mmengine", "mmcv"}


def test_importing_kw_imports_no_stranger():
    code = "import sys, kw; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
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
    # Triton comes with torch where it can be used, safetensors and huggingface_hub with timm; ONNX's packages are
    # imported when they are needed. Without them, their files do without, or say what to install.
    others = {"implicit": "triton", "folder": "safetensors", "hub": "huggingface_hub", "per_sample": "onnx"}
    optional = {others[source.stem]} if source.stem in others else set()
    assert imported <= {"kw", "torch", "timm", *optional, *sys.stdlib_module_names}


def imports(source):
    """Full names of all that a file imports, such as `kw.config.KWConfig`."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, package):
    return f"{name}.".startswith(f"{package}.")


@pytest.mark.parametrize(
    ("package", "strangers", "shared"),
    [("train", ("detection", "scripts"), ()), ("detection", ("train", "scripts"), ("train.jobs",))],
)
def test_train_and_detection_share_only_jobs(package, strangers, shared):
    sources = list((Path(kw.__file__).parents[1] / package).rglob("*.py"))
    assert sources
    for source in sources:
        for name in imports(source):
            allowed = any(within(name, part) for part in shared)
            assert allowed or not any(within(name, stranger) for stranger in strangers), f"{source} imports {name}"


def test_no_function_has_the_name_of_a_module():
    """Such a function would hide the module: `package.name` would be the function."""
    for path in SOURCES:
        *packages, name = path.relative_to(Path(kw.__file__).parents[1]).with_suffix("").parts
        found = vars(sys.modules[".".join(packages)]).get(name)
        assert found is None or isinstance(found, ModuleType), path


def reached(module, graph):
    """All modules of kw that a module imports, also through others."""
    found, waiting = set(), [module]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def test_modules_of_kw_do_not_import_each_other_in_a_circle_and_conversion_knows_nothing_of_freezing_and_profiles():
    root = Path(kw.__file__).parents[1]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    del names["kw"]
    graph = {
        module: {
            max((known for known in names if within(name, known)), key=len, default=None) for name in imports(path)
        }
        - {None}
        for module, path in names.items()
    }
    assert {"kw.layers", "kw.temperature"} <= reached("kw.conversion", graph), "the graph has edges"
    for module in graph:
        assert module not in reached(module, graph)
    for module, stranger in [
        ("conversion", "freezing"),
        ("conversion", "profiling"),
        ("released", "freezing"),
        ("temperature", "freezing"),
        ("freezing", "profiling"),
        ("layers", "conversion"),
    ]:
        assert f"kw.{stranger}" not in reached(f"kw.{module}", graph), f"{module} imports {stranger}"

"""Tests for a GPU. Without one they are skipped; in a dry run (`make gpu DRY=1`) they run on the CPU, tiny."""

import os

import pytest
import torch

DRY = "GPU_DRY" in os.environ
# Before cuBLAS starts: without it, torch's deterministic mode refuses matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    for item in items:
        if os.path.dirname(__file__) not in str(item.path):
            continue
        if not torch.cuda.is_available() and not DRY:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or GPU_DRY=1 to run tiny on the CPU"))
        elif DRY and item.get_closest_marker("no_dry"):
            item.add_marker(pytest.mark.skip(reason="means nothing on a CPU"))
        elif DRY and getattr(item, "callspec", None) and item.callspec.params.get("setting") == "triton":
            item.add_marker(pytest.mark.skip(reason='"triton folded" is enough in the interpreter'))


@pytest.fixture
def device():
    return torch.device("cpu" if DRY else "cuda")


@pytest.fixture(autouse=True)
def memory_for_others():
    """Give back the memory that a test leaves with its allocator: several processes share the GPU."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def dry():
    return DRY


@pytest.fixture
def tf32():
    """Sets whether float32 products may be computed in TF32; afterwards it is as before."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def allow(value):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = value

    yield allow
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def pytest_runtest_logreport(report):
    """Print a failure at once: a run that is stopped at its time limit prints no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid}: failed\n{report.longreprtext}", flush=True)

"""What every test has: a fixed seed, and one thread where pytest-xdist runs several processes."""

import importlib.util
import math
import os

import pytest

# On CPUs with AMX, oneDNN's bfloat16 convolutions of few channels now and then give gradients that are not finite, of
# static models too (torch 2.11). Read when oneDNN is first used, also by the processes that tests start.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before kw imports it: Triton's kernels then run on the CPU

from helpers.implementations import SETTINGS, force

from kw import functional

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# `make setup` installs no detection; `make test` does, and there all tests run.
NO_DETECTION = importlib.util.find_spec("mmdet") is None
collect_ignore_glob = ["test_detection*.py"] if NO_DETECTION else []


def pytest_report_header():
    return "without tests of detection: MMDetection is not installed (make setup-detection)" if NO_DETECTION else []


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Each choice has its tests in test_functional.py and test_compute.py. Elsewhere `make test` takes one that torch's own
# operators compute ("auto" takes such for small layers), and one of this library's operator.
SOME = ("auto", "blocks folded")


@pytest.fixture(params=[pytest.param(choice, marks=() if choice in SOME else pytest.mark.slow) for choice in SETTINGS])
def each_choice(request):
    """The test runs once for each choice of how to compute a layer; its name."""
    with force(request.param):
        yield request.param


@pytest.fixture
def fold_all(monkeypatch):
    """Freezing folds each layer that can be folded, also where it saves little."""
    module = importlib.import_module("kw.freezing")
    monkeypatch.setattr(module, "WORTHWHILE", 0)
    monkeypatch.setattr(module, "LEAST_SAVED", -math.inf)


@pytest.fixture
def default_setting():
    yield
    functional.set_default()

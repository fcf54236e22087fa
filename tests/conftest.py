"""What every test has: a fixed seed, and one thread where pytest-xdist runs several processes."""

import importlib.util
import os

import pytest
import torch

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


@pytest.fixture(params=functional.WAYS)
def each_way(request):
    """The test runs once with each way to compute a layer; the name of it."""
    with functional.use(request.param):
        yield request.param

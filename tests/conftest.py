"""What every test has: a fixed seed, and one thread where pytest-xdist runs several processes."""

import os

import pytest
import torch

from kw import functional

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=functional.WAYS)
def each_way(request):
    """The test runs once with each way to compute a layer; the name of it."""
    with functional.use(request.param):
        yield request.param

"""What can be known of a GPU without one: that kernels compile for it and fit, and that models run on fake tensors
there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.implementations import force
from helpers.selection import representative
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kw
from kw.compute import Geometry, cost, implicit, samples
from kw.compute.mixing import mix
from kw.functional import Choice

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a block of threads can have, by compute capability


@pytest.mark.parametrize("capability", SHARED)
def test_every_block_that_can_be_chosen_compiles_and_fits(capability):
    command = [sys.executable, str(Path(__file__).with_name("helpers") / "compile_ahead.py"), str(capability)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {tuple(line["block"][:2]) for line in lines} == {(a, b) for a in (128, 64, 16) for b in (128, 64, 16)}
    assert {line["kernel"] for line in lines} == {"_convolve", "_grad_kernels"}
    for line in lines:
        assert 0 < line["shared"] <= SHARED[capability], line
        # Hopper's own matrix instructions take 64 rows and more.
        hopper = capability == 90 and line["block"][0] >= 64 and line["dtype"] != "torch.float64"
        assert line["wgmma"] == hopper, line


@pytest.mark.parametrize("dtype", implicit.DTYPES)
@pytest.mark.parametrize("size", [1, 16, 49, 64, 100, 128, 196, 784, 3136])
def test_a_block_is_not_much_larger_than_what_it_is_for(size, dtype):
    block = implicit.blocks(size, size, dtype)
    assert block.rows == block.columns and block.depth * dtype.itemsize == 128
    assert -(-size // block.rows) * block.rows <= max(16, 1.35 * size)


def fake(model, device):
    """The model's parameters and buffers as fake tensors, that is of a device that need not be there."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model


ON_FAKES = [
    *(
        ("resnet18", choice, train)
        for choice in ("auto", "grouped", "batched", "triton folded")
        for train in (False, True)
    ),
    *((backbone, "auto", True) for backbone in ("mobilenetv2_050", "convnext_tiny", "deit_tiny_patch16_224")),
]


@pytest.mark.parametrize("backbone, choice, train", representative(ON_FAKES, lambda _, choice, train: train))
def test_models_run_on_fake_tensors_of_a_gpu(backbone, choice, train):
    model = timm.create_model(f"kw_{backbone}", n=1, num_classes=10).train(train).bfloat16()
    kw.set_temperature(model, 0.5)
    with FakeTensorMode(), force(choice):
        out = fake(model, "cuda")(torch.empty(4, 3, 224, 224, device="cuda", dtype=torch.bfloat16))
    assert out.device.type == "cuda" and out.shape == (4, 10) and out.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "terms"), [(torch.bfloat16, 48), (torch.float32, 48), (torch.float64, 48)])
def test_products_read_rows_of_16_bytes(dtype, terms):
    """And so not number by number, which takes a GPU several times as long."""
    weights, basis = torch.randn(2, 3, 47), torch.randn(47, 4, 5)
    wide, long = samples._aligned(weights, basis, dtype)
    assert wide.shape == (2, 3, terms) and long.shape == (terms, 4, 5) and {wide.dtype, long.dtype} == {dtype}
    torch.testing.assert_close(
        mix(wide.double(), long.double()), mix(weights.to(dtype).double(), basis.to(dtype).double())
    )


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Choices as on a GPU without a table, for inputs that are not there."""
    monkeypatch.setattr(implicit, "INTERPRETED", False)
    with FakeTensorMode():
        yield lambda *shape: torch.empty(*shape, device="cuda", dtype=torch.bfloat16)


THREE = Geometry((9, 2, 2), (3, 3), (1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("geometry", "shape", "applied"),
    [
        (THREE, (8, 64, 14, 14), "triton"),
        (Geometry((9, 2, 1), (3, 3), (1, 1), (1, 1), (1, 1), groups=64), (8, 64, 14, 14), "grouped"),
        (Geometry((27, 2, 2), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)), (8, 64, 4, 14, 14), "batched"),
        (Geometry((1, 2, 1)), (8, 64, 100), "triton"),
        (Geometry((1, 2, 2), (3, 3), (1, 1), (1, 1), (1, 1)), (8, 64, 14, 14), "grouped"),  # cells span positions
        (THREE, (0, 64, 14, 14), "grouped"),
    ],
)
def test_without_measured_prices_a_gpu_takes_triton_where_it_applies(on_a_gpu, geometry, shape, applied):
    cells = on_a_gpu(20, 32, 32)
    assert kw.functional.choose(kw.functional.Setting(), on_a_gpu(*shape), cells, geometry).apply == applied


def test_without_triton_products_are_batched(on_a_gpu, monkeypatch):
    monkeypatch.setattr(implicit, "AVAILABLE", False)
    monkeypatch.setattr(kw.functional, "_seen", kw.functional._possible)
    choice = kw.functional.choose(kw.functional.Setting(), on_a_gpu(8, 64, 14, 14), on_a_gpu(20, 32, 32), THREE)
    assert choice == Choice("cells", "batched")


def test_without_measured_prices_kernels_are_made_by_the_least_arithmetic_and_traffic(on_a_gpu):
    """For each of |W| entries: n B of cells and B moved; (n + B) (H + 1) folded and B + H + 1 moved."""
    hidden = 15
    for n, batch in (
        (552, 128),
        (2000, 128),
        (108, 2),
        (108, 16),
        (108, 128),
        (1000, 8),
        (1000, 16),
        (1000, 32),
        (1000, 128),
    ):
        folded = cost.FOLDED * ((n + batch) * 16 + cost.MOVED * (batch + 16)) < (n + cost.MOVED) * batch
        cells = on_a_gpu(n, 32, 32)
        choice = kw.functional.choose(kw.functional.Setting(), on_a_gpu(batch, 64, 14, 14), cells, THREE, hidden)
        assert choice == Choice("folded" if folded else "cells", "triton")


def test_a_choice_that_was_not_measured_is_not_weighed():
    prices = kw.compute.prices.table("cpu")
    x = torch.empty(8, 64, 14, 14)
    for choice in (Choice("cells", "triton"), Choice("folded", "triton")):
        done = cost.work(choice, tuple(x.shape), (20, 32, 32), THREE, 16, "cpu")
        assert cost.cost(choice, done, prices, step=True) is None


def test_half_a_gigabyte_of_kernels_is_made_in_parts(monkeypatch):
    """As many samples at a time as the limit allows, and as equal as can be."""
    seen = []
    monkeypatch.setattr(samples, "mix_into", lambda kernels, *_: seen.append(len(kernels)))
    geometry, weights = Geometry((1, 1, 1)), torch.empty(100, 1, 3)
    monkeypatch.setattr(samples, "ENTRIES", 30 * 8 * 8)
    parts = [part for part, _ in samples._kernels(torch.empty(100, 8, 4), weights, torch.empty(3, 8, 8), geometry)]
    assert seen == [25, 25, 25, 25] and [part.start for part in parts] == [0, 25, 50, 75]

"""Counting kernels and waits: of a model whose operators are known, and of dynamic layers."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import kw
from kw.compute import implicit
from scripts.bench import launches
from scripts.bench.launches import Count, attribute, count_operators

triton_only = pytest.mark.skipif(implicit.triton is None, reason="Triton is not installed")
IMAGE = torch.zeros(2, 3, 32, 32)


def dynamic(n="1"):
    return timm.create_model("kw_resnet18", n=n, layers=(1, 1, 1, 1))


def test_operators_of_a_static_model_are_counted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    count = count_operators(model, IMAGE, train=False)
    assert [name for _, name in count.operators] == ["convolution.default", "relu.default", "addmm.default"]
    assert count.total(count.kernels) == 3 and not count.syncs  # views are none
    count = count_operators(model, IMAGE, train=True)
    assert count.total(count.kernels, phase="backward") > count.total(count.kernels, phase="forward") > 3


def test_a_wait_is_counted_where_it_happens():
    model = dynamic()
    model.layer2[0].conv1.attention.fc1.register_forward_hook(lambda module, args, out: out * out.sum().item())
    count = count_operators(model, IMAGE, train=False)
    assert dict(count.syncs) == {("layer2.0.conv1", "forward", "attention"): 1}


@triton_only
@pytest.mark.parametrize("train", [False, True])
def test_kernels_of_triton_are_counted_and_not_run(train):
    before = dict(vars(implicit))
    with kw.functional.use("triton"):
        count = count_operators(dynamic(), IMAGE, train)
    names = [name for (layer, *_), name in count.operators if layer == "layer1.0.conv1"]
    assert names.count("triton:_grad_kernels") == int(train)
    assert names.count("triton:_convolve") == 1 + train  # forward, and the gradient of the input
    assert dict(vars(implicit)) == before


@pytest.mark.parametrize("choice", ["batched", "blocks", "blocks+folded"])
def test_a_layers_operators_are_distinguished(choice):
    with kw.functional.use(*choice.split("+")):
        count = count_operators(dynamic(), IMAGE, train=True)
    for part in launches.PARTS:
        assert count.total(count.kernels, "layer1.0.conv1", "forward", part) > 0
    assert count.total(count.kernels, "layer1.0.conv1", "backward") > 0
    assert count.total(count.kernels, launches.REST, "forward") > 0
    assert count.total(count.kernels) == len(count.operators)


def test_the_script_prints_counts_and_operators(capsys):
    launches.main(["resnet18", "1", "--size", "32", "--choice", "batched", "--operators", "layer1.0.conv1"])
    text = capsys.readouterr().out
    assert "layer4.1.conv2" in text and "The static backbone" in text and "bmm.default" in text


def test_what_a_profiler_records_is_counted_by_the_ranges_it_is_launched_in():
    def event(name, start, end, device=torch.autograd.DeviceType.CPU):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)

    events = [
        event("layer: a", 0, 10), event("cudaLaunchKernel", 1, 2), event("cuLaunchKernelEx", 3, 4),
        event("aten::mm", 1, 2), event("layer: b", 20, 30), event("cudaMemcpyAsync", 21, 22),
        event("cudaStreamSynchronize", 22, 23), event("cudaLaunchKernel", 40, 41),
        event("layer: a", 0, 50, torch.autograd.DeviceType.CUDA),
    ]  # fmt: skip
    count = Count()
    attribute(events, count)
    assert [count.total(count.kernels, name) for name in ("a", "b", launches.REST)] == [2, 1, 1]
    assert dict(count.syncs) == {("b", "", ""): 1}

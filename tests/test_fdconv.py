"""FDConv: numbers of its release (tests/golden_fdconv), its state dict, and what its spectrum promises."""

import json

import numpy as np
import pytest
import torch
from helpers import golden_recipe as recipe
from helpers.programs import ROOT
from torch import nn
from torch.nn import functional as F

import kw
from kw.baselines.fdconv import Attentions, FDConv2d, _filtered, _lower, load_released, to_released
from kw.baselines.layer import pool

FOLDER = ROOT / "tests/golden_fdconv"
CASES = json.loads((FOLDER / "cases.json").read_text())
EXPECTED = np.load(FOLDER / "cases.npz")


def fill(key, shape):
    """By the table of tests/golden_fdconv/README.md."""
    v = recipe.values(key, shape)
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if key.endswith("running_var"):
        v = 1 + 0.2 * v
    elif key.endswith("running_mean"):
        v = 0.05 * v
    elif key.endswith(("relu.scale", "norm.weight", "bn.weight")):
        v = 1 + 0.1 * v
    elif key.endswith("bias"):
        v = 0.1 * v
    elif key.endswith("dft_weight") or "FBM" in key:
        v = (0.05 if key.endswith("dft_weight") else 0.2) * v
    else:
        v = v * (3 / np.prod(shape[1:])) ** 0.5
    return torch.from_numpy(v).float()


def made(case):
    layer = FDConv2d(*case["arguments"], **case["keywords"])
    layer.load_released({key: fill(key, shape) for key, shape in case["state_dict"].items()})
    return layer


def close(actual, expected):
    expected = torch.from_numpy(expected)
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_releases(name):
    case = CASES[name]
    layer = made(case)
    assert sum(p.numel() for p in layer.parameters()) == case["params"]
    image = torch.from_numpy(recipe.values("image", case["input_shape"])).float().requires_grad_()
    close(layer.eval()(image), EXPECTED[f"{name}/eval"])
    out = layer.train()(image)
    close(out, EXPECTED[f"{name}/train"])
    (out * torch.from_numpy(recipe.values("cotangent", out.shape)).float()).sum().backward()
    assert image.grad.norm().item() == pytest.approx(case["grad_norm_input"], rel=1e-4)
    for parameter in layer.parameters():
        parameter.data = parameter.grad  # so that to_released names the gradients
    norms = {key: value.norm().item() for key, value in to_released(layer).items() if key in case["grad_norms"]}
    assert norms == pytest.approx(case["grad_norms"], rel=1e-4, abs=1e-4)


def test_a_models_released_state_dict_loads_strictly():
    model, other = (kw.create_model("resnet18", dynamic="fdconv", num_classes=3) for _ in range(2))
    released = {key: value.clone() for key, value in to_released(other).items()}
    assert released["layer2.0.conv1.KSM_Global.fc.weight"].shape == (16, 64, 1, 1) and "conv1.weight" in released
    load_released(model, released)
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    changes = {"layer2.0.conv1.dft_weight": None, "layer9.weight": torch.zeros(1), "fc.bias": torch.zeros(4)}
    for key, value in changes.items():
        broken = {**released, key: value} if value is not None else {k: v for k, v in released.items() if k != key}
        with pytest.raises(ValueError, match=key):
            load_released(model, broken)


def test_released_state_dicts_are_read_and_written_by_the_functions_of_the_library():
    model, other = (kw.create_model("resnet18", dynamic="fdconv", num_classes=3) for _ in range(2))
    kw.load_released(model, {"state_dict": kw.to_released(other)})
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    for call in (kw.to_released, lambda model: kw.load_released(model, {})):
        with pytest.raises(ValueError, match=r"another method \(ODConv2d\)"):
            call(kw.create_model("resnet18", n=2, dynamic="odconv"))


def test_static_weights_are_the_model_at_zero_scores():
    """As its release converts a trained static model. Layers that stay static, stem, shortcuts and head come along."""
    torch.manual_seed(1)
    static = kw.create_model("resnet18", n="static", num_classes=7, channels=[16, 32, 32, 64]).double().eval()
    model = kw.create_model("resnet18", dynamic="fdconv", num_classes=7, channels=[16, 32, 32, 64]).double().eval()
    kw.load_static(model, static.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert (model(x) - static(x)).abs().max() > 1e-3  # a_filter does not begin at 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attention." in name or ".bands." in name:
                parameter.zero_()
    torch.testing.assert_close(model(x), static(x), rtol=1e-10, atol=1e-10)
    torch.manual_seed(1)
    built = kw.create_model(
        "resnet18", n=1, dynamic="fdconv", num_classes=7, channels=[16, 32, 32, 64], from_weights=True
    )
    torch.testing.assert_close(built.layer2[0].conv2.weight, model.layer2[0].conv2.weight.float())
    with pytest.raises(ValueError, match=r"'layer1\.0\.conv1' \(ODConv2d\) has no place"):
        kw.load_static(kw.create_model("resnet18", n=2, dynamic="odconv"), static.state_dict())


def test_a_bool_for_groups_is_refused():
    """nn.Conv2d has groups before bias, which other lists of arguments leave out."""
    with pytest.raises(TypeError, match=r"groups=True.*bias"):
        FDConv2d(32, 32, 3, 1, 1, 1, True, 16)


def test_at_zero_scores_the_kernel_is_the_static_one_and_the_input_whole():
    layer = FDConv2d(32, 48, 3, padding=1, bias=True).double().eval()
    static = nn.Conv2d(32, 48, 3, padding=1).double()
    for part in [*layer.attention.modules(), layer.bands.scores]:
        if part is not layer.attention.norm:
            for parameter in part.parameters(recurse=False):
                nn.init.zeros_(parameter)
    with torch.no_grad():
        layer.weight.copy_(layer._spectrum(static.weight))
        layer.bias.copy_(static.bias)
        images = torch.randn(2, 32, 9, 14, dtype=torch.float64)
        torch.testing.assert_close(layer(images), static(images))


def test_parameters_in_resnet50_are_those_of_the_paper():
    with torch.device("meta"):
        model = kw.create_model("resnet50", dynamic="fdconv")
    extra = sum(p.numel() for p in model.parameters()) - 25_557_032
    assert extra == 3_647_120  # published: + 3.6 M
    assert sum(isinstance(m, FDConv2d) for m in model.modules()) == 48 and type(model.conv1) is nn.Conv2d


def test_groups_are_runs_of_rising_frequency_of_the_same_length():
    layer = FDConv2d(32, 64, 3, kernel_num=64)
    assert layer.group_of.flatten().bincount().tolist() == [192 * 49 // 64] * 64
    assert layer.group_of[0, 0] == 0 and layer.group_of[96, 48] == 63  # the mean, and the highest frequency
    uneven = FDConv2d(24, 20, 1).group_of.flatten().bincount()  # 260 frequencies
    assert len(uneven) == 64 and uneven.max() - uneven.min() == 1


def test_a_model_whose_layers_all_stay_static_is_no_comparison_without_a_word():
    with pytest.warns(UserWarning, match=r"fdconv makes nothing dynamic in Sequential: .*\(2\).* another method"):
        kw.baselines.convert(nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3))), "fdconv")
    with pytest.warns(UserWarning, match="dyconv with n = 1 makes nothing .* n = 2"):
        kw.baselines.convert(nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3))), "dyconv")


@pytest.mark.parametrize("arguments", [(16, 64, 3), (64, 64, 5), (64, 64, 3, 1, 1, 1, 2), (3, 64, 7)])
def test_small_grouped_and_other_kernels_stay_static(arguments):
    layer = FDConv2d(*arguments)
    assert layer.attention is None and set(dict(layer.named_parameters())) == {"weight", "bias"}
    image = torch.randn(2, arguments[0], 12, 12)
    padding = arguments[4] if len(arguments) > 4 else 0
    expected = F.conv2d(image, layer.weight, layer.bias, padding=padding, groups=layer.groups)
    torch.testing.assert_close(layer(image), expected)


def test_without_a_number_of_groups_there_are_half_the_output_channels_and_scores_are_divided():
    layer = FDConv2d(32, 36, 1, kernel_num=None)
    assert layer.group_count == 18 and layer.attention.heat == pytest.approx(18**0.5)
    with pytest.raises(ValueError, match="kernel_num=0"):
        FDConv2d(32, 36, 1, kernel_num=0)
    with pytest.raises(ValueError, match="batch of one"):
        layer.train()(torch.randn(1, 32, 4, 4))


def test_groups_follow_a_model_from_the_meta_device():
    with torch.device("meta"):
        layer = FDConv2d(32, 64, 3)
    assert layer.group_of.is_meta
    assert torch.equal(layer.to_empty(device="cpu").group_of, FDConv2d(32, 64, 3).group_of)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_groups_and_bands_do_not_depend_on_the_default_dtype(dtype):
    images, groups = torch.randn(2, 64, 12, 12), FDConv2d(64, 64, 3).group_of
    low = _filtered(images)
    torch.set_default_dtype(dtype)
    try:
        others, other_low = FDConv2d(64, 64, 3).group_of, _filtered(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(others, groups)
    assert all(torch.equal(*pair) for pair in zip(other_low, low, strict=True))


@pytest.mark.parametrize("channels", [16, 64])
def test_reset_parameters_draws_a_kernel_of_the_same_size(channels):
    layer, fresh = FDConv2d(channels, 64, 3), FDConv2d(channels, 64, 3)
    parameters = dict(layer.named_parameters())
    nn.init.ones_(layer.bias)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, fresh.weight) and not layer.bias.any()
    assert layer.weight.std().item() == pytest.approx(fresh.weight.std().item(), rel=0.1)
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("batch", [2, 6])
def test_a_layer_compiles_as_one_graph(batch):
    """With fewer samples than groups, and with more."""
    layer, images = FDConv2d(20, 24, 3, padding=1, kernel_num=5), torch.randn(batch, 20, 7, 8)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), layer(images))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_large_batch_of_small_images_has_the_numbers_of_single_ones(kernel):
    """As many samples as groups: kernels are sums of a basis, and bands products with a matrix."""
    layer = FDConv2d(20, 24, kernel, padding=kernel // 2, kernel_num=5).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(6, 20, 7, 8, dtype=torch.float64)
    grads = []
    for parts in ([images], images.split(1)):
        layer.zero_grad()
        out = torch.cat([layer(part) for part in parts])
        out.square().sum().backward()
        grads.append([out.detach(), *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*grads)


def test_under_autocast_kernels_and_bands_are_computed_in_float32():
    """As Fourier transforms are, so that the precision does not depend on the batch."""
    layer, images = FDConv2d(20, 24, 3, padding=1, kernel_num=5).eval(), torch.randn(6, 20, 7, 8)
    attentions = layer.attention(pool(images))
    alone = [Attentions(*(None if part is None else part[k : k + 1] for part in attentions)) for k in range(6)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        of_all, of_each = layer.kernels(attentions), torch.cat([layer.kernels(one) for one in alone])
        low_of_all, low_of_each = _lower(images)[0], torch.cat([_lower(one)[0] for one in images.split(1)])
    assert of_all.dtype == low_of_all.dtype == torch.float32
    torch.testing.assert_close(of_all, of_each, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low_of_all, low_of_each, rtol=1e-5, atol=1e-6)


def test_layers_are_traced_and_exported_for_other_batches_and_sizes():
    model = nn.Sequential(FDConv2d(24, 24, 3, padding=1), FDConv2d(24, 32, 1)).eval()
    images, others, larger = torch.randn(3, 24, 16, 16), torch.randn(3, 24, 16, 16), torch.randn(5, 24, 20, 12)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, images)(others), model(others), rtol=1e-3, atol=1e-4)
        program = torch.export.export(model, (images,), dynamic_shapes=(sizes,)).module()
        torch.testing.assert_close(program(larger), model(larger), rtol=1e-3, atol=1e-4)

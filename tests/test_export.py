"""Exports: files that are read again by their runtimes compute what the model does, at sizes that no example had."""

import copy
import shutil

import pytest
import torch
from helpers.selection import representative
from torch import nn

import kw
from kw.backbones import BACKBONES
from kw.export.check import compare, difference

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runner = pytest.importorskip("kw.export.to_onnx").runner
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="torch 2.5 exports no varying batch")

LEAST = {  # the least blocks of each backbone
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32], "stem_width": 16},
    "resnet50": {"layers": [1, 1, 1, 1]},
    "mobilenetv2_100": {},
    "mobilenetv2_050": {},
    "convnext_tiny": {"depths": [1, 1, 1, 1]},
    "deit_tiny_patch16_224": {"depth": 1, "img_size": 64},
    "deit_small_patch16_224": {"depth": 1, "img_size": 64},
}
SLOW = pytest.mark.slow


def trained(model, tau=0.0):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    kw.set_temperature(model, tau)
    return model.eval()


def backbone(name, n, tau=0.0, **kwargs):
    return trained(kw.create_model(name, n=n, num_classes=7, **LEAST[name], **kwargs), tau)


def layers(tau=0.3):
    """A layer of every kind in one small model: dense, strided, grouped, depthwise, dilated, pointwise, linear."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1, 2),
        nn.Conv2d(8, 8, 3, groups=2, padding=2, dilation=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
    )  # fmt: skip
    kw.convert(model, {"0": "stem", "2": "depth", "3": "point", "4": "grouped", "7": "linear"}, kw.KWConfig(n=2))
    return trained(model, tau)


def assert_runs(run, model, *sizes, close=1e-4):
    for batch in (1, 3, 8):
        for size in sizes:
            x = torch.randn(batch, *size)
            with torch.no_grad():
                expected = model(x)
            torch.testing.assert_close(run((x,))[0], expected, rtol=close, atol=close * expected.abs().max().item())


@pytest.fixture(scope="module")
def layers_and_file(tmp_path_factory):
    torch.manual_seed(0)
    model = layers().train()  # the file is of the model in evaluation mode
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    done = kw.export.onnx(model, path, torch.randn(1, 3, 20, 24))
    assert model.training
    return model.eval(), path, done


def test_layers_of_every_kind_run_at_any_batch_and_size(layers_and_file):
    model, path, done = layers_and_file
    assert done.varying == ("batch", "height", "width") and done.difference < 1e-4
    assert "opset 18" in str(done) and "onnxruntime" in str(done)
    assert_runs(runner(path), model, (3, 20, 24), (3, 33, 17))


def test_the_file_has_onnxs_own_operators_and_names_its_sizes(layers_and_file):
    proto = onnx.load(layers_and_file[1])
    onnx.checker.check_model(proto, full_check=True)
    assert [opset.domain for opset in proto.opset_import] == [""] and not proto.functions
    (given,), (out,) = proto.graph.input, proto.graph.output
    assert (given.name, out.name) == ("input", "output")
    sizes = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]
    # A convolution for each sample: one for a batch of one, and a scan for others. Matrices need none.
    assert sum(node.op_type == "If" for node in proto.graph.node) == 3
    assert not any(node.op_type == "Conv" for node in proto.graph.node)


def test_a_file_that_differs_from_the_model_is_refused(layers_and_file):
    model, path, _ = layers_and_file
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[7].bias += 1
    with pytest.raises(kw.export.ExportError, match=r"model\.onnx differs from the model by"):
        difference(other, runner(path), (torch.randn(2, 3, 20, 24),), 1e-4, path)


def test_a_file_that_differs_at_other_sizes_only_is_refused(layers_and_file):
    model, path, done = layers_and_file
    assert done.tried == ((40, 24), (20, 48)) and "and on images of 40 x 24" in str(done)
    x = torch.randn(2, 3, 20, 24)

    def of_this_height(inputs):
        return [model(inputs[0][:, :, :20])]

    def of_this_width(inputs):
        if inputs[0].shape[3] != 24:
            raise RuntimeError("Got: 48 Expected: 24\nmore")
        return [model(inputs[0])]

    assert compare(model, of_this_height, (x,), ("batch", "width"), 1e-4, path) == (0, ((20, 48),))
    with pytest.raises(kw.export.ExportError, match=r"differs .* for an input of \(2, 3, 40, 24\)"):
        compare(model, of_this_height, (x,), ("batch", "height", "width"), 1e-4, path)
    with pytest.raises(
        kw.export.ExportError, match=r"onnx does not run on an input of \(2, 3, 20, 48\): Got: 48 E.*24\."
    ):
        compare(model, of_this_width, (x,), ("batch", "height", "width"), 1e-4, path)


CASES = [(name, n) for name in BACKBONES for n in ("1/2" if name != "resnet18" else "1/4", 1, 4)]


@pytest.mark.timeout(1200)  # a busy machine takes minutes for the larger ones
@pytest.mark.parametrize(
    ("name", "n"), representative(CASES, lambda name, n: (name, n) == ("deit_tiny_patch16_224", "1/2"))
)
def test_backbones_agree_with_onnxruntime(name, n, tmp_path):
    model = backbone(name, n)
    done = kw.export.onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 64, 64))
    assert done.difference < 1e-4
    assert done.varying == (("batch",) if name.startswith("deit") else ("batch", "height", "width"))
    assert_runs(runner(done.path), model, (3, 64, 64), *([] if name.startswith("deit") else [(3, 96, 64)]))


@SLOW
@pytest.mark.parametrize("freeze", [{"memory": 9.0}, {"dtype": torch.int8}, {"dtype": torch.bfloat16}])
def test_frozen_models_agree_too(freeze, tmp_path, fold_all):
    model = backbone("resnet18", 4)
    kw.freeze(model, **freeze)
    done = kw.export.onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 64, 64), check=False)
    # In the file sums are in float32; in PyTorch they may be in bfloat16.
    assert_runs(runner(done.path), model, (3, 64, 64), close=1e-4 if "memory" in freeze else 3e-2)


@SLOW
def test_at_temperature_one_convolutions_are_onnxs_own(tmp_path):
    model = backbone("resnet18", 1, tau=1)
    kw.freeze(model)
    done = kw.export.onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 64, 64))
    kinds = {node.op_type for node in onnx.load(done.path).graph.node}
    assert "Conv" in kinds and not kinds & {"If", "Scan", "BatchNormalization"}


@SLOW
@pytest.mark.parametrize("method", ["odconv", "dyconv", "condconv", "dcd", "se"])
def test_other_methods_are_exported(method, tmp_path):
    model = kw.create_model("resnet18", dynamic=method, n=2, **LEAST["resnet18"]).eval()
    assert kw.export.onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 64, 64)).difference < 1e-4


@SLOW
def test_sizes_vary_also_if_the_last_map_of_the_example_is_one_pixel(tmp_path):
    """As in the digits model at 32 pixels: torch takes the 1 for a constant, and the file failed for larger images."""
    model = kw.create_model("resnet18", n="1/2", num_classes=3, layers=(1, 1, 1, 1), channels=(16, 16, 16, 16)).eval()
    done = kw.export.onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 32, 32))
    assert done.varying == ("batch", "height", "width")
    run = runner(done.path)
    for size in ((2, 3, 32, 32), (5, 3, 64, 32), (1, 3, 40, 72)):
        x = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(run((x,))[0], model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_several_outputs_are_numbered(tmp_path):
    """The feature maps of a detector's backbone."""
    model = kw.create_model("resnet18", n=1, features_only=True, out_indices=(2, 3), **LEAST["resnet18"]).eval()
    done = kw.export.onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 64, 64))
    assert [value.name for value in onnx.load(done.path).graph.output] == ["output_0", "output_1"]


def two_layers():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    return trained(kw.convert(model, {"1": "w"}, kw.KWConfig(n=2)))


def test_float16_weights_halve_the_file(tmp_path):
    model = two_layers()
    done = kw.export.onnx(model, tmp_path / "half.onnx", torch.randn(2, 3, 16, 16), half=True, sizes=False)
    assert done.path.stat().st_size < 0.6 * sum(parameter.nbytes for parameter in model.parameters())
    assert 0 < done.difference < 1e-2 and done.varying == ("batch",)


def test_a_program_of_torch_runs_at_any_batch_and_size(tmp_path):
    model = two_layers()
    done = kw.export.program(model, tmp_path / "model.pt2", torch.randn(2, 3, 20, 24))
    run = torch.export.load(done.path).module()
    assert_runs(lambda inputs: [run(*inputs)], model, (3, 20, 24), (3, 33, 17))


@SLOW
@pytest.mark.timeout(1200)  # a minute of one core for the compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_aotinductor_runs_at_any_batch(tmp_path):
    model = layers()
    done = kw.export.compiled(model, tmp_path / "model.pt2", torch.randn(2, 3, 20, 24))
    assert done.difference < 1e-4 and done.varying == ("batch",)
    run = torch._inductor.aoti_load_package(str(done.path))
    x = torch.randn(5, 3, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"example": "images"}, "example has a str; it must be a tensor"),
        ({"path": "model.pt"}, r"must end in \.pt2"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(arguments, said, tmp_path):
    given = {"path": tmp_path / "m.pt2", "example": torch.randn(2, 3, 20, 24), **arguments}
    with pytest.raises(kw.export.ExportError, match=said) as raised:
        kw.export.program(layers(), **given)
    assert "\n" not in str(raised.value)


def test_a_model_whose_code_depends_on_the_batch_is_named(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, -1)

    with pytest.raises(kw.export.ExportError, match="cannot record this Fixed") as raised:
        kw.export.program(Fixed(), tmp_path / "m.pt2", torch.randn(2, 3, 8, 8))
    assert "\n" not in str(raised.value)


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(kw.export.ExportError, match=r"onnxruntime is not installed: pip install .*\[export\]"):
        kw.export.onnx(layers(), tmp_path / "m.onnx", torch.randn(2, 3, 20, 24))

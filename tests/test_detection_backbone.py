"""The backbone for MMDetection: feature maps of any timm model, what is frozen, and checkpoints that fill it."""

from types import SimpleNamespace

import pytest
import timm
import torch
from helpers.selection import paired, representative
from mmdet.registry import MODELS
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import kw
from detection import (  # noqa: F401  torchvision_ops: so that mmcv has operators
    KWBackbone,
    SimplePyramid,
    TemperatureWarmup,
    feature_channels,
    saving,
    torchvision_ops,
)
from detection.plugin import pretrained
from detection.plugin.errors import PretrainedError, SettingError
from kw.attention import Attention
from kw.layers import DynamicLayer, KWLayer
from train.jobs.reading import FORMAT

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}


def backbone(n="1", **settings):
    return KWBackbone(**{"name": "resnet18", "n": n, "kwargs": SMALL, **settings})


MAPS = [
    ("resnet18", (1, 2, 3, 4), SMALL),
    ("resnet18", (2, 3), SMALL),
    ("mobilenetv2_050", (1, 2, 3, 5), {}),
    ("mobilenetv2_050", (0, 2), {}),
    ("regnety_002", (1, 2, 3, 4), {}),
    ("deit_tiny_patch16_224", (2, 5), {"depth": 6, "dynamic_img_size": True, "dynamic_img_pad": True}),
]


@pytest.mark.parametrize("maps, n", paired(MAPS, ["static", None, "1", "1/2"]))
def test_maps_have_the_channels_and_strides_that_it_states(maps, n):
    name, out_indices, kwargs = maps
    model = MODELS.build({"type": "KWBackbone", "name": name, "n": n, "out_indices": out_indices, "kwargs": kwargs})
    maps = model(torch.randn(2, 3, 64, 96))
    assert [m.shape[1] for m in maps] == model.channels == feature_channels(name, out_indices, kwargs)
    assert [m.shape[2:] for m in maps] == [(64 // s, 96 // s) for s in model.strides]
    assert any(isinstance(m, KWLayer) for m in model.modules()) == (n not in ("static", None))
    sum(m.sum() for m in maps).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]  # nothing that is not used is kept


def test_mobilenetv2_gives_the_published_maps():
    assert feature_channels("mobilenetv2_100", (1, 2, 3, 5)) == [24, 32, 96, 1280]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet19"}, "resnet18"),
        ({"out_indices": (4, 3)}, r"out_indices=\(4, 3\).*4 \(16 channels, 1/32\)"),
        ({"out_indices": (1, 6)}, "out_indices"),
        ({"out_indices": ()}, "out_indices"),
        ({"n": "3/2"}, "n='3/2'"),
        ({"frozen_stages": 5}, "stages 1 to 4"),
        ({"kwargs": {"nonsense": 1}}, "nonsense"),
        ({"warehouse": {"nonsense": 1}}, "nonsense"),
        ({"dynamic": "nonsense"}, "nonsense.*odconv"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(SettingError, match=message):
        backbone(**settings)


def test_settings_of_warehouses_and_drop_path_arrive():
    model = backbone(warehouse={"reduction": 1}, drop_path=0.2)
    assert {m.fc1.out_features for m in model.modules() if isinstance(m, Attention)} == {16, 64}
    assert {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"} == {0.2}


@pytest.mark.parametrize("stages, n", paired([-1, 0, 1, 2], ["static", "1", "4"]))
def test_frozen_stages_stand_still(n, stages):
    """After steps of training: no gradient, and neither weights nor running statistics have moved, nor the maps."""
    model = backbone(n, frozen_stages=stages).train()
    images = torch.randn(4, 3, 64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen_before = model.eval()(images)[max(stages - 1, 0)].detach().clone()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        sum(m.square().mean() for m in model(images)).backward()
        optimizer.step()
    stands = ("conv1", "bn1", *(f"layer{k}" for k in range(1, stages + 1)))
    for name, value in model.state_dict().items():
        part = name.removeprefix("model.").partition(".")[0]
        if name.endswith(("cells", "num_batches_tracked", "temperature")):
            continue
        assert torch.equal(before[name], value) == (stages >= 0 and part in stands), name
    drawn_from = {
        layer.warehouse
        for name, layer in model.model.named_modules()
        if isinstance(layer, KWLayer) and name.startswith(stands) and stages >= 0
    }
    for warehouse in getattr(model.model, "warehouses", {}).values():
        (key,) = (key for key, p in model.named_parameters() if p is warehouse.cells)
        same = torch.equal(before[key], warehouse.cells)
        assert same == (warehouse in drawn_from) == (warehouse.cells.grad is None)
    if stages >= 1:
        assert torch.equal(model.eval()(images)[stages - 1], frozen_before)


def test_the_norms_of_attentions_alone_stay_in_evaluation_mode():
    model = backbone(norm_eval="attention").train()
    of_attentions = {m.norm for m in model.modules() if isinstance(m, Attention)}
    assert of_attentions
    assert {m for m in model.modules() if isinstance(m, _BatchNorm) and not m.training} == of_attentions
    sum(
        m.mean() for m in model(torch.randn(1, 3, 64, 64))
    ).backward()  # a batch of one, which theirs could not train on


@pytest.mark.parametrize("n", ["static", "1"])
def test_norms_in_evaluation_mode_stay_there_and_take_a_batch_of_one(n):
    model = backbone(n, norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert model.training and norms and not any(m.training for m in norms)
    before = {name: value.clone() for name, value in model.named_buffers()}
    sum(m.mean() for m in model(torch.randn(1, 3, 64, 64))).backward()
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert all(m.weight.grad is not None for m in norms)  # they learn


def test_temperatures_are_zero_frozen_or_not_training_or_not():
    model = backbone(frozen_stages=1)
    for mode in (True, False):
        temperatures = [float(m.temperature) for m in model.train(mode).modules() if isinstance(m, Attention)]
        assert set(temperatures) == {0.0} and len(temperatures) == 11


def test_from_scratch_the_norms_of_other_methods_attentions_keep_their_statistics():
    model = backbone(n=2, dynamic="odconv", norm_eval="attention").train()
    inside = [m for layer in model.modules() if isinstance(layer, DynamicLayer) for m in layer.attention.modules()]
    norms = [m for m in inside if isinstance(m, nn.BatchNorm1d)]
    assert norms and not any(m.training for m in norms) and model.model.layer2[0].bn1.training


@pytest.mark.parametrize("method", ["odconv", "dyconv", "fdconv"])
def test_a_method_to_compare_with_serves_as_well(method, tmp_path):
    """It trains, but for its frozen stages, and its own checkpoint fills it."""
    whole = kw.create_model("resnet18", n=4, dynamic=method, num_classes=7, **SMALL)
    torch.save(ours(whole), tmp_path / "last.pt")
    model = filled(tmp_path / "last.pt", n=4, dynamic=method, frozen_stages=1, norm_eval=True).train()
    assert model.model.state_dict().keys() == whole.state_dict().keys() - {"fc.weight", "fc.bias"}
    assert_same_body(model, whole)
    assert [float(temperature.value) for temperature in kw.temperatures(model)] == [0.0] * (method != "fdconv")
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    parts = ("model.conv1", "model.bn1", "model.layer1")
    assert all((p.grad is None) == name.startswith(parts) for name, p in model.named_parameters())


WIDE = {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 64], "stem_width": 32}  # FDConv needs over 16 channels


def test_fdconv_trains_its_attentions_in_frozen_stages_too():
    """As its release does: its filter attention does not begin at 1."""
    model = backbone(dynamic="fdconv", kwargs=WIDE, frozen_stages=1, norm_eval=True).train()
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {p.requires_grad == (name in trained) for name, p in model.named_parameters()} == {True}
    stage = {name for name, _ in model.named_parameters() if name.startswith("model.layer1")}
    own = {name for name in stage if ".attention." in name or ".bands." in name}
    assert own and stage & trained == own and not any(name.startswith("model.conv1") for name in trained)
    model = backbone(dynamic="fdconv", kwargs=WIDE, frozen_stages=1, drop_path=0.5).train()
    training = {name for name, m in model.model.layer1.named_modules() if m.training}
    assert training and all(".attention" in name or ".bands" in name for name in training)


@pytest.mark.parametrize(("dynamic", "n"), [("fdconv", 1), ("se", 1), (None, "static"), ("static", "static")])
def test_a_method_without_a_budget_needs_no_n(dynamic, n):
    model = backbone(None, dynamic=dynamic, kwargs=WIDE)
    assert model.n == n and any(isinstance(m, DynamicLayer) for m in model.modules()) == (n == 1)


@pytest.mark.parametrize("method", ["odconv", "kw"])
def test_a_method_with_a_budget_is_not_static_without_a_word(method):
    with pytest.raises(SettingError, match=f"'{method}' needs a budget"):
        backbone(None, dynamic=method)
    with pytest.raises(SettingError, match=r"fdconf.*fdconv"):
        backbone(None, dynamic="fdconf")


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
@pytest.mark.parametrize(("method", "n"), [("fdconv", 1), ("kw", 2)])
def test_a_static_checkpoint_starts_a_dynamic_backbone(method, n, wrap, tmp_path):
    static = kw.create_model("resnet18", n="static", num_classes=7, **WIDE)
    torch.save(wrap(static.state_dict()), tmp_path / "static.pt")
    torch.save(ours(static), tmp_path / "run.pt")
    kw.save(static, tmp_path / "folder")
    wanted = kw.create_model("resnet18", n=n, dynamic=method, num_classes=7, **WIDE)
    kw.load_static(wanted, static.state_dict())
    for file in ("static.pt", "run.pt", "folder"):
        init = {"type": "Pretrained", "checkpoint": str(tmp_path / file), "num_classes": 7}
        settings = {"n": n, "dynamic": method, "kwargs": WIDE}
        model = backbone(**settings, init_cfg={**init, "static": True})
        model.init_weights()
        assert torch.equal(model.model.layer1[0].bn1.weight, wanted.layer1[0].bn1.weight)
        if method == "fdconv":
            assert torch.equal(model.model.layer2[0].conv2.weight, wanted.layer2[0].conv2.weight)
        with pytest.raises(PretrainedError, match="does not fit"):
            backbone(**settings, init_cfg=init).init_weights()


def test_a_released_static_checkpoint_starts_a_dynamic_backbone(tmp_path):
    static = kw.create_model("mobilenetv2_050", n="static", num_classes=7)
    torch.save({"state_dict": kw.to_released(static)}, tmp_path / "released.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "released.pth"), "num_classes": 7, "static": True}
    model = KWBackbone("mobilenetv2_050", n=1, out_indices=(1, 2, 3, 5), init_cfg=init)
    model.init_weights()
    assert torch.equal(model.model.blocks[1][0].bn1.weight, static.blocks[1][0].bn1.weight)


# Checkpoints


def classifier(name="resnet18", n="1", **kwargs):
    """A classification model whose every entry has a value of its own, its temperature in the midst of the warm-up."""
    model = timm.create_model(f"kw_{name}", n=n, **kwargs)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.random_(100) if value.dtype == torch.int64 else value.uniform_()
    return model


def ours(model, classes=7):
    return {"format": FORMAT, "model": model.state_dict(), "ema": None, "classes": [str(k) for k in range(classes)],
            "config": {"name": "a_run"}}  # fmt: skip


def filled(path, **settings):
    init = {"type": "Pretrained", "checkpoint": str(path), **settings.pop("init", {})}
    model = backbone(init_cfg=init, **settings)
    model.init_weights()
    return model


def assert_same_body(model, whole):
    expected = whole.state_dict()
    for name, value in model.model.state_dict().items():
        wanted = torch.zeros(()) if name.endswith("temperature") else expected[name]
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("n", ["static", "1", "1/2"])
def test_a_checkpoint_of_ours_fills_it_and_the_temperature_is_zero(n, tmp_path):
    whole = classifier(n=n, num_classes=7, **SMALL)
    torch.save(ours(whole), tmp_path / "last.pt")
    assert_same_body(filled(tmp_path / "last.pt", n=n, frozen_stages=1), whole)


def test_a_model_folder_fills_it(tmp_path):
    whole = classifier(n="1/2", num_classes=7, **SMALL)
    for name, value in whole.state_dict().items():  # images of 224 pixels would need tame weights
        if name.endswith("running_var"):
            value.add_(1e4)
    kw.save(whole, tmp_path / "mine", data={"input_size": (3, 32, 32)})
    assert_same_body(filled(tmp_path / "mine", n="1/2"), whole)
    with pytest.raises(PretrainedError, match=r"the folder's model is .*n=1/2.* and this backbone .*tanh"):
        filled(tmp_path / "mine", n="1/2", warehouse={"attention_function": "tanh"})
    (tmp_path / "mine/config.json").unlink()
    with pytest.raises(PretrainedError, match=r"has no config\.json"):
        filled(tmp_path / "mine", n="1/2")


RELEASED = [("mobilenetv2_050", "1/2"), ("mobilenetv2_050", "1"), ("convnext_tiny", "1")]


@pytest.mark.parametrize("name, n", representative(RELEASED, lambda name, n: name == "mobilenetv2_050"))
def test_a_released_checkpoint_fills_it(name, n, tmp_path):
    """Also where the classifier is dynamic, and has a warehouse of its own (MobileNetV2 at n = 1/2)."""
    whole = classifier(name, n)
    torch.save({"state_dict": kw.to_released(whole)}, tmp_path / "released.pth")
    indices = (0, 1, 2, 3) if name == "convnext_tiny" else (1, 2, 3, 5)
    assert_same_body(filled(tmp_path / "released.pth", name=name, n=n, out_indices=indices, kwargs={}), whole)


def test_timms_own_weights_fill_it_as_safetensors_too(tmp_path):
    whole = classifier(n="static", num_classes=5, **SMALL)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    assert_same_body(filled(tmp_path / "model.safetensors", n="static", init={"num_classes": 5}), whole)


def test_an_average_of_the_weights_is_taken_if_asked_for(tmp_path):
    one, other = classifier(num_classes=7, **SMALL), classifier(num_classes=7, **SMALL)
    torch.save({**ours(one), "ema": other.state_dict()}, tmp_path / "last.pt")
    assert_same_body(filled(tmp_path / "last.pt", init={"ema": True}), other)
    torch.save(ours(one), tmp_path / "last.pt")
    with pytest.raises(PretrainedError, match="no averaged weights"):
        filled(tmp_path / "last.pt", init={"ema": True})


def test_what_is_left_out_is_named(tmp_path, monkeypatch):
    torch.save(ours(classifier(num_classes=7, **SMALL)), tmp_path / "last.pt")
    messages = []
    monkeypatch.setattr(pretrained, "print_log", lambda text, logger: messages.append(text))
    filled(tmp_path / "last.pt")
    assert messages[0].endswith("last feature map: fc.bias, fc.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].pop("layer3.0.bn2.weight"), r"1 missing \(layer3.0.bn2.weight\)"),
        (lambda s: s["model"].update({"layer9.weight": torch.zeros(1)}), r"1 left over \(layer9.weight\)"),
        (lambda s: s["model"].update({"bn1.bias": torch.zeros(3)}), r"1 of another shape \(bn1.bias\)"),
        (lambda s: s["model"].pop("fc.weight"), r"1 missing \(fc.weight\)"),
        (lambda s: s["classes"].pop(), r"2 of another shape \(fc.bias, fc.weight\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, message, tmp_path):
    state = ours(classifier(num_classes=7, **SMALL))
    change(state)
    torch.save(state, tmp_path / "last.pt")
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "last.pt")})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PretrainedError, match=message):
        model.init_weights()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_budget_is_refused_by_the_run_it_is_of(tmp_path):
    torch.save(ours(classifier(n="1/2", num_classes=7, **SMALL)), tmp_path / "last.pt")
    with pytest.raises(PretrainedError, match="It is of the run a_run"):
        filled(tmp_path / "last.pt", n="1")


@pytest.mark.parametrize("init", [{"type": "Kaiming"}, {"prefix": "backbone."}, {"checkpoint": None}])
def test_an_init_cfg_of_another_kind_is_refused(init):
    with pytest.raises(SettingError, match="init_cfg"):
        filled("nowhere.pt", init=init)


def test_a_simple_pyramid_has_the_strides_of_a_feature_pyramid():
    neck = SimplePyramid([16], 8, num_outs=5)
    maps = neck((torch.randn(1, 16, 8, 12),))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 32, 48), (1, 8, 16, 24), (1, 8, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3)]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in neck.parameters())
    with pytest.raises(SettingError):
        SimplePyramid([16, 16], 8)


def test_the_vanilla_backbone_computes_what_timms_features_do():
    model = backbone("static").eval()
    plain = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4), **SMALL).eval()
    plain.load_state_dict(model.model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for ours_, theirs in zip(model(images), plain(images), strict=True):
        torch.testing.assert_close(ours_, theirs)


def test_maps_can_be_normalized():
    model = backbone(out_norm=True).eval()
    for feature in model(torch.randn(2, 3, 64, 64)):
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), atol=1e-4, rtol=0)
    assert all(isinstance(m, nn.LayerNorm) for m in model.out_norms)


@pytest.mark.parametrize("steps", [5, 20])
def test_the_temperature_falls_over_the_first_steps_and_stays(steps):
    model = backbone()
    runner = SimpleNamespace(model=SimpleNamespace(backbone=model), iter=0)
    hook, found = TemperatureWarmup(steps), []
    for step in range(10):
        runner.iter = step
        hook.before_train_iter(runner, 0)
        (tau,) = {round(float(m.temperature), 4) for m in model.modules() if isinstance(m, Attention)}
        found.append(tau)
    assert found == [round(1 - (k + 1) / steps, 4) if k < steps else 0.0 for k in range(10)]


def test_a_damaged_newest_checkpoint_of_a_detector_is_told_when_an_earlier_one_is_read(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    for name in ("last.pt", "previous.pt"):
        torch.save({"format": saving.FORMAT}, tmp_path / "checkpoints" / name)
    assert saving.latest(tmp_path).name == "last.pt" and not capsys.readouterr().err
    (tmp_path / "checkpoints/last.pt").write_bytes(b"cut off")
    assert saving.latest(tmp_path).name == "previous.pt"
    assert "last.pt is damaged" in (told := capsys.readouterr().err) and "previous.pt is read in its" in told

"""What is said of attentions is what the model computes; it tells anchored from free, and fixed from dynamic."""

import csv
import re

import numpy as np
import pytest
import torch
from helpers.browser import CHROMIUM, PLAYWRIGHT, loaded
from helpers.training import NARROW, TINY, config
from PIL import Image
from plotly.offline import get_plotlyjs
from torch import nn

import kw
from kw.layers import KWLayer
from scripts.attentions import page
from scripts.attentions.__main__ import main
from scripts.attentions.collect import attend, collect
from scripts.attentions.load import Options, choose_images, load_model
from scripts.attentions.statistics import by_warehouse, statistics, usage, warehouse_values
from train.config import to_plain
from train.jobs.checkpoints import FORMAT
from train.jobs.errors import DataError
from train.model import build_model

CLASSES = [str(digit) for digit in range(10)]


def small(n="1"):
    made = config(*TINY, *NARROW, f"n={n}")
    return made, build_model(made, 10).eval()


def images_of(classes, each, size=16):
    """Batches of noise around a color of each class."""
    generator = torch.Generator().manual_seed(1)
    centers = 2 * torch.randn(classes, 3, 1, 1, generator=generator)
    for _ in range(each):
        yield centers + 0.3 * torch.randn(classes, 3, size, size, generator=generator), torch.arange(classes)


@pytest.fixture(params=["1/4", "1", "4"])
def found(request):
    _, model = small(request.param)
    return model, statistics(collect(model, images_of(3, 8), CLASSES[:3]))


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", ["1/4", "4"])
def test_attentions_are_those_that_the_model_mixes_with(n, tau):
    _, model = small(n)
    kw.set_temperature(model, tau)
    for layer in (module for module in model.modules() if isinstance(module, KWLayer)):
        pooled = torch.randn(5, layer.attention.fc1.in_features)
        whole = attend(layer.attention, pooled)
        assert torch.allclose(whole[..., :-1].float(), layer.attention(pooled), atol=1e-6)
        sums = whole.abs().sum(dim=2)
        assert sums.max() <= 1 + 1e-9 and (sums.min() > 0.9 or tau)  # but for the epsilon


def test_a_model_is_left_as_it_was():
    _, model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    collect(model, images_of(2, 2), CLASSES[:2])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("n", ["1/4", "1", "4"])
def test_at_temperature_one_all_is_at_its_anchor(n):
    _, model = small(n)
    kw.set_temperature(model, 1.0)
    for layer in statistics(collect(model, images_of(3, 4), CLASSES[:3])):
        assert (layer.moved, layer.anchored, layer.dynamic) == pytest.approx((0, 1, 0), abs=1e-9)
        assert layer.others == pytest.approx(0) and layer.effective == pytest.approx(1)
        assert layer.zero == pytest.approx(1 - min(kw.config.parse_budget(n), 1))
        assert layer.kept == pytest.approx(1) and layer.classes.abs().max() < 1e-9


def test_shares_add_up_and_nothing_leaves_its_range(found):
    model, layers = found
    names = [name for name, module in model.named_modules() if isinstance(module, KWLayer)]
    assert sorted(layer.name for layer in layers) == sorted(names)
    for layer in layers:
        assert layer.own + layer.others + layer.zero == pytest.approx(1) == float(layer.by_owner.sum())
        for key in ("own", "others", "zero", "negative", "anchored", "moved", "by_class"):
            assert 0 <= getattr(layer, key) <= 1, key
        assert 1 <= layer.effective <= layer.mean.shape[1] + 1
        assert layer.mean.shape == layer.deviation.shape and len(layer.shift) == len(layer.mean)


def test_warehouses_are_the_mean_over_their_mixtures(found):
    model, layers = found
    for name, group in by_warehouse(layers).items():
        warehouse = model.warehouses[name]
        assert [layer.name for layer in group] == [share.kernel.name for share in warehouse.shares]
        shift = torch.cat([layer.shift for layer in group])
        assert warehouse_values(group)["moved"] == pytest.approx(float(shift.mean()))
        assert usage(group).shape == (len(warehouse.cells),) and float(usage(group).mean()) == pytest.approx(1)


def test_what_depends_on_the_class_is_reported_from_what_depends_on_the_image():
    _, model = small()
    alike = statistics(
        collect(
            model,
            ((torch.randn(1, 3, 16, 16).expand(2, 3, 16, 16), torch.tensor([0, 1])) for _ in range(30)),
            CLASSES[:2],
        )
    )
    by_class = statistics(
        collect(model, ((images[:2], torch.tensor([0, 1])) for images, _ in images_of(2, 30)), CLASSES[:2])
    )
    one = statistics(
        collect(model, ((images, torch.zeros(3, dtype=torch.long)) for images, _ in images_of(3, 4)), CLASSES[:1])
    )
    assert all(layer.by_class < 0.02 for layer in alike) and all(layer.dynamic > 0 for layer in alike)
    assert all(layer.by_class > 0.5 for layer in by_class[:4])
    assert all(layer.by_class is None for layer in one)
    still = torch.randn(1, 3, 16, 16)
    fixed = statistics(collect(model, ((still, torch.tensor([0])) for _ in range(3)), CLASSES[:1]))
    assert all(layer.dynamic < 1e-4 for layer in fixed)


def test_the_mean_and_deviation_are_those_of_all_images():
    _, model = small("1/2")
    batches = list(images_of(3, 5))
    alphas = []
    layer = model.layer1[0].conv2
    handle = layer.attention.register_forward_hook(lambda module, inputs, output: alphas.append(output))
    with torch.no_grad():
        layers = statistics(collect(model, batches, CLASSES[:3]))
    handle.remove()
    alpha = torch.cat(alphas).double()
    (found,) = [each for each in layers if each.name == "layer1.0.conv2"]
    assert torch.allclose(found.mean, alpha.mean(dim=0), atol=1e-6)
    assert torch.allclose(found.deviation, alpha.std(dim=0, correction=0), atol=1e-4)


def test_a_layer_that_is_used_twice_counts_twice():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = kw.convert(
        nn.Sequential(shared, nn.ReLU(), shared), scope=lambda name, layer: "all" if name == "0" else None
    )
    (layer,) = statistics(collect(model, [(torch.randn(4, 8, 6, 6), torch.zeros(4, dtype=torch.long))], ["a"]))
    assert layer.own + layer.zero == pytest.approx(1) and int(layer.sums.counts.sum()) == 8


def test_attentions_that_are_not_finite_are_reported_by_their_layer():
    _, model = small()
    model.layer2[0].conv1.attention.fc2.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match=re.escape("'layer2.0.conv1'")):
        collect(model, images_of(2, 1), CLASSES[:2])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made, model = small("1/2")
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "last.pt"
    path.parent.mkdir()
    state = {"format": FORMAT, "model": model.state_dict(), "ema": None, "config": to_plain(made), "classes": CLASSES}
    torch.save(state, path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("ant", "bee<b>"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_the_command_leaves_tables_pictures_and_a_page(checkpoint, tmp_path, capsys):
    main([f"checkpoint={checkpoint.parents[1]}", "classes=4", "per_class=3", f"out={tmp_path}/out"])
    out = tmp_path / "out"
    assert "12 images of 4 classes" in capsys.readouterr().out
    layers = list(csv.DictReader((out / "layers.csv").open()))
    assert len(layers) == 11 and all(0 <= float(row["moved"]) <= 1 for row in layers)
    assert len(list(csv.DictReader((out / "classes.csv").open()))) == 11 * 4
    assert [row["warehouse"] for row in csv.DictReader((out / "warehouses.csv").open())] == [
        f"stage{s}" for s in range(4)
    ]
    text = (out / "index.html").read_text()
    assert loaded(text) == [] and "default-src 'none'" in text and len(text) - len(get_plotlyjs()) < 6_000_000
    assert all(f"Warehouse stage{s}" in text for s in range(4))


def test_the_page_has_the_mean_attentions_of_each_class(checkpoint, folder, tmp_path):
    main([f"checkpoint={checkpoint}", f"images={folder}", f"out={tmp_path}/out"])
    text = (tmp_path / "out" / "index.html").read_text()
    assert "class ant, minus the mean" in text and "bee<b>" not in text


def test_a_heat_map_shows_the_attentions_by_class_with_frames_and_anchors():
    _, model = small("1")
    layers = statistics(collect(model, images_of(2, 4), ["ant", "bee<b>"]))
    for name, members in by_warehouse(layers).items():
        maps = {what: values for what, values, _ in page.maps_of(members, ["ant", "bee<b>"])}
        less = maps["class ant, minus the mean"] + maps["class bee<b>, minus the mean"]
        assert less.abs().max() < 1e-9  # two classes of as many images each
        assert torch.allclose(maps["class ant"] - maps["class ant, minus the mean"], maps["mean over all images"])
        figure = page.heat_map(members, page.maps_of(members, ["ant", "bee<b>"]))
        heat = [trace for trace in figure.data if trace.type == "heatmap"]
        assert [trace.name for trace in heat] == [page.plain(what) for what in maps]
        assert all(np.asarray(trace.z).shape == (len(trace.y), len(trace.x)) for trace in heat)
        assert np.allclose(heat[0].z, maps["mean over all images"].numpy(), atol=1e-6)
        buttons = figure.layout.updatemenus[0].buttons
        shown = [button.args[0]["visible"] for button in buttons]
        assert [sum(each[: len(heat)]) for each in shown] == [1] * len(heat) and all(all(e[len(heat) :]) for e in shown)
        frames = [(shape.x0 + 0.5, shape.x1 + 0.5) for shape in figure.layout.shapes if shape.type == "rect"]
        shares = model.warehouses[name].shares
        assert frames == [(share.start, share.start + share.owned) for share in shares]
        dots = sum(len(trace.x) for trace in figure.data if trace.type == "scatter")
        assert dots == sum(cell < len(heat[0].x) for share in shares for cell in share.anchors)


def test_a_large_model_leaves_classes_out_of_its_page_and_then_the_deviation(monkeypatch):
    _, model = small("1")
    layers = statistics(collect(model, images_of(2, 2), CLASSES[:2]))
    size = sum(layer.mean.numel() for layer in layers)
    for most, classes, deviation in ((6 * size, True, True), (2 * size, False, True), (size, False, False)):
        monkeypatch.setattr(page, "MOST", most)
        text = page.attentions_page("title", "", layers, ["ant", "bee"])
        assert ("class ant, minus the mean" in text, '"deviation over images"' in text) == (classes, deviation)


def test_images_are_taken_evenly_from_folders_with_or_without_classes(folder):
    made, _ = small()
    classes, loads = choose_images(Options(checkpoint="x", images=str(folder), per_class=2), made)
    assert classes == ["ant", "bee<b>"] and [target for _, target in loads] == [0, 0, 1, 1]
    classes, loads = choose_images(Options(checkpoint="x", images=str(folder / "ant")), made)
    assert classes == ["ant"] and len(loads) == 3
    classes, loads = choose_images(Options(checkpoint="x", classes=3, per_class=2), made)
    assert classes == ["0", "3", "6"] and [target for _, target in loads] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "checkpoint=''"),
        (["checkpoint"], "KEY=VALUE"),
        (["checkpoint={run}", "classes=0"], "classes=0"),
        (["checkpoint={run}", "classes=many"], "classes=many"),
        (["checkpoint={run}", "ema=maybe"], "ema=maybe"),
        (["checkpoint={run}", "clases=3"], "clases=3: did you mean classes="),
        (["checkpoint={run}", "data.rot=x"], "data.rot"),
        (["checkpoint={run}", "ema=true"], "no average"),
        (["checkpoint={run}", "n=4"], "leave n=4 out"),
        (["checkpoint=nowhere.pt"], "nowhere.pt does not exist"),
        (["checkpoint={run}", "images=nowhere"], "images=nowhere"),
        (["checkpoint={run}", "images={empty}"], "no images"),
        (["checkpoint={foreign}"], "backbone=resnet18 n=1/4"),
        (["checkpoint={foreign}", "backbone=resnet18", "n=static"], "no attentions"),
        (["checkpoint={foreign}", "backbone=resnet18", "n=1/4"], "does not fit"),
        (["checkpoint={foreign}", "backbone=resnet18", "per_clas=1"], "per_clas"),
    ],
)
def test_what_cannot_be_done_ends_in_a_line(words, said, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    places = {"run": checkpoint, "empty": tmp_path / "empty", "foreign": tmp_path / "foreign.pth"}
    with pytest.raises(SystemExit, match=re.escape(said)) as exit:
        main([word.format(**places) for word in words])
    assert "\n" not in str(exit.value)


def test_the_data_of_a_run_may_be_elsewhere_now(checkpoint):
    options = Options(checkpoint=str(checkpoint))
    assert load_model(options, ["data.image_size=24"])[1].data.image_size == 24
    assert load_model(options, [])[1].data.image_size == 16


@pytest.mark.skipif(
    not (CHROMIUM and PLAYWRIGHT), reason="needs Chromium and playwright, which `make setup` leaves out"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_in_a_browser(scheme, checkpoint, folder, tmp_path):
    from playwright.sync_api import sync_playwright

    main([f"checkpoint={checkpoint}", f"images={folder}", f"out={tmp_path}/out"])
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(color_scheme=scheme, viewport={"width": 1360, "height": 900})
        wrong = []
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        shown.on("console", lambda message: wrong.append(message.text))
        shown.goto(f"file://{tmp_path}/out/index.html")
        assert shown.locator(".heatmaplayer image").count() >= 4
        shown.click(".updatemenu-header >> nth=0")
        shown.click(".updatemenu-dropdown-button >> nth=2")
        assert "class ant" in shown.text_content(".updatemenu-header >> nth=0")
        browser.close()
    assert wrong == []


def test_a_released_checkpoint_is_read_too(tmp_path, folder):
    model = kw.backbones.BACKBONES["resnet18"].create(n="1/4", num_classes=1000)
    torch.save(kw.to_released(model), tmp_path / "released.pth")
    words = [f"checkpoint={tmp_path}/released.pth", f"images={folder}", "per_class=1", f"out={tmp_path}/out"]
    main([*words, "backbone=resnet18", "n=1/4", "data.image_size=64"])
    assert len(list(csv.DictReader((tmp_path / "out" / "layers.csv").open()))) == 19

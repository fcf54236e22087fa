"""Model folders: what is loaded computes what was saved; nothing in a folder is run; what is wrong is named."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, load_model, save_file
from torch import nn

import kw
from kw.folder import FORMAT, FolderError, read

SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32], "stem_width": 16, "num_classes": 5}
PICTURE = {"input_size": (3, 32, 32)}
CLASSES = ["ant", "bee", "cat", "dog", "eel"]

BUILT = {
    "published": lambda: kw.create_model("resnet18", n="1/4", stem_stride=2, **SMALL),
    "settings": lambda: kw.create_model("resnet18", n=2, attention_function="softmax", sharing="kind", **SMALL),
    "static": lambda: kw.create_model("resnet18", n="static", **SMALL),
    "odconv": lambda: kw.create_model("resnet18", n=2, dynamic="odconv", **SMALL),
    "by plan": lambda: kw.convert(timm.create_model("regnety_002", num_classes=5)),
    "by timm": lambda: timm.create_model("kw_mobilenetv2_050", n="1/2", num_classes=5),
    "transformer": lambda: kw.create_model("deit_tiny_patch16_224", n=1, img_size=32, depth=4, num_classes=5),
    "scope": lambda: kw.convert(
        timm.create_model("resnet10t", num_classes=5),
        {"layer1.0.conv1": "a", "layer2.0.conv1": "b", "layer1.0.conv2": "a"},
        {"a": kw.KWConfig(n="1/2"), "b": kw.KWConfig(n=4, anchoring="random")},
    ),
}


@torch.no_grad()
def trained(model, tau=0.25):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    if kw.temperatures(model):
        kw.set_temperature(model, tau)
    return model.eval()


def build(name="published"):
    return trained(BUILT[name]())


def assert_same(model, other):
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("name", BUILT)
def test_what_is_loaded_computes_what_was_saved(name, tmp_path):
    model = build(name)
    kw.save(model, tmp_path / "mine", classes=CLASSES, data={**PICTURE, "mean": (0.1, 0.2, 0.3)})
    loaded = kw.load(tmp_path / "mine")
    assert not loaded.training
    assert_same(model, loaded)
    data = timm.data.resolve_model_data_config(loaded)
    assert data["input_size"] == (3, 32, 32) and data["mean"] == (0.1, 0.2, 0.3)
    assert loaded.pretrained_cfg["label_names"] == tuple(CLASSES)
    assert [float(tau) for tau in kw.temperatures(loaded)] == [float(tau) for tau in kw.temperatures(model)]
    kw.save(loaded, tmp_path / "again")  # what is loaded can be saved
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "mine/config.json").read_text()


@pytest.mark.parametrize("name", ["published", "by plan", "odconv", "static"])
def test_timm_loads_it_with_another_head_and_for_features(name, tmp_path):
    model = build(name)
    kw.save(model, tmp_path / "mine", data=PICTURE)
    source = f"local-dir:{tmp_path / 'mine'}"
    assert_same(model, timm.create_model(source, pretrained=True).eval())
    other = timm.create_model(source, pretrained=True, num_classes=3).eval()
    assert other(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    maps = timm.create_model(source, pretrained=True, features_only=True).eval()(torch.randn(2, 3, 32, 32))
    assert len(maps) >= 4 and all(map.dim() == 4 for map in maps)


def test_the_file_has_cells_once_and_is_that_of_the_hubs_mixin(tmp_path):
    model = build()
    kw.save(model, tmp_path / "mine", data=PICTURE)
    weights = load_file(tmp_path / "mine/model.safetensors")
    assert sum(name.endswith("cells") for name in weights) == len(model.warehouses)
    assert weights.keys() == model.state_dict().keys()
    twin = build()
    load_model(twin, tmp_path / "mine/model.safetensors")  # what PyTorchModelHubMixin.from_pretrained calls
    assert_same(model, twin)


class Own(nn.Module):
    """A model that timm does not know."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def test_a_model_of_ones_own_is_loaded_into_its_static_one(tmp_path):
    model = trained(kw.convert(Own(), {"body.0": "w", "body.2": "w"}, kw.KWConfig(n=2)))
    kw.save(model, tmp_path / "mine", classes=CLASSES)
    assert_same(model, kw.load(tmp_path / "mine", model=Own()))
    with pytest.raises(FolderError, match=r"timm did not build it: pass the static model.*model="):
        kw.load(tmp_path / "mine")
    with pytest.raises(FolderError, match=r"config\.json: .*lacks a layer"):
        kw.load(tmp_path / "mine", model=nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_saving_leaves_the_model_as_it_was_and_replaces_its_own_files_alone(tmp_path):
    model = build()
    model.train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for k in range(2):
        kw.save(model, tmp_path / "mine", data=PICTURE, figures={"top-1 (%)": 12.5 + k})
    assert [module.training for module in model.modules()] == modes
    assert read(tmp_path / "mine").figures == {"top-1 (%)": 13.5}
    assert "| top-1 (%) | 13.50 |" in (tmp_path / "mine/README.md").read_text()
    assert {path.name for path in tmp_path.rglob("*")} == {
        "mine", "notes.txt", "config.json", "model.safetensors", "README.md"
    }  # fmt: skip


def test_half_precision_stays(tmp_path):
    kw.save(build().half(), tmp_path / "mine", data=PICTURE)
    loaded = kw.load(tmp_path / "mine")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda m: setattr(m, "act1", nn.SiLU()), {}, "differs from what resnet18 is"),
        (lambda m: setattr(m, "layer1", nn.Identity()), {}, "was taken out of the model"),
        (lambda m: setattr(m, "kw_args", {**SMALL, "act_layer": nn.SiLU}), {}, "act_layer=.*not a plain value"),
        (lambda m: None, {"classes": ["a", "b"]}, "2 classes are named, and the model has 5"),
        (lambda m: None, {"data": {"size": 3}}, "data has 'size'; there are input_size"),
        (lambda m: None, {"data": {"input_size": (1, 32, 32)}}, "does not run on an image"),
    ],
)
def test_a_model_that_a_folder_could_not_give_back_is_not_saved(change, options, said, tmp_path):
    model = build()
    change(model)
    with pytest.raises(FolderError, match=said):
        kw.save(model, tmp_path / "mine", **{"data": PICTURE, **options})
    assert not list(tmp_path.iterdir())


def test_a_frozen_model_is_not_saved(tmp_path):
    model = build()
    kw.freeze(model)
    with pytest.raises(ValueError, match="frozen"):
        kw.save(model, tmp_path / "mine")


# ---- bad input ----


def config(folder, **changes):
    path = folder / "config.json"
    found = json.loads(path.read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        place = found
        for part in above:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(found))


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def warehouse(folder, change):
    """Change the first warehouse of config.json."""
    found = json.loads((folder / "config.json").read_text())["model_args"]["warehouses"]
    config(folder, model_args__warehouses=[change(found[0]), *found[1:]])


def without(key):
    return lambda one: {name: value for name, value in one.items() if name != key}


def with_(**changes):
    return lambda one: one | changes


def setting(**changes):
    return lambda one: one | {"settings": one["settings"] | changes}


BAD = {
    "nowhere": (lambda f: [os.remove(path) for path in f.iterdir()] and f.rmdir(), "mine does not exist"),
    "a run": (lambda f: os.remove(f / "config.json") or (f / "checkpoints").mkdir(), "is a run folder: python -m"),
    "no config": (lambda f: os.remove(f / "config.json"), r"has no config\.json"),
    "config cut off": (lambda f: cut(f / "config.json"), r"config\.json is damaged"),
    "foreign": (
        lambda f: (f / "config.json").write_text('{"architecture": "resnet50", "pretrained_cfg": {}}'),
        r"not written by kw\.save \(it is of 'resnet50'\).*timm\.create_model",
    ),
    "a list": (lambda f: (f / "config.json").write_text("[]"), r"not written by kw\.save"),
    "the future": (lambda f: config(f, kernelwarehouse__format=FORMAT + 1), "has format 2.*update kw"),
    "unknown key": (lambda f: config(f, kernelwarehouse__quantized=True), r"has 'kernelwarehouse\.quantized'.*update"),
    "a file's name": (lambda f: config(f, pretrained_cfg__file="/etc/passwd"), "pretrained_cfg has 'file', which this"),
    "a mean in words": (lambda f: config(f, pretrained_cfg__mean="x"), "mean is 'x', not numbers"),
    "a flat image": (lambda f: config(f, pretrained_cfg__input_size=[3]), r"input_size is \(3,\), not numbers"),
    "names for few": (lambda f: config(f, label_names=["cat"]), "1 classes are named, and the model has"),
    "no list of warehouses": (lambda f: config(f, model_args__warehouses=3), r"config\.json: .*warehouses is 3, not a"),
    "a warehouse of a word": (lambda f: warehouse(f, lambda w: "x"), r"warehouses\[0\] is described by a str"),
    "a warehouse without layers": (lambda f: warehouse(f, without("layers")), r"warehouses\[0\] lacks 'layers'"),
    "a warehouse without name": (lambda f: warehouse(f, without("name")), r"warehouses\[0\] lacks 'name'"),
    "layers of a number": (lambda f: warehouse(f, with_(layers=3)), r"warehouses\[0\]\.layers is 3, not a list"),
    "a layer of a number": (lambda f: warehouse(f, with_(layers=[3])), r"layers is \[3\], not names of layers"),
    "no layers": (lambda f: warehouse(f, with_(layers=[])), r"layers is \[\], not names of layers"),
    "a layer that is not there": (lambda f: warehouse(f, with_(layers=["layer9"])), r"config\.json: .*layer9"),
    "settings of a word": (lambda f: warehouse(f, with_(settings="x")), r"\.settings is 'x', not a dict"),
    "an unknown setting": (
        lambda f: warehouse(f, setting(depth=3)),
        r"settings of warehouse 'stage0' has 'depth', which this version of kw does not know",
    ),
    "a damaged setting": (
        lambda f: warehouse(f, setting(n="much")),
        r"settings of warehouse 'stage0': .*much",
    ),
    "a setting of a list": (
        lambda f: warehouse(f, setting(n=[1])),
        r"settings of warehouse 'stage0': ",
    ),
    "unknown model": (lambda f: config(f, model_args__base="resnet9000"), "has no model 'resnet9000'"),
    "a path to load": (
        lambda f: config(f, model_args__args={"checkpoint_path": "/tmp/evil.pth"}),
        "'checkpoint_path', which a folder may not set",
    ),
    "a download": (lambda f: config(f, model_args__args={"pretrained": True}), "'pretrained', which a folder may not"),
    "a hub's name": (lambda f: config(f, model_args__base="hf-hub:someone/evil"), "has no model 'hf-hub:someone/evil'"),
    "no weights": (lambda f: os.remove(f / "model.safetensors"), r"model\.safetensors does not exist: copy"),
    "weights cut off": (lambda f: cut(f / "model.safetensors"), r"model\.safetensors is damaged, cut off"),
    "weights of few bytes": (lambda f: cut(f / "model.safetensors", 0.0001), r"model\.safetensors is damaged, cut off"),
    "weights of another": (
        lambda f: save_file({"weight": torch.zeros(3)}, f / "model.safetensors"),
        r"does not fit the model of config\.json: 'bn1\.bias' is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_in_a_line_that_names_the_file(name, saved, tmp_path):
    change, said = BAD[name]
    change(saved)
    with pytest.raises(FolderError, match=said) as raised:
        kw.load(saved)
    assert "\n" not in str(raised.value) and str(saved) in str(raised.value)


@pytest.mark.parametrize("name", ["the future", "unknown key", "a mean in words", "names for few"])
@pytest.mark.parametrize("source", ["local-dir", "hf-hub"])
def test_timm_refuses_such_a_folder_too(source, name, saved, hub):
    change, said = BAD[name]
    change(saved)
    with pytest.raises(FolderError, match=said):
        timm.create_model(f"{source}:{saved if source == 'local-dir' else 'me/mine'}", pretrained=True)


def test_timm_loads_it_from_the_hub(saved, hub):
    assert_same(kw.load(saved), timm.create_model("hf-hub:me/mine@v2", pretrained=True).eval())
    assert hub == {("me/mine", "config.json", "v2"), ("me/mine", "model.safetensors", "v2")}


@pytest.fixture
def hub(saved, monkeypatch):
    """The Hub, with one model: the folder. What was downloaded."""
    asked = set()

    def download(repo_id, filename, revision=None, **_):
        asked.add((repo_id, filename, revision))
        return str(saved / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return asked


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return kw.save(build(), tmp_path_factory.mktemp("models") / "mine", data=PICTURE)


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "mine")


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_folder_is_not_run(saved, tmp_path):
    """A pickle in place of the weights, and files that other libraries would run or unpickle."""
    mark = tmp_path / "was run"
    stream = io.BytesIO()
    pickle.dump({"weight": Payload(mark)}, stream)
    with pytest.raises(FileExistsError):  # the payload works
        os.mkdir(mark)
        pickle.loads(stream.getvalue())
    mark.rmdir()
    for name in ("pytorch_model.bin", "model.pt"):
        (saved / name).write_bytes(stream.getvalue())
    (saved / "modeling.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    kw.load(saved)
    (saved / "model.safetensors").write_bytes(stream.getvalue())
    with pytest.raises(FolderError, match="not a safetensors file"):
        kw.load(saved)
    config(saved, architecture="modeling.Model", model_args__base="modeling")
    with pytest.raises(FolderError):
        kw.load(saved)
    assert not mark.exists()


ELSEWHERE = """
import sys

for name in ("train", "detection", "scripts", "hydra", "omegaconf", "mmdet", "mmengine", "onnx", "onnxruntime"):
    sys.modules[name] = None  # importing it fails
import kw, timm, torch
from PIL import Image

model = kw.load(sys.argv[1])
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    logits = model(transform(Image.linear_gradient("L").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax()], *logits[0].tolist())
"""


def test_a_folder_that_was_moved_predicts_where_there_is_kw_alone(tmp_path):
    model = build()
    kw.save(model, tmp_path / "mine", classes=CLASSES, data=PICTURE)
    shutil.move(tmp_path / "mine", tmp_path / "moved")
    environment = {**os.environ, "PYTHONPATH": str(Path(kw.__file__).parents[1])}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "moved")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, *logits = done.stdout.split()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(kw.load(tmp_path / "moved")))
    with torch.no_grad():
        expected = model(transform(Image.linear_gradient("L").convert("RGB"))[None])[0]
    torch.testing.assert_close(torch.tensor([float(one) for one in logits]), expected)
    assert name == CLASSES[expected.argmax()]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FolderError, match=r"has another config\.json already"):
        kw.save(build(), tmp_path, data=PICTURE)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "bert"}

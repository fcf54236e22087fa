"""The commands from a checkpoint to predictions: scripts.export and scripts.predict."""

import csv
import json
import re

import pytest
import timm
import torch
from helpers.training import NARROW, config

import kw
from scripts import export, predict
from train.config.saved import to_plain
from train.data.digits import Digits
from train.data.transforms import eval_transform
from train.jobs.reading import FORMAT
from train.model import build_model

CLASSES = [str(k) for k in range(10)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with averaged weights, two epochs long."""
    torch.manual_seed(0)
    made = config("n=1/2", "recipe.ema_decay=0.9", "data.image_size=16", *NARROW)
    models = [build_model(made, 10) for _ in range(2)]
    for model in models:
        kw.set_temperature(model, 0)
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    state = {"format": FORMAT, "model": models[0].state_dict(), "ema": models[1].state_dict(), "classes": CLASSES,
             "config": to_plain(made), "epoch": 2}  # fmt: skip
    torch.save(state, folder / "checkpoints/last.pt")
    lines = [{"epoch": k, "top1": 10.0 * k, "top5": 60.0, "ema_top1": 11.0 * k, "ema_top5": 61.0, "eval_samples": 359}
             for k in (1, 2)]  # fmt: skip
    cut_off = '{"epoch": 3, "st'  # as a full disk leaves it
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut_off)
    return folder, models


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    to = tmp_path_factory.mktemp("models") / "digits"
    export.main([f"checkpoint={run[0]}", f"to={to}"])
    return to


def same(model, other):
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        return torch.allclose(model.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-6)


def test_a_run_becomes_a_folder_of_its_average_with_its_classes_data_and_figures(run, folder):
    average = kw.load(folder)
    assert same(average, run[1][1]) and not same(average, run[1][0])
    cfg = average.pretrained_cfg
    assert cfg["label_names"] == tuple(CLASSES) and cfg["input_size"] == (3, 16, 16)
    card = (folder / "README.md").read_text()
    assert "| top-1 (%) | 22.00 |" in card and "| images | 359 |" in card and "digits, val" in card
    assert "averaged weights" in card and "| trained on | digits, 3 of 12 epochs, seed 0 |" in card
    assert "# resnet18 with other channels, layers, stem_width, KernelWarehouse at n = 1/2\n" in card


def test_the_weights_themselves_are_taken_if_asked_for(run, tmp_path):
    export.main([f"checkpoint={run[0] / 'checkpoints/last.pt'}", f"to={tmp_path / 'own'}", "ema=false"])
    assert same(kw.load(tmp_path / "own"), run[1][0])
    assert "| top-1 (%) | 20.00 |" in (tmp_path / "own/README.md").read_text()


def test_a_released_checkpoint_becomes_a_folder(tmp_path):
    model = timm.create_model("kw_mobilenetv2_050", n="1/2").eval()
    torch.save(kw.to_released(model), tmp_path / "released.pth")
    words = ["backbone=mobilenetv2_050", "n=1/2", "data.image_size=32"]
    export.main([f"checkpoint={tmp_path / 'released.pth'}", f"to={tmp_path / 'folder'}", *words])
    loaded = kw.load(tmp_path / "folder")
    assert loaded.num_classes == 1000 and same(loaded, model)


def test_predictions_are_those_of_the_model_on_images_prepared_as_in_training(run, folder, tmp_path, capsys):
    images = Digits("val")
    (tmp_path / "pictures/more").mkdir(parents=True)
    for k in range(5):
        images.load(k)[0].save(tmp_path / f"pictures/{'more/' if k > 2 else ''}{k}.png")
    out = tmp_path / "table.csv"
    predict.main([f"model={folder}", f"images={tmp_path / 'pictures'}", f"out={out}", "batch=2"])
    printed = capsys.readouterr().out
    with out.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["image"].rpartition("/")[2] for line in lines] == [f"{k}.png" for k in range(5)]
    made = config("n=1/2", "recipe.ema_decay=0.9", "data.image_size=16", *NARROW)

    transform = eval_transform(made.data, made.recipe)
    with torch.no_grad():
        shares = run[1][1].eval()(torch.stack([transform(images.load(k)[0]) for k in range(5)])).softmax(dim=1)
    for line, expected in zip(lines, shares, strict=True):
        best = expected.topk(5)
        assert [line[f"class{k}"] for k in range(1, 6)] == [CLASSES[k] for k in best.indices]
        found = torch.tensor([float(line[f"share{k}"]) for k in range(1, 6)])
        torch.testing.assert_close(found, best.values, atol=1e-5, rtol=1e-4)
    assert printed.count(".png") == 5 and f"{100 * shares[0].max():.1f}%" in printed


@pytest.mark.slow
def test_other_formats_lie_beside(folder, run, tmp_path):
    pytest.importorskip("onnxruntime")
    to = tmp_path / "all"
    export.main([f"checkpoint={run[0]}", f"to={to}", "formats=onnx,program", "half=true"])
    assert {path.name for path in to.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "model.onnx", "model.pt2"
    }  # fmt: skip
    export.main([f"checkpoint={to}", f"to={tmp_path / 'again'}", "formats=program"])
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (export, [], "checkpoint=''"),
        (export, ["checkpoint={run}"], "to=''"),
        (export, ["checkpoint={run}", "to={out}", "formats=onx"], "formats='onx': there are onnx, program, aoti"),
        (export, ["checkpoint={run}", "to={out}", "half=true"], "half=True: is for formats=onnx"),
        (export, ["checkpoint={run}", "to={out}", "n=4"], "leave n=4 out"),
        (export, ["checkpoint={folder}", "to={out}", "n=4"], "leave n=4 out"),
        (export, ["checkpoin={run}", "to={out}"], "did you mean checkpoint=...? Keys of this command: checkpoint, to"),
        (export, ["checkpoint={out}", "to={out}"], "out: no checkpoint can be read"),
        (predict, ["model={folder}", "image={text}"], "did you mean images=...? Keys of this command: model, images"),
        (export, ["checkpoint=nowhere.pt", "to={out}"], "nowhere.pt does not exist"),
        (predict, ["model={folder}"], "images=''"),
        (predict, ["model={folder}", "images=nowhere"], "images=nowhere: there is no such file"),
        (predict, ["model={folder}", "images={out}"], "no images there"),
        (predict, ["model={folder}", "images={text}"], "cannot be read as an image"),
        (predict, ["model={run}", "images={text}"], "is a run folder: python -m scripts.export"),
        (predict, ["model={folder}", "images={text}", "top=3"], "top=3: this command has model, images, batch and out"),
    ],
)
def test_what_cannot_be_done_ends_in_a_line(command, words, said, run, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    places = {"run": run[0], "folder": folder, "out": tmp_path / "out", "text": tmp_path / "text.png"}
    with pytest.raises(SystemExit, match=re.escape(said)) as exit:
        command.main([word.format(**places) for word in words])
    assert "\n" not in str(exit.value)

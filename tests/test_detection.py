"""`python -m detection`: its settings, errors in data, and real runs, shrunk, on real digits."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import programs, wandb_files
from helpers.detectors import config, speed_up, validated
from helpers.programs import ROOT, environment
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader

import detection.__main__ as entry
from detection import loading
from detection.compose import learnt_settings
from detection.config import DetectionConfig, open_up
from detection.data import check_data
from detection.names import run_name
from scripts import export_detector
from scripts.data.digits_coco import SPLITS, make_split
from scripts.draw_detections import detected, load_detector
from train.data.digits import Digits
from train.jobs import folder as run_folder
from train.jobs.command import Jobs
from train.jobs.errors import CheckpointError, ConfigError, DataError
from train.jobs.settings import fixed_settings

SMALL = [
    "config=mask_rcnn_kw1x_digits",
    "train_cfg.max_epochs=2",
    "model.backbone.kwargs.channels=[16,16,16,16]",
    "model.backbone.kwargs.stem_width=16",
    "model.rpn_head.anchor_generator.scales=[2]",
    "train_dataloader.batch_size=4",
    "runtime.device=cpu",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Eight canvases to train, and the first four of them to evaluate on."""
    folder = tmp_path_factory.mktemp("digits")
    for split in SPLITS:
        make_split(folder, split, Digits("train"), 8 if split == "train2017" else 4, 64, np.random.default_rng(0))
    return folder


@pytest.fixture(autouse=True)
def fast_configurations(monkeypatch):
    speed_up(monkeypatch)


@pytest.fixture
def safe_loading(monkeypatch):
    """The loader of `python -m detection` for a test; MMEngine's own afterwards."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes)
    loading.install()


@pytest.fixture
def in_this_process(digits, monkeypatch, capsys, safe_loading):
    """`python -m detection` without a process of its own, which takes seconds to start: runs it to its end."""

    def run(*words):
        jobs = Jobs()
        monkeypatch.setattr(entry, "jobs", jobs)
        monkeypatch.setattr(sys, "argv", ["detection", *open_up([*SMALL, f"data.root={digits}", *words])])
        jobs.run(entry.main, "detection")

    return run


@pytest.fixture
def refused(in_this_process, capsys):
    """`python -m detection`, which fails: what it says on stderr."""

    def run(*words):
        with pytest.raises(SystemExit):
            in_this_process(*words)
        return capsys.readouterr().err

    return run


# Settings


def test_a_row_is_composed_and_any_key_of_its_file_can_be_set():
    settings, cfg = config(
        "config=mask_rcnn_kw1x_resnet50_1x_coco",
        "n=4",
        "data.root=somewhere",
        "init=weights.pt",
        "optim_wrapper.optimizer.lr=1e-3",
        "param_scheduler.1.milestones=[3,4]",
        "train_dataloader.dataset.data_prefix.img=images/",
        "+model.backbone.drop_path=0.1",
        "runtime.workers=0",
    )
    assert settings.n == cfg.model.backbone.n == "4"
    assert cfg.model.backbone.init_cfg == {"type": "Pretrained", "checkpoint": "weights.pt"}
    _, started = config("config=mask_rcnn_fdconv_resnet50_1x_coco", "start_from=static.pt")
    assert started.model.backbone.init_cfg == {"type": "Pretrained", "checkpoint": "static.pt", "static": True}
    assert cfg.optim_wrapper.optimizer.lr == 1e-3 and cfg.param_scheduler[1].milestones == [3, 4]
    assert cfg.model.backbone.drop_path == 0.1
    assert cfg.train_dataloader.dataset.data_root == cfg.test_dataloader.dataset.data_root == "somewhere"
    assert cfg.train_dataloader.dataset.data_prefix.img == "images/"
    assert cfg.val_evaluator.ann_file == "somewhere/annotations/instances_val2017.json"
    assert not cfg.train_dataloader.persistent_workers and cfg.train_dataloader.num_workers == 0


def test_sizes_on_the_command_line_are_tuples_as_mmcv_wants_them():
    _, cfg = config(
        "config=mask_rcnn_kw1x_resnet50_1x_coco",
        "val_dataloader.dataset.pipeline.1.scale=[384,320]",
        "train_dataloader.dataset.pipeline.3.transforms=[[{type:RandomChoiceResize,scales:[[384,320],[300,200]]}]]",
        "param_scheduler.1.milestones=[8]",
    )
    assert cfg.val_dataloader.dataset.pipeline[1].scale == (384, 320)
    assert cfg.train_dataloader.dataset.pipeline[3].transforms[0][0].scales == [(384, 320), (300, 200)]
    assert cfg.param_scheduler[1].milestones == [8]


def test_from_scratch_nothing_is_frozen_and_the_temperature_is_warmed_up():
    warmed = [{"type": "TemperatureWarmup"}]
    for words, hooks in (("n=4", warmed), ("n=static", []), ("n=4 dynamic=odconv", warmed), ("dynamic=fdconv", [])):
        _, cfg = config("config=mask_rcnn_kw1x_resnet50_1x_coco", *words.split(), "scratch=true")
        assert (cfg.model.backbone.frozen_stages, cfg.model.backbone.norm_eval) == (-1, "attention")
        assert list(cfg.get("custom_hooks", [])) == hooks


def test_a_method_is_chosen_for_any_file():
    def chosen(file, *words):
        backbone = config(f"config=mask_rcnn_{file}resnet50_1x_coco", *words)[1].model.backbone
        return backbone.get("dynamic", "kw"), backbone.n

    assert chosen("", "dynamic=dyconv", "n=4") == ("dyconv", "4") and chosen("", "dynamic=fdconv") == ("fdconv", "1")
    assert chosen("kw4x_", "dynamic=odconv") == ("odconv", "4") and chosen("kw4x_", "dynamic=se") == ("se", "1")
    assert chosen("kw4x_", "dynamic=static") == chosen("kw4x_", "n=static", "dynamic=se") == ("kw", "static")
    assert chosen("odconv4x_", "dynamic=kw", "n=1/2") == ("kw", "1/2")


def test_the_neck_follows_another_backbone():
    _, cfg = config("config=mask_rcnn_kw1x_resnet50_1x_coco", "model.backbone.name=regnety_002", "n=1/2")
    assert cfg.model.neck.in_channels == [24, 56, 152, 368]
    _, cfg = config("config=mask_rcnn_resnet50_1x_coco", "model.neck.in_channels=[1,2,3,4]")
    assert cfg.model.neck.in_channels == [1, 2, 3, 4]


def test_a_configuration_may_leave_the_channels_out(tmp_path):
    (tmp_path / "own.py").write_text(
        "model = dict(type='FasterRCNN', backbone=dict(type='KWBackbone', name='resnet18'), neck=dict(type='FPN'))"
    )
    _, cfg = config(f"config={tmp_path}/own.py")
    assert cfg.model.neck.in_channels == [64, 128, 256, 512]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["config=mask_rcnn_kw1x_resnet51_1x_coco"], "near are mask_rcnn_kw1x_resnet50_1x_coco"),
        (["train_cfg.max_epoch=1"], r"train_cfg\.max_epoch: .*near are max_epochs.*\+train_cfg\.max_epoch"),
        (["train_cfgs.max_epochs=1"], r"no 'train_cfgs' there; near are train_cfg"),
        (["param_scheduler.7.gamma=1"], r"param_scheduler\.7"),
        (["n=3/2"], "n='3/2'"),
        (["dynamic=odcon"], r"dynamic='odcon'.*odconv"),
        (["dynamic=odconv", "n=1/2"], r"n='1/2'.*odconv.*integer"),
        (["config=mask_rcnn_resnet50_1x_coco", "dynamic=odconv"], r"dynamic='odconv'.*such as n=4"),
        (["model.backbone.type=ResNet", "dynamic=se"], "dynamic='se': not for a backbone ResNet"),
        (["n=static", "model.backbone.name=resnet19"], "resnet19.*resnet18"),
        (["model.backbone.type=ResNet", "n=1"], "n='1': not for a backbone ResNet"),
        (["data.classes=own"], r"data\.classes='own'"),
        (["runtime.devices=0"], r"runtime\.devices=0"),
        (["runtime.device=tpu"], r"runtime\.device"),
        (["logger.services=[x]"], r"logger\.services"),
        (["resume=maybe"], "resume='maybe'"),
        (["seed=-1"], "seed=-1"),
        (["config="], "config=''"),
        (["train_cfg.max_epochs=many"], r"train_cfg\.max_epochs='many': the file has 12"),
        (["scratch=true", "init=weights.pt"], r"scratch=True: .*init=weights\.pt"),
        (["scratch=true", "start_from=weights.pt"], r"scratch=True: .*start_from=weights\.pt"),
        (["init=a.pt", "start_from=b.pt"], r"start_from='b\.pt': contradicts init=a\.pt"),
        (["dynamic=odconv", "n=4", "start_from=a.pt"], "start_from='a.pt': odconv has no place for static weights"),
        (["scratch=true", "model.backbone.type=ResNet"], "scratch=True: not for a backbone ResNet"),
        (["default_hooks.checkpoint.interval=2"], r"interval: this program .* runtime\.checkpoint_steps"),
        (["runtime.checkpoint_steps=0"], r"runtime\.checkpoint_steps=0"),
        (["data.on_error=skip"], r"data\.on_error='skip'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config("config=mask_rcnn_kw1x_resnet50_1x_coco", *overrides)


def test_a_sweep_gives_each_job_a_folder_by_what_is_swept(monkeypatch, tmp_path):
    names = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "start", lambda config, cfg, folder: names.append(folder.relative_to(tmp_path)))
    monkeypatch.setattr(entry, "jobs", Jobs())
    words = ["-m", "config=mask_rcnn_kw1x_resnet18_1x_coco", "n=1,1/4,static", "train_cfg.max_epochs=3"]
    monkeypatch.setattr(sys, "argv", ["detection", *open_up(words)])
    entry.jobs.run(entry.main, "detection")
    base = "runs/detection/mask_rcnn_kw1x_resnet18_1x_coco"
    assert [str(name) for name in names] == [
        f"{base}{n}+train_cfg.max_epochs-3/seed0" for n in ("", "+n-1d4x", "+n-static")
    ]
    assert not (tmp_path / names[0]).exists()  # the job left nothing in it


def test_a_name_follows_from_values_and_not_from_how_they_were_typed():
    def name(*words):
        made, composed = validated("config=mask_rcnn_kw1x_resnet50_1x_coco", *words)
        return run_name(made, composed).removeprefix("mask_rcnn_kw1x_resnet50_1x_coco")

    assert name() == name("n=1", "train_cfg.max_epochs=12", "scratch=false", "runtime.devices=4", "logger=both") == ""
    assert name("n=0.25") == name("n=1/4") == "+n-1d4x"
    assert name("dynamic=kw") == "" and name("dynamic=odconv", "n=4") == "+dynamic-odconv+n-4x"
    assert name("dynamic=fdconv", "n=4") == name("dynamic=fdconv") == "+dynamic-fdconv"
    assert name("dynamic=static") == name("n=static") == name("n=static", "dynamic=se") == "+n-static"
    assert name("optim_wrapper.optimizer.lr=1e-3") == name("optim_wrapper.optimizer.lr=0.0010")
    assert name("optim_wrapper.optimizer.lr=1e-3") == "+optim_wrapper.optimizer.lr-0.001"
    assert name("val_dataloader.dataset.pipeline.1.scale=[1333,800]") == ""  # as the file has it, a tuple there
    assert name("+model.backbone.drop_path=0.1", "init=a/b.pt") == "+init-a_b.pt+model.backbone.drop_path-0.1"
    assert name("dynamic=fdconv", "start_from=a.pt") == "+dynamic-fdconv+start_from-a.pt"


def test_which_settings_may_change_when_a_run_is_resumed():
    fixed = fixed_settings(asdict(DetectionConfig("x")), DetectionConfig)
    assert fixed.keys() == {
        "scratch",
        "data.classes",
        "data.on_error",
        "seed",
    }  # what `config`, `n` and `init` set is compared as well
    settings = {key: learnt_settings(*config(*SMALL, key)) for key in ("n=1", "n=4", "seed=1", "runtime.workers=3")}
    assert settings["n=1"] == settings["runtime.workers=3"]
    assert len(set(settings.values())) == 3


# Data


def checked(*overrides):
    init_default_scope("mmdet")
    check_data(config("config=mask_rcnn_kw1x_digits", *overrides)[1], ["train", "val"])


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


def change(folder, edit, split="val2017"):
    path = folder / f"annotations/instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_data_that_are_whole_are_let_pass(digits):
    checked(f"data.root={digits}")


def test_a_missing_annotation_file_is_reported(digits, tmp_path):
    folder = copied(digits, tmp_path / "data")
    (folder / "annotations/instances_val2017.json").unlink()
    with pytest.raises(DataError, match=r"instances_val2017\.json does not exist.*data\.root"):
        checked(f"data.root={folder}")


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}'])
def test_a_file_of_another_format_is_reported(text, digits, tmp_path):
    folder = copied(digits, tmp_path / "data")
    (folder / "annotations/instances_train2017.json").write_text(text)
    with pytest.raises(DataError, match=r"instances_train2017\.json (cannot be read|is not an annotation file)"):
        checked(f"data.root={folder}")


def test_missing_images_are_reported_by_name_and_number(digits, tmp_path):
    folder = copied(digits, tmp_path / "data")
    (folder / "train2017/000003.png").unlink()
    with pytest.raises(DataError, match=r"1 of 8 images .*000003\.png"):
        checked(f"data.root={folder}")
    (folder / "train2017").rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"train2017, which does not exist"):
        checked(f"data.root={folder}")


def test_classes_that_do_not_match_are_reported_and_can_be_taken_from_the_annotations(digits, tmp_path):
    folder = copied(digits, tmp_path / "data")
    for split in SPLITS:
        change(folder, lambda content: content["categories"][3].update(name="three"), split)
    with pytest.raises(
        ConfigError, match=r"1 are not in the file \(3\), 1 are not in the configuration \(three\).*data\.classes=data"
    ):
        checked(f"data.root={folder}")
    checked(f"data.root={folder}", "data.classes=data")
    for split in SPLITS:
        change(folder, lambda content: content["categories"].append({"id": 99, "name": "ten"}), split)
    _, cfg = config("config=mask_rcnn_kw1x_digits", f"data.root={folder}", "data.classes=data")
    assert cfg.train_dataloader.dataset.metainfo.classes[-1] == "ten"
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 11


@pytest.mark.parametrize(("key", "kind"), [("image_id", "images"), ("category_id", "categories")])
def test_annotations_of_what_is_not_there_are_reported(key, kind, digits, tmp_path):
    """MMDetection would leave them out without a word."""
    folder = copied(digits, tmp_path / "data")
    change(folder, lambda content: content["annotations"][2].update({key: 1000}))
    with pytest.raises(DataError, match=rf"{key} of 1 annotations is not among the {kind}. Their ids: 3\."):
        checked(f"data.root={folder}")


def test_heads_that_predict_another_number_of_classes_are_reported(digits):
    with pytest.raises(ConfigError, match=r"Shared2FCBBoxHead: num_classes=80, but the train data have 10"):
        checked(f"data.root={digits}", "model.roi_head.bbox_head.num_classes=80")


# Checkpoints that would run code


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def indirect(path):
    """A pickle that looks a function up through `getattr`, which MMEngine's own list lets pass."""
    head = b"\x80\x02cbuiltins\ngetattr\ncmmengine.logging.history_buffer\nHistoryBuffer\n"
    return head + b"X\x08\x00\x00\x00__init__\x86R."


@pytest.mark.parametrize("key", ["resume", "load_from", "init", "evaluate"])
def test_a_malicious_checkpoint_is_refused_and_not_run(key, refused, digits, tmp_path):
    trap, run = tmp_path / "trapped", tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}, "meta": Trap(trap)}, run / "checkpoints" / "last.pt")
    words = [f"{key}={run}/checkpoints/last.pt", f"hydra.run.dir={tmp_path}/other"]
    said = refused(*([f"hydra.run.dir={run}"] if key == "resume" else words))
    assert not trap.exists()
    assert said.startswith("CheckpointError: ") and "last.pt is damaged, or holds more" in said
    assert said.endswith("it asks for posix.mkdir, which was not run.\n")


@pytest.mark.parametrize("load_it", [loading.load, CheckpointLoader.load_checkpoint])
def test_nothing_of_a_pickle_is_run(load_it, tmp_path, safe_loading):
    pickled = tmp_path / "old.pth"
    pickled.write_bytes(pickle.dumps({"state_dict": Trap(tmp_path / "trapped")}))
    with pytest.raises(CheckpointError, match=r"old\.pth"):
        load_it(str(pickled))
    saved = tmp_path / "new.pth"
    torch.save({"hook": os.system}, saved)
    with pytest.raises(CheckpointError, match=r"posix\.system, which was not run"):
        load_it(str(saved))
    (tmp_path / "indirect.pth").write_bytes(indirect(tmp_path))
    with pytest.raises(CheckpointError, match=r"indirect\.pth"):
        load_it(str(tmp_path / "indirect.pth"))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("prefix", [*CheckpointLoader._schemes, "open-mmlab:s3://"])
def test_no_checkpoint_is_downloaded(prefix, safe_loading):
    """Whatever loaders MMEngine has."""
    place = f"{re.sub(r'[(].*[)][?]', '', prefix)}resnet50.pth"
    with pytest.raises(CheckpointError, match="Download it" if prefix else "does not exist"):
        CheckpointLoader.load_checkpoint(place)


def test_what_mmengine_saves_is_read(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0, 3.0], [1, 1, 1])
    torch.save(
        {"message_hub": {"log_scalars": {"loss": buffer}}, "state_dict": {"a": torch.ones(2)}}, tmp_path / "x.pth"
    )
    found = loading.load(str(tmp_path / "x.pth"))
    assert found["message_hub"]["log_scalars"]["loss"].mean() == 2 and torch.equal(
        found["state_dict"]["a"], torch.ones(2)
    )


# The real thing


def launch(*words, cwd, digits, check=True):
    command = [sys.executable, "-m", "detection", *SMALL, f"data.root={digits}", *words]
    environ = {**environment(), "COLUMNS": "200", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environ)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_a_run_is_watched_goes_on_and_is_evaluated(digits, in_this_process, refused, tmp_path, monkeypatch, capsys):
    """Its checkpoint has what summary.json tells, and the same command again tells it too."""
    place = f"hydra.run.dir={tmp_path}/run"
    done = launch(place, "logger=both", cwd=tmp_path, digits=digits)
    first, second, _ = done.stdout.splitlines()
    assert first.startswith("epoch 1/2  loss ") and "  step 1/4  " in first and second.startswith("epoch 2/2  loss ")
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["backbone"], summary["n"], summary["epochs"]) == ("resnet18", "1", 2)
    (evaluated,) = map(json.loads, (run / "metrics.jsonl").open())  # its interval leaves the first epoch out
    assert evaluated["device"] == summary["device"] == "cpu"
    assert {"box_ap", "box_ap50", "mask_ap", "commit"} <= summary.keys()
    assert {"torch", "timm", "mmdet", "mmengine"} <= summary["versions"].keys()
    assert "no init=CHECKPOINT" in done.stderr and "scratch=true" in done.stderr
    assert list(run.glob("tensorboard/events*"))
    (record,) = run.glob("wandb/**/*.wandb")
    assert any(item.HasField("history") for item in wandb_files.whole_run(record))
    # a run that is done prints its figures again
    in_this_process(place)
    assert "at step 4 " in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["box_ap"] == summary["box_ap"]
    assert "other settings: optim_wrapper.optimizer.lr" in refused(place, "optim_wrapper.optimizer.lr=1")
    assert "resume=never" in refused(place, "resume=never")
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.2)
    with run_folder.lock(run):
        assert "Another job is running" in refused(place)
    in_this_process(f"evaluate={run}", f"hydra.run.dir={tmp_path}/evaluated")
    found = json.loads(capsys.readouterr().out)
    assert {key: summary[key] for key in ("box_ap", "mask_ap")} == {key: found[key] for key in ("box_ap", "mask_ap")}
    other = refused(f"evaluate={run}", "n=static", f"hydra.run.dir={tmp_path}/other")
    assert "does not fit" in other and "warehouse.cells" in other


def test_a_failed_start_leaves_the_folders_that_were_there(refused, tmp_path):
    (tmp_path / "kept" / "empty").mkdir(parents=True)
    assert "does not exist" in refused(f"hydra.run.dir={tmp_path}/kept/empty/a/b", "data.root=/nope")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "kept", tmp_path / "kept" / "empty"]


@pytest.mark.slow
def test_a_job_of_two_processes_ends_when_one_cannot_write(digits, tmp_path):
    """Right after a collective: both leave the process group, and neither waits for ever."""
    words = [*SMALL, f"data.root={digits}", f"hydra.run.dir={tmp_path}/run", "runtime.devices=2"]
    done = programs.run("detection", *words, code=1, cwd=tmp_path, largest_file=100_000)
    assert "File too large" in done.stderr and "LaunchError: process" in done.stderr


@pytest.mark.slow
def test_two_processes_share_the_work(digits, tmp_path):
    words = (f"hydra.run.dir={tmp_path}/run", "runtime.devices=2", "logger=both")
    done = launch(*words, cwd=tmp_path, digits=digits)
    assert done.stdout.count("epoch 2/2") == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["epochs"], summary["devices"]) == (2, 2)
    assert len(list((tmp_path / "run").glob("wandb/**/*.wandb"))) == 1  # only rank 0 has services
    assert len(list((tmp_path / "run/tensorboard").glob("events*"))) == 1


def test_a_folder_without_a_trained_detector_is_not_drawn(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path} has no configuration"):
        next(detected(tmp_path, 1, 0.5, 1))
    (tmp_path / "mask_rcnn.py").write_text("model = dict()\n")
    with pytest.raises(CheckpointError, match=rf"{tmp_path} has no checkpoint"):
        next(detected(tmp_path, 1, 0.5, 1))


@pytest.mark.slow
def test_the_backbone_and_neck_of_a_run_run_in_onnxruntime(in_this_process, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from kw.export.to_onnx import runner

    in_this_process(f"hydra.run.dir={tmp_path}/run", "train_cfg.max_epochs=1")
    monkeypatch.setattr(
        sys, "argv", ["export_detector", f"{tmp_path}/run", f"{tmp_path}/maps.onnx", "--size", "64", "96"]
    )
    export_detector.main()
    assert "batch, height, width may vary; agrees with PyTorch" in capsys.readouterr().out
    detector, _ = load_detector(tmp_path / "run")
    x = torch.randn(5, 3, 96, 160)
    with torch.no_grad():
        maps = detector.neck(detector.backbone(x))
    for ours, theirs in zip(maps, runner(tmp_path / "maps.onnx")((x,)), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())


def test_a_folder_without_a_trained_detector_is_not_exported(tmp_path, monkeypatch, safe_loading):
    monkeypatch.setattr(sys, "argv", ["export_detector", str(tmp_path), f"{tmp_path}/maps.onnx"])
    with pytest.raises(SystemExit, match=rf"CheckpointError: {tmp_path} has no configuration"):
        export_detector.main()


@pytest.mark.slow
def test_the_configurations_serve_mmdetections_own_tools(digits, tmp_path):
    import mmdet

    tools, file = Path(mmdet.__file__).parent / ".mim/tools", ROOT / "detection/configs/mask_rcnn_kw1x_digits.py"
    options = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    options += [f"{split}_dataloader.dataset.data_root={digits}" for split in ("train", "val", "test")]
    options += [f"{split}_evaluator.ann_file={digits}/annotations/instances_val2017.json" for split in ("val", "test")]
    test = ["-m", "detection.torchvision_ops", tools / "test.py", file, "work/epoch_1.pth"]
    for words in ([tools / "train.py", file], test):
        done = subprocess.run(
            [sys.executable, *words, "--work-dir", "work", "--cfg-options", *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment(),
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert "coco/segm_mAP" in done.stdout


@pytest.mark.slow
def test_a_short_training_lowers_the_loss_and_finds_the_digits(tmp_path):
    """The quickstart, shortened: a classifier of digits, and a detector that begins from it, on digits held out."""
    for count, (folder, split) in zip((160, 16), SPLITS.items(), strict=True):
        make_split(tmp_path / "data", folder, Digits(split), count, 96, np.random.default_rng(count))
    run = [sys.executable, "-m"]
    subprocess.run([*run, "train", "n=1", "recipe.epochs=6", "hydra.run.dir=classifier"], cwd=tmp_path, check=True,
                   env=environment(), stdout=subprocess.DEVNULL)  # fmt: skip
    words = ["config=mask_rcnn_kw1x_digits", "data.root=data", "init=classifier/checkpoints/last.pt"]
    subprocess.run([*run, "detection", *words, "hydra.run.dir=run", "train_cfg.max_epochs=6"], cwd=tmp_path, check=True,
                   env=environment())  # fmt: skip
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert losses[-1] < 0.7 * losses[0]
    assert summary["box_ap50"] > 30, summary

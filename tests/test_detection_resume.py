"""A detector survives as a classifier does: kills, signals, losses that are not finite, broken images."""

import io
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers.detectors import config, detect, fork, speed_up
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.dataset import sampler as mmengine_sampler
from mmengine.device import utils as mmengine_device
from mmengine.registry import FUNCTIONS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from PIL import Image
from torch.utils.data import DataLoader

from detection import loading
from detection.config import DetectionConfig
from detection.guard import Guard
from detection.plugin.errors import BrokenImage, UnreadableImage
from detection.plugin.exact import NumberedBatches, SeededDataset
from detection.plugin.images import LoadWholeImage
from detection.prepare import every_image_once, keep_loading, start_worker
from detection.saving import SavingHook
from scripts.data.digits_coco import SPLITS, make_split
from scripts.kill_storm import SMALL_DETECTOR, differences, outcome_of_detector
from train.data.digits import Digits
from train.jobs import signals
from train.jobs.errors import ConfigError, NonFiniteError
from train.jobs.signals import StopRequest
from train.jobs.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Eight canvases to train, four steps of two; and three to evaluate on."""
    folder = tmp_path_factory.mktemp("digits")
    for split, count in zip(SPLITS, (8, 3), strict=True):
        make_split(folder, split, Digits("train"), count, 64, np.random.default_rng(0))
    return folder


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The program registers its own loader of checkpoints."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes)
    speed_up(monkeypatch)


def words(digits, folder, *more):
    """Two epochs of four steps: checkpoints after steps 3, 4, 6, 8 and both evaluations."""
    small = (*SMALL_DETECTOR, "train_cfg.max_epochs=2", "val_dataloader.batch_size=1")
    return (*small, f"data.root={digits}", f"hydra.run.dir={folder}", *more)


def step_of(folder):
    return loading.load(str(folder / "checkpoints" / "last.pt"))["meta"]["iter"]


@pytest.fixture(scope="module")
def calm(digits, tmp_path_factory):
    """What comes of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes)
        speed_up(patch)
        detect(*words(digits, folder))
    return outcome_of_detector(folder)


def test_a_run_that_is_killed_within_an_epoch_resumes_to_the_same_end(digits, calm, tmp_path, capsys):
    ((status, _),) = fork(
        tmp_path, *words(digits, tmp_path / "run"), code="at(7, lambda: os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert status == -signal.SIGKILL and step_of(tmp_path / "run") == 6
    detect(*words(digits, tmp_path / "run"))
    assert "Resumed" in capsys.readouterr().out
    assert differences(calm, outcome_of_detector(tmp_path / "run")) == []
    assert len(calm["metrics"]) == 2 and calm["meta"]["iter"] == 8


@pytest.mark.parametrize(
    ("number", "when", "step"),
    [
        pytest.param(signal.SIGTERM, "at(1, {})", 2, marks=pytest.mark.slow),  # the step after it is done
        (signal.SIGUSR1, "in_evaluation({})", 4),
    ],
)
def test_a_signal_saves_and_leaves_and_the_same_command_resumes(
    number, when, step, digits, calm, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(signals, "requeue", lambda: True)
    code = when.format(f"lambda: signal.raise_signal({int(number)})")
    with pytest.raises(SystemExit) as left:
        detect(*words(digits, tmp_path), code=code)
    assert left.value.code == 128 + number and step_of(tmp_path) == step
    how = "it is back in the queue" if number == signal.SIGUSR1 else "the same command resumes it"
    assert f"Stopped by a signal after step {step} of 8, and saved: {how}" in capsys.readouterr().out
    detect(*words(digits, tmp_path))
    assert differences(calm, outcome_of_detector(tmp_path)) == []


def test_processes_that_load_images_outlast_signals_unless_the_file_sets_them_up():
    loader = {"num_workers": 2}
    keep_loading(loader, {"randomness": {"seed": 5}})
    start = loader["worker_init_fn"]
    assert FUNCTIONS.get(start.pop("type")) is start_worker
    assert start == {"num_workers": 2, "rank": 0, "seed": 5}  # from which MMEngine seeds each of them
    for own in ({"worker_init_fn": {"type": "mine"}}, {"disable_subprocess_warning": True}):
        loader = dict(own)
        keep_loading(loader, {})
        assert loader == own


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_its_images(digits, tmp_path, capsys):
    code = "in_loss(4, lambda losses: {**losses, 'loss_rpn_cls': [math.nan * each for each in losses['loss_rpn_cls']]})"
    with pytest.raises(SystemExit):
        detect(*words(digits, tmp_path), code=code)
    said = capsys.readouterr().err
    assert "NonFiniteError: Step 4: loss nan, loss_rpn_cls nan. Its images: " in said and "Traceback" not in said
    assert said.count(".png") == 2 and "Nothing after the last good checkpoint was kept" in said
    assert step_of(tmp_path) == 4


def test_gradients_that_are_not_finite_stop_before_the_update():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = Guard(ALONE, StopRequest())
    guard.runner, guard.images = type("Runner", (), {"iter": 3}), ["a.jpg"]
    optimizer.register_step_pre_hook(guard._check_gradients)
    weight.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(NonFiniteError, match=r"Step 3: gradient norm inf\. Its images: a\.jpg\."):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(weight, torch.zeros(2))


def test_another_number_of_steps_an_epoch_is_refused(tmp_path):
    hook = SavingHook(DetectionConfig("x"), tmp_path, ALONE, None, None, None)
    runner = type("Runner", (), {"train_dataloader": range(3)})
    hook.after_load_checkpoint(runner, {"steps_per_epoch": 3, "processes": 2})
    with pytest.raises(ConfigError, match=r"The run had 4 steps an epoch, now it has 3: .* processes back to 2"):
        hook.after_load_checkpoint(runner, {"steps_per_epoch": 4, "processes": 2})


@pytest.mark.slow
def test_mmengines_own_checkpoints_resume_exactly_with_the_loop_alone(digits, tmp_path, monkeypatch):
    """As in MMDetection's tools: no hook of `python -m detection`."""

    def train(name, **more):
        _, cfg = config(*words(digits, "x")[:-1])
        cfg.train_cfg.type = "ExactTrainLoop"
        cfg.default_hooks.checkpoint = {"type": "CheckpointHook", "by_epoch": False, "interval": 3}
        cfg.update(work_dir=str(tmp_path / name), experiment_name=name, randomness={"seed": 0}, **more)
        monkeypatch.setattr(mmengine_device, "DEVICE", "cpu")
        Runner.from_cfg(cfg).train()
        state = loading.load(str(tmp_path / name / "iter_8.pth"))
        return {key: state[key] for key in ("state_dict", "optimizer", "param_schedulers")}

    init_default_scope("mmdet")
    calm = train("calm")
    assert differences(calm, train("resumed", resume=True, load_from=str(tmp_path / "calm" / "iter_6.pth"))) == []


# Images


def encoded(form):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")
BROKEN = {
    "empty": b"", "zeros": bytes(1000), "text": b"not an image", "cut JPEG": JPEG[:-40], "half a JPEG": JPEG[:500],
    "JPEG that ends in zeros": JPEG[:-400] + bytes(400), "cut PNG": PNG[:-40], "half a PNG": PNG[:500],
    "flipped PNG": PNG[:300] + bytes([PNG[300] ^ 255]) + PNG[301:], "only its end": b"\xff\xd8\xff\xd9",
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(BrokenImage, match=r"x\.jpg cannot be read as an image: ") as error:
        LoadWholeImage().transform({"img_path": str(tmp_path / "x.jpg")})
    assert error.value.path == str(tmp_path / "x.jpg")


@pytest.mark.parametrize("content", [JPEG, PNG, JPEG + b"more that a camera has added"], ids=["JPEG", "PNG", "longer"])
def test_a_whole_image_is_read_as_mmcv_reads_it(content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    ours, mmcvs = ({"img_path": str(tmp_path / "x.jpg")} for _ in range(2))
    ours, mmcvs = LoadWholeImage().transform(ours), LoadImageFromFile().transform(mmcvs)
    assert ours.keys() == mmcvs.keys() and ours["img_shape"] == mmcvs["img_shape"] == (40, 40)
    assert np.array_equal(ours["img"], mmcvs["img"])


def test_a_file_that_is_gone_is_no_broken_image(tmp_path):
    with pytest.raises(UnreadableImage, match=r"x\.jpg cannot be read: No such file") as error:
        LoadWholeImage().transform({"img_path": str(tmp_path / "x.jpg")})
    assert not isinstance(error.value, BrokenImage)


@DATASETS.register_module()
class Toy:
    """Ten samples with random numbers, of which 3 and 4 are broken."""

    metainfo = ("toy",)

    def __init__(self, broken=()):
        self.broken, self.pipeline = broken, None

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.broken:
            error = BrokenImage(f"{index} is broken")
            error.path = f"{index}.jpg"
            raise error
        sample = DetDataSample(metainfo={"img_path": f"{index}.jpg"})
        sample.numbers = (index, np.random.random(), torch.rand(()).item())
        return {"data_samples": sample}


def loaded(workers=0, done=0, broken=(), substitute=False):
    """An epoch's samples in the order of the loader, from a batch on."""
    dataset = SeededDataset({"type": "Toy", "broken": broken}, 5, substitute)
    batches = NumberedBatches(DefaultSampler(dataset, seed=0), 3)
    batches.start(40, done)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)
    return [[one["data_samples"] for one in batch] for batch in loader]


def test_samples_are_the_same_for_any_number_of_workers_and_from_any_batch_on():
    everything = [[one.numbers for one in batch] for batch in loaded()]
    assert [len(batch) for batch in everything] == [3, 3, 3, 1]
    assert len({number for batch in everything for one in batch for number in one[1:]}) == 20
    for workers, done in ((2, 0), (0, 2), (2, 3), (0, 4)):
        assert [[one.numbers for one in batch] for batch in loaded(workers, done)] == everything[done:]


def test_a_broken_image_stops_or_the_next_one_takes_its_place():
    with pytest.raises(BrokenImage, match="is broken"):
        loaded(broken=(3, 4))
    with pytest.raises(UnreadableImage, match="10 images in a row are broken"):
        loaded(broken=range(10), substitute=True)
    for workers in (0, 2):
        found = [one.metainfo for batch in loaded(workers, broken=(3, 4), substitute=True) for one in batch]
        replaced = {one["index"]: one for one in found if "index" in one}
        assert replaced == {
            3: {"img_path": "5.jpg", "substitutes_for": "3.jpg", "index": 3},
            4: {"img_path": "5.jpg", "substitutes_for": "4.jpg", "index": 4},
        }


@pytest.fixture
def broken_digits(digits, tmp_path):
    """The digits, with one image to train on cut off."""
    shutil.copytree(digits, tmp_path / "data")
    path = tmp_path / "data/train2017/000003.png"
    path.write_bytes(path.read_bytes()[:200])
    return tmp_path / "data"


def test_a_run_lists_and_counts_what_it_substituted(broken_digits, tmp_path):
    detect(*words(broken_digits, tmp_path / "run", "data.on_error=substitute"))
    listed = [line.split("\t") for line in (tmp_path / "run/substituted.txt").read_text().splitlines()]
    assert [(epoch, index, copy) for epoch, index, copy, _, _ in listed] == [("0", "3", "0"), ("1", "3", "0")]
    assert all(name.endswith("000003.png") and used.endswith("000004.png") for *_, name, used in listed)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["substituted"] for line in lines] == [1, 1]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_stops_at_a_broken_image_by_its_name(workers, broken_digits, tmp_path, capsys):
    with pytest.raises(SystemExit):
        detect(*words(broken_digits, tmp_path / "run", f"runtime.workers={workers}"))
    said = capsys.readouterr().err
    assert re.search(r"DataError: \S+000003\.png cannot be read as an image: ", said) and "Traceback" not in said


# Several processes


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_evaluation_deals_every_image_to_one_process(count, monkeypatch):
    loader = Config({"sampler": {"type": "DefaultSampler", "shuffle": True}, "drop_last": True, "batch_sampler": {}})
    every_image_once(loader)
    dealt = []
    for rank in range(count):
        monkeypatch.setattr(mmengine_sampler, "get_dist_info", lambda rank=rank: (rank, count))
        settings = {key: value for key, value in loader.sampler.items() if key != "type"}
        sampler = DefaultSampler(range(7), seed=0, **settings)
        assert len(sampler) == len(list(sampler))
        dealt += list(sampler)
    assert sorted(dealt) == list(range(7)) and not loader.drop_last and "batch_sampler" not in loader


@pytest.mark.slow
def test_two_processes_survive_a_kill_and_a_signal_to_one_of_them_and_count_every_image_once(digits, tmp_path):
    """The evaluation has three images, so that one of the processes has two of them."""
    two = {"ranks": 2}
    more = ("train_dataloader.batch_size=1",)
    assert [status for status, _ in fork(tmp_path, *words(digits, tmp_path / "calm", *more), **two)] == [0, 0]
    calm = outcome_of_detector(tmp_path / "calm")
    assert [line["eval_images"] for line in calm["metrics"]] == [3, 3]
    killed = "at(7, lambda: runner.rank == 1 and os.kill(os.getpid(), signal.SIGKILL))"
    fork(tmp_path, *words(digits, tmp_path / "run", *more), code=killed, **two)
    assert step_of(tmp_path / "run") == 6
    fork(tmp_path, *words(digits, tmp_path / "run", *more), **two)
    assert differences(calm, outcome_of_detector(tmp_path / "run")) == []
    signalled = "at(4, lambda: runner.rank == 0 and signal.raise_signal(signal.SIGUSR1))"  # seen in the evaluation
    done = fork(tmp_path, *words(digits, tmp_path / "other", *more), code=signalled, **two)
    assert [status for status, _ in done] == [128 + signal.SIGUSR1] * 2 and step_of(tmp_path / "other") == 4
    broken = """if runner.rank == 1:
        in_loss(5, lambda losses: {key: [math.inf * each for each in value] for key, value in losses.items()})"""
    done = fork(tmp_path, *words(digits, tmp_path / "other", *more), code=broken, **two)
    (first, said), (second, _) = done
    assert (first, second) == (1, 1) and "NonFiniteError: Step 5: " in said and said.count(".png") == 1
    fork(tmp_path, *words(digits, tmp_path / "other", *more), **two)
    assert differences(calm, outcome_of_detector(tmp_path / "other")) == []

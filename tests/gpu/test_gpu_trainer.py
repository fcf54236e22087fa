"""`python -m train` on a GPU: each backbone with every switch of the runtime, and a run that goes on to the bit."""

import pytest

pytest.importorskip("hydra", reason="hydra-core is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: it has the digits")

import torch
from helpers.training import config

from train.data.images import Part
from train.jobs.world import World
from train.trainer import Trainer

pytestmark = pytest.mark.gpu

# Two steps an epoch, on real digits.
SHORT = ["data.train_images=32", "recipe.batch_size=16", "recipe.epochs=1", "recipe.warmup_epochs=0"]
SHORT += ["recipe.temperature_epochs=1", "recipe.ema_decay=0.9"]
# Budget, and what makes the backbone tiny in a dry run.
BACKBONES = {
    "resnet18": ("1/4", ["+backbone.kwargs.channels=[8,8,8,16]", "+backbone.kwargs.stem_width=8"]),
    "resnet50": ("1", ["+backbone.kwargs.channels=[8,8,8,16]", "+backbone.kwargs.layers=[1,1,1,1]"]),
    "convnext_tiny": ("1", ["+backbone.kwargs.depths=[1,1,1,1]", "+backbone.kwargs.dims=[16,16,16,32]"]),
    "mobilenetv2_100": ("4", []),
    "deit_tiny_patch16_224": ("4", ["+backbone.kwargs.depth=1"]),
}


def overrides(name, device, dry):
    n, tiny = BACKBONES[name]
    size = "data.image_size=32" if dry else "data.image_size=64"
    return [
        f"backbone={name}",
        "data=digits",
        f"n={n}",
        *SHORT,
        size,
        *(tiny if dry else []),
        f"runtime.device={device}",
    ]


def trainer_of(folder, device, settings):
    """It evaluates on a few images only."""
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config(*settings), folder, World(0, 1, device))
    trainer.data.eval_samples.images = Part(trainer.data.eval_samples.images, 20, "of a test")
    return trainer


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_trains_with_every_switch(name, precision, device, dry, tmp_path):
    """Half precision, its scaler, channels last, an average of the weights, and clipped gradients."""
    if dry and precision == "float16" and name != "resnet18":
        pytest.skip("one is enough on a CPU")
    settings = [f"runtime.precision={precision}", "runtime.channels_last=true", "recipe.clip_grad=1.0"]
    trainer = trainer_of(tmp_path / "run", device, [*overrides(name, device, dry), *settings])
    assert trainer.learner.scaler.is_enabled() == (precision == "float16")
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    summary = trainer.fit()
    assert trainer.step == 2 and {"top1", "ema_top1"} <= trainer.metrics.read()[-1].keys() | summary.keys()
    after = dict(trainer.model.named_parameters())
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())
    assert all(value.isfinite().all() for value in trainer.ema.module.state_dict().values())
    # float16 may skip both steps, and then lowers the scale
    if trainer.learner.scaler.get_scale() == 2.0**16 or precision == "bfloat16":
        assert any(not torch.equal(before[key], value) for key, value in after.items())


@pytest.mark.no_dry  # on a CPU it takes minutes
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_model_trains_and_begins_with_the_same_loss(precision, device, dry, tmp_path, tf32):
    """One step: gradients are compared in float64, by `test_a_compiled_model_trains_and_evaluates_the_same`. A second
    loss would tell nothing: at these weights a change of 3e-7 changes gradients by 3 to 11%, also in float64."""
    tf32(False)
    losses = []
    for value in ("false", "true"):
        settings = [*overrides("resnet18", device, dry), "data.train_images=16"]
        settings += [f"runtime.compile={value}", f"runtime.precision={precision}"]
        trainer = trainer_of(tmp_path / value, device, settings)
        before = [p.clone() for p in trainer.model.parameters()]
        trainer.fit()
        assert trainer.step == 1 and all(p.isfinite().all() for p in trainer.model.parameters())
        assert not any(torch.equal(p, was) for p, was in zip(trainer.model.parameters(), before, strict=True))
        losses.append(trainer.metrics.read()[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if precision == "float32" else 2e-2)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not_to_the_bit(precision, device, dry, tmp_path):
    """With torch's deterministic algorithms, and for a model without those few layers that have none."""
    if dry and precision == "float16":
        pytest.skip("bfloat16 is enough on a CPU")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        settings = [
            "n=1",
            "data=digits",
            *SHORT,
            "recipe.epochs=2",
            "recipe.batch_size=8",
            "runtime.checkpoint_steps=1",
        ]
        settings += [f"runtime.precision={precision}", f"runtime.device={device}"]
        whole = trainer_of(tmp_path / "whole", device, settings)
        whole.fit()
        part = trainer_of(tmp_path / "part", device, settings)

        def stop(trainer):
            if trainer.step == 3:
                raise Stopped

        part.on_step.append(stop)
        with pytest.raises(Stopped):
            part.fit()
        resumed = trainer_of(tmp_path / "part", device, settings)
        resumed.resume()
        assert resumed.step == 3
        resumed.fit()
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, other in ((resumed.model, whole.model), (resumed.ema.module, whole.ema.module)):
        other = other.state_dict()
        different = [key for key, value in mine.state_dict().items() if not torch.equal(value, other[key])]
        assert not different

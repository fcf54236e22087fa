"""The trainer's step agrees with the release's, loss by loss (tests/golden/README.md, "Training steps")."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import golden_recipe as recipe
from helpers.training import config

import kw
from train.jobs.signals import StopRequest
from train.jobs.world import World
from train.learner import Learner

TRAJECTORIES = json.loads((recipe.HERE / "trajectories.json").read_text())
# Rounding grows tenfold a micro-batch, so only so many first losses can be compared.
CASES = [
    ("resnet18_kw1x", 4),  # an epoch, after which model and average are evaluated
    pytest.param("mobilenetv2_100_kw4x", 4, marks=pytest.mark.slow),
    pytest.param("resnet18_kw1x", 10, marks=pytest.mark.slow),
    pytest.param("convnext_tiny_kw1x", 4, marks=pytest.mark.slow),
]
STEPS, ACCUMULATION, BATCH = 3, 2, 4


def array(name, *shape):
    return torch.from_numpy(recipe.values(name, shape))


def micro_batches():
    for epoch in range(4):
        for turn in range(STEPS * ACCUMULATION):
            labels = [(7 * k + 13 * turn + 3 * epoch) % 100 for k in range(BATCH)]
            yield array(f"x{epoch}.{turn}", BATCH, 3, 64, 64), torch.tensor(labels), torch.arange(BATCH)


def made(row, known):
    words = [f"experiment={row}", "data.root=x", "data.image_size=64", "recipe.epochs=4", f"recipe.lr={known['lr']}"]
    words += [f"recipe.weight_decay={known['wd']}", "recipe.temperature_epochs=2", "recipe.label_smoothing=0.1"]
    words += ["recipe.mixup=0", "recipe.cutmix=0", "recipe.drop_path=0", "recipe.ema_decay=0.9", "recipe.min_lr=1e-6"]
    words += ["recipe.batch_size=8", f"recipe.warmup_epochs={1 if known['opt'] == 'adamw' else 0}"]
    data = SimpleNamespace(accumulation=ACCUMULATION, steps_per_epoch=STEPS, classes=list(range(100)))
    learner = Learner(config(*words), data, World(0, 1, torch.device("cpu")), StopRequest())
    model, average = learner.model.double(), learner.average().double()
    shapes = {key: value.shape for key, value in kw.to_released(model).items()}
    kw.load_released(model, {key: torch.from_numpy(recipe.fill(key, shape)) for key, shape in shapes.items()})
    average.load_state_dict(model.state_dict())
    return learner


@pytest.mark.parametrize("row, count", CASES)
def test_the_losses_of_the_first_steps_are_the_releases(row, count):
    known = TRAJECTORIES[row]
    learner = made(row, known)
    assert [learner.learning_rate(step) for step in range(12)] == pytest.approx(known["lrs"], rel=1e-12, abs=0)
    losses = []
    original = learner.loss

    def recorded(logits, targets):
        loss = original(logits, targets)
        losses.append(loss.item())
        return loss

    learner.loss = recorded
    batches = micro_batches()
    learner.ddp_model.train()
    for step in range(count // ACCUMULATION):
        learner.step(step, batches)
        if step == STEPS - 1:
            both = (learner.model.eval(), learner.average().eval())
            norms = [model(array("probe", 4, 3, 64, 64)).norm().item() for model in both]
            assert norms == pytest.approx([known["evals"][0], known["emas"][0]], rel=1e-6)
            learner.ddp_model.train()
    assert len(losses) == count
    assert losses == pytest.approx(known["losses"][:count], rel=1e-6)

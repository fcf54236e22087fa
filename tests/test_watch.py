"""The host does not wait for the device in a step, and what it learns one step late comes in time.

There is no GPU here. A meta device stands for one: its tensors have no values, so that whatever reads one fails."""

import contextlib
import copy
import itertools
import math

import pytest
import torch
from helpers.selection import paired, representative
from helpers.training import ALONE, NARROW, TINY, config
from timm.utils import ModelEmaV3
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kw
from scripts.kill_storm import differences, outcome
from train import learner as module
from train import optim
from train.evaluate import evaluate
from train.jobs.errors import NonFiniteError
from train.jobs.reading import read
from train.jobs.world import World
from train.trainer import Trainer
from train.watch import Watch

aten = torch.ops.aten
META = World(0, 1, torch.device("meta"))


class Made(TorchFunctionMode):
    """Notes tensors that are made on a meta device of values in Python, which on a GPU are a copy to wait for."""

    def __init__(self, noted):
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and out.is_meta:
            self.noted.append(func)
        return out


class Copies(TorchDispatchMode):
    """Notes copies between the host and a meta device, and gives zeros for what is copied from there."""

    def __init__(self):
        super().__init__()
        self.to_host, self.waiting = [], []
        self.made = Made(self.waiting)

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.copy_.default and args[0].is_meta != args[1].is_meta:
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            self.waiting += [func] * waits
            if args[1].is_meta:
                self.to_host.append(args[1].numel())
                return args[0].zero_()
        out = func(*args, **kwargs)
        placed = func is aten._to_copy.default and out.is_meta and not args[0].is_meta
        self.waiting += [func] * (placed and not kwargs.get("non_blocking"))
        return out


def average(model, decay):
    """It makes a generator of random numbers on the device, of which there is none on a meta device."""
    made = ModelEmaV3(copy.deepcopy(model).to_empty(device="cpu"), decay)
    made.module.to("meta")
    return made


@pytest.fixture
def on_meta(tmp_path, monkeypatch):
    """Makes trainers of 8 samples a step on a meta device, which have no automatic precision there."""
    monkeypatch.setattr(module, "cast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(module, "ModelEmaV3", average)
    small = (*TINY, *NARROW, "recipe.batch_size=8")
    return lambda *settings: Trainer(config(*small, *settings), tmp_path, META)


def steps(trainer, number):
    """Take them; returns the copies that were made, and what was put and taken when."""
    watch = trainer.learner.watch
    order, put, take = [], watch.put, watch.take

    def putting(counts, step):
        order.append(("put", step.number))
        put(counts, step)

    def taking():
        taken = take()
        order.append(("take", taken and taken[1].number))
        return taken

    watch.put, watch.take = putting, taking
    batches = trainer.data.train_batches(0)
    trainer.model.train()
    with Copies() as copies:
        for _ in range(number):
            trainer.train_step(batches)
    return copies, order


ALL = ("recipe.ema_decay=0.9", "recipe.mixup=0.2", "recipe.cutmix=1.0", "recipe.drop_path=0.1", "recipe.dropout=0.1")
SPLIT = ("recipe.clip_grad=1.0", "runtime.micro_batch=4", "runtime.channels_last=true")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("more", [("n=static",), ("n=1/2", "recipe.temperature_epochs=0.01", *ALL, *SPLIT)])
def test_a_step_reads_of_the_device_only_the_flags_of_the_step_before(optimizer, more, on_meta):
    trainer = on_meta(f"recipe.optimizer={optimizer}", *more)
    copies, order = steps(trainer, 4)
    assert trainer.learner.temperature(trainer.step - 1) == 0  # the warm-up, if there is one, has ended
    assert copies.to_host == [4] * 4 and not copies.waiting  # of each step one flag, and the number of each signal
    taken = [None, 0, 1, 2]
    assert order == [entry for k in range(4) for entry in (("take", taken[k]), ("put", k))]


PLANTED = {
    "item": lambda loss: loss.item(),
    "condition": lambda loss: 1 if loss > 0 else 0,
    "list": lambda loss: loss[None].tolist(),
    "mask": lambda loss: loss[None][loss[None] > 0],
    "nonzero": lambda loss: loss[None].nonzero(),
    "copy": lambda loss: loss.cpu(),
    "equal": lambda loss: torch.equal(loss, loss + 1),
}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED.keys())
def test_a_read_that_is_planted_is_found(plant, on_meta):
    trainer = on_meta("n=static")
    loss = trainer.learner.loss

    def planted(logits, targets):
        value = loss(logits, targets)
        plant(value.detach())
        return value

    trainer.learner.loss = planted
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        steps(trainer, 1)


@pytest.mark.parametrize("place", [
    lambda loss: torch.tensor([1, 0], device=loss.device),
    lambda loss: loss.new_tensor([1, 0]),
    lambda loss: torch.ones(2).to(loss.device),
    lambda loss: loss.new_empty(2).copy_(torch.ones(2)),
])  # fmt: skip
def test_a_copy_to_the_device_for_which_the_host_waits_is_found(place):
    with Copies() as copies:
        place(torch.ones((), device="meta"))
    assert copies.waiting


def test_an_evaluation_reads_nothing_before_its_end(on_meta):
    trainer = on_meta("n=1/2")
    passed = []

    def batches():
        for number in range(3):
            yield torch.randn(4, 3, 16, 16), torch.arange(4), torch.arange(4)
            passed.append(number)

    with Copies() as copies, pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        evaluate(trainer.model, batches(), META, contextlib.nullcontext())
    assert passed == [0, 1, 2] and not copies.waiting


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.equal):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer, fused", paired(["sgd", "momentum", "adam", "adamw"], [True, False]))
def test_a_float16_step_reads_nothing_where_the_optimizer_is_fused(fused, optimizer, tmp_path, monkeypatch):
    """On the CPU, where torch has those kernels too; without them the scaler reads whether the step overflowed."""
    monkeypatch.setattr(optim, "has_fused", lambda *_: fused)
    settings = ("n=static", "runtime.precision=float16", "recipe.batch_size=8", f"recipe.optimizer={optimizer}")
    trainer = Trainer(config(*TINY, *NARROW, *settings), tmp_path, ALONE)
    batches = list(itertools.islice(trainer.data.train_batches(0), 3))
    with Reads() as reads:
        for batch in batches:
            trainer.train_step(iter([batch]))
    assert bool(reads.found) != fused


def until_broken(folder, step, *settings):
    """A run whose loss is not finite at one step; how many steps were made when that was noticed."""
    trainer = Trainer(config(*TINY, *NARROW, *settings), folder, ALONE)
    loss, passed = trainer.learner.loss, []

    def broken(logits, targets):
        passed.append(trainer.step)
        value = loss(logits, targets)
        return value * math.nan if trainer.step == step else value

    trainer.learner.loss = broken
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit()
    return str(raised.value), passed[-1]


SETTINGS = ("n=1/2", "recipe.epochs=2", "recipe.ema_decay=0.9", "recipe.temperature_epochs=1")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """10 steps, 5 an epoch, that nothing disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    Trainer(config(*TINY, *NARROW, *SETTINGS), folder, ALONE).fit()
    return outcome(folder)


BROKEN = [
    (0, 2, 3, None),  # noticed when the next step is queued
    (1, 2, 2, 2),  # and at once where the next thing is a checkpoint
    (0, 9, 9, 5),  # also that of the last step
    (2, 4, 4, 4),  # or of an epoch's end
    (3, 3, 4, 3),
]


@pytest.mark.parametrize("every, step, last, saved", representative(BROKEN, lambda *case: case in BROKEN[:3]))
def test_a_loss_that_is_not_finite_is_never_saved(every, step, last, saved, calm, tmp_path):
    every = f"runtime.checkpoint_steps={every or 'null'}"
    message, noticed = until_broken(tmp_path, step, *SETTINGS, every)
    assert message.startswith(f"Step {step}: loss nan, gradient norm nan. Indices of its samples: ") and noticed == last
    checkpoint = tmp_path / "checkpoints" / "last.pt"
    if saved is None:
        assert message.endswith("There is no checkpoint yet: nothing was kept.") and not checkpoint.exists()
    else:
        assert message.endswith(f"Nothing after the last good checkpoint was kept: {checkpoint}.")
        assert read(checkpoint)["step"] == saved
    again = Trainer(config(*TINY, *NARROW, *SETTINGS, every), tmp_path, ALONE)
    again.resume()
    assert again.step == (saved or 0)
    again.fit()
    assert differences(calm, outcome(tmp_path)) == []


def test_the_samples_of_the_broken_step_are_named(tmp_path):
    trainer = Trainer(config(*TINY, *NARROW, *SETTINGS), tmp_path, ALONE)
    indices = [batch.indices for batch in itertools.islice(trainer.data.train_batches(0), 3)]
    message, _ = until_broken(tmp_path, 1, *SETTINGS)
    assert f"samples: {', '.join(map(str, indices[1][:64].tolist()))}. " in message


def test_a_temperature_is_set_where_it_changes_and_an_update_of_the_average_keeps_it(tmp_path, monkeypatch):
    calls, set_temperature = [], kw.set_temperature
    monkeypatch.setattr(kw, "set_temperature", lambda model, tau: (calls.append(tau), set_temperature(model, tau)))
    trainer = Trainer(config(*TINY, *NARROW, *SETTINGS), tmp_path, ALONE)
    batches, made = trainer.data.train_batches(0), []
    for _ in range(7):
        calls.clear()
        trainer.train_step(batches)
        made.append(len(calls))
        tau = trainer.learner.temperature(trainer.step - 1)
        for model in (trainer.model, trainer.ema.module):
            assert {each.value.item() for each in kw.temperatures(model)} == {torch.tensor(tau).item()}
    assert made == [2, 2, 2, 2, 2, 0, 0] and tau == 0
    trainer.load(trainer.state())
    trainer.train_step(batches)
    assert len(calls) == 2


def test_counts_are_taken_once_with_their_step():
    watch = Watch()
    assert watch.take() is None
    watch.put(torch.tensor([1, 0, 2]))
    assert watch.take() == ([1, 0, 2], None) and watch.take() is None


@pytest.mark.parametrize("name, has", [("sgd", True), ("momentum", True), ("adam", True), ("adamw", True),
                                       ("lamb", False), ("rmsprop", False), ("nadamw", False)])  # fmt: skip
def test_torchs_own_optimizers_are_fused_on_a_gpu_alone(name, has):
    assert optim.has_fused(name, torch.device("cuda")) == has
    assert not optim.has_fused(name, torch.device("cpu"))


def optimizer_of(fused, monkeypatch, *settings):
    monkeypatch.setattr(optim, "has_fused", lambda *_: fused)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return model, optim.build_optimizer(model, config(*settings).recipe)


def descend(model, optimizer, scaler, overflows):
    scaler.scale(model(torch.ones(3, 4)).sum() * (math.inf if overflows else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_optimizer_passes_over_a_first_step_that_overflows(name, monkeypatch):
    ended = []
    for fused in (False, True):
        model, optimizer = optimizer_of(fused, monkeypatch, f"recipe.optimizer={name}")
        before = copy.deepcopy(model.state_dict())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        descend(model, optimizer, scaler, True)
        assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
        for _ in range(3):
            descend(model, optimizer, scaler, False)
        ended.append([value.detach() for value in model.parameters()])
    torch.testing.assert_close(*ended)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("saved, goes_on", [(True, False), (False, True), (True, True)])
def test_a_state_goes_on_with_the_kernels_of_its_new_device(name, saved, goes_on, monkeypatch):
    ended = []
    for now in (saved, goes_on):
        model, optimizer = optimizer_of(saved, monkeypatch, f"recipe.optimizer={name}")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        descend(model, optimizer, scaler, False)
        other, continued = optimizer_of(now, monkeypatch, f"recipe.optimizer={name}")
        other.load_state_dict(model.state_dict())
        optim.restore(continued, copy.deepcopy(optimizer.state_dict()))
        assert all(bool(group["fused"]) == now for group in continued.param_groups)
        descend(other, continued, scaler, False)
        ended.append([value.detach() for value in other.parameters()])
    torch.testing.assert_close(*ended)

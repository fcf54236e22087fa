"""Released-format state dicts: there and back exactly, and refused by name where they do not fit."""

import pytest
import timm
import torch

import kw
from kw.attention import Attention

CASES = [("resnet18", "1/4"), ("mobilenetv2_050", "1/2"), ("convnext_tiny", 1)]


def scrambled(name, n):
    """A backbone whose every entry has a value of its own, so that no two can be mixed up."""
    model = timm.create_model(f"kw_{name}", n=n)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.random_(100) if value.dtype == torch.int64 else value.uniform_()
    return model


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name, n", CASES)
def test_there_and_back_is_exact(name, n):
    model = scrambled(name, n)
    kw.set_temperature(model, 0)
    released = kw.to_released(model)
    assert not any("temperature" in key for key in released)
    other = timm.create_model(f"kw_{name}", n=n)
    kw.set_temperature(other, 0.7)
    assert kw.load_released(other, released) is other
    assert same(other.state_dict(), model.state_dict())
    assert {float(m.temperature) for m in other.modules() if isinstance(m, Attention)} == {0}


@pytest.fixture(scope="module")
def model():
    return timm.create_model("kw_mobilenetv2_050", n="1/2")


@pytest.fixture(scope="module")
def released():
    return kw.to_released(scrambled("mobilenetv2_050", "1/2"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda entries: {"model": entries, "epoch": 3},
        lambda entries: {"state_dict": entries, "optimizer": {}},
        lambda entries: {f"module.{key}": value for key, value in entries.items()},
        lambda entries: {"model": {f"module.{key}": value for key, value in entries.items()}},
    ],
    ids=["model", "state_dict", "module.", "model of module."],
)
def test_wrapped_checkpoints_load(model, released, wrap):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    kw.load_released(model, wrap(released))
    assert same(kw.to_released(model), released)


CELLS = "warehouse_manager.weights.0"


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda d: d.pop(CELLS), ValueError, rf"1 missing \({CELLS}\), 0 left over"),
        (lambda d: d.update(strange=torch.zeros(1)), ValueError, r"0 missing \(none\), 1 left over \(strange\)"),
        (lambda d: d.update({5: torch.zeros(1)}), ValueError, r"has the key 5, which is no name of a parameter"),
        (lambda d: d.update({CELLS: d[CELLS][:1]}), ValueError, rf"'{CELLS}' has shape \(1, .* is needed"),
    ],
    ids=["missing", "left over", "no name", "shape"],
)
def test_what_does_not_fit_is_named_and_changes_nothing(model, released, spoil, error, message):
    kw.set_temperature(model, 0.5)
    before = state(model)
    entries = dict(released)
    spoil(entries)
    with pytest.raises(error, match=message):
        kw.load_released(model, entries)
    assert same(model.state_dict(), before)


def test_other_budget_is_refused(model):
    with torch.device("meta"):
        other = kw.to_released(timm.create_model("kw_mobilenetv2_050", n=1))
    before = state(model)
    with pytest.raises(ValueError, match="at this n"):
        kw.load_released(model, other)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("n", [1, "static"])
def test_family_that_was_not_released_is_refused(n):
    with torch.device("meta"):
        model = timm.create_model("kw_deit_tiny_patch16_224", n=n)
    with pytest.raises(ValueError, match=r"deit_tiny.*resnet, mobilenetv2, convnext"):
        kw.to_released(model)
    with pytest.raises(ValueError, match="No released format"):
        kw.load_released(model, {})


def test_vanilla_resnet18_loads():
    source = timm.create_model("resnet18")
    model = kw.load_released(timm.create_model("kw_resnet18", n="static"), source.state_dict())
    assert same(model.state_dict(), source.state_dict())
    assert same(kw.to_released(model), source.state_dict())

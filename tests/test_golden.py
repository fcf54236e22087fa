"""Every golden case: the released configurations on hashed weights, in float64 (tests/helpers/golden_recipe.py)."""

import copy

import numpy as np
import pytest
import timm
import torch
from helpers import golden_recipe as recipe
from helpers.implementations import SETTINGS
from torch import nn

import kw
from kw.attention import Attention
from kw.config import STATIC
from kw.layers import KWLayer

CASES = recipe.load_cases()
EXPECTED = np.load(recipe.HERE / "cases.npz")
# Exactness of every choice is tests/test_functional.py's, on shapes of all kinds; here a few are enough by default.


def in_each(choices, some):
    marked = [pytest.param(choice, marks=() if choice in some else pytest.mark.slow) for choice in choices]
    return pytest.mark.parametrize("each_choice", marked, indirect=True)


def build(case_name: str) -> nn.Module:
    base, _, row = case_name.rpartition("_kw")
    return timm.create_model(f"kw_{base}", n=row.removesuffix("x").replace("d", "/") if base else STATIC).double()


@pytest.fixture(scope="module", params=CASES, ids=str)
def loaded(request):
    case = CASES[request.param]
    model = build(request.param)
    kw.load_released(model, {key: torch.from_numpy(v) for key, v in recipe.state_dict(case).items()})
    return request.param, case, model


def close(actual, expected, floor=0.0):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=max(floor, 1e-6 * np.abs(expected).max()))


def test_parameters_warehouses_layers(loaded):
    _, case, model = loaded
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    released = kw.to_released(model)
    assert {key: list(value.shape) for key, value in released.items()} == case["state_dict"]
    shapes = [released[f"warehouse_manager.weights.{k}"].shape for k in range(len(case["warehouses"]))]
    assert [list(shape) for shape in shapes] == case["warehouses"]

    layers = [m for m in model.modules() if isinstance(m, KWLayer)]
    assert len(layers) == len(case["layers"])
    facts = lambda mixtures, cells, hidden: (mixtures, cells, hidden)  # noqa: E731
    ours = [facts(m.share.mixtures, len(m.warehouse.cells), m.attention.fc1.out_features) for m in layers]
    theirs = [facts(row["mixtures"], row["cells"], row["hidden"]) for row in case["layers"]]
    assert sorted(ours) == sorted(theirs)


@in_each([choice for choice in SETTINGS if "triton" not in choice and "folded" not in choice], ["auto", "blocks"])
def test_eval_logits_and_attentions(loaded, each_choice):
    name, case, model = loaded
    from kw.released import _entries  # layer names of the release are known nowhere else

    fc1 = {e.released_name.removesuffix(".attention.fc1.weight"): e.name for e in _entries(model)}
    seen = {}
    hooks = []
    for layer in case["alpha"]:
        attention = model.get_submodule(fc1[layer].removesuffix(".fc1.weight"))
        assert isinstance(attention, Attention)
        hooks.append(attention.register_forward_hook(lambda m, i, out, layer=layer: seen.__setitem__(layer, out)))
    model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(recipe.image(case)))
    for hook in hooks:
        hook.remove()
    close(logits.numpy(), EXPECTED[f"{name}/eval_logits"])
    for layer, alpha in seen.items():
        expected = EXPECTED[f"{name}/alpha/{layer}"]
        close(alpha.flatten(0, 1).numpy()[: len(expected)], expected)


@in_each([choice for choice in SETTINGS if "triton" not in choice], ["auto"])
def test_training_logits_and_gradients(loaded, each_choice):
    name, case, model = loaded
    if "folded" in each_choice and not name.startswith(("resnet18", "mobilenetv2")):
        pytest.skip("its hidden layers are wide: folded kernels of float64 would take many gigabytes")
    model = copy.deepcopy(model).train()
    kw.set_temperature(model, 0.5)
    logits = model(torch.from_numpy(recipe.image(case)))
    close(logits.detach().numpy(), EXPECTED[f"{name}/train_logits"])

    (logits * torch.from_numpy(recipe.values("cotangent", logits.shape))).sum().backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that to_released names the gradients
    norms = {key: value.norm().item() for key, value in kw.to_released(model).items() if key in case["grad_norms"]}
    assert set(norms) == set(case["grad_norms"])
    floor = 1e-9 * max(case["grad_norms"].values())
    for key, expected in case["grad_norms"].items():
        assert norms[key] == pytest.approx(expected, rel=1e-6, abs=floor), key

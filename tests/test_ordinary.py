"""A converted model is an ordinary model: it is cut, copied, moved, saved, hooked and averaged as any other."""

import copy
import gc
import os
import warnings

import pytest
import timm
import torch
import torch.distributed.fsdp
from helpers.programs import finish, ranks
from safetensors.torch import load_model, save_model
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kw
from kw import KWConfig
from kw.baselines import convert as convert_to_baseline
from kw.layers import KWLayer


def vanilla():
    """Layers of every kind; those of "wide" and "late" share a warehouse across parts."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        nn.Flatten(2),
        nn.Conv1d(8, 8, 1),
        nn.Linear(4, 4),
    )


SCOPE = {"0.0": "w", "0.3": "w", "1.0": "w", "1.2": "p", "3": "p", "4": "l"}


def converted(n="1", **settings):
    return kw.convert(vanilla(), SCOPE, KWConfig(n=n, **settings))


def images(batch=2):
    return torch.randn(batch, 4, 6, 6)


def cells_of(model):
    return list(dict.fromkeys(layer.warehouse.cells for layer in model.modules() if isinstance(layer, KWLayer)))


PARTS = {
    "sliced": (lambda m: m[:2], lambda x: x),
    "children": (lambda m: nn.Sequential(*list(m.children())[:2]), lambda x: x),
    "the second part": (lambda m: nn.Sequential(m[1]), lambda x: torch.randn(2, 8, 4, 4)),
    "one layer": (lambda m: nn.Sequential(m[1][0]), lambda x: torch.randn(2, 8, 4, 4)),
    "copied": (lambda m: copy.deepcopy(m[1]), lambda x: torch.randn(2, 8, 4, 4)),
    "copied twice": (lambda m: copy.deepcopy(copy.deepcopy(m[1])[0]), lambda x: torch.randn(2, 8, 4, 4)),
}


@pytest.mark.parametrize("orphaned", [False, True], ids=["", "without the whole"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_its_cells(part, orphaned):
    cut, fitting = PARTS[part]
    model = converted().eval()
    taken, x = cut(model), fitting(images())
    if isinstance(taken, KWLayer):
        taken = nn.Sequential(taken)
    if orphaned:
        del model
        gc.collect()
    expected, cells = taken(x), cells_of(taken)
    parameters = list(taken.parameters())
    assert cells and all(sum(p is one for p in parameters) == 1 for one in cells)
    state = taken.state_dict()
    assert sum(key.endswith("cells") for key in state) == len(cells)
    assert sum(value.numel() for key, value in state.items() if key.endswith("cells")) == sum(c.numel() for c in cells)
    again = copy.deepcopy(taken)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert not torch.equal(again(x), expected)
    assert str(again.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(again(x), expected)
    assert all(cells.dtype == torch.float64 for cells in cells_of(copy.deepcopy(taken).double()))
    taken.double()
    assert all(cells.dtype == torch.float64 for cells in cells_of(taken))
    seen = []
    again.apply(lambda module: seen.append(module) if isinstance(module, kw.Warehouse) else None)
    assert sorted(map(id, seen)) == sorted(
        {id(layer.warehouse) for layer in again.modules() if isinstance(layer, KWLayer)}
    )


def test_a_model_that_was_cut_by_position_is_cut_where_the_static_one_is():
    for model, static in (
        (converted(), vanilla()),
        (timm.create_model("kw_resnet18", n=1), timm.create_model("resnet18")),
    ):
        assert [name for name, _ in model.named_children()] == [name for name, _ in static.named_children()]


@pytest.mark.parametrize("assign", [False, True])
def test_a_missing_entry_is_named_once_and_one_under_another_name_is_found(assign):
    model, other = converted(), converted()
    state = model.state_dict()
    del state["0.0.warehouse.cells"]
    found = other.load_state_dict(state, strict=False, assign=assign)
    assert found.missing_keys == ["0.0.warehouse.cells"] and not found.unexpected_keys
    state["1.0.warehouse.cells"] = model.warehouses["w"].cells.detach()
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(model.warehouses["w"].cells, other.warehouses["w"].cells)
    assert len({id(layer.warehouse.cells) for layer in other.modules() if isinstance(layer, KWLayer)}) == 3
    with pytest.raises(RuntimeError, match=r"0\.0\.warehouse\.cells"):
        del state["1.0.warehouse.cells"]
        other.load_state_dict(state)


def test_files_do_not_grow_and_safetensors_saves_models(tmp_path):
    model, twin = converted(), converted()
    save_model(model, tmp_path / "model.safetensors")
    load_model(twin, tmp_path / "model.safetensors")
    x = images()
    assert torch.equal(model.eval()(x), twin.eval()(x))
    bytes_needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert os.path.getsize(tmp_path / "model.safetensors") < bytes_needed + 20_000
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert os.path.getsize(tmp_path / "model.pt") < bytes_needed + 50_000


def test_cells_on_another_device_are_an_error_that_names_both():
    model = converted().eval()
    model.warehouses["p"].to("meta")
    with pytest.raises(RuntimeError, match=r"Layer '1\.2'.* cpu.*'p'.* meta"):
        model(images())
    meta = converted().to("meta")
    assert meta(images().to("meta")).is_meta


def test_hooks_on_a_warehouse_see_every_use():
    model, seen = converted(), []
    model.warehouses["w"].register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.warehouses["w"].register_forward_hook(lambda module, args, output: output * 0)
    model[0][:1](images())
    assert seen == ["before"]
    assert not (model[0][0](images()) - model[0][0].bias.view(-1, 1, 1)).any()


def test_layer_decay_of_timm_puts_cells_where_their_first_layer_is():
    model = timm.create_model("kw_resnet18", n="1")
    scale = {
        p: group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.7) for p in group["params"]
    }
    assert scale.keys() == set(model.parameters())
    first = {}
    for layer in model.modules():
        if isinstance(layer, KWLayer):
            first.setdefault(layer.warehouse.cells, scale[layer.attention.fc1.weight])
    assert all(scale[cells] == value for cells, value in first.items()) and len(set(first.values())) == len(first)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loading", ["to_empty", "assign", "to_empty in parts"])
def test_a_model_made_on_the_meta_device_is_exact_once_it_is_loaded(loading, tau):
    whole = converted().double().float()
    kw.set_temperature(whole, tau)
    with torch.device("meta"):
        model = converted()
    if loading == "to_empty":
        model.to_empty(device="cpu")
    elif loading == "to_empty in parts":
        for layer in model:
            layer.to_empty(device="cpu")
    result = model.load_state_dict(whole.state_dict(), assign=loading == "assign")
    assert str(result) == "<All keys matched successfully>"
    x = images()
    assert torch.equal(model.eval()(x), whole.eval()(x))
    assert torch.equal(copy.deepcopy(model)(x), whole(x))
    half = copy.deepcopy(model).bfloat16()
    assert (half(x.bfloat16()).float() - whole(x)).abs().max() < 0.05 * whole(x).abs().max() + 0.05
    assert not any("beta" in name for name, _ in model.named_buffers())


def test_a_batch_of_one_takes_running_statistics_and_warns_once():
    model = converted()
    model(images(8))
    for module in model.modules():  # the model's own norms would take the statistics of the one image
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    one = images(1)
    with pytest.warns(UserWarning, match=r"Layer '0\.0' had a batch of 1.*attention_norm='layer'") as caught:
        trained = model(one)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(one).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(trained, model.eval()(one))


def test_the_last_batch_may_have_one_sample_or_none():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[0][1].eval()
        for x in images(5).split(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for name, layer in model.named_modules():
        if isinstance(layer, KWLayer):
            static = vanilla().get_submodule(name)
            x = (
                torch.zeros(0, 4)
                if isinstance(static, nn.Linear)
                else torch.zeros(0, static.in_channels, *(4, 4)[: layer.dims])
            )
            out = layer(x.requires_grad_())
            assert out.shape == static(x).shape
            out.sum().backward()
            assert x.grad is not None and all(p.grad is not None for p in layer.parameters())
    assert all(value.isfinite().all() for value in (*model.state_dict().values(),))


@pytest.mark.usefixtures("each_choice")
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (2, 3, 4, 5), (0,), (2, 0), (0, 3)])
def test_linear_gives_what_the_static_one_gives(shape):
    static = nn.Linear(16, 8)
    layer = kw.convert(nn.Sequential(nn.Linear(16, 8)), {"0": "w"}, KWConfig(n="1"))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in (torch.randn(*shape, 16), torch.randn(16, *shape).movedim(0, -1)):
            for taken in (layer, layer.eval()):
                out = taken(x)
                assert out.shape == static(x).shape and out.is_contiguous()
                out.view(-1)
    if shape == ():
        assert torch.allclose(layer(x), layer(x[None])[0])


CONVERSIONS = {
    "kw": lambda model: kw.convert(model, {"0": "a", "1": "a", "2": "b", "3": "c"}, KWConfig(n="1")),
    "odconv": lambda model: convert_to_baseline(model, "odconv", 1, ["0", "1", "2"]),
    "freeze": lambda model: kw.freeze(kw.convert(model, {"0": "a", "1": "a", "2": "b"}, KWConfig(n="1"))) and model,
}


def plain():
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(2, 2))


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_hooks_run_on_the_converted_layer_and_can_be_removed(conversion):
    model, seen = plain().double(), []
    handles = [
        model[1].register_forward_hook(lambda m, args, out: seen.append("after")),
        model[1].register_forward_hook(lambda m, args, kwargs, out: seen.append("kwargs"), with_kwargs=True),
        model[1].register_forward_hook(lambda m, args, out: seen.append("always"), always_call=True),
        model[1].register_forward_pre_hook(lambda m, args: seen.append("before")),
        model[1].register_forward_pre_hook(lambda m, args, kwargs: seen.append("before kwargs"), with_kwargs=True),
        model[1].register_full_backward_hook(lambda m, grads, out: seen.append("backward")),
        model[1].register_full_backward_pre_hook(lambda m, grads: seen.append("backward pre")),
    ]
    model = CONVERSIONS[conversion](model)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert sorted(seen) == sorted(["after", "kwargs", "always", "before", "before kwargs", "backward", "backward pre"])
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert not seen


@pytest.mark.parametrize("conversion", ["kw", "odconv"])
def test_what_was_frozen_stays_frozen(conversion):
    model = plain()
    for parameter in (*model[0].parameters(), *model[1].parameters(), model[2].bias):
        parameter.requires_grad = False
    model[1].eval()
    model = CONVERSIONS[conversion](model)
    assert not any(p.requires_grad for part in model[:2] for p in part.parameters())
    assert [name for name, p in model[2].named_parameters() if not p.requires_grad] == ["bias"]
    assert [part.training for part in model] == [True, False, True, True]
    own = model[1].attention if conversion == "kw" else model[1]
    assert not any(part.training for part in own.modules() if isinstance(part, nn.BatchNorm1d | nn.Linear | nn.Conv2d))


def test_cells_of_some_frozen_layers_are_trained_with_a_warning():
    model = plain()
    model[1].weight.requires_grad = False
    with pytest.warns(UserWarning, match=r"Warehouse 'a'.*'1'"):
        CONVERSIONS["kw"](model)
    assert model.warehouses["a"].cells.requires_grad
    assert not any(p.requires_grad for p in model[1].attention.parameters()) and model[1].bias.requires_grad


@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        torch.nn.utils.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
        lambda layer: parametrizations.weight_norm(layer, "bias"),
    ],
    ids=["weight_norm", "old weight_norm", "spectral_norm", "pruned", "pruned bias", "weight_norm of the bias"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("conversion", ["kw", "odconv"])
def test_a_layer_that_computes_its_weight_or_bias_is_refused(compute, conversion):
    model = plain()
    compute(model[1])
    with pytest.raises(ValueError, match="'1'"):
        CONVERSIONS[conversion](model)


def test_what_cannot_be_carried_over_is_warned_of():
    model = plain()
    model[2].register_state_dict_pre_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="Layer '2' had hooks on its state dict"):
        CONVERSIONS["kw"](model)


class UltralyticsEMA:
    """How ultralytics averages: state dict's values in place."""

    def __init__(self, model):
        self.module = copy.deepcopy(model).eval()

    def update(self, model):
        state = model.state_dict()
        for key, value in self.module.state_dict().items():
            if value.dtype.is_floating_point:
                value *= 0.99
                value += 0.01 * state[key].detach()


class Averaged(AveragedModel):
    update = AveragedModel.update_parameters


AVERAGES = {
    "timm 2": lambda model: ModelEmaV2(model, decay=0.99),
    "timm 3": lambda model: ModelEmaV3(model, decay=0.99),
    "timm 3, each": lambda model: ModelEmaV3(model, decay=0.99, foreach=False),
    "timm 3, parameters": lambda model: ModelEmaV3(model, decay=0.99, exclude_buffers=True),
    "torch": lambda model: Averaged(model),
    "torch, buffers": lambda model: Averaged(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True),
    "ultralytics": UltralyticsEMA,
}


@pytest.mark.parametrize("tool", AVERAGES)
def test_an_average_has_the_temperature_of_the_model_and_averages_cells_once(tool):
    model = converted()
    kw.set_temperature(model, 1.0)
    average = AVERAGES[tool](model)
    before = [cells.detach().clone() for cells in cells_of(average.module)]
    for tau in (0.7, 0.3, 0.0):
        kw.set_temperature(model, tau)
        with torch.no_grad():
            for cells in cells_of(model):
                cells.add_(1)
        average.update(model)
        values = {float(v) for k, v in average.module.state_dict().items() if k.endswith("temperature")}
        assert values == {float(torch.tensor(tau))}
        assert [float(t) for t in kw.temperatures(average.module)] == list(values)
    assert all(temperature.is_zero for temperature in kw.temperatures(average.module))
    kept = 0.99
    moved = 3 - sum(kept**k for k in (1, 2, 3))  # an average in which each value has the weight 0.01
    if not tool.startswith("torch"):
        for now, then in zip(cells_of(average.module), before, strict=True):
            torch.testing.assert_close(now - then, torch.full_like(now, moved), rtol=0, atol=1e-5)


def test_a_copy_has_a_temperature_of_its_own():
    model = converted()
    kw.set_temperature(model, 0.5)
    twin = copy.deepcopy(model)
    kw.set_temperature(model, 0.2)
    assert float(kw.temperatures(twin)[0]) == 0.5
    kw.temperatures(twin)[0].value.copy_(torch.tensor(0.5))  # as DistributedDataParallel's broadcast does
    assert float(kw.temperatures(twin)[0]) == 0.5
    state = converted().state_dict()
    twin.load_state_dict(state)
    assert float(kw.temperatures(twin)[0]) == 0 and kw.temperatures(twin)[0].is_zero
    del model
    gc.collect()
    kw.temperatures(twin)[0].value.fill_(0.25)  # there is nothing to follow
    assert float(kw.temperatures(twin)[0]) == 0.25


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 is public from torch 2.6 on")
@pytest.mark.parametrize("scope", ["within", "across"])
@pytest.mark.parametrize("wrapping", ["ddp", "root", "blocks", "warehouses+blocks", "warehouses+resharded"])
def test_processes_train_cells_as_one_does_or_say_how(wrapping, scope):
    """DistributedDataParallel, and FSDP of the whole, of blocks, or of warehouses and blocks."""
    refused = wrapping == "warehouses+resharded" or (wrapping, scope) == ("blocks", "across")
    for process in ranks(2, "helpers.sharded", wrapping, scope):
        printed = finish(process).stdout
        if refused:
            assert "fully_shard(w, reshard_after_forward=False)" in printed
        else:
            assert float(printed.split("largest difference ")[1]) < 1e-6


def test_replicas_of_data_parallel_use_cells_of_their_own():
    """What nn.DataParallel does for each device, here with other values in place of another device."""
    model = converted().eval()
    modules = list(model.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[modules.index(child)]
        for name, parameter in module._parameters.items():
            other = parameter is not None and name == "cells"
            setattr(replica, name, parameter.detach() * 2 if other else parameter)
    with torch.no_grad():
        x = images()
        out = replicas[0](x)
        for cells in cells_of(model):
            cells.mul_(2)
        assert torch.equal(out, model(x))

"""The default plan: what it promises about parameters, that its counts are right, and why layers stay static."""

import copy
from collections import namedtuple
from fractions import Fraction
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

import kw
from kw import KWConfig
from kw.layers import KWLayer

BUDGETS = ("1/4", "1/2", "1", "2", "4")
# Networks of many kinds: plain and grouped convolutions, depthwise ones with gates, tokens, windows, weights that the
# model reads, dense connections.
NAMES = ("convit_tiny", "convnext_atto", "efficientnet_b0", "mobilevitv2_050", "regnety_004", "resnet26d")
NAMES_LATER = ("caformer_s18", "coat_tiny", "crossvit_tiny_240", "densenet121", "efficientformer_l1", "fastvit_t8")
NAMES_LATER += ("mixer_s32_224", "resnext26ts", "starnet_s1", "swinv2_tiny_window8_256", "vit_tiny_patch16_224")


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def convertible(model):
    """W: the weights of all plain layers but the first and the classifier."""
    head = model.get_classifier()
    plain = [m for m in model.modules() if type(m) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and m is not head]
    return sum(layer.weight.numel() for layer in plain[1:])


def planned(name):
    """A model and its plan for each budget."""
    with torch.device("meta"):
        model = timm.create_model(name)
        return model, {Fraction(n): kw.plan(model, n) for n in BUDGETS}


def check_promises(model, plans):
    """Never more than static below n = 1; at most 15% more at n = 1; above, at most 15% more than n adds."""
    total, asked = parameters(model), convertible(model)
    for n, plan in plans.items():
        most = total * Fraction(100 if n < 1 else 115, 100) if n <= 1 else total + Fraction(115, 100) * (n - 1) * asked
        assert plan.params <= most, n


def reached(model, plan):
    """Whether half of what n asks for is saved (n < 1) or dynamic (n = 1), or a third added (n > 1)."""
    n, asked, added = plan.n, convertible(model), plan.params - parameters(model)
    if n == 1:
        return sum(warehouse.kernels for warehouse in plan.warehouses) >= Fraction(asked, 2)
    return -added >= (1 - n) * asked / 2 if n < 1 else added >= (n - 1) * asked / 3


def check_counts(model, plan):
    """What the plan counts is what the conversion makes."""
    kw.convert(model, plan)
    assert parameters(model) == plan.params
    assert {name: m.warehouse.name for name, m in model.named_modules() if isinstance(m, KWLayer)} == plan.scope
    for each in plan.warehouses:
        warehouse = model.warehouses[each.name]
        assert tuple(warehouse.cells.shape) == each.cells
        assert tuple(share.mixtures for share in warehouse.shares) == each.mixtures
        attention = [m.attention for m in model.modules() if isinstance(m, KWLayer) and m.warehouse is warehouse]
        assert sum(map(parameters, attention)) == each.attention
    assert plan.scope.keys() | plan.static.keys() == {layer.name for layer in plan.layers}
    assert not plan.scope.keys() & plan.static.keys()


def check_models(names):
    budgets = [Fraction(n) for n in BUDGETS]
    met = dict.fromkeys(budgets, 0)
    for k, name in enumerate(names):
        model, plans = planned(name)
        check_promises(model, plans)
        for n in budgets:
            met[n] += reached(model, plans[n])
        check_counts(model, plans[budgets[k % len(budgets)]])
    assert min(met.values()) >= 0.8 * len(names), met


def test_promises_and_counts_hold_for_models_of_many_kinds():
    check_models(NAMES)


@pytest.mark.slow
def test_promises_and_counts_hold_for_more_models():
    check_models(NAMES_LATER)


@pytest.mark.parametrize(
    "settings", [{"reduction": "1/8", "attention_norm": "layer"}, {"nonlocal_basis": "1/2"}], ids=str
)
def test_settings_are_counted_too(settings):
    with torch.device("meta"):
        model = timm.create_model("resnet26")
        plan = kw.plan(model, "1/2", config=KWConfig(**settings))
        kw.convert(model, plan)
    assert parameters(model) == plan.params


def test_layers_of_a_warehouse_are_of_one_stage_and_kind():
    with torch.device("meta"):
        plan = kw.plan(timm.create_model("regnety_004"), 4)
    layers = {layer.name: layer for layer in plan.layers}
    for warehouse in plan.warehouses:
        assert len({(layers[name].stage, layers[name].kind) for name in warehouse.layers}) == 1
        stage, kind = layers[warehouse.layers[0]].stage, layers[warehouse.layers[0]].kind
        assert warehouse.name.startswith(f"stage{stage}_{kind}")


@pytest.mark.parametrize("build", [partial(timm.create_model, "resnet18"), torchvision.models.resnet18])
def test_stages_are_those_of_the_model(build):
    """Of timm's feature_info, or of resolutions, found on the meta device."""
    with torch.device("meta"):
        plan = kw.plan(build(), "1/2")
    assert {(name.split(".")[0], warehouse.split("_")[0]) for name, warehouse in plan.scope.items()} == {
        (f"layer{k}", f"stage{k}") for k in (1, 2, 3, 4)
    }


def test_sharing_and_partition_are_followed():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
        alone = kw.plan(model, config=KWConfig(sharing="none"))
        whole = kw.plan(model, config=KWConfig(partition="none"))
    assert all(len(warehouse.layers) == 1 for warehouse in alone.warehouses)
    shapes = {layer.name: layer.shape for layer in whole.layers}
    for warehouse in whole.warehouses:
        assert len({shapes[name] for name in warehouse.layers}) == 1
        assert warehouse.mixtures == (1,) * len(warehouse.layers)


# Layers that stay static, each for its reason


class Gated(nn.Module):
    """A block with a gate under a name of its own."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.importance = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())
        self.out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        y = y * self.importance(y.mean((2, 3)))[..., None, None]
        return x + self.out(y)


class Reader(nn.Module):
    """It reads the weight of one layer, and never runs another."""

    def __init__(self, channels):
        super().__init__()
        self.read, self.called, self.unused = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight, self.read.bias))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 4, stride=4)
        self.blocks = nn.Sequential(Gated(64), Gated(64))
        self.tied_a, self.tied_b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.tied_b.weight = self.tied_a.weight
        self.tokens = Reader(64)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.boxes, self.classes = nn.Linear(64, 4), nn.Linear(64, 90)

    def forward(self, x):
        x = self.blocks(self.stem(x)).flatten(2).transpose(1, 2)
        x = self.normed(self.tokens(self.tied_b(self.tied_a(x)).relu()).relu()).relu()
        return {"boxes": self.boxes(x).sigmoid(), "classes": self.classes(x).transpose(1, 2)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_reasons(device):
    with torch.device(device):
        model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    static = kw.plan(model).static
    expected = {
        "stem": "reads the model's input",
        "tied_a": "also another module's",
        "tied_b": "also another module's",
        "tokens.read": "reads its weight",
        "tokens.unused": "does not run",
        "normed": "computed from other parameters",
        "boxes": "output is the model's",
        "classes": "output is the model's",
        **{f"blocks.{k}.importance.0": "gate" for k in (0, 1)},
    }
    for name, reason in expected.items():
        assert reason in static[name], name
    assert all("attention too large" in why for name, why in static.items() if name not in expected)
    assert model.training and model.state_dict().keys() == before.keys()
    assert not any(m._forward_hooks for m in model.modules())
    if device == "cpu":
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weight_standardization_stays_static_and_a_subclass_of_the_same_function_does_not():
    with torch.device("meta"):
        standardized = kw.plan(timm.create_model("eca_nfnet_l0"))
        video = kw.plan(torchvision.models.video.r3d_18(), 1)
    assert sum("ScaledStdConv2d computes something else" in why for why in standardized.static.values()) > 50
    assert len(video.scope) >= 16
    assert sum(layer.weights for layer in video.layers if layer.name in video.scope) > 0.9 * 33e6


def test_heads_of_a_detector_and_auxiliary_classifiers_stay_static():
    from torchvision.models import detection

    with torch.device("meta"):
        googlenet = kw.plan(torchvision.models.googlenet(init_weights=False))
    assert {"fc", "aux1.fc1", "aux1.fc2", "aux2.fc2"} <= googlenet.static.keys()
    detector = kw.plan(detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None))
    heads = {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred", "rpn.head.cls_logits"}
    assert heads <= detector.static.keys()


def test_a_model_whose_input_cannot_be_guessed_is_planned_with_an_example():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(7, 256), nn.Linear(256, 256), nn.Linear(256, 3)
            self.unused = nn.Linear(256, 256)

        def forward(self, x, scale):
            return self.last(self.second(self.first(x) * scale.mean()))

    plan = kw.plan(Odd(), example=(torch.randn(2, 5, 7), torch.randn(2)))
    assert set(plan.scope) == {"second"} and plan.static["unused"] == "does not run in evaluation mode"
    assert "second" in kw.plan(Odd()).scope  # by names: first and last stay static


@pytest.mark.parametrize("side", [28, 50])
def test_a_network_with_flattened_features_is_planned_at_a_usual_size_and_by_names_at_others(side):
    features = 64 * ((side - 4) // 2) ** 2
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )
    model.extend([nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 10)])
    plan = kw.plan(model, 1)
    assert "2" in plan.scope
    assert plan.static["0"] == "reads the model's input" and plan.static["8"] == "its output is the model's"


def test_transformer_layers_that_torch_computes_by_their_weights_stay_static():
    """nn.TransformerEncoderLayer reads the weights of its linear layers in evaluation mode."""
    model = nn.Sequential(
        nn.Linear(256, 256), nn.TransformerEncoderLayer(256, 2, batch_first=True), nn.Linear(256, 256)
    )
    model.append(nn.Linear(256, 3))
    kw.convert(model, example=torch.randn(2, 4, 256))
    x = torch.randn(3, 4, 256)
    assert model(x).shape == model.eval()(x).shape == (3, 4, 3)
    assert isinstance(model[2], kw.KWLinear)


def test_layers_of_a_transformer_that_did_not_run_stay_static_by_its_class():
    model = nn.Sequential(nn.Linear(32, 64), nn.TransformerEncoderLayer(64, 4, 256, batch_first=True))
    model.extend([nn.Unflatten(1, (2, -1)), nn.Conv1d(64, 64, 1), nn.Linear(64, 5)])  # no input runs through that
    with pytest.warns(UserWarning, match="No forward pass"):
        plan = kw.plan(model)
    assert plan.static["1.linear1"] == plan.static["1.linear2"] == "the model reads its weight itself"


class PositionsFirst(nn.Module):
    """A transformer as CLIP's: `(L, B, C)` between its patches and its head."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 64, 8, 8), nn.Linear(64, 5)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.after = nn.Linear(64, 64)

    def forward(self, images):
        x = self.patches(images).flatten(2).permute(2, 0, 1)
        return self.head(self.after((x + self.mlp(x)).transpose(0, 1)).relu().mean(1))


class BranchesOnValues(PositionsFirst):
    """It cannot run on the meta device."""

    def forward(self, images):
        return super().forward(images if images.sum() > -1e9 else 2 * images)


@pytest.mark.parametrize("build", [PositionsFirst, BranchesOnValues])
@pytest.mark.parametrize("example", [None, (3, 24), (2, 16), (1, 40)])  # images, and their side: a multiple of 8
def test_layers_whose_input_has_positions_first_stay_static_whatever_their_number(example, build):
    model = build()
    images = None if example is None else torch.randn(example[0], 3, example[1], example[1])
    plan = kw.plan(model, 4, example=images)
    assert plan.static["mlp.0"] == plan.static["mlp.2"] == "its input is not a batch of samples"
    assert "after" in plan.scope
    with pytest.warns(UserWarning, match="does not count samples"):
        kw.convert(model, {"mlp.0": "a"}, example=images)


class Body(nn.Module):
    """Layers of samples, whose input is found by `get`."""

    def __init__(self, get):
        super().__init__()
        self.first, self.body, self.head, self.get = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 3), get

    def forward(self, *args):
        return self.head(self.body(self.first(self.get(*args)).relu()).relu())


Pair = namedtuple("Pair", "x y")
VECTORS = torch.randn(2, 64)


@pytest.mark.parametrize(
    ("get", "example"),
    [
        (lambda time, x: x * time, (torch.tensor(0.5), VECTORS)),
        (lambda flag, x: x, (None, VECTORS)),
        (lambda batch: batch["image"], {"size": 32, "image": VECTORS}),
        (lambda pair: pair[0] + pair[1], ((VECTORS, VECTORS),)),
        (lambda pair: pair.x, (Pair(VECTORS, VECTORS),)),  # what is in it is not found
        (lambda images: torch.stack(images), [VECTORS[0], VECTORS[1], VECTORS[0]]),
        (lambda x, state: x + state[0], (VECTORS, (VECTORS, VECTORS))),
    ],
    ids=["time first", "None first", "dictionary", "pair", "namedtuple", "list of samples", "state"],
)
def test_samples_are_found_wherever_an_example_has_them(get, example):
    assert "body" in kw.plan(Body(get), 2, example=example).scope


@pytest.mark.parametrize("batch", [1, 2])
def test_layers_called_for_parts_of_the_batch_are_convertible(batch):
    class OneByOne(Body):
        def forward(self, x):
            return torch.cat([super(OneByOne, self).forward(one) for one in x.split(1)])

    assert "body" in kw.plan(OneByOne(lambda x: x), 2, example=torch.randn(batch, 64)).scope


def test_an_encoder_layer_with_a_forward_of_its_own_takes_no_fast_path():
    class Own(nn.TransformerEncoderLayer):
        def forward(self, x):
            return x + self.linear2(self.linear1(x).relu())

    model = nn.Sequential(nn.Linear(32, 64), Own(64, 2, 256, batch_first=True), nn.Linear(64, 3))
    kw.convert(model, {"1.linear1": "a"}, example=torch.randn(2, 4, 32))
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 4, 32)).shape == (2, 4, 3)


def test_tied_weights_another_name_of_a_layer_and_lazy_modules_are_refused_by_name():
    layers = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    tied = nn.Sequential(*layers, layers[0], nn.Linear(8, 2))
    tied[2].weight = tied[1].weight
    for scope in ({"1": "a"}, {"1": "a", "2": "a"}):
        with pytest.raises(ValueError, match=r"'1'.* is also another module's"):
            kw.convert(tied, scope)
    convolutions = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(4)))
    plan = kw.plan(copy.deepcopy(convolutions), 2, example=torch.randn(2, 64, 4, 4))
    convolutions[2].weight = convolutions[1].weight
    for conversion in (lambda m: kw.convert(m, plan=plan), lambda m: kw.baselines.convert(m, "odconv", 2)):
        with pytest.raises(ValueError, match=r"'1'.* is also another module's"):
            conversion(convolutions)
    with pytest.raises(ValueError, match="'3', which is the same module as '0'"):
        kw.convert(tied, {"3": "a"})
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        kw.plan(nn.Sequential(nn.LazyConv2d(64, 3), nn.ReLU(), nn.Linear(8, 8)))


def test_a_scope_with_a_layer_whose_weight_is_read_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 16), Reader(16), nn.Linear(16, 3))
    with pytest.raises(ValueError, match=r"reads the weight of '1\.read' itself"):
        kw.convert(model, {"1.read": "a", "1.called": "a"})
    assert type(model[1].read) is nn.Linear


# What one sees


def test_table_names_layers_warehouses_and_reasons():
    with torch.device("meta"):
        plan = kw.plan(timm.create_model("efficientnet_b0"), "1/2")
    text = str(plan)
    for part in (*plan.scope, *plan.static, *plan.configs, *set(plan.static.values()), plan.summary()):
        assert part in text


def test_little_gain_is_warned_of_and_none_is_an_error():
    with torch.device("meta"):
        depthwise = [nn.Conv2d(512, 512, 7, padding=3, groups=512) for _ in range(3)]
        little = nn.Sequential(nn.Conv2d(3, 512, 1), *depthwise, nn.Conv2d(512, 192, 1), nn.Conv2d(192, 5, 1))
        none = timm.create_model("eca_nfnet_l0")
        with pytest.warns(UserWarning, match=r"Sequential: n = 1/2: [\d,]+ parameters of [\d,]+ static ones, 5 of 6 "):
            kw.convert(little, config=KWConfig(n="1/2"))
        with pytest.raises(ValueError, match="No layer of this NormFreeNet would be dynamic"):
            kw.convert(none)


def test_a_plan_of_another_model_is_refused():
    with torch.device("meta"):
        plan = kw.plan(timm.create_model("resnet18"))
        for other in ("resnet50", "vit_tiny_patch16_224"):
            model = timm.create_model(other)
            with pytest.raises(ValueError, match="plan is of another model"):
                kw.convert(model, plan)
        with pytest.raises(ValueError, match="pass a plan alone"):
            kw.convert(timm.create_model("resnet18"), plan, KWConfig())
    assert kw.convert(timm.create_model("resnet18"), plan=plan).warehouses.keys() == plan.configs.keys()


@pytest.mark.parametrize("n", ["1/2", 2])
@pytest.mark.parametrize("name", ["regnety_002", "vit_tiny_patch16_224"])
def test_a_model_converted_by_default_trains_every_parameter(name, n):
    model = kw.create_model(name, n=n, num_classes=5, **({"img_size": 32} if "vit" in name else {}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm zeroes some, which cuts a block off from gradients at first
    nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


# What must not change a plan, and what must not pass in silence


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_plan_does_not_depend_on_precision_or_inference_mode(dtype):
    with torch.device("meta"):
        model = timm.create_model("mobilenetv3_small_100")
        expected = kw.plan(model, 2)
        with torch.inference_mode():
            assert kw.plan(model, 2) == expected
        assert kw.plan(model.to(dtype), 2) == expected


def test_a_network_of_vectors_at_its_end_has_no_gates():
    """A bottleneck of one position is no gate: it scales nothing."""
    with torch.device("meta"):
        narrow = nn.Sequential(nn.Conv2d(3, 256, 4, 4), nn.Conv2d(256, 256, 8), nn.ConvTranspose2d(256, 256, 8))
        narrow.extend([nn.Conv2d(256, 256, 3), nn.Conv2d(256, 3, 1)])
        plan = kw.plan(narrow, 1, example=torch.zeros(2, 3, 32, 32))
    assert set(plan.scope) == {"1", "3"}


def test_a_head_with_a_prior_stays_static():
    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.head = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 200)
            self.prior = nn.Parameter(torch.zeros(200))

        def forward(self, x):
            return self.head(self.body(self.first(x)).relu()) + self.prior

    assert kw.plan(Prior(), 1).static["head"] == "its output is the model's"


def test_a_part_without_gradients_is_named_as_such():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 256))
            self.more, self.head = nn.Linear(256, 256), nn.Linear(256, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(self.more(x).relu())

    static = kw.plan(Frozen(), 1).static
    assert static["body.1"] == static["more"] == "no gradient reaches its input"


def test_frozen_layers_have_warehouses_of_their_own():
    model = timm.create_model("resnet18")
    for parameter in model.layer1[0].conv1.parameters():
        parameter.requires_grad_(False)
    plan = kw.plan(model, 4)
    (name,) = [warehouse.name for warehouse in plan.warehouses if "layer1.0.conv1" in warehouse.layers]
    assert name == "stage1_conv_frozen"
    kw.convert(model, plan)
    assert [key for key, w in model.warehouses.items() if not w.cells.requires_grad] == [name]


def test_an_example_on_which_the_model_does_not_run_is_an_error():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
        with pytest.raises(ValueError, match=r"ResNet does not run on example=.*RuntimeError"):
            kw.plan(model, example=torch.zeros(2, 5, 64, 64))


def test_a_pass_that_does_not_come_to_its_end_is_warned_of():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(7, 7))
    with pytest.warns(UserWarning, match="No forward pass of this Sequential came to its end"):
        assert "1" in kw.plan(model).scope


def test_hooks_of_the_user_see_nothing_of_the_pass():
    model, seen = Net(), []
    model.stem.register_forward_pre_hook(lambda module, args: seen.append(args))
    model.stem.register_forward_hook(lambda module, args, output: seen.append(output))
    kw.plan(model)
    assert not seen


def test_settings_of_a_plan_are_those_that_were_passed():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
        assert kw.plan(model, config=KWConfig(n=4)) == kw.plan(model, 4) == kw.plan(model, KWConfig(n=4))
        with pytest.raises(ValueError, match="two"):
            kw.plan(model, KWConfig(n=4), config=KWConfig())
        plan = kw.plan(model)
        with pytest.raises(ValueError, match="two"):
            kw.convert(model, plan, plan=plan)
        with pytest.raises(ValueError, match="odconv"):
            kw.create_model("resnet18", n=4, dynamic="odconv", from_weights=True)


def test_a_plan_is_not_carried_out_on_layers_that_changed():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 5, 1))
    plan = kw.plan(model)
    for other in (nn.utils.parametrizations.weight_norm(nn.Conv2d(64, 64, 3)), nn.ConvTranspose2d(64, 64, 3)):
        with pytest.raises(ValueError, match="'1' has a kernel of shape"):
            kw.convert(nn.Sequential(nn.Conv2d(3, 64, 3), other, nn.Conv2d(64, 5, 1)), plan)


def test_layers_called_by_keyword_are_seen_and_replaced():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.head = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 3)

        def forward(self, x):
            return self.head(input=self.body(input=self.first(input=x)).mean((2, 3)))

    model = ByKeyword()
    plan = kw.plan(model)
    assert set(plan.scope) == {"body"}
    assert kw.convert(model, plan)(torch.randn(2, 3, 16, 16)).shape == (2, 3)


def test_classifiers_with_an_activation_or_a_sum_behind_them_stay_static():
    with torch.device("meta"):
        squeezed = kw.plan(torchvision.models.squeezenet1_1(), 4)
        summed = kw.plan(
            torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None), 4
        )
    assert squeezed.static["classifier.1"] == "its output is the model's"
    assert {"classifier.low_classifier", "classifier.high_classifier"} <= summed.static.keys()


def test_a_plan_of_a_smaller_model_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="does not know layer"):
        kw.convert(timm.create_model("resnet34"), kw.plan(timm.create_model("resnet18")))


def test_a_small_network_is_dynamic_at_every_budget():
    layers = [nn.Conv3d(1, 16, 3), nn.Conv3d(16, 32, 3, 2), nn.Conv3d(32, 64, 3, 2), nn.Conv3d(64, 64, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 5))
    for n in BUDGETS:
        assert kw.plan(model, n, example=torch.randn(2, 1, 32, 32, 32)).warehouses, n

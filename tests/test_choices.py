"""What each choice costs and which one is taken, and prices fitted to times. No time is judged."""

import itertools
import json

import pytest
import timm
import torch
from rich.console import Console

import kw
from kw.compute import prices
from kw.compute.cost import Choice, cost
from kw.functional import choose
from scripts.bench import cases, choices, fit_prices
from scripts.bench.choices import PLAIN
from scripts.bench.fit_prices import Timed

SETTINGS = cases.Settings()
FOLDED = Choice("folded", "grouped")
BLOCKS = Choice("cells", "blocks")


def calls_of(n="4", batch=2):
    model = cases.create(cases.parse_case(f"small:{n}"), n, SETTINGS).eval()
    return choices.record(model, torch.randn(batch, 3, 32, 32))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """There is no table but the one that this is called with."""
    monkeypatch.setattr(prices, "files", lambda package: tmp_path)
    (tmp_path / "price_tables").mkdir()

    def write(table=None):
        if table is not None:
            fit_prices.write(table, tmp_path / "price_tables" / "cpu.json")
        monkeypatch.setattr(prices, "TABLES", prices.load())
        kw.functional._remembered.cache_clear()

    write()
    yield write
    monkeypatch.undo()
    kw.functional._remembered.cache_clear()


def test_layers_are_recorded_by_kind_with_what_they_are_given():
    calls = {call.names[0]: call for call in calls_of()}
    assert calls["layer1.0.conv1"].names == ["layer1.0.conv1", "layer1.0.conv2"]
    assert calls["layer1.0.conv1"].x.shape == (2, 64, 16, 16)
    assert {choices.name_of(choice) for choice in calls["layer1.0.conv1"].choices()} == {
        "grouped", "batched", "blocks", "inputs", "grouped+folded", "batched+folded", "blocks+folded"}  # fmt: skip


def test_tokens_are_positions():
    model = timm.create_model("kw_deit_tiny_patch16_224", n="1", img_size=32, depth=1).eval()
    calls = {call.names[0]: call for call in choices.record(model, torch.randn(2, 3, 32, 32))}
    assert calls["blocks.0.attn.qkv"].x.shape == (2, 5, 192) and calls["blocks.0.attn.qkv"].seen.shape == (2, 192, 5)


def test_hopeless_choices_are_not_timed():
    calls = {call.names[0]: call for call in calls_of()}
    assert "inputs" not in {choice.apply for choice in choices.hopeful(calls["layer1.0.conv1"])}
    assert Choice("cells", "inputs") in choices.hopeful(calls["layer4.0.conv2"])


def test_every_choice_is_measured_forward_and_as_a_step():
    call = calls_of("1")[0]
    times = choices.measure(call, call.choices(), rounds=1)
    assert list(times) == call.choices()
    assert all(forward > 0 and step > 0 for forward, step in times.values())


def test_the_table_tells_what_is_taken_and_by_which_rule(measured):
    call = calls_of("1")[-1]
    assert "No prices were measured for 'cpu' (cpu.json)" in choices.rule(torch.device("cpu"))
    taken = {choice: {"mix": 1.0, "mix folded": 0.0, "fold": 0.0} for choice in ("grouped", "blocks")}
    table = prices.Table({"device": "some machine"}, taken, taken)
    measured(table)
    assert "some machine" in choices.rule(torch.device("cpu"))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(choices.shown([call], 0, "float32"))
    lines = {line.split("│")[5].strip(): line for line in console.export_text().splitlines() if line.startswith("│")}
    assert lines["grouped+folded"].count("0.00*") == 2 and lines["batched"].count("–") == 2
    assert "*" not in lines["blocks+folded"] + lines["grouped"]


def test_prices_are_recovered_from_times_that_follow_them():
    work = [{"apply": a, "entry": e, "fixed": 1.0} for a, e in ((1e6, 2e3), (5e5, 9e4), (3e7, 1e5), (2e5, 5e4))]
    true = {"apply": 0.01, "entry": 2.0, "fixed": 500.0}
    found, ratios = fit_prices.fit([Timed(w, sum(true[k] * v for k, v in w.items())) for w in work])
    assert found == pytest.approx(true) and ratios == pytest.approx([1.0] * 4)


def planted(truth):
    """Times of layers that follow prices."""
    calls = calls_of("4", 16) + calls_of("4", 1) + calls_of("1", 16)
    layers = []
    for call in calls:
        works = {choice: call.work(choice) for choice in call.choices() if choice.apply in truth}
        layers.append({c: Timed(w, sum(truth[c.apply][k] * v for k, v in w.items())) for c, w in works.items()})
    return layers


CELLS = {"apply": 0.01, "apply pointwise": 0.02, "mix": 0.03, "cell": 1.0, "entry": 2.0, "fixed": 9e4, "new": 1.0,
         "io": 0.5, "io pointwise": 0.5, "call": 0.0}  # fmt: skip
ALL = CELLS | {"mix folded": 0.07, "fold": 0.05}


def test_a_written_table_is_read_back_and_decides(measured):
    truth = {"grouped": ALL, "blocks": CELLS | {"mix folded": 0.0, "fold": 0.0, "call": 1e5}}
    layers = planted(truth)
    measured(fit_prices.table_of(layers, layers, {"device": "planted"}))
    table = prices.table("cpu")
    assert table.measured["device"] == "planted" and table.measured["layers"] == len(layers)
    assert table.measured["time over the best"]["step"]["auto"] == pytest.approx(1, abs=0.01)
    assert table.forward["grouped"]["mix folded"] == pytest.approx(0.07, rel=0.02)
    assert table.step["blocks"]["fold"] == pytest.approx(0, abs=1e-3)  # it is written though it is 0
    call = next(call for call in calls_of("4", 16) if call.names[0] == "layer1.0.conv1")
    chosen = choose(kw.functional.Setting(), call.seen, call.cells, call.geometry, call.hidden)
    expected = {choice: cost(choice, call.work(choice), table, True) for choice in call.choices()}
    assert chosen == min((c for c in expected if expected[c] is not None), key=lambda c: expected[c])


def test_what_choosing_costs_is_over_the_best_choice_of_each_layer():
    layers = [
        {PLAIN: Timed({"apply": 10.0}, 10.0), BLOCKS: Timed({"apply": 10.0}, 5.0)},
        {PLAIN: Timed({"apply": 2.0}, 2.0), BLOCKS: Timed({"apply": 2.0}, 4.0)},
        {PLAIN: Timed({"apply": 3.0}, 3.0)},  # to which the other one does not apply
    ]
    each = {"grouped": {"apply": 1.0}, "blocks": {"apply": 0.5}}  # right of the first layer, wrong of the second
    over = fit_prices.over_best(layers, prices.Table({}, each, {}), step=False)
    assert over == pytest.approx({"auto": 1.2, "grouped": 1.5, "blocks": 1.2})


def test_a_fit_writes_where_and_how_it_was_measured(tmp_path, monkeypatch, capsys):
    calls = fit_prices._calls
    monkeypatch.setattr(fit_prices, "_calls", lambda *args: itertools.islice(calls(*args), 1))
    out = tmp_path / "new" / "prices.json"
    options = ["small:1@2", "--repeats", "1", "--threads", str(torch.get_num_threads()), "--out", str(out)]
    fit_prices.main([*options, "--cpu-time"])
    table = prices.Table(**json.loads(out.read_text()))
    assert table.measured["layers"] == 1 and table.measured["clock"] == "CPU time of the process"
    assert {"device", "dtype", "layout", "command", "date", "torch", "commit"} <= set(table.measured)
    assert f"Written to {out}" in capsys.readouterr().out


def test_a_budget_without_time_for_a_layer_is_reported(tmp_path):
    with pytest.raises(SystemExit, match="--seconds"):
        fit_prices.main(["small:1@2", "--seconds", "0", "--out", str(tmp_path / "prices.json")])

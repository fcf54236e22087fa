"""The benchmark: it runs, writes what it says, compares as defined, and tells of what fails. No time is judged."""

import csv

import pytest
import torch

from scripts import benchmark, fit_prices, ways
from scripts.benchmark_table import Row, Sample, draw, markdown

SETTINGS = benchmark.parse(["resnet18:1", "--repeats", "4"])[1]
SETUP = dict.fromkeys(("machine", "threads", "torch", "dtype", "layout", "environment", "commit"), "some")


def test_a_run_leaves_table_csv_and_picture(tmp_path, capsys):
    what = ["train", "one", "memory"]
    options = ["--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    benchmark.main(["small:1@2", *options, "--what", *what])
    with (tmp_path / "benchmark.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["measured"], line["way"]) for line in lines] == [
        (kind, way) for kind in what for way in ("static", "grouped", "auto")
    ]
    assert [line["batch"] for line in lines] == ["2"] * 3 + ["1"] * 3 + ["2"] * 3
    for line in lines:
        assert not line["error"] and float(line["median"]) > 0 and line["rounds"] == "1"
        static = next(float(x["median"]) for x in lines if x["measured"] == line["measured"] and x["way"] == "static")
        assert float(line["over_static"]) == pytest.approx(float(line["median"]) / static)
        assert line["machine"] and line["threads"] == "1" and line["dtype"] == "float32" and line["commit"]
    text = (tmp_path / "benchmark.md").read_text()
    assert text.count("| small n=1 |") == 3 and lines[0]["machine"] in text.splitlines()[0]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "chosen" in capsys.readouterr().out


def test_excess_is_over_the_static_backbone_and_in_percent_of_the_plain_ways():
    samples = {"static": Sample((1.0, 1.0, 5.0)), "grouped": Sample((5.0,)), "auto": Sample((2.0, 3.0, 1.0))}
    row = Row("resnet18", "4", 16, 224, "train", samples)
    assert (row.over_static("grouped"), row.over_static("auto")) == (5, 2)
    assert (row.excess("grouped"), row.excess("auto")) == (100, 25)
    assert row.cells()[4:] == ["1,000 (1,000–3,000)", "5,000", "5.00x", "2,000 (1,500–2,500)", "2.00x", "25%"]


def test_a_way_that_fails_is_told_and_the_others_are_measured(tmp_path):
    def fail():
        raise RuntimeError("out of memory\nand so on")

    samples = benchmark.by_turns({"static": lambda: None, "grouped": fail, "auto": lambda: None}, SETTINGS)
    assert samples["grouped"] == Sample((), "RuntimeError: out of memory")
    assert len(samples["static"].values) == len(samples["auto"].values) == 4
    row = Row("resnet18", "4", 16, 224, "train", samples)
    assert row.over_static("grouped") is row.excess("auto") is None and row.over_static("auto") is not None
    text = markdown([row], SETUP)
    assert "| failed | – |" in text and "plain (grouped): RuntimeError: out of memory" in text
    draw([row], SETUP, tmp_path / "picture.png")


def test_slow_calls_end_after_a_few_rounds():
    settings = benchmark.parse(["--seconds", "0", "--repeats", "50"])[1]
    assert len(benchmark.by_turns({"static": lambda: None}, settings)["static"].values) == benchmark.FEWEST


def test_cases_carry_their_batch_or_take_the_commands_or_their_own_default():
    cases, settings, _ = benchmark.parse(["resnet50:1/2@3", "resnet50:4", "small:1"])
    assert [(case.n, settings.batch_of(case), settings.size_of(case)) for case in cases] == [
        ("1/2", 3, 224),
        ("4", 8, 224),
        ("1", 64, 32),
    ]
    cases, settings, _ = benchmark.parse(["resnet50:4@3", "small:1", "--batch", "128"])
    assert [settings.batch_of(case) for case in cases] == [3, 128]


@pytest.mark.parametrize("case, named", [("resnet18", "BACKBONE:N"), ("resnet19:1", "resnet18"), ("resnet18:0", "0")])
def test_a_bad_case_fails_at_once_and_is_named(case, named, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse([case])
    error = capsys.readouterr().err
    assert case in error or named in error


def test_the_small_case_ends_at_four_positions():
    case = benchmark.parse_case("small:1")
    model = benchmark.create(case, "static", SETTINGS)
    features = model.forward_features(torch.zeros(1, 3, benchmark.SMALL_SIZE, benchmark.SMALL_SIZE))
    assert features.shape == (1, 512, 2, 2)


def test_prices_are_recovered_from_times_that_follow_them():
    work = [{"apply": a, "entry": e, "fixed": 1.0} for a, e in ((1e6, 2e3), (5e5, 9e4), (3e7, 1e5), (2e5, 5e4))]
    true = {"apply": 0.01, "entry": 2.0, "fixed": 500.0}
    prices, ratios = fit_prices.fit([(w, sum(true[k] * v for k, v in w.items())) for w in work])
    assert prices == pytest.approx(true) and ratios == pytest.approx([1.0] * 4)


def test_what_choosing_costs_is_over_the_best_way_of_each_layer():
    layers = [
        {"grouped": ({"apply": 10.0}, 10.0), "multiply": ({"apply": 10.0}, 5.0)},
        {"grouped": ({"apply": 2.0}, 2.0), "multiply": ({"apply": 2.0}, 4.0)},
        {"grouped": ({"apply": 3.0}, 3.0)},  # to which the other way does not apply
    ]
    prices = {"grouped": {"apply": 1.0}, "multiply": {"apply": 0.5}}  # right of the first layer, wrong of the second
    assert fit_prices.over_best(layers, prices) == pytest.approx(
        {"auto": 1.2, "grouped": 1.5, "multiply": 1.2, "best": 1.0}
    )


def test_hopeless_ways_are_not_timed():
    model = benchmark.create(benchmark.parse_case("small:4"), "4", SETTINGS).eval()
    calls = {call.names[0]: call for call in ways.record(model, torch.zeros(2, 3, 32, 32))}
    assert ways.hopeful(calls["layer1.0.conv1"]) == ["grouped", "multiply"]
    assert ways.hopeful(calls["layer4.0.conv2"]) == ["grouped", "multiply", "inputs"]

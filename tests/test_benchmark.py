"""The benchmark: it runs, writes what it says, compares as defined, and reports what fails. No time is judged."""

import csv
from functools import partial

import pytest
import torch

from scripts.bench import __main__ as benchmark
from scripts.bench import cases, fit_prices, freeze
from scripts.bench.table import Row, choices_of, draw, markdown
from scripts.bench.timing import Sample, in_turns, medians

SETTINGS = benchmark.parse(["resnet18:1", "--repeats", "4"])[1]
SETUP = dict.fromkeys(("machine", "threads", "torch", "dtype", "layout", "environment", "commit"), "some")


def test_a_run_leaves_table_csv_and_picture(tmp_path, capsys):
    what = ["train", "one"]
    options = ["--repeats", "1", "--threads", "1", "--in-process", "--out", str(tmp_path)]
    benchmark.main(["small:1@2", *options, "--what", *what])
    with (tmp_path / "benchmark.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["measured"], line["choice"]) for line in lines] == [
        (kind, choice) for kind in what for choice in ("static", "grouped", "auto")
    ]
    assert [line["batch"] for line in lines] == ["2"] * 3 + ["1"] * 3
    for line in lines:
        assert not line["error"] and float(line["median"]) > 0 and line["rounds"] == "1"
        static = next(
            float(x["median"]) for x in lines if x["measured"] == line["measured"] and x["choice"] == "static"
        )
        assert float(line["over_static"]) == pytest.approx(float(line["median"]) / static)
        assert line["machine"] and line["threads"] == "1" and line["dtype"] == "float32" and line["commit"]
    text = (tmp_path / "benchmark.md").read_text()
    assert text.count("| small n=1 |") == 2 and lines[0]["machine"] in text.splitlines()[0]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "chosen" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(tmp_path):
    options = ["--threads", "1", "--out", str(tmp_path), "--what", "memory", "--choices", "auto"]
    benchmark.main(["small:1@2", *options])
    with (tmp_path / "benchmark.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["choice"], line["error"]) for line in lines] == [("static", ""), ("auto", "")]
    assert all(float(line["median"]) > 0 for line in lines)


def test_a_frozen_model_and_folded_kernels_are_measured_where_they_take_part(tmp_path):
    options = ["--repeats", "1", "--threads", "1", "--out", str(tmp_path), "--in-process", "--what", "train", "one"]
    benchmark.main(["small:1@2", *options, "--choices", "blocks+folded", "frozen"])
    with (tmp_path / "benchmark.csv").open() as file:
        lines = [(line["measured"], line["choice"], line["error"]) for line in csv.DictReader(file)]
    train = [("train", name, "") for name in ("static", "blocks+folded")]
    assert lines == train + [("one", name, "") for name in ("static", "blocks+folded", "frozen")]
    assert "| – | – |" in (tmp_path / "benchmark.md").read_text()


def test_excess_is_over_the_static_backbone_and_in_percent_of_the_plain_choices():
    samples = {"static": Sample((1.0, 1.0, 5.0)), "grouped": Sample((5.0,)), "auto": Sample((2.0, 3.0, 1.0))}
    row = Row("resnet18", "4", 16, 224, "train", samples)
    assert (row.over_static("grouped"), row.over_static("auto")) == (5, 2)
    assert (row.excess("grouped"), row.excess("auto")) == (100, 25)
    assert row.cells(choices_of([row]))[4:] == [
        "1,000 (1,000–3,000)",
        "5,000",
        "5.00x",
        "2,000 (1,500–2,500)",
        "2.00x",
        "25%",
    ]


def test_a_choice_that_fails_is_reported_and_the_others_are_measured(tmp_path):
    def fail():
        raise RuntimeError("out of memory\nand so on")

    samples = in_turns({"static": lambda: None, "grouped": fail, "auto": lambda: None}, rounds=4)
    assert samples["grouped"] == Sample((), "RuntimeError: out of memory")
    assert len(samples["static"].values) == len(samples["auto"].values) == 4
    row = Row("resnet18", "4", 16, 224, "train", samples)
    assert row.over_static("grouped") is row.excess("auto") is None and row.over_static("auto") is not None
    text = markdown([row], SETUP)
    assert "| failed | – |" in text and "plain (grouped): RuntimeError: out of memory" in text
    draw([row], SETUP, tmp_path / "picture.png")


def test_a_case_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    create = cases.create

    def creating(case, n, settings):
        if case.n == "4":
            raise torch.OutOfMemoryError("no memory left")
        return create(case, n, settings)

    monkeypatch.setattr(cases, "create", creating)
    options = ["--in-process", "--repeats", "1", "--what", "one", "--choices", "auto", "--out", str(tmp_path)]
    benchmark.main(["small:4", "small:1", *options])
    with (tmp_path / "benchmark.csv").open() as file:
        lines = [(line["n"], line["error"]) for line in csv.DictReader(file)]
    assert lines == [("4", "OutOfMemoryError: no memory left")] * 2 + [("1", "")] * 2


def test_slow_calls_end_after_a_few_rounds():
    assert len(in_turns({"static": lambda: None}, 50, seconds=0, fewest=3)["static"].values) == 3


def test_calls_take_turns_in_changing_order_after_warming_up():
    for count in (2, 3, 6):
        calls = []
        named = {str(k): partial(calls.append, k) for k in range(count)}
        samples = in_turns(named, rounds=6, before_each=partial(calls.append, "-"))
        assert calls[::2] == ["-"] * 7 * count and [len(sample.values) for sample in samples.values()] == [6] * count
        rounds = [calls[1::2][k : k + count] for k in range(0, 7 * count, count)]
        assert all(sorted(order) == list(range(count)) for order in rounds)
        assert len({order[0] for order in rounds}) == count


def test_a_value_is_the_mean_of_calls_in_a_row_by_the_clock():
    now = []
    samples = in_turns({"a": lambda: now.append(2)}, rounds=3, warm_up=2, times=4, clock=lambda: sum(now))
    assert samples["a"].values == (2.0, 2.0, 2.0) and len(now) == 2 + 3 * 4
    assert medians(samples) == [2.0]


def test_medians_of_what_failed_end_the_program_with_the_error():
    with pytest.raises(SystemExit, match="dynamic: ZeroDivisionError: division by zero"):
        medians(in_turns({"dynamic": lambda: 1 / 0}, rounds=2))


def test_cases_carry_their_batch_or_take_the_commands_or_their_own_default():
    found, settings, _ = benchmark.parse(["resnet50:1/2@3", "resnet50:4", "small:1"])
    assert [(case.n, settings.batch_of(case), settings.size_of(case)) for case in found] == [
        ("1/2", 3, 224),
        ("4", 8, 224),
        ("1", 64, 32),
    ]
    found, settings, _ = benchmark.parse(["resnet50:4@3", "small:1", "--batch", "128"])
    assert [settings.batch_of(case) for case in found] == [3, 128]


@pytest.mark.parametrize(
    "options, named",
    [
        (["--choices", "multiply"], "triton+folded"),
        (["--choices", "triton+wrapped"], "folded"),
        (["--cuda-graph"], "--device cuda"),
        (["--in-process"], "memory"),
        (["--choices", "frozen", "--what", "train"], "do not train"),
    ],
)
def test_options_that_do_not_go_together_fail_at_once(options, named, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(options)
    assert named in capsys.readouterr().err


def test_all_default_cases_are_known():
    known = (*benchmark.CASES, *benchmark.GPU_CASES, *fit_prices.CPU_CASES, *fit_prices.GPU_CASES)
    assert all(cases.parse_case(case).backbone for case in known)


@pytest.mark.parametrize("case, named", [("resnet18", "BACKBONE:N"), ("resnet19:1", "resnet18"), ("resnet18:0", "0")])
def test_a_bad_case_fails_at_once_and_is_named(case, named, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse([case])
    error = capsys.readouterr().err
    assert case in error or named in error


def test_the_small_case_ends_at_four_positions():
    case = cases.parse_case("small:1")
    model = cases.create(case, "static", SETTINGS)
    features = model.forward_features(torch.zeros(1, 3, cases.SMALL_SIZE, cases.SMALL_SIZE))
    assert features.shape == (1, 512, 2, 2)


def test_folded_layers_are_timed_beside_the_layers_as_they_were(monkeypatch, capsys):
    monkeypatch.setattr(freeze, "MOST", 1)
    model = cases.create(cases.parse_case("small:4"), "4", SETTINGS).eval()
    with torch.no_grad():
        freeze.layers_in_turns(model, torch.randn(1, 3, 32, 32), "small", torch.zeros(8))
    lines = capsys.readouterr().out.splitlines()[3:]
    shapes = {line.split()[0] for line in lines}
    assert {"64x64x3x3", "512x512x3x3"} <= shapes and all(float(line.split()[-1]) > 0 for line in lines)

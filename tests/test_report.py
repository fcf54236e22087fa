"""The report: runs joined with published rows, whatever fifty folders hold; its tables, and its page in a browser."""

import csv
import io
import json
import math
import os
import re
from itertools import pairwise

import pytest
import yaml
from helpers.browser import CHROMIUM, PLAYWRIGHT, loaded
from helpers.programs import run
from plotly.offline import get_plotlyjs
from rich.console import Console

from scripts.report import tables
from scripts.report.__main__ import main, write
from scripts.report.page import cost_figure, curves_figure, report_page
from scripts.report.published import CLASSIFICATION, COCO, IMAGENET, TRAINING_IMAGES, published
from scripts.report.rows import sections
from scripts.report.runs import find_runs
from scripts.report.steps import Step, read_steps
from scripts.report.tables import count, latex, markdown, show

PUBLISHED = {row.id: row for row in published()}
SUMMARY = {"name": "x", "backbone": "b", "n": "1", "data": "d", "top1": 50.0, "top5": 60.0, "params": 10, "macs": 20,
           "images_per_second": 4.0, "seed": 0, "epochs": 2, "device": "cpu"}  # fmt: skip
NASTY = '<script>alert(1)</script>|[red]&_%$#{}~^\\"</script>'


def put(folder, *, config=None, metrics=(), **summary):
    """A run's folder, finished if it has a summary."""
    folder.mkdir(parents=True)
    base = {"n": "1", "name": "x", "seed": 0, "data": {"name": "d"}, "backbone": {"label": "b"}}
    base |= {"recipe": {"epochs": 2, "batch_size": 8}, "runtime": {"devices": 2, "nodes": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**base, **(config or {})}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if summary:
        (folder / "summary.json").write_text(json.dumps({**SUMMARY, **summary}))


def line(epoch, top1=50.0, **more):
    return {"epoch": epoch, "step": 10 * (epoch + 1), "top1": top1, "top5": 90.0, "images_per_second": 4.0, **more}


def of_row(folder, row, seed=0, top1=70.0, **more):
    known = PUBLISHED[row]
    summary = {"name": row, "backbone": known.label, "dynamic": known.dynamic, "n": known.n, "data": "imagenet"}
    put(folder, top1=top1, seed=seed, **{**summary, "epochs": known.epochs, **more})


def rows_of(*roots, steps=()):
    runs, remarks = find_runs(roots)
    made, more = sections(runs, steps)
    return made, remarks + more


def find(made, name):
    return [row for section in made for row in section.rows if row.name == name]


def test_seeds_make_a_mean_and_a_spread_beside_what_was_published(tmp_path):
    for seed, top1 in enumerate((72.0, 73.0, 74.0)):
        of_row(tmp_path / str(seed), "resnet18_kw1d4x", seed, top1)
    made, _ = rows_of(tmp_path)
    (row,) = find(made, "resnet18_kw1d4x")
    assert row.score("top1") == (73.0, 1.0) and row.figure("top1") == 72.73 and row.seeds == 3
    assert row.difference("top1") == pytest.approx(0.27) and row.difference("top5") == pytest.approx(60 - 90.83)
    assert "73.00 ± 1.00 | 72.73 | +0.27" in markdown(made)


def test_every_published_row_is_there_and_says_that_it_was_not_run(tmp_path):
    of_row(tmp_path / "a", "resnet50")
    made, _ = rows_of(tmp_path)
    titles = [section.title for section in made]
    assert titles == list(dict.fromkeys(row.table.title for row in published())) and titles[:2] == [IMAGENET, COCO]
    rows = [row for section in made for row in section.rows]
    assert [row.name for row in rows] == [row.name for row in published()]
    assert [len(section.rows) for section in made[:2]] == [22, 8]  # the paper's tables
    uncoded = sum(not row.has_code for row in published())
    assert {row.state for row in rows if row.name != "resnet50"} == {"not run", "published only"}
    text = markdown(made)
    assert "| resnet50_fdconv | - | not run |" in text and "| resnet50_dyconv4x | 4 | not run |" in text
    assert text.count("published only |") == uncoded >= 7
    assert text.count("not run |") == text.count("| not measured |") == len(rows) - 1 - uncoded


def test_a_table_says_where_its_figures_stand_what_is_best_and_what_is_odd(tmp_path):
    of_row(tmp_path / "a", "resnet18_100e_odconv4x", top1=74.5)
    of_row(tmp_path / "b", "resnet18_100e_kw4x", top1=74.0)
    made, _ = rows_of(tmp_path)
    notes = {section.title: tables.notes(section) for section in made}
    assert "Published figures: the KernelWarehouse release (first hand)." in notes["ImageNet"]
    assert any("44.7" in note and "44.8" in note for note in notes["COCO, Mask R-CNN, 12 epochs"])
    assert any("ap50 65.4" in note and "second hand" in note for note in notes["COCO, Mask R-CNN, 12 epochs"])
    assert any("UPerNet" in note for note in notes["COCO, Mask R-CNN, 12 epochs, FDConv in other backbones"])
    hundred = notes["ImageNet, ResNet18, 100 epochs"]
    assert any(note.startswith("Published figures: MCL, Table II") and "second hand" in note for note in hundred)
    assert "Best by budget, measured top-1: resnet18_100e_odconv4x (74.50) at n = 4." in hundred
    (best,) = [note for note in hundred if note.startswith("Best by budget, published")]
    assert "resnet18_100e_kw4x (74.16) at n = 4" in best and "resnet18_100e_dcd (72.33) without n" in best
    assert "resnet18_100e_dcd: 12.53 M parameters here, 14.70 M published (docs/methods.md)." in hundred
    assert not any("cbam" in note and "here" in note for note in hundred)
    (best,) = [note for note in notes["ImageNet, ResNet50, 300 epochs"] if note.startswith("Best")]
    assert "resnet50_kw4x (81.05) at n = 4" in best  # of the paper's table, by the same recipe
    assert any("stride in the first 1x1" in note for note in notes[made[4].title])
    last = notes[made[5].title]
    assert any("mask_rcnn_kw4x_resnet50_1x_coco (42.40) at n = 4" in note for note in last)
    assert "mask_rcnn_fdconv_resnet50_1x_coco: first hand." in last


def test_a_timed_step_tells_what_a_row_would_cost(tmp_path):
    of_row(tmp_path / "a", "resnet50")
    made, _ = rows_of(
        tmp_path, steps=[Step("mobilenetv2_050", "NVIDIA H100", 1000.0, 12.34), Step("resnet18", "cpu, 2 threads", 10)]
    )
    row = find(made, "mobilenetv2_050")[0]
    assert row.hours == pytest.approx(150 * TRAINING_IMAGES[CLASSIFICATION] / 1000 / 3600)
    text = markdown(made)
    assert (
        "~53 GPU" in text
        and text.count("~12.3 GB") == 2  # the row is in two tables
        and "~10,676 CPU" in text
        and "a step timed on NVIDIA H100, cpu, 2 threads" in text
        and "step_time rows=coco" in text
    )


def test_deits_published_gain_stands_beside_the_measured_one(tmp_path):
    assert "published as +4.38 top-1 over deit_tiny; not run" in markdown(rows_of(tmp_path)[0]).replace("\\", "")
    of_row(tmp_path / "a", "deit_tiny", top1=70.0)
    of_row(tmp_path / "b", "deit_tiny_kw4x", top1=75.0)
    assert "published as +4.38 top-1 over deit_tiny; +5.00 measured" in markdown(rows_of(tmp_path)[0])


def test_the_hours_of_a_run_are_those_of_all_its_devices(tmp_path):
    put(tmp_path / "a", metrics=[line(0), line(1)], top1=50.0)
    made, _ = rows_of(tmp_path)
    assert find(made, "x")[0].hours == pytest.approx(20 * 8 / 4.0 / 3600 * 2)


def test_the_hours_of_a_run_that_was_resumed_on_other_devices_are_those_of_each_epoch(tmp_path):
    put(tmp_path / "a", metrics=[{**line(0), "devices": 8}, {**line(1), "devices": 2}], top1=50.0)
    made, _ = rows_of(tmp_path)
    assert find(made, "x")[0].hours == pytest.approx(10 * 8 / 4.0 / 3600 * (8 + 2))


def test_a_run_with_other_settings_than_its_row_is_marked(tmp_path):
    short = {"recipe": {"epochs": 5, "lr": PUBLISHED["resnet18"].settings["recipe.lr"]}}
    put(tmp_path / "a", config=short, **{"name": "resnet18", "backbone": "resnet18", "n": "static", "data": "imagenet"})
    made, _ = rows_of(tmp_path)
    (row,) = find(made, "resnet18")
    assert row.departures == ["recipe.epochs 5 (300)"] and "done\\*" in markdown(made)


def test_an_unfinished_run_shows_its_epochs_and_no_difference(tmp_path):
    config = {"name": "resnet18", "n": "static", "data": {"name": "imagenet"}, "backbone": {"label": "resnet18"}}
    put(tmp_path / "a", config=config, metrics=[line(0, 1.0), line(1, 2.0)])
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "to')  # being written
    made, remarks = rows_of(tmp_path)
    (row,) = find(made, "resnet18")
    assert (row.state, row.epochs, row.score("top1"), row.difference("top1")) == (
        "unfinished",
        (2, 2),
        (2.0, None),
        None,
    )
    assert remarks == [f"{tmp_path}/a: not finished (2 of 2 epochs)"]


def test_an_unfinished_run_tells_what_is_to_go(tmp_path):
    put(tmp_path / "a", config={"recipe": {"epochs": 4, "batch_size": 3600}}, metrics=[line(0)])
    assert "x: about 15 device-hours to go" in markdown(
        rows_of(tmp_path)[0]
    )  # 3 * 10 * 3600 images, 4 a second, 2 devices


def test_finished_and_unfinished_runs_are_not_averaged(tmp_path):
    of_row(tmp_path / "a", "resnet18")
    config = {
        "name": "resnet18",
        "n": "static",
        "seed": 1,
        "data": {"name": "imagenet"},
        "backbone": {"label": "resnet18"},
    }
    put(tmp_path / "b", config=config, metrics=[line(0, 1.0)])
    made, _ = rows_of(tmp_path)
    assert sorted((row.state, row.seeds) for row in find(made, "resnet18")) == [("done", 1), ("unfinished", 1)]


def test_the_average_of_the_weights_is_reported_too(tmp_path):
    for seed in (0, 1):
        of_row(tmp_path / str(seed), "convnext_tiny", seed, 81.0, ema_top1=82.0 + seed)
    assert "convnext_tiny: top-1 of the average of the weights 82.50" in markdown(rows_of(tmp_path)[0])


def test_a_copy_of_a_run_tells_nothing_of_the_spread(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / name, top1=50.0)
    made, remarks = rows_of(tmp_path)
    assert find(made, "x")[0].seeds == 1 and "left out" in remarks[0]


def test_a_detector_stands_beside_its_published_ap(tmp_path):
    folder = tmp_path / "seed0"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    named = {"name": "mask_rcnn_kw1x_resnet50_1x_coco", "backbone": "resnet50", "n": "1", "seed": 0, "epochs": 12}
    (folder / "summary.json").write_text(json.dumps({**named, "box_ap": 42.0, "mask_ap": 38.0, "params": 5}))
    lines = [{"epoch": epoch, "box_ap": 10.0 * (epoch + 1)} for epoch in (0, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made, remarks = rows_of(tmp_path)
    (row,) = find(made, named["name"])
    assert not remarks and row.difference("box_ap") == pytest.approx(0.2) and row.figure("mask_ap") == 38.4
    assert row.runs[0].curve == [(1, 10.0), (2, 20.0)]


BROKEN = {
    "half": '{"name": "x", "top1": 5', "empty": "", "list": "[]", "null": "null", "text": "no JSON",
    "nan": json.dumps({**SUMMARY, "top1": math.nan}), "infinite": json.dumps({**SUMMARY, "top5": math.inf}),
    "words": json.dumps({**SUMMARY, "top1": "fifty"}), "large": json.dumps({**SUMMARY, "top1": 500}),
    "bool": json.dumps({**SUMMARY, "top1": True}), "missing": json.dumps({"name": "x"}), "deep": "[" * 100_000,
    "params": json.dumps({**SUMMARY, "params": "many"}), "seed": json.dumps({**SUMMARY, "seed": [1]}),
}  # fmt: skip


@pytest.fixture
def fifty(tmp_path):
    """Twenty-six good runs, four unfinished ones, and twenty that are broken, each in another manner."""
    for number in range(24):
        row = list(PUBLISHED)[number % 20]
        of_row(tmp_path / f"good{number}", row, number // 20, 70 + number / 10)
    put(tmp_path / "good24", name=NASTY, metrics=[line(0), line(1)])
    put(tmp_path / "good25", name="y", metrics=[])
    for number in range(4):
        put(tmp_path / f"unfinished{number}", metrics=[line(0)] * number, config={"name": f"u{number}"})
    for name, text in BROKEN.items():
        put(tmp_path / f"broken_{name}")
        (tmp_path / f"broken_{name}" / "summary.json").write_text(text)
    for name, content in {"config": b"a: [1, 2", "bytes": bytes(range(256)), "scalar": b"3"}.items():
        put(tmp_path / f"broken_{name}", name="z")
        (tmp_path / f"broken_{name}" / "config.yaml").write_bytes(content)
    put(tmp_path / "broken_metrics", name="z")
    (tmp_path / "broken_metrics" / "metrics.jsonl").write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    put(tmp_path / "broken_odd", name="z", metrics=[{**line(0), "epoch": "first"}])
    (tmp_path / "broken_folder" / "summary.json").mkdir(parents=True)
    return tmp_path


def test_fifty_folders_some_broken_are_all_reported(fifty):
    runs, remarks = find_runs([fifty])
    assert len(list(fifty.iterdir())) == 50
    assert len([run for run in runs if run.finished]) == 26 and len(runs) == 29
    for folder in fifty.iterdir():
        said = [remark for remark in remarks if remark.startswith(f"{folder}: ")]
        kind = {"b": "broken (", "u": "not finished ("}.get(folder.name[0])
        assert len(said) == (kind is not None) and all(kind in remark for remark in said), folder


def test_all_files_hold_the_same_rows_whatever_their_names_are(fifty, tmp_path):
    runs, remarks = find_runs([fifty])
    made, _ = sections(runs)
    names = write(made, runs, remarks, tmp_path / "out")
    assert all((tmp_path / "out" / name).stat().st_size > 0 for name in names)
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open(newline="")))
    assert [row["run"] for row in rows] == [row.name for section in made for row in section.rows]
    (first,) = [row for row in rows if row["run"] == "resnet18" and row["state"] == "done"]
    assert float(first["top1_difference"]) == pytest.approx(float(first["top1"]) - 70.44)
    assert len(list(csv.DictReader((tmp_path / "out" / "runs.csv").open(newline="")))) == len(runs)
    text = markdown(made)
    bodies = [part.splitlines() for part in text.split("## ")[1:]]
    for body in bodies:
        table = [row for row in body if row.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1  # no name makes a column
    for row in (row for row in latex(made).splitlines() if row.endswith("\\\\")):
        assert not re.search(r"(?<!\\)[#%_]", row)
    shown = io.StringIO()
    for section in made:
        show(section, Console(file=shown, width=300))
    assert NASTY in shown.getvalue()


@pytest.mark.parametrize("width", [40, 100, 160])
def test_a_narrow_terminal_keeps_what_is_measured_and_published(width, tmp_path):
    of_row(tmp_path / "a", "resnet18", top1=70.5)
    made, _ = rows_of(tmp_path)
    shown = io.StringIO()
    show(made[0], Console(file=shown, width=width))
    assert max(map(len, shown.getvalue().splitlines()[:20])) <= width
    if width >= 100:
        assert "70.50" in shown.getvalue() and "70.44" in shown.getvalue() and "+0.06" in shown.getvalue()


def test_the_page_holds_all_and_loads_nothing(fifty):
    made, remarks = rows_of(fifty)
    text = report_page(made, remarks)
    assert loaded(text) == [] and "default-src 'none'" in text
    assert NASTY not in text
    assert text.count("<tr class=") == sum(len(section.rows) for section in made)
    assert len(text) - len(get_plotlyjs()) < 400_000


def test_the_page_has_published_figures_hollow_and_measured_ones_filled(tmp_path):
    for seed, top1 in enumerate((72.0, 73.0, 74.0)):
        of_row(
            tmp_path / str(seed),
            "resnet18_kw1d4x",
            seed,
            top1,
            metrics=[line(0, top1 - 5), line(1, top1)],
            params=4031768,
        )
    (tables, *_), _ = rows_of(tmp_path)
    hollow, filled = (trace for trace in cost_figure(tables, {}).data if trace.name.startswith("resnet18"))
    assert hollow.text == ("static", None, "1/4", "1/2", "1", "2", "4") and hollow.marker.symbol.endswith("-open")
    assert hollow.y == (70.44, None, 72.73, 73.33, 74.77, 75.19, 76.05)
    assert hollow.x == (11689512, None, 4031768, 7431044, 11932148, 23242127, 45862085)
    assert (filled.text, filled.y, filled.error_y.array) == (("1/4",), (73.0,), (1.0,)) and filled.x == (4031768,)
    curve, band = curves_figure(tables).data
    assert (curve.x, curve.y, band.y) == ((1, 2), (68.0, 73.0), (69.0, 74.0, 72.0, 67.0))


def test_the_menus_of_a_figure_choose_score_and_cost(tmp_path):
    of_row(tmp_path / "a", "resnet18", top1=70.5, top5=89.0)
    (tables, *_), _ = rows_of(tmp_path)
    figure = cost_figure(tables, {})
    costs, scores = ([button.args for button in menu.buttons] for menu in figure.layout.updatemenus)
    (measured,) = (place for place, trace in enumerate(figure.data) if trace.name == "resnet18")
    assert [change["y"][measured] for change, _ in scores] == [[70.5], [89.0]]
    assert [title["xaxis.title.text"] for _, title in costs][:2] == ["parameters", "multiply-adds per image"]
    assert [change["x"][measured] for change, _ in costs][:2] == [[10], [20]]


def test_a_point_of_a_method_without_budgets_is_called_by_the_method():
    (group,) = (part for part in sections([], [])[0] if part.title == "ImageNet, ResNet18, 100 epochs")
    texts = {trace.name: trace.text for trace in cost_figure(group, {}).data}
    assert texts["resnet18_100e se, published"] == ("se",) and texts["resnet18_100e odconv, published"] == ("4",)


def test_steps_are_read_where_they_are_whole(tmp_path):
    good = {"row": "resnet18", "device": "H100", "images_per_second": 5.0}
    lines = [
        json.dumps(good),
        "{",
        json.dumps({**good, "images_per_second": 0}),
        "[]",
        json.dumps({**good, "images_per_second": 7}),
    ]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines))
    steps, remarks = read_steps(tmp_path / "steps.jsonl")
    assert [step.images_per_second for step in steps] == [7.0]
    assert [int(remark.split("line ")[1].split(":")[0]) for remark in remarks] == [2, 3, 4]


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (7, "7"),
        (286282, "286.3 k"),
        (11689512, "11.69 M"),
        (102015144, "102.0 M"),
        (1814073344, "1.814 G"),
    ],
)
def test_counts_have_four_digits(value, text):
    assert count(value) == text


def test_the_command_ends_with_a_table_and_no_traceback(fifty, tmp_path):
    done = run("scripts.report", fifty, "--out", "out", cwd=tmp_path)
    assert "Traceback" not in done.stderr + done.stdout
    assert "resnet18_kw1d4x" in done.stdout and (tmp_path / "out" / "index.html").exists()


def test_a_report_that_cannot_be_written_ends_in_a_line(fifty, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["report", str(fifty), "--out", str(tmp_path / "file/x")])
    with pytest.raises(SystemExit, match="could not be written"):
        main()


def test_folders_without_a_finished_run_are_said_to_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="No finished run below"):
        main()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="No such folder"):
        main()


@pytest.mark.skipif(
    not (CHROMIUM and PLAYWRIGHT), reason="needs Chromium and playwright, which `make setup` leaves out"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_in_a_browser(scheme, fifty, tmp_path):
    from playwright.sync_api import sync_playwright

    made, remarks = rows_of(fifty)
    (tmp_path / "index.html").write_text(report_page(made, remarks))
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1360, "height": 900})
        wrong, asked = [], []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{tmp_path}/index.html")
        assert page.locator(".point").count() > 30 and page.locator("tbody tr").count() >= 33
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        first = page.locator("tbody tr >> nth=0").inner_text()
        page.click("th >> nth=6")  # the published top-1
        assert page.locator("tbody tr >> nth=0").inner_text() != first
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.set_viewport_size({"width": 400, "height": 800})  # a phone
        page.locator(".main-svg[width='314'] >> nth=0").wait_for(state="attached")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        figure = page.locator(".js-plotly-plot >> nth=0")
        boxes = [box.bounding_box() for box in figure.locator(".updatemenu-header, .xtitle, .legend").all()]
        boxes = sorted((box["y"], box["y"] + box["height"]) for box in boxes)
        assert len(boxes) == 4 and all(end <= start for (_, end), (start, _) in pairwise(boxes)), "they overlap"
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            page.screenshot(path=f"{folder}/report_{scheme}.png", full_page=True)
        browser.close()
    assert wrong == [] and asked == [f"file://{tmp_path}/index.html"]

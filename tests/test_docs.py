"""README.md and docs/: tables are those of their sources, and what the pages name is there and works."""

import importlib.util
import re
import shlex
import shutil
import subprocess

import pytest
from helpers.programs import ROOT

from scripts import docs
from train.config import compose

PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in docs.PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOTS = {path.name for path in ROOT.iterdir()}
MADE_BY_RUNNING = {"report", "runs", ".venv", ".wheels"}  # folders that commands of the pages write
MMDETECTION_ONLY = "custom_imports"  # in the one example that is a configuration of MMDetection


def fences(text, *languages):
    return [body for language, body in FENCE.findall(text) if language in languages]


def inline(text):
    """What stands in backticks, outside of fenced examples."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(text):
    """Command lines of the examples and in backticks, without their comments."""
    lines = [line for body in fences(text, "sh") for line in body.splitlines()]
    lines = [line for line in [*lines, *inline(text)] if re.match(r"([A-Z_]+=\S+ )*(python|pip|make|pytest) ", line)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


EVERY = [words for text in PAGES.values() for words in commands(text)]
MAKE = sorted(
    {word for words in EVERY if words[0] == "make" for word in words[1:] if re.fullmatch("[a-z][a-z0-9_-]*", word)}
)
# The settings of each `python -m train` command.
TRAIN = {
    " ".join(words): [word for word in words[3:] if not word.startswith("-")]
    for words in EVERY
    if words[:3] == ["python", "-m", "train"] and "--help" not in words
}
PLACEHOLDERS = {"ID", "NAME", "..."}  # of a value to choose; PATH and the like can be any text


def first(override):
    """Of a sweep's choices for one key."""
    key, _, value = override.partition("=")
    if value.startswith("glob("):
        pattern = value.removeprefix("glob(").removesuffix(")")
        value = min(path.stem for path in (ROOT / "configs" / key).glob(f"{pattern}.yaml"))
    return f"{key}={value.partition(',')[0]}"


# ---- tables ----


def test_tables_are_up_to_date(capsys):
    assert docs.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_table_is_written_anew_and_nothing_else():
    page = "before\n<!-- begin: coco -->\nold\n<!-- end: coco -->\nafter\n"
    new = docs.filled(page, "here")
    assert new == f"before\n<!-- begin: coco -->\n{docs.coco()}<!-- end: coco -->\nafter\n"
    assert docs.filled(new, "here") == new


def test_an_unknown_table_is_an_error_that_names_page_and_table():
    with pytest.raises(ValueError, match=r"page\.md: no table is called 'colour'"):
        docs.filled("<!-- begin: colour -->\n<!-- end: colour -->\n", "page.md")


def test_every_table_stands_somewhere_and_every_begin_has_its_end():
    text = "".join(PAGES.values())
    begins, ends = (re.findall(rf"<!-- {word}: ([\w-]+) -->", text) for word in ("begin", "end"))
    assert begins == ends and set(begins) == set(docs.TABLES)


# ---- what pages name ----


def test_the_readme_is_short_and_names_every_page():
    assert len(PAGES["README.md"].splitlines()) <= 150
    linked = set(re.findall(r"\]\((docs/[\w.-]+\.md)\)", PAGES["README.md"]))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES)
def test_files_in_backticks_and_diagrams_exist(page):
    diagrams = re.findall(r"(?:kw|train|scripts|configs)/[\w./]*", "".join(fences(PAGES[page], "")))
    for code in [*inline(PAGES[page]), *diagrams]:
        path = re.fullmatch(r"([\w.]+)(/[\w.-]*)+", code)
        if path and path[1] in ROOTS - MADE_BY_RUNNING and "NAME" not in code:
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    for words in commands(PAGES[page]):
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if "NAME" not in word), words


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", MAKE)
def test_make_has_the_target(target, tmp_path):
    command = ["make", "-n", target, f"VENV={tmp_path}", "DATA=PATH"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", TRAIN)
def test_training_commands_compose(command):
    known = [first(word) for word in TRAIN[command] if not word.startswith("hydra")]
    compose([word for word in known if word.partition("=")[2] not in PLACEHOLDERS])


@pytest.mark.parametrize("page", PAGES)
def test_detection_commands_name_configurations_that_exist(page):
    for words in commands(PAGES[page]):
        if words[:3] == ["python", "-m", "detection"]:
            for name in (word.removeprefix("config=") for word in words if word.startswith("config=")):
                assert name == "PATH.py" or (ROOT / f"detection/configs/{name}.py").is_file(), name


@pytest.mark.parametrize("page", [page for page in PAGES if fences(PAGES[page], "python")])
def test_python_examples_run(page, monkeypatch, tmp_path):
    """A page's examples one after the other: later ones use what earlier ones made."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for body in fences(PAGES[page], "python"):
        if MMDETECTION_ONLY not in body:
            exec(compile(body, page, "exec"), names)

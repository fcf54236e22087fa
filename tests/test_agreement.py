"""What the processes of one job share, and what they must find alike."""

import pytest
from helpers.programs import finish, ranks


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of four processes on two nodes prints, and the notes of what they did."""
    folder = tmp_path_factory.mktemp("nodes")
    lines = "".join(finish(each).stdout for each in ranks(4, "helpers.agreeing", folder, cwd=folder)).splitlines()
    assert not any("not expected" in line for line in lines)
    return lines, (folder / "notes").read_text().split("\n")


def all_say(lines, text):
    return [line[0] for line in lines if text in line] == list("0123")


def test_one_process_of_each_node_makes_what_all_of_the_node_get(told):
    lines, notes = told
    assert [line for line in lines if "shared" in line] == [f"{rank}: shared [{rank // 2}]" for rank in range(4)]
    assert sorted(line for line in notes if line.startswith("made")) == ["made 0", "made 2"]


def test_images_are_listed_once_a_node(told):
    """Of two trainers, each of which has two splits."""
    _, notes = told
    assert sorted(line for line in notes if line.startswith("scanned")) == 4 * ["scanned 0"] + 4 * ["scanned 2"]


def test_an_error_of_one_node_is_raised_by_all_and_printed_by_the_first(told):
    assert all_say(told[0], "refused DataError True node 1 has no images")


def test_processes_that_find_other_code_checkpoints_or_data_stop(told):
    lines, _ = told
    assert all_say(lines, "Process 2 has the code b, but process 0 has a. Bring them together.")
    assert all_say(lines, "Process 3 has the checkpoint None, but process 0 has")
    assert all_say(lines, "Process 2 has the data {'training': {'images': 640")

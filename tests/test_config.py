"""The budget n and the settings of a warehouse: what is understood, what is refused, and how the message helps."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from kw import KWConfig
from kw.config import cell_sides, format_budget, parse_budget

QUARTER = Fraction(1, 4)


@pytest.mark.parametrize(
    ("n", "value"),
    [
        ("1/4", QUARTER),
        (" 1/4 ", QUARTER),
        ("2/8", QUARTER),
        ("0.25", QUARTER),
        (0.25, QUARTER),
        (QUARTER, QUARTER),
        (np.float32(0.25), QUARTER),
        (1 / 3, Fraction(1, 3)),
        (0.1, Fraction(1, 10)),
        ("4", 4),
        (4, 4),
        (4.0, 4),
        (Fraction(4), 4),
        (np.int64(4), 4),
        (np.int32(1), 1),
    ],
    ids=repr,
)
def test_budget_is_read_exactly(n, value):
    assert parse_budget(n) == value
    assert isinstance(parse_budget(n), Fraction)
    assert KWConfig(n=n) == KWConfig(n=value)


@pytest.mark.parametrize(
    "n", [0, -1, "-1/4", "1/0", "abc", "", "static", None, math.nan, math.inf, True, [1]], ids=repr
)
def test_what_is_no_budget_is_refused_by_value_with_examples(n):
    with pytest.raises(ValueError) as error:
        parse_budget(n)
    assert f"n={n!r}" in str(error.value)
    assert "1/4" in str(error.value) and "4" in str(error.value)


@pytest.mark.parametrize(
    ("n", "nearest"),
    [("3/2", 2), (3 / 2, 2), (Fraction(5, 4), 1), ("2/3", "1/2"), (0.4, "1/2"), (0.3, "1/3")],
    ids=repr,
)
def test_budget_without_an_anchoring_rule_is_refused_and_a_near_one_named(n, nearest):
    with pytest.raises(ValueError) as error:
        parse_budget(n)
    assert f"n={n!r}" in str(error.value)
    assert str(error.value).endswith(f"n={nearest}.")
    parse_budget(nearest)


@pytest.mark.parametrize(("n", "text"), [("1/4", "1d4x"), (0.5, "1d2x"), (1, "1x"), ("4", "4x")])
def test_budget_is_spelled_as_in_published_rows(n, text):
    assert format_budget(n) == text


@pytest.mark.parametrize("key", ["reduction", "cell_in", "cell_out", "nonlocal_basis"])
@pytest.mark.parametrize("value", [0, -0.5, 2, "abc", math.nan, True, "1/0"], ids=repr)
def test_share_out_of_range_is_refused_by_key_and_value(key, value):
    with pytest.raises(ValueError, match=f"^{key}=") as error:
        KWConfig(**{key: value})
    assert repr(value) in str(error.value)


def test_share_may_be_written_as_a_number_or_as_text():
    config = KWConfig(reduction="1/16", cell_in=0.025, cell_out=1, nonlocal_basis=np.float32(0.5))
    assert (config.reduction, config.cell_in) == (Fraction(1, 16), Fraction(1, 40))
    assert (config.cell_out, config.nonlocal_basis) == (1, Fraction(1, 2))


@pytest.mark.parametrize("norm", ["group", None, "Batch"])
def test_unknown_attention_norm_is_refused_by_key_with_the_known_ones(norm):
    with pytest.raises(ValueError, match=r"attention_norm=.*'batch'.*'layer'"):
        KWConfig(attention_norm=norm)


def test_bad_budget_is_refused_by_the_config():
    with pytest.raises(ValueError, match="n='3/2'"):
        KWConfig(n="3/2")


def test_config_is_frozen_and_compares_by_value():
    config = KWConfig(n="1/4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n = 4
    assert config == KWConfig(n=0.25) and hash(config) == hash(KWConfig(n=0.25))
    assert config != KWConfig(n="1/2")


def test_replace_gives_a_checked_copy():
    config = KWConfig(n=1)
    assert config.replace(reduction="1/32") == KWConfig(n=1, reduction=1 / 32)
    assert config.reduction == Fraction(1, 16)
    with pytest.raises(ValueError, match="reduction=2"):
        config.replace(reduction=2)


def test_replace_names_an_unknown_key_and_the_known_ones():
    with pytest.raises(TypeError, match=r"'reductoin'.*reduction"):
        KWConfig().replace(reductoin=0.5)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_cells_are_whole_from_one_on(n):
    assert cell_sides(Fraction(n)) == (1, 1)


@pytest.mark.parametrize("n", ["1/2", "1/4"])
def test_cells_are_half_by_half_as_published(n):
    assert cell_sides(Fraction(n)) == (Fraction(1, 2), Fraction(1, 2))


@pytest.mark.parametrize("q", range(2, 40))
def test_a_whole_cell_cut_makes_enough_mixtures_and_not_more_than_needed(q):
    cell_in, cell_out = cell_sides(Fraction(1, q))
    pieces = 1 / (cell_in * cell_out)
    assert pieces >= q
    assert pieces < 2 * q or pieces == 4
    assert cell_in / 2 <= cell_out <= cell_in, "sides stay alike"
    assert KWConfig(n=Fraction(1, q)).cell_in == cell_in
    assert KWConfig(n=Fraction(1, q)).cell_out == cell_out


def test_given_sides_are_kept():
    config = KWConfig(n="1/4", cell_in=1, cell_out="1/8")
    assert (config.cell_in, config.cell_out) == (1, Fraction(1, 8))

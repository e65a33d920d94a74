"""The helpers of tests fail where they have to."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from support.errors import assert_complains, assert_says, refused, unsaid, warned

from mistral_ref.errors import CheckpointError, InputError, MistralRefWarning, warn


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        (12, "found 128"),
        (12, "found 312"),
        (12, "found 12.5"),
        (12, "found 0.12"),
        (12, "found -12"),
        ("q", "layers.0.q_rotated"),
        ("layers.1", "layers.10 is missing"),
        ("layers", "layers.0.q"),
        ("(1, 2)", "shape (1, 2, 3)"),
        ("threads", "n_threads is 0"),
        (Path("/m/t"), "/m/t.safetensors: truncated"),
        (Path("/m/t"), "/m/t/params.json: truncated"),
    ],
)
def test_a_part_of_a_fact_is_not_the_fact(fact: object, message: str) -> None:
    assert unsaid(message, fact) == [str(fact)]


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        (12, "found 12."),
        (12, "expected 1-12, as it is"),
        (-1, "found -1;"),
        (0.5, "0.5 GiB"),
        ("q", "layers.0.q: absent"),
        ("layers.0", "layers.0.q"),
        ("'x'", "dtype is 'x'"),
        ("(1, 2)", "shape (1, 2)"),
        (Path("/m/t"), "/m/t: truncated"),
        (Path("t.json"), "/m/t.json: truncated"),
    ],
)
def test_a_fact_is_found_wherever_it_stands(fact: object, message: str) -> None:
    assert_says(message, fact)


def test_no_fact_is_found_in_the_name_of_the_file() -> None:
    file = Path("/m/run-12/t")
    assert unsaid(f"{file}: truncated", 12) == []
    assert unsaid(f"{file}: truncated", 12, file) == ["12"]


def test_a_failure_shows_the_message_and_what_it_lacks() -> None:
    with pytest.raises(AssertionError, match=r"'q is 128; expected 8' does not say \['12'\]"):
        assert_says("q is 128; expected 8", "q", 12, 8)
    with pytest.raises(AssertionError, match="does not say"), refused(InputError, 12):
        raise InputError("q is 128")
    with pytest.raises(AssertionError, match="says all of"), warned("q", 12):
        warn("q is 128")


def test_a_message_without_facts_a_wrong_kind_and_a_second_line_are_failures() -> None:
    with pytest.raises(AssertionError), refused(InputError):
        raise InputError("q is 128")
    with pytest.raises(InputError), refused(CheckpointError, "q"):
        raise InputError("q is 128")
    for text in ("q is\n128", "q is \x1b[2J"):
        with pytest.raises(AssertionError), refused(InputError, "q"):
            raise UnescapedError(text)
        with pytest.raises(AssertionError), warned("q"):
            warnings.warn(text, MistralRefWarning, stacklevel=1)


class UnescapedError(InputError):
    """An error whose message is shown as it is."""

    __str__ = ValueError.__str__


def test_of_several_warnings_one_says_it_all() -> None:
    with warned("q", 8):
        warn("k is 8")
        warn("q is 8")
        warn("q is 9")
    with pytest.raises(AssertionError), warned("q", 9):
        any(map(warn, ("k is 9", "q is 8")))  # both


@pytest.mark.parametrize(
    "stderr", ["", "q is 8\n", "mistral-ref: q is 8", "mistral-ref: q is 8\n\n", "other: q is 8\n", "mistral-ref: k\n"]
)
def test_a_command_complains_in_one_line_of_its_own(stderr: str) -> None:
    assert_complains("mistral-ref: q is 8\n", "q", 8)
    assert_complains("mistral-ref step: q is 8\n", "q", 8)
    with pytest.raises(AssertionError):
        assert_complains(stderr, "q")

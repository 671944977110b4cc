import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.settings import Settings, checked, read_settings, to_toml


class Inner(Settings):
    text: str | None = None
    on: bool | None = None


class Sample(Settings):
    text: str = "a"
    share: float = Field(default=0.5, ge=0, le=1)
    count: int = 3
    on: bool = True
    nothing: str | None = None
    inner: Inner = Inner()
    last: int = 0


# A lone surrogate is no text: pydantic refuses it before it gets here.
TEXT = st.text(st.characters(codec="utf-8"))


@given(
    st.builds(
        Sample,
        text=TEXT,
        share=st.floats(0, 1),
        count=st.integers(-(2**63), 2**63 - 1),
        on=st.booleans(),
        nothing=st.none() | TEXT,
        inner=st.builds(Inner, text=st.none() | TEXT, on=st.none() | st.booleans()),
        last=st.integers(0, 9),
    )
)
def test_settings_come_back_from_their_toml_text(value):
    text = to_toml(value, "two\nlines of heading")
    assert text.startswith("# two\n# lines of heading\n")
    assert checked(Sample, tomllib.loads(text)) == value


@pytest.mark.parametrize(
    ("text", "where", "value"),
    [
        ("unknown = 1", "unknown", "1"),
        ("count = '3'", "count", "'3'"),
        ("count = 3.5", "count", "3.5"),
        ("on = 1", "on", "1"),
        ("share = 1.5", "share", "1.5"),
        ("share = nan", "share", "nan"),
    ],
)
def test_a_fault_is_named_with_file_key_and_value(tmp_path, text, where, value):
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(HostError) as caught:
        read_settings(Sample, file)
    assert caught.value.code is ErrorCode.SETTINGS_INVALID
    assert caught.value.where == f"{file}, key {where}"
    assert caught.value.value == value


def test_options_that_are_no_settings_say_so():
    with pytest.raises(HostError, match=r"PF905.*options, key text"):
        checked(Sample, {"text": "\ud800"})


@pytest.mark.parametrize("data", [b"a = ", b"\xff\xfe", b"x = 1\nx = 2"])
def test_a_file_that_is_not_toml_is_refused(tmp_path, data):
    file = tmp_path / "x.toml"
    file.write_bytes(data)
    with pytest.raises(HostError, match="PF905"):
        read_settings(Sample, file)


def test_a_missing_file_says_that_nothing_was_initialised(tmp_path):
    with pytest.raises(HostError, match=r"PF904.*init"):
        read_settings(Sample, tmp_path / "x.toml")
    with pytest.raises(HostError, match="PF904"):
        read_settings(Sample, Path(tmp_path))


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Sample().count = 4

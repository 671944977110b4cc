import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.ids import run_name, site_name

CHECKS = pytest.mark.parametrize("check", [site_name, run_name])


@CHECKS
@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
def test_names_of_the_form_pass_unchanged(check, text):
    assert check(text) == text


@CHECKS
@given(st.text(max_size=70))
def test_what_passes_is_safe_as_a_file_name_and_a_dns_label(check, text):
    try:
        found = check(text)
    except ValueError:
        return
    assert re.fullmatch(r"[a-z0-9-]{1,63}", found)
    assert not found.startswith("-")
    assert not found.endswith("-")


@CHECKS
@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "a_b", "a.b", "../a", "a/b", "a\n", "ä", "a" * 64, "a b", "٣"])
def test_other_names_are_refused(check, text):
    with pytest.raises(ValueError, match="1 to 63"):
        check(text)

import hashlib
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common import digest

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=20
)


@given(VALUES)
def test_canonical_bytes_are_ascii_json_of_the_same_value(value):
    data = digest.canonical(value)
    assert data.isascii()
    assert json.loads(data) == value


@given(VALUES)
def test_canonical_bytes_are_a_fixed_point(value):
    data = digest.canonical(value)
    assert digest.canonical(json.loads(data)) == data


@given(st.dictionaries(st.text(max_size=6), SCALARS, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(value, random):
    keys = list(value)
    random.shuffle(keys)
    assert digest.of_value({key: value[key] for key in keys}) == digest.of_value(value)


@given(VALUES, VALUES)
def test_values_that_differ_have_digests_that_differ(left, right):
    assert (digest.of_value(left) == digest.of_value(right)) == (json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, b"bytes", {1, 2}, object(), {"a": [math.nan]}, {"a": b""}])
def test_what_json_does_not_have_is_refused(value):
    with pytest.raises(ValueError, match=r"JSON|compliant"):
        digest.canonical(value)


@pytest.mark.parametrize("value", [{1: "a"}, {None: 1}, {True: 1}, {"a": {2.5: 0}}, [({1: 1},)], {"1": 0, 1: 0}])
def test_keys_that_are_not_texts_are_refused_rather_than_turned_into_texts(value):
    with pytest.raises(ValueError, match="not a JSON value"):
        digest.canonical(value)


@given(st.binary(max_size=200), st.integers(1, 50))
def test_a_stream_has_the_digest_of_its_bytes(data, size):
    expected = "sha256:" + hashlib.sha256(data).hexdigest()
    assert digest.of_bytes(data) == digest.of_bytes(memoryview(data)) == expected
    assert digest.of_chunks(data[i : i + size] for i in range(0, len(data), size)) == expected


@given(st.binary())
def test_a_digest_parses_as_itself(data):
    found = digest.of_bytes(data)
    assert digest.parse(found) == found
    assert digest.equal(found, digest.parse(found))
    assert found.removeprefix("sha256:").startswith(digest.short(found))


GOOD = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "text", ["", GOOD[:-1], GOOD + "0", GOOD.upper(), GOOD + "\n", " " + GOOD, "sha512:" + "0" * 64, "0" * 64, GOOD[:-1] + "g"]
)
def test_other_texts_are_no_digest(text):
    with pytest.raises(ValueError, match="not a digest"):
        digest.parse(text)
    assert not digest.equal(GOOD, text)


def test_another_process_gives_the_same_bytes():
    script = "from pathfed_common import digest; print(digest.of_value({'b': [1, 2.5, 'ü'], 'a': None}))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}).stdout
    assert told.strip() == digest.of_value({"a": None, "b": [1, 2.5, "ü"]})

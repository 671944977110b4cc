import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.ids import SiteName
from pathfed_common.protocol import spiffe
from pathfed_common.protocol.spiffe import Identity

NAMES = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


@given(NAMES, NAMES)
def test_an_id_reads_back_as_what_it_was_made_of(consortium, name):
    assert spiffe.parse(spiffe.site_uri(consortium, SiteName(name))) == Identity(consortium, "site", name)
    assert spiffe.parse(spiffe.operator_uri(consortium, name)) == Identity(consortium, "operator", name)


def test_a_site_and_an_operator_of_one_name_have_different_ids():
    assert spiffe.site_uri("lakes", SiteName("north")) == "spiffe://lakes/site/north"
    assert spiffe.operator_uri("lakes", "north") == "spiffe://lakes/operator/north"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://lakes",
        "spiffe://lakes/site/",
        "spiffe://lakes/site/north/",
        "spiffe://lakes/site/north/south",
        "spiffe://lakes/site/../operator/north",
        "spiffe://lakes/site/..",
        "spiffe://lakes/site/north%2f",
        "spiffe://lakes/site/North",
        "spiffe://LAKES/site/north",
        "spiffe://lakes:443/site/north",
        "spiffe://user@lakes/site/north",
        "spiffe://lakes/site/north?x=1",
        "spiffe://lakes/site/north#x",
        "spiffe://lakes/ward/north",
        "spiffe:///site/north",
        "SPIFFE://lakes/site/north",
        "https://lakes/site/north",
        "lakes/site/north",
        " spiffe://lakes/site/north",
        "spiffe://lakes/site/north\n",
        "spiffe://lakes/site/north\x00",
        "spiffe://lakes/site/" + "n" * 64,
    ],
)
def test_every_other_spelling_is_refused(uri):
    with pytest.raises(ValueError, match=r"SPIFFE id|name is 1 to 63"):
        spiffe.parse(uri)


@pytest.mark.parametrize("name", ["", "North", "a/b", "..", "a.b", "-a", "a" * 64])
def test_names_that_do_not_fit_make_no_id(name):
    for make in (lambda: spiffe.site_uri("lakes", SiteName(name)), lambda: spiffe.site_uri(name, SiteName("north"))):
        with pytest.raises(ValueError, match="1 to 63"):
            make()
    with pytest.raises(ValueError, match="1 to 63"):
        spiffe.operator_uri("lakes", name)

import json

import pytest

from pathfed_client.io.stop_switch import Stop, StopSwitch
from pathfed_common.errors import HostError, TransportError


def test_the_switch_is_on_between_throw_and_release_and_keeps_the_first_reason(tmp_path):
    switch = StopSwitch(tmp_path)
    switch.check()
    assert (switch.is_on, switch.stop()) == (False, None)
    switch.throw(at=5.0, reason="water in the server room")
    switch.throw(at=6.0, reason="later")
    assert (switch.is_on, switch.stop()) == (True, Stop(at=5.0, reason="water in the server room"))
    with pytest.raises(TransportError, match="PF440"):
        switch.check()
    switch.release()
    switch.release()
    switch.check()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"at": "x", "reason": 1}', json.dumps({"at": 1}).encode()])
def test_whatever_lies_there_means_stop(tmp_path, content):
    switch = StopSwitch(tmp_path)
    switch.path.write_bytes(content)
    assert (switch.is_on, switch.stop()) == (True, Stop(at=None, reason=""))


def test_a_folder_and_a_dangling_link_mean_stop(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "stopped").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "stopped").symlink_to(tmp_path / "nowhere")
    assert StopSwitch(tmp_path / "folder").is_on
    assert StopSwitch(tmp_path / "link").is_on
    with pytest.raises(HostError, match="PF904"):
        StopSwitch(tmp_path / "folder").release()


def test_what_cannot_be_looked_at_counts_as_stopped(tmp_path):
    (tmp_path / "file").write_text("")
    assert StopSwitch(tmp_path / "file").is_on  # the home is no folder


def test_the_switch_works_on_a_full_disk(small_disk):
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:  # noqa: PT012 - written until it fails
        while True:
            file.write(b"x" * 4096)
    switch = StopSwitch(small_disk)
    switch.throw(at=5.0, reason="why")
    assert switch.is_on


def test_a_home_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(HostError, match="PF904"):
        StopSwitch(tmp_path / "absent").throw(at=1.0, reason="")

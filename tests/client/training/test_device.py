"""Which device a policy names. There is no GPU here: what torch would see is set by hand, and nothing is run on it."""

import pytest
import torch

from pathfed_client.training.device import fits_one, memory_bytes, resolve, resolve_all
from pathfed_common.errors import ErrorCode, HostError

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("there", "device", "count", "found"),
    [
        (0, "auto", 1, ["cpu"]),
        (0, "auto", 2, ["cpu", "cpu"]),
        (0, "cpu", 3, ["cpu", "cpu", "cpu"]),
        (2, "cpu", 1, ["cpu"]),
        (2, "auto", 1, ["cuda:0"]),
        (2, "auto", 2, ["cuda:0", "cuda:1"]),
        (2, "cuda", 1, ["cuda:0"]),
        (2, "cuda:1", 1, ["cuda:1"]),
    ],
)
def test_a_policys_words_name_devices(gpus, there, device, count, found) -> None:
    gpus(there)
    assert [str(one) for one in resolve_all(device, count)] == found
    assert str(resolve(device)) == found[0]


@pytest.mark.parametrize(
    ("there", "device", "count"), [(0, "cuda", 1), (0, "cuda:0", 1), (1, "cuda:1", 1), (1, "cuda", 2), (1, "auto", 2), (2, "cuda:0", 2)]
)
def test_a_gpu_that_is_not_there_has_a_code(gpus, there, device, count) -> None:
    gpus(there)
    with pytest.raises(HostError) as caught:
        resolve_all(device, count)
    assert caught.value.code is ErrorCode.DEVICE_MISSING


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1", "CUDA"])
def test_other_words_are_misuse(device) -> None:
    with pytest.raises(ValueError, match="device must be"):
        resolve(device)
    with pytest.raises(ValueError, match="count"):
        resolve_all("cpu", 0)


def test_a_copy_fits_where_three_of_it_take_half_of_the_memory() -> None:
    assert fits_one(3 * 10**9, [CPU], None)
    assert fits_one(3 * 10**9, [CPU, CPU], memory_bytes(6.0))
    assert not fits_one(3 * 10**9, [CPU, CPU], memory_bytes(5.9))
    assert memory_bytes(None) is None

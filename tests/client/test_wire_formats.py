"""A site's update in int8: rounded after the noise by coins that a crash does not change, of a size that is known beforehand."""

from collections.abc import Callable

import pytest
import torch
from answering_site import bytes_of, file_of, opened

from pathfed_client import app, computing, deciding
from pathfed_client.home import SiteHome
from pathfed_client.io.site_store import SiteStore
from pathfed_client.training.local_round import RoundOutcome, run_round
from pathfed_common import digest
from pathfed_common.model import update_shapes
from pathfed_common.plan import WirePlan
from pathfed_common.wire_format import file_bytes, open_update


class Crash(BaseException):
    """Like a killed process: nothing in between can catch it."""


def test_an_int8_update_is_the_release_rounded_and_survives_a_crash_bit_for_bit(
    world, copy_home: Callable[..., SiteHome], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = world.plan.model_copy(update={"name": "tiny-int8", "wire": WirePlan(dtype="int8")})
    shapes = update_shapes(plan)
    made: list[RoundOutcome] = []

    def watched(**given) -> RoundOutcome:
        made.append(run_round(**given))
        return made[-1]

    def crash(*args, **kwargs) -> None:
        raise Crash

    monkeypatch.setattr(computing, "run_round", watched)
    homes = [copy_home("crashed"), copy_home("undisturbed")]
    for home in homes:
        with opened(home) as site:
            deciding.approve(home, world.sign("int8.dsse", plan), 4, home.root / "other.dsse")
            if home is homes[0]:
                with monkeypatch.context() as patch:
                    patch.setattr(SiteStore, "put_sealed", crash)
                    with pytest.raises(Crash):
                        site.answer(world.offer(plan=plan.digest), world.base_state)
                assert len(made) == 1
    answers = []
    for home in homes:
        with opened(SiteHome(home.root)) as site:
            answers.append(site.answer(world.offer(plan=plan.digest), world.base_state))
            assert site.charges() == 1
            assert len(app.open_ledger(site.home, site.store).verify()) == 1
    after_crash, undisturbed = (bytes_of(answer) for answer in answers)
    assert after_crash == undisturbed
    assert len(undisturbed) == file_bytes(shapes, "int8")
    assert answers[1].statement is not None

    read = open_update(file_of(answers[1]))
    assert read.shapes == shapes
    released = made[-1].update
    error = torch.cat([read.read(name, 0, released[name].numel()) - released[name].flatten() for name in sorted(shapes)]).double()
    assert 0 < float(error.norm()) < read.rounding()
    assert abs(float(error.mean())) < 5 * float(error.std()) / len(error) ** 0.5, "no bias"
    assert digest.of_bytes(undisturbed) == digest.of_bytes(file_of(answers[1]).read_bytes())

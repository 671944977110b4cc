"""What the round loop commits rests on files, and folders, that are on the disk. Kills at any instant are in test_kill."""

from durable import Journal
from tests.server.rounds.consortium import KEYS, NAMES, RUN, Make, make_plan

from pathfed_common.ids import SiteName
from pathfed_common.provenance.documents import SiteCard
from pathfed_server.provenance.recorder import Recorder
from pathfed_server.rounds.loop import run_rounds
from pathfed_server.rounds.state import RunState


def test_what_the_loop_commits_rests_on_what_is_flushed(consortium: Make) -> None:
    made = consortium(make_plan(rounds=2, quorum=2), sites=NAMES[:2])
    cards = {
        name: SiteCard(site=name, evidence_key=KEYS[name].public, flower_key=f"ssh-ed25519 {name}").to_bytes(KEYS[name])
        for name in NAMES[:2]
    }
    recorder = Recorder(made.home / "record", KEYS[SiteName("server")], cards, retain_updates=True)
    facts = [(made.store, name) for name in ("commit_initial", "commit_round", "note_participation")]
    with Journal(made.home).watching(*facts) as journal:
        run_rounds(made.settings(), sites=made.sites, store=made.store, recorder=recorder, clock=made.clock)
    assert made.store.run(RUN).state is RunState.FINISHED
    assert journal.wrong == []
    assert {"commit_initial", "commit_round"} <= set(journal.counted)
    assert journal.renamed >= 10

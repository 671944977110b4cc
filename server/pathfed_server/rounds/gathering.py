"""One attempt at a round, from the choice of participants to the last reply."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from pathfed_common.errors import ErrorCode
from pathfed_common.ids import SiteName
from pathfed_common.model import trained
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance import dsse
from pathfed_server.rounds import uploads
from pathfed_server.rounds.admission import RoundTerms, file_norm
from pathfed_server.rounds.collection import Collection
from pathfed_server.rounds.files import RunFiles
from pathfed_server.rounds.machine import RoundEvent
from pathfed_server.rounds.participants import choose, no_consent
from pathfed_server.rounds.ports import Clock, Offer, RoundStore, SitePort
from pathfed_server.rounds.progress import Stage
from pathfed_server.rounds.settings import RunSettings
from pathfed_server.rounds.state import Checkpoint, Participation, RoundOpening

#: Told of each stage; with a site's outcome where one is decided.
Told = Callable[[Stage, Participation | None], None]


@dataclass
class Gathering:
    """Asks the sites for a round's updates.

    Attributes:
        settings: what the loop is told of its run.
        sites: how sites are reached.
        store: the truth about rounds.
        clock: UTC seconds.
        attempt: the run's attempt.
        last: the checkpoint that the round starts from.
        told: called at each stage.
    """

    settings: RunSettings
    sites: SitePort
    store: RoundStore
    clock: Clock
    attempt: int
    last: Checkpoint
    told: Told

    def __post_init__(self) -> None:
        self._run, self._plan = self.settings.run, self.settings.plan
        self._index = self.last.round_index + 1
        self._files = RunFiles(self.settings.home, self._run)
        self._sent = False

    def run(self) -> tuple[Collection, float]:
        """Everything up to the last reply, and how many seconds that took.

        Raises:
            RoundError: PF511, the run is not this loop's any more, or begins no further round; PF512, the database.
            HostError: the disk is full (PF901) or the home cannot be written (PF904).
        """
        incoming, terms = self._files.prepare(self._index), self._terms()
        uploads.allow(incoming, terms.most_bytes)
        self.store.suspend_sites(self._run, self.attempt, after=self.settings.suspend_after, at=self.clock.now())
        gathered = self._collection(terms)
        asks = len(gathered.choice.participants) >= self._plan.rounds.quorum
        if not asks:
            gathered.abandon(ErrorCode.QUORUM_LOST)
        self.store.open_round(
            RoundOpening(
                run=self._run,
                attempt=self.attempt,
                round_index=self._index,
                base_state=self.last.state,
                participations=gathered.participations,
                offered_at=gathered.offered_at,
                deadline=gathered.deadline,
                asks=asks,
            )
        )
        self.told(Stage.OPENED, None)
        started = time.perf_counter()
        if asks:
            gathered.recall()
            self._exchange(gathered, incoming)
        if len(gathered.admitted) >= self._plan.rounds.quorum:
            self.store.advance_round(self._run, self.attempt, self._index, RoundEvent.ADMIT, at=self.clock.now())
            gathered.take_released()  # what was released between the last look and the round's admission; nothing can be from here on
        self.told(Stage.COLLECTED, None)
        return gathered, time.perf_counter() - started

    def _collection(self, terms: RoundTerms) -> Collection:
        choice = choose(self._plan, self.store.candidates(self._run), run=self._run, round_index=self._index)
        offered_at = self.clock.now()
        return Collection(
            terms=terms,
            choice=choice,
            attempt=self.attempt,
            offered_at=offered_at,
            deadline=offered_at + self._plan.rounds.deadline_s,
            files=self._files,
            store=self.store,
            now=self.clock.now,
            consent=self._withheld,
            told=lambda row: self.told(Stage.DECIDED, row),
        )

    def _exchange(self, gathered: Collection, incoming: Path) -> None:
        def sending(_: SiteName) -> None:
            if not self._sent and not gathered.decided:
                self.store.advance_round(self._run, self.attempt, self._index, RoundEvent.SEND, at=self.clock.now())
            self._sent = True

        offers = [self._offer(gathered, participant.site) for participant in gathered.open]
        if offers and not gathered.has_enough():
            replies = self.sites.exchange(offers, incoming, withheld=self._withheld, sending=sending)
            for reply in replies:
                gathered.take(reply)
                if gathered.has_enough():
                    break
            if isinstance(replies, Generator):
                replies.close()  # a transport looks for the other replies no more
        gathered.close()

    def _withheld(self, site: SiteName) -> str | None:
        """Why nothing may be sent to a site now, or None. The store is asked: a revocation may have come since the round was opened."""
        code = next((no_consent(each) for each in self.store.candidates(self._run) if each.site == site), ErrorCode.SITE_UNKNOWN)
        return None if code is None else code.value

    def _offer(self, gathered: Collection, site: SiteName) -> Offer:
        last = self.last
        offer = RoundOffer(
            run=self._run,
            site=site,
            round_index=self._index,
            plan=gathered.terms.plan_digest,
            base_state=last.state,
            base_state_bytes=last.state_bytes,
            offered_at=gathered.offered_at,
            deadline=gathered.deadline,
        )
        envelope = dsse.seal(offer.to_bytes(), OFFER_TYPE, self.settings.key)
        return Offer(site=site, envelope=envelope, deadline=gathered.deadline)

    def _terms(self) -> RoundTerms:
        plan, last = self._plan, self.last
        is_trained = trained(plan)
        state = self.settings.home / last.state_path
        return RoundTerms(
            run=self._run,
            round_index=self._index,
            plan=plan,
            plan_digest=plan.digest,
            base_state=last.state,
            # Only a difference of states (several steps) is rounded at the size of the state.
            base_norm=file_norm(state, only=is_trained) if plan.rounds.steps > 1 else 0.0,
            shapes={name: shape for name, shape in self.settings.shapes.items() if is_trained(name)},
        )

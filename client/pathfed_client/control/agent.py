"""The agent: a process of `pathfed-site start` that talks to the server for the site, again and again.

One pass: the site reports; the certificate is renewed when two thirds of its life are over; the site's words that have not reached the
server are handed over; where the log has grown, and at every sixth pass, published plans are fetched; and the log is followed
(`log_following`). A server that is away, or refuses, is asked again after a time that grows. Nothing that fails here stops training: what
stops it is the site's own ledger, and that the server offers nothing.

Run as `python -m pathfed_client.control.agent HOME [TUNNEL_PORT]`.
"""

import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from pathfed_client.control import renewal
from pathfed_client.control.certificates import finish
from pathfed_client.control.log_following import LogFollower, OwnNames
from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome, hold
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.server_records import Alarm, ReceivedPlan
from pathfed_client.io.site_records import Event
from pathfed_client.io.site_store import SiteStore
from pathfed_client.transport.channel import Patience
from pathfed_client.transport.control_client import ControlClient, ServerReport
from pathfed_common import __version__, files
from pathfed_common.errors import ErrorCode, HostError, PathfedError, PlanError, ProvenanceError
from pathfed_common.provenance.documents import ServerCard, open_plan
from pathfed_common.provenance.log_checkpoint import log_key, origin_of

#: Seconds between two passes while all is well, and at most while it is not.
EVERY_S = 10.0
LONGEST_S = 60.0
PASSES = "agent_passes"
#: Plans and card are fetched at so many passes' distance though the log has not grown: operators' signatures and addresses are no leaves.
FETCH_EVERY = 6
#: Seconds between two looks for something new to say.
_LOOK_S = 1.0
_log = logging.getLogger(__name__)


class _KeysHeldError(Exception):
    """A command of this site is changing its keys and certificates."""


class Agent:
    """Talks to the server for one site."""

    def __init__(
        self,
        home: SiteHome,
        store: SiteStore,
        outlet: Outlet,
        *,
        tunnel: int | None = None,
        now: Callable[[], float] = time.time,
        patience: Patience | None = None,
    ) -> None:
        """Take the site; `tunnel` is the loopback port of its relay that leads to the control plane.

        Raises:
            TransportError: PF430, the home is not enrolled.
        """
        self._home, self._store, self._outlet, self._tunnel, self._now = home, store, outlet, tunnel, now
        self._patience = patience or Patience()
        self._client: ControlClient | None = None
        self._certificate = b""
        self._log_size: int | None = None
        self._since_fetch = 0
        card = home.server_card
        own = OwnNames(site=home.name, key=home.evidence_key, former=home.former_keys)
        self._follower = LogFollower(store, home.log_head, log_key(origin_of(card.name), card.evidence_key), own)

    def run(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Pass after pass, until ended."""
        failures, passes = 0, 0
        while True:
            failures = 0 if self.pass_once() else failures + 1
            passes += 1
            self._store.set_facts({PASSES: f"{self._now()} {passes}"})
            most = min(LONGEST_S, EVERY_S * 2**failures)
            self._rest(most * (0.75 + 0.25 * random.random()), sleep)  # noqa: S311 - spreads sites, hides nothing

    def _rest(self, seconds: float, sleep: Callable[[float], None]) -> None:
        """Wait, but not longer than until the site has something new to say."""
        said = len(self._store.words())
        while seconds > 0 and len(self._store.words()) == said:
            sleep(min(seconds, _LOOK_S))
            seconds -= _LOOK_S

    def pass_once(self) -> bool:
        """One pass; whether the server was reached and answered. Errors are told, and become facts for `status`.

        After an error the connection is made anew. While a command is at this site's keys, the pass is skipped.
        """
        try:
            self._pass()
        except _KeysHeldError:
            _log.info("a command is at this site's keys: the pass is skipped")
            return False
        except PathfedError as error:
            self.close()
            if error.code.value != self._store.facts().get("agent_code"):
                _log.warning("%s: %s", error.code.value, error.what)
                self._store.add_event(Event(at=self._now(), kind="server", code=error.code, detail=error.what))
            self._store.set_facts({"agent_code": error.code.value})
            if isinstance(error, HostError):
                raise
            if error.code is ErrorCode.LOG_HEAD_LOST:
                self._cry(error.code, "log-head", error.what)
            return False
        self._store.set_facts({"agent_code": "", "agent_at": str(self._now())})
        return True

    def close(self) -> None:
        """Close the connection. Safe to call twice."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _pass(self) -> None:
        if self._home.certificate_file.read_bytes() != self._certificate:  # a command has put another in its place
            self.close()
        client = self._connected()
        report = client.report(software=__version__, state="stopped" if self._home.stop_switch.is_on else "running")
        if report.renew or renewal.due(self._home, self._now()):
            client = self._renewed(client)
        self._hand_over(client)
        self._since_fetch += 1
        if report.log_size != self._log_size or self._since_fetch >= FETCH_EVERY:  # a published plan is a leaf
            self._fetch_card(client)
            self._fetch_plans(client)
            self._log_size, self._since_fetch = report.log_size, 0
        self._follower.follow(client, self._now())
        self._note(report)

    def _connected(self) -> ControlClient:
        if self._client is None:
            with self._keys():
                with suppress(HostError):
                    finish(self._home)
                self._certificate = self._home.certificate_file.read_bytes()
                self._client = ControlClient(
                    self._home.server_card.control_address,
                    ca=self._home.ca_file.read_bytes(),
                    certificate=self._certificate,
                    key=self._home.keys.tls_key(),
                    outlet=self._outlet,
                    tunnel=self._tunnel,
                    patience=self._patience,
                )
        return self._client

    @contextmanager
    def _keys(self) -> Iterator[None]:
        """Be the only process that is at this site's keys.

        Raises:
            _KeysHeldError: a command is.
        """
        with ExitStack() as held:
            try:
                held.enter_context(hold(self._home, "keys"))
            except HostError as error:
                raise _KeysHeldError from error
            yield

    def _renewed(self, client: ControlClient) -> ControlClient:
        with self._keys():
            until = renewal.renew(self._home, client)
        _log.info("the certificate was renewed; it holds until %s", time.strftime("%Y-%m-%d", time.gmtime(until)))
        self._store.add_event(Event(at=self._now(), kind="server", detail="the site's TLS key and certificate were renewed"))
        self.close()
        return self._connected()

    def _hand_over(self, client: ControlClient) -> None:
        """Hand over the site's words in their order; one that is refused waits, and says why."""
        for word in self._store.words(waiting=True):
            try:
                client.decide(word.envelope)
            except PathfedError as error:
                if error.code in (ErrorCode.SERVER_UNREACHABLE, ErrorCode.CERTIFICATE_REFUSED, ErrorCode.IDENTITY_REFUSED):
                    raise
                if error.code is not word.code:
                    _log.warning("%s: the server does not take this site's word on a plan: %s", error.code.value, error.what)
                self._store.word_refused(word, error.code)
            else:
                self._store.word_taken(word, self._now())

    def _fetch_plans(self, client: ControlClient) -> None:
        for signed in client.plans():
            try:
                plan = open_plan(signed, self._home.server_card.evidence_key)
            except PlanError as error:
                self._cry(error.code, "plan", "the server shows a plan that cannot be used, or that it did not sign", signed)
                continue
            if self._store.add_received_plan(ReceivedPlan(plan=plan.digest, signed_plan=signed, at=self._now())):
                _log.info("plan %s was published", plan.name)
                self._store.add_event(Event(at=self._now(), kind="plan", detail=f"plan {plan.name} was published"))

    def _fetch_card(self, client: ControlClient) -> None:
        """Take up the server's present addresses; its key and name never change."""
        sent, present = client.server_card(), self._home.server_card
        try:
            card = ServerCard.from_bytes(sent)
        except ProvenanceError as error:
            self._cry(ErrorCode.ANSWER_UNUSABLE, "card", f"the server's card cannot be used: {error.what}", sent)
            return
        if (card.evidence_key, card.name) != (present.evidence_key, present.name):
            self._cry(ErrorCode.PIN_DIFFERS, "card", "the server shows a card of another key or name", sent)
        elif card != present:
            files.write_atomic(self._home.server_card_file, sent)
            _log.info("the server's addresses have changed; they are used after the next start")

    def _note(self, report: ServerReport) -> None:
        self._store.set_facts(
            {
                "server_now": str(report.now),
                "certificate_until": str(report.certificate_until),
                "log_size": str(report.log_size),
                "suspended": "yes" if report.suspended else "",
                "outcomes": json.dumps([vars(outcome) for outcome in report.outcomes]),
            }
        )

    def _cry(self, code: ErrorCode, subject: str, what: str, evidence: bytes | None = None) -> None:
        if self._store.raise_alarm(Alarm(at=self._now(), code=code, subject=subject, detail=what, evidence=evidence)):
            _log.error("ALARM %s: %s", code.value, what)


def main(root: Path, tunnel: int | None = None) -> None:
    """The agent's process.

    Raises:
        PathfedError: PF430, the home is not enrolled; PF901, PF904, PF906, PF913: files.
    """
    home = SiteHome(root)
    with closing(SiteStore(home.database)) as store, EgressLog(home.egress) as egress:
        # The first pass does not wait for a server that is away: training waits for the first pass.
        first = Agent(home, store, Outlet(egress), tunnel=tunnel, patience=Patience(attempts=2))
        with closing(first):
            first.pass_once()
        store.set_facts({PASSES: f"{time.time()} 0"})
        with closing(Agent(home, store, Outlet(egress), tunnel=tunnel)) as agent:
            agent.run()


if __name__ == "__main__":
    from pathfed_common.console import log_to_stderr

    log_to_stderr()
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)

"""A site's ledger of ten thousand rounds: how long to open it, to recompute its epsilon, and to charge once more.

    .venv/bin/python tests/benchmarks/accounting.py [--quick]

The ledger is real: signed, chained entries in a site database, a sealed statement for each, the head file beside it; 20 plans, each with
its own sigma and rate, taken in turn. Measured in turn in one process, caches emptied where it says cold; `cold_command_s` is a process
of its own from its start to its end, and `cold_command_one_plan_s` one that takes all charges for one plan's,
`cold_show_s` one that shows the last entry's figure (`pathfed-site ledger show`). `recompute_s` is what a
command meets in a process that has seen the ledger before: it reads, checks and composes again after one more step of one plan, so that
no epsilon is found ready-made.

All figures are CPU seconds: all work is one thread's, so on a machine with nothing else to do they are seconds.

The peers get the same events in the same order and know nothing but them (no signature, no file): opacus' RDP and PRV accountants from
scratch, and dp_accounting's PLDAccountant event by event. They run on the first events and are extrapolated linearly in their number,
in favour of the peer: composing gets dearer as the distribution grows.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._harness import Target, arguments, finish, interleaved, machine, tell

from pathfed_client.budget.entry import LEDGER_TYPE, LedgerEntry
from pathfed_client.budget.ledger import Ledger
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.io.ledger_head import HeadFile, site_ledger
from pathfed_client.io.site_records import SealedUpdate
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import run_name, site_name
from pathfed_common.privacy import accounting
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.statement import Figures, Privacy, UpdateStatement
from pathfed_common.units import UtcSeconds

_ENTRIES, _QUICK_ENTRIES, _PLANS, _DELTA = 10_000, 2_000, 20, 1e-6
_POLICY = SitePolicy(max_epsilon=1000.0, delta=_DELTA)
_BEGAN = 1.7e9
_TARGETS = {
    "recompute_s": Target("<=", 2.0),
    "charge_s": Target("<=", 0.5),
    "cold_chain_s": Target("<=", 2.0),
    "cold_show_s": Target("<=", 2.0),
    "epsilon_to_pld_peer": Target("<=", 1.0001),
}


def _event(number: int) -> PrivacyEvent:
    plan = number % _PLANS
    return PrivacyEvent(sampling_rate=0.002 + 0.0005 * plan, noise_multiplier=1.0 + 0.1 * plan, steps=1)


def _entry(number: int, previous: Digest | None) -> LedgerEntry:
    """Its own figures of epsilon are made up, above all that a test could show."""
    plan = number % _PLANS
    return LedgerEntry(
        sequence=number,
        previous=previous,
        release_id=digest.of_value(["release", number]),
        plan=digest.of_value(["plan", plan]),
        run=run_name(f"run-{plan}"),
        round_index=number,
        event=_event(number),
        delta=_DELTA,
        epsilon_total=1000.0,
        plan_delta=_DELTA,
        epsilon_plan=0.0,
        at=UtcSeconds(_BEGAN + number),
    )


def _statement(entry: LedgerEntry, head: Digest, key: SigningKey) -> SealedUpdate:
    some = digest.of_bytes(b"some")
    event = entry.event
    statement = UpdateStatement(
        site=site_name("hospital-north"),
        run=entry.run,
        round_index=entry.round_index,
        plan=entry.plan,
        base_state=some,
        update=some,
        update_bytes=1,
        privacy=Privacy(
            sampling_rate=event.sampling_rate, noise_multiplier=event.noise_multiplier, clip_norm=1.0, steps=event.steps, delta=_DELTA
        ),
        epsilon_plan=0.0,
        epsilon_total=0.0,
        delta_total=_DELTA,
        ledger_head=head,
        code=some,
        figures=Figures(loss_sum=0.0, loss_sum_std=1.0, patients=0.0, patients_std=1.0),
        reply_slot_s=5.0,
        manifest_commitment=some,
        previous=None,
        issued_at=entry.at,
    )
    return SealedUpdate(
        run=entry.run,
        round_index=entry.round_index,
        statement=statement.to_envelope(key),
        update_path="updates/none",
        update=some,
        at=entry.at,
    )


def _build(folder: Path, key: SigningKey, count: int) -> None:
    """A site's database and head file with `count` charges."""
    HeadFile.create(folder)
    previous: Digest | None = None
    with SiteStore(folder / "site.db") as store, store.together():
        for number in range(1, count + 1):
            entry = _entry(number, previous)
            data = dsse.seal(entry.to_payload(), LEDGER_TYPE, key)
            previous = digest.of_bytes(data)
            store.append(number, data)
            store.put_sealed(_statement(entry, previous, key))
    assert previous is not None
    HeadFile(folder).keep(previous, count)


def _forget() -> None:
    """Empty the accountants' caches; their libraries stay imported."""
    for cached in (accounting._pld, accounting._composed, accounting._gaussian, accounting._lower_bound, accounting._rdp):
        cached.cache_clear()
    for cached in (accounting._rdp_of_one_step, accounting._prv):
        cached.cache_clear()


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _charge(ledger: Ledger, number: int) -> LedgerEntry:
    event = _event(number)
    return ledger.charge(
        release_id=digest.of_value(["another release", number]),
        plan=digest.of_value(["plan", number % _PLANS]),
        run=run_name("run-more"),
        round_index=number,
        event=event,
        plan_delta=_DELTA,
        plan_limit=1000.0,
        now=_BEGAN + 20_000 + number,
    )


def _ours(folder: Path, key: SigningKey, warm: Ledger, block: int) -> dict[str, float]:
    found: dict[str, float] = {}
    with SiteStore(folder / "site.db") as store:
        found["cold_chain_s"] = _timed(site_ledger(store, key, _POLICY, folder).entries)
    with SiteStore(folder / "site.db") as store:
        found["cold_every_signature_s"] = _timed(site_ledger(store, key, _POLICY, folder).verify)
    mixed = [entry.event for entry in warm.entries()]
    alike = [_event(0)] * len(mixed)
    for name, events in (("cold_epsilon_one_plan_s", alike), ("cold_epsilon_s", mixed)):
        _forget()
        found[name] = _timed(lambda events=events: composed_epsilon(events, _DELTA))  # type: ignore[misc]
    _charge(warm, 100 * (block + 1))  # fills the caches again
    charges, recomputed = [], []
    for number in range(1, 6):
        charges.append(_timed(lambda number=number: _charge(warm, 100 * (block + 1) + number)))  # type: ignore[misc]
        recomputed.append(_timed(lambda: composed_epsilon([*(entry.event for entry in warm.entries()), _event(block)], _DELTA)))
    found["charge_s"], found["recompute_s"] = statistics.median(charges), statistics.median(recomputed)
    return found


_COMMAND = """
import sys
from pathlib import Path
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.io.ledger_head import site_ledger
from pathfed_client.io.site_store import SiteStore
from pathfed_common.privacy.accounting import composed_epsilon
from pathfed_common.provenance.keys import SigningKey
folder = Path(sys.argv[1])
with SiteStore(folder / "site.db") as store:
    key, policy = SigningKey.from_pem((folder / "key.pem").read_bytes()), SitePolicy(max_epsilon=1000.0, delta=1e-6)
    ledger = site_ledger(store, key, policy, folder)
    entries = ledger.entries()
    events = [entry.event for entry in entries]
    if sys.argv[2] == "show":
        print(ledger.stated(entries))
    else:
        print(composed_epsilon(events[:1] * len(events) if sys.argv[2] == "one plan" else events, policy.delta))
"""


def _cold_command(folder: Path, plans: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", _COMMAND, str(folder), plans], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _opacus(name: str, events: Sequence[PrivacyEvent]) -> float:
    """Epsilon by one of opacus' accountants, fed step by step as its users do."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    accountant = {"rdp": RDPAccountant, "prv": PRVAccountant}[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for event in events:
            accountant.step(noise_multiplier=event.noise_multiplier, sample_rate=event.sampling_rate)
        return float(accountant.get_epsilon(delta=_DELTA))


def _pld_accountant(events: Sequence[PrivacyEvent]) -> float:
    """Epsilon by dp_accounting's accountant, event by event."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        accountant.compose(PoissonSampledDpEvent(event.sampling_rate, GaussianDpEvent(event.noise_multiplier)))
    return float(accountant.get_epsilon(_DELTA))


def _peers(events: Sequence[PrivacyEvent], lengths: dict[str, int]) -> dict[str, float]:
    """Seconds for all events; extrapolated where a peer gets the first ones alone."""
    work: dict[str, Callable[[Sequence[PrivacyEvent]], float]] = {
        "rdp_peer_s": lambda some: _opacus("rdp", some),
        "prv_peer_s": lambda some: _opacus("prv", some),
        "pld_peer_s": _pld_accountant,
    }
    found: dict[str, float] = {}
    for name, length in lengths.items():
        some = events[:length]
        found[name] = _timed(lambda name=name, some=some: work[name](some)) * len(events) / length  # type: ignore[misc]
    return found


def main() -> int:
    """Run it."""
    quick = arguments(__doc__).quick
    count, blocks = (_QUICK_ENTRIES, 1) if quick else (_ENTRIES, 3)
    lengths = {"rdp_peer_s": 200 if quick else 1_000, "prv_peer_s": 20 if quick else 60, "pld_peer_s": 20 if quick else 100}
    begun = machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder, key = Path(scratch), SigningKey.generate()
        (folder / "key.pem").write_bytes(key.to_pem())
        tell(f"building a ledger of {count} entries: {_timed(lambda: _build(folder, key, count)):.1f} s")
        with SiteStore(folder / "site.db") as store:
            warm = site_ledger(store, key, _POLICY, folder)
            events = [entry.event for entry in warm.entries()]
            first = _timed(lambda: _charge(warm, 1))  # imports, and the third accountant
            sides: dict[str, Callable[[int], Sequence[dict[str, float]]]] = {
                "ours": lambda block: [_ours(folder, key, warm, block)],
                "command": lambda _: [
                    {
                        "cold_command_s": _cold_command(folder, "all plans"),
                        "cold_command_one_plan_s": _cold_command(folder, "one plan"),
                        "cold_show_s": _cold_command(folder, "show"),
                    }
                ],
                "peers": lambda _: [_peers(events, lengths)],
            }
            runs = interleaved(sides, blocks, tell)
    figures = _medians([found for side in runs.values() for block in side for found in block])
    figures["first_charge_s"] = round(first, 3)
    part = events[: lengths["pld_peer_s"]]
    figures["epsilon_to_pld_peer"] = round(composed_epsilon(part, _DELTA) / _pld_accountant(part), 9)
    for peer in lengths:
        figures[f"{peer.removesuffix('_s')}_to_recompute"] = round(figures[peer] / figures["recompute_s"], 1)
    facts: dict[str, Any] = {"entries": count, "plans": _PLANS, "extrapolated_from_events": lengths, "machine": begun}
    return finish("accounting", {**figures, **facts}, _TARGETS)


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    names = {name for one in found for name in one}
    return {name: round(statistics.median([one[name] for one in found if name in one]), 4) for name in sorted(names)}


if __name__ == "__main__":
    sys.exit(main())

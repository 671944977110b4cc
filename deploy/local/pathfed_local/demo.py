"""`pathfed demo`: a whole consortium on this machine, from slides to a verified encoder, in a few minutes.

Every step is a command that a hospital or operator would give, carried out by processes of their own (consortium.py). This module only
gives them in order, watches, and shows.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfed_client.cohort.patient_list import read_patient_list
from pathfed_client.home import SiteHome
from pathfed_client.io.scan_workers import usable_cpus
from pathfed_client.showing import glance
from pathfed_common import files, interrupts
from pathfed_common.errors import ErrorCode, RoundError, SiteDataError
from pathfed_common.ids import RunName
from pathfed_common.plan import CohortPlan, Plan, load_plan
from pathfed_common.provenance.documents import ServerCard, SiteCard
from pathfed_common.settings import read_settings, to_toml
from pathfed_local.consortium import Consortium, Hospital, find_hospitals
from pathfed_local.folders import fresh_folder
from pathfed_local.memory import MemoryWatch
from pathfed_local.view import SiteLine, View
from pathfed_server.app import read_plan
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome, ServerSettings
from pathfed_server.rounds.machine import OPEN
from pathfed_server.rounds.state import ParticipationState, RunState

RUN = RunName("demo")
MARK = ".pathfed-demo"
_MAX_EPSILON = 10.0
_POLL_S = 1.0
_DECLARE_TO = 4
#: Agents look for a new checkpoint every ten seconds while all is well.
_COSIGNED_WITHIN_S = 120
_PATIENTS = 40
_SIDE_PX = (768, 1024)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `pathfed demo` was asked for.

    Attributes:
        out: the folder everything goes into; an earlier demo there is replaced.
        slides: folder of hospitals, or None to paint some.
        plan: the plan file.
        rounds: rounds, or None for the plan's.
        sites: hospitals at most.
        keep: leave the consortium running afterwards, until Ctrl-C.
        reply_slots: whether sites reply at time slots.
        patients: in each painted hospital.
        seed: of the painted slides.
    """

    out: Path
    slides: Path | None
    plan: Path
    rounds: int | None
    sites: int
    keep: bool
    reply_slots: bool = True
    patients: int = _PATIENTS
    seed: int = 0


@dataclass
class Demo:
    """One run of the demo. `phases` has each phase's seconds, `patients` what each scan found."""

    options: DemoOptions
    view: View
    phases: dict[str, float] = field(default_factory=dict)
    memory: MemoryWatch = field(default_factory=MemoryWatch)
    patients: dict[str, int] = field(default_factory=dict)
    plan: Plan = field(init=False)

    def run(self) -> None:
        """Do it all; end every process whatever happens.

        Raises:
            PathfedError: what went wrong first.
        """
        out = fresh_folder(self.options.out, MARK, "a demo")
        consortium = Consortium(out, self._hospitals(out))
        try:
            self._timed("set up", self._set_up, consortium)
            plan = self._timed("publish", self._publish, consortium)
            self._timed("start", self._start_sites, consortium)
            self._timed("scan", self._scan, consortium, plan)
            self._timed("approve", self._approve, consortium, plan)
            self._timed("rounds", self._rounds, consortium)
            self._timed("release", self._release, consortium)
            self._timed("report", self._report, consortium)
            if self.options.keep:
                self._keep(consortium)
        finally:
            with self.view.phase("every process is ended"):
                consortium.stop()

    def _timed(self, name: str, step: Any, *arguments: Any) -> Any:
        interrupts.heed()
        began = time.monotonic()
        try:
            return step(*arguments)
        finally:
            self.phases[name] = time.monotonic() - began

    def _hospitals(self, out: Path) -> list[Hospital]:
        if self.options.slides is not None:
            return find_hospitals(self.options.slides, self.options.sites)
        from pathfed_local.generator import generate_hospitals

        began = time.monotonic()
        with self.view.phase(f"painting slides of {self.options.sites} hospitals"):
            generate_hospitals(
                out / "data", hospitals=self.options.sites, patients=self.options.patients, seed=self.options.seed, side_px=_SIDE_PX
            )
        self.phases["paint"] = time.monotonic() - began
        return find_hospitals(out / "data", self.options.sites)

    def _set_up(self, consortium: Consortium) -> None:
        """The server is made and started; every hospital makes its home and keys, and enrols by an invitation."""
        with self.view.phase("the server is up, in processes of its own"):
            consortium.server_command("init", "--consortium", "demo")
            _retain_updates(consortium)
            consortium.start_server()
        with self.view.phase("each hospital makes its keys and enrols by an invitation"):
            consortium.enrol({one.name: _init_options(one, reply_slots=self.options.reply_slots) for one in consortium.hospitals})
        _write_trust(consortium)

    def _publish(self, consortium: Consortium) -> Path:
        """Fit, sign and publish the plan; the signed plan's path."""
        with self.view.phase("the plan is signed and published"):
            file = consortium.out / "plan.toml"
            file.write_text(_plan_text(self.options, consortium.hospitals), encoding="utf-8")
            self.plan = load_plan(file.read_text(encoding="utf-8"), where=file)
            signed = consortium.out / "plan.dsse"
            consortium.server_command("plan", "publish", file, "--out", signed)
        return signed

    def _start_sites(self, consortium: Consortium) -> None:
        with self.view.phase("the sites are up, each in processes of its own"):
            consortium.start_sites()

    def _scan(self, consortium: Consortium, plan: Path) -> None:
        workers = str(max(1, usable_cpus() // len(consortium.hospitals)))  # all hospitals share this machine
        with self.view.phase("scanning slides: tissue, quality, tiles"):
            begun = {
                hospital.name: consortium.begin_site(hospital.name, "scan", plan, "--workers", workers) for hospital in consortium.hospitals
            }
            with self.view.table():
                while any(process.poll() is None for process in begun.values()):
                    interrupts.heed()
                    self.view.update("scan", self._lines(consortium, {}))
                    time.sleep(_POLL_S / 2)
                self.view.update("scan", self._lines(consortium, {}))
            reports = {name: consortium.finish(process) for name, process in begun.items()}
        for name, report in reports.items():
            self.patients[name] = report["patients"]
            refused = ", ".join(f"{code} x{count}" for code, count in report["by_reason"].items())
            self.view.event(
                f"{name}: {report['patients']} patients, {report['tiles']} tiles" + (f"; not used: {refused}" if refused else "")
            )

    def _approve(self, consortium: Consortium, plan: Path) -> None:
        with self.view.phase("each hospital approves the plan by its digest"):
            # A lower bound, rounded down: a real hospital chooses it without looking.
            declared = {name: str(max(1, found // _DECLARE_TO * _DECLARE_TO)) for name, found in self.patients.items()}
            begun = [consortium.begin_site(name, "approve", plan, "--patients-at-least", number) for name, number in declared.items()]
            for process in begun:
                consortium.finish(process)
        with self.view.phase("the sites hand their approvals over"), SqlStore(ServerHome(consortium.server).database_url) as store:
            self._until(consortium, lambda: len(store.approvals(self.plan.digest)) == len(consortium.hospitals))

    def _until(self, consortium: Consortium, come: Callable[[], bool]) -> None:
        """Watch until something has come, or a process ends for good."""
        while not come():
            consortium.watch(self.view.event)
            time.sleep(_POLL_S / 2)

    def _rounds(self, consortium: Consortium) -> None:
        consortium.server_command("run", "start", self.plan.digest, "--name", RUN)
        home = ServerHome(consortium.server)
        with self.view.phase("rounds"), self.view.table(), SqlStore(home.database_url) as store:
            while True:
                consortium.watch(self.view.event)
                self.memory.sample(consortium.pids())
                run = store.run(RUN)
                states = self._site_states(store)
                done = len(store.checkpoints(RUN)) - 1
                self.view.update(f"run {RUN}: {run.state.value}, {max(0, done)} rounds committed", self._lines(consortium, states))
                if run.state not in OPEN:
                    break
                time.sleep(_POLL_S)
        if run.state is not RunState.FINISHED:
            raise RoundError(
                ErrorCode.RUN_FAILED,
                f"the run {run.state.value} with code {run.code}",
                where=home.logs,
                remedy=f"pathfed-server rounds {RUN} --home {consortium.server}",
            )

    def _release(self, consortium: Consortium) -> None:
        release, trust = consortium.out / "release", consortium.out / "trust.json"
        with self.view.phase("the encoder is released, once the sites have co-signed the log"):
            consortium.server_command("release", "create", RUN, "--out", release, "--wait", str(_COSIGNED_WITHIN_S))
        with self.view.phase("the release is verified, and every state computed again from the updates"):
            updates = ServerHome(consortium.server).record(RUN) / "updates"
            consortium.finish(consortium.begin("pathfed", "verify", release, "--trust", trust, "--replay", updates))

    def _site_states(self, store: SqlStore) -> dict[str, tuple[str, int]]:
        """Each site's state in the latest round, and the rounds it was admitted in."""
        rows = [(row, store.participations(RUN, row.round_index)) for row in store.rounds(RUN)]
        states: dict[str, tuple[str, int]] = {}
        for row, participations in rows:
            for one in participations:
                admitted = states.get(one.site, ("", 0))[1] + (one.state is ParticipationState.ADMITTED)
                code = f" {one.code}" if one.code else ""
                states[one.site] = (f"round {row.round_index}: {one.state.value}{code}", admitted)
        return states

    def _lines(self, consortium: Consortium, states: dict[str, tuple[str, int]]) -> list[SiteLine]:
        return [
            _line(SiteHome(consortium.site(hospital.name)), self.plan.cohort, *states.get(hospital.name, ("", 0)))
            for hospital in consortium.hospitals
        ]

    def _report(self, consortium: Consortium) -> None:
        from pathfed_server.reporting import write_report

        record = consortium.out / "record"
        record.symlink_to(Path("server/runs") / RUN / "record")
        with self.view.phase("report"):
            write_report(ServerHome(consortium.server), RUN, consortium.out / "report.html", memory=self.memory.peaks())
        facts = {"phases_s": self.phases, "memory_peak_mb": self.memory.together}
        (consortium.out / "demo.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    def _keep(self, consortium: Consortium) -> None:
        self.view.say("the consortium stays up: Ctrl-C ends it")
        while True:
            consortium.watch(self.view.event)
            time.sleep(_POLL_S)


def _retain_updates(consortium: Consortium) -> None:
    """Let the server keep what the sites send, so that a stranger can compute the aggregation again."""
    path = consortium.server / "server.toml"
    settings = read_settings(ServerSettings, path).model_copy(update={"retain_updates": True})
    files.write_atomic(path, to_toml(settings, "The server of a demo.").encode())


def _init_options(hospital: Hospital, *, reply_slots: bool) -> list[str]:
    slots = "--reply-slots" if reply_slots else "--no-reply-slots"
    paths = ["--slides", str(hospital.slides), "--patients", str(hospital.patients)]
    return [*paths, "--max-epsilon", str(_MAX_EPSILON), "--delta", "1e-5", slots]


def _plan_text(options: DemoOptions, hospitals: Sequence[Hospital]) -> str:
    """The demo's plan, with the rounds asked for, and steps and a quorum that its hospitals can take part in.

    Raises:
        PlanError, HostError: the plan file cannot be used or read.
    """
    raw = read_plan(options.plan).model_dump(mode="json")
    smallest = min(_listed_patients(hospital.patients) for hospital in hospitals)
    raw["privacy"]["expected_patients"] = min(raw["privacy"]["expected_patients"], max(1.0, float(smallest * 2 // 5)))
    raw["rounds"]["quorum"] = min(raw["rounds"]["quorum"], len(hospitals))
    if options.rounds is not None:
        raw["rounds"]["count"] = options.rounds
    lines = [f"# {options.plan.name}, fitted to the hospitals of this demo."]
    lines += [f"{key} = {_toml(value)}" for key, value in raw.items() if not isinstance(value, dict)]
    for section, keys in raw.items():
        if isinstance(keys, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A value inside a table of a plan. JSON's spelling of texts, numbers and truths is TOML's; tables inside come inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return json.dumps(value)


def _listed_patients(patient_list: Path) -> int:
    """Patients of a list; 0 for one that cannot be used: the scan says what is wrong with it."""
    try:
        _, listed = read_patient_list(patient_list.read_bytes(), where=str(patient_list))
    except (OSError, SiteDataError):
        return 0
    return len({row.patient for row in listed.rows})


def _write_trust(consortium: Consortium) -> None:
    """The keys a verifier would have got by another way: read from the cards here."""
    server = ServerCard.from_bytes((consortium.server / "server-card.dsse").read_bytes())
    sites = [SiteCard.from_bytes(SiteHome(consortium.site(hospital.name)).card_file.read_bytes()) for hospital in consortium.hospitals]
    trust = {"server": server.evidence_key.to_text(), "sites": {card.site: card.evidence_key.to_text() for card in sites}}
    (consortium.out / "trust.json").write_text(json.dumps(trust, indent=1), encoding="utf-8")


def _line(home: SiteHome, cohort: CohortPlan, state: str, rounds: int) -> SiteLine:
    seen = glance(home, cohort)
    left = max(0.0, _MAX_EPSILON - seen.epsilon_total)
    slides = f"{seen.slides} ({seen.usable})"
    return SiteLine(
        site=home.name,
        state=state,
        slides=slides,
        patients=seen.patients,
        rounds=rounds,
        epsilon_spent=seen.epsilon_total,
        epsilon_left=left,
    )

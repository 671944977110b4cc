"""The server's only wiring place: what each command does, from the parts.

Heavy libraries (torch, Flower, the accountants) are imported by the function that needs them, so that light commands start at once.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathfed_common import files
from pathfed_common.encoder.spec import preset
from pathfed_common.errors import ErrorCode, HostError, PathfedError, PlanError, ProvenanceError, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan, load_plan, plan_from_bytes
from pathfed_common.provenance import cosigned
from pathfed_common.provenance.documents import PLAN_TYPE, SiteCard, seal_plan
from pathfed_server.db.rows import PlanRow, RunRow
from pathfed_server.db.sql_store import SqlStore, migrate, migrate_existing
from pathfed_server.home import ServerHome, create_home
from pathfed_server.operators import Role, opened_by
from pathfed_server.rounds.state import SiteState
from pathfed_server.words import Word, demand_present_keys, outdated, record_word

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from pathfed_common.encoder.published import Match
    from pathfed_server.encoders import Imported

HOME_VARIABLE = "PATHFED_SERVER_HOME"


def init(
    root: Path,
    *,
    consortium: str,
    host: str,
    listen: str,
    database: str,
    fleet_port: int | None = None,
    control_port: int | None = None,
    enrolment_port: int | None = None,
) -> ServerHome:
    """Make the server's home, and bring its database to this version's schema. See `home.create_home` for the arguments.

    Raises:
        HostError: PF904, something is there already; PF905, a setting is out of bounds.
        RoundError: PF512, PF513: the database cannot be reached or migrated; no home is left then.
    """
    home = create_home(
        root,
        consortium=consortium,
        host=host,
        listen=listen,
        database=database,
        fleet_port=fleet_port,
        control_port=control_port,
        enrolment_port=enrolment_port,
    )
    try:
        migrate(home.database_url)
    except PathfedError:
        shutil.rmtree(home.root)
        raise
    return home


def serve(root: Path, tell: Callable[[str], None]) -> None:
    """`pathfed-server start`: bring the database to this version's schema, then serve; see daemon.serve.

    Raises:
        RoundError: PF512, the database cannot be reached; PF513, it is a newer version's, and nothing was changed, or none of ours.
    """
    from pathfed_server.daemon import serve as run_daemon

    home = ServerHome(root)
    migrate_existing(home.database_url)
    run_daemon(home, tell)


def add_site(root: Path, card_file: Path) -> SiteCard:
    """Enrol a site by its card. The card of an enrolled site whose file is missing is put in its place.

    Raises:
        ProvenanceError: PF602, the card does not verify.
        TransportError: PF402, its Flower node key is not one.
        RoundError: PF502, the name or a key is taken.
    """
    from pathfed_server.transport.node_keys import read_node_key

    data = files.read_given(card_file)
    card = SiteCard.from_bytes(data, where=str(card_file))
    read_node_key(card.flower_key)
    place = ServerHome(root).site_card_file(card.site)
    written = place.with_suffix(".new")
    with opened_by(root, Role.OPERATOR) as (store, by):
        if not place.exists() and any(row.state is SiteState.ENROLLED and row.is_of(card) for row in store.sites()):
            files.write_atomic(place, data)  # an admission was cut short after its commit
            return card
        files.write_atomic(written, data)
        try:
            store.add_site(card.site, evidence_key=card.evidence_key.to_text(), flower_key=card.flower_key, at=time.time(), by=by)
            written.replace(place)
        finally:
            written.unlink(missing_ok=True)
    return card


def add_word(root: Path, file: Path) -> Word:
    """Record a site's word on a plan: an approval, a rejection or a revocation.

    Raises:
        ProvenanceError: PF602, signed with another key.
        RoundError: PF501, no such site; PF516, no such plan; PF519, PF530, PF531, see `words.record_word`.
    """
    envelope = files.read_given(file)
    with opened_by(root, Role.OPERATOR) as (store, by):
        return record_word(store, envelope, by=by, where=str(file))


def read_plan(file: Path) -> Plan:
    """Read and validate a plan.

    Raises:
        PlanError: PF1xx, what is wrong with it.
        HostError: PF904, it cannot be read.
    """
    try:
        return load_plan(files.read_given(file).decode("utf-8"), where=file)
    except UnicodeDecodeError as error:
        raise PlanError(ErrorCode.PLAN_UNREADABLE, f"not UTF-8 text: {error.reason}", where=file) from None


def describe_plan(plan: Plan, patients: int | None) -> dict[str, Any]:
    """A plan in a few figures; with a declared number of patients, also what it costs each of them.

    Raises:
        PlanError: PF105, the plan expects more patients a step than that.
    """
    described: dict[str, Any] = {
        "plan": plan.digest,
        "name": plan.name,
        "encoder": plan.encoder.preset,
        "starts_from": plan.encoder.init_from or "random weights",
        "rounds": plan.rounds.count,
        "private_steps": plan.total_steps,
        "expected_patients": plan.privacy.expected_patients,
        "noise_multiplier": plan.privacy.noise_multiplier,
        "delta": plan.privacy.delta,
        "epsilon_limit": plan.privacy.epsilon_limit,
    }
    if patients is not None:
        from pathfed_common.privacy.accounting import PrivacyEvent, multi_site_epsilon

        rate = plan.sampling_rate(patients)
        event = PrivacyEvent(sampling_rate=rate, noise_multiplier=plan.privacy.noise_multiplier, steps=plan.total_steps)
        described["sampling_rate"] = rate
        for sites in (1, 2, 3):
            described[f"epsilon_at_{sites}_sites"] = multi_site_epsilon(event, sites=sites, delta=plan.privacy.delta)
    return described


def publish_plan(root: Path, file: Path, out: Path) -> Plan:
    """Sign a plan, keep it, and write it for the sites.

    Raises:
        PlanError: PF1xx, what is wrong with it; PF109, the server does not have the checkpoint that it starts from.
    """
    plan = read_plan(file)
    _check_start(root, plan)
    signed = seal_plan(plan, ServerHome(root).evidence_key)
    with opened_by(root, Role.OPERATOR) as (store, by):
        store.add_plan(plan.digest, name=plan.name, canonical=plan.canonical_bytes(), signed=signed, at=time.time(), by=by)
    files.write_atomic(out, signed)
    return plan


def read_signed_plan(file: Path) -> Plan:
    """The plan in a signed plan's file; whose signatures it bears is not looked at.

    Raises:
        PlanError: PF1xx, it holds none; PF106, it is no signed plan.
        HostError: PF904, it cannot be read.
    """
    try:
        found = cosigned.parse(files.read_given(file), where=str(file))
    except ProvenanceError as error:
        raise PlanError(ErrorCode.PLAN_NOT_AUTHENTIC, error.what, where=file) from None
    if found.payload_type != PLAN_TYPE:
        raise PlanError(ErrorCode.PLAN_NOT_AUTHENTIC, "the signed file is no plan", where=file, value=found.payload_type[:100])
    return plan_from_bytes(found.payload, where=str(file))


def collect_signatures(root: Path, file: Path) -> tuple[Plan, int]:
    """Add the signatures in a file to the published plan; the plan, and how many signatures it has now.

    Raises:
        PlanError: PF106, not a signed plan.
        RoundError: PF516, the plan is not published here.
        ProvenanceError: PF602, more signatures than a plan takes.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        plan = read_signed_plan(file)
        merged = cosigned.merge(store.plan(plan.digest).signed, files.read_given(file), where=str(file))
        store.set_plan_signatures(plan.digest, merged, at=time.time(), by=by)
    return plan, len(cosigned.parse(merged).signatures)


def start_run(root: Path, plan: str, name: RunName, sites: Sequence[SiteName]) -> RunRow:
    """Plan a run over the given sites, or over all that approved the plan.

    Raises:
        RoundError: PF516, no plan or several begin so; PF501, no such site; PF503, fewer sites than the quorum; PF532, a site
            that is needed has approved with a key that it has replaced.
        PlanError: PF109, the server does not have the checkpoint that the plan starts from.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        row = _find_plan(store, plan)
        _check_start(root, row.plan())
        old = outdated(store, row.digest)
        out = {*store.words_against(row.digest), *old}
        chosen = list(sites) or [given.site for given in store.approvals(row.digest) if given.site not in out]
        quorum = row.plan().rounds.quorum
        demand_present_keys(old if len(chosen) < quorum else old.intersection(chosen))
        if len(chosen) < quorum:
            raise RoundError(
                ErrorCode.QUORUM_LOST,
                "the run has fewer sites than the plan's quorum",
                value=f"{len(chosen)} of {quorum}",
                remedy="record more approvals (`pathfed-server sites approval`) or name more sites",
            )
        store.create_run(name, plan_digest=row.digest, sites=chosen, at=time.time(), by=by)
        return store.run(name)


def _check_start(root: Path, plan: Plan) -> None:
    if plan.encoder.init_from:
        from pathfed_server.encoders import stored_encoder

        stored_encoder(ServerHome(root), plan)


def import_encoder(
    root: Path, file: Path, *, preset_name: str, tile_px: int | None, prefix: str | None, tell: Callable[["Match"], None]
) -> "Imported":
    """Bring a published encoder into the home, so that plans can start from it.

    Raises:
        HostError: PF905, no such preset, or tiles that its patches do not divide; PF904, the file cannot be read.
        PlanError: PF107, not a safetensors file; PF108, not this encoder.
    """
    from pathfed_server.encoders import import_checkpoint

    try:
        spec = preset(preset_name, img_size=tile_px)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where="--preset and --tile-px") from None
    with opened_by(root, Role.OPERATOR) as (store, by):
        made = import_checkpoint(ServerHome(root), file, spec, prefix=prefix, tell=tell)
        store.audit(actor=by, action="encoder.imported", subject=made.digest, at=time.time(), detail={"preset": preset_name})
    return made


def _find_plan(store: SqlStore, text: str) -> PlanRow:
    wanted = text.removeprefix("sha256:")
    found = [row for row in store.plans() if row.digest.removeprefix("sha256:").startswith(wanted) and wanted]
    if len(found) != 1:
        raise RoundError(
            ErrorCode.PLAN_UNKNOWN,
            f"{len(found)} published plans begin with this digest",
            value=text,
            remedy="see `pathfed-server plan list`",
        )
    return found[0]


def drive_run(name: str, flower_run: int, grid: "Grid") -> None:
    """The ServerApp's main: drive one run over Flower. Runs in the process that Flower's superexec starts."""
    from pathfed_server.driving import drive

    drive(ServerHome(Path(os.environ[HOME_VARIABLE])), RunName(name), flower_run, grid)


def __getattr__(name: str) -> Any:
    """`flower_app`, the ServerApp that the bundle names."""
    if name != "flower_app":
        raise AttributeError(name)
    from pathfed_server.transport.flower_server import make_app

    return make_app(drive_run)

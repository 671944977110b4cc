"""Every error pathfed raises on purpose, with a stable code.

    PathfedError
    ├── PlanError          PF1xx  a plan that cannot be used, or what it starts from
    ├── SiteDataError      PF2xx  slides, patient lists, tiles
    ├── PrivacyError       PF3xx  budget, ledger, cohort size, the private step
    ├── TransportError     PF4xx  certificates, node keys, messages, bundles
    ├── RoundError         PF5xx  sites, runs, rounds, admission, database
    ├── ProvenanceError    PF6xx  statements and the record of a run
    └── HostError          PF9xx  disk, ports, processes, folders, settings

A code never changes its meaning and is never reused. What may leave a site is the code alone: messages can hold paths and values,
so they stay on the machine that made them. `CATALOG` (error_catalog.py) holds what each code means and what to do about it; the pages
under docs/errors are generated from it.
"""

from enum import StrEnum
from typing import ClassVar


class ErrorCode(StrEnum):
    """The stable codes. The hundreds name the family, see the tree above."""

    PLAN_UNREADABLE = "PF101"
    PLAN_UNKNOWN_KEY = "PF102"
    PLAN_WRONG_TYPE = "PF103"
    PLAN_OUT_OF_BOUNDS = "PF104"
    PLAN_IMPOSSIBLE = "PF105"
    PLAN_NOT_AUTHENTIC = "PF106"
    CHECKPOINT_UNREADABLE = "PF107"
    CHECKPOINT_UNFIT = "PF108"
    CHECKPOINT_UNAVAILABLE = "PF109"

    SLIDE_FOLDER_EMPTY = "PF201"
    PATIENT_LIST_UNREADABLE = "PF202"
    SLIDE_LISTED_TWICE = "PF203"
    SLIDE_UNMAPPED = "PF204"
    SLIDE_UNOPENABLE = "PF205"
    SLIDE_UNREADABLE = "PF206"
    SLIDE_MPP_UNUSABLE = "PF207"
    SLIDE_NOT_BRIGHTFIELD = "PF208"
    SLIDE_WITHOUT_TISSUE = "PF209"
    PATIENT_WITHOUT_TILE = "PF210"
    COHORT_EMPTY = "PF211"
    SLIDE_MISSING = "PF212"
    NOT_SCANNED = "PF213"
    SLIDE_OUT_OF_FOCUS = "PF214"
    SLIDE_FILTERED = "PF215"
    SLIDE_FOLDER_UNREACHABLE = "PF216"
    SLIDE_FOLDERS_OVERLAP = "PF217"
    SLIDE_DUPLICATE = "PF218"
    SLIDE_SHARED = "PF219"
    SLIDE_CRASHED = "PF220"
    SLIDE_TIMEOUT = "PF221"

    SLIDE_AMBIGUOUS = "PF230"
    SLIDE_LINES_CONFLICT = "PF231"
    LIST_LINE_UNUSABLE = "PF232"
    SLIDE_OUTSIDE_RULES = "PF233"
    SLIDE_WITHDRAWN = "PF234"
    WITHDRAWAL_UNKNOWN = "PF235"

    BUDGET_SPENT = "PF301"
    PLAN_LIMIT_REACHED = "PF302"
    COHORT_TOO_SMALL = "PF303"
    LEDGER_DAMAGED = "PF304"
    ACCOUNTANTS_DISAGREE = "PF305"
    BASE_STATE_UNTRAINABLE = "PF306"
    POLICY_FORBIDS = "PF307"
    CLOCK_SET_BACK = "PF308"
    LEDGER_BEHIND = "PF309"
    LEDGER_UNWITNESSED = "PF310"
    TARGET_OUT_OF_REACH = "PF311"
    ENGINE_UNFIT = "PF312"

    CERTIFICATE_REFUSED = "PF401"
    NODE_KEY_UNKNOWN = "PF402"
    SERVER_UNREACHABLE = "PF403"
    BUNDLE_REFUSED = "PF404"
    MESSAGE_MALFORMED = "PF405"
    OFFER_NOT_AUTHENTIC = "PF406"
    PLAN_NOT_APPROVED = "PF407"
    BASE_STATE_MISMATCH = "PF408"
    ROUND_OUT_OF_ORDER = "PF409"
    SITE_INTERNAL = "PF410"
    INVITATION_UNREADABLE = "PF411"
    INVITATION_REFUSED = "PF412"
    ENROLMENT_UNFIT = "PF413"
    CERTIFICATE_REQUEST = "PF414"
    IDENTITY_REFUSED = "PF415"
    REQUEST_REFUSED = "PF416"
    RATE_LIMITED = "PF417"
    ROTATION_REFUSED = "PF418"
    CONTROL_INTERNAL = "PF419"
    AUTHORITY_STATE = "PF420"
    FINGERPRINT_DIFFERS = "PF421"
    RELAY_STRANGER = "PF450"
    PROXY_REFUSED = "PF451"
    FILE_NOT_OFFERED = "PF460"
    UPDATE_UNWANTED = "PF461"
    UPDATE_TOO_LARGE = "PF462"
    SHARD_DAMAGED = "PF463"
    UPDATE_ABSENT = "PF464"
    TRANSFER_UNFINISHED = "PF465"
    UPLOAD_MOVED = "PF466"

    NOT_ENROLLED = "PF430"
    PIN_DIFFERS = "PF431"
    ENROLMENT_REFUSED = "PF432"
    ANSWER_UNUSABLE = "PF433"
    LOG_FORKED = "PF434"
    LOG_LEAF_MISSING = "PF435"
    LOG_HEAD_LOST = "PF436"
    LOG_UNREADABLE = "PF437"
    LOG_FOREIGN_LEAF = "PF438"
    ROTATION_WAITS = "PF439"
    SITE_STOPPED = "PF440"
    OUTSIDE_HOURS = "PF441"
    SECOND_PERSON_MISSING = "PF442"
    APPROVER_UNKNOWN = "PF443"
    PLAN_NOT_HERE = "PF444"
    PLAN_DECIDED = "PF445"
    CODE_CHANGED = "PF446"
    FOREIGN_CODE = "PF447"

    SITE_UNKNOWN = "PF501"
    SITE_EXISTS = "PF502"
    QUORUM_LOST = "PF503"
    UPDATE_SIGNATURE = "PF504"
    UPDATE_DIGEST = "PF505"
    UPDATE_SHAPE = "PF506"
    UPDATE_NOT_FINITE = "PF507"
    UPDATE_NORM = "PF508"
    UPDATE_STALE = "PF509"
    RUN_UNKNOWN = "PF510"
    RUN_STATE = "PF511"
    DATABASE_UNAVAILABLE = "PF512"
    DATABASE_SCHEMA = "PF513"
    RUN_FAILED = "PF514"
    SITE_SILENT = "PF515"
    PLAN_UNKNOWN = "PF516"
    UPDATE_PRIVACY = "PF517"
    SITE_REVOKED = "PF518"
    APPROVAL_DIFFERS = "PF519"
    RUN_EXISTS = "PF520"
    ENROLMENT_UNKNOWN = "PF521"
    OPERATOR_UNKNOWN = "PF522"
    OPERATOR_FORBIDDEN = "PF523"
    OPERATOR_EXISTS = "PF524"

    APPROVAL_REVOKED = "PF530"
    WORD_OUT_OF_ORDER = "PF531"
    APPROVAL_OUTDATED = "PF532"
    NOTICE_REFUSED = "PF580"
    NOTICE_TIMEOUT = "PF581"
    NOTICE_TLS = "PF582"
    NOTICE_UNREACHABLE = "PF583"
    RECEIVER_UNKNOWN = "PF584"
    NOTICE_GIVEN_UP = "PF585"

    UPDATE_QUANTISED = "PF550"
    ROUND_STATE = "PF560"
    UPDATE_LATE = "PF561"
    SITE_NOT_ASKED = "PF562"
    UPDATE_NOT_NEEDED = "PF563"
    SITE_LEFT_RUN = "PF564"
    SITE_SUSPENDED = "PF565"
    RELEASE_REFUSED = "PF566"
    QUARANTINE_UNKNOWN = "PF567"

    RECORD_CHANGED = "PF601"
    RECORD_SIGNATURE = "PF602"
    STATEMENT_CHAIN = "PF603"
    IDENTITY_UNPROVEN = "PF604"
    RECORD_INCOMPLETE = "PF605"
    RUN_UNFINISHED = "PF613"
    QUORUM_MISSING = "PF614"
    BUNDLE_UNREADABLE = "PF615"
    BUNDLE_FILES = "PF616"
    MODEL_SIGNATURE = "PF617"
    MODEL_CARD = "PF618"
    LOG_DISAGREES = "PF619"
    EPSILON_EXCEEDED = "PF620"
    REPLAY_DIFFERS = "PF621"
    UPDATE_MISSING = "PF622"
    AGGREGATION_UNPROVEN = "PF623"
    EVALUATION_UNREADABLE = "PF624"
    LOG_MISMATCH = "PF606"
    LOG_DAMAGED = "PF607"
    LOG_BEHIND = "PF608"
    CHECKPOINT_UNSIGNED = "PF609"
    LEAF_UNKNOWN = "PF610"
    COSIGNATURE_REFUSED = "PF611"
    LINEAGE_UNKNOWN = "PF612"
    FIRST_STATE = "PF630"

    DISK_FULL = "PF901"
    PORT_IN_USE = "PF902"
    PROCESS_ENDED = "PF903"
    HOME_UNUSABLE = "PF904"
    SETTINGS_INVALID = "PF905"
    KEY_FILE = "PF906"
    TOOL_MISSING = "PF907"
    SCHEDULER_LOST = "PF908"
    SITE_UNFIT = "PF909"
    DEVICE_MISSING = "PF910"
    RANK_ENDED = "PF911"
    MEMORY_TOO_SMALL = "PF912"
    EGRESS_RECORD_DAMAGED = "PF913"
    EGRESS_RECORD_BEHIND = "PF914"
    ENROLMENT_ELSEWHERE = "PF915"
    SIMULATION_ENGINE = "PF935"


class PathfedError(Exception):
    """An error with a stable code, what is wrong, where, which value, and what to do.

    Attributes:
        code: the stable code; the only part that may leave a site.
        what: one sentence, what is wrong.
        where: the file, key, slide or process concerned, or None.
        value: the offending value as text, or None.
        remedy: what the reader can do now, or None to fall back on the catalogue's advice.
    """

    family: ClassVar[str] = "PF"
    exit_status: ClassVar[int] = 1

    def __init__(self, code: ErrorCode, what: str, *, where: object = None, value: object = None, remedy: str | None = None) -> None:
        if not code.value.startswith(self.family):
            raise ValueError(f"{type(self).__name__} takes codes {self.family}xx, got {code.value}")
        self.code = code
        self.what = what
        self.where = None if where is None else str(where)
        self.value = None if value is None else str(value)
        self.remedy = remedy
        super().__init__(self.render())

    def render(self) -> str:
        """One line: code, what, where, value, remedy."""
        parts = [f"{self.code.value}: {self.what}"]
        if self.where is not None:
            parts.append(f"where: {self.where}")
        if self.value is not None:
            parts.append(f"value: {self.value}")
        if self.remedy is not None:
            parts.append(f"do: {self.remedy}")
        return " | ".join(parts)

    def to_dict(self) -> dict[str, str | None]:
        """The error as `--json` prints it. For the machine it happened on only."""
        return {"code": self.code.value, "what": self.what, "where": self.where, "value": self.value, "remedy": self.remedy}


class PlanError(PathfedError):
    """A plan that cannot be read, validated or trusted, or a checkpoint for one to start from."""

    family = "PF1"
    exit_status = 11


class SiteDataError(PathfedError):
    """Slides, patient lists or tiles that cannot be used."""

    family = "PF2"
    exit_status = 12


class PrivacyError(PathfedError):
    """A budget, ledger or private step that must not go on."""

    family = "PF3"
    exit_status = 13


class TransportError(PathfedError):
    """A peer, certificate, message or bundle that is not to be trusted or not to be reached."""

    family = "PF4"
    exit_status = 14


class RoundError(PathfedError):
    """A site, run, round, update or database that cannot go on."""

    family = "PF5"
    exit_status = 15


class ProvenanceError(PathfedError):
    """A statement or record that does not verify."""

    family = "PF6"
    exit_status = 16


class HostError(PathfedError):
    """A disk, port, process, folder or settings file of this machine."""

    family = "PF9"
    exit_status = 19


def error_from_dict(raw: dict[str, str | None]) -> PathfedError:
    """The error that another process of pathfed printed with `--json`.

    Raises:
        ValueError: not such a value.
    """
    try:
        code = ErrorCode(raw["code"] or "")
        family = next(kind for kind in PathfedError.__subclasses__() if code.value.startswith(kind.family))
        return family(code, raw["what"] or "", where=raw["where"], value=raw["value"], remedy=raw["remedy"])
    except (KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"not a pathfed error: {error}") from None

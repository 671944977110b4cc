"""The agent as a child of `pathfed-site start`, and its alarms told there."""

from collections.abc import Callable

from pathfed_client.control.agent import PASSES
from pathfed_client.home import SiteHome
from pathfed_client.io.server_records import Alarm
from pathfed_client.io.site_store import SiteStore
from pathfed_common.code_digest import module_command
from pathfed_common.processes import ProcessSpec, Supervisor

_RESTARTS = 1000
_LOOK_EVERY = 8  # ticks of the owner's loop


def start_agent(home: SiteHome, store: SiteStore, supervisor: Supervisor, tunnel: int) -> None:
    """Start the agent and wait for its first pass, so that what the log knows is known before anything is trained.

    Args:
        home: the site.
        store: its database.
        supervisor: owns the process.
        tunnel: loopback port of the relay that leads to the control plane.

    Raises:
        HostError: PF903, it ended or did not come to its first pass.
    """
    before = store.facts().get(PASSES)
    supervisor.start(
        ProcessSpec(
            name="agent",
            argv=[*module_command("pathfed_client.control.agent"), str(home.root), str(tunnel)],
            log=home.logs / "agent.log",
            ready=lambda: store.facts().get(PASSES) != before,
            ready_within_s=120.0,
            restarts=_RESTARTS,
            restart_delay_s=5.0,
        )
    )


class AlarmTeller:
    """Tells each alarm that stands, once in the life of the command."""

    def __init__(self, store: SiteStore, tell: Callable[[str], None]) -> None:
        """Tell alarms of this database."""
        self._store, self._tell = store, tell
        self._told: set[tuple[str, str, float]] = set()
        self._ticks = 0

    def look(self) -> None:
        """Called again and again; looks now and then."""
        self._ticks += 1
        if self._ticks % _LOOK_EVERY == 1:
            for alarm in self._store.alarms():
                self._tell_once(alarm)

    def _tell_once(self, alarm: Alarm) -> None:
        name = (alarm.code.value, alarm.subject, alarm.at)
        if name not in self._told:
            self._told.add(name)
            self._tell(f"ALARM {alarm.code.value} {alarm.detail}; see `pathfed-site status` and docs/errors/{alarm.code.value}.md")

"""`pathfed-server` on who takes part: invitations, sites, operators, the certificate authority, the audit trail."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pathfed_common.console import Json, show
from pathfed_server.cli_options import HOME, Home, site_name
from pathfed_server.operators import Role

sites_app = typer.Typer(no_args_is_help=True, help="Admit sites, take them out, and record their approvals.")
operators_app = typer.Typer(no_args_is_help=True, help="Say who may run this server, by name.")
ca_app = typer.Typer(no_args_is_help=True, help="Look after the certificate authority.")

_Site = Annotated[str, typer.Argument(help="The site's name.")]


def invite(
    site: Annotated[str, typer.Argument(help="The site's name: lower-case letters, digits, inner hyphens.")],
    hours: Annotated[int, typer.Option(min=1, max=24 * 30, help="Hours until the invitation ends.")] = 72,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Print an invitation for one hospital: it works once, for this name alone. Hand it over like a password."""
    from pathfed_server import members

    made = members.invite(home, site_name(site), hours=hours)
    show(
        {"site": made.site, "expires_at": made.expires_at, "invitation": made.text},
        as_json=as_json,
        title="Invited. The text below is a secret until the hospital has used it; it is stored nowhere.",
    )


@sites_app.command("add")
def sites_add(
    card: Annotated[Path, typer.Argument(help="The site card the hospital handed over.")], home: Home = HOME, as_json: Json = False
) -> None:
    """Enrol a site by its card alone. It gets no certificate, so it cannot use the control service: prefer `invite`."""
    from pathfed_server import app as server

    site = server.add_site(home, card)
    show(
        {"site": site.site, "evidence_key": site.evidence_key.to_text()},
        as_json=as_json,
        title="Enrolled. Compare the key with the hospital's by telephone.",
    )


@sites_app.command("pending")
def sites_pending(home: Home = HOME, as_json: Json = False) -> None:
    """List the requests to be enrolled, each with the fingerprint that the hospital reads out."""
    from pathfed_server import members

    rows = [
        {"site": row.site, "fingerprint": fingerprint, "asked_at": row.asked_at, "software": row.software}
        for row, fingerprint in members.pending(home)
    ]
    show(rows, as_json=as_json, title="waiting")


@sites_app.command("admit")
def sites_admit(
    site: _Site,
    fingerprint: Annotated[str, typer.Argument(help="What the hospital read out to you; not what `sites pending` shows.")],
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Admit a site whose request has the fingerprint that the hospital told you."""
    from pathfed_server import members

    issued = members.admit(home, site_name(site), fingerprint)
    show(
        {"site": issued.site, "certificate": issued.serial, "certificate_until_at": issued.expires_at},
        as_json=as_json,
        title="Admitted. The site finds out by itself.",
    )


@sites_app.command("refuse")
def sites_refuse(site: _Site, home: Home = HOME, as_json: Json = False) -> None:
    """Refuse a site's request. Its invitation is used up."""
    from pathfed_server import members

    members.refuse(home, site_name(site))
    show({"site": site, "state": "refused"}, as_json=as_json)


@sites_app.command("approval")
def sites_approval(
    file: Annotated[Path, typer.Argument(help="The signed word the hospital handed over.")], home: Home = HOME, as_json: Json = False
) -> None:
    """Record a site's signed word on a plan: its approval, rejection or revocation."""
    from pathfed_common.provenance.documents import Decision
    from pathfed_server import app as server

    given = server.add_word(home, file)
    said = {"word": given.kind, "reason": given.reason} if isinstance(given, Decision) else {"declared_patients": given.declared_patients}
    show({"site": given.site, "plan": given.plan, **said}, as_json=as_json, title="Recorded.")


@sites_app.command("revoke")
def sites_revoke(site: _Site, home: Home = HOME, as_json: Json = False) -> None:
    """Take a site out for good: no further offer, its node is removed, and its certificate ends within seconds."""
    from pathfed_server import lineage, members
    from pathfed_server.home import ServerHome

    members.revoke(home, site_name(site))
    (left,) = (row for row in lineage.overview(ServerHome(home)) if row["site"] == site)
    title = f"Revoked: no further round asks it. What stays of it, `pathfed-server lineage {site}` says."
    show({name: left[name] for name in ("site", "state", "runs", "states", "releases")}, as_json=as_json, title=title)


@sites_app.command("reinstate")
def sites_reinstate(site: _Site, home: Home = HOME, as_json: Json = False) -> None:
    """Ask a suspended site again, from the next round on. Its refusals until now count no more."""
    from pathfed_server import orders

    orders.reinstate_site(home, site_name(site))
    show({"site": site, "suspended": False}, as_json=as_json)


@sites_app.command("list")
def sites_list(home: Home = HOME, as_json: Json = False) -> None:
    """List the sites: where each stands, when it was last heard of, its software, its rounds, and its last refusal."""
    from pathfed_server import members

    rows = members.site_rows(home)
    show(rows if as_json else [_site_line(row) for row in rows], as_json=as_json, title="sites")


def _site_line(row: dict[str, Any]) -> dict[str, object]:
    """What fits a line; the keys and the rest are in the JSON."""
    refused, reports = row["last_refusal"], row["reports"]
    return {
        "site": row["site"],
        "state": row["state"] + (f", {reports}" if reports and row["state"] == "enrolled" else ""),
        "last_seen_at": row["last_seen_at"],
        "software": row["software"],
        "rounds": row["rounds"],
        "last refusal": f"{refused['code']} in {refused['run']} round {refused['round']}" if refused else None,
    }


@operators_app.command("key")
def operators_key(out: Annotated[Path, typer.Argument(help="The file to write; readable by you alone.")], as_json: Json = False) -> None:
    """Make your key, on your own machine. Send an admin the public half, which is printed; the file goes nowhere."""
    from pathfed_server import operators

    public = operators.make_key(out)
    show(
        {"key_file": str(out), "public_key": public.to_text()},
        as_json=as_json,
        title=f"Your key is made. Let {operators.OPERATOR_VARIABLE} name the file when you run commands.",
    )


@operators_app.command("add")
def operators_add(
    name: Annotated[str, typer.Argument(help="The person's name: lower-case letters, digits, inner hyphens.")],
    key: Annotated[str, typer.Argument(help="The person's public key, as `operators key` printed it.")],
    role: Annotated[Role, typer.Option(help="What the person may do. The first one is an admin.")] = Role.OPERATOR,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Add a person. From the first one on, every command wants to know who runs it."""
    from pathfed_server import operators

    operators.add_operator(home, name, role=role, key=key)
    show({"operator": name, "role": role.value}, as_json=as_json)


@operators_app.command("remove")
def operators_remove(name: Annotated[str, typer.Argument(help="The person's name.")], home: Home = HOME, as_json: Json = False) -> None:
    """Remove a person. The name and the key are never used again."""
    from pathfed_server import operators

    operators.remove_operator(home, name)
    show({"operator": name, "state": "removed"}, as_json=as_json)


@operators_app.command("list")
def operators_list(home: Home = HOME, as_json: Json = False) -> None:
    """List the people, removed ones too."""
    from pathfed_server import operators

    rows = [
        {"operator": row.name, "role": row.role, "key": row.key, "added_at": row.added_at, "removed_at": row.removed_at}
        for row in operators.list_operators(home)
    ]
    show(rows, as_json=as_json, title="operators")


def audit(
    after: Annotated[int, typer.Option(min=0, help="Only events with a greater number.")] = 0,
    actor: Annotated[str | None, typer.Option(help="Only what one actor did, such as operator:ann or site:hospital-north.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only what concerns one thing, such as a site, a plan or a run.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Read the audit trail: who did what, in order."""
    from pathfed_server import operators

    rows = [
        {"seq": row.seq, "at": row.at, "actor": row.actor, "action": row.action, "subject": row.subject, "detail": row.detail}
        for row in operators.audit_trail(home, after=after, actor=actor, subject=subject)
    ]
    show(rows, as_json=as_json, title="audit trail")


@ca_app.command("show")
def ca_show(home: Home = HOME, as_json: Json = False) -> None:
    """Show the authority, how long its certificates hold, and where a rotation stands."""
    from pathfed_server import members

    show(members.authority_state(home), as_json=as_json, title="certificate authority")


@ca_app.command("renew")
def ca_renew(home: Home = HOME, as_json: Json = False) -> None:
    """Give the server a new TLS key and certificate from the same authority. Sites notice nothing."""
    from pathfed_server import members

    show(members.renew_server(home), as_json=as_json, title="Renewed. Restart `pathfed-server start` so that every port serves with it.")


@ca_app.command("rotate")
def ca_rotate(home: Home = HOME, as_json: Json = False) -> None:
    """Begin to replace the authority: both are trusted until `ca finish`. Sites renew by themselves."""
    from pathfed_server import members

    show(members.rotate_authority(home), as_json=as_json, title="Rotating. Restart `pathfed-server start`, and wait for the sites.")


@ca_app.command("finish")
def ca_finish(
    leave_behind: Annotated[bool, typer.Option("--leave-behind", help="Finish although some sites have not renewed yet.")] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """End a rotation: the old authority is trusted no more."""
    from pathfed_server import members

    done = members.finish_rotation(home, leave_behind=leave_behind)
    show(done, as_json=as_json, title="Finished. Restart `pathfed-server start`.")

"""`pathfed-site plans | show | approve | reject | revoke | stop | resume | approvers`: the hospital's veto."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from pathfed_client.home import SiteHome
from pathfed_common.console import Json, show
from pathfed_common.digest import short
from pathfed_common.errors import PathfedError
from pathfed_common.key_files import open_key, write_key
from pathfed_common.provenance.keys import SigningKey

approvers_app = typer.Typer(no_args_is_help=True, help="The people who may sign approvals, where the policy wants two.")

Home = Annotated[Path, typer.Option("--home", envvar="PATHFED_SITE_HOME", help="The site's home folder.")]
PlanName = Annotated[
    str,
    typer.Argument(
        metavar="PLAN", help="The plan: the beginning of its digest, its name where that is one plan's alone, or its signed file."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Where the signed document for the operator is written; in the home if not given.")]
Reason = Annotated[str, typer.Option("--reason", help="PUBLIC: what the operator may read about it, one line of at most 200 characters.")]
Passphrase = Annotated[
    str | None,
    typer.Option(
        "--passphrase-from", help="File with the key's passphrase in its first line, - for standard input; asked for if not given."
    ),
]
HOME = Path("pathfed-site")


def plans(home: Home = HOME, as_json: Json = False) -> None:
    """List the plans that came here, and what this site has said about each."""
    from pathfed_client import app as site
    from pathfed_client import deciding

    here = SiteHome(home)
    with closing(site.open_store(here)) as store:
        rows = [
            {
                "plan": one.plan.name,
                "digest": one.plan.digest if as_json else short(one.plan.digest),
                "state": one.state,
                "declared_patients": one.word.declared_patients or None if one.word else None,
                "decided_at": one.word.at if one.word else None,
                "received_at": one.received_at,
            }
            for one in deciding.known_plans(here, store)
        ]
    show(rows, as_json=as_json, title="plans")


def show_plan(
    plan: PlanName,
    patients: Annotated[
        int | None,
        typer.Option("--patients", min=1, help="Patients that you would declare; what was declared or scanned if not given."),
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Show what a plan would train, what leaves, what it costs a patient round by round, and what is new about it."""
    from pathfed_client import app as site
    from pathfed_client import deciding
    from pathfed_client.plan_summary import summarise

    here = SiteHome(home)
    with closing(site.open_store(here)) as store:
        found = summarise(here, store, deciding.find_plan(here, store, plan), patients)
    if as_json:
        show(found, as_json=True)
        return
    _show_summary(found)


def approve(
    plan: PlanName,
    patients: Annotated[
        int,
        typer.Option(
            "--patients",
            "--patients-at-least",
            min=1,
            help="A public lower bound of the patients you contribute; it sets the sampling rate.",
        ),
    ],
    approver: Annotated[str | None, typer.Option(help="Who approves, where the policy wants two people.")] = None,
    key: Annotated[Path | None, typer.Option(help="That person's private key, PEM.")] = None,
    passphrase_from: Passphrase = None,
    named_as: Annotated[
        str, typer.Option("--named-as", help="PUBLIC: what a release's model card may call this site; it is not named if not given.")
    ] = "",
    out: Out = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Approve a plan by its digest, inside this site's policy, and write the approval for the operator."""
    from pathfed_client import app as site
    from pathfed_client import deciding

    here = SiteHome(home)
    here.settings  # noqa: B018 - no key is asked for where there is no site
    if (approver is None) != (key is None):
        raise typer.BadParameter("give --approver and --key together")
    signer = None if approver is None or key is None else deciding.Signer(approver, open_key(key, passphrase_from))
    done = deciding.approve(here, plan, patients, out, signer, named_as)
    told: dict[str, Any] = {"plan": done.plan.digest, "declared_patients": patients}
    told["epsilon_of_a_whole_run"] = site.plan_epsilon(done.plan, patients, here.policy.delta)
    told["delta"] = here.policy.delta
    if here.policy.second_person:
        told["signed_by"] = list(done.signed_by)
    waits = done.approval is None
    told["approval"] = None if waits else str(out or deciding.word_file(here, done.plan.digest, "approval"))
    show(
        told,
        as_json=as_json,
        title="Signed. It counts once a second approver has signed the same figures."
        if waits
        else "Approved. Hand the approval to the operator.",
    )


def reject(plan: PlanName, reason: Reason = "", out: Out = None, home: Home = HOME, as_json: Json = False) -> None:
    """Say no to a plan, and write the signed rejection for the operator. It may be approved later all the same."""
    from pathfed_client import deciding

    here = SiteHome(home)
    done = deciding.reject(here, plan, reason, out)
    target = out or deciding.word_file(here, done.plan, done.kind)
    show({"plan": done.plan, "state": "rejected", "decision": str(target)}, as_json=as_json, title="Rejected.")


def revoke(plan: PlanName, reason: Reason = "", out: Out = None, home: Home = HOME, as_json: Json = False) -> None:
    """Take an approval back, for good and at once, and write the signed revocation for the operator."""
    from pathfed_client import deciding

    here = SiteHome(home)
    done = deciding.revoke(here, plan, reason, out)
    target = out or deciding.word_file(here, done.plan, done.kind)
    title = "Revoked. Nothing more leaves for this plan; what left before cannot be taken back."
    show({"plan": done.plan, "state": "revoked", "decision": str(target)}, as_json=as_json, title=title)


def stop(
    reason: Annotated[str, typer.Option("--reason", help="Why, for this site's own log book; it does not leave.")] = "",
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Stop at once: what is being computed is broken off, no answer to a round leaves until `resume`. Safe at any instant.

    The agent goes on reporting that the site is stopped, handing over decisions, and co-signing the log.
    """
    from pathfed_client import starting

    show(
        starting.stop(SiteHome(home), reason),
        as_json=as_json,
        title="Stopped. Nothing is computed and no answer to a round leaves until `pathfed-site resume`; the agent goes on reporting that "
        "the site is stopped, handing over decisions, and co-signing.",
    )


def resume(home: Home = HOME, as_json: Json = False) -> None:
    """Let a stopped site answer again."""
    from pathfed_client import starting

    show(starting.resume(SiteHome(home)), as_json=as_json, title="The site may answer again.")


@approvers_app.command("add")
def approvers_add(
    name: Annotated[str, typer.Argument(help="The person, as this site calls them: lower-case letters, digits, dots, hyphens.")],
    key: Annotated[str | None, typer.Option(help="The person's public key, ed25519:..., where they have a key of their own.")] = None,
    new: Annotated[Path | None, typer.Option(help="Make a key for the person under a passphrase, and write it to this file.")] = None,
    passphrase_from: Passphrase = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Let a person sign approvals with a key that is theirs alone."""
    from pathfed_client import deciding

    if (key is None) == (new is None):
        raise typer.BadParameter("give --key or --new")
    here = SiteHome(home)
    here.settings  # noqa: B018 - no key is made where there is no site
    if key is not None:
        public = deciding.public_key(key)
        deciding.add_approver(here, name, public)
    elif new is not None:
        made = SigningKey.generate()
        public = made.public
        write_key(new, made, passphrase_from)
        try:
            deciding.add_approver(here, name, public)
        except PathfedError:
            new.unlink()
            raise
    show({"approver": name, "key": public.to_text(), "file": None if new is None else str(new)}, as_json=as_json, title="Added.")


@approvers_app.command("list")
def approvers_list(home: Home = HOME, as_json: Json = False) -> None:
    """List who may sign approvals."""
    from pathfed_client import app as site

    with closing(site.open_store(SiteHome(home))) as store:
        rows = [{"approver": one.name, "key": one.key.to_text(), "at": one.at} for one in store.approvers()]
    show(rows, as_json=as_json, title="approvers")


@approvers_app.command("remove")
def approvers_remove(
    name: Annotated[str, typer.Argument(help="The person, as this site calls them.")], home: Home = HOME, as_json: Json = False
) -> None:
    """Let a person sign no more; their earlier signatures count no more either, from the next offer on."""
    from pathfed_client import deciding

    deciding.remove_approver(SiteHome(home), name)
    show({"approver": name, "state": "removed"}, as_json=as_json)


def _show_summary(found: dict[str, Any]) -> None:
    """The summary for people, section by section."""
    show({key: found[key] for key in ("plan", "digest", "state")}, as_json=False, title=f"plan {found['plan']}")
    show(found["signatures"] | {"approvers": found["approvers"]}, as_json=False, title="who has signed")
    show(found["trained"], as_json=False, title="what would be trained")
    show(found["cohort"], as_json=False, title="on whom")
    show(_leaving(found["leaves"]), as_json=False, title="what leaves, each round")
    cost = found["cost"]
    if cost is None:
        show({"cost": "scan under this plan first, or give --patients"}, as_json=False, title="what it costs a patient")
    else:
        rows = [
            {"after round": row["after_round"], **{f"epsilon, {n} site(s)": row[f"epsilon_at_{n}_sites"] for n in (1, 2, 3)}}
            for row in cost["epsilon_after_round"]
        ]
        show(
            rows,
            as_json=False,
            title=f"what it costs a patient whose slides lie at 1, 2 or 3 sites of this run, at delta {cost['delta']:g}",
        )
        show({key: value for key, value in cost.items() if key != "epsilon_after_round"}, as_json=False, title="beside what was spent")
    changes = found["changes"]
    if changes is None:
        show({"changes": "no other plan was approved here"}, as_json=False, title="what is new")
    else:
        show(changes["keys"], as_json=False, title=f"what is new, against {changes['plan']} {short(changes['digest'])}")
    show(found["refused_by_policy"], as_json=False, title="what this site's policy refuses")


def _leaving(leaves: dict[str, Any]) -> dict[str, Any]:
    once, whole = (f"{leaves[key] / 1e6:,.1f} MB" for key in ("update_bytes_a_round", "update_bytes_a_run"))
    noise = f"with noise of standard deviation {leaves['noise_std']:g} on each number"
    return {
        "one update": f"{leaves['update_numbers']:,} numbers ({leaves['number_type']}), {once}; {whole} in the whole run",
        "what is in it": f"a sum over drawn patients, each clipped to {leaves['clip_norm']:g}, {noise}",
        "two noised figures": leaves["noised_figures"],
        "one signed statement": "digests, the privacy event and what was spent; about 2 kB",
        "when": f"at whole multiples of {leaves['reply_slot_s']:g} s after the offer, unless this site's policy has slots off",
    }


def register(app: typer.Typer) -> None:
    """Add these commands to a program."""
    app.command()(plans)
    app.command("show")(show_plan)
    for command in (approve, reject, revoke, stop, resume):
        app.command()(command)
    app.add_typer(approvers_app, name="approvers")

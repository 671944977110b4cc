"""`pathfed-server plan key | cosign | collect`: operators' own signatures under a plan, which hospitals may ask for."""

from pathlib import Path
from typing import Annotated

import typer

from pathfed_common import files
from pathfed_common.console import Json, show
from pathfed_common.key_files import open_key, write_key
from pathfed_common.provenance import cosigned
from pathfed_common.provenance.keys import SigningKey
from pathfed_server.cli_options import HOME, Home

PlanFile = Annotated[Path, typer.Argument(help="The signed plan, as `plan publish` wrote it.")]
Passphrase = Annotated[
    str | None,
    typer.Option(
        "--passphrase-from", help="File with the key's passphrase in its first line, - for standard input; asked for if not given."
    ),
]


def plan_key(
    out: Annotated[Path, typer.Option("--out", help="Where the private key is written, for its owner's eyes.")],
    passphrase_from: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Make an operator's key under a passphrase. Its public half goes into the policy of hospitals that ask for the signature."""
    key = SigningKey.generate()
    write_key(out, key, passphrase_from)
    show({"key": key.public.to_text(), "file": str(out)}, as_json=as_json, title="Made. Tell the hospitals the public key, by telephone.")


def plan_cosign(
    plan: PlanFile,
    key: Annotated[Path, typer.Option("--key", help="Your private key, PEM.")],
    passphrase_from: Passphrase = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the plan with your signature is written; the same file if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add your signature to a signed plan. Needs no server: do it where your key is."""
    from pathfed_server import app as server

    found = server.read_signed_plan(plan)
    own = open_key(key, passphrase_from)
    target = out or plan
    files.write_atomic(target, cosigned.cosign(files.read_given(plan), own, where=str(plan)))
    show(
        {"plan": found.digest, "name": found.name, "signed_by": own.public.to_text(), "file": str(target)}, as_json=as_json, title="Signed."
    )


def plan_collect(plan: PlanFile, home: Home = HOME, as_json: Json = False) -> None:
    """Take the signatures in a plan's file up into the published plan, so that sites that fetch it get them."""
    from pathfed_server import app as server

    found, signatures = server.collect_signatures(home, plan)
    show({"plan": found.digest, "name": found.name, "signatures": signatures}, as_json=as_json, title="Collected.")


def register(app: typer.Typer) -> None:
    """Add these commands to `plan`."""
    app.command("key")(plan_key)
    app.command("cosign")(plan_cosign)
    app.command("collect")(plan_collect)

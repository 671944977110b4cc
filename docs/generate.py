"""Write the pages that are made from the code: error pages, and the references of commands, plans and settings.

python docs/generate.py            write them (`make reference`)
python docs/generate.py --check    exit 1 and name the stale ones; `make docs` and tests/docs do this
"""

import ast
import inspect
import sys
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

import click
import typer
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import PatientListColumns, SiteSettings
from pathfed_common import plan as plan_module
from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode, PathfedError
from pathfed_server.home import ServerSettings
from pathfed_server.notifying.settings import MailSettings, NotifySettings, WebhookSettings

DOCS = Path(__file__).parent
NOTE = "<!-- Made by docs/generate.py from {source}. Change that, then run `make reference`. -->\n\n"
AUDIENCE = {"site": "the hospital's IT", "operator": "the consortium's operator", "both": "hospital IT and operator"}
FAMILY_TITLES = {
    "PF1": "Plans",
    "PF2": "Slides and patients",
    "PF3": "Privacy",
    "PF4": "Transport",
    "PF5": "Runs, rounds and the database",
    "PF6": "Provenance",
    "PF9": "This machine",
}
PROGRAMS = {"pathfed-site": "pathfed_client.cli", "pathfed-server": "pathfed_server.cli", "pathfed": "pathfed_local.cli"}
SETTINGS: dict[str, type[BaseModel]] = {
    "site.toml at a site": SiteSettings,
    "[patient_list] of site.toml": PatientListColumns,
    "policy.toml at a site": SitePolicy,
    "server.toml at the server": ServerSettings,
    "notify.toml at the server": NotifySettings,
    "[webhook.NAME] of notify.toml": WebhookSettings,
    "[mail.NAME] of notify.toml": MailSettings,
}
_TYPE_WORDS = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "tuple": "list of texts"}
_PATTERNS = {
    r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$": "1 to 63 of a-z, 0-9 and inner hyphens",
    r"^(sha256:[0-9a-f]{64})?$": "empty, or `sha256:` and 64 hex digits",
    r"^(auto|cpu|cuda|cuda:(0|[1-9][0-9]{0,2}))$": "`auto`, `cpu`, `cuda`, or `cuda:` and a number",
}
_BOUNDS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<", MultipleOf: "multiple of"}


# ---- error pages ----


def exit_statuses() -> dict[str, int]:
    """Exit status of each family of codes."""
    return {family.family: family.exit_status for family in PathfedError.__subclasses__()}


def error_page(code: ErrorCode) -> str:
    """One code's page."""
    entry = CATALOG[code]
    return (
        NOTE.format(source="common/pathfed_common/error_catalog.py")
        + f"# {code.value}: {entry.title}\n\n"
        + f"**What it means.** {entry.meaning}\n\n"
        + f"**What to do.** {entry.remedy}\n\n"
        + f"| for | family | exit status | name in the code |\n| --- | --- | --- | --- |\n| {AUDIENCE[entry.audience]} "
        + f"| [{FAMILY_TITLES[code.value[:3]]}](index.md#{code.value[:3].lower()}) | {exit_statuses()[code.value[:3]]} | `{code.name}` |\n"
    )


def error_index() -> str:
    """The page that lists all codes, by family."""
    lines = [
        NOTE.format(source="common/pathfed_common/error_catalog.py"),
        "# Error codes\n\n",
        "Every error pathfed raises on purpose has a code that never changes its meaning. A message reads\n\n",
        "    PF104: Input should be greater than 0 | where: plan.toml, key privacy.noise_multiplier | value: 0.0\n\n",
        "with what is wrong, where, which value, and often what to do. With `--json` the same parts come as JSON on standard output. "
        "Only the code ever leaves a site: messages can hold paths and values, so they stay on the machine that made them.\n",
    ]
    statuses = exit_statuses()
    for family, title in FAMILY_TITLES.items():
        lines.append(f"\n## {title} {{ #{family.lower()} }}\n\nExit status {statuses[family]}.\n\n| code | | for |\n| --- | --- | --- |\n")
        codes = [code for code in ErrorCode if code.value.startswith(family)]
        lines.extend(f"| [{c.value}]({c.value}.md) | {CATALOG[c].title} | {AUDIENCE[CATALOG[c].audience]} |\n" for c in codes)
    return "".join(lines)


# ---- the plan's keys ----


def field_comments(module: ModuleType) -> dict[str, str]:
    """`Class.field` -> the `#:` comment above it, read from a module's source."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                comment: list[str] = []
                row = item.lineno - 2
                while lines[row].strip().startswith("#:"):
                    comment.insert(0, lines[row].strip().removeprefix("#:").strip())
                    row -= 1
                found[f"{node.name}.{item.target.id}"] = " ".join(comment)
    return found


def plan_sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Each table of a plan: its TOML name ("" for the top) and its model; a table of several kinds comes once for each."""
    yield "", plan_module.Plan
    yield from _tables("", plan_module.Plan)


def _tables(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The tables inside a model, each before its own; a list of tables comes under its name too."""
    for name, field in model.model_fields.items():
        for inner in _kinds(field.annotation):
            yield prefix + name, inner
            yield from _tables(f"{prefix}{name}.", inner)


def _kinds(annotation: Any) -> Iterator[type[BaseModel]]:
    """The tables that an annotation allows."""
    if _is_table(annotation):
        yield annotation
        return
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _is_table(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def plan_keys() -> list[str]:
    """Every key of a plan, dotted."""
    nested = {name for name, _ in plan_sections() if name}
    return [dotted for section, model in plan_sections() for name in model.model_fields if (dotted := _dotted(section, name)) not in nested]


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _type_and_bounds(field: FieldInfo) -> tuple[str, str]:
    choices = get_args(field.annotation) if "Literal" in str(field.annotation) else ()
    if choices:
        return "one of", ", ".join(f"`{toml(choice)}`" for choice in choices)
    bounds = [
        f"{sign} {_number(next(iter(vars_of(part).values())))}"
        for part in field.metadata
        for kind, sign in _BOUNDS.items()
        if isinstance(part, kind)
    ]
    pattern = next((str(part.pattern) for part in field.metadata if getattr(part, "pattern", None)), None)
    if pattern:
        bounds.append(_PATTERNS[pattern])
    if _is_table(field.annotation):
        return "table", ""
    if get_origin(field.annotation) is dict and any(_is_table(kind) for kind in get_args(field.annotation)):
        return "tables by name", ""
    options = get_args(field.annotation) if type(None) in get_args(field.annotation) else (field.annotation,)
    if any(get_origin(option) is tuple for option in options):
        return "list of texts", ", ".join(bounds)
    if type(None) in options:
        return "number" if float in options else "whole number" if int in options else "text", ", ".join(bounds)
    name = _TYPE_WORDS.get(str(getattr(field.annotation, "__name__", "")), "table of numbers")
    return name, ", ".join(bounds) or ("> 0" if name == "table of numbers" else "")


def _number(value: float) -> str:
    if isinstance(value, int):
        return "2^63" if value == 2**63 else f"{value:,}"
    return f"{value:g}"


def vars_of(part: Any) -> dict[str, Any]:
    """The fields of one of annotated_types' bounds, which are slotted dataclasses."""
    return {name: getattr(part, name) for name in part.__dataclass_fields__}


def toml(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | BaseModel):
        return "{}"
    if isinstance(value, tuple):
        return "[]"
    if value is None:
        return "not given"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def _table(model: type[BaseModel], *, leave_out: Collection[str] = ()) -> str:
    """A table of a model's fields."""
    module = inspect.getmodule(model)
    comments = field_comments(module) if module else {}
    rows = ["| key | type | bounds | default | meaning |\n| --- | --- | --- | --- | --- |\n"]
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        kind, bounds = _type_and_bounds(field)
        default = "**required**" if field.is_required() else f"`{toml(field.get_default(call_default_factory=True))}`"
        rows.append(f"| `{name}` | {kind} | {bounds} | {default} | {comments[f'{model.__name__}.{name}']} |\n")
    return "".join(rows)


def plan_page() -> str:
    """The reference of every key a plan can have."""
    nested = {name for name, _ in plan_sections() if name}
    out = [
        NOTE.format(source="common/pathfed_common/plan.py"),
        "# Plan\n\n",
        "A plan is one TOML file. Keys that are not listed here are refused, and so are values of another type or out of bounds. "
        "Its digest names it for good: change any value and it is another plan, which sites must approve again.\n",
    ]
    for section, model in plan_sections():
        out.append(f"\n## {_heading(section, model)}\n\n{inspect.cleandoc(model.__doc__ or '')}\n\n")
        out.append(_table(model, leave_out=[name for name in model.model_fields if _dotted(section, name) in nested]))
    return "".join(out)


def _heading(section: str, model: type[BaseModel]) -> str:
    if sum(name == section for name, _ in plan_sections()) > 1:
        return f'[{section}] with name = "{model.model_fields["name"].default}"'
    return f"[{section}]" if section else "Top level"


def settings_page() -> str:
    """The reference of the settings files."""
    out = [
        NOTE.format(source="the settings models of client and server"),
        "# Settings files\n\n",
        "`init` writes these files into a home; people edit them with any editor, and a process reads them when it starts. Keys that are "
        "not listed here are refused, and so are values of another type or out of bounds (`PF905`).\n",
    ]
    for file, model in SETTINGS.items():
        out.append(f"\n## {file}\n\n{inspect.cleandoc(model.__doc__ or '')}\n\n{_table(model)}")
    return "".join(out)


# ---- commands ----


def commands(program: str) -> Iterator[tuple[str, click.Command]]:
    """Each command of a program with its full name, groups before their commands."""
    app = import_module(PROGRAMS[program]).app
    yield from _walk(program, typer.main.get_command(app))


def _walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), child)
            if found is not None and not found.hidden:
                yield from _walk(f"{name} {child}", found)


def _parameter_row(parameter: click.Parameter) -> str:
    context = click.Context(click.Command("x"))
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts]) if isinstance(parameter, click.Option) else ""
    label = names or f"`{(parameter.name or '').upper()}`"
    default = parameter.get_default(context, call=False)
    shown = "**required**" if parameter.required else ("" if default is None or callable(default) or default is False else f"`{default}`")
    text = inspect.cleandoc(getattr(parameter, "help", None) or "").replace("\n", " ").replace("|", "\\|")
    return f"| {label} | {shown} | {text} |\n"


def cli_page() -> str:
    """The reference of every command and option."""
    out = [NOTE.format(source="the programs' own help"), "# Commands\n\n"]
    out.append("Three programs: `pathfed-site` at a hospital, `pathfed-server` at the consortium, `pathfed` for what belongs to neither.\n")
    for program in PROGRAMS:
        for name, command in commands(program):
            depth = "##" if name == program else "###"
            out.append(f"\n{depth} {name}\n\n{inspect.cleandoc(command.help or '')}\n")
            rows = [_parameter_row(p) for p in command.params if p.name not in ("help", "install_completion", "show_completion")]
            if rows:
                out.append("\n| option or argument | default | meaning |\n| --- | --- | --- |\n" + "".join(rows))
    return "".join(out)


# ---- writing and checking ----


def pages() -> dict[Path, str]:
    """Every generated page's place and text."""
    made = {DOCS / "errors" / f"{code.value}.md": error_page(code) for code in ErrorCode}
    made[DOCS / "errors" / "index.md"] = error_index()
    made[DOCS / "reference" / "plan.md"] = plan_page()
    made[DOCS / "reference" / "settings.md"] = settings_page()
    made[DOCS / "reference" / "cli.md"] = cli_page()
    return made


def stale() -> list[str]:
    """Pages that are missing, differ from the code, or belong to a code that does not exist."""
    made = pages()
    wrong = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    wrong += [path for path in (DOCS / "errors").glob("*.md") if path not in made]
    return sorted(str(path.relative_to(DOCS)) for path in wrong)


def main(arguments: list[str]) -> int:
    """Write the pages, or check them."""
    if arguments == ["--check"]:
        found = stale()
        if found:
            print("stale, run `make reference`:", *found, sep="\n  ", file=sys.stderr)
        return 1 if found else 0
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

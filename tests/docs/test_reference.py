import shlex

import click
import pytest

PROGRAMS = ("pathfed", "pathfed-server", "pathfed-site")


def all_commands(generate):
    return {name: command for program in PROGRAMS for name, command in generate.commands(program)}


def test_generated_pages_are_fresh(generate):
    assert generate.stale() == []


def test_stale_page_is_noticed(generate, monkeypatch):
    monkeypatch.setattr(generate, "plan_page", lambda: "something else")
    assert generate.stale() == ["reference/plan.md"]


def test_every_plan_key_has_a_row_and_a_meaning(generate):
    page = generate.plan_page()
    keys = generate.plan_keys()
    assert len(keys) > 25
    for key in keys:
        section, _, name = key.rpartition(".")
        # A table of several kinds has a heading for each kind.
        parts = page.split(f"\n## [{section}]" if section else "\n## Top level")[1:]
        rows = [line for part in parts for line in part.split("\n## ")[0].splitlines() if line.startswith(f"| `{name}` |")]
        assert rows, key
        for row in rows:
            assert len(row.split("|")[-2].strip()) > 10, f"{key} has no meaning; write a #: comment above it in plan.py"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_and_option_has_help(generate, program):
    for name, command in generate.commands(program):
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_has_a_place_in_the_reference(generate, root, program):
    page = (root / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    for name, command in generate.commands(program):
        heading = f"\n{'##' if name == program else '###'} {name}\n"
        assert heading in page
        section = page.split(heading)[1].split("\n##")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name not in ("help", "install_completion", "show_completion"):
                assert f"`{parameter.opts[0]}`" in section


def test_commands_in_the_pages_exist_with_these_options(generate, shell_lines):
    known = all_commands(generate)
    seen = 0
    for page, line in shell_lines:
        words = shlex.split(line, comments=True)
        if not words or words[0].rsplit("/", 1)[-1] not in PROGRAMS:
            continue
        seen += 1
        name, rest = words[0].rsplit("/", 1)[-1], words[1:]
        while rest and f"{name} {rest[0]}" in known:
            name, rest = f"{name} {rest[0]}", rest[1:]
        command = known[name]
        assert not isinstance(command, click.Group) or not rest, f"{page}: {line}: no such command"
        options = {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in options]
        assert not unknown, f"{page}: {line}: {unknown}"
    assert seen > 10


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_argument_has_help(generate, program):
    """Some versions of click and typer together lose it."""
    for name, command in generate.commands(program):
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                assert getattr(parameter, "help", None), f"{name} {parameter.name}"

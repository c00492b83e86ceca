"""README against the command line: options, commands and names that it promises are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from onnxprune.allocation import STRATEGIES
from onnxprune.cli import main
from onnxprune.criteria import NAMES
from onnxprune.metrics import AGREEMENTS, LABELLED
from onnxprune.passes import REPAIRS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = {
    row.split("|")[1]: row.split("|")[2] for row in README.splitlines() if row.startswith("| `--")
}  # left: options, right: what they do


def options(command: str) -> dict[str, click.Option]:
    found = main.commands[command].params
    return {name: o for o in found if isinstance(o, click.Option) for name in o.opts if name.startswith("--")}


def test_every_option_of_shrink_and_plan_is_in_the_table() -> None:
    named = {name for left in ROWS for name in re.findall(r"--[a-z-]+", left)}
    named |= set(re.findall(r"--[a-z-]+", "".join(ROWS.values())))
    shown = set(re.findall(r"--[a-z-]+", README))
    assert named <= options("shrink").keys()
    assert options("plan").keys() - {"--output"} <= named
    assert options("shrink").keys() - {"--output"} <= shown | named


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--criterion", NAMES),
        ("--allocation", STRATEGIES),
        ("--repair", REPAIRS),
        ("--eval", (*LABELLED, *AGREEMENTS)),
    ],
)
def test_every_choice_is_said(option: str, names: tuple[str, ...]) -> None:
    (row,) = (right for left, right in ROWS.items() if f"`{option}" in left)
    assert {name for name in names if f"`{name}`" not in row} == set()


def commands() -> list[str]:
    """The lines of code blocks that call the tool."""
    lines = re.findall(r"^    (onnxprune [^#\n]*)", README, re.MULTILINE)
    return [" ".join(line.split()) for line in lines]


def test_every_command_is_shown() -> None:
    assert {shlex.split(line)[1] for line in commands()} == set(main.commands)


@pytest.mark.parametrize("line", commands())
def test_every_line_parses(line: str) -> None:
    """As the command line itself would read it, up to the files that are not there."""
    _, name, *arguments = shlex.split(line)
    command = main.commands[name]
    with command.make_context(name, list(arguments)) as context:
        assert context.params


def test_both_commands_to_try_are_there() -> None:
    for marker in ("main", "tests"):
        assert len(re.findall(rf"<!-- {marker} -->\n\n    python3 -m venv ", README)) == 1

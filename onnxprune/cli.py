"""The command line: parse, call, print. Exit codes are listed in `onnxprune.errors`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from onnxprune import __version__, api, criteria, pipeline
from onnxprune.allocation import STRATEGIES
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import OnnxPruneError, UserError
from onnxprune.inspection import Inspection, why
from onnxprune.model import atomic
from onnxprune.passes.channels import Channels
from onnxprune.pipeline import Result
from onnxprune.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, dir_okay=False)


class _Commands(click.Group):
    """Turns errors into one or two lines and an exit code; a traceback is a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxPruneError as error:
            click.echo(f"onnxprune: {error}", err=True)
            ctx.exit(error.exit_code)
        except MemoryError:
            click.echo("onnxprune: out of memory; nothing was written", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="onnxprune")
def main() -> None:
    """Prune ONNX models: smaller, proven right.

    Exit codes: 0 done, 2 bad input or usage, 3 internal error (nothing written), 4 nothing to prune.
    """


def _choices(command: F) -> F:
    """The options that decide what is removed."""
    options = (
        click.option("--channels", "ratio", type=float, metavar="R", help="Share of the units of every group to remove."),
        click.option("--macs", type=float, metavar="S", help="Keep this share of the MACs instead."),
        click.option("--params", type=float, metavar="S", help="Keep this share of the parameters instead."),
        click.option("--criterion", type=click.Choice(criteria.NAMES), default="l2", show_default=True, help="How units are ranked."),
        click.option("--allocation", "strategy", type=click.Choice(STRATEGIES), default="uniform", show_default=True, help="The same share everywhere, or the least important units anywhere."),
        click.option("--align", type=int, default=16, show_default=True, metavar="N", help="Round channel counts to multiples of N (1: off)."),
        click.option("--min-channels", "minimum", type=int, default=1, show_default=True, metavar="N", help="Leave at least N units in every group."),
        click.option("--include", multiple=True, metavar="PATTERN", help="Only groups that touch a node or weight of this name (repeatable)."),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Never groups that touch a node or weight of this name (repeatable)."),
        click.option("--allow-lossy", is_flag=True, help="Also cut axes that a statistic (LayerNorm, mean) is taken over."),
        click.option("--repair", type=click.Choice(["none"]), default="none", show_default=True, help="Weight repair after the cut."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of --criterion random."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _options(given: dict[str, Any]) -> Channels:
    given.pop("repair")
    return Channels(**given)


@main.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="Where to write (default: MODEL.pruned.onnx).")
@_choices
@click.option("--plan-out", type=FILE, help="Also write the plan.")
@click.option("--json", "json_out", type=FILE, help="Also write the report as JSON ('-': to stdout).")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
def shrink(
    model: Path, output: Path | None, plan_out: Path | None, json_out: Path | None, dry_run: bool, **given: Any
) -> None:
    """Remove channels from MODEL and prove the result."""
    options = _options(given)
    if dry_run:
        click.echo(pipeline.make_plan(model, options).to_json(), nl=False)
        return
    target = output or model.with_name(f"{model.stem}.pruned.onnx")
    _protect(model, target, plan_out, json_out)
    with _progress() as progress:
        result = pipeline.prune(model, options, progress)
    _write(result, target, plan_out, json_out)


@main.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where to write the plan ('-': to stdout).")
@_choices
def plan(model: Path, output: Path, **given: Any) -> None:
    """Decide what to remove from MODEL and write it down."""
    made = pipeline.make_plan(model, _options(given))
    _protect(model, output)
    _write_text(output, made.to_json())


@main.command()
@click.argument("model", type=FILE)
@click.argument("plan", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where to write the pruned model.")
@click.option("--json", "json_out", type=FILE, help="Also write the report as JSON ('-': to stdout).")
def apply(model: Path, plan: Path, output: Path, json_out: Path | None) -> None:
    """Replay PLAN on the MODEL it was made for."""
    _protect(model, output, json_out)
    edits = Plan.load(plan)
    with _progress() as progress:
        result = pipeline.apply_plan(model, edits, progress)
    _write(result, output, None, json_out)


@main.command()
@click.argument("model", type=FILE)
@click.option("--why", "name", metavar="NAME", help="Explain the axes of one node or tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: Path, name: str | None, as_json: bool) -> None:
    """Show the groups of MODEL, and what is pinned and why."""
    graph = DependencyGraph(pipeline.open_model(model))
    if name is not None:
        lines = why(graph, name)
        click.echo(json.dumps(lines, indent=1) if as_json else "\n".join(lines))
    elif as_json:
        click.echo(json.dumps(Inspection(graph).as_dict(), indent=1))
    else:
        Inspection(graph).print(_console())


@main.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where to write the folded model.")
def fold(model: Path, output: Path) -> None:
    """Exact canonicalisation of MODEL: BatchNorm into weights, constants evaluated."""
    _protect(model, output)
    folded = pipeline.fold(pipeline.open_model(model))
    folded.save(output)
    _console().print(f"{output}: {folded.edits} nodes folded away", highlight=False)


@main.command()
@click.argument("original", type=FILE)
@click.argument("candidate", type=FILE)
@click.option("--plan", "plan_file", type=FILE, help="The plan that made CANDIDATE, to check equivalence.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def validate(ctx: click.Context, original: Path, candidate: Path, plan_file: Path | None, as_json: bool) -> None:
    """Judge CANDIDATE against ORIGINAL: structure, equivalence, output drift, latency.

    Exits 1 if CANDIDATE is broken or not what the plan says.
    """
    result = api.validate(original, candidate, Plan.load(plan_file) if plan_file else None)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=1))
    else:
        result.print(_console())
    if not result.passed:
        ctx.exit(1)


# --------------------------------------------------------------------------------------------- output


def _protect(model: Path, *targets: Path | None) -> None:
    """Refuse to overwrite the input, or to write two things to one place."""
    written = [target for target in targets if target is not None and str(target) != "-"]
    for target in written:
        if target.exists() and model.exists() and target.samefile(model):
            raise UserError(f"{target}: the output is the input; choose another path with -o")
        if not target.parent.is_dir():
            raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")
    if len({target.resolve() for target in written}) < len(written):
        raise UserError(f"{written[0]}: two outputs have the same path; give each its own")


def _write(result: Result, target: Path, plan_out: Path | None, json_out: Path | None) -> None:
    written = result.save(target)
    if plan_out is not None:
        _write_text(plan_out, result.plan.to_json())
    report = {**result.report.as_dict(), "output": str(target), "file_bytes": written}
    if json_out is not None:
        _write_text(json_out, json.dumps(report, indent=1) + "\n")
    if str(json_out) != "-":
        result.report.print(_console())
        _console().print(f"wrote {target} ({written:,} bytes)", highlight=False, soft_wrap=True)


def _write_text(path: Path, text: str) -> None:
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


class _progress:
    """Names the stage at work on a terminal; silent in a pipe."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("") if self._console.is_terminal else None

    def __enter__(self) -> pipeline.Progress:
        if self._status is not None:
            self._status.start()
        return lambda stage: self._status.update(f"{stage} ...") if self._status is not None else None

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

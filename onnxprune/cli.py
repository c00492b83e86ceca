"""The command line: parse, call, print. Exit codes are listed in `onnxprune.errors`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from onnxprune import __version__, api, criteria, html, job, pipeline, quantisation, runtime, survey, targets
from onnxprune.allocation import STRATEGIES, Alignment
from onnxprune.blocks import Blocks
from onnxprune.data import Preprocess
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import InternalError, OnnxPruneError, UserError, printable
from onnxprune.inspection import Inspection, why
from onnxprune.job import SAMPLES, Inputs, open_model
from onnxprune.model import atomic, same_file
from onnxprune.passes import REPAIRS, Options
from onnxprune.passes.layers import CRITERIA as LAYER_CRITERIA
from onnxprune.pipeline import Result
from onnxprune.plan import Plan
from onnxprune.quantisation import Quantised
from onnxprune.report import PlainConsole

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, dir_okay=False)
STDOUT = Path("-")


class _Commands(click.Group):
    """Turns errors into one line and an exit code; a traceback is a bug."""

    def invoke(self, ctx: click.Context) -> None:
        try:
            with _terminable():
                super().invoke(ctx)
            return
        except OnnxPruneError as error:
            message, code = str(error), error.exit_code
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "onnxprune"
            message, code = f"{error.format_message().rstrip('.')}; see '{where} --help'", 2
        except MemoryError:
            message, code = "out of memory; nothing was written", 2
        except KeyboardInterrupt as interrupt:
            runtime.clean_up()
            message, code = str(interrupt) or "interrupted; nothing was written", 130
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            message, code = _bug(error), InternalError.exit_code
        click.echo(f"onnxprune: {printable(message)}", err=True)
        ctx.exit(code)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM, and a terminal that is closed, unwind like Ctrl-C, so that no temporary file stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ends = [number for name in names if signal.getsignal(number := signal.Signals[name]) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bug(error: Exception) -> str:
    """What to say about an error that nobody foresaw; its traceback is kept for a report."""
    what = (
        f"internal error ({type(error).__name__}: {str(error)[:200]}); nothing was written, please report it"
    )
    story = "".join(traceback.format_exception(error))
    try:
        folder = Path(tempfile.mkdtemp(prefix="onnxprune-report-"))
        (folder / "traceback.txt").write_text(story, "utf-8", "backslashreplace")
    except OSError:
        return what
    return f"{what} with the model and {folder}"


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="onnxprune")
def main() -> None:
    """Prune ONNX models: smaller, proven right.

    Exit codes: 0 done, 1 validate found the candidate broken, 2 bad input or usage, 3 internal error
    (nothing written), 4 nothing to prune (nothing written), 5 not faster on its target, 6 refused or
    wrong on its target (nothing written).
    """


# -------------------------------------------------------------------------------------------- options


def _located(_: click.Context, option: click.Parameter, data: str | None) -> str | None:
    if data is not None and not data.strip():
        raise UserError(f"{option.opts[0]}: give a path, or module:function")
    return data


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--ratios {text}: expected shares with commas, as 0.1,0.25,0.5") from None


def _data(*names: str, text: str, required: bool = False) -> Callable[[F], F]:
    return click.option(*names, metavar="DATA", callback=_located, required=required, help=text)


def _samples(default: int | None) -> Callable[[F], F]:
    shown = default is not None or "all"
    return click.option("--samples", type=click.IntRange(2), default=default, show_default=shown, metavar="N", help="How many of them.")  # fmt: skip


def _where(text: str) -> Callable[[F], F]:
    return click.option("--target", "where", default="cpu", show_default=True, metavar="TARGET", help=text)


def _metric(default: str) -> Callable[[F], F]:
    text = f"top1, top5, f1, mse, agreement, kl, cosine, snr or module:function (default: {default})."
    return click.option("--metric", metavar="NAME", help=text)


def _seed(of: str) -> Callable[[F], F]:
    return click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help=f"Seed of {of}.")  # fmt: skip


_preprocess = click.option("--preprocess", type=Preprocess.parse, metavar="SPEC", help="Of images: imagenet, 0-1, -1-1; then ,size= ,mean= ,std= ,layout= ,bgr.")  # fmt: skip
_criterion = click.option("--criterion", type=click.Choice(("auto", *criteria.NAMES)), default="auto", show_default=True, help="How units are ranked.")  # fmt: skip
_threads = click.option("--threads", type=click.IntRange(1, api.MOST_THREADS), default=1, show_default=True, metavar="N", help="That models are timed with.")  # fmt: skip
_page = click.option("--html", "page", type=FILE, help="Also write a page of it that opens in any browser.")
_json_out = click.option("--json", "json_out", type=FILE, help="Also write the report as JSON ('-': to stdout).")  # fmt: skip
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _choices(command: F) -> F:
    """The options that decide what is removed."""
    options = (
        click.option("--channels", type=float, metavar="R", help="Share of the units of every group to remove, whatever they are."),
        click.option("--heads", type=float, metavar="R", help="Share of the attention heads to remove."),
        click.option("--head-width", type=float, metavar="R", help="Share of the width of every attention head to remove."),
        click.option("--ffn", type=float, metavar="R", help="Share of the neurons between two matrix products to remove."),
        click.option("--hidden", type=float, metavar="R", help="Share of the residual stream's width to remove."),
        click.option("--layers", metavar="N", help="Residual blocks to remove: how many, a share below 1, or name patterns with commas."),
        click.option("--layer-criterion", type=click.Choice(LAYER_CRITERIA), default="influence", show_default=True, help="Which residual blocks go first."),
        click.option("--macs", type=float, metavar="S", help="Keep this share of the MACs instead."),
        click.option("--params", type=float, metavar="S", help="Keep this share of the parameters instead."),
        click.option("--bytes", type=float, metavar="S", help="Keep this share of the weight bytes instead."),
        _data("--data", text="Unlabelled inputs to score and repair with: images, .npy, .npz, ONNX test data, a data set, module:function."),
        _samples(SAMPLES),
        _preprocess,
        _criterion,
        click.option("--allocation", "strategy", type=click.Choice(("auto", *STRATEGIES)), default="auto", show_default=True, help="How much goes where."),
        click.option("--steps", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Prune in N steps, repaired and scored anew after each."),
        click.option("--target", "targets", multiple=True, metavar="TARGET", help="Where it is to run (repeatable; see `onnxprune targets`)."),
        click.option("--align", type=int, metavar="N", help="Round channel counts to multiples of N (1: off); default: what the targets' kernels fill, else 16."),
        click.option("--min-channels", "minimum", type=int, default=1, show_default=True, metavar="N", help="Leave at least N units in every group."),
        click.option("--include", multiple=True, metavar="PATTERN", help="Only groups that touch a node or weight of this name (repeatable)."),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Never groups that touch a node or weight of this name (repeatable)."),
        click.option("--allow-lossy", is_flag=True, help="Also cut axes that a statistic (LayerNorm, mean) is taken over."),
        click.option("--repair", type=click.Choice(REPAIRS), default="auto", show_default=True, help="How what stays makes up for what went."),
        _seed("the samples drawn, of made-up inputs, of --criterion random"),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _options(given: dict[str, Any]) -> tuple[Options, Inputs]:
    """What the options of `_choices`, and those of shrink alone, ask for."""
    fed = {field.name: given.pop(field.name) for field in dataclasses.fields(Inputs) if field.name in given}
    return Options(**given), Inputs(**fed)


# ------------------------------------------------------------------------------------------- commands


@main.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="Where to write (default: MODEL.pruned.onnx).")
@_choices
@click.option("--plan-out", type=FILE, help="Also write the plan.")
@_json_out
@_page
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option(
    "--max-drop",
    type=float,
    metavar="D",
    help="Cut as much as costs no more than D of the metric, instead of a share.",
)
@click.option(
    "--latency",
    type=float,
    metavar="S",
    help="Keep this share of the time of the original, measured on the first --target (cpu).",
)
@click.option(
    "--latency-table",
    "table",
    type=FILE,
    metavar="FILE",
    help="Times of pieces, read and added to; of another machine, as `measure` writes it there, only read.",
)
@click.option("--allow-slower", is_flag=True, help="Write a result that is no faster on a --target, too.")
@_data("--eval", "judge", text="Data to measure the metric on, before and after (default: --data).")
@_metric("what fits the data")
def shrink(
    model: Path,
    output: Path | None,
    plan_out: Path | None,
    json_out: Path | None,
    page: Path | None,
    dry_run: bool,
    **given: Any,
) -> None:
    """Remove channels, attention heads, neurons or layers from MODEL and prove the result."""
    options, inputs = _options(given)
    if dry_run:
        for asked, name in ((options.max_drop, "--max-drop"), (options.latency, "--latency")):
            if asked is not None:
                raise UserError(f"{name} makes and measures models, which --dry-run does not; leave one out")
        with _Progress() as progress:
            found = pipeline.make_plan(model, options, inputs, progress)
        click.echo(found.to_json(), nl=False)
        return
    target = output or model.with_name(f"{model.stem}.pruned.onnx")
    files = (target, plan_out, json_out, page, inputs.table)
    _protect((model, inputs.data, inputs.judge), files, binary=True)
    with _Progress() as progress:
        result = pipeline.prune(model, options, progress, inputs)
    _write(
        result, target, (plan_out, lambda _: result.plan.to_json()), (json_out, _report), (page, html.page)
    )


@main.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where to write the plan ('-': to stdout).")
@_choices
def plan(model: Path, output: Path, **given: Any) -> None:
    """Decide what to remove from MODEL and write it down."""
    options, inputs = _options(given)
    _protect((model, inputs.data), (output,))
    opened = open_model(model)
    _protect(tuple(opened.files), (output,))
    with _Progress() as progress:
        found = pipeline.make_plan(opened, options, inputs, progress)
    _write_text(output, found.to_json())


@main.command()
@click.argument("model", type=FILE)
@click.argument("plan", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where to write the pruned model.")
@_data("--data", text="The data that the plan was made with, where it repairs; with the same --preprocess.")
@_preprocess
@click.option(
    "--repair",
    type=click.Choice(("plan", "none")),
    default="plan",
    show_default=True,
    help="Repair as the plan says, or make the cut alone.",
)
@_json_out
@_page
def apply(
    model: Path,
    plan: Path,
    output: Path,
    data: str | None,
    preprocess: Preprocess | None,
    repair: str,
    json_out: Path | None,
    page: Path | None,
) -> None:
    """Replay PLAN on the MODEL it was made for."""
    _protect((model, plan, data), (output, json_out, page), binary=True)
    edits = Plan.load(plan)
    with _Progress() as progress:
        inputs = Inputs(data, preprocess=preprocess)
        result = pipeline.apply_plan(model, edits, progress, inputs, cut_only=repair == "none")
    _write(result, output, (json_out, _report), (page, html.page))


@main.command()
@click.argument("model", type=FILE)
@click.option("--why", "name", metavar="NAME", help="Explain the axes of one node or tensor.")
@_as_json
def inspect(model: Path, name: str | None, as_json: bool) -> None:
    """Show the groups of MODEL, and what is pinned and why."""
    blocks = Blocks(DependencyGraph(open_model(model)))
    if name is not None:
        lines = why(blocks, name)
        click.echo(_json(lines) if as_json else "\n".join(map(printable, lines)))
    elif as_json:
        click.echo(_json(Inspection(blocks).as_dict()))
    else:
        Inspection(blocks).print(_console())


@main.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where to write the folded model.")
def fold(model: Path, output: Path) -> None:
    """Exact canonicalisation of MODEL: BatchNorm into weights, constants evaluated."""
    _protect((model,), (output,), binary=True)
    folded = pipeline.fold(open_model(model))
    folded.save(output)
    _console().print(f"{output}: {folded.nodes} nodes folded away", soft_wrap=True)


@main.command()
@click.argument("model", type=FILE)
@_data("--data", text="Inputs that give the ranges, as for shrink.", required=True)
@_samples(SAMPLES)
@_preprocess
@click.option("-o", "--output", type=FILE, help="Where to write (default: MODEL.quantised.onnx).")
@_where(f"Where it is to run: {', '.join(quantisation.QUANTISED_FOR)}.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave a node or weight of this name in float (repeatable).",
)
@_data("--eval", "judge", text="Data to measure the metric on (default: --data).")
@_metric("what fits the data")
@click.option("--original", type=FILE, help="The model before pruning, for a column of its own.")
@_seed("the samples drawn")
@_json_out
def quantize(
    model: Path,
    data: str,
    output: Path | None,
    where: str,
    original: Path | None,
    json_out: Path | None,
    **given: Any,
) -> None:
    """Hand MODEL to onnxruntime's quantiser: int8 in QDQ format, as TARGET takes it."""
    place = output or model.with_name(f"{model.stem}.quantised.onnx")
    _protect((model, original, data, given["judge"]), (place, json_out), binary=True)
    with _Progress() as progress:
        result = quantisation.quantise(model, data, where, original=original, progress=progress, **given)
    _write(result, place, (json_out, _report))


@main.command()
@click.argument("original", type=FILE)
@click.argument("candidate", type=FILE)
@click.option("--plan", "plan_file", type=FILE, help="The plan that made CANDIDATE, to check equivalence.")
@_data("--data", text="Inputs, with labels or without, to compare both models on.")
@_samples(None)
@_preprocess
@_metric("what fits the labels, where there are any")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="Also compare there (repeatable; all: every one that is here).",
)
@_threads
@_page
@_as_json
@click.pass_context
def validate(
    ctx: click.Context,
    /,
    original: Path,
    candidate: Path,
    plan_file: Path | None,
    page: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Judge CANDIDATE against ORIGINAL: structure, equivalence, outputs on data, latency.

    Of a repaired CANDIDATE its plan's cut is proven, and that nothing but weights and biases differs from it.
    Exits 1 if CANDIDATE is broken or not what the plan says.
    """
    _protect((original, candidate, plan_file, given["data"]), (page,))
    if page is not None:
        _protect([file for model in (original, candidate) for file in open_model(model).files], (page,))
    result = api.validate(original, candidate, Plan.load(plan_file) if plan_file else None, **given)
    if page is not None:
        _write_text(page, html.page({"model": f"{candidate}", **result.as_dict()}))
    if as_json:
        click.echo(_json(result.as_dict()))
    elif page != STDOUT:
        result.print(_console())
    if not result.passed:
        ctx.exit(1)


@main.command()
@click.argument("model", type=FILE)
@_data("--data", text="Inputs, with labels or without, as for shrink.", required=True)
@_samples(survey.SAMPLES)
@_preprocess
@click.option("-o", "--output", type=FILE, required=True, help="Where to write JSON ('-': to stdout).")
@click.option(
    "--ratios",
    type=_ratios,
    default=",".join(map(str, survey.RATIOS)),
    show_default=True,
    metavar="R,...",
    help="Shares of each group that go.",
)
@_metric("what fits the labels; without labels, the error of the outputs")
@_criterion
@_seed("the samples drawn, of --criterion random")
def sensitivity(model: Path, data: str, output: Path, preprocess: Preprocess | None, **given: Any) -> None:
    """Measure what MODEL loses when one group or residual block alone is cut.

    The file is written while the survey goes on: after an interruption the same command continues it.
    """
    _protect((model, data), (output,))
    opened = open_model(model)
    _protect(tuple(opened.files), (output,))
    path = None if output == STDOUT else output
    asked = survey.Asked(**given)
    try:
        with _Progress() as progress:
            found = survey.survey(opened, data, asked, preprocess, path, progress)
    except KeyboardInterrupt:
        if path is not None and path.exists():
            text = f"interrupted; {path} holds what was measured, and the same command goes on from there"
            raise KeyboardInterrupt(text) from None
        raise
    if path is None:
        click.echo(found.to_json(), nl=False)
        return
    found.print(_console())
    _console().print(f"wrote {path} ({len(found.entries)} cuts measured)", soft_wrap=True)


@main.command()
@click.argument("original", type=FILE)
@click.argument("candidates", type=FILE, nargs=-1, required=True)
@click.option(
    "--target",
    "names",
    multiple=True,
    default=("cpu",),
    show_default=True,
    metavar="TARGET",
    help="Where (repeatable; all: every one that is here).",
)
@_threads
@_as_json
@click.pass_context
def bench(
    ctx: click.Context,
    original: Path,
    candidates: tuple[Path, ...],
    names: tuple[str, ...],
    threads: int,
    as_json: bool,
) -> None:
    """Measure CANDIDATES beside ORIGINAL on targets: who runs their nodes, what comes out, how long it takes.

    Both are alive in one process and run in turns. Exits 1 where a candidate is refused, or computes
    something else there than on the CPU; how far it is from ORIGINAL is for `validate` to say.
    """
    found = api.bench(original, candidates, names, threads=threads)
    if as_json:
        click.echo(_json([{"candidate": f"{path}", **one.as_dict()} for path, one in found]))
    else:
        console = _console()
        for path, one in found:
            console.print(f"{path} on {one}", soft_wrap=True)
            if one.timing is not None:
                console.print(one.timing.table())
    if any(one.broken for _, one in found):
        ctx.exit(1)


@main.command()
@click.argument("model", type=FILE)
@_where("On which; see `onnxprune targets`.")
@click.option(
    "-o", "--output", type=FILE, required=True, help="Table to write, or to add to: for --latency-table."
)
@_as_json
def measure(model: Path, where: str, output: Path, as_json: bool) -> None:
    """Time the parts of MODEL on a target, so that `shrink --latency` can be run where the target is not.

    An interrupted run goes on where it was.
    """
    if output == STDOUT:
        raise UserError("-o -: a table is a file that is added to; give a path")
    _protect((model,), (output,))
    try:
        with _Progress() as progress:
            found = pipeline.measure(model, where, output, progress)
    except KeyboardInterrupt:
        if output.exists():
            text = f"interrupted; {output} holds what was measured, and the same command goes on from there"
            raise KeyboardInterrupt(text) from None
        raise
    if as_json:
        click.echo(_json(found.as_dict()))
        return
    for line in found.lines():
        click.echo(printable(line))
    _console().print(f"wrote {output}", soft_wrap=True)


@main.command()
@click.argument("model", type=FILE)
@click.option(
    "--target", "name", required=True, metavar="TARGET", help="Whose compiler; see `onnxprune targets`."
)
@click.option("-o", "--output", type=FILE, help="Where to write the engine (default: build and throw away).")
@_as_json
def build(model: Path, name: str, output: Path | None, as_json: bool) -> None:
    """Compile MODEL for a target, and show the command lines that do the same with its own tools."""
    if output is not None:
        _protect((model,), (output,), binary=True)
    found = api.build(model, name, output)
    if as_json:
        click.echo(_json(found))
        return
    for line in found["objections"]:
        click.echo(f"note: {printable(line)}")
    for key, value in found["built"].items():
        click.echo(printable(f"{key}: {value}"))
    for command in found["commands"]:
        click.echo(printable(command))


@main.command("targets")
@_as_json
def targets_(as_json: bool) -> None:
    """List the targets: which run here, which only build, what the others need, and what each aligns to."""
    found = targets.described()
    if as_json:
        click.echo(_json(found))
        return
    table = Table()
    for name in ("target", "here", "with", "blocks of channels", "needs"):
        table.add_column(name, overflow="fold")
    for one in found:
        reach = one["reach"] if one["timed"] or one["reach"] != "runs" else "runs, not timed"
        by = ", ".join(filter(None, (one["version"], one["device"])))
        table.add_row(one["target"], reach, by, f"{Alignment(**one['alignment'])}", one["missing"])
    _console().print(table)


# --------------------------------------------------------------------------------------------- output


def _protect(inputs: Sequence[object], targets: Sequence[Path | None], binary: bool = False) -> None:
    """Refuse to overwrite an input, to write two things to one place, or where nothing can be written; before
    any work is done. inputs: paths, and what data options were given, which may be files. binary: the first target is a
    model."""
    sources = [one for one in inputs if isinstance(one, Path)]
    named = (one for one in inputs if isinstance(one, str))
    sources += [Path(one) for one in named if os.path.exists(one)]  # noqa: PTH110  what cannot be a path is none
    given = [target for target in targets if target is not None]
    if binary and given[0] == STDOUT:
        raise UserError("-o -: a model is not written to standard output; give a path")
    _distinct(given)
    for target in given:
        if target == STDOUT or not all(
            source.exists() for source in sources
        ):  # a missing input is said later
            continue
        if any(same_file(target, source) for source in sources):
            raise UserError(f"{target}: the output is the input; choose another path")
        if not target.parent.is_dir():
            raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")
        if not _allowed(target.parent, os.W_OK) and all(_allowed(source, os.R_OK) for source in sources):
            raise UserError(
                f"{target}: cannot write to the folder {target.parent} (Permission denied); choose another path"
            )


def _distinct(targets: Sequence[Path]) -> None:
    """Refuse to write two things to one place."""
    places: set[Path] = set()
    for target in targets:
        place = target if target == STDOUT else target.resolve()
        if place in places:
            raise UserError(f"{target}: two outputs have the same path; give each its own")
        places.add(place)


def _allowed(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _write(
    made: Result | Quantised, model: Path, *told: tuple[Path | None, Callable[[dict[str, Any]], str]]
) -> None:
    """Everything or nothing: the files take their places together, at the end.

    told  what is written besides the model: where (None: nowhere), and the text as a function of the report
    """
    texts = {path: text for path, text in told if path is not None}
    files = [path for path in texts if path != STDOUT]
    _protect(tuple(made.sources), files)
    _distinct([*made.data_files(model), *files])
    with contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(atomic(path)) for path in files]
        written = made.save(model)
        facts = {**made.report.as_dict(), "output": str(model), "file_bytes": written}
        contents = {path: text(facts) for path, text in texts.items()}
        for path, temporary in zip(files, temporaries, strict=True):
            temporary.write_text(contents[path], encoding="utf-8")
    if STDOUT in contents:
        click.echo(contents[STDOUT], nl=False)
        return
    made.report.print(_console())
    _console().print(f"wrote {model} ({written:,} bytes)", soft_wrap=True)


def _report(facts: dict[str, Any]) -> str:
    return _json(facts) + "\n"


def _write_text(path: Path, text: str) -> None:
    if path == STDOUT:
        click.echo(text, nl=False)
        return
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that every parser reads: infinities and NaN become null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def _console() -> Console:
    return PlainConsole(width=None if sys.stdout.isatty() else 120)


class _Progress:
    """Names the stage at work on a terminal, with a bar and a share where its length is known; silent in a pipe."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]:>4}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> job.Progress:
        if self._bar is None:
            return job.quiet
        self._bar.start()
        self._task = self._bar.add_task("", total=None, done="")
        return self._show

    def _show(self, stage: str, share: float | None) -> None:
        assert self._bar is not None
        done = None if share is None or share >= 1 else share  # after the last part something else goes on
        total, text = (None, "") if done is None else (1.0, f"{done:.0%}")
        self._bar.update(self._task, description=stage, total=total, completed=done or 0.0, done=text)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

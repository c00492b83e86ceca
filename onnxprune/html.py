"""What a run came to, as one page for a browser: nothing is fetched, no script runs, and it is read on paper too.

The page is made from what `Report.as_dict` and `Validation.as_dict` give, or from the JSON that was kept of them; its
keys are listed in docs/report.md. Whatever comes from a model is text that nobody vouches for: every string passes
through `_text` on its way into the page, and the page's own policy forbids scripts and requests beside that.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from onnxprune.errors import printable
from onnxprune.repair import Repaired
from onnxprune.report import COLUMNS, TITLES, Mended, counted, verdict
from onnxprune.validation.equivalence import Equivalence

SHOWN = 160  # characters of a name that are shown
OPEN = 60  # groups up to which their table is open
DEPTH = 6  # to which provenance is followed
FAINT = 1e-8  # the shortest bar of an error, as a share of an output's scale
VOID = ("meta", "link")
NAMED = {"macs": "MACs", "params": "parameters", "bytes": "weight bytes", "latency": "latency"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def page(report: Mapping[str, Any]) -> str:
    """The page of a report: of `shrink`, `apply`, `validate` or `bench`, as a dictionary.

    Sections of which the report says nothing are left out. The same report gives the same page.
    """
    targets = _targets(report)
    title = _shortened(f"{report.get('model') or 'model'}")
    made = [
        _headline(report, targets),
        _costs(report),
        _candidates(_mapping(report.get("candidates"))),
        _network(report),
        _errors(report, targets),
        _latencies(targets),
        _machines(targets),
        _notes(report),
        _provenance(report),
    ]
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = _tag(
        "head",
        _tag("meta", charset="utf-8"),
        _tag("meta", http_equiv="Content-Security-Policy", content=policy),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("meta", name="color-scheme", content="light dark"),
        _tag("title", f"{title}: onnxprune report"),
        _tag("link", rel="icon", href="data:,"),
        Html(f"<style>{STYLE}</style>"),
    )
    body = _tag(
        "body",
        _tag("header", _tag("p", "onnxprune report", class_="kind"), _tag("h1", _name(title))),
        _tag("main", *made),
    )
    return f"<!DOCTYPE html>\n{_tag('html', head, body, lang='en')}\n"


# What goes into a page


def _text(text: object) -> str:
    """Text as markup: control and direction marks are spelt out, and nothing of it is a tag or ends an attribute."""
    return text if isinstance(text, Html) else escape(printable(f"{text}"))


def _tag(kind: str, /, *children: object, **attributes: object) -> Html:
    """An element; an underscore in an attribute's name is a hyphen, and None is no attribute, or no child."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if kind in VOID:
        return Html(f"<{kind}{given}>")
    inside = "".join(_text(child) for child in children if child is not None)
    return Html(f"<{kind}{given}>{inside}</{kind}>")


def _shortened(text: str, limit: int = SHOWN) -> str:
    """The beginning and the end of what is longer."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]} ({len(text):,} characters)"


def _name(text: object) -> Html:
    """A name from a model, whose direction turns nothing round."""
    return _tag("bdi", _shortened(f"{text}"))


def _section(title: str, *children: Html | None) -> Html | None:
    """A section, where there is something in it."""
    inside = [child for child in children if child is not None]
    return _tag("section", _tag("h2", title), *inside) if inside else None


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table whose first column names the rows; it scrolls by itself where it is too wide."""
    head = _tag("tr", *(_tag("th", column, scope="col") for column in columns))
    body = (
        _tag("tr", _tag("th", row[0], scope="row"), *(_tag("td", cell) for cell in row[1:])) for row in rows
    )
    table = _tag("table", _tag("caption", caption), _tag("thead", head), _tag("tbody", *body))
    return _tag("div", table, class_="wide", role="region", tabindex="0", aria_label=caption)


def _figure(label: str, height: int, shapes: Iterable[Html], table: Html, *, opened: bool = False) -> Html:
    """A plot of the page's width, with what it says in a sentence and as a table."""
    svg = _tag("svg", *shapes, role="img", aria_label=label, width="100%", height=height)
    details = _tag("details", _tag("summary", "as a table"), table, **({"open": ""} if opened else {}))
    return _tag("figure", _tag("figcaption", label), svg, details)


def _bar(share: float) -> Html:
    """A bar in a table, whose number stands beside it."""
    return _tag(
        "svg",
        _tag("rect", class_="track", width="100%", height="100%", rx=2),
        _tag("rect", class_="kept", width=_percent(min(max(share, 0.0), 1.0)), height="100%", rx=2),
        class_="bar",
        role="img",
        aria_label=f"{share:.1%}",
        width="100%",
        height=10,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _label(text: str, x: float, y: float, anchor: str = "start") -> Html:
    return _tag("text", text, x=_percent(x), y=f"{y:g}", text_anchor=anchor)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Html:
    return _tag("line", class_=kind, x1=_percent(x1), y1=f"{y1:.1f}", x2=_percent(x2), y2=f"{y2:.1f}")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()


def _number(value: object) -> float | None:
    """A number that can be drawn; None for what is none, and for NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _restored(error: Any) -> Any:
    """An error as it was before JSON, which has no infinity, made it null."""
    return math.inf if error is None else error


def _shown(value: object, form: str = "{:.4g}") -> str:
    """A number in a cell; where there is none, a dash."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return form.format(value) if math.isfinite(value) else f"{value}"


def _size(value: object) -> str:
    """Bytes for people."""
    number = _number(value)
    if number is None:
        return "-"
    for unit in ("bytes", "kB", "MB"):
        if abs(number) < 1000:
            return f"{number:.0f} bytes" if unit == "bytes" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _change(pair: object, form: str = "{:.4g}") -> str | None:
    """`before` and `after` in words."""
    before, after = _mapping(pair).get("before"), _mapping(pair).get("after")
    if before is None and after is None:
        return None
    return f"{_shown(before, form)} → {_shown(after, form)}"


# Sections


def _targets(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The targets; of a report that has none the one whose time it gives."""
    targets = [entry for entry in _list(report.get("targets")) if isinstance(entry, Mapping)]
    if not targets and report.get("latency"):
        return [{"target": "cpu", "title": "onnxruntime, CPU", "timing": report["latency"]}]
    return targets


def _title(target: Mapping[str, Any]) -> str:
    return _shortened(f"{target.get('title') or target.get('target') or 'target'}")


def _headline(report: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> Html:
    tiles = [
        _tile("Smaller", *_smaller(report)),
        _tile("Faster", *_faster(targets)),
        _tile("Accuracy", *_accuracy(report)),
        _tile("Proof", *_proof(report)),
    ]
    problems = [_tag("li", _shortened(f"{one}", 1000)) for one in _list(report.get("problems"))]
    broken = _tag("div", _tag("p", "Broken:"), _tag("ul", *problems), class_="broken") if problems else None
    judged = [
        _tag("li", _tag("strong", _name(_title(target))), f": {_verdict(target)}")
        for target in targets
        if _verdict(target)
    ]
    verdicts = _tag("ul", *judged, class_="verdicts") if judged else None
    return _tag("section", _tag("h2", "In short"), broken, _tag("div", *tiles, class_="tiles"), verdicts)


def _tile(title: str, figure: str, words: object) -> Html:
    return _tag(
        "div",
        _tag("h3", title),
        _tag("p", figure, class_="figure"),
        _tag("p", words, class_="words"),
        class_="tile",
    )


def _smaller(report: Mapping[str, Any]) -> tuple[str, str]:
    before, after = _mapping(report.get("before")), _mapping(report.get("after"))
    weights, left = _number(before.get("bytes")), _number(after.get("bytes"))
    if not weights or left is None:
        for target in _targets(report):
            size = _mapping(target.get("size"))
            weights, left = _number(size.get("before")), _number(size.get("after"))
            if weights and left is not None:
                return f"{left / weights:.1%}", f"of the file: {_size(weights)} → {_size(left)}"
        return "not counted", "this report has no sizes"
    work, rest = _number(before.get("macs")), _number(after.get("macs"))
    macs = f"; MACs {rest / work:.1%}" if work and rest is not None else ""
    return f"{left / weights:.1%}", f"of the weights: {_size(weights)} → {_size(left)}{macs}"


def _faster(targets: Sequence[Mapping[str, Any]]) -> tuple[str, object]:
    for target in targets:
        timing = _mapping(target.get("timing"))
        ratio = _number(timing.get("ratio"))
        if ratio:
            busy = "; the machine was busy, so this says little" if timing.get("contended") else ""
            change = _change(timing, "{:.3g}")
            return (
                f"{1 / ratio:.2f} times as fast",
                _tag("span", _name(_title(target)), f": {change} ms{busy}"),
            )
    return "not measured", "no target was timed"


def _accuracy(report: Mapping[str, Any]) -> tuple[str, object]:
    quality = _mapping(report.get("quality"))
    if quality:
        words = _tag("span", _name(quality.get("metric")), " on ", _name(quality.get("data")))
        return _change(quality) or "-", words
    for entry in _list(report.get("agreement")):
        share = _number(_mapping(entry).get("top1"))
        if share is not None:
            return f"{share:.2%}", _tag(
                "span", "of decisions as the original's, output ", _name(entry["output"])
            )
    errors = [
        error
        for entry in _list(report.get("drift"))
        if (error := _number(_mapping(entry).get("error"))) is not None
    ]
    if errors:
        return "not measured", f"outputs moved by {max(errors):.2g} of their scale on random inputs"
    return "not measured", "no data was given to measure on"


def _proof(report: Mapping[str, Any]) -> tuple[str, str]:
    if _list(report.get("problems")):
        return "broken", "see above"
    found = _equivalence(report)
    if found is None:
        return "not checked", "no plan was given to check against"
    word = "equal" if found.passed else "DIFFERENT"
    return word, verdict(found).splitlines()[0]


def _equivalence(report: Mapping[str, Any]) -> Equivalence | None:
    given = _mapping(report.get("equivalence"))
    if not given:
        return None
    return Equivalence(
        _restored(given["error"]),
        given["tolerance"],
        tuple(given["outputs"]),
        tuple(given["sizes"]),
        tuple(given["notes"]),
    )


def _verdict(target: Mapping[str, Any]) -> str:
    """What a target's entry comes to, in words."""
    if target.get("failed"):
        return _shortened(f"{target['failed']}", 1000)
    if target.get("agrees") is False:
        return "outputs are WRONG"
    if target.get("built"):
        return "builds"
    return _shortened(f"{_mapping(target.get('timing')).get('verdict') or ''}", 100)


def _costs(report: Mapping[str, Any]) -> Html | None:
    before, after = _mapping(report.get("before")), _mapping(report.get("after"))
    rows = []
    for column in COLUMNS:
        first, last = _number(before.get(column)), _number(after.get(column))
        if first is not None and last is not None:
            share = last / first if first else 1.0
            rows.append(
                (TITLES[column], f"{first:,.0f}", f"{last:,.0f}", _tag("span", f"{share:.1%}", _bar(share)))
            )
    changes = [
        (role, f"{change['before']:,}", f"{change['after']:,}", f"{change['groups']:,}")
        for role, change in _mapping(report.get("changes")).items()
    ]
    return _section(
        "Before and after",
        _table("What the model has and does", ("", "before", "after", "kept"), rows) if rows else None,
        _table("Units, by what they are", ("", "before", "after", "groups cut"), changes)
        if changes
        else None,
    )


def _candidates(given: Mapping[str, Any]) -> Html | None:
    """Models that were looked at, by what they cost and what they are worth."""
    points = [
        _Candidate(cost, value, bool(point.get("chosen")), _number(point.get("predicted")))
        for point in map(_mapping, _list(given.get("points")))
        if (cost := _number(point.get("cost"))) is not None
        and (value := _number(point.get("value"))) is not None
    ]
    if not points:
        return None
    points.sort(key=lambda one: one[:3])
    higher = given.get("better") != "lower"
    best = _front(points, higher)
    spent = NAMED.get(f"{given.get('cost')}", _shortened(f"{given.get('cost', 'cost')}", 40))
    worth = _shortened(f"{given.get('value', 'value')}", 40)
    original, limit = _number(given.get("original")), _number(given.get("limit"))
    marked = [mark for mark in (original, limit) if mark is not None]
    xs, ys = _scale([one.cost for one in points]), _scale([one.value for one in points] + marked)
    height, bottom = 260, 225

    def at(x: float, y: float) -> tuple[float, float]:
        return 0.14 + 0.8 * (x - xs[0]) / (xs[1] - xs[0]), bottom - 185 * (y - ys[0]) / (ys[1] - ys[0])

    shapes = [_label(f"{worth}, {'higher' if higher else 'lower'} is better", 0, 12)]
    for y in _ticks(*ys):
        _, place = at(xs[0], y)
        shapes += [_line("grid", 0, place, 1, place), _label(f"{y:.4g}", 0, place - 3)]
    for x in _ticks(*xs):
        place, _ = at(x, ys[0])
        shapes += [
            _line("grid", place, bottom, place, bottom + 5),
            _label(f"{x:.1%}", place, bottom + 17, "middle"),
        ]
    shapes.append(_label(f"{spent} kept", 1, height - 3, "end"))
    for mark, word in ((original, "original"), (limit, "limit")):
        if mark is not None:
            _, place = at(xs[0], mark)
            shapes += [_line("mark", 0, place, 1, place), _label(word, 1, place - 3, "end")]
    for here, beyond in itertools.pairwise(best):
        left, low = at(here.cost, here.value)
        right, high = at(beyond.cost, beyond.value)
        shapes += [_line("front", left, low, right, low), _line("front", right, low, right, high)]
    for one in points:
        left, top = at(one.cost, one.value)
        kind, radius = ("chosen", 7) if one.chosen else ("point", 4)
        shapes.append(_tag("circle", class_=kind, cx=_percent(left), cy=f"{top:.1f}", r=radius))
        if one.chosen:
            side, gap = ("end", -0.03) if left > 0.6 else ("start", 0.03)
            shapes.append(_label("chosen", left + gap, top + 16, side))
    columns = {
        f"{spent} kept": [f"{one.cost:.2%}" for one in points],
        "predicted by its pieces": [
            "" if one.predicted is None else f"{one.predicted:.2%}" for one in points
        ],
        worth: [f"{one.value:.5g}" for one in points],
        "none better and cheaper": ["yes" if one in best else "" for one in points],
        "chosen": ["yes" if one.chosen else "" for one in points],
    }
    filled = {title: cells for title, cells in columns.items() if any(cells)}
    table = _table("Candidates", tuple(filled), list(zip(*filled.values(), strict=True)))
    label = f"{counted(len(points), 'candidate')}: {worth} against {spent} kept; the line joins those that none beats"
    return _section("Candidates", _figure(label, height, shapes, table))


class _Candidate(NamedTuple):
    """A model that a search has looked at; `predicted` is its cost as the times of its pieces foretell it."""

    cost: float
    value: float
    chosen: bool
    predicted: float | None


def _front(points: Sequence[_Candidate], higher: bool) -> list[_Candidate]:
    """The points that no cheaper one equals (the Pareto front)."""
    front: list[_Candidate] = []
    for point in sorted(points, key=lambda one: (one.cost, -one.value if higher else one.value)):
        if not front or (point.value > front[-1].value if higher else point.value < front[-1].value):
            front.append(point)
    return front


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """A range around values, never empty."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, wish: int = 4) -> list[float]:
    """Round numbers between two, about as many as wished."""
    raw = (high - low) / wish
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step)
    return [round((first + number) * step, 12) for number in range(math.floor(high / step) - first + 1)]


def _network(report: Mapping[str, Any]) -> Html | None:
    """What stays of each group, in the order of the graph."""
    parts = []
    for part in map(_mapping, _list(report.get("parts"))):
        before, after = _number(part.get("before")), _number(part.get("after"))
        if before and after is not None:
            name = part.get("label") or part.get("name", "")
            parts.append((name, part.get("role", ""), before, after, after / before))
    words = []
    if isinstance(report.get("groups"), int) and isinstance(report.get("groups_cut"), int):
        words.append(_tag("p", f"{report['groups_cut']:,} of {counted(report['groups'], 'group')} cut."))
    for key, title in (("skipped", "Groups left alone"), ("pinned", "Axes that cannot be cut")):
        reasons = _mapping(report.get(key))
        if reasons:
            words.append(
                _table(title, ("why", "how many"), [(_name(why), f"{n:,}") for why, n in reasons.items()])
            )
    if not parts:
        return _section("What was cut", *words)
    shapes = [_line("grid", 0, 4, 1, 4), _label("all kept", 0, 16), _line("grid", 0, 124, 1, 124)]
    width = 1 / len(parts)
    columns = []
    for number, (name, _, before, after, share) in enumerate(parts):
        tall = 120 * min(max(share, 0.0), 1.0)
        title = _tag("title", f"{_shortened(f'{name}')}: {after:,.0f} of {before:,.0f}")
        place = {"x": _percent(width * (number + 0.08)), "width": _percent(0.84 * width)}
        columns += [
            _tag("rect", class_="track", y=4, height=120, **place),
            _tag("rect", title, class_="kept", y=f"{124 - tall:.1f}", height=f"{tall:.1f}", **place),
        ]
    shapes = [*columns, _line("grid", 0, 4, 1, 4), _line("grid", 0, 124, 1, 124)]
    shapes += [_label("input", 0, 139), _label("output", 1, 139, "end")]
    rows = [
        (
            _tag("span", _name(name), " ", _tag("small", _shortened(f"{role}", 40))),
            _bar(share),
            _kept(before, after),
        )
        for name, role, before, after, share in parts
    ]
    table = _table("Groups in the order of the graph", ("group", "kept", "units"), rows)
    least = min(parts, key=lambda part: part[4])
    label = (
        f"Share of its units that each of {counted(len(parts), 'group')} keeps, from input to output; "
        f"least: {_shortened(f'{least[0]}', 80)}, {least[4]:.1%}"
    )
    return _section("What was cut", _figure(label, 144, shapes, table, opened=len(parts) <= OPEN), *words)


def _kept(before: float, after: float) -> str:
    if (before, after) == (1, 0):
        return "removed"
    return f"{after:,.0f} of {before:,.0f}"


def _errors(report: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> Html | None:
    """How far outputs are from the original's, and on targets from the CPU's, and what repair came to."""
    drift = [
        (f"{entry.get('output')}", entry.get("error"), "against the original")
        for entry in map(_mapping, _list(report.get("drift")))
    ]
    errors = list(drift)
    for target in targets:
        outputs = _mapping(target.get("errors"))
        errors += [
            (f"{output}", error, f"{_title(target)}, against the CPU") for output, error in outputs.items()
        ]
    figure = _error_plot(errors) if errors else None
    agreements = [
        (
            _name(entry.get("output")),
            _shown(entry.get("top1"), "{:.2%}"),
            _shown(entry.get("kl"), "{:.3g}"),
            _shown(entry.get("cosine"), "{:.4f}"),
            _shown(entry.get("snr"), "{:.1f}"),
        )
        for entry in map(_mapping, _list(report.get("agreement")))
    ]
    agreed = (
        _table(
            "Agreement with the original on data",
            ("output", "same class", "KL, nats", "cosine", "SNR, dB"),
            agreements,
        )
        if agreements
        else None
    )
    return _section("Outputs", figure, agreed, *_repair(report))


def _error_plot(errors: Sequence[tuple[str, object, str]]) -> Html:
    """Errors on a logarithmic scale."""
    sizes = [size for _, error, _ in errors if (size := _number(error)) is not None]
    top = math.ceil(math.log10(max([*sizes, FAINT * 10])) - 1e-9)
    low = math.log10(FAINT)
    shapes, y = [], 0.0
    for output, error, where in errors:
        size = _number(error)
        share = 1.0 if size is None else 0.0 if size <= FAINT else (math.log10(size) - low) / (top - low)
        shapes += [
            _label(f"{_clipped(output, 24)}: {_shown(error, '{:.1e}')}", 0, y + 14),
            _label(_clipped(where, 28), 1, y + 14, "end"),
            _tag("rect", class_="track", y=f"{y + 20:g}", width="100%", height=10, rx=2),
            _tag(
                "rect",
                _tag("title", f"{_shortened(output)}, {where}: {_shown(error, '{:.1e}')}"),
                class_="bad" if size is None else "kept",
                y=f"{y + 20:g}",
                width=_percent(share),
                height=10,
                rx=2,
            ),
        ]
        y += 38
    shapes += [_label(f"{FAINT:.0e}", 0, y + 12), _label(f"1e{top:+03d}", 1, y + 12, "end")]
    rows = [(_name(output), _shown(error, "{:.2e}"), where) for output, error, where in errors]
    table = _table("Errors", ("output", "largest difference, of the scale", "where"), rows)
    label = (
        f"Largest difference of {counted(len(errors), 'output')}, as a share of the output's scale, on a "
        f"logarithmic axis; worst {max(sizes):.1e}"
        if sizes and len(sizes) == len(errors)
        else f"Largest difference of {counted(len(errors), 'output')}, on a logarithmic axis; some cannot be compared"
    )
    return _figure(label, int(y) + 18, shapes, table)


def _clipped(text: str, limit: int) -> str:
    """A name that fits into a plot on a phone."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"


def _repair(report: Mapping[str, Any]) -> list[Html]:
    given, data = _mapping(report.get("repair")), _mapping(report.get("data"))
    if "chosen" in given:  # of shrink
        layers = tuple(
            Repaired(f"{one['node']}", f"{one['method']}", one["before"], one["after"])
            for one in given["layers"]
        )
        where = f"{data.get('source')}" if data.get("measured") else "made-up inputs"
        errors = {name: _restored(error) for name, error in _mapping(given["errors"]).items()}
        said = Mended(f"{given['chosen']}", errors, layers).on(_shortened(where))
        rows = [
            (
                _name(one.node),
                _shortened(one.method, 80),
                _shown(one.before, "{:.2%}"),
                _shown(one.after, "{:.2%}"),
            )
            for one in layers
        ]
        table = _table("Lost of each layer's output", ("layer", "repair", "before", "after"), rows)
        shown = [_tag("details", _tag("summary", "repair, layer by layer"), table)] if rows else []
        return [_tag("p", said), *shown]
    if "broken" in given:  # of validate
        broken = _list(given["broken"])
        if broken:
            return [
                _tag("p", "The candidate is NOT what the plan cuts with other weights:"),
                _tag("ul", *(_tag("li", _shortened(f"{why}", 1000)) for why in broken)),
            ]
        said = (
            f"The candidate is what the plan cuts, with {given.get('repaired')} of {given.get('repairable')} weights "
            f"and biases of other values, and {given.get('added')} added."
        )
        return [_tag("p", said)]
    return []


def _range(timing: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The least and the largest ratio of any round."""
    ratios = [
        ratio
        for one in _list(timing.get("range") or timing.get("ratios"))
        if (ratio := _number(one)) is not None
    ]
    return (min(ratios), max(ratios)) if ratios else (None, None)


def _rounds(timing: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Milliseconds of each round, before and after."""
    found = []
    for entry in _list(timing.get("rounds")):
        pair = [_number(one) for one in _list(entry)[:2]]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
            found.append((pair[0], pair[1]))
    return found


def _latencies(targets: Sequence[Mapping[str, Any]]) -> Html | None:
    return _section("Latency", *(_latency(target) for target in targets if _mapping(target.get("timing"))))


def _latency(target: Mapping[str, Any]) -> Html:
    """Each round as two dots, one for either model, on one axis."""
    timing = _mapping(target["timing"])
    low, high = _range(timing)
    ratio = _shown(timing.get("ratio"), "{:.3f}")
    spread = f" (rounds {low:.3f} to {high:.3f})" if low is not None and high is not None else ""
    said = f"{_change(timing, '{:.4g}') or '-'} ms, ratio {ratio}{spread}"
    facts = [_tag("p", said)]
    if timing.get("contended"):
        why = timing["contended"]
        facts.append(
            _tag(
                "p",
                f"Contended: {_shortened(f'{why}', 500) if isinstance(why, str) else 'the machine was busy'}.",
            )
        )
    heading = _tag("h3", _name(_title(target)))
    rounds = _rounds(timing)
    if not rounds:
        return _tag("article", heading, *facts)
    longest = max(max(pair) for pair in rounds) or 1.0
    shapes = []
    for row, word in enumerate(("before", "after")):
        times = sorted(pair[row] for pair in rounds)
        middle, y = _median(times), 50 * row
        shapes += [_label(f"{word}: median {middle:.4g} ms", 0, y + 13), _line("grid", 0, y + 30, 1, y + 30)]
        shapes += [
            _tag("circle", class_=word, cx=_percent(0.02 + 0.96 * time / longest), cy=y + 30, r=5)
            for time in times
        ]
        place = 0.02 + 0.96 * middle / longest
        shapes.append(_line("median", place, y + 20, place, y + 40))
    shapes += [_label("0 ms", 0, 112), _label(f"{longest:.4g} ms", 1, 112, "end")]
    rows = [
        (f"{number}", f"{before:.5g}", f"{after:.5g}", f"{after / before:.4f}" if before else "-")
        for number, (before, after) in enumerate(rounds, start=1)
    ]
    table = _table("Milliseconds", ("round", "before", "after", "ratio"), rows)
    label = f"{_title(target)}: the fastest run of each of {counted(len(rounds), 'round')}, before and after: {said}"
    return _tag("article", heading, *facts[1:], _figure(label, 118, shapes, table))


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _machines(targets: Sequence[Mapping[str, Any]]) -> Html | None:
    """All that is known of each target."""
    cards = []
    for target in targets:
        timing, state = _mapping(target.get("timing")), _mapping(target.get("state"))
        agrees = target.get("agrees")
        facts: list[tuple[str, object]] = [
            ("target", target.get("target")),
            ("verdict", _verdict(target)),
            ("here", state.get("reach")),
            ("version", state.get("version")),
            ("device", state.get("device")),
            ("needs", state.get("missing")),
            ("outputs agree", {True: "yes", False: "NO"}[agrees] if isinstance(agrees, bool) else None),
            ("largest error", _worst(target.get("errors"))),
            ("the original's", _worst(target.get("original_errors"))),
            (
                "limit",
                None if target.get("agrees") is None else _shown(target.get("limit"), "{:.1e} of scale"),
            ),
            ("metric there", _change(target.get("quality"))),
            ("CPU time of wall time", _shares(timing.get("cpu"))),
            ("memory", _sizes(target.get("memory"))),
            ("file", _sizes(target.get("size"))),
            ("nodes", target.get("nodes")),
            ("elsewhere", target.get("elsewhere")),
            ("built", target.get("built")),
            ("settings", target.get("settings")),
        ]
        rows = [_fact(key, value) for key, value in facts if value not in (None, "", [], {})]
        notes = [_tag("li", _shortened(f"{note}", 1000)) for note in _list(target.get("objections"))]
        cards.append(
            _tag(
                "article",
                _tag("h3", _name(_title(target))),
                _tag("dl", *rows),
                _tag("ul", *notes) if notes else None,
                class_="card",
            )
        )
    return _section("Targets", *cards)


def _worst(errors: object) -> str | None:
    """The largest error of any output."""
    sizes = [error for error in _mapping(errors).values() if isinstance(error, int | float)]
    return f"{max(sizes):.1e} of scale" if sizes else None


def _shares(value: object) -> object:
    """A share for either model."""
    return _change(value, "{:.0%}")


def _sizes(value: object) -> object:
    """Bytes of both models."""
    given = _mapping(value)
    return f"{_size(given.get('before'))} → {_size(given.get('after'))}" if given else None


def _notes(report: Mapping[str, Any]) -> Html | None:
    found = _equivalence(report)
    notes = [*_list(report.get("notes")), *(found.notes if found is not None else ())]
    if not notes:
        return None
    return _section("Notes", _tag("ul", *(_tag("li", _shortened(f"{note}", 1000)) for note in notes)))


def _provenance(report: Mapping[str, Any]) -> Html | None:
    """Where it came from, and what it takes to get it again."""
    facts = dict(_mapping(report.get("provenance")))
    for key, title in (("data", "data"), ("seconds", "seconds")):
        if report.get(key):
            facts[title] = report[key]
    return (
        _section("Provenance", _tag("dl", *(_fact(key, value) for key, value in facts.items())))
        if facts
        else None
    )


def _fact(key: object, value: object, depth: int = 0) -> Html:
    """A name and what it stands for, however deep."""
    term = _tag("dt", _name(key))
    if isinstance(value, Mapping) and value and depth < DEPTH:
        inside: object = _tag("dl", *(_fact(k, v, depth + 1) for k, v in value.items()))
    elif _list(value):
        inside = _shortened(", ".join(f"{one}" for one in _list(value)), 2000)
    elif value is None or value in ((), [], {}):
        inside = "-"
    else:
        inside = (
            {True: "yes", False: "no"}[value] if isinstance(value, bool) else _shortened(f"{value}", 2000)
        )
    return _tag("div", term, _tag("dd", inside))


STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f4f6f8;--ink:#1a1d21;--soft:#4d545c;--line:#cbd1d8;
--track:#dfe4ea;--kept:#0b5cad;--other:#6b7280;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1e2328;--ink:#e8eaed;--soft:#b3bbc4;--line:#48515a;
--track:#343c44;--kept:#7db7ff;--other:#9aa4ae;--bad:#ff9a90}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
bdi{white-space:normal;overflow-wrap:anywhere}
th,td{overflow-wrap:normal}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 1rem}
h2{font-size:1.25rem;margin:2rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1rem 0 .25rem}
p,ul,dl{margin:.5rem 0}
ul{padding-left:1.25rem}
li,dd,td,th,p{unicode-bidi:isolate}
.kind,figcaption,caption,dt,small,.words{color:var(--soft)}
.kind{margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,12rem),1fr));gap:.75rem}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem;min-width:0}
.tile h3,.card h3{margin-top:0}
.tile p{margin:0}
.figure{font-size:1.35rem;font-weight:600;line-height:1.3}
.words,figcaption,caption,small,summary,dl{font-size:.875rem}
.broken{border:2px solid var(--bad);border-radius:.5rem;padding:.25rem .75rem;margin-bottom:.75rem}
.card{margin:.75rem 0}
figure{margin:.75rem 0}
figcaption{margin-bottom:.5rem}
svg{display:block;overflow:hidden}
svg text{fill:var(--ink);stroke:var(--page);stroke-width:3px;paint-order:stroke;font-size:12px;unicode-bidi:isolate}
.track{fill:var(--track)}
.kept,.point,.after{fill:var(--kept)}
.before{fill:var(--other)}
.bad{fill:var(--bad)}
.chosen{fill:var(--page);stroke:var(--kept);stroke-width:4}
.before,.after{fill-opacity:.75}
.grid{stroke:var(--line)}
.front,.median{stroke:var(--kept);stroke-width:2}
.median{stroke:var(--ink)}
.mark{stroke:var(--other);stroke-dasharray:4 4}
.bar{min-width:3rem;margin-top:.2rem}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--soft);padding:.25rem 0}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%;margin:.5rem 0;font-variant-numeric:tabular-nums}
td{white-space:nowrap}
caption{text-align:left;padding:.25rem 0}
th,td{padding:.35rem .5rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;font-weight:400}
th:first-child{text-align:left;padding-left:0}
thead th{color:var(--soft);font-size:.875rem;vertical-align:bottom}
dl>div{display:grid;grid-template-columns:minmax(0,11rem) minmax(0,1fr);gap:0 .75rem;padding:.2rem 0;
border-bottom:1px solid var(--line)}
dl dl>div:last-child{border-bottom:0}
dd{margin:0;min-width:0}
dd>dl{margin:0}
:focus-visible{outline:2px solid var(--kept);outline-offset:2px}
@media (max-width:30rem){body{padding:.75rem}th,td{padding:.3rem .25rem;font-size:.8125rem}
dl>div{grid-template-columns:minmax(0,1fr)}dd>dl{padding-left:.75rem}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff;--ink:#000;--soft:#333;--line:#999;--track:#ddd;
--kept:#0b5cad;--other:#6b7280;--bad:#b3261e}
body{max-width:none;padding:0}.wide{overflow:visible}.tile,.card,figure,tr{break-inside:avoid}
h2,h3{break-after:avoid}svg{print-color-adjust:exact;-webkit-print-color-adjust:exact}
summary{display:none}details::details-content{content-visibility:visible;display:block;block-size:auto}}
""".strip()

"""The page of a report: what it says, that it is safe, and that it reads in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx
import pytest

from models.architectures import ARCHITECTURES
from onnxprune import api, shrink
from onnxprune.html import page
from tests.browser import NoBrowser, Page, browser

HOSTILE = "<script>alert(1)</script>\"'&\u202e" + "x" * 10_000


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reports")
    path = folder / "original.onnx"
    onnx.save(ARCHITECTURES["mobilenet_v2"](width=0.5, image=32, classes=10), path)
    result = shrink(path, 0.5, criterion="l2", repair="none", targets=["cpu"], allow_slower=True)
    small = folder / "small.onnx"
    result.save(small)
    validated = api.validate(path, small, result.plan, targets=["cpu"])
    return {
        "shrink": json.loads(json.dumps(result.report.as_dict())),
        "validate": json.loads(json.dumps(validated.as_dict())),
    }


class Checker(HTMLParser):
    """Open elements, and what could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.headings: list[int] = []
        self.outside: list[str] = []
        self.labels = 0
        self.plots = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.scripts += tag == "script"
        self.scripts += any(name.startswith("on") for name in given)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        for name in ("src", "href", "action", "data"):
            if given.get(name) not in (None, "data:,"):
                self.outside.append(f"{given[name]}")
        if tag == "svg":
            self.plots += 1
            self.labels += bool(given.get("aria-label")) or given.get("aria-hidden") == "true"
        if tag not in ("meta", "link", "br", "img", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


@pytest.mark.parametrize("kind", ["shrink", "validate"])
def test_a_page_stands_alone(kind: str, reports: dict[str, dict[str, Any]]) -> None:
    text = page(reports[kind])
    assert page(reports[kind]) == text
    found = checked(text)
    assert found.scripts == 0
    assert found.outside == []
    assert found.headings[0] == 1
    assert all(b <= a + 1 for a, b in zip(found.headings, found.headings[1:], strict=False))
    assert found.plots > 0
    assert found.labels == found.plots
    assert "onnxruntime, CPU" in text


def test_names_are_not_trusted(reports: dict[str, dict[str, Any]]) -> None:
    def spoilt(value: Any) -> Any:
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, list):
            return [spoilt(one) for one in value]
        if isinstance(value, dict):
            return {key: spoilt(one) for key, one in value.items()}
        return value

    for report in reports.values():
        text = page(spoilt(report))
        assert checked(text).scripts == 0
        assert "<script>" not in text
        assert "\u202e" not in text
    assert checked(page({"model": HOSTILE, "notes": [HOSTILE], "groups": {HOSTILE: 3}})).scripts == 0


def test_reports_that_were_kept() -> None:
    """JSON has no infinity: errors that are null there are none that pass."""
    equivalence = {"error": None, "tolerance": 1e-4, "outputs": ["y"], "sizes": [], "notes": []}
    repair = {"chosen": "ridge", "errors": {"none": None, "ridge": 0.1}, "layers": []}
    text = page({"equivalence": equivalence, "repair": repair})
    assert "DIFFERENT" in text
    assert "inf -&gt; 0.1 of their energy" in text


@pytest.mark.parametrize("error", [0.0, 2e-9, 3e-3])
def test_the_largest_error_is_told_as_it_is(error: float) -> None:
    drift = [{"output": "y", "error": error}, {"output": "z", "error": 0.0}]
    assert set(re.findall(r"worst ([0-9.e+-]+)", page({"drift": drift}))) == {f"{error:.1e}"}


@pytest.mark.parametrize("odd", [{}, {"model": None}, {"targets": 3}, {"targets": [None, {}]}, {"notes": {}}])
def test_reports_that_say_little(odd: dict[str, Any]) -> None:
    checked(page(odd))


@pytest.mark.parametrize(("better", "front"), [("higher", ["30.00%", "70.00%"]), ("lower", ["30.00%"])])
def test_candidates_of_a_search(better: str, front: list[str]) -> None:
    """The table beside the plot: which of them none beats in both, what their pieces foretold, which one was taken."""
    points = [
        {"cost": 0.5, "value": 0.8, "chosen": False, "predicted": 0.45},
        {"cost": 0.7, "value": 0.95, "chosen": True, "predicted": 0.65},
        {"cost": 0.3, "value": 0.8, "chosen": False, "predicted": 0.25},
    ]
    told = {"cost": "latency", "value": "worth", "better": better, "original": 1.0, "limit": None}

    def rows(points: list[dict[str, Any]]) -> list[dict[str, str]]:
        text = page({"candidates": {**told, "points": points}})
        head, *body = re.findall(r"<tr.*?</tr>", text[text.index("<caption>Candidates") :], re.DOTALL)
        names, *cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in (head, *body))
        return [dict(zip(names, row, strict=True)) for row in cells[: len(points)]]

    found = rows(points)
    (spent,) = (name for name in found[0] if name.endswith("kept"))
    assert [row[spent] for row in found] == ["30.00%", "50.00%", "70.00%"]
    assert [row["predicted by its pieces"] for row in found] == ["25.00%", "45.00%", "65.00%"]
    assert [row["chosen"] for row in found] == ["", "", "yes"]
    assert [row[spent] for row in found if row["none better and cheaper"]] == front
    unforeseen = [{key: value for key, value in point.items() if key != "predicted"} for point in points]
    assert "predicted by its pieces" not in rows(unforeseen)[0]


@pytest.fixture(scope="module")
def shown() -> Iterator[Page]:
    try:
        with browser() as opened:
            yield opened
    except NoBrowser as reason:
        pytest.skip(f"{reason}")


@pytest.mark.network
@pytest.mark.parametrize("kind", ["shrink", "validate"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(
    kind: str, width: int, scheme: str, shown: Page, reports: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(reports[kind]), encoding="utf-8")
    shown.size(width)
    shown.media(scheme=scheme)
    shown.open(path.as_uri())
    assert shown.messages == []
    assert [address for address in shown.requests if not address.startswith(("file:", "data:"))] == []
    assert shown.ask("document.documentElement.scrollWidth") <= width
    assert "onnxruntime, CPU" in shown.ask("document.body.innerText")
    sizes = shown.ask("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
    assert sizes
    assert shown.ask("getComputedStyle(document.body).backgroundColor") != shown.ask(
        "getComputedStyle(document.body).color"
    )

"""The benchmarks' document: tables between markers, the text around them by hand. Nothing here is timed."""

from __future__ import annotations

import pytest

from benchmarks.all import BENCHMARKS, document
from benchmarks.common import DOCUMENT, Figure, figures_table, kept, replace_block


def test_document_shows_the_kept_results() -> None:
    assert document() == DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_kept_figures_follow_from_the_results(name: str) -> None:
    results = kept(name)
    assert results is not None
    figures = BENCHMARKS[name].figures(results)
    assert [figure.passed for figure in figures] == [figure["passed"] for figure in results["figures"]]


def test_text_around_a_block_survives() -> None:
    text = "by hand\n<!-- begin a -->\nold\n<!-- end a -->\nby hand too\n"
    assert replace_block(text, "a", "new \\1") == text.replace("old", "new \\1")


def test_a_missing_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="lacks the markers of 'b'"):
        replace_block("<!-- begin a --><!-- end a -->", "b", "")


def test_a_figure_at_its_limit() -> None:
    assert Figure("share", 0.5, 0.5).passed
    assert not Figure("ratio", 1.0, 1.0, strict=True).passed
    assert "**missed**" in figures_table([Figure("share", 0.6, 0.5)])

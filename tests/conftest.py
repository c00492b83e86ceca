"""Options of the test run: heavy tests wait for `-m slow`, snapshots are rewritten on request."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.small")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots", action="store_true", help="rewrite tests/snapshots from what is found"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.markexpr:
        config.option.markexpr = "not slow"

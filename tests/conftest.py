"""Options of the test run: heavy tests wait for `-m slow` or `-m targets`, snapshots are rewritten on request; fixtures of several files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.small")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots", action="store_true", help="rewrite tests/snapshots from what is found"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not targets"


@pytest.fixture
def powerless(tmp_path: Path) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A context in which file permissions hold, even where the tests run as root."""
    temporary = Path(tempfile.gettempdir())
    on_the_way = {tmp_path: tmp_path.stat().st_mode}
    if os.geteuid() == 0:  # let others in for a while
        for path in (temporary, *tmp_path.parents, *temporary.parents):
            if path.stat().st_mode & 0o005 != 0o005:
                on_the_way[path] = path.stat().st_mode
        for path, mode in on_the_way.items():
            path.chmod(mode | 0o055)
        temporary.chmod(0o777)

    @contextmanager
    def drop() -> Iterator[None]:
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(before)

    yield drop
    for path, mode in on_the_way.items():
        path.chmod(mode)

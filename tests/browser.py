"""A real browser for tests: headless Chromium, spoken to through two pipes in the DevTools protocol.

It is the one on PATH (or named by ONNXPRUNE_BROWSER); else, on Debian and its like, the packages of
`chromium-headless-shell` are downloaded by apt-get into the cache and unpacked there: nothing is installed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
PACKAGE = "chromium-headless-shell"
SECONDS = 120.0  # that one answer may take, on a busy machine


# Chromium reads commands from descriptor 3 and answers on 4.
STARTER = """
import fcntl, os, sys
into, out = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(into, 3)
os.dup2(out, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class NoBrowser(Exception):
    """No browser can be had here, and why."""


def find() -> tuple[str, dict[str, str]]:
    """A browser, and what its environment must say. Raises `NoBrowser`."""
    named = os.environ.get("ONNXPRUNE_BROWSER")
    if named:
        return named, {}
    for program in PROGRAMS:
        if (path := shutil.which(program)) is not None:
            return path, {}
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NoBrowser("no Chromium on PATH (nor in ONNXPRUNE_BROWSER), and no apt-get to download it with")
    return _unpacked(Path(os.environ.get("ONNXPRUNE_CACHE") or Path.home() / ".cache" / "onnxprune"))


def _unpacked(cache: Path) -> tuple[str, dict[str, str]]:
    """Debian's browser in the cache."""
    folder = cache / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = folder / "root"
        if not root.exists():
            _download(folder, root)
    program = root / "usr" / "lib" / "chromium" / "chromium-headless-shell"
    folders = {path.parent for path in root.rglob("*.so*") if "chromium" not in path.parts}
    return str(program), {"LD_LIBRARY_PATH": ":".join(sorted(map(str, folders)))}


def _download(folder: Path, root: Path) -> None:
    """The packages that the system lacks, unpacked."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        for part in ("archives/partial", "lists/partial", "unpacked"):
            (work / part).mkdir(parents=True)
        options = [
            "-qq", "-y", "-o", f"Dir::Cache={work}", "-o", f"Dir::Cache::archives={work / 'archives'}",
            "-o", f"Dir::State::lists={work / 'lists'}", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root",
        ]  # fmt: skip
        for task in (["update"], ["install", "--download-only", "--no-install-recommends", PACKAGE]):
            done = subprocess.run(["apt-get", *options, *task], capture_output=True, text=True, check=False)
            if done.returncode:
                raise NoBrowser(f"apt-get {task[0]} cannot reach {PACKAGE}: {done.stderr.strip()[-300:]}")
        for archive in sorted((work / "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(work / "unpacked")], check=True)
        (work / "unpacked").rename(root)


class Page:
    """A page of the browser, and what happened on it.

    requests  addresses that were asked for, or would have been but for the page's own policy
    messages  of the console and of the log, with uncaught exceptions
    """

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out, self._rest, self._number = into, out, b"", 0
        self._session: str | None = None
        self._loads = 0
        self.requests: list[str] = []
        self.messages: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    def open(self, address: str) -> None:
        """Load a page and wait until it and its pictures are there."""
        self.requests.clear()
        self.messages.clear()
        before = self._loads
        self.call("Page.navigate", url=address)
        while self._loads == before:
            self._receive()

    def size(self, width: int, height: int = 800) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )  # fmt: skip

    def media(self, kind: str = "screen", scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def ask(self, script: str) -> Any:
        """The value of an expression, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(until - time.monotonic(), 0))
            part = os.read(self._out, 1 << 20) if ready else b""
            assert part, f"the browser says nothing ({'it ended' if ready else f'for {SECONDS:g} s'})"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, given: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loads += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(f"console: {given['args']}")
        elif method == "Runtime.exceptionThrown":
            self.messages.append(f"exception: {given['exceptionDetails']}")
        elif method == "Log.entryAdded":
            self.messages.append(f"log: {given['entry']['text']}")
        elif method == "Audits.issueAdded":
            self.messages.append(f"issue: {given['issue']}")


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser that ends with the block. Raises `NoBrowser`."""
    program, extra = find()
    theirs, into = os.pipe()
    out, answers = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            sys.executable, "-c", STARTER, str(theirs), str(answers), program, "--headless", "--no-sandbox",
            "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, pass_fds=(theirs, answers), env={**os.environ, **extra},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        try:
            yield Page(into, out)
        finally:
            os.close(into)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(out)

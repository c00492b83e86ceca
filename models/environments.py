"""Python environments of their own for tools that the project does not depend on: PyTorch, other pruners."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


class NotInstallable(Exception):
    """Packages that cannot be installed here, and why."""


def environment(cache: Path, requirements: Sequence[str]) -> Path:
    """The interpreter of an environment that holds the requirements; made in the cache if it is not there.

    Raises `NotInstallable` if pip cannot install them.
    """
    name = "-".join((requirements[0].replace("==", "-"), _digest(requirements)))
    folder = cache / "environments" / name
    interpreter, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return interpreter
    print(f"installing {', '.join(requirements)} into {folder} ...", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    command = [str(interpreter), "-m", "pip", "install", "--quiet", "--no-input", *requirements]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        said = installed.stderr.strip().splitlines()
        why = said[-1] if said else "pip failed"
        raise NotInstallable(f"{requirements[0]} cannot be installed here: {why}")
    done.touch()
    return interpreter


def _digest(requirements: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:8]

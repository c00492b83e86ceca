"""Makes the environments of targets that one `pip install` does not bring.

    python -m models.targets                     # what there is
    python -m models.targets arm64 openvino-ort  # make these; `all`: every one

They go to `targets/NAME` in the cache (ONNXPRUNE_CACHE, or ~/.cache/onnxprune), where the targets look for them;
nothing is installed, and no rights are needed. Python packages are pinned. Debian's packages (`apt-get`, of the
release of this machine) are not: a release keeps the newest build of each alone; `packages.txt` says which were taken.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from models.fetch import default_cache

NUMPY = "numpy==2.4.6"
ARM64 = ("onnxruntime==1.31.1", NUMPY)
OPENVINO = ("onnxruntime-openvino==1.24.1", NUMPY)
LITERT = ("onnx2tf==2.6.9",)
LIBRARIES = ("python3", "libstdc++6")
EMULATORS = {  # Debian moved the program in release 13
    "qemu-user-static": "usr/bin/qemu-aarch64-static",
    "qemu-user": "usr/bin/qemu-aarch64",
}
CPU = "cortex-a76"
CPU_INFO = """processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""
INTERPRETER = f"""#!/bin/sh
here=$(dirname "$(dirname "$(readlink -f "$0")")")
unset LD_PRELOAD LD_LIBRARY_PATH
export PYTHONHOME="$here/root/usr" PYTHONPATH="$here/site"
exec "$here/bin/qemu-aarch64" -cpu {CPU} -L "$here/root" "$here/root/usr/bin/python3" "$@"
"""
SWIFTSHADER = ("libvk_swiftshader.so", "libvulkan.so.1", "vk_swiftshader_icd.json")


class NotMade(Exception):
    """An environment that cannot be made here, and why."""


def make_arm64(folder: Path) -> None:
    """An ARM interpreter with onnxruntime (about 200 MB), as a program that this machine can start: `bin/python`.

    root  Debian's Python and what it needs, for arm64
    site  wheels for aarch64
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise NotMade("only on x86-64 Linux")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        archives = _packages(work / "arm64", "arm64", LIBRARIES)
        taken = [archive.name for archive in archives]
        for archive in archives:
            _unpack(archive, folder / "root")
        if not (folder / "root" / "lib").exists():  # a package that is not needed would bring these links
            (folder / "root" / "lib").symlink_to("usr/lib")
        (folder / "bin").mkdir()
        for package, program in EMULATORS.items():
            (archive,) = _packages(work / package, "", [package], alone=True)
            _unpack(archive, work / "whole")
            if (work / "whole" / program).is_file():
                shutil.copy(work / "whole" / program, folder / "bin" / "qemu-aarch64")
                taken.append(archive.name)
                break
        else:
            raise NotMade(f"none of the packages {', '.join(EMULATORS)} brings qemu for aarch64")
        _describe_cpu(folder / "root")
        python = (folder / "root" / "usr" / "bin" / "python3").readlink().name.removeprefix("python")
        for wheel in _wheels(work / "wheels", python, ARM64):
            taken.append(wheel.name)
            with zipfile.ZipFile(wheel) as content:
                content.extractall(folder / "site")
    (folder / "packages.txt").write_text("\n".join(taken) + "\n", encoding="utf-8")
    interpreter = folder / "bin" / "python"
    interpreter.write_text(INTERPRETER, encoding="utf-8")
    interpreter.chmod(0o755)
    _run([str(interpreter), "-P", "-c", "import onnxruntime"])


def _describe_cpu(root: Path) -> None:
    """Files in which onnxruntime reads what the CPU can do: those of this machine, which it would find otherwise,
    are of another kind, and it crashes."""
    online = "sys/devices/system/cpu"
    files = {"proc/cpuinfo": CPU_INFO} | {
        f"{online}/{name}": "0\n" for name in ("present", "possible", "online")
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")


def make_openvino_ort(folder: Path) -> None:
    """onnxruntime-openvino, which is an onnxruntime of its own, in an environment of its own (440 MB)."""
    venv.create(folder, with_pip=True)
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", *OPENVINO])


def make_litert(folder: Path) -> None:
    """onnx2tf and LiteRT, which pin packages of theirs, in an environment of their own (660 MB)."""
    for python in (sys.executable, "python3.14", "python3.13", "python3.12"):
        try:
            _run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 12))"])
        except NotMade:
            continue
        _run([python, "-m", "venv", str(folder)])
        _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", *LITERT])
        return
    raise NotMade("onnx2tf takes Python 3.12 or newer; there is none on PATH")


def make_swiftshader(folder: Path) -> None:
    """A Vulkan driver in software and the loader beside it, out of Debian's Chromium (6 MB): WebGPU without a GPU."""
    with tempfile.TemporaryDirectory() as name:
        (archive,) = _packages(Path(name) / "chromium", "", ["chromium-common"], alone=True)
        _unpack(archive, Path(name) / "whole")
        for file in SWIFTSHADER:
            shutil.copy(Path(name) / "whole" / "usr" / "lib" / "chromium" / file, folder / file)
    (folder / "packages.txt").write_text(f"{archive.name}\n", encoding="utf-8")


MAKERS: dict[str, Callable[[Path], None]] = {
    "arm64": make_arm64,
    "openvino-ort": make_openvino_ort,
    "litert": make_litert,
    "swiftshader": make_swiftshader,
}


def folder_of(name: str) -> Path:
    """Where an environment lies."""
    return default_cache() / "targets" / name


def make(name: str) -> Path:
    """The folder of an environment, made anew. Raises `NotMade`; what was there before then stays."""
    folder = folder_of(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".old-{name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    folder.mkdir()
    try:
        MAKERS[name](folder)
    except BaseException:
        shutil.rmtree(folder)
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _packages(work: Path, architecture: str, names: Sequence[str], *, alone: bool = False) -> list[Path]:
    """Debian packages for an architecture (default: this machine's), with all that they need unless `alone`.

    apt-get works on lists and a state of its own, in which nothing is installed.
    """
    for part in ("archives/partial", "lists/partial"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()
    options = {
        "Dir::Cache": work,
        "Dir::Cache::archives": work / "archives",
        "Dir::State::lists": work / "lists",
        "Dir::State::status": work / "status",
        "Debug::NoLocking": 1,
        "APT::Sandbox::User": "root",
    }
    if architecture:
        options |= {"APT::Architecture": architecture, "APT::Architectures": architecture}
    command = [
        "apt-get",
        "-qq",
        "-y",
        *(part for key, value in options.items() for part in ("-o", f"{key}={value}")),
    ]
    subprocess.run([*command, "update"], capture_output=True, check=False)  # other sources may not answer
    task = ["download"] if alone else ["install", "--download-only", "--no-install-recommends"]
    _run([*command, *task, *names], work / "archives")
    return sorted((work / "archives").glob("*.deb"))


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _run(["dpkg-deb", "-x", str(archive), str(folder)])


def _wheels(folder: Path, python: str, requirements: Sequence[str]) -> list[Path]:
    """Wheels for a version of Python on aarch64 Linux."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for platform_tag in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014"):
        command += ["--platform", f"{platform_tag}_aarch64"]
    _run([*command, *requirements])
    return sorted(folder.glob("*.whl"))


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotMade(f"{command[0]} is not installed; see docs/targets.md") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NotMade(f"{Path(command[0]).name}: {said[-1] if said else f'status {done.returncode}'}")


def main() -> int:
    """Make environments of targets by name."""
    parser = argparse.ArgumentParser(prog="python -m models.targets", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MAKERS)}, or all")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in (*MAKERS, "all")]:
        parser.error(f"there is no {unknown[0]}; choose from {', '.join(MAKERS)}, all")
    failures = 0
    for name in MAKERS if not names or "all" in names else dict.fromkeys(names):
        if not names:
            folder = folder_of(name)
            print(f"{name:14} {'made' if folder.exists() else 'not made'}: {folder}")
            continue
        try:
            print(f"{name:14} {make(name)}", flush=True)
        except NotMade as error:
            failures += 1
            print(f"{name}: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())

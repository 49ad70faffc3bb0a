"""Builds the wheel, looks into it, and runs the demo from it in an empty environment where no compiler can be found.

`make wheel` calls it, and so does continuous integration. Owns what a wheel must hold, and the environment it is tried in;
refuses to know how the library is compiled (CMakeLists.txt). The wheel ends up in dist/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
NEEDED = ("gemcutter/_cpu.so", "gemcutter/py.typed", "gemcutter/demo/model.safetensors", "gemcutter/demo/tokenizer.json")
FOREIGN = ("tests/", "bench/", "tools/", "docs/", "csrc/", "build/")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make")
PROGRAM = """
import gemcutter
model = gemcutter.load("demo")
assert not [note for note in model.notes if "slower" in note], model.notes  # the library was found and loads
assert model.generate("A lantern is", max_tokens=4).tokens
print(gemcutter.__version__, gemcutter.__file__)
"""


def build() -> Path:
    """Build the wheel into dist/ and return its path; what lay there is removed first."""
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", DIST, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def check_content(wheel: Path) -> None:
    """Exit with a message unless the wheel holds the package, the library and the demo, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = [path for path in (ROOT / "gemcutter").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    missing = sorted({*NEEDED, *(str(path.relative_to(ROOT)) for path in package)} - set(names))
    foreign = [name for name in names if name.startswith(FOREIGN) or "__pycache__" in name]
    if missing or foreign:
        sys.exit(f"{wheel.name}: missing {missing}, does not belong there {foreign}")
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "gemcutter" / "__init__.py").read_text(), re.MULTILINE)
    if version is None or not wheel.name.startswith(f"gemcutter-{version[1]}-py3-none-"):
        sys.exit(f"{wheel.name}: expected version {version and version[1]} for any Python 3")


def torch_and_what_it_needs() -> list[metadata.Distribution]:
    """List torch and, recursively, the distributions that it requires and that are installed here."""
    found: dict[str, metadata.Distribution] = {}
    waiting = ["torch"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # wanted on other platforms only
        plain = [line for line in found[name].requires or [] if "extra ==" not in line]
        waiting += [re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in plain]
    return list(found.values())


def link_torch(site: Path) -> None:
    """Link torch and what it requires into another environment's site-packages.

    A wheel of torch takes hundreds of megabytes and most of a minute to unpack. Nothing else is shared, so that pip has to
    install all that gemcutter itself requires, and a requirement that pyproject.toml forgets is noticed.
    """
    for distribution in torch_and_what_it_needs():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            origin, link = Path(str(distribution.locate_file(top))), site / top
            if origin.exists() and not link.exists():
                link.symlink_to(origin)


def try_out(wheel: Path, folder: Path) -> None:
    """Install the wheel into a new environment below `folder` and run the demo there. Raises CalledProcessError."""
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site,) = environment.glob("lib/python3*/site-packages")
    link_torch(site)
    install = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "-qq", wheel]
    subprocess.run(install, check=True, cwd=folder)
    bare = {"PATH": str(environment / "bin"), "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    found = [name for name in COMPILERS if shutil.which(name, path=bare["PATH"])]
    assert not found, f"{found} can be found, so this would not show that the wheel needs no compiler"
    for command in (["gemcutter", "run", "demo", "What is a lantern?", "-n", "8"], ["python", "-c", PROGRAM]):
        subprocess.run([environment / "bin" / command[0], *command[1:]], check=True, cwd=folder, env=bare)


def main() -> None:
    """Build, look, try."""
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    wheel = build()
    check_content(wheel)
    with tempfile.TemporaryDirectory() as folder:
        try_out(wheel, Path(folder))
    print(f"{wheel.relative_to(ROOT)} ({wheel.stat().st_size / 1e6:.1f} MB) installs and runs without a compiler")


if __name__ == "__main__":
    main()

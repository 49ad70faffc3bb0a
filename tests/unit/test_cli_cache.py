"""`gemcutter cache`: what --repack-cache has left is listed and removed, what does not belong to it stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gemcutter
from gemcutter import native
from gemcutter.checkpoint.load.packed_weight_files import user_folder
from gemcutter.cli import main
from tests.unit.test_cli_usage import copy_of_demo

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="repacks for the native kernels alone")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's cache folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_folder()


def keep(model: Path) -> None:
    """Load a model in a process of its own, which keeps its repacked weights before it ends."""
    command = [sys.executable, "-m", "gemcutter.cli", "run", str(model), "Hi", "-n", "1", "--quant", "q8", "--repack-cache"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_files_are_listed_and_cleared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out == f"0 files, 0 B, in {folder}\n"
    (tmp_path / "model").mkdir()
    model = copy_of_demo(tmp_path / "model")
    keep(model)
    (folder / "other.txt").write_text("not ours")
    (folder / "broken.packed").write_bytes(b"GCPACKED")
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert f"{model / 'model.safetensors'}, quantized to q8\n" in shown
    assert "broken.packed (unfinished or damaged)" in shown
    assert "\n2 files, " in shown
    assert main(["cache", "list", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["files"]
    assert (first["checkpoint"], first["is_current"]) == ([], False)
    assert (second["checkpoint"], second["is_current"]) == ([str(model / "model.safetensors")], True)
    assert second["bytes"] == os.path.getsize(second["path"]) > 1e6

    assert main(["cache", "clear", "--stale"]) == 0
    assert capsys.readouterr().out == f"removed 1 file, 8 B, in {folder}\n"
    os.utime(model / "model.safetensors", (1, 1))
    assert main(["cache", "list"]) == 0
    assert "quantized to q8 (changed or gone since)" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert [each.name for each in folder.iterdir()] == ["other.txt"]


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    command = [sys.executable, "-m", "gemcutter.cli", "run", "demo", "Hi", "-n", "1", "--quant", "q8", "--repack-cache"]
    environment = os.environ | {"XDG_CACHE_HOME": str(place)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"note: repacked weights are not kept in {place}" in done.stderr
    assert "Warning" not in done.stderr
    assert gemcutter.__file__ not in done.stderr


def test_nothing_of_it_needs_torch(folder: Path) -> None:
    code = "import sys; from gemcutter.cli import main; assert main(['cache']) == 0; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0

"""The README is a contract: its commands and its code run as they stand, and its file tree names what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.markdown import ENVIRONMENT, ROOT, fences

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [fence.body for fence in fences(README) if fence.language == language]


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if line.startswith(".venv/bin/gemcutter")]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the one /tmp of all commands, which run in order: some use what others wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", commands())
def test_commands_run(command: str, scratch: Path) -> None:
    command = command.replace("/tmp/", f"{scratch}/")
    found = subprocess.run(command, shell=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() or "tiny" in command


@pytest.mark.parametrize("block", blocks("python"))
def test_code_runs(block: str) -> None:
    found = subprocess.run([sys.executable, "-c", block], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


def test_there_are_commands_and_code() -> None:
    assert len(commands()) >= 4
    assert blocks("python")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

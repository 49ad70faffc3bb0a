"""The version is named in one place, `gemcutter/__init__.py`, and the build, the command line and the changelog agree with it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gemcutter

ROOT = Path(__file__).parents[2]
# The pattern with which scikit-build-core's metadata provider finds the version, as its documentation states it.
BUILD_PATTERN = r'(?i)^(__version__|VERSION)(?: ?\: ?str)? *= *([\'"])v?(?P<value>.+?)\2'


def test_the_build_takes_the_version_from_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    where = project["tool"]["scikit-build"]["metadata"]["version"]
    assert where == {"provider": "scikit_build_core.metadata.regex", "input": "gemcutter/__init__.py"}
    found = re.findall(BUILD_PATTERN, (ROOT / where["input"]).read_text(), re.MULTILINE)
    assert [value for _, _, value in found] == [gemcutter.__version__]


def test_the_version_is_a_public_one_and_costs_no_torch() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", gemcutter.__version__)
    code = "import gemcutter, sys; assert gemcutter.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == gemcutter.__version__

"""How many cores a process may use, from the files of control groups as both versions write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gemcutter import cores
from gemcutter.cli.loading import use_threads


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def quota(tmp_path: Path, own: str) -> int | None:
    (tmp_path / "own").write_text(own)
    return cores.read_quota(tmp_path / "groups", tmp_path / "own")


@pytest.mark.parametrize(
    ("text", "wanted"), [("max 100000", None), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("", None)]
)
def test_the_second_version(text: str, wanted: int | None, tmp_path: Path) -> None:
    write(tmp_path / "groups", cpu__max=text)
    assert quota(tmp_path, "0::/\n") == wanted


def test_groups_around_count_too(tmp_path: Path) -> None:
    write(tmp_path / "groups" / "a", cpu__max="300000 100000")
    write(tmp_path / "groups" / "a" / "b", cpu__max="800000 100000")
    assert quota(tmp_path, "0::/a/b\n") == 3
    write(tmp_path / "groups" / "a" / "b", cpu__max="100000 100000")
    assert quota(tmp_path, "0::/a/b\n") == 1


def test_the_first_version(tmp_path: Path) -> None:
    write(tmp_path / "groups" / "cpu" / "job", cpu__cfs_quota_us="400000", cpu__cfs_period_us="100000")
    own = "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n"
    assert quota(tmp_path, own) == 4
    write(tmp_path / "groups" / "cpu" / "job", cpu__cfs_quota_us="-1")
    assert quota(tmp_path, own) is None


def test_no_groups_are_no_limit(tmp_path: Path) -> None:
    assert cores.read_quota(tmp_path, tmp_path / "absent") is None
    assert quota(tmp_path, "nonsense\n") is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity masks")
def test_fewer_threads_by_default_under_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list[int]()
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(cores, "quota_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    use_threads(None)
    assert chosen == [3]
    monkeypatch.setenv("OMP_NUM_THREADS", "64")  # asked for
    use_threads(None)
    assert chosen == [3]

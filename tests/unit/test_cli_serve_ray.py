"""`gemcutter serve --ray` before anything is started: options that belong together, and Ray that is not installed."""

from __future__ import annotations

import sys

import pytest

from gemcutter.cli import main


@pytest.mark.parametrize("option", [["--replicas", "2"], ["--routing", "hash"], ["--max-replicas", "3"]])
def test_options_of_replicas_need_ray(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "demo", *option]) == 2
    assert f"{option[0]}: needs --ray" in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert main(["serve", "demo", "--ray"]) == 1
    assert "pip install 'gemcutter[serve,ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--routing", "random"], "routing: expected one of prefix, hash, balanced"),
        (["--replicas", "3", "--max-replicas", "2"], "max_replicas: expected 3 or more"),
        (["--responses-store-mb", "1"], "store_bytes"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gemcutter.cli.serve_replicas.check_installed", lambda: None)
    assert main(["serve", "demo", "--ray", *options]) == 1
    assert named in capsys.readouterr().err

"""The tools that write pages: what they leave alone, what they notice, and how signatures are laid out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.markdown import fences, parse
from tools import make_docs, wrap_markdown

LONG = "word " * 40


def test_only_long_prose_is_wrapped() -> None:
    kept = f"# {LONG}\n\n| {LONG} |\n\n```sh\n{LONG}\n```\n\n    {LONG}\n\n<!-- {LONG} -->\n\nshort\nlines stay\n"
    assert wrap_markdown.wrap_page(kept) == kept
    found = wrap_markdown.wrap_page(f"- {LONG}\n  more\n- next\n").splitlines()
    assert all(len(line) <= 120 for line in found)
    assert [line[:2] for line in found] == ["- ", "  ", "- "]


@given(st.text(alphabet="ab -1.#|`\n", max_size=400))
def test_wrapping_changes_white_space_alone_and_is_done_once(text: str) -> None:
    wrapped = wrap_markdown.wrap_page(text)
    assert wrapped.split() == text.split()
    assert wrap_markdown.wrap_page(wrapped).split() == text.split()


def test_a_page_that_differs_is_stale_unless_typer_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    page = tmp_path / "cli.md"
    assert make_docs.is_stale(page, "new")
    page.write_text("<!-- typer 0.1 -->\nold")
    assert make_docs.is_stale(page, "<!-- typer 0.1 -->\nnew")
    assert not make_docs.is_stale(page, "<!-- typer 0.1 -->\nold")
    assert not make_docs.is_stale(page, "<!-- typer 0.2 -->\nnew")


def test_signatures_are_code() -> None:
    def plain(first: dict[str, int], *, name: str = "x", none: str | None = None) -> tuple[int, ...]: ...

    assert make_docs._signature("plain", plain) == (
        'plain(first: dict[str, int], *, name: str = "x", none: str | None = None) -> tuple[int, ...]'
    )
    assert make_docs._split("a: dict[str, int], *, b: tuple[int, ...] = (1, 2)") == [
        "a: dict[str, int]",
        "*",
        "b: tuple[int, ...] = (1, 2)",
    ]


def test_blocks_are_found_with_their_markers() -> None:
    shell = "```sh\nmake x  # why\ngemcutter run demo \\\n  hi\n```\n"
    page = f"{shell}<!-- not run: needs a GPU -->\n```console\n$ a b\nprinted\n...\n```\n"
    first, second = fences(page)
    assert (first.language, first.reason, first.commands()) == ("sh", None, ["make x", "gemcutter run demo    hi"])
    assert (second.reason, list(second.examples())) == ("needs a GPU", [("a b", ["printed"])])


@pytest.mark.parametrize(
    "command", ["gemcutter sing demo", "gemcutter run demo --loud", "gemcutter tiny --like 99B out", "x | gemcutter chat"]
)
def test_commands_that_do_not_exist_are_noticed(command: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no command|no such option|expected one of|missing"):
        parse(command)

"""Vocabularies on disk: a kept one encodes and decodes as the files do, and no older, damaged or foreign file is taken."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemcutter
from gemcutter import text_assets
from gemcutter import vocabulary_cache as module
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.load import packed_weight_files
from gemcutter.checkpoint.load.packed_weight_files import packed_files
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.errors import CheckpointError
from gemcutter.text import tokenizer as tokenizers_module
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text_assets import read_tokenizer
from gemcutter.vocabulary_cache import VocabularyCache
from tests.unit.test_packed_weight_cache import give_room

NEW_TOKEN = {"content": "<|new|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


@pytest.fixture(autouse=True)
def _small_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the demo's vocabulary, too, whatever room the disk has."""
    monkeypatch.setattr(module, "LEAST_MERGES", 1)
    give_room(monkeypatch)


@pytest.fixture(scope="module", params=["folder", "extended folder", "gguf"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Return the demo: a folder, one whose tokenizer_config.json adds a token, and a GGUF file."""
    place = tmp_path_factory.mktemp("model")
    if request.param == "gguf":
        convert(DEMO_FOLDER, place / "demo.gguf", "gguf", "Q4_0")
        return Source.open(place / "demo.gguf")
    shutil.copytree(DEMO_FOLDER, place / "demo")
    if request.param == "extended folder":
        file = place / "demo" / "tokenizer_config.json"
        raw = json.loads(file.read_text(encoding="utf-8"))
        new = 1 + max(json.loads((DEMO_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"].values())
        file.write_text(json.dumps(raw | {"added_tokens_decoder": {str(new): NEW_TOKEN}, "eot_token": "<turn|>"}))
    return Source.open(place / "demo")


def keep(source: Source, folder: Path, **options: Any) -> tuple[VocabularyCache, Tokenizer]:
    """Read a tokenizer that is kept in `folder`, and wait until it is."""
    cache = VocabularyCache.of(source, folder, **options)
    assert cache is not None
    made = read_tokenizer(source, 9_999, cache)
    for thread in threading.enumerate():
        if thread.name == "vocabulary cache":
            thread.join()
    return cache, made


def unasked() -> NoReturn:
    """Fail where the library is asked for."""
    pytest.fail("the library was asked")


def kept_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a tokenizer's own files are read."""
    monkeypatch.setattr(text_assets, "_read_parts", lambda source: pytest.fail("read again"))


@pytest.fixture(scope="module")
def both(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """Return the tokenizer that the files make, and the kept one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST_MERGES", 1)
        give_room(patch)
        cache, made = keep(source, tmp_path_factory.mktemp("cache"))
        kept_only(patch)
        return made, read_tokenizer(source, 9_999, cache)


def test_a_kept_tokenizer_is_the_one_that_was_read(both: tuple[Tokenizer, Tokenizer]) -> None:
    made, kept = both
    for name in ("special_tokens", "special_ids", "markers", "vocab_size", "num_ids", "notes", "bos_id"):
        assert getattr(kept, name) == getattr(made, name), name
    assert [kept.piece(id) for id in range(kept.num_ids)] == [made.piece(id) for id in range(made.num_ids)]
    assert kept.to_json() == made.to_json()


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12), st.sampled_from(["<|turn>", "<bos>", "<|new|>", "<turn|>", "  ", "\n\n\n", "the there ", "é🙂"])
    ),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_it_encodes_alike(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    made, kept = both
    assert kept.encode(text) == made.encode(text)
    assert kept.encode_plain(text) == made.encode_plain(text)
    assert kept.split_markers(text) == made.split_markers(text)
    assert kept.decode(kept.encode(text), special=True) == made.decode(made.encode(text), special=True)


def test_the_library_encodes_long_texts(both: tuple[Tokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    made, kept = both
    quick = made.encode("The lantern of a keeper. <|turn>")
    monkeypatch.setattr(tokenizers_module, "LONG_TEXT", 0)
    assert kept.encode("The lantern of a keeper. <|turn>") == made.encode("The lantern of a keeper. <|turn>") == quick


def copy_of_demo(folder: Path) -> Path:
    shutil.copytree(DEMO_FOLDER, folder / "demo")
    return folder / "demo"


def rewrite(name: str) -> Callable[[Path, VocabularyCache], object]:
    """Write one of the checkpoint's files anew, with other bytes of the same meaning."""
    return lambda model, cache: (model / name).write_text((model / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")


def damage(cache: VocabularyCache) -> None:
    raw = bytearray(cache.path.read_bytes())
    raw[len(raw) // 2] ^= 1
    cache.path.write_bytes(raw)


STALE: dict[str, Callable[[Path, VocabularyCache], object]] = {
    "another tokenizer.json": rewrite("tokenizer.json"),
    "another tokenizer_config.json": rewrite("tokenizer_config.json"),
    "no tokenizer_config.json": lambda model, cache: (model / "tokenizer_config.json").unlink(),
    "another time": lambda model, cache: os.utime(model / "tokenizer.json", (1, 1)),
    "a damaged file": lambda model, cache: damage(cache),
    "half a file": lambda model, cache: cache.path.write_bytes(cache.path.read_bytes()[:2_000]),
    "an empty file": lambda model, cache: cache.path.write_bytes(b""),
    "another program's": lambda model, cache: cache.path.write_text("{}"),
    "no file": lambda model, cache: cache.path.unlink(),
}


@pytest.mark.parametrize("name", STALE)
def test_what_is_old_or_damaged_counts_as_none_and_is_replaced(name: str, tmp_path: Path) -> None:
    model = copy_of_demo(tmp_path)
    cache, _ = keep(Source.open(model), tmp_path / "cache")
    assert cache.read(unasked) is not None
    STALE[name](model, cache)
    now = VocabularyCache.of(Source.open(model), tmp_path / "cache")
    assert now is not None
    assert now.path == cache.path
    assert now.read(unasked) is None
    keep(Source.open(model), tmp_path / "cache")
    assert now.read(unasked) is not None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.path.name]


def test_another_version_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.open(copy_of_demo(tmp_path))
    keep(source, tmp_path / "cache")
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    now = VocabularyCache.of(source, tmp_path / "cache")
    assert now is not None
    assert now.read(unasked) is None


def test_small_and_unusual_vocabularies_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy_of_demo(tmp_path)
    raw = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "LEAST_MERGES", len(raw["model"]["merges"]) + 1)
        keep(Source.open(model), tmp_path / "cache")
    raw["model"]["dropout"] = 0.0  # the library's, then
    (model / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    keep(Source.open(model), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_an_order_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemcutter.text.merge_order.MOST_EXCEPTIONS", -1)
    keep(Source.open(copy_of_demo(tmp_path)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_is_given_up_when_the_program_ends_unless_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.open(copy_of_demo(tmp_path))
    monkeypatch.setattr(packed_weight_files.threading, "main_thread", lambda: threading.Thread())  # one that does not run
    keep(source, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    keep(source, tmp_path / "cache", is_asked=True)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_damaged_tokenizer_is_still_an_error(tmp_path: Path) -> None:
    model = copy_of_demo(tmp_path)
    keep(Source.open(model), tmp_path / "cache")
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
        keep(Source.open(model), tmp_path / "cache")


def loaded(model: Path, repack_cache: bool | None) -> str:
    """Load a model, and return what it replies."""
    with gemcutter.load(model, repack_cache=repack_cache, context=256) as opened:
        return opened.chat("What is a lantern?", max_tokens=8).text


def test_a_load_keeps_its_vocabulary_and_the_next_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = copy_of_demo(tmp_path)
    first = loaded(model, False)
    assert not list(packed_files())
    assert loaded(model, None) == first
    for thread in threading.enumerate():
        if thread.name == "vocabulary cache":
            thread.join()
    (file,) = (each for each in packed_files() if each.is_vocabulary)
    assert file.files == (str(model / "tokenizer.json"), str(model / "tokenizer_config.json"))
    assert file.is_current
    kept_only(monkeypatch)
    assert loaded(model, None) == first
    with pytest.raises(pytest.fail.Exception):
        loaded(model, False)

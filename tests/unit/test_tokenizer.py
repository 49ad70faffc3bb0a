"""The tokenizer: one BOS, markers by name, faithful bytes, and clear errors for damaged files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.errors import CheckpointError, RequestError
from gemcutter.text import tokenizer as module
from gemcutter.text.tokenizer import Tokenizer
from tests.real_tokenizer import fixtures, real_tokenizer

DEMO = Path(module.__file__).resolve().parents[1] / "demo"
TOKENIZER = Tokenizer.load(DEMO)
BACKEND = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
# Texts that a Gemma tokenizer can give back: it has no way to tell ▁ from a space.
PLAIN_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁<"), max_size=40)


def write_checkpoint(folder: Path, change: Callable[[dict[str, Any]], object], config: object = None) -> Path:
    """Write the demo's tokenizer.json after `change`, and `config` as its tokenizer_config.json unless that is None."""
    content = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_ids(data: bytes) -> list[int]:
    ids = [TOKENIZER.id_of(f"<0x{byte:02X}>") for byte in data]
    return [id for id in ids if id is not None]


def test_load_reads_names_and_special_ids() -> None:
    assert TOKENIZER.vocab_size == 4096
    assert TOKENIZER.special_tokens["eot_token"] == "<turn|>"
    assert TOKENIZER.piece(TOKENIZER.bos_id) == "<bos>"
    assert TOKENIZER.id_of("no such piece") is None
    assert {TOKENIZER.id_of(p) for p in ("<bos>", "<|turn>", "<channel|>", '<|"|>', "<|video|>")} <= TOKENIZER.special_ids
    assert TOKENIZER.id_of("▁the") not in TOKENIZER.special_ids


@pytest.mark.parametrize("text", ["hi", "<bos>hi", "", "<bos>"])
def test_encode_gives_exactly_one_bos(text: str) -> None:
    with_bos = TOKENIZER.encode(text, bos=True)
    assert with_bos[0] == TOKENIZER.bos_id
    assert with_bos.count(TOKENIZER.bos_id) == 1
    assert TOKENIZER.encode("hi", bos=False) == TOKENIZER.encode("hi", bos=True)[1:]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["post_processor"]["special_tokens"].clear(),
        lambda c: c.update(truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 7}),
        lambda c: c.update(
            padding={
                "strategy": {"Fixed": 99},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            }
        ),
        lambda c: c.update(post_processor={"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 77777]}),
    ],
)
def test_settings_in_the_file_do_not_change_ids(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    changed = Tokenizer.load(write_checkpoint(tmp_path, change))
    text = "a text that is longer than two tokens"
    assert changed.encode(text, bos=True) == TOKENIZER.encode(text, bos=True)


def test_markers_in_a_prompt_become_ids_and_in_plain_text_stay_text() -> None:
    text = "<bos>me: <|turn>user\nhi<turn|>"
    ids = TOKENIZER.encode(text, bos=False)
    assert {TOKENIZER.id_of("<bos>"), TOKENIZER.id_of("<|turn>"), TOKENIZER.id_of("<turn|>")} <= set(ids)
    plain = TOKENIZER.encode_plain(text)
    assert not set(plain) & TOKENIZER.special_ids
    assert TOKENIZER.decode(plain, special=False) == text


def test_decode_prints_or_leaves_out_markers() -> None:
    ids = TOKENIZER.encode("<|turn>user\n hi<turn|>", bos=True)
    assert TOKENIZER.decode(ids, special=True) == "<bos><|turn>user\n hi<turn|>"
    assert TOKENIZER.decode(ids, special=False) == "user\n hi"


def test_decode_replaces_bad_bytes_and_keeps_good_ones_beside_them() -> None:
    assert TOKENIZER.decode(byte_ids("é".encode()), special=False) == "é"
    assert TOKENIZER.decode(byte_ids(b"\xf0\x9fA"), special=False) == "\ufffdA"
    assert TOKENIZER.bytes_of(byte_ids(b"\xf0")[0]) == b"\xf0"


@given(PLAIN_TEXT)
def test_plain_text_survives_and_agrees_with_the_library(text: str) -> None:
    ids = TOKENIZER.encode(text, bos=False)
    assert TOKENIZER.decode(ids, special=False) == text == BACKEND.decode(ids)
    assert ids == TOKENIZER.encode_plain(text)


@pytest.mark.parametrize("id", [-1, 4096, 2**40, "5", None])
def test_ids_outside_the_vocabulary_are_refused(id: Any) -> None:
    for use in (TOKENIZER.piece, TOKENIZER.bytes_of, lambda id: TOKENIZER.decode([5, id], special=True)):
        with pytest.raises(RequestError, match=r"is not in the vocabulary: expected an integer from 0 to 4095"):
            use(id)


@pytest.mark.parametrize("text", ["lone \ud800 surrogate", None, 5])
def test_what_is_no_text_is_refused(text: Any) -> None:
    for encode in (lambda text: TOKENIZER.encode(text, bos=True), TOKENIZER.encode_plain):
        with pytest.raises(RequestError, match="valid Unicode"):
            encode(text)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing: copy"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0", b"null", b"[]", b"[" * 100_000, b'{"model":' * 5000, b"\xff\xfe{}"])
def test_damaged_file_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read .*download the file again"):
        Tokenizer.load(tmp_path)


def test_random_damage_is_harmless_or_one_error(tmp_path: Path) -> None:
    rng = random.Random(4)
    original = (DEMO / "tokenizer.json").read_bytes()
    refusals = []
    for _ in range(60):
        damaged = bytearray(original[: rng.choice([len(original), rng.randrange(len(original))])])
        for _ in range(rng.randrange(4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        try:
            Tokenizer.load(tmp_path).encode("still works", bos=True)
        except CheckpointError as error:
            refusals.append(error.summary)
    assert len(refusals) > 20
    assert all("tokenizer.json" in summary for summary in refusals)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "is not a tokenizer of Gemma's kind"),
        (lambda c: c["model"].update(byte_fallback=False), "is not a tokenizer of Gemma's kind"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "is not a tokenizer of Gemma's kind"),
        (lambda c: c.clear(), "is not a tokenizer of Gemma's kind"),
        (
            lambda c: c.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}),
            "is not a tokenizer of Gemma's kind",
        ),
        (lambda c: c["model"]["merges"].append(["no", "such merge"]), "can't be read"),
        (lambda c: c["model"].update(continuing_subword_prefix="▁"), "can't be read"),  # makes the library panic
    ],
)
def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        Tokenizer.load(write_checkpoint(tmp_path, change))


def test_vocabulary_without_bos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no BOS token: expected the piece '<s>'"):
        Tokenizer.load(write_checkpoint(tmp_path, lambda c: None, config={"bos_token": "<s>"}))


def test_tokenizer_config_spellings(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<bos>", "lstrip": False},
        "eos_token": None,
        "add_bos_token": True,
        "model_max_length": 10**30,
        "extra_special_tokens": {"video_token": "<|video|>"},
    }
    loaded = Tokenizer.load(write_checkpoint(tmp_path, lambda c: None, config=config))
    assert loaded.special_tokens == {"bos_token": "<bos>", "video_token": "<|video|>"}


def test_names_add_special_ids_that_the_vocabulary_does_not_flag(tmp_path: Path) -> None:
    loaded = Tokenizer.load(write_checkpoint(tmp_path, lambda c: c["added_tokens"].clear(), config={"eot_token": "<turn|>"}))
    assert loaded.special_ids == {loaded.id_of("<bos>"), loaded.id_of("<turn|>")}


@pytest.mark.parametrize("content", ["", "[]", "3", "[" * 100_000, '{"a": '])
def test_damaged_tokenizer_config_is_one_error(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, lambda c: None)
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_real_tokenizer_reproduces_the_public_vectors() -> None:
    tokenizer = real_tokenizer()
    with (fixtures() / "tokenizer_tests.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = (fixtures() / "tokenizer_tests.out").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert len(texts) == len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        ids = [int(word) for word in line.split()]
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids, special=False) == text


def test_real_tokenizer_numbers_its_markers_as_published() -> None:
    tokenizer = real_tokenizer()
    markers = json.loads((fixtures() / "special_tokens.json").read_text(encoding="utf-8"))
    assert {int(id): marker["piece"] for id, marker in markers.items()} == {
        id: tokenizer.piece(id) for id in tokenizer.special_ids
    }
    assert tokenizer.vocab_size == 262_144
    assert tokenizer.special_tokens["soc_token"] == "<|channel>"


@settings(deadline=None)
@given(PLAIN_TEXT)
def test_real_tokenizer_gives_text_back(text: str) -> None:
    tokenizer = real_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, bos=False), special=False) == text

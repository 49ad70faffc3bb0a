"""Tokenizer, template and sampling out of a GGUF file's metadata: as the files beside the weights would give them."""

from __future__ import annotations

import array
import json
import lzma
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import gguf
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.text.chat import ChatTemplate
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tokenizer_parts import merges_of, parts_of
from gemcutter.text_assets import read_defaults, read_template, read_tokenizer
from tests.real_tokenizer import fixtures
from tests.trained import golden, trained

DEMO = Tokenizer.load(DEMO_FOLDER)
MODEL = json.loads((DEMO_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]
PIECES = sorted(MODEL["vocab"], key=MODEL["vocab"].__getitem__)
KINDS = [3 if DEMO.id_of(piece) in DEMO.special_ids else 6 if piece.startswith("<0x") else 1 for piece in PIECES]
TEMPLATE = (DEMO_FOLDER / "chat_template.jinja").read_text(encoding="utf-8")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(found: Any) -> bytes:
    """Format a metadata value: texts, integers, floats, truths, and lists of them."""
    if isinstance(found, str):
        return struct.pack("<I", 8) + text(found)
    if isinstance(found, bool):
        return struct.pack("<I?", 7, found)
    if isinstance(found, float):
        return struct.pack("<If", 6, found)
    if isinstance(found, int):
        return struct.pack("<II", 4, found)
    if isinstance(found[0], str):
        return struct.pack("<IIQ", 9, 8, len(found)) + b"".join(map(text, found))
    kind, code = (6, "f") if isinstance(found[0], float) else (5, "i")
    return struct.pack("<IIQ", 9, kind, len(found)) + array.array(code, found).tobytes()


def vocabulary(pieces: Sequence[str], kinds: Sequence[int], **more: Any) -> dict[str, Any]:
    ids = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    found = {"model": "gemma4", "tokens": pieces, "token_type": kinds, **{f"{name}_token_id": id for name, id in ids.items()}}
    return {"general.architecture": "gemma4"} | {
        f"tokenizer.ggml.{name}": each for name, each in (found | more).items() if each is not None
    }


def source_of(folder: Path, metadata: dict[str, Any]) -> Source:
    """Write a GGUF file that is nothing but metadata, and open it."""
    raw = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(metadata)) + b"".join(
        text(key) + value(each) for key, each in metadata.items()
    )
    (folder / "model.gguf").write_bytes(raw)
    return Source.open(folder / "model.gguf")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Return the demo's text side as a converter writes it, which takes some markers for plain text."""
    kinds = [1 if piece in ("<|think|>", "<unused3>", "<tool|>") else 4 if piece == "<|channel>" else kind
             for piece, kind in zip(PIECES, KINDS, strict=True)]  # fmt: skip
    merges = [" ".join(merge) for merge in MODEL["merges"]]
    metadata = vocabulary(PIECES, kinds, merges=merges) | {"tokenizer.chat_template": TEMPLATE, "general.sampling.top_k": 64}
    metadata |= {"general.sampling.temp": 1.0, "general.sampling.top_p": 0.95}
    return source_of(tmp_path_factory.mktemp("demo"), metadata)


def test_the_same_vocabulary_comes_of_both_containers(demo: Source) -> None:
    mine = read_tokenizer(demo)
    assert (mine.vocab_size, mine.bos_id, mine.special_ids) == (DEMO.vocab_size, DEMO.bos_id, DEMO.special_ids)
    assert mine.special_tokens.items() <= DEMO.special_tokens.items()
    assert mine.special_tokens.keys() == {"bos_token", "eos_token", "unk_token", "pad_token"}


MARKED = st.one_of(st.text(max_size=12), st.sampled_from(["<|turn>", "<bos>", "<|think|>", "  ", "\n\n", "▁", "<0x41>", "the "]))


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(MARKED, max_size=6))
def test_texts_are_encoded_alike(pieces: list[str]) -> None:
    found = "".join(pieces)
    mine = Tokenizer(parts_of(PIECES, [" ".join(merge) for merge in MODEL["merges"]], markers=DEMO.special_ids))
    assert mine.encode(found, bos=True) == DEMO.encode(found, bos=True)
    assert mine.encode_plain(found) == DEMO.encode_plain(found)


@pytest.mark.parametrize("name", ["tiny-e-Q4_K_M.gguf", "tiny-e-Q8_0.gguf", "tiny-a-Q4_0.gguf"])
def test_llama_cpp_s_files_encode_as_the_original(name: str) -> None:
    mine = read_tokenizer(Source.open(trained(name)))
    assert mine.special_ids == DEMO.special_ids
    for prompt in golden("prompts")["prompts"]:
        assert mine.encode(prompt.get("text") or prompt["rendered"], bos=True) == prompt["token_ids"]


def test_templates_render_alike(demo: Source) -> None:
    mine, theirs = read_template(demo, read_tokenizer(demo)), ChatTemplate.find(DEMO_FOLDER, DEMO)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert mine is not None
    assert theirs is not None
    assert mine.encode(messages) == theirs.encode(messages)


def test_sampling_comes_of_the_metadata(demo: Source) -> None:
    config = open_checkpoint(DEMO_FOLDER)
    defaults = read_defaults(replace(config, source=demo), read_tokenizer(demo))
    assert defaults.options == {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    assert defaults.stop_ids == {1, 7, DEMO.id_of("<|tool_response>")}


def test_users_choose_where_defaults_come_from(demo: Source, tmp_path: Path) -> None:
    checkpoint, tokenizer = replace(open_checkpoint(DEMO_FOLDER), source=demo), read_tokenizer(demo)
    for name in ("none", "vllm"):
        greedy = read_defaults(checkpoint, tokenizer, choice=name)
        assert greedy.options == {}
        assert 1 in greedy.stop_ids  # the markers of this family end replies whatever a file says
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5, "top_k": 7}')
    for choice in (tmp_path, tmp_path / "generation_config.json"):
        assert read_defaults(checkpoint, tokenizer, choice=str(choice)).options == {"temperature": 0.5, "top_k": 7}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "there is no file"), ("[1]", "generation_config.json"), ("{", "generation_config.json"), ('{"top_k": "x"}', "top_k")],
)
def test_a_chosen_file_that_can_t_be_used_is_told(text: str | None, expected: str, demo: Source, tmp_path: Path) -> None:
    checkpoint = replace(open_checkpoint(DEMO_FOLDER), source=demo)
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises((ConfigError, CheckpointError), match=expected):
        read_defaults(checkpoint, read_tokenizer(demo), choice=str(tmp_path))


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    assert read_template(source_of(tmp_path, vocabulary(PIECES, KINDS)), DEMO) is None


def test_a_damaged_template_is_told(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"general.architecture": "gemma4", "tokenizer.chat_template": "{% for"})
    with pytest.raises(CheckpointError, match=r"model\.gguf\[tokenizer\.chat_template\]"):
        read_template(source, DEMO)


# ---- vocabularies with scores instead of merges, as of Gemma 3 ----


def scored() -> tuple[list[str], list[int], list[float]]:
    """Return a small vocabulary of SentencePiece's kind: bytes, letters, words by rank, and literals that are never merged."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>"]
    literals = ["\n", "\n\n", "  ", "   ", "<b>", "<start_of_image>"]
    words = ["▁t", "he", "▁the", "in", "▁a", "er", "the", "▁in", "ther"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzPé"]
    pieces = [*control, *literals, *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    kinds = [3] * 4 + [4] * len(literals) + [6] * 256 + [1] * (len(words) + len(letters))
    scores = [-1000.0] * (4 + len(literals) + 256) + [-float(rank) for rank in range(len(words) + len(letters))]
    return pieces, kinds, scores


def test_merges_follow_the_scores() -> None:
    pieces, kinds, scores = scored()
    plain = {piece: score for piece, score, kind in zip(pieces, scores, kinds, strict=True) if kind == 1}
    merges = merges_of(plain)
    assert merges[:4] == [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "the")], "of one piece, the longest left part is first"
    assert merges[-2:] == [("▁", "in"), ("the", "r")]
    assert all(left in plain and right in plain and left + right in plain for left, right in merges)


def test_scored_vocabularies_encode(tmp_path: Path) -> None:
    pieces, kinds, scores = scored()
    tokenizer = read_tokenizer(source_of(tmp_path, vocabulary(pieces, kinds, scores=scores, model="llama")))

    def spell(found: str, encode: Callable[..., list[int]]) -> list[str]:
        return [tokenizer.piece(id) for id in encode(found)]

    assert spell("the ther in", tokenizer.encode_plain) == ["the", "▁the", "r", "▁in"]
    assert spell("a  b\n\n\n<b>é€", tokenizer.encode_plain) == [
        "a", "  ", "b", "\n\n", "\n", "<b>", "é", "<0xE2>", "<0x82>", "<0xAC>"
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("a  <b>\n\né", bos=True), special=False) == "a  <b>\n\né", "literals are text"
    assert tokenizer.encode_plain("<eos>") != [1], "markers are not"
    assert tokenizer.encode("<eos>", bos=False) == [1]


# ---- Gemma 4's own ----


def test_the_real_vocabulary_encodes_as_it_should(tmp_path: Path) -> None:
    folder = fixtures()
    pieces = json.loads(lzma.decompress((folder / "gemma4_tokens.json.xz").read_bytes()))
    ranks = array.array("I", lzma.decompress((folder / "gemma4_merges.u32le.xz").read_bytes()))
    merges = [f"{pieces[left]} {pieces[right]}" for left, right in zip(ranks[::2], ranks[1::2], strict=True)]
    kinds = [6 if gguf_byte(piece) else 1 for piece in pieces]
    for id, marker in json.loads((folder / "special_tokens.json").read_text(encoding="utf-8")).items():
        kinds[int(id)] = marker["gguf_type"]
    tokenizer = read_tokenizer(source_of(tmp_path, vocabulary(pieces, kinds, merges=merges)))
    texts = (folder / "tokenizer_tests.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = (folder / "tokenizer_tests.out").read_text().splitlines()
    assert len(wanted) == 46
    for found, ids in zip(texts, wanted, strict=False):
        assert tokenizer.encode(found, bos=False) == [int(id) for id in ids.split()], found
    assert {48, 49, 50, 51, 52, 98, 100, 101, 105, 106} <= tokenizer.special_ids
    assert not {107, 168, 236774} & tokenizer.special_ids


def gguf_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x")


# ---- what is refused ----

BAD: list[tuple[dict[str, Any], str]] = [
    ({"token_type": None}, "tokenizer.ggml.token_type is None, expected an array of int for each of 4096 tokens"),
    ({"token_type": KINDS[:-1]}, "tokenizer.ggml.token_type is Array("),
    ({"tokens": "all of them"}, "tokenizer.ggml.tokens is 'all of them', expected an array of str"),
    ({"tokens": [1, 2, 3]}, "tokenizer.ggml.tokens"),
    ({"merges": None}, "tokenizer.ggml.scores is None"),
    ({"merges": ["▁t"]}, "tokenizer.ggml.merges holds '▁t', expected two pieces and a space"),
    ({"merges": ["nothing known"]}, "makes no tokenizer"),
    ({"merges": 7}, "tokenizer.ggml.merges is 7, expected an array of str"),
    ({"tokens": [*PIECES[:-1], PIECES[-2]]}, "1 pieces of the vocabulary are there twice"),
    ({"tokens": [*PIECES[:2], "<start>", *PIECES[3:]], "bos_token_id": None}, "has no BOS token"),
]


@pytest.mark.parametrize(("change", "expected"), BAD, ids=[expected[:40] for _, expected in BAD])
def test_a_damaged_vocabulary_is_told(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    usual = {"tokens": PIECES, "token_type": KINDS, "merges": [" ".join(merge) for merge in MODEL["merges"][:50]]}
    found = usual | change
    source = source_of(tmp_path, vocabulary(found.pop("tokens"), found.pop("token_type"), **found))
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(source)
    assert "model.gguf" in str(caught.value)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_text_that_is_no_utf_8_is_told(tmp_path: Path) -> None:
    source = source_of(tmp_path, vocabulary(["ab", "cd"], [1, 1]))
    raw = (tmp_path / "model.gguf").read_bytes().replace(b"cd", b"\xff\xfe")
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"the metadata tokenizer\.ggml\.tokens .*utf-8"):
        gguf.vocabulary(source)

"""Data sets from files on this machine: ShareGPT's JSON, and JSON lines of one's own.

Owns both layouts and what is passed over. Refuses to download. Read `workload.py` for what is made.

A line of one's own is an object with `prompt` (a text), `messages` (OpenAI's layout; the last one is the user's) or `turns` (a
list of texts, each sent with the replies before it as its history), and maybe `output_len` (`output_tokens` as vLLM spells it).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcutter.bench_serve.workload import BenchRequest, Turn, Workload
from gemcutter.errors import RequestError, spell_value

if TYPE_CHECKING:
    from gemcutter.text.tokenizer import Tokenizer

FEWEST_TOKENS = 2  # of a prompt and a reply of ShareGPT that is taken, as in sglang
HUMANS, MODELS = ("human", "user"), ("gpt", "chatgpt", "assistant", "model", "bard")


def share_gpt(path: Path, count: int, seed: int, tokenizer: Tokenizer | None, output_len: int | None = None) -> Workload:
    """Return `count` first questions of ShareGPT's conversations, drawn with a seed; replies are as long as those in the file.

    Passed over are conversations whose first two messages are not a question and its answer, and those of fewer than two tokens
    each. Raises RequestError, naming the file, for another layout, too few conversations, or a missing tokenizer.
    """
    if tokenizer is None:
        raise RequestError("--tokenizer: needed to count the tokens of ShareGPT's replies; give the model that is served")
    raw = _parsed(_read(path), str(path))
    if not isinstance(raw, list):
        raise RequestError(f"{path}: expected a list of objects with `conversations`, found {spell_value(raw, 40)}")
    random.Random(seed).shuffle(raw)
    found = list[BenchRequest]()
    for entry in raw:
        pair = _first_pair(entry)
        if pair is None:
            continue
        prompt_len, reply_len = (len(tokenizer.encode_plain(text)) for text in pair)
        if min(prompt_len, reply_len) >= FEWEST_TOKENS:
            found.append(BenchRequest((Turn(pair[0], output_len or reply_len, prompt_len),)))
        if len(found) == count:
            break
    return _checked(found, count, path)


def _first_pair(entry: Any) -> tuple[str, str] | None:
    """Return the first question and its answer; None for a conversation that begins in another way."""
    talk = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
    if not isinstance(talk, list) or len(talk) < 2 or not all(isinstance(each, dict) for each in talk[:2]):
        return None
    roles = [each.get("from", HUMANS[0] if not place else MODELS[0]) for place, each in enumerate(talk[:2])]
    texts = [each.get("value") for each in talk[:2]]
    if roles[0] not in HUMANS or roles[1] not in MODELS or not all(isinstance(text, str) for text in texts):
        return None
    return texts[0], texts[1]


def own_lines(path: Path, count: int | None, tokenizer: Tokenizer | None, output_len: int | None) -> Workload:
    """Return the requests of a JSON-lines file in its order, `count` of them at most.

    `output_len` is for lines that have none of their own. Raises RequestError, naming the line, for what can't be read.
    """
    found = list[BenchRequest]()
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip() and (count is None or len(found) < count):
            found.append(_own(_parsed(line, f"{path}:{number}"), f"{path}:{number}", tokenizer, output_len))
    return _checked(found, len(found) if count is None else count, path)


def _own(raw: Any, where: str, tokenizer: Tokenizer | None, usual: int | None) -> BenchRequest:
    if not isinstance(raw, dict):
        raise RequestError(f"{where}: expected an object, found {spell_value(raw, 40)}")
    wanted = raw.get("output_len", raw.get("output_tokens", usual))
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise RequestError(f"{where}: output_len: expected a number of tokens, 1 or more, found {spell_value(wanted, 40)}")
    kinds = [name for name in ("prompt", "messages", "turns") if name in raw]
    if len(kinds) != 1:
        raise RequestError(f"{where}: expected one of prompt, messages and turns, found {', '.join(kinds) or 'none'}")
    history, texts = tuple[Mapping[str, Any], ...](), list(_texts(raw, kinds[0], where))
    if kinds[0] == "messages":
        history = tuple(raw["messages"][:-1])
    counted = [None if tokenizer is None or history else len(tokenizer.encode_plain(text)) for text in texts]
    return BenchRequest(tuple(Turn(text, wanted, size) for text, size in zip(texts, counted, strict=True)), history)


def _texts(raw: Mapping[str, Any], kind: str, where: str) -> Iterator[str]:
    """Yield the user's texts. Raises RequestError for other values."""
    value = raw[kind]
    if kind == "prompt":
        texts: Any = [value]
    elif kind == "turns":
        texts = value
    else:
        is_talk = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
        texts = [value[-1].get("content")] if is_talk and value[-1].get("role") == "user" else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"{where}: {kind}: expected text, the last message the user's, found {spell_value(value, 60)}")
    yield from texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--dataset-path: {path} can't be read ({error}); give a file on this machine") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: no JSON ({error})") from error


def _checked(found: list[BenchRequest], count: int, path: Path) -> Workload:
    if not found or len(found) < count:
        raise RequestError(f"{path} has {len(found)} usable requests, {count} were asked for; lower --num-prompts")
    return Workload(tuple(found), found[0])

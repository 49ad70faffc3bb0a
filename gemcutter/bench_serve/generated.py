"""Generated prompts of exact lengths: random ones, groups that share a long beginning, conversations, and images.

Owns `TextSource`, which draws text that has just as many tokens when it is encoded again, and the workloads made of it. The
tools that these follow (sglang's `random` and `generated-shared-prefix`) decode random ids, whose text has other lengths and
holds control tokens; here words are drawn and counted again. Refuses to know HTTP. Read `workload.py` for what is made.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemcutter.bench_serve.workload import BenchRequest, Turn, Workload
from gemcutter.errors import RequestError

if TYPE_CHECKING:
    from gemcutter.text.tokenizer import Tokenizer

SEPARATOR = "\n\n"  # between a shared beginning and a question, as sglang has it
FEWEST_WORDS = 16  # that a vocabulary must have
REPAIRS = 64  # attempts to make a text of so many tokens


class TextSource:
    """Makes text of the words of a vocabulary; a seed gives the same texts again."""

    def __init__(self, tokenizer: Tokenizer, seed: int, *, as_ids: bool = False) -> None:
        """Prepare to draw. With `as_ids` prompts are ids, BOS first, for `/v1/completions`.

        Raises RequestError for a vocabulary that has hardly any words.
        """
        self.tokenizer, self.as_ids, self.random = tokenizer, as_ids, random.Random(seed)
        self._words = [id for id in range(tokenizer.vocab_size) if self._is_word(id)]
        if len(self._words) < FEWEST_WORDS:
            raise RequestError(
                f"--tokenizer: the vocabulary has {len(self._words)} pieces that are a word behind a space; "
                "give the tokenizer of the model that is served"
            )

    def _is_word(self, id: int) -> bool:
        """Return whether an id is a piece such as `▁tide`, which stays itself between others of its kind."""
        if id in self.tokenizer.special_ids:
            return False
        piece = self.tokenizer.piece(id)
        return piece[:1] == "▁" and piece[1:].isascii() and piece[1:].isalpha()

    def length(self, mean: int, range_ratio: float) -> int:
        """Draw a length from `mean` x `range_ratio` to `mean`, both included, as sglang does; 1.0 always gives `mean`."""
        return self.random.randint(max(int(mean * range_ratio), 1), mean)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.tokenizer.encode_plain(text))

    def text(self, tokens: int, before: str = "") -> str:
        """Draw a text of exactly `tokens` tokens, counted again where it stands: behind `before`, whose tokens stay as they are.

        Raises RequestError if no such text is found, which a vocabulary with unusual merges can cause.
        """
        kept = self.tokenizer.encode_plain(before)
        ids = self.random.choices(self._words, k=tokens)
        for _ in range(REPAIRS):
            text = self.tokenizer.decode(ids)
            found = self.tokenizer.encode_plain(before + text)
            if found[: len(kept)] == kept and len(found) == len(kept) + tokens:
                return text
            missing = len(kept) + tokens - len(found)
            ids = ids[: len(ids) + min(missing, 0)] + self.random.choices(self._words, k=max(missing, 0))
            ids[-1:] = self.random.choices(self._words)  # where lengths are right and the border is not, another text is tried
        raise RequestError(f"no text of {tokens} tokens was found in {REPAIRS} attempts; send ids with --tokenize-prompt")

    def turn(self, tokens: int, output_len: int) -> Turn:
        """Draw a prompt of exactly `tokens` tokens: a text, or ids of which the first is BOS."""
        if self.as_ids:
            ids = (self.tokenizer.bos_id, *self.random.choices(self._words, k=tokens - 1))
            return Turn(ids, output_len, tokens)
        return Turn(self.text(tokens), output_len, tokens)


def random_workload(source: TextSource, count: int, input_len: int, output_len: int, range_ratio: float = 1.0) -> Workload:
    """Return prompts that have nothing in common, with lengths of `range_ratio` to 1 times the given ones."""

    def draw() -> BenchRequest:
        output = source.length(output_len, range_ratio)
        return BenchRequest((source.turn(source.length(input_len, range_ratio), output),))

    warmup = draw()
    return Workload(tuple(draw() for _ in range(count)), warmup)


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The numbers of sglang's `generated-shared-prefix`; lengths are tokens, and the question's include the separator."""

    num_groups: int
    prompts_per_group: int
    system_prompt_len: int
    question_len: int
    output_len: int
    range_ratio: float = 1.0
    is_ordered: bool = False


def shared_prefixes(source: TextSource, shape: SharedPrefixes) -> Workload:
    """Return groups of prompts: those of a group begin with the same text, and each goes on with a question of its own.

    They arrive in a random order unless `is_ordered`.
    """
    warmup = BenchRequest((next(_group(source, shape)),))
    groups = [_group(source, shape) for _ in range(shape.num_groups)]
    requests = [BenchRequest((turn,)) for group in groups for turn, _ in zip(group, range(shape.prompts_per_group), strict=False)]
    if not shape.is_ordered:
        source.random.shuffle(requests)
    return Workload(tuple(requests), warmup)


def _group(source: TextSource, shape: SharedPrefixes) -> Iterator[Turn]:
    """Yield prompts of one group without end."""
    system = source.turn(source.length(shape.system_prompt_len, shape.range_ratio), 0)
    while True:
        question_len = source.length(shape.question_len, shape.range_ratio)
        output_len = source.length(shape.output_len, shape.range_ratio)
        assert system.prompt_len is not None
        total = system.prompt_len + question_len
        if isinstance(system.prompt, tuple):
            ids = source.turn(question_len + 1, 0).prompt[1:]  # without its BOS
            assert isinstance(ids, tuple)
            yield Turn((*system.prompt, *ids), output_len, total)
            continue
        before = system.prompt + SEPARATOR
        between = source.count(before) - system.prompt_len
        if question_len <= between:
            raise RequestError(f"--gsp-question-len: expected more than the separator's {between} tokens, found {question_len}")
        yield Turn(before + source.text(question_len - between, before), output_len, total)


def conversations(source: TextSource, count: int, turns: int, first_len: int, next_len: int, output_len: int) -> Workload:
    """Return conversations whose history is what the model really replied: each turn waits for the one before."""

    def draw(number: int = turns) -> BenchRequest:
        return BenchRequest(tuple(source.turn(first_len if not place else next_len, output_len) for place in range(number)))

    warmup = draw(1)
    return Workload(tuple(draw() for _ in range(count)), warmup)


def image_workload(
    source: TextSource, count: int, images: int, size: tuple[int, int], input_len: int, output_len: int, kind: str = "jpeg"
) -> Workload:
    """Return prompts with images of noise, each another one; `size` is width and height in pixels, `kind` jpeg or png."""

    def draw() -> BenchRequest:
        pictures = tuple(noise_url(source.random, size, kind) for _ in range(images))
        return BenchRequest((Turn(source.text(input_len), output_len, input_len, pictures),))

    warmup = draw()
    return Workload(tuple(draw() for _ in range(count)), warmup)


def noise_url(draw: random.Random, size: tuple[int, int], kind: str) -> str:
    """Return a `data:` URL of an image whose pixels are random."""
    from PIL import Image

    image = Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1]))
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"

"""Perplexity of a user's text, in the windows of `gemcutter score`; without one, of a passage that is built in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, read_text
from gemcutter.evals.generated import integer
from gemcutter.evals.perplexity import WINDOW, cut
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply
from gemcutter.parity.passage import PASSAGE

MODE = Mode("windows", "every token once, with what stands before it in its window", "score", "perplexity-1")


class Perplexity:
    """The task."""

    name = "perplexity"
    about = "how well a text is predicted (--data FILE, else a built-in passage)"
    modes: Sequence[Mode] = (MODE,)
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the windows of the text, whose tokens that count are the one choice. Raises RequestError."""
        window = integer(asked, "window", WINDOW, 2)
        stride = integer(asked, "stride", window - 1, 1)
        if stride > window - 1:
            raise RequestError(
                f"--option stride={stride} would skip tokens between windows of {window}; give at most {window - 1}"
            )
        if data.place is not None and not data.place.is_file():
            raise RequestError(f"{data.place}: expected a text file")
        text = PASSAGE if data.place is None else read_text(data.place)
        tokenizer = asked.tokenizer()
        for number, each in enumerate(cut(tokenizer.encode(text), tokenizer.bos_id, window, stride)):
            yield Item(f"{number:06}", each.ids[: each.context], None, choices=(each.ids[each.context :],))

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Return the mean loss of a window, whose mean is over tokens."""
        tokens = len(item.choices[0])
        loss = -reply.logprobs[0] / tokens
        return Grade(loss, {"nll": loss}, {"nll": tokens})

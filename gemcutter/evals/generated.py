"""What tasks whose items are generated share: their options, their seeds, and the words that texts are made of.

Owns the names of the options. Refuses to know any task. The same seed gives the same items everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from gemcutter.errors import RequestError
from gemcutter.evals.task import Asked

# Options of these tasks, given with --option; those of one may stand beside another, which does not read them.
OPTIONS = {
    "count": "how many items are made",
    "lengths": "needle: tokens of a prompt and its reply",
    "depths": "needle: where the needle is, in percent of the text",
    "sizes": "ocr: heights of the font in pixels",
    "window": "perplexity: tokens of a window",
    "stride": "perplexity: tokens from one window's start to the next",
}


def words(text: str) -> list[str]:
    """Return the words of a text; a list of many is easier to read so."""
    return text.split()


NOUNS = words(
    "lamp river garden window letter bridge market harbour kitchen forest engine mirror basket ladder candle pillow blanket "
    "hammer bottle carpet tunnel valley island meadow orchard cabin tower village street corner"
)
ADJECTIVES = words("old small quiet red heavy bright narrow wooden empty cold round green broken tall soft yellow dusty clean")
VERBS = words("stood lay waited shone moved rested slept vanished appeared remained")
PLACES = words("near behind under above beside beyond")
NAMES = words("Lima Oslo Cairo Delhi Quito Seoul Turin Porto Malmo Ghent Basel Leeds Tampa Osaka Accra Davos")


def check_options(asked: Asked) -> None:
    """Raise RequestError for options that no task of this kind has."""
    if unknown := [name for name in asked.options if name not in OPTIONS]:
        known = "; ".join(f"{name}: {about}" for name, about in OPTIONS.items())
        raise RequestError(f"--option {unknown[0]}: options are {known}")


def integers(asked: Asked, name: str, usual: Sequence[int], least: int, most: int | None = None) -> tuple[int, ...]:
    """Return an option's integers, none of them twice, in their order. Raises RequestError."""
    check_options(asked)
    text = asked.options.get(name)
    if text is None:
        return tuple(usual)
    try:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise RequestError(f"--option {name}: expected integers with commas between them, found {text!r}") from None
    if min(found) < least or (most is not None and max(found) > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise RequestError(f"--option {name}: expected {bounds}, found {text!r}")
    return found


def integer(asked: Asked, name: str, usual: int, least: int) -> int:
    """Return an option that is one integer. Raises RequestError."""
    first, *more = integers(asked, name, (usual,), least)
    if more:
        raise RequestError(f"--option {name}: expected one integer, found {asked.options[name]!r}")
    return first


def random_of(task: str, asked: Asked, item: object) -> random.Random:
    """Return the source of an item's random numbers, which depends on nothing else."""
    return random.Random(f"{task} {asked.seed} {item}")


def sentence(source: random.Random) -> str:
    """Return a sentence that holds no digit and no name."""
    first, second = source.sample(NOUNS, 2)
    one, other = source.choices(ADJECTIVES, k=2)
    return f"The {one} {first} {source.choice(VERBS)} {source.choice(PLACES)} the {other} {second}."

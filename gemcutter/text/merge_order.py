"""The order of a vocabulary's merges in few numbers: what half a million of them say beyond the pieces themselves.

A trainer of byte-pair encoding numbers pieces as it makes them, so a merge's rank is nearly always its joint piece's id, and
every way to cut that piece in two is a merge, the longest left half first. Owns the finding of this rule in a list of merges
and the list of what does not keep to it. Refuses to guess: where the rule and the exceptions do not give each pair the place
that the list gives it, there is no order. Read `bpe.py` for who merges, `vocabulary_cache.py` for who keeps orders.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Key = tuple[int, int, int]  # of a pair: (joint id, 0, -length of the left half), or (id of the last regular joint, 1, place)
Pair = tuple[str, str]

MOST_EXCEPTIONS = 20_000  # pairs and pieces; released vocabularies have some 1,500, all of them runs of white space
MOST_CHARACTERS = 1_000  # of a piece, all of whose cuts are tried
PAUSE_EVERY = 256  # merges or pieces


@dataclass(frozen=True, slots=True)
class MergeOrder:
    """The exceptions: pieces whose pairs do not keep to the rule, and the key of each of those pairs that is a merge."""

    irregular: frozenset[int]
    keys: Mapping[Pair, Key]

    def ranker(self, ids: Mapping[str, int]) -> Callable[[str, str], Key | None]:
        """Return the function from two pieces of the vocabulary `ids` to their key, None where they are no merge."""
        irregular, keys = self.irregular, self.keys

        def rank(left: str, right: str) -> Key | None:
            joint = ids.get(left + right)
            if joint is None:
                return None
            return keys.get((left, right)) if joint in irregular else (joint, 0, -len(left))

        return rank


def no_pause() -> None:
    """Go on at once."""


def find_order(ids: Mapping[str, int], merges: Sequence[str], pause: Callable[[], None] = no_pause) -> MergeOrder | None:
    """Return the order of `merges`, "left right" each, best first, of pieces that all have ids; None where there is none.

    Of a merge that is there twice the last place counts. `pause` is called often: it takes a second for a released vocabulary.
    """
    numbers = set(ids.values())
    if len(numbers) < len(ids) or not numbers <= set(range(2 * len(ids))) or max(map(len, ids)) > MOST_CHARACTERS:
        return None
    runs = _runs(ids, merges, pause)
    regular = _in_order(runs, _whole(ids, merges, runs, pause))
    irregular = frozenset(numbers - regular)
    keys, last = dict[Pair, Key](), -1
    for joint, start, stop in runs:
        if joint in regular:
            last = joint
        elif len(keys) + len(irregular) > MOST_EXCEPTIONS:
            return None
        else:
            keys.update({pair_of(merges[place]): (last, 1, place) for place in range(start, stop)})
    return MergeOrder(irregular, keys)


class Runs:
    """Neighbours in a list of merges that make the same piece: its id, and the places from the first to behind the last."""

    def __init__(self) -> None:
        self.joints, self.bounds = array("q"), array("q", [0])

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.joints, self.bounds, self.bounds[1:], strict=False)


def _runs(ids: Mapping[str, int], merges: Sequence[str], pause: Callable[[], None]) -> Runs:
    found, last = Runs(), -1
    for place, merge in enumerate(merges):
        if not place % PAUSE_EVERY:
            pause()
        joint = ids[merge.replace(" ", "", 1)]
        if joint != last:
            found.joints.append(joint)
            found.bounds.append(place + 1)
        found.bounds[-1], last = place + 1, joint
    return found


def _whole(ids: Mapping[str, int], merges: Sequence[str], runs: Runs, pause: Callable[[], None]) -> set[int]:
    """Return the pieces whose merges are all their cuts in two pieces, the longest left half first, and stand together."""
    places, apart = dict[int, tuple[int, int]](), set[int]()
    for joint, start, stop in runs:
        if joint in places:
            apart.add(joint)
        places[joint] = start, stop
    found = set[int]()
    for count, (piece, id) in enumerate(ids.items()):
        if not count % PAUSE_EVERY:
            pause()
        start, stop = places.get(id, (0, 0))
        cuts = [f"{piece[:n]} {piece[n:]}" for n in range(len(piece) - 1, 0, -1) if piece[:n] in ids and piece[n:] in ids]
        if cuts == merges[start:stop] and id not in apart:
            found.add(id)
    return found


def _in_order(runs: Runs, whole: set[int]) -> set[int]:
    """Return those of the `whole` pieces that keep to the order of ids: those without merges, and the longest rising row."""
    joints = [joint for joint in runs.joints if joint in whole]
    best, start = range(0), 0
    for stop in range(1, len(joints) + 1):
        if stop == len(joints) or joints[stop] < joints[stop - 1]:
            best, start = max(best, range(start, stop), key=len), stop
    rising = set(joints[best.start : best.stop])
    return rising | (whole - set(joints))


def pair_of(merge: str) -> Pair:
    """Return the halves of a merge, "left right"."""
    left, _, right = merge.partition(" ")
    return left, right

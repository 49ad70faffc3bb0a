"""llama.cpp's saved state of one sequence, spelled again with more positions.

Owns the layout that llama_state_seq_get_data writes for a model with windows, which is checked to the last byte: a header; then
for the cache of the global layers and for that of the windowed ones, the number of streams and of cells, each cell's position and
owners, whether values are transposed, the number of layers, and their keys and values row by row. Standard library only.
"""

from __future__ import annotations

import struct

HEADER_BYTES = 8


def grow(seed: bytes, depth: int, window: int) -> bytearray:
    """Format the state of a few positions again with `depth`, of which caches with windows hold the last `window`.

    Raises NotImplementedError for a state that is laid out otherwise.
    """
    reader, grown = Reader(seed, HEADER_BYTES), bytearray(seed[:HEADER_BYTES])
    for held in (depth, min(depth, window)):  # first the global layers' cache, then the windowed ones'
        streams, cells = reader.numbers("II")
        if streams != 1 or not cells:
            raise NotImplementedError("this version's state has another layout")
        for _ in range(cells):
            _, owners = reader.numbers("II")
            reader.skip(4 * owners)
        grown += struct.pack("<II", 1, held)
        for position in range(depth - held, depth):
            grown += struct.pack("<III", position, 1, 0)
        transposed, layers = reader.numbers("II")
        if transposed:
            raise NotImplementedError("this version's values are transposed")
        grown += struct.pack("<II", transposed, layers)
        for _ in range(2 * layers):  # keys of all layers, then values
            kind, row_bytes = reader.numbers("IQ")
            rows = reader.skip(row_bytes * cells)
            grown += struct.pack("<IQ", kind, row_bytes) + (rows * -(-held // cells))[: row_bytes * held]
    if reader.place != len(seed):
        raise NotImplementedError("this version's state has another layout")
    return grown


class Reader:
    """Reads numbers from bytes, one after the other."""

    def __init__(self, content: bytes, place: int) -> None:
        self.content, self.place = content, place

    def numbers(self, kinds: str) -> tuple[int, ...]:
        """Read little-endian numbers."""
        size = struct.calcsize(f"<{kinds}")
        if self.place + size > len(self.content):
            raise NotImplementedError("this version's state has another layout")
        found = struct.unpack_from(f"<{kinds}", self.content, self.place)
        self.place += size
        return found

    def skip(self, count: int) -> bytes:
        """Pass over bytes, and give them."""
        self.place += count
        return self.content[self.place - count : self.place]

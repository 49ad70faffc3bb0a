"""POST /v1/embeddings and /v1/score: what their bodies may hold, and which texts are in them.

Owns the fields and the forms of inputs. Refuses to know HTTP and tokenizers. Read `server/embedding_task.py` for what becomes of
the texts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.fields import RawText, read_texts, refuse

Pooling = Annotated[
    Literal["mean", "last"],
    Field(description="mean: of the states of all tokens but <bos>; last: the state of the last token"),
]


class EmbeddingRequest(BaseModel):
    """The body of POST /v1/embeddings. Ignored: user, and names that are not known."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: Any = Field(description="a text, a list of texts, a list of token ids, or a list of such lists")
    pooling: Pooling = "mean"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, description="refused: vectors of this model can't be cut")
    normalize: bool = Field(default=True, description="whether vectors get the length 1")


class ScoreRequest(BaseModel):
    """The body of POST /v1/score: one text against one or several, or two lists in pairs. Ignored: as above."""

    model_config = ConfigDict(extra="allow")

    model: str
    pooling: Pooling = "mean"
    text_1: str | list[str]
    text_2: str | list[str]


def read_inputs(request: EmbeddingRequest, options: ServerOptions) -> list[RawText]:
    """Return the inputs in order. Raises FieldError, naming the field, for what can't be served."""
    if request.dimensions is not None:
        refuse("dimensions", "vectors of this model can't be cut; leave it out")
    return read_texts(request.input, "input", options.max_batch)


def read_pairs(request: ScoreRequest, options: ServerOptions) -> tuple[list[str], list[tuple[int, int]]]:
    """Return all texts, and the pairs of them that are compared. Raises FieldError, naming the field."""
    first = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    second = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if not first or not second:
        refuse("text_1" if not first else "text_2", "expected one text or more")
    if len(first) not in (1, len(second)):
        refuse("text_2", f"expected {len(first)} texts, as many as in text_1, found {len(second)}")
    if len(first) + len(second) > options.max_batch:
        refuse("text_2", f"at most {options.max_batch} texts, found {len(first) + len(second)}")
    pairs = [(index if len(first) > 1 else 0, len(first) + index) for index in range(len(second))]
    return [*first, *second], pairs

"""What a model is asked while `bench` measures drafts: how many are right depends on the text.

Owns the questions, of the kinds that people ask, and how they become ids: by the checkpoint's own template, or without one as
raw text. Refuses to know what is measured. Read `bench.py` for who asks.
"""

from __future__ import annotations

from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.text_assets import read_text_assets

QUESTIONS = (
    "Explain how tides come about, in several paragraphs.",
    "Write a Python function that parses a CSV line with quoted fields, and explain it step by step.",
    "Tell a long story about a lighthouse keeper who finds a message in a bottle.",
    "List the planets of the solar system as a JSON array of objects with name, diameter_km and moons.",
    "A train leaves at 9:40 and travels 210 km at 84 km/h, with a stop of 15 minutes. When does it arrive? Show all steps.",
    "Compare steam engines and diesel engines for ships in a table, and discuss each row.",
    "Translate into French, sentence by sentence, and comment on each: The harbour was quiet. Two boats lay at the pier. "
    "Nobody answered when we called.",
    "Summarise the causes and consequences of the invention of printing.",
)


def encode_questions(checkpoint: Checkpoint, chat_template: str | None = None) -> tuple[tuple[int, ...], ...]:
    """Return the ids of a prompt for each question. Raises GemcutterError for a checkpoint without a tokenizer."""
    text = read_text_assets(checkpoint, chat_template)
    if text.template is None:
        return tuple(tuple(text.tokenizer.encode(question)) for question in QUESTIONS)
    return tuple(tuple(text.template.encode([{"role": "user", "content": question}])) for question in QUESTIONS)

"""IFEval: every kind of instruction, kept and broken, as lm-eval judges it; and what is missing, said before a model is loaded.

`nltk_data` holds tables of a few words, enough to find the ends of sentences in these replies.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nltk
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.records import Record
from gemcutter.evals.report import summarize
from gemcutter.evals.task import Asked, Item, Reply
from gemcutter.evals.tasks import find_mode, open_task

TABLES = Path(__file__).parent / "nltk_data"
ENGLISH = "the weather in the north of the country was cold and wet during the whole of last winter"
# Kind, its arguments, a reply that keeps it and one that does not.
KINDS: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["lamp", "oil"]}, "An oil lamp.", "An oil."),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "Sea and sea.", "The sea."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A dog.", "A cat."),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Quid quo.", "Quid."),
    ("language:response_language", {"language": "de"}, "Das ist ein kurzer Satz auf Deutsch.", ENGLISH),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Dr. A came. He left.", "Dr. A came."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "Two words", "These are three"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen more.",
        "First.\n\nMore then.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], [date]", "Dear [name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hello\nP.S. Bye", "Hello"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "A *word* here", "A word here"),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part 1\na\nPart 2\nb", "Part 1\na"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1"),
    ("detectable_format:title", {}, "<<Poem>>\nline", "Poem"),
    ("combination:two_responses", {}, "One ****** two", "One two"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi!"),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. The end.", "The end. So"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "BIG and RED", "BIG"),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.upper()),
    ("punctuation:no_comma", {}, "No comma", "A, b"),
    ("startend:quotation", {}, '"Quoted"', "Quoted"),
]


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(TABLES)])


def row(number: int, *instructions: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row as the data set has it."""
    names, arguments = [name for name, _ in instructions], [dict(given) for _, given in instructions]
    return {"key": number, "prompt": f"Say hi {number}.", "instruction_id_list": names, "kwargs": arguments}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    (folder / "input_data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


def items(folder: Path, mode: str = "chat") -> list[Item]:
    """Return the items of a folder."""
    task = open_task("ifeval")
    return list(task.items(Data.of("ifeval", None, str(folder)), find_mode(task, mode), Asked()))


def graded(item: Item, text: str) -> Any:
    """Return the grade of a reply."""
    task = open_task("ifeval")
    return task.grade(item, find_mode(task, "chat"), Reply(text=text), Asked())


def test_every_kind_that_lm_eval_knows_is_judged_as_it_judges(tmp_path: Path) -> None:
    rows = [row(number, (name, given)) for number, (name, given, _, _) in enumerate(KINDS)]
    found = items(write(tmp_path, rows))
    from lm_eval.tasks.ifeval import instructions_registry, utils

    assert {name for name, *_ in KINDS} == set(instructions_registry.INSTRUCTION_DICT)
    for item, line, (name, _, kept, broken) in zip(found, rows, KINDS, strict=True):
        for text, is_kept in ((kept, True), (broken, False)):
            grade = graded(item, text)
            assert grade.extracted == [is_kept], (name, text)
            theirs = utils.process_results(line, [text])
            assert grade.metrics["prompt_strict"] == theirs["prompt_level_strict_acc"] == is_kept
            assert grade.metrics["prompt_loose"] == theirs["prompt_level_loose_acc"]
            assert [grade.metrics["inst_loose"]] == theirs["inst_level_loose_acc"]


def test_the_mean_of_instructions_is_over_instructions(tmp_path: Path) -> None:
    comma, title, quotes = ("punctuation:no_comma", {}), ("detectable_format:title", {}), ("startend:quotation", {})
    rows = [row(1, comma), row(2, comma, title, quotes), row(3, comma)]
    texts = ["a, b", "plain", "plain"]
    records = list[Record]()
    for item, text in zip(items(write(tmp_path, rows)), texts, strict=True):
        grade = graded(item, text)
        records.append(Record(item.id, metrics=grade.metrics, counts=grade.counts))
    means = {each.name: each.mean for each in summarize(records).means}
    from lm_eval.tasks.ifeval import utils

    theirs = [utils.process_results(line, [text]) for line, text in zip(rows, texts, strict=True)]
    assert means["inst_strict"] == utils.agg_inst_level_acc([each["inst_level_strict_acc"] for each in theirs]) == 2 / 5
    assert means["prompt_strict"] == pytest.approx(1 / 3)


def test_loose_looks_past_the_first_line(tmp_path: Path) -> None:
    [item] = items(write(tmp_path, [row(1, ("startend:quotation", {}))]))
    metrics = graded(item, 'Sure:\n"Quoted"').metrics
    assert metrics == {"prompt_strict": 0.0, "inst_strict": 0.0, "prompt_loose": 1.0, "inst_loose": 1.0}
    assert graded(item, " ").extracted is None


def test_prompts_in_both_modes_and_parquet_with_empty_arguments(tmp_path: Path) -> None:
    rows = [row(7, ("punctuation:no_comma", {"num_words": None, "relation": None}))]
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert items(tmp_path)[0].prompt == [{"role": "user", "content": "Say hi 7."}]
    [item] = items(tmp_path, "raw")
    assert (item.id, item.prompt, item.gold) == ("7", "Say hi 7.", ["punctuation:no_comma"])
    assert graded(item, "No comma").metrics["prompt_strict"] == 1.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"instruction_id_list": ["keywords:rhyme"]}, r"row 1 \(key 1\): .*no checker 'keywords:rhyme'"),
        ({"kwargs": []}, "expected an object for each of the 1 instructions"),
        ({"kwargs": [{"num_cats": 3}]}, r"row 1 \(key 1\): 'kwargs' of punctuation:no_comma: .*num_cats"),
        ({"prompt": 3}, "'prompt': expected str, found int"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        items(write(tmp_path, [row(1, ("punctuation:no_comma", {})) | change]))


def test_missing_tables_are_named_and_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any) -> None:
        raise AssertionError("the tables were fetched")

    monkeypatch.setattr(nltk, "download", fetch)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(RequestError, match=r"nltk\.downloader -d FOLDER punkt_tab.*NLTK_DATA"):
        items(write(tmp_path, [row(1, ("punctuation:no_comma", {}))]))


@pytest.mark.parametrize("package", ["langdetect", "nltk", "immutabledict"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == package:
            raise ImportError(name, name=name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=rf"{package} is not installed.*gemcutter\[ifeval\]"):
        items(write(tmp_path, [row(1, ("punctuation:no_comma", {}))]))

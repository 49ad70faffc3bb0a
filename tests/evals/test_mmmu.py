"""MMMU and MMMU-Pro: what is asked, where images stand, and what is read out of replies.

lm-eval's own mmmu is the oracle of prompts and rules, except where it draws a letter at random. sgl-eval's prompts are a golden.
"""

from __future__ import annotations

import ast
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.tasks.mmmu import utils as oracle
from PIL import Image

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.extract import LETTERS
from gemcutter.evals.extract_mmmu import is_open_answer_right, mmmu_letter, mmmu_pro_letter, open_answers
from gemcutter.evals.task import Asked, Item, Reply
from gemcutter.evals.tasks import find_mode, open_task

GOLDENS = Path(__file__).parents[1] / "goldens" / "evals"
ROWS = json.loads((GOLDENS / "mmmu_rows.json").read_text())
SGL_EVAL = json.loads((GOLDENS / "sgl_eval_mmmu.json").read_text())


def picture(number: int) -> bytes:
    """Return an image whose width says which it is."""
    stream = io.BytesIO()
    Image.new("RGB", (number, 1), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def with_pictures(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with columns of images, as the data set has them."""
    images = {f"image_{n}": {"bytes": picture(n), "path": None} if n in row["images"] else None for n in range(1, 8)}
    return {name: value for name, value in row.items() if name != "images"} | images


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as parquet with structs of images."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def items(folder: Path, task: str, mode: str) -> list[Item]:
    """Return the items of a mode."""
    found = open_task(task)
    return list(found.items(Data.of(task, None, str(folder)), find_mode(found, mode), Asked()))


def parts(item: Item) -> list[Any]:
    """Return the text of an item's parts, and for an image the number of its column."""
    [message] = item.prompt
    assert isinstance(message, dict)
    return [
        part["text"] if part["type"] == "text" else Image.open(io.BytesIO(part["image"])).width for part in message["content"]
    ]


def flat(found: list[Any]) -> str:
    """Return parts as one text with lm-eval's mark for images."""
    return "".join(part if isinstance(part, str) else "<image>" for part in found)


@pytest.fixture
def mmmu(tmp_path: Path) -> Path:
    """Return a folder of subjects, each with a parquet file."""
    for row in ROWS["mmmu"]:
        subject = "_".join(row["id"].split("_")[1:-1])
        same = [with_pictures(each) for each in ROWS["mmmu"] if f"_{subject}_" in each["id"]]
        write(tmp_path / subject / "validation-00000-of-00001.parquet", same)
    return tmp_path


@pytest.fixture
def mmmu_pro(tmp_path: Path) -> Path:
    """Return a folder with the three parts of MMMU-Pro."""
    rows = [with_pictures(row) for row in ROWS["mmmu_pro"]]
    write(tmp_path / "standard (10 options)" / "test-00000-of-00001.parquet", rows)
    write(tmp_path / "standard (4 options)" / "test-00000-of-00001.parquet", rows[1:2])
    pages = [row | {"image": {"bytes": picture(9), "path": None}} for row in rows]
    write(tmp_path / "vision" / "test-00000-of-00001.parquet", pages)
    return tmp_path


def test_prompts_and_the_order_of_images_are_lm_evals(mmmu: Path) -> None:
    found = {item.id: item for item in items(mmmu, "mmmu", "lm-eval")}
    assert set(found) == {row["id"] for row in ROWS["mmmu"]}
    for row in ROWS["mmmu"]:
        mine = parts(found[row["id"]])
        assert flat(mine) == oracle.doc_to_text(row)
        images = [int(name["n"]) for name in oracle.doc_to_image(row | {f"image_{n}": {"n": n} for n in range(1, 8)})]
        assert [part for part in mine if isinstance(part, int)] == images
        assert found[row["id"]].gold == row["answer"]


def test_the_direct_wording_is_sglangs(mmmu: Path) -> None:
    found = {item.id: item for item in items(mmmu, "mmmu", "mmmu-direct")}
    assert parts(found["validation_Accounting_2"]) == [
        "Baxter lists ",
        2,
        " and then ",
        1,
        ". Compare ",
        2,
        ".\n(A) ",
        3,
        "\n(B) ",
        1,
        "\n(C) none ",
        3,
        " of them\n(D) $x<y>$\n\nAnswer with the option's letter from the given choices directly.",
    ]
    several = found["validation_Diagnostics_and_Laboratory_Medicine_3"]
    assert parts(several) == [
        "How much is shown?\n",
        1,
        "\nAnswer the question using a single word or phrase.",
    ]
    assert several.gold == ["3.43", "twenty four"]
    assert several.subject == "Diagnostics_and_Laboratory_Medicine"


PIECES = (
    "(A)",
    "(B)",
    "A",
    "B",
    "C.",
    "the",
    "answer",
    "is",
    "B,",
    "so",
    "red",
    "Deep Blue",
    "(",
    ")",
    ":",
    "Answer:",
    "'",
    "D",
    "I",
)
OPTIONS = dict(zip("ABCD", ("Red", "deep blue", "green", "red"), strict=True))


def replies(count: int) -> list[str]:
    """Return made-up replies, the same each time."""
    draw = random.Random(5)
    return [
        "",
        " ",
        *(" ".join(draw.choices(PIECES, k=draw.randint(1, 12))) + draw.choice(("", ".", "'!")) for _ in range(count)),
    ]


class Drawn(Exception):
    """Raised in place of a random letter."""


def test_letters_are_read_as_lm_eval_does_and_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(_: Any) -> str:
        raise Drawn

    monkeypatch.setattr(oracle.random, "choice", choice)
    unread = 0
    for text in replies(3000):
        try:
            wanted = oracle.parse_multi_choice_response(text, list(OPTIONS), OPTIONS)
        except Drawn:
            wanted, unread = None, unread + 1
        assert mmmu_letter(text, OPTIONS) == wanted, text
    assert 100 < unread < 2900


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("First (A).\nAnswer: C", "C"),
        ("Answer: B or C, rather (D)", "D"),
        ("(A) no, (B) yes", "B"),
        ("It is B. Not A.", "A"),  # A stands before the last point, which is taken off; only "A " and "B." are left
        ("Hence D.", "D"),
        ("the one that shows a deep blue sea", "B"),
        ("a deep blue sea", None),
        ("", None),
    ],
)
def test_the_rule_of_mmmu_pro(text: str, letter: str | None) -> None:
    assert mmmu_pro_letter(text, OPTIONS) == letter


def test_open_answers_are_judged_as_lm_eval_does() -> None:
    draw = random.Random(6)
    words = (
        "3.43",
        "1,200",
        "so ",
        "is ",
        "x =",
        "\n",
        "The answer ",
        "Twenty four",
        "-2e3",
        "$5",
        "e",
        ".",
        "nan",
        " 7",
        "is:",
        "",
    )
    right = ("3.43", "1,200", "twenty four", "e", "-2000", ["7", "5.0"], "$5", "['7', 'e']")
    verdicts = list[bool]()
    for _ in range(3000):
        text, gold = "".join(draw.choices(words, k=draw.randint(1, 9))), draw.choice(right)
        verdicts.append(is_open_answer_right(open_answers(text), gold))
        assert verdicts[-1] == oracle.eval_open(gold, oracle.parse_open_response(text)), (text, gold)
    assert 300 < sum(verdicts) < 2700


def test_scores_are_lm_evals_and_a_reply_without_a_letter_is_wrong(mmmu: Path) -> None:
    task = open_task("mmmu")
    mode = find_mode(task, "lm-eval")
    for item in items(mmmu, "mmmu", "lm-eval"):
        row = next(row for row in ROWS["mmmu"] if row["id"] == item.id)
        for text in ("B", "(C)", "the answer is 1200", "I", "so 3.43"):
            if row["question_type"] == "multiple-choice" and mmmu_letter(text, item.about["options"]) is None:
                continue
            grade = task.grade(item, mode, Reply(text=text), Asked())
            assert grade.metrics["accuracy"] == oracle.process_results(row, [text])["acc"]
        silent = task.grade(item, mode, Reply(text=""), Asked())
        assert silent.extracted is None
        assert silent.metrics["accuracy"] == 0.0


def test_prompts_of_mmmu_pro_are_sgl_evals(mmmu_pro: Path) -> None:
    found = {item.id: parts(item) for item in items(mmmu_pro, "mmmu-pro", "sgl-eval")}
    assert found == SGL_EVAL["standard"]
    pages = {item.id: parts(item) for item in items(mmmu_pro, "mmmu-pro", "sgl-eval-vision")}
    assert pages == {id: [9, text] for id, text in SGL_EVAL["vision"].items()}


def test_mmmu_pros_own_wordings(mmmu_pro: Path) -> None:
    four = items(mmmu_pro, "mmmu-pro", "standard4-direct")
    assert len(four) == 1
    last = "\nA. yes\nB. it's not\nC. perhaps\nD. no\nAnswer with the option letter from the given choices directly."
    assert parts(four[0]) == ["Before ", 2, " and after ", 1, ", again ", 2, last]
    page = items(mmmu_pro, "mmmu-pro", "vision-cot")[0]
    assert parts(page)[0] == 9
    assert parts(page)[1].startswith("Write out the multiple-choice question in the image and then solve it. The last line")
    task = open_task("mmmu-pro")
    mode = find_mode(task, "vision-cot")
    assert task.grade(page, mode, Reply(text="Well.\nAnswer: J"), Asked()).metrics == {"accuracy": 1.0}
    assert task.grade(page, mode, Reply(text="I can't see it"), Asked()).metrics == {"accuracy": 0.0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"options": "__import__('os').getcwd()"},
            "validation_Accounting_1.*'options': expected a list of texts as Python writes it",
        ),
        ({"options": "['a', 3]"}, "validation_Accounting_1.*'options'"),
        ({"options": "[" * 5000}, "validation_Accounting_1.*'options'"),
        ({"options": "[]"}, "validation_Accounting_1.*'options'"),
        ({"options": str([str(n) for n in range(27)])}, "at most 26, found 27"),
        ({"question": "<image 4>"}, "validation_Accounting_1.*'image_4': expected an image's bytes, found none"),
        ({"answer": None}, "'answer': expected str or list"),
    ],
)
def test_bad_rows_are_refused_by_name(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    write(tmp_path / "validation-00000-of-00001.parquet", [with_pictures(ROWS["mmmu"][0] | change)])
    with pytest.raises(RequestError, match=told):
        items(tmp_path, "mmmu", "mmmu-direct")


def test_options_in_the_test_rows_are_what_python_reads() -> None:
    for row in (*ROWS["mmmu"], *ROWS["mmmu_pro"]):
        assert len(ast.literal_eval(row["options"])) <= len(LETTERS)

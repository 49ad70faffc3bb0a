"""Wraps the prose of Markdown pages at 120 columns: `tools/wrap_markdown.py FILE...` rewrites those files in place.

Only paragraphs and list items with a longer line are touched; code, tables, headings and comments stay as they are, and no
character but white space ever changes. `tests/rules/test_prose.py` holds the rule.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

WIDTH = 120
ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
UNTOUCHED = ("|", "<!--", "#")


def wrap_page(text: str) -> str:
    """Return a page with its long paragraphs wrapped."""
    found: list[str] = []
    paragraph: list[str] = []
    in_code = False
    for line in text.split("\n"):
        is_fence = line.lstrip().startswith("```")
        is_indented_code = line.startswith("    ") and not paragraph
        if in_code or is_fence or is_indented_code or not line.strip() or line.startswith(UNTOUCHED):
            found += [*wrap_paragraph(paragraph), line]
            paragraph = []
            in_code ^= is_fence
        else:
            if ITEM.match(line):
                found += wrap_paragraph(paragraph)
                paragraph = []
            paragraph.append(line)
    return "\n".join([*found, *wrap_paragraph(paragraph)])


def wrap_paragraph(lines: list[str]) -> list[str]:
    """Return a paragraph or list item wrapped, its continuation lines indented as its text; as it is if no line is long."""
    if all(len(line) <= WIDTH for line in lines):
        return lines
    item = ITEM.match(lines[0])
    lead = item[0] if item else lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    text = " ".join([lines[0][len(lead) :].strip(), *(line.strip() for line in lines[1:])])
    indent = " " * len(lead)
    return textwrap.wrap(
        text, WIDTH, initial_indent=lead, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def main() -> None:
    """Wrap the pages that the command line names."""
    for path in map(Path, sys.argv[1:]):
        before = path.read_text()
        after = wrap_page(before)
        assert before.split() == after.split(), f"{path}: words would change"
        if after != before:
            path.write_text(after)


if __name__ == "__main__":
    main()

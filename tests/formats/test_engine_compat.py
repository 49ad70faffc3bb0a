"""The rules about other engines: each names its sources, speaks of known facts, and speaks when they hold and only then."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gemcutter.checkpoint.doctor.engine_compat import FACTS, judge, read_rules

THREAD = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+")


def test_rules_speak_of_known_facts_and_engines_and_name_their_sources() -> None:
    book = read_rules()
    for rule in book["rules"]:
        assert set(rule) == {"engine", "when", "versions", "effect", "why", "threads"}
        assert {condition.removeprefix("!") for condition in rule["when"]} <= set(FACTS)
        assert rule["engine"] in book["engines"]
        assert rule["effect"] in book["effects"]
        assert rule["versions"]
        assert rule["why"]
        assert rule["threads"]
        assert all(THREAD.fullmatch(thread) for thread in rule["threads"])
    spoken = [(rule["engine"], tuple(rule["when"]), rule["versions"]) for rule in book["rules"]]
    assert len(set(spoken)) == len(spoken)
    assert {rule["engine"] for rule in book["rules"]} == set(book["engines"])


@pytest.mark.parametrize("rule", read_rules()["rules"], ids=lambda rule: f"{rule['engine']}: {rule['why'][:40]}")
def test_a_rule_speaks_when_its_facts_hold_and_only_then(rule: dict[str, Any]) -> None:
    wanted = [condition for condition in rule["when"] if not condition.startswith("!")]
    unwanted = [condition.removeprefix("!") for condition in rule["when"] if condition.startswith("!")]

    def speaks(facts: list[str]) -> bool:
        return any((each["engine"], each["why"]) == (rule["engine"], rule["why"]) for each in judge(tuple(facts)))

    assert speaks(wanted)
    assert not any(speaks([fact for fact in wanted if fact != left_out]) for left_out in wanted)
    assert not any(speaks([*wanted, fact]) for fact in unwanted)


def test_engines_without_a_rule_are_unknown() -> None:
    assert [each["engine"] for each in judge(())] == read_rules()["engines"]
    assert {each["verdict"] for each in judge(())} == {"unknown"}

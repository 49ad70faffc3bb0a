"""Tool calls: questions of which one declared function is the answer, or none, judged by its name and its arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcutter.evals.data import Data
from gemcutter.evals.generated import NAMES, NOUNS, integer, random_of, words
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

COUNT = 30
EVERY = 6  # of so many items, one needs no call
DECLARED = 4  # functions beside each question
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
PEOPLE = words("Anna Ben Clara David Emma Felix Greta Hugo")
CURRENCIES = words("EUR USD GBP JPY CHF")
MODE = Mode("chat", "one question in a user's turn, four tools declared", "generate", "tools-1", is_chat=True, max_tokens=256)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function, and how a question for it is made: the question, and the arguments that are right."""

    name: str
    about: str
    parameters: Mapping[str, Mapping[str, Any]]
    ask: Callable[[random.Random], tuple[str, dict[str, Any]]]

    @property
    def declared(self) -> dict[str, Any]:
        """Return the declaration in OpenAI's layout."""
        schema = {"type": "object", "properties": dict(self.parameters), "required": list(self.parameters)}
        return {"type": "function", "function": {"name": self.name, "description": self.about, "parameters": schema}}


def _weather(source: random.Random) -> tuple[str, dict[str, Any]]:
    city, unit = source.choice(NAMES), source.choice(("celsius", "fahrenheit"))
    return f"What is the weather in {city}, in {unit}?", {"city": city, "unit": unit}


def _convert(source: random.Random) -> tuple[str, dict[str, Any]]:
    amount, (one, other) = source.randrange(2, 900), source.sample(CURRENCIES, 2)
    return f"Convert {amount} {one} to {other}.", {"amount": amount, "source": one, "target": other}


def _timer(source: random.Random) -> tuple[str, dict[str, Any]]:
    minutes, label = source.randrange(2, 60), source.choice(NOUNS)
    return f'Set a timer of {minutes} minutes with the label "{label}".', {"minutes": minutes, "label": label}


def _message(source: random.Random) -> tuple[str, dict[str, Any]]:
    name, noun = source.choice(PEOPLE), source.choice(NOUNS)
    return f'Send {name} the message "Bring the {noun}".', {"recipient": name, "text": f"Bring the {noun}"}


def _route(source: random.Random) -> tuple[str, dict[str, Any]]:
    (start, end), by = source.sample(NAMES, 2), source.choice(("car", "train", "bicycle"))
    return f"How do I get from {start} to {end} by {by}?", {"origin": start, "destination": end, "by": by}


def _lights(source: random.Random) -> tuple[str, dict[str, Any]]:
    room, is_on = source.choice(("kitchen", "bedroom", "hall")), source.choice((True, False))
    return f"Switch the lights in the {room} {'on' if is_on else 'off'}.", {"room": room, "on": is_on}


TOOLS = (
    Tool(
        "get_weather",
        "Tell the weather of a city.",
        {"city": TEXT, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
        _weather,
    ),
    Tool("convert_currency", "Convert money.", {"amount": WHOLE, "source": TEXT, "target": TEXT}, _convert),
    Tool("set_timer", "Start a timer.", {"minutes": WHOLE, "label": TEXT}, _timer),
    Tool("send_message", "Send a text message.", {"recipient": TEXT, "text": TEXT}, _message),
    Tool("find_route", "Find a way between two cities.", {"origin": TEXT, "destination": TEXT, "by": TEXT}, _route),
    Tool("switch_lights", "Switch the lights of a room.", {"room": TEXT, "on": {"type": "boolean"}}, _lights),
)


class ToolUse:
    """The task."""

    name = "tools"
    about = "questions for one of several tools, or none (generated)"
    modes: Sequence[Mode] = (MODE,)
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield as many items as are asked for; one in six needs no call. Raises RequestError."""
        for number in range(integer(asked, "count", COUNT, 1)):
            source = random_of("tools", asked, number)
            tools = source.sample(TOOLS, DECLARED)
            gold: list[dict[str, Any]] = []
            if number % EVERY == EVERY - 1:
                question, subject = f"Write one sentence about a {source.choice(NOUNS)}.", "no call"
            else:
                question, arguments = tools[0].ask(source)
                gold, subject = [{"name": tools[0].name, "arguments": arguments}], "call"
            declared = [tool.declared for tool in sorted(tools, key=lambda tool: tool.name)]
            yield Item(f"{number:05}", [{"role": "user", "content": question}], gold, subject, options={"tools": declared})

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare all calls by name and arguments; `name` says whether the right function was meant at least."""
        calls = [{"name": call.name, "arguments": call.parsed} for call in reply.tool_calls]
        is_named = [call["name"] for call in calls] == [call["name"] for call in item.gold]
        read = None if item.gold and not calls else calls
        return Grade(read, {"accuracy": float(calls == item.gold), "name": float(is_named)})

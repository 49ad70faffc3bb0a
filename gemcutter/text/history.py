"""Conversations as clients send them, made such that a chat template prints them in the order in which they happened.

Owns the check of messages and the repair of what clients are known to send: calls without a type, arguments as text, results that
are objects or come in another order, one message with both an answer and calls. Refuses to know templates and ids; what can't be
repaired is an error that names the field. Read `chat.py` for who asks, `tool_schemas.py` for the declarations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gemcutter.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function")
# Types of content parts; only text carries something that a template prints, the others become a placeholder.
PART_TYPES = ("text", "image", "image_url", "audio", "input_audio", "video")
# Roles whose message may say nothing: of the model because it called or thought, of a tool because it found nothing.
MAY_BE_SILENT = ("assistant", "model", "tool", "function")
REASONING = ("reasoning", "reasoning_content")
NO_RESULT = "error: this call has no result"
UNREADABLE = "arguments"  # the name that arguments get which are no JSON object
THOUGHT, END_OF_THOUGHT = "<|channel>thought\n", "<channel|>"
SPELLINGS = {"model": "assistant", "function": "tool", "developer": "system"}  # of roles; models know but one


def check_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return copies of `messages`, each in the one spelling that templates read; the originals stay untouched.

    Arguments of tool calls become objects, results texts or parts; roles are system, user, assistant and tool.
    Raises RequestError with all that is wrong in messages and tools, named `messages[i].field` and `tools[i].field`.
    """
    problems: list[str] = []
    if not isinstance(messages, list | tuple) or not messages:
        problems.append(f"messages: expected a non-empty list of objects, found {_name(messages)}")
        messages = ()
    checked = [_check_message(f"messages[{i}]", message, problems) for i, message in enumerate(messages)]
    _check_tools(tools, problems)
    if problems:
        raise RequestError("the conversation can't be rendered", problems)
    return checked


def in_order(messages: Sequence[Mapping[str, Any]], *, joins_turns: Callable[[], bool]) -> list[dict[str, Any]]:
    """Return checked messages with every call's result after it, in the order of the calls.

    Calls and results get ids of their own, by which a template finds a result's name. A call without a result gets one that says
    so, unless it is the last message's, whose calls are still to be run. Where the template `joins_turns`, adjacent messages of
    the model being one turn, an answer that came before calls is a message before them: templates print it after the results.
    Raises RequestError for results that answer no call.
    """
    found, problems, place, count = list[dict[str, Any]](), list[str](), 0, 0
    while place < len(messages):
        message = dict(messages[place])
        place += 1
        if message.get("role") == "tool" and not _has_tool_responses(found):
            problems.append(f"messages[{place - 1}]: a tool's result, but no message with tool_calls is before it")
        calls = message.get("tool_calls")
        if not calls:
            found.append(message)
            continue
        end = next((i for i in range(place, len(messages)) if messages[i].get("role") != "tool"), len(messages))
        results = messages[place:end]
        names = [f"call_{count + i}" for i in range(len(calls))]
        message["tool_calls"] = [{**call, "id": name} for call, name in zip(calls, names, strict=True)]
        found += _split(message) if _says_and_calls(message) and joins_turns() else [message]
        is_pending = not results and end == len(messages)
        if not is_pending and not message.get("tool_responses"):
            found += _matched(calls, names, results)
        else:
            found += map(dict, results)
        place, count = end, count + len(calls)
    if problems:
        raise RequestError("the conversation can't be rendered", problems)
    return found


def without_thoughts(text: str) -> str:
    """Return an answer without the thoughts that a client left in it: templates drop them, too. Other markers stay."""
    kept, start = list[str](), 0
    while (begin := text.find(THOUGHT, start)) >= 0 and (end := text.find(END_OF_THOUGHT, begin)) >= 0:
        kept.append(text[start:begin])
        start = end + len(END_OF_THOUGHT)
    return "".join([*kept, text[start:]])


def _has_tool_responses(found: Sequence[Mapping[str, Any]]) -> bool:
    return bool(found) and (bool(found[-1].get("tool_responses")) or found[-1].get("role") == "tool")


def _says_and_calls(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content)


def _split(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an answer and the calls after it as two messages."""
    first = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_responses")}
    rest = {name: value for name, value in message.items() if name not in REASONING}
    return [first, {**rest, "content": ""}]


def _matched(calls: Sequence[Mapping[str, Any]], names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield a result for each call, in order, and then those of no call: by id, else by name, else by place."""
    waiting = list(results)
    of_call: dict[int, Mapping[str, Any]] = {}

    def take(number: int, result: Mapping[str, Any]) -> None:
        of_call[number] = result
        waiting[:] = [each for each in waiting if each is not result]

    for number, call in enumerate(calls):
        by_id = [each for each in waiting if call.get("id") and each.get("tool_call_id") == call["id"]]
        if by_id:
            take(number, by_id[0])
    for number, call in enumerate(calls):
        name = call["function"]["name"]
        if number not in of_call and (
            by_name := [each for each in waiting if _is_free(each, calls) and each.get("name") == name]
        ):
            take(number, by_name[0])
    for number in range(len(calls)):
        free = [each for each in waiting if _is_free(each, calls) and not each.get("name")]
        if number not in of_call and free:
            take(number, free[0])
    for number, (call, name) in enumerate(zip(calls, names, strict=True)):
        result = of_call.get(number, {"role": "tool", "content": NO_RESULT})
        yield {**result, "tool_call_id": name, "name": call["function"]["name"]}
    for result in waiting:
        yield {**result, "tool_call_id": "of no call", "name": result.get("name") or "unknown"}


def _is_free(result: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a result's id names no call of these: clients leave it out, or write one of their own."""
    return not any(call.get("id") and call["id"] == result.get("tool_call_id") for call in calls)


def _check_message(where: str, message: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        problems.append(f"{where}: expected an object with role and content, found {_name(message)}")
        return {}
    checked = dict(message)
    role = checked.get("role")
    if role not in ROLES:
        problems.append(f"{where}.role: expected one of {', '.join(ROLES)}, found {_name(role)}")
    is_silent = checked.get("content") is None and (role in MAY_BE_SILENT or "content" in checked)
    checked["role"] = SPELLINGS.get(role, role) if isinstance(role, str) else role
    if is_silent:
        checked["content"] = ""
    if checked["role"] == "tool":
        checked["content"] = _result(f"{where}.content", checked.get("content", ""), problems)
    _check_content(f"{where}.content", checked.get("content"), problems)
    if checked["role"] == "assistant":
        checked["content"] = _answer(checked.get("content"))
    for field in REASONING:
        if not isinstance(checked.get(field), str | None):
            problems.append(f"{where}.{field}: expected a string, found {_name(checked[field])}")
    if (calls := checked.pop("tool_calls", None)) is not None:
        checked |= {"tool_calls": found} if (found := _check_tool_calls(f"{where}.tool_calls", calls, problems)) else {}
    return checked


def _result(where: str, content: Any, problems: list[str]) -> Any:
    """Return what a tool found as a text or as parts; everything else as JSON text, as templates refuse objects."""
    is_parts = isinstance(content, list | tuple) and all(isinstance(part, Mapping) and "type" in part for part in content)
    if isinstance(content, str) or (is_parts and content):
        return content
    try:
        return json.dumps(content, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        problems.append(f"{where}: expected a text, parts, or what can be JSON, found {_name(content)} ({error})")
        return ""


def _answer(content: Any) -> Any:
    """Return an answer, a text or parts, without thoughts."""
    if isinstance(content, str):
        return without_thoughts(content)
    if not isinstance(content, list | tuple):
        return content
    is_text = [isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content]
    return [{**part, "text": without_thoughts(part["text"])} if i else part for i, part in zip(is_text, content, strict=True)]


def _check_content(where: str, content: Any, problems: list[str]) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        problems.append(f"{where}: expected a string or a list of parts, found {_name(content)}")
        return
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PART_TYPES:
            problems.append(f"{where}[{i}].type: expected one of {', '.join(PART_TYPES)}, found {_name(kind)}")
        elif kind == "text" and not isinstance(part.get("text"), str):
            problems.append(f"{where}[{i}].text: expected a string, found {_name(part.get('text'))}")


def _check_tool_calls(where: str, calls: Any, problems: list[str]) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        problems.append(f"{where}: expected a list of calls, found {_name(calls)}")
        return []
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problems.append(f"{where}[{i}].function: expected an object with a name and arguments, found {_name(function)}")
            continue
        arguments = _parse_arguments(f"{where}[{i}].function.arguments", function.get("arguments"), problems)
        checked.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return checked


def _parse_arguments(where: str, arguments: Any, problems: list[str]) -> Any:
    """Return the arguments as an object; None and an empty text are an empty one, and text that spells none is its argument.

    Models write what is no JSON, and clients send it back: the model should see what it wrote, and the next turn should run.
    """
    if arguments is None or isinstance(arguments, Mapping):
        return arguments or {}
    if not isinstance(arguments, str):
        problems.append(f"{where}: expected an object or its JSON text, found {_name(arguments)}")
        return {}
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, Mapping) else {UNREADABLE: arguments}


def _check_tools(tools: Any, problems: list[str]) -> None:
    if tools is None:
        return
    if not isinstance(tools, list | tuple):
        problems.append(f"tools: expected a list of function declarations, found {_name(tools)}")
        return
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problems.append(f"tools[{i}].function: expected an object with a name, found {_name(function)}")


def _name(value: Any) -> str:
    """Return a short description of a wrong value for an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "...")
    return repr(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"

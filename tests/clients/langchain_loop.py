"""langchain-openai's tool loop: a call, its result, an answer. Run as SCRIPT URL; prints JSON."""

import json
import sys
from importlib.metadata import version

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def f(x: str) -> str:
    """Return a text in capitals."""
    return x.upper()


model = ChatOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", model="demo", temperature=0, max_tokens=64, max_retries=0)
bound = model.bind_tools([f])
history = [HumanMessage("What is a lantern?")]
first = bound.invoke(history)
history.append(first)
history += [ToolMessage(f.invoke(call["args"]), tool_call_id=call["id"]) for call in first.tool_calls]
last = bound.invoke(history)
streamed = None
for chunk in bound.stream(history[:1]):
    streamed = chunk if streamed is None else streamed + chunk
found = {
    "version": version("langchain-openai"),
    "text": first.content,
    "calls": [[call["name"], call["args"]] for call in first.tool_calls],
    "streamed": [[call["name"], call["args"]] for call in streamed.tool_calls],
    "result": history[-1].content,
    "answer": last.content,
}
print(json.dumps(found))

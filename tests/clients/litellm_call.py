"""LiteLLM: one streamed call. Run as SCRIPT URL; prints JSON."""

import json
import os
import sys
from importlib.metadata import version

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices
import litellm

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}
stream = litellm.completion(
    model="openai/demo",
    api_base=f"{sys.argv[1]}/v1",
    api_key="none",
    messages=[{"role": "user", "content": "What is a lantern?"}],
    tools=[TOOL],
    max_tokens=64,
    temperature=0,
    stream=True,
)
text, name, arguments, reason = "", "", "", None
for chunk in stream:
    choice = chunk.choices[0]
    text += choice.delta.content or ""
    reason = choice.finish_reason or reason
    for call in choice.delta.tool_calls or ():
        name += call.function.name or ""
        arguments += call.function.arguments or ""
print(
    json.dumps({"version": version("litellm"), "text": text, "name": name, "arguments": json.loads(arguments), "reason": reason})
)

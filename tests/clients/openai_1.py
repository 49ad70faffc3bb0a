"""openai 1.x: a call whole and streamed, and log-probabilities of a prompt. Run as SCRIPT URL; prints JSON."""

import json
import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
ASK = [{"role": "user", "content": "What is a lantern?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}

common = {"model": "demo", "messages": ASK, "max_tokens": 64, "temperature": 0}
text, name, arguments, reason, used = "", "", "", None, 0
for chunk in client.chat.completions.create(**common, tools=[TOOL], stream=True, stream_options={"include_usage": True}):
    used = chunk.usage.completion_tokens if chunk.usage else used
    for choice in chunk.choices:
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
whole = client.chat.completions.create(**common, tools=[TOOL]).choices[0]
scored = client.completions.create(model="demo", prompt="A lamp", max_tokens=0, echo=True, logprobs=1).choices[0]
found = {
    "version": openai.__version__,
    "text": text,
    "name": name,
    "arguments": json.loads(arguments),
    "reason": reason,
    "used": used,
    "whole": json.loads(whole.message.tool_calls[0].function.arguments),
    "scored": scored.logprobs.token_logprobs,
    "models": [each.id for each in client.models.list()],
}
print(json.dumps(found))

"""Text while it is written, with a stop string; the last chunk carries the completion."""

import gemcutter

model = gemcutter.load("demo")
for chunk in model.stream("And it came to pass", max_tokens=48, stop=["\n"]):
    print(chunk.text, end="", flush=True)
    if chunk.completion is not None:
        print(f"\n[{chunk.completion.finish_reason}, {len(chunk.completion.tokens)} tokens]")

"""A conversation of two turns. The second turn finds the first one's keys and values in the cache."""

import gemcutter

model = gemcutter.load("demo")
messages = [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": "What is a lantern?"}]
for question in ("And what is a candle?", None):
    answer = model.chat(messages, max_tokens=32)
    print(f"{answer.text}   [{answer.metrics.cached_tokens} of {len(answer.prompt_tokens)} prompt tokens were cached]")
    if question:
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": question}]

"""How likely is a text? Log-probabilities of every prompt token, no token generated."""

import math

import gemcutter

model = gemcutter.load("demo", dtype="float32")
texts = ["In the beginning God created the heaven and the earth.", "Earth the and heaven the created God beginning the in."]
for text, completion in zip(texts, model.generate(texts, max_tokens=0, prompt_logprobs=0), strict=True):
    logprobs = [entry.logprob for entry in completion.prompt.logprobs]
    print(f"perplexity {math.exp(-sum(logprobs) / len(logprobs)):8.1f}   {text}")

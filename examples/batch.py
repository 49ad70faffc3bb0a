"""Several prompts in one batch, sampled; the same seed gives the same text alone or in company."""

import gemcutter
from gemcutter import SamplingParams

model = gemcutter.load("demo", kernels="reference")
prompts = ["The king", "A lantern is", "Of the sea"]
sampling = SamplingParams(temperature=0.8, top_k=40, seed=7)
together = model.generate(prompts, max_tokens=16, sampling=sampling)
alone = model.generate(prompts[0], max_tokens=16, sampling=sampling)
for prompt, completion in zip(prompts, together, strict=True):
    print(prompt + completion.text)
assert alone.tokens == together[0].tokens

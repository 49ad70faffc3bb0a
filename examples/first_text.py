"""Five lines to first text: load a model, continue a text."""

import gemcutter

model = gemcutter.load("demo")
completion = model.generate("In the beginning", max_tokens=24)
print(completion.text)

"""Where text meets ids: the tokenizer, the chat template, and the stream that turns generated ids back into text.

Refuses to know models, engines and files other than the tokenizer's and the template's own; imports no torch.
Read `tokenizer.py` first, then `chat.py` (into the model) and `reply.py` (out of it).
"""

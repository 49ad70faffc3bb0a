"""What lies beside a checkpoint's weights, read in one way by everybody: size and nesting limited before anything is parsed.

Owns the small files themselves: `small_file.py` (bytes and JSON), `templates.py` (chat templates), `tokenizer_json.py` (what a
tokenizer may be made of). Refuses to know models, tensors and how any of it is used.
"""

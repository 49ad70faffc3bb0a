"""What a request brings beside text, made ready for the towers: images as patches, sounds as frames.

Owns the decoding of files and what the official processors do to them; refuses to know models, weights and prompts. Read
`image.py` and `audio.py`.
"""

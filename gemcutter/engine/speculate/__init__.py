"""Speculation: tokens are guessed, and verified several a step, so that a reply takes fewer steps and stays the same.

`draft_length.py` decides how many to guess, `ngram.py` and `assistant.py` guess. Read `speculator.py` first.
"""

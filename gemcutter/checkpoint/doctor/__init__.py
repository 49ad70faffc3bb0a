"""What a checkpoint holds and lacks, and which engines can load it: the report of `gemcutter doctor`, and its fingerprint.

Owns diagnosis from headers and small files; refuses to load or repair anything. Read `doctor.py` first.
"""

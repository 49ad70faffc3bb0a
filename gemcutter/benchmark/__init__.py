"""What `gemcutter bench` measures: speed, memory and cold starts of a model, with the limits that the hardware sets.

Owns synthetic weights, filled contexts, timing and the report; refuses to change what it measures. Read `report.py` first.
"""

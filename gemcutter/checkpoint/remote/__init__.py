"""Checkpoints that are not files here: hub ids and short names, the hub's cache, and headers read over the network.

Owns what a MODEL argument may name, the download of a hub repository, and headers read in place. Read `hub.py` first.
"""

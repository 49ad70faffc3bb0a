"""The certificate of `gemcutter verify`: two configurations compute the same tokens and are compared layer by layer.

Owns traces, measures, limits and the verdict; refuses to know kernels. Read `certificate.py` first.
"""

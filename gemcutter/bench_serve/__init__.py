"""A load generator for OpenAI-compatible servers: who asks what and when, and what came of it, in the field's own measures.

Owns workloads, arrivals, the client and the arithmetic of the results, under the definitions and names of sglang's and vLLM's
benchmarks. Refuses to know the engine and torch: a server of another project is measured by the same code. Read `workload.py`,
`load.py`, `metrics.py` and `report.py` in this order.
"""

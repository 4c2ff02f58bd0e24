"""Benchmarks: throughput of the engine in this process, and latency of a server under load."""

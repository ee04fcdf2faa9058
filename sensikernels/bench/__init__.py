"""Benchmarks that an installed package can run: interleaved, gated by correctness, as JSON rows."""

"""Benchmarks: interleaved, gated by correctness, written as JSON rows."""

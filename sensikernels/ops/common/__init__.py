"""Triton parts that several operators share; the op folders do not import each other."""

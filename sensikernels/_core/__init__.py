"""Errors, checks, files, the compiled extension, the environment: the floor of every layer."""

"""Packed tokens: a model runs on the tokens of a batch end to end, without padding."""

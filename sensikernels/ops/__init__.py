"""The ops: a folder each, tensors in, tensors out. No folder imports another but ``common``."""

"""The ahead-of-time gate: every Triton kernel compiled for GPUs that are not here."""

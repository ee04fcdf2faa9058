"""The GPU suite: build, prove, measure, draw, in one command."""

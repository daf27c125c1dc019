"""Experiments that anyone repeats with one command: ``mythos reproduce NAME``; see docs/reproduce.md."""

"""Faults on purpose: `python -m scripts.storm`."""

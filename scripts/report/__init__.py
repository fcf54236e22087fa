"""Measured beside published: run folders joined with the rows of the paper's tables; `python -m scripts.report`."""

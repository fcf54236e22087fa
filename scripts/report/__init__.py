"""`python -m scripts.report FOLDER`: measured results next to the published ones, as tables and a page."""

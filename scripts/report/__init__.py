"""`python -m scripts.report FOLDER`: measured results beside the published ones, as tables and a page."""

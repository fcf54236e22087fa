"""Everything that needs a GPU, as one prepared run: `make gpu`, or `python -m scripts.gpu`."""

"""What needs a GPU, as one prepared run.

python -m scripts.gpu          tests and measures everything, part by part, within minutes (`make gpu`)
python -m scripts.gpu.blocks   compares the blocks that the Triton kernels can choose
python -m scripts.gpu.wheels   collects the wheels for a machine without a package index (`make gpu-wheels`)
"""

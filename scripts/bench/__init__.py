"""Benchmarks, each `python -m scripts.bench.NAME` with --help; without a NAME, dynamic models against static ones.

choices      what each implementation of a dynamic layer should cost, which is chosen, and what it does cost
launches     kernels that each layer launches, and how often it waits for the GPU
fit_prices   measures this machine, and writes the table by which implementations are chosen
freeze       frozen layers and models against unfrozen ones
trainer      the trainer's step against that of a bare loop
detection    a detector with a KernelWarehouse backbone against the static one
data         our loader against timm's and torchvision's
step_time    images per second of the paper's rows, for the hours in the report
"""

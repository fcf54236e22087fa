"""Benchmarks, each `python -m scripts.bench.NAME` with --help; without a NAME, dynamic models beside static ones.

choices      what each implementation of a dynamic layer should cost, which is chosen, and what it does cost
launches     kernels that each layer launches, and how often it waits for the GPU
fit_prices   measures this machine, and writes the table by which implementations are chosen
freeze       frozen layers and models beside unfrozen ones
trainer      the trainer's step beside that of a bare loop
detection    a detector with a KernelWarehouse backbone beside the static one
data         our loader beside timm's and torchvision's
step_time    images per second of the paper's rows, for the hours in the report
"""

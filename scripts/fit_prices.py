"""Fit the prices of kw/ways/cost.py to times of this machine, and print them.

    python -m scripts.fit_prices                        about ten minutes on two cores
    python -m scripts.fit_prices resnet18:4@16 small:1@64

Every kind of layer of the models is timed with every way, forward and as a training step, the ways taking turns. Prices
are never negative, and are chosen for least squares of relative errors. A way that is expected to take many times as
long as the plain one by its multiply-adds alone is not timed: nothing would take it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np
import torch
from scipy.optimize import nnls

from kw.ways.cost import work
from scripts.benchmark import Settings, create, parse_case
from scripts.ways import Call, measure, record

CASES = ("resnet18:4@16", "resnet18:1@16", "resnet50:4@8", "convnext_tiny:1@8", "mobilenetv2_100:4@16", "small:1@64",
         "resnet18:4@1", "resnet18:1@1", "resnet50:4@1", "convnext_tiny:1@1", "mobilenetv2_100:4@1")  # fmt: skip
HOPELESS = 5  # times the plain way's multiply-adds

Samples = dict[str, list[tuple[dict[str, float], float]]]  # by way: what it does, and nanoseconds


def hopeful(call: Call) -> list[str]:
    done = work(tuple(call.x.shape), tuple(call.cells.shape), call.task)
    macs = {way: sum(q for name, q in done[way].items() if name.startswith(("apply", "mix"))) for way in done}
    return [way for way in done if macs[way] <= HOPELESS * macs["grouped"]]


def collect(cases: list[str], repeats: int) -> tuple[Samples, Samples]:
    """Times of forward passes, and of steps."""
    forward, step = defaultdict(list), defaultdict(list)
    settings = Settings(None, 224, "cpu", "float32", torch.get_num_threads(), 1, 0, (), (), False)
    for case in map(parse_case, cases):
        size = settings.size_of(case)
        model = create(case, case.n, settings).eval()
        for call in record(model, torch.randn(settings.batch_of(case), 3, size, size)):
            done = work(tuple(call.x.shape), tuple(call.cells.shape), call.task)
            for way, (one, both) in measure(call, hopeful(call), repeats).items():
                forward[way].append((done[way], 1e6 * one))
                step[way].append((done[way], 1e6 * both))
    return forward, step


def fit(samples: list[tuple[dict[str, float], float]]) -> tuple[dict[str, float], np.ndarray]:
    """Prices, and the ratio of expected to measured time of each sample."""
    names = sorted({name for quantities, _ in samples for name in quantities})
    matrix = np.array([[quantities.get(name, 0.0) / time for name in names] for quantities, time in samples])
    scale = np.maximum(matrix.max(axis=0), 1e-30)
    prices, _ = nnls(matrix / scale, np.ones(len(samples)))
    return dict(zip(names, prices / scale, strict=True)), matrix @ (prices / scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="BACKBONE:N[@BATCH]")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    for title, by_way in zip(("CPU_FORWARD", "CPU_STEP"), collect(options.cases, options.repeats), strict=True):
        print(f"{title}: Prices = {{")
        for way, samples in by_way.items():
            prices, ratios = fit(samples)
            shown = ", ".join(f'"{name}": {price:.2g}' for name, price in prices.items() if price > 0)
            low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
            print(f'    "{way}": {{{shown}}},  # {len(samples)} layers: {low:.2f}, {middle:.2f}, {high:.2f}')
        print("}  # expected over measured: first decile, median, last decile", flush=True)


if __name__ == "__main__":
    main()

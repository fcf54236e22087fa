"""Fit the prices of kw/ways/cost.py to times of this machine, and print them.

    python -m scripts.fit_prices                        about ten minutes on two cores
    python -m scripts.fit_prices resnet18:4@16 small:1@64

Every kind of layer of the models is timed with every way, forward and as a training step, the ways taking turns. Prices
are never negative, and are chosen for least squares of relative errors. A way that is expected to take many times as
long as the plain one by its multiply-adds alone is not timed: nothing would take it.

Printed beside them is what choosing by these prices costs: the time of all the layers, each by the chosen way, over the
time of the best way for each; and the same if all layers were computed in one way.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.optimize import nnls

from kw.ways.cost import Prices, cheapest, work
from scripts.benchmark import Settings, create, parse_case
from scripts.ways import WAYS, hopeful, measure, record

CASES = ("resnet18:4@16", "resnet18:1@16", "resnet50:4@8", "convnext_tiny:1@8", "mobilenetv2_100:4@16", "small:1@64",
         "resnet18:4@1", "resnet18:1@1", "resnet50:4@1", "convnext_tiny:1@1", "mobilenetv2_100:4@1")  # fmt: skip

Sample = tuple[dict[str, float], float]  # what a way does for a layer, and nanoseconds
Layers = list[dict[str, Sample]]  # by way


def collect(cases: list[str], repeats: int) -> tuple[Layers, Layers]:
    """Times of forward passes, and of steps."""
    forward: Layers = []
    step: Layers = []
    settings = Settings(None, 224, "cpu", "float32", torch.get_num_threads(), 1, 0, (), (), False)
    for case in map(parse_case, cases):
        size = settings.size_of(case)
        model = create(case, case.n, settings).eval()
        for call in record(model, torch.randn(settings.batch_of(case), 3, size, size)):
            done = work(tuple(call.x.shape), tuple(call.cells.shape), call.task)
            times = measure(call, hopeful(call), repeats)
            forward.append({way: (done[way], 1e6 * one) for way, (one, _) in times.items()})
            step.append({way: (done[way], 1e6 * both) for way, (_, both) in times.items()})
    return forward, step


def fit(samples: list[Sample]) -> tuple[dict[str, float], np.ndarray]:
    """Prices, and the ratio of expected to measured time of each sample."""
    names = sorted({name for quantities, _ in samples for name in quantities})
    matrix = np.array([[quantities.get(name, 0.0) / time for name in names] for quantities, time in samples])
    scale = np.maximum(matrix.max(axis=0), 1e-30)
    prices, _ = nnls(matrix / scale, np.ones(len(samples)))
    return dict(zip(names, prices / scale, strict=True)), matrix @ (prices / scale)


def over_best(layers: Layers, prices: Prices) -> dict[str, float]:
    """The time of all layers by the chosen way, and by each way where it was timed, over that of the best for each."""
    totals = dict.fromkeys(("auto", *prices, "best"), 0.0)
    for layer in layers:
        times = {way: time for way, (_, time) in layer.items()}
        expected = {way: sum(prices[way].get(k, 0.0) * v for k, v in done.items()) for way, (done, _) in layer.items()}
        totals["auto"] += times[cheapest(expected)]
        totals["best"] += min(times.values())
        for way in prices:
            totals[way] += times.get(way, times["grouped"])
    return {way: total / totals["best"] for way, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="BACKBONE:N[@BATCH]")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    for title, layers in zip(("CPU_FORWARD", "CPU_STEP"), collect(options.cases, options.repeats), strict=True):
        print(f"{title}: Prices = {{")
        fitted: Prices = {}
        for way in WAYS:
            samples = [layer[way] for layer in layers if way in layer]
            fitted[way], ratios = fit(samples)
            shown = ", ".join(f'"{name}": {price:.2g}' for name, price in fitted[way].items() if price > 0)
            low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
            print(f'    "{way}": {{{shown}}},  # {len(samples)} layers: {low:.2f}, {middle:.2f}, {high:.2f}')
        print("}  # expected over measured: first decile, median, last decile")
        times = ", ".join(f"{way} {ratio:.3f}" for way, ratio in over_best(layers, fitted).items())
        print(f"# time over that of the best way for each layer: {times}", flush=True)


if __name__ == "__main__":
    main()

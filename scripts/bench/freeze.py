"""What freezing gains: layers with their assembly folded beside the same layers as they were, then whole models.

    python -m scripts.bench.freeze                        ResNet18 and 50 at n = 4, batches of 1 and 8
    python -m scripts.bench.freeze resnet18=1 --batch 1

The two take turns, so that what else the machine does falls on both; figures are medians. Before each a buffer larger
than the caches is written: in a model, other layers run between two calls of one.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
from torch import Tensor, nn

import kw
from kw.folding import fold, kernels_to_mix
from kw.layers import KWLayer
from scripts.bench.timing import by_turns

SECONDS, FEWEST, MOST = 2.0, 5, 50  # for each pair, and rounds of it


def in_turns(calls: Sequence[Callable[[], object]], flush: Tensor) -> list[float]:
    """Median milliseconds of each."""
    named = {str(place): call for place, call in enumerate(calls)}
    samples = by_turns(named, "cpu", MOST, SECONDS, FEWEST, before_each=lambda: flush.add_(1))
    errors = [sample.error for sample in samples.values() if sample.error]
    if errors:
        sys.exit(errors[0])
    return [1e3 * sample.median for sample in samples.values()]


def inputs_of(model: nn.Module, image: Tensor) -> dict[KWLayer, Tensor]:
    """What each dynamic layer is given."""
    inputs: dict[KWLayer, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, KWLayer)]
    hooks = [layer.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]})) for layer in layers]
    model(image)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet18=4", "resnet50=4"], help="backbone=n")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--memory", type=float, nargs="+", default=[0.0, 1.0], help="as of kw.freeze, for whole models")
    parser.add_argument("--no-layers", action="store_true", help="whole models only")
    options = parser.parse_args()
    torch.manual_seed(0)
    flush = torch.zeros(2**24)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, 224 pixels, milliseconds")
    for name in options.models:
        backbone, _, n = name.partition("=")
        model = timm.create_model(f"kw_{backbone}", n=n).eval()
        for batch in options.batch:
            image = torch.randn(batch, 3, 224, 224)
            if not options.no_layers:
                layers_in_turns(model, image, name, flush)
            copies = [copy.deepcopy(model) for _ in options.memory]
            reports = [kw.freeze(frozen, memory) for frozen, memory in zip(copies, options.memory, strict=True)]
            times = in_turns([partial(each, image) for each in (model, *copies)], flush)
            print(f"\n{name}, batch {batch}: {times[0]:.0f}")
            for memory, report, frozen in zip(options.memory, reports, times[1:], strict=True):
                size = f"{report.bytes_before / 1e6:.0f} -> {report.bytes / 1e6:.0f} MB"
                print(f"  memory={memory:g}: {frozen:.0f}, {times[0] / frozen:.2f}x; {report.folded} folded, {size}")


def layers_in_turns(model: nn.Module, image: Tensor, name: str, flush: Tensor) -> None:
    print(f"\n{name}, batch {len(image)}, by n / (H + 1)")
    print(f"{'kernel':>20} {'n':>5} {'H+1':>4} {'ratio':>6} {'as it was':>10} {'folded':>8} {'gain':>6} {'MB':>6}")
    seen = set()
    inputs = inputs_of(model, image)
    for layer in sorted(inputs, key=lambda layer: len(layer.warehouse.cells) / kernels_to_mix(layer)):
        shape, n, mixed = layer.share.kernel.shape, len(layer.warehouse.cells), kernels_to_mix(layer)
        if (shape, n, mixed) in seen:
            continue
        seen.add((shape, n, mixed))
        folded = fold(layer).eval()
        x = inputs[layer]
        before, after = in_turns([partial(layer, x), partial(folded, x)], flush)
        print(
            f"{'x'.join(map(str, shape)):>20} {n:>5} {mixed:>4} {n / mixed:>6.1f} {before:>10.2f} {after:>8.2f} "
            f"{before / after:>5.1f}x {folded.basis.nbytes / 1e6:>6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

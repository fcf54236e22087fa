"""What freezing gains: layers with their assembly folded, against the unfrozen layers, then complete models.

    python -m scripts.bench.freeze                        ResNet18 and 50 at n = 4, batches of 1 and 8
    python -m scripts.bench.freeze resnet18=1 --batch 1

Figures are medians. Before each call a buffer larger than the caches is written: in a model, other layers run between
two calls of one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
from torch import Tensor, nn

import kw
from kw.folding import fold, kernels_to_mix
from kw.layers import KWLayer
from scripts.arguments import argument_parser
from scripts.bench.layers import visit_layers
from scripts.bench.timing import in_turns, medians

SECONDS, FEWEST, MOST = 2.0, 5, 50  # of time for each pair, and of rounds


def milliseconds(calls: Sequence[Callable[[], object]], flush: Tensor) -> list[float]:
    """Medians."""
    named = {str(place): call for place, call in enumerate(calls)}
    samples = in_turns(named, MOST, SECONDS, FEWEST, before_each=lambda: flush.add_(1))
    return [1e3 * each for each in medians(samples)]


@torch.no_grad()
def main() -> None:
    parser = argument_parser("bench.freeze", __doc__)
    parser.add_argument("models", nargs="*", default=["resnet18=4", "resnet50=4"], help="backbone=n")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--memory", type=float, nargs="+", default=[0.0, 1.0], help="of kw.freeze, for complete models")
    parser.add_argument("--no-layers", action="store_true", help="complete models only")
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
            times = milliseconds([partial(each, image) for each in (model, *copies)], flush)
            print(f"\n{name}, batch {batch}: {times[0]:.0f}")
            for memory, report, frozen in zip(options.memory, reports, times[1:], strict=True):
                size = f"{report.bytes_before / 1e6:.0f} -> {report.bytes / 1e6:.0f} MB"
                print(f"  memory={memory:g}: {frozen:.0f}, {times[0] / frozen:.2f}x; {report.folded} folded, {size}")


def layers_in_turns(model: nn.Module, image: Tensor, name: str, flush: Tensor) -> None:
    print(f"\n{name}, batch {len(image)}, by n / (H + 1)")
    print(f"{'kernel':>20} {'n':>5} {'H+1':>4} {'ratio':>6} {'unfrozen':>10} {'folded':>8} {'gain':>6} {'MB':>6}")
    seen = set()
    inputs: dict[KWLayer, Tensor] = {}
    visit_layers(model, image, lambda name, layer, x: inputs.update({layer: x}))
    for layer in sorted(inputs, key=lambda layer: len(layer.warehouse.cells) / kernels_to_mix(layer)):
        shape, n, mixed = layer.share.kernel.shape, len(layer.warehouse.cells), kernels_to_mix(layer)
        if (shape, n, mixed) in seen:
            continue
        seen.add((shape, n, mixed))
        folded = fold(layer).eval()
        x = inputs[layer]
        before, after = milliseconds([partial(layer, x), partial(folded, x)], flush)
        print(
            f"{'x'.join(map(str, shape)):>20} {n:>5} {mixed:>4} {n / mixed:>6.1f} {before:>10.2f} {after:>8.2f} "
            f"{before / after:>5.1f}x {folded.basis.nbytes / 1e6:>6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Compiles Triton's kernels for a GPU that is not there, and prints the result of each as a line of JSON.

    python tests/helpers/compile_ahead.py 90        every block that can be chosen, for compute capability 9.0

In a process of its own: where Triton interprets, it does not compile.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from kw.compute import implicit

DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}  # float16's blocks are bfloat16's
POINTERS = ("source", "kernels", "grad", "out")
# Multiples of 16 in a network: strides, cells and channels. What is 1: strides of channels, and of a cell's columns.
DIVISIBLE = ("_b", "_h", "_w", "_c", "_t", "_cell", "_one")
SMALL = {"move_h", "move_w", "tap_h", "tap_w", "from_h", "from_w", "next_h", "next_w", "taps_w", "out_width"}
ONE = {"source_c", "grad_c", "sum_one", "column_one"}


def compile_ahead(function, block, dtype, capability):
    constants = implicit._options(dtype, block, 0)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    constants |= dict.fromkeys(("SUM_CELL", "ACROSS_CELL", "ROW_CELL", "COLUMN_CELL"), 64) | dict.fromkeys(ONE, 1)
    signature, attributes = {}, {}
    for number, name in enumerate(function.arg_names):
        divisible = name.endswith(DIVISIBLE) and name not in SMALL
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = DTYPES[dtype] if name in POINTERS else "i32"
            if name in POINTERS or divisible or name in ("sums", "across", "rows", "columns"):
                attributes[(number,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability):
    sizes = (*range(1, 400, 3), 512, 1024, 2048)
    for dtype in DTYPES:
        for block in sorted({implicit.blocks(*size, dtype) for size in product(sizes, sizes)}):
            for function in (implicit._convolve, implicit._grad_kernels):
                compiled = compile_ahead(function, block, dtype, capability)
                line = {"kernel": function.__name__, "dtype": str(dtype), "block": block}
                line |= {"shared": compiled.metadata.shared, "wgmma": "wgmma.mma_async" in compiled.asm["ptx"]}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

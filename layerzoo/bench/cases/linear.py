"""Linear cases: the products of decoding, for each of which the whole weight has to be read."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo import ops
from layerzoo.bench.case import Candidate, Case, Cost, Shape, Work


def _inputs(shape: Shape) -> list[Tensor]:
    """x and a bias, then weights enough that none is in a cache when its turn comes again."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(shape["M"], shape["K"]), (shape["N"],), *[(shape["N"], shape["K"])] * shape["layers"]]
    return [torch.randn(size, generator=generator) for size in sizes]


def _work(function: Any, inputs: list[Tensor]) -> Work:
    x, bias, *weights = inputs
    return Work(lambda: torch.stack([function(x, weight, bias) for weight in weights]))


def _ours(inputs: list[Tensor]) -> Work:
    return _work(ops.skinny_linear, inputs)


def _torch(inputs: list[Tensor]) -> Work:
    return _work(F.linear, inputs)


def _reference(inputs: list[Tensor]) -> Work:
    return _work(F.linear, [x.double() for x in inputs])


def _cost(shape: Shape, inputs: list[Tensor]) -> Cost:
    rows = shape["M"] * shape["layers"]
    return Cost(
        read=sum(x.nbytes for x in inputs),
        written=rows * shape["N"] * inputs[0].element_size(),
        products=2 * rows * shape["K"] * shape["N"],
    )


CASES = tuple(
    Case(
        "linear.skinny_linear",
        f"M{rows}",
        "decode",
        shape={"M": rows, "K": 768, "N": 3072, "layers": 24},
        check={"M": rows, "K": 67, "N": 33, "layers": 2},
        inputs=_inputs,
        ours=Candidate("layerzoo", _ours),
        reference=Candidate("reference", _reference),
        peers=(Candidate("torch", _torch),),
        tokens=("M",),
        dtypes=("float32", "bfloat16", "float16", "float64"),
        cost=_cost,
    )
    for rows in (1, 4, 8)
)

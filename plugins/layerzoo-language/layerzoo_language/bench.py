"""Benchmark cases of this plugin, for `layerzoo bench "language:*"`."""

import copy
from typing import Any

import torch

from layerzoo.bench import Candidate, Case, Cost, Work
from layerzoo.bench.case import Shape
from layerzoo_language.early_exit import EarlyExitHead


def _inputs(shape: Shape) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"head": EarlyExitHead(shape["H"], shape["V"]), "x": torch.randn(shape["B"], shape["L"], shape["H"])}


def _head(inputs: dict[str, Any]) -> Work:
    return Work(lambda: inputs["head"](inputs["x"]).confidence)


def _reference(inputs: dict[str, Any]) -> Work:
    head, x = copy.deepcopy(inputs["head"]).double(), inputs["x"].double()

    def call() -> torch.Tensor:
        scaled = x / (x.square().mean(-1, keepdim=True) + head.norm.eps).sqrt() * head.norm.weight
        p = torch.softmax(scaled @ head.lm_head.weight.T, -1)
        return 1 + torch.special.xlogy(p, p).sum(-1) / torch.tensor(float(p.shape[-1])).log()

    return Work(call)


def _cost(shape: Shape, inputs: dict[str, Any]) -> Cost:
    weight, x = inputs["head"].lm_head.weight, inputs["x"]
    tokens = shape["B"] * shape["L"]
    return Cost(read=weight.nbytes + x.nbytes, products=2 * tokens * weight.numel(), exps=tokens * shape["V"])


CASES = tuple(
    Case(
        "language:early_exit_head",
        f"L{length}",
        "forward",
        shape={"B": 1, "L": length, "H": 768, "V": 32000},
        check={"B": 2, "L": 3, "H": 16, "V": 37},
        inputs=_inputs,
        ours=Candidate("layerzoo-language", _head),
        reference=Candidate("reference", _reference),
        tolerance=1e-4,  # a confidence near 0 is a difference of nearly equal numbers
        tokens=("B", "L"),
        cost=_cost,
    )
    for length in (1, 128)
)

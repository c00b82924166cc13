"""Cases of the state-space layers for images, against the same with flips and indices."""

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo import ops, reference
from layerzoo.bench.case import Candidate, Case, Cost, Shape, Work

if TYPE_CHECKING:  # when these cases are run with an older tree, only the layers that it lacks may be missed
    from layerzoo.nn import SS2D, VisionMamba


def _vision_inputs(shape: Shape) -> dict[str, Any]:
    from layerzoo import nn as zoo

    torch.manual_seed(0)
    x, grad_out = torch.randn(2, shape["B"], shape["L"], shape["H"])
    return {"layer": zoo.VisionMamba(shape["H"], d_state=shape["N"]), "x": x, "grad_out": grad_out}


def _image_inputs(shape: Shape, kind: str) -> dict[str, Any]:
    from layerzoo import nn as zoo

    torch.manual_seed(0)
    x, grad_out = torch.randn(2, shape["B"], shape["S"], shape["S"], shape["H"])
    return {"layer": getattr(zoo, kind)(shape["H"], d_state=shape["N"]), "x": x, "grad_out": grad_out}


def _layer_work(inputs: dict[str, Any], forward: Any = None, dtype: torch.dtype | None = None) -> Work:
    """`forward(layer, x)`, or the layer's own."""
    layer = inputs["layer"] if dtype is None else copy.deepcopy(inputs["layer"]).to(dtype)
    x = inputs["x"].detach().to(dtype).requires_grad_()
    call = (lambda: layer(x)) if forward is None else (lambda: forward(layer, x))
    return Work(call, {"x": x, **dict(layer.named_parameters())}, inputs["grad_out"].to(dtype))


def _scan_plain(*args: Any, **options: Any) -> Tensor:
    return reference.ssm.selective_scan(*args, **options)[0]


def _conv_in_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.conv1d(x, weight, bias, padding=weight.shape[2] - 1, groups=x.shape[1])[..., : x.shape[2]])


def _conv_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.causal_conv1d(x, weight.squeeze(1), bias, activation="silu")


def _selected(u: Tensor, x_proj: Tensor, dt_proj: Tensor, A_log: Tensor, scan: Any, *rest: Any) -> Tensor:
    rank, state = dt_proj.shape[1], A_log.shape[1]
    low, B, C = F.linear(u.mT, x_proj).split([rank, state, state], 2)
    y: Tensor = scan(u, F.linear(low, dt_proj).mT, -A_log.exp(), B.mT, C.mT, *rest, True)
    return y


def _vision_flipped(layer: "VisionMamba", x: Tensor, conv: Any, scan: Any) -> Tensor:
    """As the authors' code does it: the second pass on the sequence turned round."""
    xz, both = layer.in_proj(x).mT, torch.zeros((), dtype=x.dtype)
    for way, (A_log, D) in (("", (layer.A_log, layer.D)), ("_b", (layer.A_b_log, layer.D_b))):
        conv1d, x_proj, dt_proj = (getattr(layer, f"{name}{way}") for name in ("conv1d", "x_proj", "dt_proj"))
        u, z = (xz.flip(2) if way else xz).chunk(2, 1)
        u = conv(u, conv1d.weight, conv1d.bias)
        y = _selected(u, x_proj.weight, dt_proj.weight, A_log, scan, D, z, dt_proj.bias)
        both = both + (y.flip(2) if way else y)
    out: Tensor = layer.out_proj(both.mT)
    return out


def _image_gathered(layer: "SS2D", x: Tensor, scan: Any) -> Tensor:
    """Each direction by indices of its pixels, and back by the inverse."""
    u, z = layer.in_proj(x).chunk(2, 3)
    u = F.silu(layer.conv2d(u.movedim(3, 1)))
    height, width = u.shape[2:]
    places = torch.arange(float(height * width)).view(1, 1, height, width)
    ways, total = len(layer.directions), torch.zeros((), dtype=x.dtype)
    for k, order in enumerate(ops.cross_scan(places, layer.directions)):
        index, D = order.flatten().long(), layer.Ds.chunk(ways)[k]
        sequence, A_log = u.flatten(2)[:, :, index], layer.A_logs.chunk(ways)[k]
        weights = layer.x_proj_weight[k], layer.dt_projs_weight[k]
        y = _selected(sequence, *weights, A_log, scan, D, None, layer.dt_projs_bias[k])
        y = y[:, :, index.argsort()].mT
        total = total + getattr(layer, "attn", nn.Identity())(y)
    out: Tensor = layer.out_proj(layer.out_norm(total.view_as(z)) * F.silu(z))
    return out


def _vision_reference(inputs: dict[str, Any]) -> Work:
    return _layer_work(inputs, partial(_vision_flipped, conv=_conv_in_torch, scan=_scan_plain), torch.float64)


def _image_reference(inputs: dict[str, Any]) -> Work:
    return _layer_work(inputs, partial(_image_gathered, scan=_scan_plain), torch.float64)


def _layer_cost(shape: Shape, inputs: dict[str, Any], ways: int, backward: bool) -> Cost:
    """The projections and, for each direction, a scan; every weight and image passes once."""
    layer, x = inputs["layer"], inputs["x"]
    pixels, inner, rank = x.numel() // x.shape[-1], layer.d_inner, layer.dt_rank
    products = 2 * pixels * inner * (3 * layer.d_model + ways * (2 * rank + 2 * layer.d_state))
    states = ways * pixels * inner * layer.d_state
    weights = sum(parameter.nbytes for parameter in layer.parameters())
    factor = 3 if backward else 1
    return Cost(
        read=factor * (weights + x.nbytes),
        written=x.nbytes + (weights + x.nbytes if backward else 0),
        products=factor * products,
        flops=(25 if backward else 6) * states,
        exps=states,
    )


def _vision_case(backward: bool) -> Case:
    flips = partial(_vision_flipped, conv=_conv_op, scan=ops.selective_scan)
    return Case(
        "ssm.vision_mamba",
        "L197",
        "forward+backward" if backward else "forward",
        shape={"B": 8, "L": 197, "H": 192, "N": 16},
        check={"B": 2, "L": 21, "H": 16, "N": 4},
        inputs=_vision_inputs,
        ours=Candidate("layerzoo", _layer_work),
        reference=Candidate("reference", _vision_reference),
        peers=(Candidate("flips", partial(_layer_work, forward=flips)),),
        tolerance=1e-4,
        tokens=("B", "L"),
        cost=partial(_layer_cost, ways=2, backward=backward),
    )


def _image_case(name: str, kind: str, backward: bool) -> Case:
    gather = partial(_image_gathered, scan=ops.selective_scan)
    return Case(
        f"ssm.{name}",
        "56x56",
        "forward+backward" if backward else "forward",
        shape={"B": 1, "S": 56, "H": 96, "N": 16},
        check={"B": 2, "S": 9, "H": 16, "N": 4},
        inputs=partial(_image_inputs, kind=kind),
        ours=Candidate("layerzoo", _layer_work),
        reference=Candidate("reference", _image_reference),
        peers=(Candidate("gather", partial(_layer_work, forward=gather)),),
        # out_norm undoes most of what scales a pixel, so the gradients of LocalMamba's gate are what rounding leaves
        tolerance=2e-3 if kind == "LocalMamba" else 1e-4,
        tokens=("B", "S", "S"),
        cost=partial(_layer_cost, ways=4, backward=backward),
    )


CASES = (
    *(_vision_case(backward) for backward in (False, True)),
    *(_image_case("ss2d", "SS2D", backward) for backward in (False, True)),
    *(_image_case("local_mamba", "LocalMamba", backward) for backward in (False, True)),
)

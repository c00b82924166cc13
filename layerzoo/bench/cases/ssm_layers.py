"""Cases of the state-space layers: those for images against flips and indices, the others by themselves."""

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo import ops, reference
from layerzoo.bench.case import Candidate, Case, Cost, Shape, Work

if TYPE_CHECKING:  # when these cases are run with an older tree, only the layers that it lacks may be missed
    from layerzoo.nn import SS2D, VisionMamba

Given = tuple[nn.Module, list[Tensor]]  # a layer and its inputs


def _vision_inputs(shape: Shape) -> dict[str, Any]:
    from layerzoo import nn as zoo

    torch.manual_seed(0)
    x, grad_out = torch.randn(2, shape["B"], shape["L"], shape["H"])
    return {"layer": zoo.VisionMamba(shape["H"], d_state=shape["N"]), "given": [x], "grad_out": grad_out}


def _image_inputs(shape: Shape, kind: str) -> dict[str, Any]:
    from layerzoo import nn as zoo

    torch.manual_seed(0)
    x, grad_out = torch.randn(2, shape["B"], shape["S"], shape["S"], shape["H"])
    return {"layer": getattr(zoo, kind)(shape["H"], d_state=shape["N"]), "given": [x], "grad_out": grad_out}


def _layer_work(inputs: dict[str, Any], forward: Any = None, dtype: torch.dtype | None = None) -> Work:
    """`forward(layer, *given)`, or the layer's own."""
    layer = inputs["layer"] if dtype is None else copy.deepcopy(inputs["layer"]).to(dtype)
    given = [x.detach().to(dtype).requires_grad_() for x in inputs["given"]]
    call = (lambda: layer(*given)) if forward is None else (lambda: forward(layer, *given))
    leaves = {f"input {i}": x for i, x in enumerate(given)} | dict(layer.named_parameters())
    return Work(call, leaves, inputs["grad_out"].to(dtype))


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
    layer, [x] = inputs["layer"], inputs["given"]
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


# ---- layers built from Mamba ----


def _u_shape(shape: Shape) -> Given:
    from layerzoo import nn as zoo

    layer = zoo.UShapeMamba(shape["C"], 4 * shape["C"])
    sizes = (shape["B"], shape["C"], shape["side"], shape["side"])
    return layer, [torch.randn(sizes), torch.randn(shape["B"], 4 * shape["C"])]


def _mambular(shape: Shape) -> Given:
    from layerzoo import nn as zoo

    return zoo.Mambular(shape["F"], d_model=shape["H"]), [torch.randn(shape["B"], shape["F"])]


def _dual_path(shape: Shape) -> Given:
    from layerzoo import nn as zoo

    layer = zoo.DualPathMamba(shape["H"], chunk_size=shape["K"])
    return layer, [torch.randn(shape["B"], shape["L"], shape["H"])]


def _dense(shape: Shape) -> Given:
    from layerzoo import nn as zoo

    layer = zoo.DenseMamba(shape["H"], num_layers=shape["layers"])
    return layer, [torch.randn(shape["B"], shape["L"], shape["H"])]


@torch.no_grad()
def _built_inputs(shape: Shape, build: Callable[[Shape], Given]) -> dict[str, Any]:
    """A layer, its inputs and the gradient of its output. No weight stays at zero, which would hide others."""
    torch.manual_seed(0)
    layer, given = build(shape)
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return {"layer": layer, "given": given, "grad_out": torch.randn_like(layer(*given))}


def _built_case(
    name: str, build: Callable[[Shape], Given], shape: Shape, check: Shape, tokens: tuple[str, ...]
) -> Case:
    return Case(
        f"ssm.{name}",
        "layer",
        "forward+backward",
        shape=shape,
        check=check,
        inputs=partial(_built_inputs, build=build),
        ours=Candidate("layerzoo", _layer_work),
        reference=Candidate("float64", partial(_layer_work, dtype=torch.float64)),
        tolerance=1e-3,  # small gradients, several layers deep
        tokens=tokens,
    )


CASES = (
    *(_vision_case(backward) for backward in (False, True)),
    *(_image_case("ss2d", "SS2D", backward) for backward in (False, True)),
    *(_image_case("local_mamba", "LocalMamba", backward) for backward in (False, True)),
    _built_case(
        "u_shape_mamba",
        _u_shape,
        shape={"B": 4, "C": 64, "side": 32},
        check={"B": 2, "C": 8, "side": 4},
        tokens=("B", "side", "side"),
    ),
    _built_case(
        "mambular",
        _mambular,
        shape={"B": 256, "F": 24, "H": 64},
        check={"B": 3, "F": 5, "H": 8},
        tokens=("B", "F"),
    ),
    _built_case(
        "dual_path_mamba",
        _dual_path,
        shape={"B": 1, "L": 8192, "H": 64, "K": 128},
        check={"B": 2, "L": 21, "H": 8, "K": 4},
        tokens=("B", "L"),
    ),
    _built_case(
        "dense_mamba",
        _dense,
        shape={"B": 1, "L": 1024, "H": 256, "layers": 4},
        check={"B": 2, "L": 21, "H": 8, "layers": 3},
        tokens=("B", "L"),
    ),
)

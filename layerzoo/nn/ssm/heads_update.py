"""One step of Mamba-2's scan, until `selective_state_update` takes heads: then this file goes."""

from torch import Tensor

from layerzoo.ops import ssd_chunk_scan
from layerzoo.ops._checks import check_no_gradient


def heads_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """state (batch, heads, width, state), changed in place; x, z (batch, heads, width); dt (batch, heads); A, dt_bias
    (heads,); D (heads,) or (heads, width); B, C (batch, groups, state) -> (batch, heads, width), without a gradient.
    """
    check_no_gradient("heads_update", state, x, dt, A, B, C, D, z, dt_bias)
    y, last = ssd_chunk_scan(
        x.unsqueeze(1),
        dt.unsqueeze(1),
        A,
        B.unsqueeze(1),
        C.unsqueeze(1),
        1,
        D,
        None if z is None else z.unsqueeze(1),
        dt_bias,
        state,
        dt_softplus=dt_softplus,
        return_final_states=True,
    )
    state.copy_(last)
    return y.squeeze(1)

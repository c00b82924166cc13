"""One step of Mamba-2's scan, by `selective_state_update` in heads."""

from torch import Tensor

from layerzoo.ops import selective_state_update


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
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """state (batch, heads, width, state), changed in place; x, z (batch, heads, width); dt (batch, heads); A, dt_bias
    (heads,); D (heads,) or (heads, width); B, C (batch, groups, state) -> (batch, heads, width), without a gradient.

    With `state_batch_indices` (batch,) the state is a pool, as in `selective_state_update`.
    """
    heads, width, n = state.shape[1:]
    return selective_state_update(
        state,
        x,
        dt.unsqueeze(2).expand_as(x),
        A[:, None, None].expand(heads, width, n),
        B,
        C,
        D.unsqueeze(1).expand(heads, width) if D is not None and D.dim() == 1 else D,
        z,
        None if dt_bias is None else dt_bias.unsqueeze(1).expand(heads, width),
        dt_softplus,
        state_batch_indices,
    )

"""State-space ops in plain PyTorch: slow, obvious, in float64 where the input is.

Letters: b batch, d channel, l time, n state, g group of channels that share B and C, w kernel width. Each forward is
differentiable by autograd; each backward is written out by hand from its formula.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.reference import accumulate_dtype

CHUNK = 64  # steps between the states that the forward keeps for the backward


def check_values(op: str, A: Tensor | None, seq_idx: Tensor | None) -> None:
    """Raises RuntimeError for NaN in A, or ids that decrease along a row; negative ids are padding and passed over."""
    if A is not None and A.isnan().any():
        raise RuntimeError(f"{op}: A must not contain NaN")
    if seq_idx is None or seq_idx.numel() == 0:
        return
    before = F.pad(seq_idx.clamp(min=-1).cummax(1).values[:, :-1], (1, 0), value=-1)
    wrong = (seq_idx >= 0) & (seq_idx < before)
    if wrong.any():
        i, t = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"{op}: seq_idx must not decrease along a row, "
            f"but seq_idx[{i}, {t}] = {seq_idx[i, t]} follows {before[i, t]}"
        )


def _marks(seq_idx: Tensor | None, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(padding, restart), each (b, l) and boolean: is it padding, does another sequence than before begin here?"""
    if seq_idx is None:
        no = torch.zeros(batch, length, dtype=torch.bool, device=device)
        return no, no
    restart = torch.zeros_like(seq_idx, dtype=torch.bool)
    last = torch.full((batch,), -1, dtype=seq_idx.dtype, device=device)
    for t in range(length):
        ids = seq_idx[:, t]
        restart[:, t] = (ids >= 0) & (last >= 0) & (ids != last)
        last = torch.where(ids >= 0, ids, last)
    return seq_idx < 0, restart


def _per_channel(x: Tensor, batch: int, channels: int, length: int) -> Tensor:
    """B or C, constant (d, n) or varying (b, n, l) or (b, g, n, l), as (b, d, n, l)."""
    if x.dim() == 2:
        return x[None, :, :, None].expand(batch, -1, -1, length)
    if x.dim() == 3:
        x = x.unsqueeze(1)
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def _to_shape_of(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient (b, d, n, l) of `_per_channel(x)` summed to the gradient of x."""
    if x.dim() == 2:
        return grad.sum((0, 3)).to(x.dtype)
    batch, channels, state, length = grad.shape
    groups = x.shape[1] if x.dim() == 4 else 1
    return grad.reshape(batch, groups, channels // groups, state, length).sum(2).reshape(x.shape).to(x.dtype)


def _blank_padding(x: Tensor, seq_idx: Tensor | None) -> Tensor:
    """x (b, ..., l), or a constant (d, n), with zeros at padding, where even NaN must have no effect."""
    if x.dim() == 2 or seq_idx is None:
        return x
    return x.masked_fill((seq_idx < 0).reshape(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1]), 0)


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor]:
    """(delta + bias, its softplus or itself), (b, d, l)."""
    s = delta if delta_bias is None else delta + delta_bias[:, None]
    return s, F.softplus(s) if softplus else s


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = exp(dt_t A) x_{t-1} + dt_t u_t B_t; out_t = (C_t x_t + D u_t) silu(z_t). Gu and Dao, "Mamba" (2023).

    Returns (out (b, d, l), last state (b, d, n), the states before every CHUNK-th step (b, chunks, n, d)).
    """
    check_values("selective_scan", A, seq_idx)
    batch, channels, length = u.shape
    acc = accumulate_dtype(u)
    u, delta, B, C = (_blank_padding(x, seq_idx) for x in (u, delta, B, C))
    z = None if z is None else _blank_padding(z, seq_idx)
    _, dt = _step_sizes(delta.to(acc), None if delta_bias is None else delta_bias.to(acc), delta_softplus)
    x = torch.zeros(batch, channels, A.shape[1], dtype=acc, device=u.device)
    if initial_state is not None:
        x = initial_state.to(acc)
    decay = torch.exp(dt.unsqueeze(2) * A.to(acc)[:, :, None])  # b d n l
    inputs = (dt * u.to(acc)).unsqueeze(2) * _per_channel(B.to(acc), batch, channels, length)
    readout = _per_channel(C.to(acc), batch, channels, length)
    padding, restart = _marks(seq_idx.flip(1) if seq_idx is not None and reverse else seq_idx, batch, length, u.device)

    outputs, states = [], []
    for step in range(length):
        t = length - 1 - step if reverse else step
        if step % CHUNK == 0:
            states.append(x.transpose(1, 2))
        before = torch.where(restart[:, step, None, None], torch.zeros_like(x), x)
        pad = padding[:, step, None]
        x = torch.where(pad.unsqueeze(2), x, decay[..., t] * before + inputs[..., t])
        y = (x * readout[..., t]).sum(2)
        y = y if D is None else y + D.to(acc) * u[..., t].to(acc)
        y = y if z is None else y * F.silu(z[..., t].to(acc))
        outputs.append(torch.where(pad, torch.zeros_like(y), y))
    if reverse:
        outputs.reverse()
    out = torch.stack(outputs, 2) if outputs else u.to(acc)
    kept = torch.stack(states, 1) if states else x.new_empty(batch, 0, A.shape[1], channels)
    return out.to(u.dtype), x, kept


def selective_scan_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; None for what is None.

    With lam_t the gradient of x_t: lam_t = gy_t C_t + exp(dt_{t+1} A) lam_{t+1}, from the last step to the first.
    """
    batch, channels, length = u.shape
    acc = accumulate_dtype(u)
    u, delta, B, C, grad_out = (_blank_padding(x, seq_idx) for x in (u, delta, B, C, grad_out))
    z = None if z is None else _blank_padding(z, seq_idx)
    s, dt = _step_sizes(delta.to(acc), None if delta_bias is None else delta_bias.to(acc), delta_softplus)
    wide_u, wide_A = u.to(acc), A.to(acc)
    b_all = _per_channel(B.to(acc), batch, channels, length)
    c_all = _per_channel(C.to(acc), batch, channels, length)
    decay = torch.exp(dt.unsqueeze(2) * wide_A[:, :, None])
    order = range(length - 1, -1, -1) if reverse else range(length)
    padding, restart = _marks(seq_idx.flip(1) if seq_idx is not None and reverse else seq_idx, batch, length, u.device)

    x = torch.zeros(batch, channels, A.shape[1], dtype=acc, device=u.device)
    if initial_state is not None:
        x = initial_state.to(acc)
    decayed, states = torch.zeros_like(decay), torch.zeros_like(decay)  # exp(dt A) x_{t-1} and x_t
    for step, t in enumerate(order):
        before = torch.where(restart[:, step, None, None], torch.zeros_like(x), x)
        decayed[..., t] = decay[..., t] * before
        new = decayed[..., t] + (dt[..., t] * wide_u[..., t]).unsqueeze(2) * b_all[..., t]
        x = torch.where(padding[:, step, None, None], x, new)
        states[..., t] = x

    gy = grad_out.to(acc)
    gz = None
    if z is not None:
        wide_z = z.to(acc)
        y = (states * c_all).sum(2) + (0 if D is None else D.to(acc)[:, None] * wide_u)
        gate = torch.sigmoid(wide_z)
        gz = gy * y * gate * (1 + wide_z * (1 - gate))
        gy = gy * wide_z * gate

    carry = torch.zeros_like(x) if grad_last_state is None else grad_last_state.to(acc)
    lam = torch.zeros_like(decay)
    for step, t in reversed(list(enumerate(order))):
        pad = padding[:, step, None, None]
        at_t = gy[..., t].unsqueeze(2) * c_all[..., t] + carry
        lam[..., t] = torch.where(pad, torch.zeros_like(at_t), at_t)
        through = torch.where(restart[:, step, None, None], torch.zeros_like(at_t), decay[..., t] * at_t)
        carry = torch.where(pad, carry, through)

    q = (lam * b_all).sum(2)
    gu = dt * q + (0 if D is None else D.to(acc)[:, None] * gy)
    gdt = wide_u * q + (lam * decayed * wide_A[:, :, None]).sum(2)
    gs = gdt * torch.where(s > 20, torch.ones_like(s), torch.sigmoid(s)) if delta_softplus else gdt
    return (
        gu.to(u.dtype),
        gs.to(delta.dtype),
        (lam * decayed * dt.unsqueeze(2)).sum((0, 3)).to(A.dtype),
        _to_shape_of(lam * (dt * wide_u).unsqueeze(2), B),
        _to_shape_of(gy.unsqueeze(2) * states, C),
        None if D is None else (gy * wide_u).sum((0, 2)).to(D.dtype),
        None if gz is None or z is None else gz.to(z.dtype),
        None if delta_bias is None else gs.sum((0, 2)).to(delta_bias.dtype),
        None if initial_state is None else carry.to(initial_state.dtype),
    )


def _taps(x: Tensor, seq_idx: Tensor | None, initial_states: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """(what each tap reads, zero where it does not count (b, d, l, w); whether it counts (b, 1, l, w)).

    What lies left of step 0 is of the first sequence.
    """
    halo = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states.to(x.dtype)
    reads = F.pad(torch.cat([halo, x], 2), (0, 1)).unfold(2, width, 1)[:, :, :-1]  # padded: length 0 has a window too
    if seq_idx is None or seq_idx.shape[1] == 0:
        return reads, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.device)
    ids = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1).unfold(1, width, 1)
    counts = ((ids == seq_idx.unsqueeze(2)) & (seq_idx >= 0).unsqueeze(2)).unsqueeze(1)
    return reads.where(counts, 0), counts


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    silu: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """out_t = act(bias + sum_k weight_k x_{t-w+1+k}), depthwise. Returns (out (b, d, l), the last w - 1 inputs).

    `reverse`: the same with time turned round, in arguments and results.
    """
    check_values("causal_conv1d", None, seq_idx)
    if reverse:
        x = x.flip(2)
        seq_idx, initial_states = (None if t is None else t.flip(-1) for t in (seq_idx, initial_states))
    acc, width = accumulate_dtype(x), weight.shape[1]
    wide = x.to(acc)
    reads, _ = _taps(wide, seq_idx, initial_states, width)
    out = (reads * weight.to(acc)[:, None]).sum(3) + (0 if bias is None else bias.to(acc)[:, None])
    out = F.silu(out) if silu else out
    if seq_idx is not None:
        out = out * (seq_idx >= 0).unsqueeze(1)
    halo = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states.to(x.dtype)
    final = torch.cat([halo, x], 2)[:, :, x.shape[2] :].clone()
    return (out.to(x.dtype).flip(2), final.flip(2)) if reverse else (out.to(x.dtype), final)


def causal_conv1d_backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool = False,  # torch leaves out a last argument that is its default
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, initial_states; None for what is None."""
    if reverse:
        grad_out, x = grad_out.flip(2), x.flip(2)
        grad_final, seq_idx, initial_states = (
            None if t is None else t.flip(-1) for t in (grad_final, seq_idx, initial_states)
        )
    acc, width, length = accumulate_dtype(x), weight.shape[1], x.shape[2]
    reads, counts = _taps(x.to(acc), seq_idx, initial_states, width)
    grad = _blank_padding(grad_out, seq_idx).to(acc)
    if silu:
        y = (reads * weight.to(acc)[:, None]).sum(3) + (0 if bias is None else bias.to(acc)[:, None])
        gate = torch.sigmoid(y)
        grad = grad * gate * (1 + y * (1 - gate))
    each = grad.unsqueeze(3) * counts * weight.to(acc)[:, None]  # what tap k of step t sends to input t - w + 1 + k
    inputs = torch.zeros(*x.shape[:2], width - 1 + length, dtype=acc, device=x.device)
    for k in range(width):
        inputs[:, :, k : k + length] += each[..., k]
    if grad_final is not None:
        inputs[:, :, length:] += grad_final.to(acc)
    grad_initial, grad_x = inputs[:, :, : width - 1], inputs[:, :, width - 1 :]
    if reverse:
        grad_initial, grad_x = grad_initial.flip(2), grad_x.flip(2)
    return (
        grad_x.to(x.dtype),
        (grad.unsqueeze(3) * reads).sum((0, 2)).to(weight.dtype),
        None if bias is None else grad.sum((0, 2)).to(bias.dtype),
        None if initial_states is None else grad_initial.to(initial_states.dtype),
    )


def check_rows(op: str, name: str, indices: Tensor | None, rows: int) -> None:
    """Raises RuntimeError for an index that is no row of a pool of states, or a row that has two; below 0 is none."""
    if indices is None:
        return
    for i, index in enumerate(indices.tolist()):
        if index >= rows:
            raise RuntimeError(f"{op}: {name} must be below the {rows} rows of the state, but {name}[{i}] = {index}")
    slots, counts = indices[indices >= 0].unique(return_counts=True)
    if (counts > 1).any():
        twice = slots[counts > 1][0]
        raise RuntimeError(f"{op}: {name} must not name a row of the state twice, but {twice} is there twice")


def check_lengths(op: str, lengths: Tensor | None, indices: Tensor | None) -> None:
    """Raises RuntimeError for a negative length in a row of the batch that is no padding."""
    if lengths is None:
        return
    wrong = lengths < 0 if indices is None else (lengths < 0) & (indices >= 0)
    for i in wrong.nonzero()[:, 0].tolist():
        raise RuntimeError(f"{op}: cache_seqlens must not be negative, but cache_seqlens[{i}] = {lengths[i].item()}")


def _rows_of_pool(op: str, name: str, indices: Tensor | None, batch: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of the batch that are no padding, the row of `state` that each of them has), as indices."""
    check_rows(op, name, indices, state.shape[0])
    if indices is None:
        every = torch.arange(batch, device=state.device)
        return every, every
    used = (indices >= 0).nonzero()[:, 0]
    return used, indices[used].long()


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` of x (b, d) or (b, d, l) after conv_state (rows, d, s >= w - 1).

    The state then holds the last s inputs; with `cache_seqlens` (b,) as a ring, in which input i stands at i % s.
    """
    if x.dim() == 2:
        return causal_conv1d_update(
            x.unsqueeze(2), conv_state, weight, bias, silu, cache_seqlens, conv_state_indices
        ).squeeze(2)
    op, (batch, channels, length), kept = "causal_conv1d_update", x.shape, conv_state.shape[2]
    used, slots = _rows_of_pool(op, "conv_state_indices", conv_state_indices, batch, conv_state)
    state, inputs = conv_state[slots], x[used]
    if cache_seqlens is not None:
        check_lengths(op, cache_seqlens, conv_state_indices)
        past = cache_seqlens[used].long()
        # where in the ring each of its inputs stands, from the oldest to the newest
        ring = ((past[:, None] + torch.arange(kept, device=x.device)) % max(kept, 1)).unsqueeze(1)
        ring = ring.expand(-1, channels, -1)
        state = state.gather(2, ring)
    halo = state[:, :, kept - (weight.shape[1] - 1) :]
    out = torch.zeros_like(x)
    out[used] = causal_conv1d(inputs, weight, bias, None, halo, silu)[0]
    moved = torch.cat([state, inputs.to(state.dtype)], 2)[:, :, length:]
    if cache_seqlens is not None:
        moved = torch.empty_like(moved).scatter_(2, (ring + length) % max(kept, 1), moved)
    conv_state[slots] = moved
    return out


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of `selective_scan`, in place on the rows that `state_batch_indices` names, or all.

    x (b, d) with state (rows, d, n); or heads h of p channels: x (b, h, p), B (b, g, n) with state (rows, h, p, n).
    """
    if x.dim() == 2:
        D, z, dt_bias = (None if t is None else t.unsqueeze(-2) for t in (D, z, dt_bias))
        x, dt, A, B, C = x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0), B.unsqueeze(1), C.unsqueeze(1)
        return selective_state_update(
            state.unsqueeze(1), x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        ).squeeze(1)
    acc, heads = accumulate_dtype(x), x.shape[1]
    used, slots = _rows_of_pool("selective_state_update", "state_batch_indices", state_batch_indices, x.shape[0], state)
    wide, s = x[used].to(acc), dt[used].to(acc)
    s = s if dt_bias is None else s + dt_bias.to(acc)
    step = (F.softplus(s) if dt_softplus else s).unsqueeze(3)
    b_all, c_all = (t[used].to(acc).repeat_interleave(heads // t.shape[1], dim=1).unsqueeze(2) for t in (B, C))
    h = torch.exp(step * A.to(acc)) * state[slots].to(acc) + step * wide.unsqueeze(3) * b_all
    y = (h * c_all).sum(3)
    y = y if D is None else y + D.to(acc) * wide
    y = y if z is None else y * F.silu(z[used].to(acc))
    state[slots] = h.to(state.dtype)
    out = torch.zeros_like(x)
    out[used] = y.to(x.dtype)
    return out


def _by_step(x: Tensor | None, seq_idx: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x (b, l, ...) in `dtype`, with zeros at padding, where even NaN must have no effect."""
    if x is None or seq_idx is None:
        return None if x is None else x.to(dtype)
    return x.to(dtype).masked_fill((seq_idx < 0).reshape(*seq_idx.shape, *[1] * (x.dim() - 2)), 0)


def _head_steps(dt: Tensor, bias: Tensor | None, softplus: bool, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(the step sizes (b, l, h), their derivative by dt)."""
    s = dt if bias is None else dt + bias
    steps = F.softplus(s) if softplus else s
    slope = torch.where(s > 20, torch.ones_like(s), torch.sigmoid(s)) if softplus else torch.ones_like(s)
    return steps.clamp(low, high), slope * ((steps >= low) & (steps <= high))


def _per_channel_of_a_head(D: Tensor, dtype: torch.dtype) -> Tensor:
    """D (h,) or (h, p) so that it multiplies (..., h, p)."""
    return D.to(dtype) if D.dim() == 2 else D.to(dtype).unsqueeze(1)


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_low: float = 0.0,
    dt_high: float = torch.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t; out_t = (C_t h_t + D x_t) silu(z_t), by heads.

    Dao and Gu, "Transformers are SSMs" (2024); h heads, p channels of a head. Returns (out (b, l, h, p), last state
    (b, h, p, n), the states before every CHUNK-th step (b, chunks, h, n, p)).
    """
    check_values("ssd_chunk_scan", A, seq_idx)
    (batch, length, heads, width), state, acc = x.shape, B.shape[3], accumulate_dtype(x)
    padding, restart = _marks(seq_idx, batch, length, x.device)
    wide_x, wide_dt, wide_B, wide_C, wide_z = (_by_step(t, seq_idx, acc) for t in (x, dt, B, C, z))
    assert wide_x is not None and wide_dt is not None and wide_B is not None and wide_C is not None
    steps, _ = _head_steps(wide_dt, None if dt_bias is None else dt_bias.to(acc), dt_softplus, dt_low, dt_high)
    decay = torch.exp(steps * A.to(acc))
    per_group = heads // B.shape[2]
    h = x.new_zeros(batch, heads, width, state, dtype=acc) if initial_states is None else initial_states.to(acc)

    outputs, states = [], []
    for t in range(length):
        if t % CHUNK == 0:
            states.append(h.mT)
        pad = padding[:, t, None, None]
        before = torch.where(restart[:, t, None, None, None], torch.zeros_like(h), h)
        inputs = (steps[:, t, :, None] * wide_x[:, t]).unsqueeze(3) * wide_B[:, t].repeat_interleave(per_group, 1)[
            :, :, None
        ]
        h = torch.where(pad.unsqueeze(3), h, decay[:, t, :, None, None] * before + inputs)
        y = (h * wide_C[:, t].repeat_interleave(per_group, 1)[:, :, None]).sum(3)
        y = y if D is None else y + _per_channel_of_a_head(D, acc) * wide_x[:, t]
        y = y if wide_z is None else y * F.silu(wide_z[:, t])
        outputs.append(torch.where(pad, torch.zeros_like(y), y))
    out = torch.stack(outputs, 1) if outputs else wide_x
    kept = torch.stack(states, 1) if states else h.new_empty(batch, 0, heads, state, width)
    return out.to(x.dtype), h, kept


def ssd_chunk_scan_backward(
    grad_out: Tensor,
    grad_final_states: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_states; None for what is None.

    A head is p channels of `selective_scan` that share one step size and one decay: theirs are summed over the
    channels, and that of the decay over the states too.
    """
    (heads, width), state, acc = x.shape[2:], B.shape[3], accumulate_dtype(x)
    blank_dt = _by_step(dt, seq_idx, acc)
    assert blank_dt is not None
    bias = None if dt_bias is None else dt_bias.to(acc)
    steps, slope = _head_steps(blank_dt, bias, dt_softplus, dt_low, dt_high)

    def channels(value: Tensor) -> Tensor:  # (b, l, h, p) -> (b, d, l)
        return value.to(acc).flatten(2).transpose(1, 2)

    def by_head(grad: Tensor) -> Tensor:  # and back
        return grad.transpose(1, 2).reshape(x.shape)

    gu, gdelta, gA, gB, gC, gD, gz, _, ginitial = selective_scan_backward(
        channels(grad_out),
        None if grad_final_states is None else grad_final_states.to(acc).flatten(1, 2),
        channels(x),
        channels(steps.unsqueeze(3).expand(x.shape)),
        A.to(acc).repeat_interleave(width).unsqueeze(1).expand(-1, state),
        B.to(acc).permute(0, 2, 3, 1),
        C.to(acc).permute(0, 2, 3, 1),
        None if D is None else _per_channel_of_a_head(D, acc).expand(heads, width).flatten(),
        None if z is None else channels(z),
        None,
        False,
        None if initial_states is None else initial_states.to(acc).flatten(1, 2),
        seq_idx,
        False,
    )
    assert gu is not None and gdelta is not None and gA is not None and gB is not None and gC is not None
    gdt = by_head(gdelta).sum(3) * slope
    if gD is not None and D is not None:
        gD = (gD.unflatten(0, (heads, width)) if D.dim() == 2 else gD.unflatten(0, (heads, width)).sum(1)).to(D.dtype)
    return (
        by_head(gu).to(x.dtype),
        gdt.to(dt.dtype),
        gA.unflatten(0, (heads, width)).sum((1, 2)).to(A.dtype),
        gB.permute(0, 3, 1, 2).to(B.dtype),
        gC.permute(0, 3, 1, 2).to(C.dtype),
        gD,
        None if gz is None or z is None else by_head(gz).to(z.dtype),
        None if dt_bias is None else gdt.sum((0, 1)).to(dt_bias.dtype),
        None
        if ginitial is None or initial_states is None
        else ginitial.unflatten(1, (heads, width)).to(initial_states.dtype),
    )


def recurrence_dtype(x: Tensor) -> torch.dtype:
    """The type that `linear_scan` computes in: x's own where that is complex, else as everywhere."""
    return x.dtype if x.is_complex() else accumulate_dtype(x)


def linear_scan(a: Tensor, x: Tensor, initial_state: Tensor | None = None, reverse: bool = False) -> Tensor:
    """h_t = a_t h_{t-1} + x_t for each of (b, l, d); `reverse`: h_t = a_t h_{t+1} + x_t."""
    acc = recurrence_dtype(x)
    h = x.new_zeros((x.shape[0], x.shape[2]), dtype=acc) if initial_state is None else initial_state.to(acc)
    states = [h] * x.shape[1]
    decays, inputs = a.to(acc).unbind(1), x.to(acc).unbind(1)  # whose gradient is one stack, not a tensor for each step
    for t in range(x.shape[1] - 1, -1, -1) if reverse else range(x.shape[1]):
        states[t] = h = decays[t] * h + inputs[t]
    return torch.stack(states, 1).to(x.dtype) if states else x.clone()


def linear_scan_backward(
    grad: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of a, x, initial_state (None for None), h being the result.

    With lam_t the gradient of h_t: lam_t = grad_t + conj(a_{t+1}) lam_{t+1}, the recurrence run back. Of x it is lam_t,
    of a_t it is lam_t conj(h_{t-1}), of the initial state conj(a_0) lam_0.
    """
    acc = recurrence_dtype(h)
    first = h.new_zeros((h.shape[0], h.shape[2]), dtype=acc) if initial_state is None else initial_state.to(acc)
    before = torch.cat(
        [h[:, 1:].to(acc), first.unsqueeze(1)] if reverse else [first.unsqueeze(1), h[:, :-1].to(acc)], 1
    )
    lam, carry = torch.zeros_like(h, dtype=acc), torch.zeros_like(first)
    # conj_physical: within a compiled graph the mark that conj leaves on a tensor is not looked at
    for t in range(h.shape[1]) if reverse else range(h.shape[1] - 1, -1, -1):
        lam[:, t] = grad[:, t].to(acc) + carry
        carry = a[:, t].to(acc).conj_physical() * lam[:, t]
    grad_a = (lam * before[:, : h.shape[1]].conj_physical()).to(a.dtype)
    return grad_a, lam.to(h.dtype), None if initial_state is None else carry.to(initial_state.dtype)

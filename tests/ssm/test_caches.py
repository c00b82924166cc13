"""nn.Mamba and nn.Mamba2 from call to call: rows of different lengths, padded or packed, pools, bad caches."""

from typing import Any

import pytest
import torch
from torch import Tensor

from . import test_mamba, test_mamba2
from .oracle import assert_close
from .test_mamba import one_thread

__all__ = ["one_thread"]  # a fixture

LAYERS: dict[str, Any] = {
    "mamba": lambda: test_mamba.layer(bias=True),
    "mamba2": lambda: test_mamba2.layer(ngroups=2, bias=True),
    "mamba2-mlp": lambda: test_mamba2.layer(d_ssm=16, rmsnorm=False, D_has_hdim=True, dt_limit=(0.1, 2)),
}
SIZES = (9, 2, 14)  # the second is shorter than the convolution is wide
MORE = 4  # tokens that each text goes on by
CLOSE = 5e-6

Cache = tuple[Tensor, Tensor]


@pytest.fixture(params=LAYERS)
def layer(request: Any) -> Any:
    return LAYERS[request.param]()


def texts(*sizes: int) -> list[Tensor]:
    """(1, size + MORE, 12) each."""
    torch.manual_seed(1)
    return [torch.randn(1, size + MORE, 12) for size in sizes]


def padded(parts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """One batch, with NaN where there is padding, and its seq_idx."""
    most = max(part.shape[1] for part in parts)
    batch, seq_idx = torch.full((len(parts), most, 12), torch.nan), torch.full((len(parts), most), -1)
    for row, part in enumerate(parts):
        size = part.shape[1]
        where = slice(most - size, most) if side == "left" else slice(size)
        batch[row, where], seq_idx[row, where] = part[0], 0
    return batch, seq_idx


def packed(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One row, and its cu_seqlens."""
    return torch.cat(parts, 1), torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0)


def alone(layer: Any, parts: list[Tensor]) -> tuple[list[Tensor], Cache]:
    """The outputs of each by itself, and the rows of their caches."""
    caches = [layer.allocate_inference_cache(1) for _ in parts]
    outputs = [layer(part, cache=cache) for part, cache in zip(parts, caches, strict=True)]
    return outputs, (torch.cat([cache[0] for cache in caches]), torch.cat([cache[1] for cache in caches]))


def assert_same_cache(cache: Cache, want: Cache) -> None:
    assert_close("conv_state", cache[0], want[0], CLOSE)
    assert_close("ssm_state", cache[1], want[1], CLOSE)


def assert_goes_on(layer: Any, cache: Cache, whole: list[Tensor]) -> None:
    """Token by token all rows at once, from the cache, each at its own place in its text."""
    want = [layer(text) for text in whole]
    for step in range(-MORE, 0):
        tokens = torch.cat([text[:, step, None] for text in whole])
        assert_close(f"step {step}", layer(tokens, cache=cache), torch.cat([w[:, step, None] for w in want]), CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_those_without_padding(layer: Any, side: str) -> None:
    whole = texts(*SIZES)
    parts = [text[:, :-MORE] for text in whole]
    batch, seq_idx = padded(parts, side)
    want, want_cache = alone(layer, parts)
    cache = layer.allocate_inference_cache(3)
    out = layer(batch, seq_idx=seq_idx, cache=cache)
    for row, part in enumerate(want):
        assert_close(f"row {row}", out[row, seq_idx[row] == 0], part[0], CLOSE)
    assert_close("without a cache", layer(batch, seq_idx=seq_idx)[seq_idx == 0], out[seq_idx == 0], CLOSE)
    assert_same_cache(cache, want_cache)
    assert_goes_on(layer, cache, whole)


@pytest.mark.parametrize("splits", [(3, 2, 0), (0, 1, 13), (9, 0, 5)], ids=str)
@torch.no_grad()
def test_rows_of_different_lengths_in_two_calls(layer: Any, splits: tuple[int, ...]) -> None:
    """Padded on the right, where a row may be nothing but padding."""
    whole = texts(*SIZES)
    parts = [text[:, :-MORE] for text in whole]
    want, want_cache = alone(layer, parts)
    cache = layer.allocate_inference_cache(3)
    got: list[list[Tensor]] = [[], [], []]
    for pieces in (
        [part[:, :cut] for part, cut in zip(parts, splits, strict=True)],
        [part[:, cut:] for part, cut in zip(parts, splits, strict=True)],
    ):
        batch, seq_idx = padded(pieces, "right")
        out = layer(batch, seq_idx=seq_idx, cache=cache)
        for row in range(3):
            got[row].append(out[row, seq_idx[row] == 0])
    for row, part in enumerate(want):
        assert_close(f"row {row}", torch.cat(got[row]), part[0], CLOSE)
    assert_same_cache(cache, want_cache)
    assert_goes_on(layer, cache, whole)


@torch.no_grad()
def test_packed_sequences_leave_a_state_each(layer: Any) -> None:
    whole = texts(*SIZES, 0)
    cache = layer.allocate_inference_cache(4)
    got: list[list[Tensor]] = [[], [], [], []]
    for first, last in ((0, 1), (1, 6), (6, 14)):
        pieces = [text[:, :-MORE][:, first:last] for text in whole]
        row, offsets = packed(pieces)
        padding = torch.full((1, 2, 12), torch.nan)
        out = layer(torch.cat([row, padding], 1), cu_seqlens=offsets, cache=cache)
        for index in range(4):
            got[index].append(out[:, offsets[index] : offsets[index + 1]])
    want, want_cache = alone(layer, [text[:, :-MORE] for text in whole])
    for index, part in enumerate(want):
        assert_close(f"sequence {index}", torch.cat(got[index], 1), part, CLOSE)
    assert_same_cache(cache, want_cache)
    assert_goes_on(layer, cache, whole)


@pytest.mark.parametrize("last", [0, 1, 2], ids=lambda last: f"of {SIZES[last]}")
@torch.no_grad()
def test_a_packed_row_leaves_the_state_of_its_last_sequence(layer: Any, last: int) -> None:
    whole = texts(*SIZES)
    whole = [*whole[:last], *whole[last + 1 :], whole[last]]
    parts = [text[:, :-MORE] for text in whole]
    seq_idx = torch.cat([torch.full((1, part.shape[1]), 3 * mark) for mark, part in enumerate(parts)], 1)
    cache = layer.allocate_inference_cache(1)
    out = layer(torch.cat(parts, 1), seq_idx=seq_idx, cache=cache)
    want, want_cache = alone(layer, parts)
    assert_close("out", out, torch.cat(want, 1), CLOSE)
    assert_same_cache(cache, (want_cache[0][-1:], want_cache[1][-1:]))
    assert_goes_on(layer, cache, whole[-1:])


@torch.no_grad()
def test_the_first_sequence_of_a_row_goes_on_from_the_cache(layer: Any) -> None:
    whole, other = texts(*SIZES[:2])
    cache = layer.allocate_inference_cache(1)
    first = layer(whole[:, :6], cache=cache)
    seq_idx = torch.tensor([[5] * 7 + [6] * 6])
    second = layer(torch.cat([whole[:, 6:], other], 1), seq_idx=seq_idx, cache=cache)
    want, want_cache = alone(layer, [whole, other])
    assert_close("out", torch.cat([first, second], 1), torch.cat(want, 1), CLOSE)
    assert_same_cache(cache, (want_cache[0][1:], want_cache[1][1:]))


@torch.no_grad()
def test_steps_on_rows_of_a_pool(layer: Any) -> None:
    """Texts that begin and end at different times, each with a row of the pool while it lasts."""
    whole, pool = texts(3, 6, 1), layer.allocate_inference_cache(5)
    for state in pool:
        state[1] = state[3] = torch.nan  # of nobody
    want = [layer(text) for text in whole]
    for now in range(12):
        places = [now - begin for begin in (0, 2, 1)]
        running = [0 <= place < text.shape[1] for place, text in zip(places, whole, strict=True)]
        nothing = torch.full((1, 12), torch.nan)
        tokens = [text[:, at] if on else nothing for text, at, on in zip(whole, places, running, strict=True)]
        rows = torch.tensor([row if on else -1 for row, on in zip((4, 0, 2), running, strict=True)])
        out, *states = layer.step(torch.stack(tokens), *pool, rows)
        assert all(one is other for one, other in zip(states, pool, strict=True))
        for index, on in enumerate(running):
            if on:
                assert_close(f"text {index} at {places[index]}", out[index], want[index][:, places[index]], CLOSE)
    for state in pool:
        assert state[[1, 3]].isnan().all()
    assert_same_cache((pool[0][[4, 0, 2]], pool[1][[4, 0, 2]]), alone(layer, whole)[1])


@torch.no_grad()
def test_inference_params_of_packed_sequences(layer: Any) -> None:
    whole, params = texts(*SIZES), test_mamba.InferenceParams()
    layer.layer_idx = 0
    row, offsets = packed([text[:, :-MORE] for text in whole])
    layer(row, cu_seqlens=offsets, inference_params=params)
    assert_goes_on(layer, params.key_value_memory_dict[0], whole)


# A name, what makes a cache of two rows bad, the error and words of it.
BAD_CACHES: list[tuple[str, Any, type[Exception], str]] = [
    ("batch", lambda conv, ssm: (conv.repeat(2, 1, 1), ssm.repeat_interleave(2, 0)), ValueError, "conv_state must"),
    ("batches that differ", lambda conv, ssm: (conv, ssm[:1]), ValueError, "ssm_state must have shape (rows, "),
    ("width", lambda conv, ssm: (conv[:, :, 1:], ssm), ValueError, "d_conv) = (2, "),
    ("states", lambda conv, ssm: (conv, ssm[..., 1:]), ValueError, "d_state) = (2, "),
    ("type", lambda conv, ssm: (conv, ssm.long()), TypeError, "ssm_state must have dtype float32, bfloat16"),
    ("type of inputs", lambda conv, ssm: (conv.int(), ssm), TypeError, "conv_state must have dtype float32"),
    ("no tensor", lambda conv, ssm: (None, ssm), TypeError, "conv_state must be a tensor, got NoneType"),
    ("device", lambda conv, ssm: (conv, ssm.to("meta")), ValueError, "ssm_state must be on cpu"),
]


@pytest.mark.parametrize(("change", "error", "words"), [pytest.param(*row[1:], id=row[0]) for row in BAD_CACHES])
@pytest.mark.parametrize("length", [1, 5])
@torch.no_grad()
def test_bad_caches_are_named_and_not_written(layer: Any, length: int, change: Any, error: Any, words: str) -> None:
    cache = change(*layer.allocate_inference_cache(2))
    before = [state.clone() if isinstance(state, Tensor) else state for state in cache]
    with pytest.raises(error) as caught:
        layer(torch.randn(2, length, 12), cache=cache)
    assert str(caught.value).startswith(f"{type(layer).__name__}: ")
    assert words in str(caught.value)
    for state, old in zip(cache, before, strict=True):
        assert state is old or state.is_meta or torch.equal(state, old)


@torch.no_grad()
def test_bad_packed_rows_and_pools_are_named(layer: Any) -> None:
    name, row = type(layer).__name__, torch.randn(1, 5, 12)
    cache = layer.allocate_inference_cache(2)
    for offsets, words in (
        ([0, 5], r"conv_state must have shape \(rows, channels, d_conv\) = \(1, "),
        ([0, 3, 2], "cu_seqlens must not decrease, got 2 after 3"),
        ([0, 3, 6], "cu_seqlens must end at or before length = 5, got 6"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(row, cu_seqlens=torch.tensor(offsets), cache=cache)
    with pytest.raises(ValueError, match=f"{name}: cu_seqlens needs a batch of 1, got 2"):
        layer(row.expand(2, -1, -1), cu_seqlens=torch.tensor([0, 3, 5]), cache=cache)
    with pytest.raises(ValueError, match=f"{name}: seq_idx and cu_seqlens say the same thing"):
        layer(row, seq_idx=torch.zeros(1, 5).int(), cu_seqlens=torch.tensor([0, 3, 5]), cache=cache)
    with pytest.raises(RuntimeError, match=r"conv_state_indices must be below the 2 rows .*\[0\] = 2"):
        layer.step(row[:, :1], *cache, torch.tensor([2]))
    with pytest.raises(ValueError, match=rf"{name}.step: hidden_states must hold one token, got length 5"):
        layer.step(row, *cache)
    assert not any(state.any() for state in cache)

"""What transformers' Mamba mixers have in common: projection, convolution, scan, projection, and their cache."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from layerzoo.hosts.recipe import Accelerated, has_kernel
from layerzoo.hosts.torch import Linear
from layerzoo.ops import causal_conv1d, causal_conv1d_update

CACHE_CALLS = (
    "get_conv_state",
    "get_recurrent_state",
    "update_conv_state",
    "update_recurrent_state",
    "is_recording_past",
)


class Mixer(Accelerated):
    """transformers' Mamba block on our kernels: prefill, decoding with a cache, training, packed sequences.

    It differs from the host's torch path in this:
    - `seq_idx` (batch, length) keeps packed sequences apart; the host raises without mamba_ssm's and causal_conv1d's
      packages. `cu_seqlens` raises here too.
    - `attention_mask` may cover the cached tokens as well; its last columns count.
    - Scan states and the arithmetic inside the kernels are fp32 for bf16 and fp16 models.
    - Gradients flow through the states of a cache from one call to the next.

    A kind gives `_split`, `_sequence` and `_token`. `-exp(A_log)` is computed anew in every call: a stored copy could
    not notice that `A_log.data` was written. A small model spends its time between the kernels when it decodes: two
    dimensions there, and few views.
    """

    renamed = MappingProxyType({"cache_params": "cache"})
    companions = (Linear,)
    op: ClassVar[str]  # whose kernel decides whether a device is worth it
    # children of which only the weights are used, and further parameters that are used directly
    uncalled: ClassVar[tuple[tuple[str, type[nn.Module]], ...]] = (("conv1d", nn.Conv1d),)
    parameters_used: ClassVar[tuple[str, ...]]

    @classmethod
    def refusal(cls, module: Any) -> str:
        if missing := [name for name in CACHE_CALLS if not hasattr(Cache, name)]:
            return f"the installed transformers.Cache lacks {', '.join(missing)}"
        device = module.A_log.device.type
        if device not in ("cpu", "meta") and not has_kernel(cls.op, device):
            return f"layerzoo has no kernel of {cls.op} for {device} here, so the host is faster"
        if module.activation not in ("silu", "swish"):
            return f"its activation must be silu or swish, got {module.activation}"
        for name, kind in cls.uncalled:
            child = getattr(module, name)
            if getattr(type(child), "host", type(child)) is not kind:
                return f"{name} must be a plain {kind.__name__}, got {child}"
            if "_hf_hook" in vars(child):
                return f"{name} has a device hook (a device map?), which only a call to {name} would run"
        for name in ("A_log", "D", "conv1d.weight", *cls.parameters_used):
            if type(tensor := module.get_parameter(name)) is not nn.Parameter or not tensor.is_floating_point():
                return f"{name} must be a plain floating-point parameter, got {type(tensor).__name__} of {tensor.dtype}"
        return ""

    @classmethod
    def probe(cls, module: Any) -> tuple[Tensor, ...]:
        weight: Tensor = module.conv1d.weight
        noise = torch.randn(1, 5, module.hidden_size, generator=torch.Generator().manual_seed(0))
        return (noise.to(weight.device, weight.dtype),)

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (batch, length, hidden), attention_mask (batch, length or more) with 0 at padding, kwargs:
        seq_idx (batch, length) int32, and cache_params, which transformers before 5.24 calls the cache; returns the
        shape and dtype of hidden_states, and writes the cache in place.
        """
        length, seq_idx = hidden_states.shape[1], kwargs.get("seq_idx")
        cache = kwargs.get("cache_params", cache)
        if kwargs.get("cu_seqlens") is not None:
            name = type(self).__name__
            raise ValueError(f"{name}: cu_seqlens must be None, packed sequences are told apart by seq_idx")
        mask = None if attention_mask is None else attention_mask[:, -length:, None]
        projected = self._project(masked(hidden_states, mask))  # (b, l, all)
        if cache is None:
            y = self._tokens(projected, mask, seq_idx, None, None, None)
        else:
            conv_state = cache.get_conv_state(self.layer_idx)
            recurrent_state = cache.get_recurrent_state(self.layer_idx)
            fresh = conv_state is None or recurrent_state is None
            in_place = not torch.is_grad_enabled() and not cache.is_recording_past(self.layer_idx)
            if length == 1 and not fresh and in_place and seq_idx is None:
                y = self._one_token(projected.squeeze(1), mask, conv_state, recurrent_state).unsqueeze(1)
            else:
                y = self._tokens(projected, mask, seq_idx, cache, conv_state, recurrent_state)
        output: Tensor = self.out_proj(y.to(hidden_states.dtype))
        return output

    def _project(self: Any, hidden_states: Tensor) -> Tensor:
        """hidden_states (b, l, hidden) -> what `_split` takes apart."""
        projected: Tensor = self.in_proj(hidden_states)
        return projected

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Any]:
        """projected (..., all) -> the convolution's input (..., c), the gate (..., d), step sizes (..., h) if any."""
        raise NotImplementedError

    def _sequence(
        self, x: Tensor, gate: Tensor, dt: Any, state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (b, l, c) out of the convolution -> (b, l, d) for `out_proj`, and the state after the last step."""
        raise NotImplementedError

    def _token(self, x: Tensor, gate: Tensor, dt: Any, state: Tensor) -> Tensor:
        """The same for one token: x (b, c) -> (b, d), the state is written in place."""
        raise NotImplementedError

    def _one_token(
        self: Any, projected: Tensor, mask: Tensor | None, conv_state: Tensor, recurrent_state: Tensor
    ) -> Tensor:
        """projected (b, all) -> (b, d); both states are written in place."""
        conv = self.conv1d
        x, gate, dt = self._split(projected)
        x = causal_conv1d_update(x, conv_state, conv.weight.squeeze(1), conv.bias, activation=self.activation)
        y: Tensor = self._token(masked(x, None if mask is None else mask.squeeze(1)), gate, dt, recurrent_state)
        return y

    def _tokens(
        self: Any,
        projected: Tensor,
        mask: Tensor | None,
        seq_idx: Tensor | None,
        cache: Cache | None,
        conv_state: Tensor | None,
        recurrent_state: Tensor | None,
    ) -> Tensor:
        """Any number of tokens, projected (b, l, all) -> (b, l, d), from the cached states where there are any.

        Channel-last all the way: the ops take the transposed views as they are and answer in the same stride order.
        """
        conv = self.conv1d
        # Split before it is transposed, since autograd puts the gradients together as it finds them.
        x, gate, dt = self._split(projected)
        x = x.transpose(1, 2)  # (b, c, l)
        before = None if conv_state is None else conv_state[..., conv_state.shape[-1] - conv.weight.shape[-1] + 1 :]
        if torch.is_grad_enabled():  # what is saved for backward must not be what the cache writes
            before = None if before is None else before.clone()
            recurrent_state = None if recurrent_state is None else recurrent_state.clone()
        convolved: Any = causal_conv1d(
            x, conv.weight.squeeze(1), conv.bias, seq_idx=seq_idx, initial_states=before, activation=self.activation
        )
        y: Tensor
        y, last_state = self._sequence(masked(convolved.transpose(1, 2), mask), gate, dt, recurrent_state, seq_idx)
        if cache is not None:
            cache.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            cache.update_recurrent_state(last_state, self.layer_idx)
        return y


def masked(states: Tensor, mask: Tensor | None) -> Tensor:
    return states if mask is None else (states * mask).to(states.dtype)

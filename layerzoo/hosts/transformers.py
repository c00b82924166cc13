"""Recipes for Hugging Face transformers: which class of ours runs in which of theirs. Importing this imports the host.

Mamba (Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces").
"""

from __future__ import annotations

import inspect
import math
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.mamba import modeling_mamba

from layerzoo.hosts.recipe import Accelerated, has_kernel
from layerzoo.hosts.torch import Linear
from layerzoo.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from layerzoo.ops.linear import linear

CACHE_CALLS = (
    "get_conv_state",
    "get_recurrent_state",
    "update_conv_state",
    "update_recurrent_state",
    "is_recording_past",
)
LOG2_E = math.log2(math.e)
# What the installed version calls a Mamba model's cache, as an argument and in the output: since 5.24 `cache`.
CACHE = "cache" if "cache" in inspect.signature(modeling_mamba.MambaForCausalLM.forward).parameters else "cache_params"


class MambaMixer(Accelerated, modeling_mamba.MambaMixer):
    """transformers' Mamba block on our kernels: prefill, decoding with a cache, training, packed sequences.

    It differs from the host's torch path in this:
    - Several tokens at once after a cached start (chunked prefill) go on from the cached state. The host, and the
      kernel of mamba_ssm that it would use, start from a zero state there, so its logits are wrong from there on.
    - `seq_idx` (batch, length) keeps packed sequences apart; the host raises without mamba_ssm's and causal_conv1d's
      packages. `cu_seqlens` raises here too.
    - `attention_mask` may cover the cached tokens as well; its last columns count.
    - Scan states and the arithmetic inside the kernels are fp32 for bf16 and fp16 models.
    - Gradients flow through the states of a cache from one call to the next.

    `-exp(A_log)` is computed anew in every call: a stored copy could not notice that `A_log.data` was written.
    """

    host = modeling_mamba.MambaMixer
    renamed = MappingProxyType({"cache_params": "cache"})
    companions = (Linear,)

    @classmethod
    def refusal(cls, module: Any) -> str:
        if missing := [name for name in CACHE_CALLS if not hasattr(Cache, name)]:
            return f"the installed transformers.Cache lacks {', '.join(missing)}"
        device = module.A_log.device.type
        if device not in ("cpu", "meta") and not has_kernel("selective_scan", device):
            return f"layerzoo has no kernel of selective_scan for {device} here, so the host is faster"
        if module.activation not in ("silu", "swish"):
            return f"its activation must be silu or swish, got {module.activation}"
        for name, kind in (("conv1d", nn.Conv1d), ("dt_proj", nn.Linear)):  # their weights are used without a call
            child = getattr(module, name)
            if getattr(type(child), "host", type(child)) is not kind:
                return f"{name} must be a plain {kind.__name__}, got {child}"
            if "_hf_hook" in vars(child):
                return f"{name} has a device hook (a device map?), which only a call to {name} would run"
        for name in ("A_log", "D", "conv1d.weight", "dt_proj.weight"):
            if type(tensor := module.get_parameter(name)) is not nn.Parameter or not tensor.is_floating_point():
                return f"{name} must be a plain floating-point parameter, got {type(tensor).__name__} of {tensor.dtype}"
        return ""

    @classmethod
    def probe(cls, module: Any) -> tuple[Tensor, ...]:
        weight: Tensor = module.conv1d.weight
        noise = torch.randn(1, 5, module.hidden_size, generator=torch.Generator().manual_seed(0))
        return (noise.to(weight.device, weight.dtype),)

    def forward(
        self,
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
            raise ValueError("MambaMixer: cu_seqlens must be None, packed sequences are told apart by seq_idx")
        mask = None if attention_mask is None else attention_mask[:, -length:, None]
        xz = self.in_proj(_masked(hidden_states, mask))  # (b, l, 2d)
        if cache is None:
            y = _scan(self, xz, mask, seq_idx, None, None, None)
        else:
            conv_state = cache.get_conv_state(self.layer_idx)
            recurrent_state = cache.get_recurrent_state(self.layer_idx)
            fresh = conv_state is None or recurrent_state is None
            in_place = not torch.is_grad_enabled() and not cache.is_recording_past(self.layer_idx)
            if length == 1 and not fresh and in_place and seq_idx is None:
                y = _step(self, xz, mask, conv_state, recurrent_state)
            else:
                y = _scan(self, xz, mask, seq_idx, cache, conv_state, recurrent_state)
        output: Tensor = self.out_proj(y)
        return output


def _masked(states: Tensor, mask: Tensor | None) -> Tensor:
    return states if mask is None else (states * mask).to(states.dtype)


def _step(mixer: Any, xz: Tensor, mask: Tensor | None, conv_state: Any, recurrent_state: Any) -> Tensor:
    """One token, xz (b, 1, 2d) -> (b, 1, d); both states are written in place.

    A small model spends its time here between the kernels: two dimensions and few views.
    """
    conv, dt_proj = mixer.conv1d, mixer.dt_proj
    x, z = xz.squeeze(1).chunk(2, dim=-1)
    x = causal_conv1d_update(x, conv_state, conv.weight.squeeze(1), conv.bias, activation=mixer.activation)
    x = _masked(x, None if mask is None else mask.squeeze(1))
    dt, B, C = _dt_B_C(mixer, x, dt_proj.weight)
    y = selective_state_update(
        recurrent_state,
        x,
        dt,
        _decay(mixer),
        B,
        C,
        D=mixer.D,
        z=z,
        dt_bias=dt_proj.bias,
        dt_softplus=True,
    )
    return y.unsqueeze(1)


def _scan(
    mixer: Any,
    xz: Tensor,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    cache: Cache | None,
    conv_state: Tensor | None,
    recurrent_state: Tensor | None,
) -> Tensor:
    """Any number of tokens, xz (b, l, 2d) -> (b, l, d), from the cached states where there are any.

    Channel-last all the way: the ops take the transposed views as they are and answer in the same stride order.
    """
    conv, dt_proj = mixer.conv1d, mixer.dt_proj
    # Halved before it is transposed, since autograd puts the gradients together as it finds them.
    x, z = (half.transpose(1, 2) for half in xz.chunk(2, dim=-1))  # (b, d, l)
    before = None
    if cache is not None:
        if conv_state is not None:  # a copy, since the update writes it
            before = conv_state[..., conv_state.shape[-1] - conv.weight.shape[-1] + 1 :].clone()
        cache.update_conv_state(x, mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
    convolved: Any = causal_conv1d(
        x, conv.weight.squeeze(1), conv.bias, seq_idx=seq_idx, initial_states=before, activation=mixer.activation
    )
    x = _masked(convolved.transpose(1, 2), mask)  # (b, l, d)
    dt, B, C = _dt_B_C(mixer, x, dt_proj.weight)
    if recurrent_state is not None and torch.is_grad_enabled():
        recurrent_state = recurrent_state.clone()  # the scan saves it for backward, the cache writes it
    y, last_state = selective_scan(
        x.transpose(1, 2),
        dt.transpose(1, 2),
        _decay(mixer),
        B.transpose(1, 2),
        C.transpose(1, 2),
        D=mixer.D,
        z=z,
        delta_bias=dt_proj.bias,
        delta_softplus=True,
        return_last_state=True,
        initial_state=recurrent_state,
        seq_idx=seq_idx,
    )
    if cache is not None:
        cache.update_recurrent_state(last_state, mixer.layer_idx)
    return y.transpose(1, 2)


def _dt_B_C(mixer: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, d) -> step sizes before bias and softplus (…, d), B and C (…, n)."""
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt, B, C = mixer.x_proj(x).split_with_sizes(sizes, dim=-1)
    return linear(dt, weight), B, C


def _decay(mixer: Any) -> Tensor:
    """A = -exp(A_log) (d, n) in fp32.

    By exp2, since torch.exp goes to threads of MKL's own, which on a busy machine wait for each other for milliseconds.
    """
    decay: Tensor = mixer.A_log.float() * LOG2_E
    return -decay.exp2() if torch.is_grad_enabled() else decay.exp2_().neg_()

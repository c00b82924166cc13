"""S4D: diagonal state-space layer.

Gu, Gupta, Goel and Ré, "On the Parameterization and Initialization of Diagonal State Space Models" (2022), arXiv
2206.11893, with the S4D-Lin start and zero-order hold. Parameter names and shapes are those of the authors' stand-alone
S4D, so that its weights load. The kernel's parameters and all of its arithmetic are float32 or wider.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.ops import linear_scan, s4d_kernel

LEAST = 128  # of a transform: the last bits of MKL's shorter ones depend on the number of threads


class S4DKernel(nn.Module):
    """The parameters of `channels` diagonal systems of `d_state` real, d_state / 2 complex states."""

    def __init__(
        self, channels: int, d_state: int, dt_min: float, dt_max: float, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self._range = (math.log(dt_min), math.log(dt_max))

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))

        self.log_dt = parameter(channels)
        self.C = parameter(channels, d_state // 2, 2)  # real and imaginary part
        self.log_A_real, self.A_imag = parameter(channels, d_state // 2), parameter(channels, d_state // 2)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S4D-Lin: A_n = -1/2 + i pi n; step sizes log-uniform; C of complex variance 1."""
        self.log_dt.uniform_(*self._range)
        self.C.normal_(std=math.sqrt(0.5))
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(
            math.pi * torch.arange(self.A_imag.shape[1], device=self.A_imag.device).expand_as(self.A_imag)
        )

    def system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """dt (channels,), A and C (channels, d_state / 2), complex."""
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        return self.log_dt.to(dtype).exp(), A, torch.view_as_complex(self.C.to(dtype))


class DiagonalSSM(nn.Module):
    """S4D's linear part, (batch, length, d_model) to the same shape: each channel's own system, and a skip weight.

    Args and errors as for `S4D`, which follows it by a non-linearity and a mix of channels.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if d_model < 1:
            raise ValueError(f"{name}: d_model must be at least 1, got {d_model}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"{name}: d_state must be even and at least 2, got {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"{name}: dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.d_model, self.d_state = d_model, d_state
        self.D = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.kernel = S4DKernel(d_model, d_state, dt_min, dt_max, device)
        nn.init.normal_(self.D)

    def reset_parameters(self) -> None:
        """Draws the systems and the skip weights anew."""
        self.kernel.reset_parameters()
        nn.init.normal_(self.D)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """By convolution of the whole sequence."""
        return self._convolve(hidden_states)

    def step(self, hidden_states: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """By recurrence: the next tokens, one or more, and the state -> (output, state after them).

        A state is complex (batch, d_model, d_state / 2); None is the start of a sequence.
        """
        return self._recur(hidden_states, state)

    def _wide(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(
                f"{type(self).__name__}: hidden_states must have shape (batch, length, d_model = {self.d_model}), "
                f"got {tuple(x.shape)}"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _convolve(self, x: Tensor) -> Tensor:
        u, length = self._wide(x), x.shape[1]
        if x.numel() == 0:  # MKL has no transform of nothing
            return torch.zeros_like(x)
        kernel = s4d_kernel(*self.kernel.system(u.dtype), length)  # d l
        n = max(2 * length, LEAST)  # twice, so that what wraps around meets zeros
        y = torch.fft.irfft(torch.fft.rfft(u.mT, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., :length].mT  # b l d
        out: Tensor = (y + self.D * u).to(x.dtype)
        return out

    def _recur(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        u = self._wide(x)
        dt, A, C = self.kernel.system(u.dtype)
        step = dt.unsqueeze(1) * A
        inputs = u.unsqueeze(3) * (torch.expm1(step) / A)  # b l d n
        decay = step.exp().flatten().expand(x.shape[0], x.shape[1], -1)
        h = linear_scan(decay, inputs.flatten(2), None if state is None else state.flatten(1)).view_as(inputs)
        y = (2 * (C * h).real.sum(3) + self.D * u).to(x.dtype)
        if x.shape[1] == 0:
            return y, inputs.new_zeros(inputs[:, :0].sum(1).shape) if state is None else state
        return y, h[:, -1]


class S4D(DiagonalSSM):
    """Maps (batch, length, d_model) to the same shape, causally: GLU(Linear(GELU(K * x + D x))).

    forward convolves with the kernel K of `s4d_kernel` by FFT, `step` runs the recurrence; both give the same.

    Args:
        d_model: width of input and output. d_state: real states per channel, even; half as many are complex.
        dt_min, dt_max: range in which the initial step sizes are drawn, log-uniformly.

    Raises:
        ValueError: a size or step size out of range, an input of another shape.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, d_state, dt_min, dt_max, device, dtype)
        # A convolution of width 1 as in the original, whose weight is (2 d_model, d_model, 1).
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1, device=device, dtype=dtype), nn.GLU(1))

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        super().reset_parameters()
        self._mixing.reset_parameters()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (batch, length, d_model) -> the same shape."""
        return self._mix(self._convolve(hidden_states))

    def step(self, hidden_states: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens, one or more: (batch, length, d_model) and the state -> (output, state after them).

        A state is complex (batch, d_model, d_state / 2); None is the start of a sequence.
        """
        y, state = self._recur(hidden_states, state)
        return self._mix(y), state

    @property
    def _mixing(self) -> nn.Conv1d:
        layer = self.output_linear[0]
        assert isinstance(layer, nn.Conv1d)
        return layer

    def _mix(self, y: Tensor) -> Tensor:
        mixing = self._mixing
        return F.glu(F.linear(F.gelu(y), mixing.weight.squeeze(2), mixing.bias), dim=2)

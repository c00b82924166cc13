"""Self-supervised early exits for a transformers causal language model.

Paper: "Accelerating Large Language Model Inference with Self-Supervised Early Exits", 2024. Small heads on intermediate
layers learn to predict what the full model predicts; decoding leaves at the first head that is sure enough.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Deeper layers catch up after this many early exits in a row: one pass over the block reads their weights only once.
_CATCH_UP = 16


class ExitOutput(NamedTuple):
    """What a head says: ``logits`` (batch, length, vocab_size), ``confidence`` (batch, length), at most 1."""

    logits: Tensor
    confidence: Tensor


class Trace(NamedTuple):
    """What early exit does at each position of given tokens, each (batch, length): the next token that it predicts, the
    layers that it runs for it, and the full model's prediction."""

    tokens: Tensor
    depths: Tensor
    final: Tensor

    @property
    def agreement(self) -> float:
        """Share of positions where early exit and the full model predict the same."""
        return (self.tokens == self.final).double().mean().item()

    @property
    def mean_depth(self) -> float:
        """Layers run per position."""
        return self.depths.double().mean().item()


class Generation(NamedTuple):
    """Greedy decoding: ``tokens`` (1, prompt + new) and, for each new token, the number of layers that predicted it."""

    tokens: Tensor
    depths: list[int]


class EarlyExitHead(nn.Module):
    """RMS norm and a linear map from one layer's hidden states to logits, with a confidence from their softmax.

    Args:
        hidden_size, vocab_size: widths of the input and of the logits.
        confidence: "entropy" (1 - entropy / log vocab_size), "max_prob", or "margin" (its lead over the second).
        threshold: decoding leaves where the confidence exceeds it. Confidences are at most 1: the default never leaves.
        eps: of the norm.

    Raises:
        ValueError: a size too small, or an unknown confidence.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        confidence: str = "entropy",
        threshold: float = 2.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or vocab_size < 2:
            raise ValueError(
                "EarlyExitHead: hidden_size must be at least 1 and vocab_size at least 2, "
                f"got {hidden_size} and {vocab_size}"
            )
        if confidence not in ("entropy", "max_prob", "margin"):
            raise ValueError(f"EarlyExitHead: confidence must be entropy, max_prob or margin, got {confidence!r}")
        self.confidence = confidence
        self.threshold = threshold
        self.norm = nn.RMSNorm(hidden_size, eps=eps, device=device, dtype=dtype)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False, device=device, dtype=dtype)

    def tie(self, lm_head: nn.Linear) -> "EarlyExitHead":
        """Share the model's own output projection, as a start or (if it is frozen) to train the norm only.

        Raises:
            ValueError: the projection has other sizes or a bias.
        """
        if lm_head.weight.shape != self.lm_head.weight.shape or lm_head.bias is not None:
            expected, got = tuple(self.lm_head.weight.shape), tuple(lm_head.weight.shape)
            raise ValueError(f"tie: lm_head must have weight {expected} and no bias, got weight {got}")
        self.lm_head = lm_head
        return self

    def forward(self, hidden_states: Tensor) -> ExitOutput:
        """(batch, length, hidden_size) -> logits, and confidence (float32 for half-precision inputs)."""
        logits = self.lm_head(self.norm(hidden_states))
        wide = _at_least_float32(logits)
        if self.confidence == "entropy":
            log_p = F.log_softmax(wide, dim=-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            sure = 1 - entropy / math.log(logits.shape[-1])
        elif self.confidence == "max_prob":
            sure = wide.softmax(-1).amax(-1)
        else:
            top = wide.softmax(-1).topk(2, dim=-1).values
            sure = top[..., 0] - top[..., 1]
        return ExitOutput(logits, sure.clamp(max=1))  # rounding must not lift a confidence over a threshold of 1


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Left(Exception):
    """Raised from a layer's hook to leave the model; carries the next token and the depth."""


class EarlyExitModel(nn.Module):
    """A causal language model with heads; the model itself is not changed and gets no gradients.

    Args:
        model: a transformers causal LM whose decoder layers stand in one ``nn.ModuleList``.
        heads: depth -> head; the head reads the hidden states after that many layers.

    Raises:
        ValueError: a depth that is not 1 ... layers - 1, or a model whose layers cannot be found.
    """

    def __init__(self, model: PreTrainedModel, heads: Mapping[int, EarlyExitHead]) -> None:
        super().__init__()
        self.model = model
        count = model.config.num_hidden_layers
        # Pre-order: the decoder's own list comes before lists inside its layers (experts) that may be as long.
        lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        layers = next(lists, None)
        if layers is None:
            raise ValueError(f"EarlyExitModel: model must hold its {count} layers in one ModuleList, none found")
        if not heads or not all(1 <= depth < count for depth in heads):
            raise ValueError(f"EarlyExitModel: heads must be at depths 1 to {count - 1}, got {sorted(heads)}")
        self._layers: list[nn.Module] = list(layers)
        self.heads = nn.ModuleDict({str(depth): heads[depth] for depth in sorted(heads)})

    def _exits(self) -> Iterator[tuple[int, EarlyExitHead]]:
        for depth, head in self.heads.items():
            assert isinstance(head, EarlyExitHead)
            yield int(depth), head

    @contextmanager
    def _watch(self, see: Callable[[int, EarlyExitHead, Tensor], None]) -> Iterator[None]:
        """Within it, a forward of the model calls ``see(depth, head, hidden_states)`` at every head."""
        # Hooks, not output_hidden_states: families disagree on whether that counts the embedding.
        handles = [
            self._layers[depth - 1].register_forward_hook(_hook(see, depth, head)) for depth, head in self._exits()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _observe(self, input_ids: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Hidden states by depth of exit, and the full model's most likely next token (batch, length)."""
        states: dict[int, Tensor] = {}
        with self._watch(lambda depth, head, hidden: states.update({depth: hidden})):
            output = self.model(input_ids=input_ids, use_cache=False)
        return states, output.logits.argmax(-1)

    def loss(self, input_ids: Tensor) -> Tensor:
        """Cross-entropy of every head against the model's own prediction at each position, summed over heads.

        Takes tokens (batch, length), no labels. Only heads get gradients (and a shared projection, unless frozen).
        """
        states, final = self._observe(input_ids)
        logits = (_at_least_float32(head(states[depth]).logits) for depth, head in self._exits())
        return torch.stack([F.cross_entropy(said.flatten(0, 1), final.flatten()) for said in logits]).sum()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], agreement: float) -> dict[int, float]:
        """Set each head's threshold from calibration tokens, (batch, length) each; returns depth -> threshold.

        It is the smallest at which, of the tokens that leave there, at least the share ``agreement`` gets the full
        model's prediction. A head that does not reach it gets 2: no token leaves there.

        Raises:
            ValueError: agreement is not within 0 ... 1, or no batch was given.
        """
        if not 0 <= agreement <= 1:
            raise ValueError(f"calibrate: agreement must be within 0 and 1, got {agreement}")
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {depth: [] for depth, _ in self._exits()}
        for input_ids in batches:
            states, final = self._observe(input_ids)
            for depth, head in self._exits():
                logits, confidence = head(states[depth])
                seen[depth].append((confidence.flatten(), (logits.argmax(-1) == final).flatten()))
        if not all(seen.values()):
            raise ValueError("calibrate: batches must hold at least one (batch, length) tensor, got none")
        staying: Tensor | None = None
        for depth, head in self._exits():
            confidence, right = (torch.cat(parts) for parts in zip(*seen[depth], strict=True))
            if staying is None:
                staying = torch.ones_like(right)
            head.threshold = _threshold(confidence[staying], right[staying], agreement)
            staying &= confidence <= head.threshold
        return {depth: head.threshold for depth, head in self._exits()}

    @torch.no_grad()
    def trace(self, input_ids: Tensor) -> Trace:
        """What early exit would predict, and how deep, at every position of (batch, length)."""
        states, final = self._observe(input_ids)
        tokens, depths = final.clone(), torch.full_like(final, len(self._layers))
        for depth, head in reversed(list(self._exits())):  # earlier heads overwrite later ones
            logits, confidence = head(states[depth])
            leaves = confidence > head.threshold
            tokens[leaves], depths[leaves] = logits.argmax(-1)[leaves], depth
        return Trace(tokens, depths, final)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None) -> Generation:
        """Decode greedily from a prompt (1, length); a token leaves at the first head that exceeds its threshold.

        Tokens and depths are those of recomputing the whole prefix for every token. With a key-value cache, tokens that
        left early wait until a later one, or a block of them, runs the deeper layers too.

        Raises:
            ValueError: input_ids is not (1, length) with length at least 1.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
            raise ValueError(f"generate: input_ids must have shape (1, length >= 1), got {tuple(input_ids.shape)}")
        tokens, depths, done = input_ids, list[int](), 0  # done: tokens that every layer has in the cache
        cache = self._new_cache()
        for step in range(max_new_tokens):
            waiting = tokens.shape[1] - 1 - done
            if cache is not None and waiting > (0 if step == 0 else _CATCH_UP):
                self.model(input_ids=tokens[:, done:-1], **self._cached(cache))
                done = tokens.shape[1] - 1
            token, depth = self._next(tokens[:, done:], cache)
            if cache is not None and depth == len(self._layers):
                done = tokens.shape[1]
            elif cache is not None:
                for layer in cache.layers[:depth]:
                    assert isinstance(layer, DynamicLayer)
                    layer.crop(done - tokens.shape[1])
            tokens = torch.cat([tokens, token], dim=1)
            depths.append(depth)
            if token.item() == eos_token_id:
                break
        return Generation(tokens, depths)

    def _new_cache(self) -> DynamicCache | None:
        """A cache, if every layer of it can be cut back: recurrent states and sliding windows cannot."""
        cache = DynamicCache(config=self.model.config)
        return cache if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers) else None

    def _cached(self, cache: DynamicCache | None) -> dict[str, Any]:
        """The model's arguments that hand it a cache, which transformers before 5.24 calls past_key_values."""
        if cache is None:
            return {"use_cache": False}
        new = "cache" in inspect.signature(self.model.forward).parameters
        return {"use_cache": True, "cache" if new else "past_key_values": cache}

    def _next(self, input_ids: Tensor, cache: DynamicCache | None) -> tuple[Tensor, int]:
        """The next token (1, 1) and the number of layers that predicted it."""
        try:
            with self._watch(_leave_if_sure):
                output = self.model(input_ids=input_ids, **self._cached(cache))
        except _Left as left:
            token, depth = left.args
            return token, depth
        return output.logits[:, -1:].argmax(-1), len(self._layers)


def _hook(see: Callable[[int, EarlyExitHead, Tensor], None], depth: int, head: EarlyExitHead) -> Callable[..., None]:
    return lambda layer, args, output: see(depth, head, output[0] if isinstance(output, tuple) else output)


def _leave_if_sure(depth: int, head: EarlyExitHead, hidden_states: Tensor) -> None:
    logits, confidence = head(hidden_states[:, -1:])
    if confidence.item() > head.threshold:
        raise _Left(logits.argmax(-1), depth)


def _threshold(confidence: Tensor, right: Tensor, agreement: float) -> float:
    """The smallest threshold above which at least a share of ``right`` holds; 2 (never) if there is none."""
    ordered, order = confidence.sort(descending=True)
    share = right[order].double().cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    # A threshold cannot part equal confidences: only ends of runs of equal values count.
    ends = torch.cat([ordered[1:] < ordered[:-1], ordered.new_ones(min(1, len(ordered)), dtype=torch.bool)])
    enough = (ends & (share >= agreement)).nonzero()
    if not len(enough):
        return 2.0
    last = int(enough[-1])
    return float(ordered[last + 1]) if last + 1 < len(ordered) else -1.0

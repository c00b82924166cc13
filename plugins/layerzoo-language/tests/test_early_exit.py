import math
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from layerzoo_language import EarlyExitHead, EarlyExitModel
from layerzoo_language.early_exit import _CATCH_UP
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

VOCAB, HIDDEN, LAYERS = 32, 32, 4
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
ATTENTION = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def host(name: str) -> nn.Module:
    """A tiny random model whose deeper layers change the prediction (hence the wide initialisation)."""
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**ATTENTION, initializer_range=0.3)).eval()
    if name == "mistral":  # a sliding window: its cache cannot be cut back
        return MistralForCausalLM(MistralConfig(**ATTENTION, initializer_range=0.3, sliding_window=4)).eval()
    return MambaForCausalLM(MambaConfig(**SIZES, state_size=4, initializer_range=0.3)).eval()


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(batch: int, length: int, seed: int) -> torch.Tensor:
    """Groups of four: a random token, one that follows from it alone, another random one, and the first one again."""
    half, generator = VOCAB // 2, torch.Generator().manual_seed(seed)
    first, other = torch.randint(half, (2, batch, length // 4), generator=generator)
    return torch.stack([first, (5 * first + 3) % half, half + other, first], dim=-1).flatten(1)


def fit(parameters: Iterable[nn.Parameter], loss: Callable[[int], torch.Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(steps):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_heads(model: nn.Module, depths: tuple[int, ...], steps: int, confidence: str = "entropy") -> EarlyExitModel:
    torch.manual_seed(1)
    early = EarlyExitModel(model, {depth: EarlyExitHead(HIDDEN, VOCAB, confidence) for depth in depths})
    fit(early.heads.parameters(), lambda step: early.loss(text(16, 24, seed=1000 + step)), steps)
    return early


def set_thresholds(early: EarlyExitModel, threshold: float) -> None:
    for head in early.heads.values():
        head.threshold = threshold


@pytest.fixture(scope="module")
def language_model() -> Iterator[nn.Module]:
    """A tiny Llama that has learnt ``text``: some of its tokens are easy, some need context, some cannot be known."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**ATTENTION))

    def loss(step: int) -> torch.Tensor:
        batch = text(16, 24, seed=step)
        return model(input_ids=batch, labels=batch).loss

    fit(model.parameters(), loss, steps=120)
    yield model.eval().requires_grad_(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("confidence", ["entropy", "max_prob", "margin"])
def test_calibrated_agreement_depth_and_full_model(
    confidence: str, language_model: nn.Module, record_property: Callable[[str, object], None]
) -> None:
    """Catalogue row 194: held-out agreement at the calibrated threshold, threshold above one, mean depth."""
    early = with_heads(language_model, (1, 2, 3), steps=60, confidence=confidence)
    calibration = [text(64, 24, seed=2000 + batch) for batch in range(4)]
    held_out = text(256, 24, seed=3000)
    set_thresholds(early, -1.0)
    assert early.trace(held_out).agreement < 0.8  # leaving always at the first head is not enough

    depths = []
    for wanted in (0.9, 0.95):
        thresholds = early.calibrate(calibration, wanted)
        assert all(threshold < 1 for threshold in thresholds.values())
        trace = early.trace(held_out)
        for depth in thresholds:
            left = trace.depths == depth
            agreement = (trace.tokens == trace.final)[left].double().mean().item()
            error = 4 * math.sqrt(wanted * (1 - wanted) / int(left.sum()))
            assert abs(agreement - wanted) <= error, (wanted, depth, agreement)
        assert trace.agreement >= wanted
        depths.append(trace.mean_depth)
        record_property(f"mean_depth_at_{wanted}", trace.mean_depth)
        print(f"{confidence}: agreement {trace.agreement:.3f} at {trace.mean_depth:.2f} of {LAYERS} layers")
    assert depths[0] < depths[1] < 0.75 * LAYERS

    # Above one, nothing leaves, and decoding is the full model's.
    set_thresholds(early, 1.0 + 1e-6)
    prompt = text(1, 8, seed=4000)
    full = language_model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    generation = early.generate(prompt, max_new_tokens=24)
    assert torch.equal(generation.tokens, full)
    assert generation.depths == [LAYERS] * 24


@pytest.mark.parametrize("name", ["llama", "mamba", "mistral"])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 2.0])
def test_decoding_with_a_cache_is_decoding_without_one(name: str, threshold: float) -> None:
    early = with_heads(host(name), (1, 2), steps=20)
    set_thresholds(early, threshold)
    prompt = tokens(1, 6, seed=4)
    generation = early.generate(prompt, max_new_tokens=3 * _CATCH_UP)
    # One pass over all the tokens: what each position predicts, and how deep, must be what decoding did there.
    trace = early.trace(generation.tokens[:, :-1])
    assert torch.equal(trace.tokens[0, 5:], generation.tokens[0, 6:])
    assert trace.depths[0, 5:].tolist() == generation.depths
    assert early._new_cache() is None or name == "llama"


def test_tokens_that_all_leave_are_made_up_for_in_blocks() -> None:
    early = EarlyExitModel(host("llama"), {1: EarlyExitHead(HIDDEN, VOCAB, threshold=-1.0)})
    seen = []
    early._layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    generation = early.generate(tokens(1, 5, seed=5), max_new_tokens=40)
    assert generation.depths == [1] * 40
    assert seen[0] == 4  # the prompt, in one pass of all layers
    assert max(seen) == _CATCH_UP + 1  # never the whole prefix again
    assert torch.equal(early.trace(generation.tokens[:, :-1]).tokens[0, 4:], generation.tokens[0, 5:])


def test_training_reaches_heads_and_leaves_the_model_alone() -> None:
    model = host("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untrained, early = with_heads(model, (2,), steps=0), with_heads(model, (2,), steps=30)
    batch = text(16, 24, seed=99)
    assert early.loss(batch).item() < 0.8 * untrained.loss(batch).item()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    hooks = [len(layer._forward_hooks) for layer in early._layers]
    early.generate(tokens(1, 3, seed=0), 3)
    assert [len(layer._forward_hooks) for layer in early._layers] == hooks


def test_a_head_may_share_the_models_projection() -> None:
    model = host("llama")
    head = EarlyExitHead(HIDDEN, VOCAB)
    assert head.tie(model.lm_head) is head
    assert head.lm_head.weight is model.lm_head.weight
    with pytest.raises(ValueError, match=r"tie: lm_head must have weight \(32, 8\) and no bias, got weight \(32, 32\)"):
        EarlyExitHead(8, VOCAB).tie(model.lm_head)


@pytest.mark.parametrize("confidence", ["entropy", "max_prob", "margin"])
def test_confidence_is_one_for_a_certain_head_and_lowest_for_a_uniform_one(confidence: str) -> None:
    head = EarlyExitHead(4, 10, confidence)
    lowest = {"entropy": 0.0, "max_prob": 0.1, "margin": 0.0}[confidence]
    with torch.no_grad():
        head.lm_head.weight.zero_()
        uniform = head(torch.ones(1, 1, 4)).confidence.item()
        head.lm_head.weight[3] = 1e4
        certain = head(torch.ones(1, 1, 4)).confidence.item()
    assert uniform == pytest.approx(lowest, abs=1e-6)
    assert certain == 1.0


def test_generation_stops_at_the_end_of_sequence() -> None:
    early = EarlyExitModel(host("llama"), {1: EarlyExitHead(HIDDEN, VOCAB)})
    prompt = tokens(1, 5, seed=6)
    free = early.generate(prompt, max_new_tokens=10).tokens[0, 5:].tolist()
    stopped = early.generate(prompt, max_new_tokens=10, eos_token_id=free[3])
    assert stopped.tokens[0, 5:].tolist() == free[: free.index(free[3]) + 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EarlyExitHead(0, 10), "hidden_size must be at least 1"),
        (lambda: EarlyExitHead(4, 1), "vocab_size at least 2"),
        (lambda: EarlyExitHead(4, 10, "cosine"), "confidence must be entropy, max_prob or margin, got 'cosine'"),
        (lambda: EarlyExitModel(host("llama"), {}), r"heads must be at depths 1 to 3, got \[\]"),
        (lambda: EarlyExitModel(host("llama"), {4: EarlyExitHead(HIDDEN, VOCAB)}), r"got \[4\]"),
        (
            lambda: _early().generate(tokens(2, 3, seed=0), 1),
            r"input_ids must have shape \(1, length >= 1\), got \(2, 3\)",
        ),
        (lambda: _early().generate(tokens(1, 0, seed=0), 1), r"got \(1, 0\)"),
        (lambda: _early().calibrate([], 0.9), "at least one"),
        (lambda: _early().calibrate([tokens(1, 3, seed=0)], 1.5), "agreement must be within 0 and 1, got 1.5"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _early() -> EarlyExitModel:
    return EarlyExitModel(host("llama"), {1: EarlyExitHead(HIDDEN, VOCAB)})

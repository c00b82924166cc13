"""layerzoo.compat: code that imports mamba_ssm and causal_conv1d gets ours, as long as it is on, and no longer."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import layerzoo
from layerzoo import _native, reference
from layerzoo.hosts.compat import PACKAGES

REAL = [name for name in PACKAGES if importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(REAL), reason=f"installed here, so that compat refuses: {', '.join(REAL)}")

MODULES = [name for _, contents in PACKAGES.values() for name in contents]
SIGNATURES = {
    "mamba_ssm.ops.selective_scan_interface:selective_scan_fn": (
        "u delta A B C D z delta_bias delta_softplus return_last_state"
    ),
    "mamba_ssm.ops.selective_scan_interface:mamba_inner_fn": (
        "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D delta_bias "
        "B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight b_c_dt_rms_eps"
    ),
    "mamba_ssm.ops.triton.selective_state_update:selective_state_update": (
        "state x dt A B C D z dt_bias dt_softplus state_batch_indices"
    ),
    "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined": (
        "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit return_final_states "
        "return_varlen_states state_dtype"
    ),
    "causal_conv1d:causal_conv1d_fn": (
        "x weight bias seq_idx initial_states return_final_states final_states_out activation"
    ),
    "causal_conv1d:causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
    "mamba_ssm:Mamba": (
        "d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias "
        "use_fast_path layer_idx device dtype"
    ),
    "mamba_ssm:Mamba2": (
        "d_model d_state d_conv conv_init expand headdim d_ssm ngroups A_init_range D_has_hdim rmsnorm "
        "norm_before_gate dt_min dt_max dt_init_floor dt_limit bias conv_bias chunk_size use_mem_eff_path layer_idx "
        "process_group sequence_parallel device dtype"
    ),
}


@pytest.fixture
def on():
    with layerzoo.compat():
        yield


def imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    error = float((actual.double() - expected.double()).detach().norm() / expected.detach().norm().clamp_min(1e-30))
    assert actual.shape == expected.shape
    assert error <= tolerance, f"{error:.1e} relative, allowed {tolerance:.0e}"


class TestSwitch:
    def test_it_is_off_by_default(self, python):
        code = """
import sys, layerzoo, layerzoo.hosts, layerzoo.hosts.compat, layerzoo.nn, layerzoo.ops
assert not {'mamba_ssm', 'causal_conv1d'} & set(sys.modules)
try:
    import mamba_ssm
except ModuleNotFoundError:
    print('off')
"""
        assert python("-c", code).stdout == "off\n"

    def test_undo_restores_the_modules_exactly(self):
        before = list(sys.modules.items())
        handle = layerzoo.compat()
        assert set(sys.modules) - {name for name, _ in before} == set(MODULES)
        assert imported("mamba_ssm:Mamba") is layerzoo.nn.Mamba
        handle.undo()
        after = list(sys.modules.items())
        assert [name for name, _ in after] == [name for name, _ in before]
        assert all(one is other for (_, one), (_, other) in zip(after, before, strict=True))
        handle.undo()  # no more to do
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.ops.triton.ssd_combined")

    def test_a_with_block_ends_it_and_what_was_imported_stays(self):
        with pytest.raises(KeyError), layerzoo.compat():
            from causal_conv1d import causal_conv1d_fn

            raise KeyError
        assert not set(MODULES) & set(sys.modules)
        x, weight = torch.randn(1, 3, 5), torch.randn(3, 4)
        close(causal_conv1d_fn(x, weight), F.conv1d(x, weight.unsqueeze(1), padding=3, groups=3)[..., :5])

    def test_one_package(self):
        with layerzoo.compat("causal_conv1d"):
            assert set(MODULES) & set(sys.modules) == {"causal_conv1d", "causal_conv1d.causal_conv1d_interface"}
            with layerzoo.compat("mamba_ssm"):
                assert set(MODULES) <= set(sys.modules)
            assert "mamba_ssm" not in sys.modules

    def test_what_somebody_else_put_there_since_is_left(self):
        theirs = ModuleType("causal_conv1d")
        with layerzoo.compat("causal_conv1d"):
            sys.modules["causal_conv1d"] = theirs
        assert sys.modules.pop("causal_conv1d") is theirs
        assert "causal_conv1d.causal_conv1d_interface" not in sys.modules

    def test_another_package_is_refused(self):
        with pytest.raises(ValueError, match="package must be one of mamba_ssm, causal_conv1d, got 'flash_attn'"):
            layerzoo.compat("mamba_ssm", "flash_attn")
        assert not set(MODULES) & set(sys.modules)

    @pytest.mark.usefixtures("on")
    def test_twice_is_refused(self):
        with pytest.raises(RuntimeError, match="mamba_ssm has been imported already: layerzoo's stand-in, undo that"):
            layerzoo.compat()

    @pytest.mark.parametrize("there", [ModuleType("causal_conv1d"), None])
    def test_an_imported_package_is_refused(self, monkeypatch, there):
        monkeypatch.setitem(sys.modules, "causal_conv1d", there)
        with pytest.raises(RuntimeError, match="causal_conv1d has been imported already: another one"):
            layerzoo.compat()
        assert "mamba_ssm" not in sys.modules

    def test_an_installed_package_is_refused(self, monkeypatch, tmp_path):
        (tmp_path / "causal_conv1d").mkdir()
        (tmp_path / "causal_conv1d" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(RuntimeError, match=rf"causal_conv1d is installed, at {tmp_path}.*does not take its place"):
            layerzoo.compat()
        assert not set(MODULES) & set(sys.modules)


@pytest.mark.usefixtures("on")
class TestModules:
    @pytest.mark.parametrize("name", MODULES)
    def test_they_can_be_found_and_imported(self, name):
        module = importlib.import_module(name)
        spec = importlib.util.find_spec(name)
        assert spec is module.__spec__
        assert spec.name == module.__name__ == name
        assert Path(module.__file__).name == "compat.py"
        parent, _, leaf = name.rpartition(".")
        assert not parent or getattr(sys.modules[parent], leaf) is module

    def test_versions_say_whose_they_are(self):
        from packaging.version import Version

        for name in PACKAGES:
            version = Version(importlib.import_module(name).__version__)
            assert version.local == "layerzoo"
            with pytest.raises(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(name)

    @pytest.mark.parametrize("path", SIGNATURES)
    def test_arguments_are_those_of_the_original_in_their_order(self, path):
        arguments = inspect.signature(imported(path)).parameters.values()
        positional = [argument.name for argument in arguments if argument.kind is argument.POSITIONAL_OR_KEYWORD]
        assert positional == SIGNATURES[path].split()

    def test_what_is_missing_is_named(self):
        import mamba_ssm

        message = (
            "layerzoo's stand-in for mamba_ssm has no 'Mamba3'; it has Mamba, Mamba2, mamba_inner_fn, modules, ops, "
            "selective_scan_fn"
        )
        with pytest.raises(AttributeError, match=f"^{message}$"):
            _ = mamba_ssm.Mamba3
        assert getattr(mamba_ssm, "Mamba3", None) is None
        with pytest.raises(
            ImportError, match=r"cannot import name 'Mamba3' from 'mamba_ssm' .*layerzoo.hosts.compat\.py"
        ):
            from mamba_ssm import Mamba3  # noqa: F401
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'mamba_ssm\.models'"):
            importlib.import_module("mamba_ssm.models.mixer_seq_simple")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.modules.mamba2.more")

    @pytest.mark.parametrize(
        ("path", "arguments", "words"),
        [
            ("causal_conv1d:causal_conv1d_fn", {"final_states_out": torch.ones(1)}, "final_states_out must be None"),
            (
                "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined",
                {"cu_seqlens": torch.ones(1)},
                "cu_seqlens must be None with layerzoo, got a tensor: packed sequences are told apart by seq_idx",
            ),
            (
                "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined",
                {"return_varlen_states": True},
                "return_varlen_states must be None with layerzoo, got True",
            ),
            (
                "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined",
                {"state_dtype": torch.bfloat16},
                "state_dtype must be None with layerzoo, got torch.bfloat16: states are float32",
            ),
            ("mamba_ssm:mamba_inner_fn", {"b_rms_weight": torch.ones(1)}, "b_rms_weight must be None"),
            ("mamba_ssm:mamba_inner_fn", {"c_rms_weight": torch.ones(1)}, "c_rms_weight must be None"),
            ("mamba_ssm:mamba_inner_fn", {"dt_rms_weight": torch.ones(1)}, "dt_rms_weight must be None"),
        ],
    )
    def test_arguments_that_we_do_not_have_are_refused(self, path, arguments, words):
        function = imported(path)
        required = [arg for arg in inspect.signature(function).parameters.values() if arg.default is arg.empty]
        with pytest.raises(ValueError, match=f"^{function.__name__}: {words}"):
            function(*[torch.ones(1)] * len(required), **arguments)


# ---- the functions, against the reference in float64 ----


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.fixture
def arguments() -> dict[str, Any]:
    """Of a scan: b 2, d 6, l 11, n 4."""
    torch.manual_seed(0)
    return {
        "u": draw(2, 6, 11),
        "delta": draw(2, 6, 11),
        "A": -torch.rand(6, 4),
        "B": draw(2, 4, 11),
        "C": draw(2, 4, 11),
        "D": draw(6),
        "z": draw(2, 6, 11),
        "delta_bias": draw(6),
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.usefixtures("on")
class TestFunctions:
    @pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_ref"])
    def test_selective_scan(self, arguments, name):
        from mamba_ssm.ops import selective_scan_interface

        got = getattr(selective_scan_interface, name)(*arguments.values(), True, True)
        want = reference.ssm.selective_scan(**wide(arguments), delta_softplus=True)
        close(got[0], want[0])
        close(got[1], want[1])

    @pytest.mark.parametrize("constant", [(), ("B",), ("C",), ("B", "C")], ids="+".join)
    def test_mamba_inner(self, constant):
        from mamba_ssm import mamba_inner_fn

        torch.manual_seed(0)
        columns = 2 + 4 * (2 - len(constant))
        xz, A, D, bias = draw(2, 12, 11), -torch.rand(6, 4), draw(6), draw(6)
        conv, conv_bias, x_proj, delta_proj = draw(6, 1, 4), draw(6), draw(columns, 6), draw(6, 2)
        out_proj, out_bias, B_bias, C_bias = draw(5, 6), draw(5), draw(4), draw(4)
        B, C = (draw(6, 4) if name in constant else None for name in ("B", "C"))
        leaves = [t.requires_grad_() for t in (xz, conv, conv_bias, x_proj, delta_proj, out_proj, out_bias, A, D, bias)]
        xz, conv, conv_bias, x_proj, delta_proj, out_proj, out_bias, A, D, bias = leaves
        got = mamba_inner_fn(
            *(xz, conv, conv_bias, x_proj, delta_proj, out_proj, out_bias, A, B, C, D, bias, B_bias, C_bias, True)
        )

        x, z = xz.double().chunk(2, dim=1)
        x = F.silu(F.conv1d(x, conv.double(), conv_bias.double(), padding=3, groups=6)[..., :11])
        parts = list((x_proj.double() @ x).split([2, *[4] * (2 - len(constant))], dim=1))
        low = parts.pop(0)
        varying = [
            given.double() if given is not None else parts.pop(0) + more.double().unsqueeze(1)
            for given, more in ((B, B_bias), (C, C_bias))
        ]
        dt, h, ys = F.softplus(delta_proj.double() @ low + bias.double().unsqueeze(1)), torch.zeros(2, 6, 4), []
        for t in range(11):
            at = [v if v.dim() == 2 else v[:, None, :, t] for v in varying]
            h = (dt[..., t, None] * A.double()).exp() * h + (dt * x)[..., t, None] * at[0]
            ys.append((h * at[1]).sum(-1))
        y = (torch.stack(ys, -1) + D.double().unsqueeze(1) * x) * F.silu(z)
        want = (out_proj.double() @ y).mT + out_bias.double()
        close(got, want)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (got, want)]
        for mine, theirs in zip(*grads, strict=True):
            close(mine, theirs, 1e-4)

    @pytest.mark.parametrize("heads", [False, True])
    def test_selective_state_update_needs_no_no_grad(self, heads):
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        torch.manual_seed(0)
        front = (3, 2) if heads else (6,)
        coefficients = (2, 1, 4) if heads else (2, 4)
        state, x, dt, z = draw(5, *front, 4), *(draw(2, *front) for _ in range(3))
        A, D, bias = -torch.rand(*front, 4), draw(*front).requires_grad_(), draw(*front)
        rest = (A, draw(*coefficients), draw(*coefficients), D, z, bias)
        twin = state.double()
        got = selective_state_update(state, x, dt, *rest, True, torch.tensor([3, 0], dtype=torch.int32))
        rows = torch.tensor([3, 0])
        want = reference.ssm.selective_state_update(
            twin, x.double(), dt.double(), *(t.detach().double() for t in rest), True, rows
        )
        close(got, want)
        close(state, twin)
        assert not got.requires_grad

    def test_mamba_chunk_scan(self):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        torch.manual_seed(0)
        x, dt, A, B, C = draw(2, 11, 4, 3), draw(2, 11, 4), -torch.rand(4), draw(2, 11, 2, 5), draw(2, 11, 2, 5)
        D, z, bias, initial = draw(4), draw(2, 11, 4, 3), draw(4), draw(2, 4, 3, 5)
        seq_idx = torch.tensor([[0] * 11, [0] * 4 + [1] * 7], dtype=torch.int32)
        options = {"D": D, "z": z, "dt_bias": bias, "initial_states": initial, "dt_limit": (0.1, 2.0)}
        got = mamba_chunk_scan_combined(
            x, dt, A, B, C, 4, **options, seq_idx=seq_idx, dt_softplus=True, return_final_states=True
        )
        step = F.softplus(dt.double() + bias.double()).clamp(0.1, 2.0)
        h, outs = initial.double(), []
        for t in range(11):
            begins = (seq_idx[:, t] != seq_idx[:, max(t - 1, 0)]).view(2, 1, 1, 1)
            b, c = (v[:, t].double().repeat_interleave(2, 1).unsqueeze(2) for v in (B, C))
            h = (step[:, t] * A.double()).exp()[..., None, None] * h.masked_fill(begins, 0)
            h = h + (step[:, t, :, None] * x[:, t].double()).unsqueeze(3) * b
            outs.append(((h * c).sum(3) + D.double().unsqueeze(1) * x[:, t]) * F.silu(z[:, t].double()))
        close(got[0], torch.stack(outs, 1))
        close(got[1], h)
        alone = mamba_chunk_scan_combined(x, dt.abs(), A, B, C, chunk_size=4, state_dtype=torch.float32)
        want = reference.ssm.ssd_chunk_scan(x.double(), dt.abs().double(), A.double(), B.double(), C.double())
        close(alone, want[0])

    def test_causal_conv1d(self):
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

        torch.manual_seed(0)
        x, weight, bias = draw(2, 6, 11), draw(6, 4).requires_grad_(), draw(6)
        want = F.silu(F.conv1d(x.double(), weight.double().unsqueeze(1), bias.double(), padding=3, groups=6)[..., :11])
        out, final = causal_conv1d_fn(x, weight, bias, return_final_states=True, activation="silu")
        close(out, want)
        assert torch.equal(final, x[..., -3:])
        state = torch.zeros(3, 6, 3)
        for part in x.split([4, 1, 6], dim=2):
            at = causal_conv1d_update(part, state, weight, bias, "silu", None, torch.tensor([2, 0]))
            assert not at.requires_grad
        close(at, want[..., -6:])
        assert torch.equal(state[[2, 0]], x[..., -3:])
        ring, had = torch.zeros(2, 6, 5), torch.zeros(2, dtype=torch.int32)
        for part in x.split([4, 1, 6], dim=2):
            at = causal_conv1d_update(part, ring, weight, bias, "silu", had)
            had += part.shape[2]
        close(at, want[..., -6:])

    def test_the_layers_are_ours(self):
        from mamba_ssm import Mamba, Mamba2
        from mamba_ssm.modules import mamba2, mamba_simple

        assert Mamba is mamba_simple.Mamba is layerzoo.nn.Mamba
        assert Mamba2 is mamba2.Mamba2 is layerzoo.nn.Mamba2
        assert Mamba(d_model=16, d_state=4)(draw(1, 7, 16)).shape == (1, 7, 16)


# ---- transformers ----

FAMILIES = ["mamba", "falcon_mamba", "jamba", "zamba", "mamba2", "bamba", "granitemoehybrid", "nemotron_h", "zamba2"]


def again(family: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of a modelling file, imported now."""
    path = importlib.import_module(f"transformers.models.{family}.modeling_{family}").__file__
    name = f"transformers.models.{family}.modeling_{family}_again"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


class TestTransformers:
    """Models whose modelling file is imported while it is on take our functions, and compute what they did without."""

    @pytest.fixture(params=[*FAMILIES, "falcon_h1"])
    def pair(self, request, monkeypatch) -> tuple[str, Any, Any]:
        pytest.importorskip(
            "transformers.models.nemotron_h.modeling_nemotron_h", reason="an older transformers is there"
        )
        import test_transformers
        import test_transformers_mixers as mixers

        host = test_transformers.tiny() if request.param == "mamba" else mixers.tiny(request.param)
        with layerzoo.compat():
            module = again(request.param, monkeypatch)
        ours = getattr(module, type(host).__name__)(host.config).eval()
        ours.load_state_dict(host.state_dict())
        return request.param, host, ours

    @torch.no_grad()
    def test_prefill_and_decode(self, pair):
        from test_transformers_mixers import assert_same_cache, cached, tokens

        _, host, ours = pair
        before = _native.calls("causal_conv1d") if _native.status().loaded else 0
        expected, actual = host(tokens(), use_cache=True), ours(tokens(), use_cache=True)
        close(actual.logits, expected.logits)
        if _native.status().loaded:
            assert _native.calls("causal_conv1d") > before
        for step in range(3):
            token = tokens(length=1, seed=step)
            expected, actual = host(token, **cached(expected)), ours(token, **cached(actual))
            close(actual.logits, expected.logits)
        assert_same_cache(actual, expected)

    def test_decode_under_gradients(self, pair):
        from test_transformers_mixers import cached, tokens

        _, host, ours = pair
        logits = []
        for model in (host, ours):
            output = model(tokens(), use_cache=True)
            logits.append(model(tokens(length=1), **cached(output)).logits)
        close(logits[1], logits[0])

    def test_training(self, pair):
        from test_transformers_mixers import tokens

        family, host, ours = pair
        ids = tokens()
        if family == "falcon_mamba":  # hands its norms to mamba_inner_fn, which would place them elsewhere
            with pytest.raises(ValueError, match="mamba_inner_fn: b_rms_weight must be None"):
                ours.train()(ids, use_cache=False)
            return
        for model in (host, ours):
            model.train()(ids, labels=ids, use_cache=False).loss.backward()
        for (name, mine), theirs in zip(ours.named_parameters(), host.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            if mine.grad is not None:
                close(mine.grad, theirs.grad, 5e-5)

    def test_a_file_imported_before_is_as_it_was(self):
        modeling = pytest.importorskip(
            "transformers.models.mamba.modeling_mamba", reason="transformers is not installed"
        )
        import test_transformers

        model, functions = test_transformers.tiny(), dict(vars(modeling))
        ids = test_transformers.tokens()
        expected = model(ids).logits
        before = _native.calls("selective_scan") if _native.status().loaded else 0
        with layerzoo.compat():
            assert torch.equal(model(ids).logits, expected)
            assert dict(vars(modeling)) == functions
        if _native.status().loaded:
            assert _native.calls("selective_scan") == before

    def test_what_transformers_says_is_available(self, python):
        """It asks for a GPU first, and keeps its answer."""
        pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
        code = """
import torch, layerzoo
from transformers.utils import import_utils
gpu = import_utils.is_torch_cuda_available()
handle = layerzoo.compat()
questions = [import_utils.is_mamba_ssm_available, import_utils.is_mamba_2_ssm_available,
             import_utils.is_causal_conv1d_available]
assert [ask() for ask in questions] == [gpu] * 3
from transformers import MambaConfig, MambaForCausalLM
torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2)).eval()
ids = torch.arange(11).unsqueeze(0)
with torch.no_grad():
    inside = model(ids).logits
    handle.undo()
    torch.testing.assert_close(model(ids).logits, inside, rtol=0, atol=0)
    assert layerzoo.accelerate(model, strict=True, verify=True)
    torch.testing.assert_close(model(ids).logits, inside, rtol=1e-4, atol=1e-5)
print('fine')
"""
        done = python("-c", code)
        assert done.stdout.endswith("fine\n"), done.stderr

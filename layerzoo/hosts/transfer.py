"""From the old module to the one that takes its place: weights, device, dtype, training mode, hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerzoo.hosts.places import Place
from layerzoo.hosts.recipe import qualified
from layerzoo.hosts.report import Entry

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def reference_tensor(module: nn.Module) -> Tensor | None:
    """The tensor that stands for a module's device and dtype: its first floating parameter, else buffer."""
    return next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)


def transfer(model: nn.Module, place: Place, new: nn.Module) -> Entry:
    """Makes `new` ready to stand in for the module of `place`, and says what moved. The old module is left as it is.

    `new` may contain the old module (an adapter around it): that part is not touched, its hooks stay where they are.
    """
    old = place.module
    wraps = old in new.modules()
    _follow(model, old, new)
    copied, fresh, dropped = _move_weights(old, new, move=not wraps)
    notes = [place.shared]
    parameters = dict(new.named_parameters())
    if any(True for _ in old.parameters()) and not any(p.requires_grad for p in old.parameters()):
        notes.append("frozen like the old one")
        for name in set(fresh) & set(parameters):
            parameters[name].requires_grad_(False)
    if not wraps:
        _share_hooks(old, new)
        hooked = {module for module in old.modules() if any(vars(module)[kind] for kind in HOOKS)} - {old}
        lost = [name for name, module in old.named_modules() if module in hooked.difference(new.modules())]
        notes += [f"hooks on {', '.join(lost)} are not carried over"] if lost else []
        notes += ["its forward, patched on the instance, is not carried over"] if "forward" in vars(old) else []
    ties = _ties(model, place)
    theirs = _state(old)
    dropped = [f"{name} (tied to {ties[id(theirs[name])]})" if id(theirs[name]) in ties else name for name in dropped]
    reason = "; ".join(filter(None, notes))
    return Entry(
        place.name, qualified(type(old)), qualified(type(new)), "swapped", reason, *map(tuple, (copied, fresh, dropped))
    )


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, the objects themselves."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _follow(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Device, dtype and training mode of the old module (of the model, where the old one holds no number)."""
    inside = set(old.modules())
    theirs = {id(t) for t in (*old.parameters(), *(p.grad for p in old.parameters()), *old.buffers())}
    like = reference_tensor(old)
    like = reference_tensor(model) if like is None else like

    def moved(tensor: Tensor) -> Tensor:
        if like is None or id(tensor) in theirs:
            return tensor
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

    for module in set(new.modules()) - inside:
        module.training = old.training
        module._apply(moved, recurse=False)


def _move_weights(old: nn.Module, new: nn.Module, *, move: bool) -> tuple[list[str], list[str], list[str]]:
    """Gives `new` the old parameters (the same objects) and copies of the old buffers where name and shape agree.

    Buffers are copied, since a forward in training mode writes them, which `restore` could not undo.
    """
    theirs = _state(old)
    held = {id(tensor) for tensor in theirs.values()}
    copied, fresh = [], []
    for name, tensor in _state(new).items():
        source, (path, _, leaf) = theirs.get(name), name.rpartition(".")
        owner = new.get_submodule(path)
        slot: dict[str, Any] = owner._parameters if isinstance(source, nn.Parameter) else owner._buffers
        if id(tensor) in held:
            copied.append(name)
        elif move and source is not None and leaf in slot and _same_shape(source, tensor):
            slot[leaf] = source if isinstance(source, nn.Parameter) else source.clone()
            copied.append(name)
        else:
            fresh.append(name)
    kept = {id(tensor) for tensor in _state(new).values()}
    dropped = [name for name, tensor in theirs.items() if name not in copied and id(tensor) not in kept]
    return copied, fresh, dropped


def _same_shape(one: Tensor, other: Tensor) -> bool:
    return not is_lazy(one) and not is_lazy(other) and one.shape == other.shape


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    """The same dictionary where `new` has no hooks of its own, so that the handles that users hold still work."""
    for kind in HOOKS:
        hooks, own = vars(old)[kind], vars(new)[kind]
        if hooks and own:
            own.update(hooks)
        elif hooks:
            vars(new)[kind] = hooks
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook


def _ties(model: nn.Module, place: Place) -> dict[int, str]:
    """Names of the parameters that stand outside the place, by identity."""
    own = tuple(f"{name}." for name in place.names)
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter): name for name, parameter in named if not name.startswith(own)}

"""Experts on several processes (gloo) give what one process gives, forward and backward."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from layerzoo.nn import SparseMoE

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def build(options: dict[str, Any]) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(6, 10, 8, **options).double()


def batch(rank: int) -> torch.Tensor:
    """Another number of tokens on each process, none on the second."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(0 if rank == 1 else 5 + 3 * rank, 6, dtype=torch.float64, generator=generator)


def process(rank: int, size: int, rendezvous: str, out: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    whole = build(options)
    moe = whole.shard(dist.group.WORLD)
    x = batch(rank).requires_grad_()
    y = moe(x)
    (y * torch.arange(6)).sum().backward()
    results = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in moe.named_parameters()}}
    untouched = all(torch.equal(a, b) for a, b in zip(whole.parameters(), build(options).parameters(), strict=True))
    torch.save({**results, "untouched": untouched}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param(2, {"bias": True, "shared_size": 4}, id="2-softmax"),
        pytest.param(2, {"router": "expert_choice"}, id="2-expert_choice"),
        pytest.param(4, {"router": "sigmoid", "top_k": 3, "capacity_factor": 1.0}, id="4-sigmoid"),
    ],
)
def test_equal_to_one_process(size: int, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder, "rendezvous"))
        mp.spawn(process, (size, rendezvous, folder, options), nprocs=size)
        parts = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(size)]
    moe = build(options)
    # each process routes its own tokens: where limits hold within a call, one call for each
    for rank, part in enumerate(parts):
        x = batch(rank).requires_grad_()
        y = moe(x)
        (y * torch.arange(6)).sum().backward()
        torch.testing.assert_close(part["y"], y.detach())
        torch.testing.assert_close(part["x"], x.grad)
        assert part["untouched"]
    count = 8 // size
    for name, p in moe.named_parameters():
        grads = [part[name] for part in parts]
        if name.startswith("experts."):
            got = torch.cat(grads)
            assert all(grad.shape[0] == count for grad in grads)
        else:
            got = torch.stack(grads).sum(0)
        torch.testing.assert_close(got, p.grad, msg=name)


def test_bad_input() -> None:
    class Three:
        def size(self) -> int:
            return 3

        def rank(self) -> int:
            return 0

    moe = build({})
    with pytest.raises(ValueError, match="num_experts must divide among the 3 processes of process_group, got 8"):
        moe.shard(Three())  # type: ignore[arg-type]
    moe.process_group = Three()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="this one is sharded already"):
        moe.shard(Three())  # type: ignore[arg-type]

"""One run on several processes, as `torchrun` starts them: who am I, and what must all agree on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fpgm.errors import Error
from fpgm.machine import processes
from fpgm.machine.device import choose_device

# One that has died is noticed at once, by its connection or torchrun; this is how long the others
# wait for the first to read data, compact and tune.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run. local: its number on this machine, that of its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of `count` things in a row; the parts differ by one at most."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)


ALONE = Ranks()


def join(device: str) -> Ranks:
    """Meet the other processes that torchrun has started; ALONE where it has started none.

    device: auto, cpu or cuda, as configured.
    """
    world = processes.count()
    if world == 1:
        return ALONE
    cuda = choose_device(device).type == "cuda"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        if local >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise Error(
                f"torchrun: process {local + 1} of this machine has no GPU of its own, there are "
                f"{count}; --nproc-per-node={count}, or device=cpu"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        # What is no tensor goes through gloo: nccl has the GPU spin while it waits.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), world, local)


def together(device: str, work: Callable[[Ranks], None], wanted: bool) -> None:
    """Call `work` in every process of this run, where the first one wants it done.

    device: see join. None leaves before the first is through: what it writes is there for all.
    """
    ranks = join(device)
    if from_first(wanted, ranks):
        work(ranks)
    from_first(None, ranks)


def check_batch(batch_size: int, ranks: Ranks) -> None:
    """Raise Error where a batch cannot be dealt out evenly."""
    if batch_size % ranks.world:
        fits = max(batch_size // ranks.world, 1) * ranks.world
        raise Error(
            f"batch_size={batch_size}: is the batch of all {ranks.world} processes together and "
            f"must be a multiple of their number, for example batch_size={fits}"
        )


def from_first(value: Any, ranks: Ranks) -> Any:
    """What rank 0 has, for all."""
    if ranks.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean(value: Tensor, ranks: Ranks) -> Tensor:
    """The mean over all ranks of a tensor that each has."""
    if ranks.world > 1:
        dist.all_reduce(value)
        value /= ranks.world
    return value


def all_say(yes: bool, ranks: Ranks) -> bool:
    """Whether every rank says yes."""
    if ranks.world == 1:
        return yes
    votes = torch.tensor(int(yes))
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def joined(part: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks, one after the other."""
    if ranks.world == 1:
        return part
    counts: list[Any] = [None] * ranks.world
    dist.all_gather_object(counts, len(part))
    padded = part.new_zeros(max(counts), *part.shape[1:])  # all must send the same size
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(ranks.world)]
    dist.all_gather(parts, padded)
    return torch.cat([rows[:count] for rows, count in zip(parts, counts, strict=True)])


def spread(module: nn.Module, ranks: Ranks) -> nn.Module:
    """A module whose backward pass leaves the gradients' mean over all ranks."""
    if ranks.world == 1:
        return module
    gpu = [ranks.local] if next(module.parameters()).is_cuda else None
    net = nn.parallel.DistributedDataParallel(module, device_ids=gpu)
    net.broadcast_buffers = False  # once an epoch is enough, see share_buffers
    return net


def share_buffers(module: nn.Module, ranks: Ranks) -> None:
    """Give all ranks rank 0's BatchNorm statistics, which are those of its part of each batch."""
    for buffer in module.buffers() if ranks.world > 1 else ():
        dist.broadcast(buffer, src=0)


def check_agreement(keep: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Raise Error unless all ranks have selected the same filters."""
    if ranks.world == 1:
        return
    digest = hashlib.sha256()
    for name in sorted(keep):
        digest.update(name.encode() + keep[name].cpu().numpy().tobytes())
    digests: list[Any] = [None] * ranks.world
    dist.all_gather_object(digests, digest.hexdigest())
    other = next((rank for rank, one in enumerate(digests) if one != digests[0]), None)
    if other is not None:
        raise Error(f"rank {other} has selected other filters than rank 0")


def leave() -> None:
    """After the last word: let go of the others."""
    if dist.is_initialized():
        dist.destroy_process_group()

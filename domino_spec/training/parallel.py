"""Several processes train one draft: how they share the work, and what they exchange (docs/design.md, section 6).

Started by `torchrun`, every process takes its share of a step's micro-batches. Gradients are *summed* over processes
and divided by the sum of weights of the whole step, so the number of processes changes rounding and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from domino_spec.devices import choose_device
from domino_spec.draft.load import AnyDraft
from domino_spec.settings import UserError

PATIENCE = datetime.timedelta(days=1)
"""How long a process waits for another: the first one may capture features for hours."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; by default the only one."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """The first process writes the files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()


def is_first_process() -> bool:
    """Whether this process prints and writes; known before any group is joined."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined_processes(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes that `torchrun` started, and this one's device; a single process without `torchrun`.

    Args:
        device: "auto", "cpu" or "cuda"; each process takes its own GPU.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE, device
        return
    backend = "gloo"
    if choose_device(device).type == "cuda":
        backend, device = "nccl", f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), count), device
    finally:
        dist.destroy_process_group()


class Shared:
    """The module whose gradients several processes add up.

    Args:
        module: computes a scalar loss that is a sum over its inputs.
        processes: of the run.
        kind: ddp (a whole copy each) or fsdp (weights, gradients and optimizer state sharded; gathered for a step).
        low_precision: compute in bfloat16 under fsdp, which keeps float32 shards; ddp leaves it to autocast.
    """

    def __init__(self, module: nn.Module, processes: Processes, kind: str, low_precision: bool) -> None:
        self._processes, self._kind = processes, kind
        self._module = module
        if kind == "ddp":
            self._module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            device = next(module.parameters()).device
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if low_precision else None, reduce_dtype=torch.float32
            )
            # One unit: a draft is small beside its target, and its context projection reads all layers at once.
            mesh = init_device_mesh(device.type, (processes.count,))
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    def backward(self, *arguments: object, last: bool) -> tuple[Tensor, ...]:
        """Forward and backward of one micro-batch; gradients are exchanged with the `last` of the step.

        Returns:
            What the module returned, the loss first.
        """
        exchange: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._kind == "ddp" and not last:
            exchange = self._module.no_sync()  # type: ignore[operator]
        elif self._kind == "fsdp":
            self._module.set_requires_gradient_sync(last)  # type: ignore[operator]
        with exchange:
            losses = self._module(*arguments)
            # Both kinds average over processes.
            (losses[0] * self._processes.count).backward()
        return losses

    @contextlib.contextmanager
    def gathered(self) -> Iterator[bool]:
        """Whole parameters for a forward pass outside of `backward`; True in the process that should do it."""
        if self._kind == "fsdp":
            self._module.unshard()  # type: ignore[operator]
        try:
            yield self._processes.is_first
        finally:
            self._processes.wait()
            if self._kind == "fsdp":
                self._module.reshard()  # type: ignore[operator]


def micro_batches(batch_size: int, micro_batch_size: int, processes: Processes) -> list[slice]:
    """This process's share of a step's sequences.

    Raises:
        UserError: the micro-batches cannot be shared evenly.
    """
    count = batch_size // micro_batch_size
    if count % processes.count:
        raise UserError(
            f"a step of {batch_size} sequences in micro-batches of {micro_batch_size} has {count} of them, which "
            f"{processes.count} processes cannot share evenly; change batch_size or micro_batch_size"
        )
    starts = range(0, batch_size, micro_batch_size)
    return [slice(start, start + micro_batch_size) for start in starts[processes.rank :: processes.count]]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(values: Tensor, tensor: Tensor) -> Tensor:
    """`values` on the device of `tensor`, sharded in the same way."""
    values = values.to(tensor.device)
    if isinstance(tensor, DTensor):
        return distribute_tensor(values, tensor.device_mesh, tensor.placements)
    return values


def whole_draft(draft: AnyDraft) -> AnyDraft:
    """The draft with whole weights, for saving; the same draft if nothing is sharded. Every process must call this."""
    if not any(isinstance(p, DTensor) for p in draft.parameters()):
        return draft
    copy = draft.empty_copy()
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(whole(draft.get_parameter(name)))
    return copy.to(draft.device)

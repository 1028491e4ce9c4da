"""What makes Ray Train's workers a group that trains one network: addresses exchanged, the process group joined.

``TorchTrainer`` would do it for every group, of one worker too, and import torch where nothing computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.train.backend import Backend, BackendConfig

from ssn.distributed import ALONE, TIMEOUT, ProcessGroup, Workers


class GroupBackend(Backend):
    """Nothing but that workers of a node see each other's GPUs, for nccl to copy between them."""

    share_cuda_visible_devices = True


class GroupConfig(BackendConfig):
    """Configures :class:`GroupBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return GroupBackend


def group_device(*, use_gpu: bool) -> str:
    """Where this Train worker computes."""
    if not use_gpu:
        return "cpu"
    import torch
    from ray.train.torch import get_device

    device = get_device()
    torch.cuda.set_device(device)
    return str(device)


@contextmanager
def joined_workers(device: str) -> Iterator[Workers]:
    """This Train worker among the others, as :class:`ssn.engine.Trainer` takes it; all of them must enter.

    Args:
        device: Where this worker computes; nccl joins GPUs, gloo CPUs.
    """
    from ray import train

    context = train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    if size == 1:
        yield ALONE
        return
    import ray
    import torch.distributed as dist
    from ray.train.collective import broadcast_from_rank_zero

    store = None
    address = None
    if rank == 0:
        host = ray.util.get_node_ip_address()
        # the store finds a free port itself, so that no other process can take it in between
        store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        address = (host, store.port)
    host, port = broadcast_from_rank_zero(address)
    if store is None:
        store = dist.TCPStore(host, port, size, is_master=False, timeout=TIMEOUT)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield ProcessGroup(device)
    # not after an error: the others may be waiting in the middle of something, and Train ends this process anyway
    dist.destroy_process_group()

"""How much memory a CNN takes: what it keeps for its gradient is counted while it answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BYTES_AT_ONCE = 2**30  # kept by the CNN, for all images of a chunk together


@contextmanager
def counted(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Within it, counts the bytes that are kept for gradients, the network's weights left out;
    yields a function that tells them."""
    weights = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    kept = {}  # storages by their place; held, so that no place is freed and taken twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())


def at_once(network: nn.Module, x: Tensor, budget: int = BYTES_AT_ONCE) -> int:
    """How many images such as `x` [1, C, H, W] fit into a budget of bytes with all that the network
    keeps for their gradient, at least 1."""
    with torch.enable_grad(), counted(network) as kept:
        network(x.detach().requires_grad_())
    return max(1, budget // max(1, kept()))

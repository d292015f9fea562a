"""What a CNN costs: the memory that it keeps for its gradient, counted while it answers, and the time
of its answers and their gradients."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BYTES_AT_ONCE = 2**30  # kept by the CNN, for all images of a chunk together, on a CPU


def budget(device: torch.device) -> int:
    """Bytes to keep for all images of a chunk together: 1 GiB, on a GPU a sixteenth of its memory if
    that is more."""
    return max(BYTES_AT_ONCE, memory(device) // 16)


def memory(device: torch.device) -> int:
    """Bytes of a GPU; 0 for a CPU."""
    gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if gpu else 0


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


def at_once(network: nn.Module, x: Tensor, most: int) -> int:
    """How many images such as `x` [1, C, H, W] fit into `most` bytes with all that the network keeps
    for their gradient, at least 1."""
    with torch.enable_grad(), counted(network) as kept:
        network(x.detach().requires_grad_())
    return max(1, most // max(1, kept()))


@contextmanager
def timed(network: nn.Module) -> Iterator[Callable[[], float]]:
    """Within it, times the network's answers and their gradients with respect to its input; yields a
    function that tells the seconds. A GPU is waited for at each end of them."""
    spent, began = [0.0], [0.0]

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(*_) -> None:
        began[0] = now()

    def stop(*_) -> None:
        spent[0] += now() - began[0]

    def before(module: nn.Module, inputs: tuple) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(stop)  # the gradient's way ends here
        start()

    def after(module: nn.Module, inputs: tuple, logits: Tensor) -> None:
        stop()
        if logits.requires_grad:
            logits.register_hook(start)

    with network.register_forward_pre_hook(before), network.register_forward_hook(after):
        yield lambda: spent[0]

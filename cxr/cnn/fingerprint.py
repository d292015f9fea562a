"""Which CNN a GAN was trained for: a digest of its weights, and its answers to pictures that are
always the same."""

import hashlib

import torch
from torch import nn

from cxr.cnn.contract import pictures

SAME = 1e-2  # of 1 + |logit|: what another machine, library or half precision may change


@torch.no_grad()
def fingerprint(network: nn.Module, size: int, device: str | torch.device = "cpu") -> dict:
    """{"weights": hex digest, "answers": logits to four pictures of `size` pixels}, fit for JSON.

    The weights are digested in half precision, in which model files keep them.
    """
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        kept = value.detach().cpu().half() if value.is_floating_point() else value.detach().cpu()
        digest.update(f"{list(kept.shape)}".encode())
        digest.update(kept.contiguous().reshape(-1).view(torch.uint8).numpy())
    answers = network(pictures(size).to(device)).float().tolist()
    return {"weights": digest.hexdigest(), "answers": answers}


def same(a: dict, b: dict) -> bool:
    """Whether two fingerprints are of one CNN, asked in one way: the answers are alike and, if a
    CNN answers all pictures alike, the weights are equal."""
    x, y = torch.tensor(a["answers"]), torch.tensor(b["answers"])
    alike = x.shape == y.shape and bool(((x - y).abs() <= SAME * (1 + x.abs())).all())
    return alike and (a["weights"] == b["weights"] or bool(x.std() > SAME))

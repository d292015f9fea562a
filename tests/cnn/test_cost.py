import time

import pytest
import torch
from torch import nn

from cxr.cnn import cost


class Slow(nn.Module):
    """Its answer and its gradient take 0.05 s each."""

    def forward(self, x):
        time.sleep(0.05)
        inner = x + 1
        if inner.requires_grad:
            inner.register_hook(lambda grad: time.sleep(0.05))
        return inner.mean((1, 2, 3))


def test_the_time_of_answers_and_gradients_is_counted_and_no_other():
    x, slow = torch.zeros(2, 1, 4, 4), Slow()
    with cost.timed(slow) as seconds:
        slow(x)
        time.sleep(0.2)
        z = x.clone().requires_grad_()
        drawn = z * 2
        drawn.register_hook(lambda grad: time.sleep(0.2))  # of what drew the images
        logits = slow(drawn + 1)
        time.sleep(0.2)
        logits.sum().backward()
    assert seconds() == pytest.approx(0.15, abs=0.04)
    slow(x)
    assert seconds() == pytest.approx(0.15, abs=0.04)  # no hook stays
    assert z.grad is not None


def test_what_is_kept_for_a_gradient_is_counted_without_the_weights():
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with cost.counted(network) as kept:
        network(x)
    assert kept() == 16 * 16 * 4 * (1 + 8)
    assert cost.at_once(network, x, 10 * kept()) == 10

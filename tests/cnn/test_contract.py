"""Fifteen and more ways to break the contract, and what each is told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cxr import CxrError
from cxr.cnn import contract
from cxr.cnn.adapter import adapt


class CNN(nn.Module):
    """A small CNN whose forward ends as `end` says: from features [N, 8] and logit [N]."""

    def __init__(self, end=lambda h, z: z, start=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 1)
        self.start, self.end = start, end
        self.eval()

    def forward(self, x):
        h = F.relu(self.conv(self.start(x))).mean((2, 3))
        return self.end(h, self.fc(h)[:, 0])


class Training(CNN):
    def forward(self, x):
        self.train()
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))[:, 0]


class NoGradient(CNN):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def ranked(x):
    return x - x.mean(0)  # over the batch


BREACHES = {
    "a sigmoid": (CNN(lambda h, z: z.sigmoid()), "looks like probabilities"),
    "a sigmoid by hand": (CNN(lambda h, z: 1 / (1 + (-z).exp())), "looks like probabilities"),
    "a softmax's class": (CNN(lambda h, z: h.softmax(1)[:, 1]), "looks like probabilities"),
    "dropout": (CNN(lambda h, z: F.dropout(z)), "dropout or noise is on"),
    "NaN": (CNN(lambda h, z: z * float("nan")), "answers NaN to 2 of 2 images"),
    "infinity": (CNN(lambda h, z: z / 0), "answers infinity to 2 of 2 images"),
    "several answers": (CNN(lambda h, z: h), r"returns \[2, 8\] for 2 images, .*--target NAME"),
    "a column": (CNN(lambda h, z: z[:, None]), r"returns \[2, 1\] .*add .flatten\(\)"),
    "one number": (CNN(lambda h, z: z.mean()), r"returns \[\] for 2 images"),
    "a dictionary": (CNN(lambda h, z: {"logit": z}), "returns a dict for 2 images"),
    "a class": (CNN(lambda h, z: (z > 0).long()), "a class rather than a logit"),
    "no gradient": (NoGradient(), "has no gradient; take no_grad"),
    "rounding": (CNN(lambda h, z: torch.round(9 * z)), "gradient .* is zero everywhere"),
    "rounded images": (CNN(start=torch.round), "gradient .* is zero everywhere"),
    "a gradient of NaN": (CNN(lambda h, z: (z - z).sqrt() + z), "gradient .* is not finite"),
    "batch norm in training": (Training(), "batch norm is in training mode"),
    "a normalised batch": (CNN(start=ranked), "otherwise than alone"),
    "squeeze()": (CNN(lambda h, z: z[:, None].squeeze()), r"returns \[\] for 1 image"),
    "another device": (CNN(lambda h, z: z.to("meta")), "answers on meta"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_one_line_that_says_what_to_change(name):
    network, words = BREACHES[name]
    with pytest.raises(CxrError, match=words) as caught:
        contract.keep_to(network, "own.py:net", 32, "cpu")
    assert str(caught.value).startswith("own.py:net: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "network",
    [
        CNN(),
        CNN(lambda h, z: z + 0.5),
        CNN(lambda h, z: 20 * z),
        CNN(lambda h, z: 9 * z.tanh()),
        CNN(start=lambda x: x.sub_(0.1)),
        CNN().bfloat16(),
    ],
)
def test_who_keeps_to_the_contract_is_let_through(network):
    network = network if network.fc.weight.dtype == torch.float else Half(network)
    contract.keep_to(nn.Sequential(nn.Hardtanh(), network), "own.py:net", 32, "cpu")


class Half(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.bfloat16())


def test_a_logit_that_happens_to_lie_within_0_and_1_is_no_probability():
    small = CNN()
    with torch.no_grad():
        small.fc.weight.mul_(1e-3)
        small.fc.bias.fill_(0.5)
    found = contract.breaches(small, contract.pictures(32))
    assert list(found) == list(contract.CHECKS) and not any(found.values())


def test_an_adapted_cnn_is_judged_by_what_it_answers_itself():
    def adapted(end, **options):
        return adapt(CNN(end), None, 1, value_range=(-1, 1), **options)

    for network in (
        adapted(lambda h, z: z.sigmoid(), output="probability"),
        adapted(lambda h, z: torch.stack([0 * z, z], 1), output="logits", target=1),
    ):
        contract.keep_to(network, "own.py:net", 32, "cpu")
    with pytest.raises(CxrError, match="looks like probabilities"):
        soft = adapted(lambda h, z: h.softmax(1), output="logits", target=1)
        contract.keep_to(soft, "own.py:net", 32, "cpu")


def test_what_the_cnn_draws_by_chance_is_not_the_next_ones():
    network = CNN(lambda h, z: F.dropout(z))
    expected = torch.rand(3, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(7)
    contract.breaches(network, contract.pictures(32))
    assert torch.equal(torch.rand(3), expected)

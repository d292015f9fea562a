import pytest
import torch

from cxr.layers import GroupNorm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 0.03)])
def test_group_normalisation_has_the_gradients_of_torchs(dtype, tolerance):
    torch.manual_seed(0)
    ours, theirs = GroupNorm(16), torch.nn.GroupNorm(8, 16)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    if dtype == torch.float64:
        ours, theirs = ours.double(), theirs.double()
    x = (torch.randn(3, 16, 6, 5) * 2 + 1).to(dtype).to(memory_format=torch.channels_last)
    weights = torch.randn(3, 16, 6, 5).to(dtype)
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        (y * weights).sum().backward()
        results.append([y, leaf.grad, norm.weight.grad, norm.bias.grad])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()

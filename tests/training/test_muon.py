import copy

import pytest
import torch

from irasim_diffusers.training import muon


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="requires torch 2.9")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (12, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.03), (torch.bfloat16, 1e-6)])
def test_muon_makes_the_steps_of_pytorch(shape, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: dtype)
    torch.manual_seed(0)
    ours, reference = torch.nn.Parameter(torch.randn(shape)), torch.nn.Parameter(torch.empty(shape))
    reference.data.copy_(ours.data)
    settings = {"lr": 0.1, "weight_decay": 0.01}
    optimizer = muon.Muon([ours], **settings)
    expected = torch.optim.Muon([reference], adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(4):
        before = reference.detach().clone()
        ours.grad = torch.randn(shape)
        reference.grad = ours.grad.clone()
        optimizer.step()
        expected.step()
        change = reference.detach() - before
        assert (ours.detach() - reference.detach()).norm() <= tolerance * change.norm()
        reference.data.copy_(ours.data)
        if step == 1:  # runs that were started with PyTorch's Muon can be resumed
            optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))

import pytest
import torch

from irasim_diffusers.training import optimizers


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (12, 12)])
def test_muon_in_float32_makes_the_steps_of_pytorch(shape, monkeypatch):
    monkeypatch.setattr(optimizers, "fast_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    ours, reference = torch.nn.Parameter(torch.randn(shape)), torch.nn.Parameter(torch.empty(shape))
    reference.data.copy_(ours.data)
    settings = {"lr": 0.1, "weight_decay": 0.01}
    muon = optimizers.Muon([ours], **settings)
    expected = torch.optim.Muon([reference], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        before = reference.detach().clone()
        ours.grad = torch.randn(shape)
        reference.grad = ours.grad.clone()
        muon.step()
        expected.step()
        change = reference.detach() - before
        assert (ours.detach() - reference.detach()).norm() < 0.03 * change.norm()
        reference.data.copy_(ours.data)
    expected.load_state_dict(
        muon.state_dict()
    )  # checkpoints of machines with and without bfloat16 are interchangeable


def test_muon_uses_pytorch_where_bfloat16_is_native(monkeypatch):
    monkeypatch.setattr(optimizers, "fast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(optimizers, "orthogonalize", None)
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.eye(4)
    optimizers.Muon([parameter], lr=0.1, weight_decay=0.0).step()
    assert not torch.equal(parameter, torch.ones(4, 4))

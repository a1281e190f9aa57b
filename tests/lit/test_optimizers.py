"""Optimizers that are chosen by config."""

import io

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from motionrag.cli import conf_dir


@pytest.fixture(scope="module")
def made():
    """Name -> an optimizer of that config for a network."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        configs = {
            name: compose("train", overrides=[f"optimizer={name}", "module.optimizer.lr=1e-3"])
            for name in ("adamw", "adamw8bit")
        }
    return lambda name, network: instantiate(configs[name].module.optimizer)(network.parameters())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def train(network, optimizer, steps):
    """Losses of a small regression."""
    generator, losses = torch.Generator().manual_seed(1), []
    x = torch.randn(256, 64, generator=generator)
    for _ in range(steps):
        loss = nn.functional.mse_loss(network(x), x.roll(1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_moments_in_8_bits_train_as_well(made):
    nets = {name: network() for name in ("adamw", "adamw8bit")}
    losses = {name: train(net, made(name, net), 60) for name, net in nets.items()}
    assert losses["adamw"][-1] < 0.5 * losses["adamw"][0]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.02)


def test_moments_in_8_bits_continue_from_a_checkpoint(made):
    net = network()
    optimizer = made("adamw8bit", net)
    train(net, optimizer, 3)
    moments = [v for v in optimizer.state[net[0].weight].values() if getattr(v, "dtype", None) == torch.uint8]
    assert [m.numel() for m in moments] == [64 * 128] * 2
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(net, optimizer, 3)
    file.seek(0)
    saved, other = torch.load(file, weights_only=True), network()
    other.load_state_dict(saved["net"])
    optimizer = made("adamw8bit", other)
    optimizer.load_state_dict(saved["optimizer"])
    assert train(other, optimizer, 3) == expected

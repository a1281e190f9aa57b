"""Weights files: what is in them, and what happens when they do not fit."""

import errno
import json

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from motionrag import checkpoint
from motionrag.checkpoint import load_weights, read_weights, save_weights, trainable_state
from motionrag.errors import MotionRAGError


class Stack(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.resampler, self.cama = nn.Linear(width, 2), nn.Linear(2, 2)


@pytest.fixture
def file(tmp_path):
    """A weights file and the module it was made from."""
    module = Stack()
    return save_weights(tmp_path / "w.safetensors", trainable_state(module), {"steps": 7}), module


def test_round_trip(file):
    path, module = file
    state, manifest = read_weights(path)
    assert state.keys() == module.state_dict().keys()
    assert manifest["parameters"] == {"cama": 6, "resampler": 8} and manifest["about"] == {"steps": 7}
    other = Stack()
    load_weights(path, resampler=other.resampler, cama=other.cama)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_one_part_alone_can_be_loaded(file):
    path, module = file
    other = Stack()
    load_weights(path, cama=other.cama)
    assert torch.equal(other.cama.weight, module.cama.weight)
    assert not torch.equal(other.resampler.weight, module.resampler.weight)


def test_another_size_is_refused_before_anything_is_loaded(file):
    path, _ = file
    other = Stack(width=5)
    before = other.cama.weight.clone()
    with pytest.raises(
        MotionRAGError, match=r"1 of another size: resampler.weight \(2, 3\) instead of \(2, 5\)"
    ):
        load_weights(path, cama=other.cama, resampler=other.resampler)
    assert torch.equal(other.cama.weight, before)


def test_missing_and_unexpected_keys_are_named(file):
    path, _ = file
    expected = r"2 missing: cama.0.weight \(2, 2\), .* 2 unexpected: cama.bias \(2,\), cama.weight \(2, 2\)"
    with pytest.raises(MotionRAGError, match=expected):
        load_weights(path, cama=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(MotionRAGError, match="no motion_adapter weights, only cama, resampler"):
        load_weights(path, motion_adapter=nn.Linear(2, 2))


def test_missing_and_damaged_files(file, tmp_path):
    path, _ = file
    with pytest.raises(MotionRAGError, match="no weights file"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(MotionRAGError, match="no weights file .*tiny"):
        read_weights("pkg:tiny/none.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MotionRAGError, match="not a readable safetensors file"):
        read_weights(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(MotionRAGError, match=r"not the file that w.json describes"):
        read_weights(path)


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"schema": "motion', "w.json is not readable JSON"),
        ("[1]", "w.json is not a manifest of weights"),
        ('{"about": null}', "w.json is not a manifest of weights"),
    ],
)
def test_damaged_manifests(file, text, reason):
    file[0].with_suffix(".json").write_text(text)
    with pytest.raises(MotionRAGError, match=f"{reason}.*copy it again") as error:
        read_weights(file[0])
    assert "\n" not in str(error.value)


def test_nothing_but_trained_parts_is_saved():
    with pytest.raises(ValueError, match="backbone.weight"):
        trainable_state(nn.ModuleDict({"backbone": nn.Linear(2, 2)}))


def test_the_manifest_is_json(file):
    manifest = json.loads(file[0].with_suffix(".json").read_text())
    assert manifest["schema"] == "motionrag.weights/1" and manifest["file"] == "w.safetensors"


def test_a_full_disk_is_called_that(monkeypatch, tmp_path):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device: .*w.safetensors") as error:
        save_weights(tmp_path / "w.safetensors", {"cama.x": torch.zeros(9)})
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())

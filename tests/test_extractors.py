"""What the metrics look at: shapes, ranges, sharing, and errors that name the file."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from motionrag import extractors
from motionrag.errors import MotionRAGError
from motionrag.extractors import (
    ClipEmbeddings,
    FlowInterpolation,
    FrameFeatures,
    LucasKanadeFlow,
    ObjectTrack,
    TorchScriptFlow,
    TorchScriptFrames,
    TorchScriptInterpolation,
    TorchScriptVideo,
    VideoFeatures,
    VideoLogits,
)
from motionrag.metrics.optical_flow import lucas_kanade

VIDEOMAE, DINOV2 = {"path": "pkg:tiny/videomae", "size": 32}, {"path": "pkg:tiny/dinov2", "size": 32}


def picture(height: int = 48, width: int = 64) -> Tensor:
    """Smooth texture (3, height, width) in [-1, 1]."""
    noise = torch.randn(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
    return (noise / noise.abs().max())[0]


def moving(dx: int, dy: int, frames: int = 5) -> Tensor:
    """A picture that moves by (dx, dy) pixels each frame, (1, frames, 3, 48, 64)."""
    return torch.stack([picture().roll((dy * i, dx * i), (1, 2)) for i in range(frames)])[None]


@pytest.mark.parametrize(("extractor", "shape"), [
    (VideoLogits(**VIDEOMAE), (2, None)), (VideoFeatures(**VIDEOMAE), (2, 96)),
    (FrameFeatures(**DINOV2), (2, 5, 96)), (LucasKanadeFlow(), (2, 4, 2, 24, 32)),
    (FlowInterpolation(), (2, 2, 3, 24, 32)), (ObjectTrack(), (2, 5, 2)),
])  # fmt: skip
def test_extractors_without_downloads(extractor, shape):
    video = torch.rand(2, 5, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = extractor(video)
    assert [n for n, expected in zip(found.shape, shape, strict=True) if expected not in (None, n)] == []
    assert not found.requires_grad
    # a clip's features do not depend on the clips beside it, to the last bit
    assert torch.equal(found[1:], extractor(video[1:]))
    assert not torch.equal(found[0], found[1])
    assert deepcopy(extractor) == extractor


def test_equal_extractors_share_their_network():
    assert VideoLogits(**VIDEOMAE).encoder is VideoFeatures(**VIDEOMAE).encoder
    assert hash(FrameFeatures(**DINOV2)) == hash(FrameFeatures(**DINOV2))
    assert VideoLogits(**VIDEOMAE) != VideoFeatures(**VIDEOMAE)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (0, -2), (5, 3)])
def test_lucas_kanade_finds_a_shift(dx, dy):
    video = moving(dx, dy, 2)[0]
    flow = lucas_kanade(video[:1], video[1:])[0, :, 12:-12, 12:-12]  # away from where the picture wraps
    assert flow[0].median().item() == pytest.approx(dx, abs=0.3)
    assert flow[1].median().item() == pytest.approx(dy, abs=0.3)
    assert (flow - torch.tensor([dx, dy])[:, None, None]).norm(dim=0).quantile(0.8) < 0.5


def test_flow_agrees_with_the_tracks_of_motionworld():
    from itertools import islice

    from motionrag.data.motionworld import clip_stream, render
    from motionrag.generate import to_float

    for clip in islice(clip_stream(0, {"known": 1.0}), 3):
        video = to_float(render(clip, 32))[None]
        steps = ObjectTrack()(video).diff(dim=1).norm(dim=-1)
        largest = LucasKanadeFlow()(video).norm(dim=2).flatten(2).topk(51, dim=2).values.mean(dim=2)
        assert (largest - steps).abs().median() < 0.5


def test_flow_without_texture_is_zero():
    flat = torch.full((1, 3, 20, 20), 0.3)
    assert lucas_kanade(flat, flat + 0.01).abs().max() < 1e-6


def test_interpolation_follows_motion():
    video = moving(2, 1)
    inner = (..., slice(12, -12), slice(12, -12))
    truth = video[:, 1::2]
    error = (FlowInterpolation()(video) - truth)[inner].abs().mean()
    blend = ((video[:, :-2:2] + video[:, 2::2]) / 2 - truth)[inner].abs().mean()
    assert error < blend / 3
    still = moving(0, 0)
    assert FlowInterpolation()(still).sub(still[:, 1::2]).abs().max() < 1e-4


class Video(torch.nn.Module):
    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        x = x.float().mean(dim=[3, 4])  # (1, 3, T)
        return x.flatten(1) if rescale and resize and return_features else x[:, :0, 0]


class Frames(torch.nn.Module):
    def forward(self, x: Tensor, return_features: bool = False):
        assert x.dtype == torch.uint8
        return x.float().mean(dim=[2, 3], keepdim=True) * int(return_features)


class Flow(torch.nn.Module):
    def forward(self, first: Tensor, second: Tensor):
        assert first.shape[2] % 8 == 0 and first.shape[3] % 8 == 0
        flow = (second - first)[:, :2]
        return [flow * 0, flow]


class Middle(torch.nn.Module):
    def forward(self, first: Tensor, second: Tensor):
        return (first + second) / 2


@pytest.fixture
def script(tmp_path):
    """Save a module as torchscript -> its path."""

    def save(module: torch.nn.Module) -> str:
        path = tmp_path / f"{type(module).__name__}.pt"
        torch.jit.script(module).save(str(path))
        return str(path)

    return save


def test_torchscripts(script):
    video = torch.full((2, 3, 3, 20, 36), -1.0)
    video[1, 2] = 1
    video[:, :, 2] = 0
    found = TorchScriptVideo(script(Video()))(video)
    assert found.shape == (2, 9)
    assert found[1].tolist() == [0, 0, 255, 0, 0, 255, 128, 128, 128]  # channel before time, uint8
    found = TorchScriptFrames(script(Frames()))(video)
    assert found[1].tolist() == [[0, 0, 128], [0, 0, 128], [255, 255, 128]]
    flow = TorchScriptFlow(script(Flow()), size=10)(video)
    assert flow.shape == (2, 2, 2, 16, 24)  # 10 x 18, padded
    assert flow[1, 1].unique().tolist() == pytest.approx([2])  # the last entry of the list, in [-1, 1]
    middle = TorchScriptInterpolation(script(Middle()))(video)
    assert middle.shape == (2, 1, 3, 20, 36)
    assert middle[1, 0, 0].unique().tolist() == [0]


def test_torchscripts_that_do_not_fit(script, tmp_path):
    with pytest.raises(MotionRAGError, match=r"torchscript file .*i3d\.pt: no such file; docs/metrics\.md"):
        TorchScriptVideo(str(tmp_path / "i3d.pt"))
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no script")
    with pytest.raises(MotionRAGError, match=r"broken\.pt: not a torchscript file"):
        TorchScriptFlow(str(broken))
    path = script(Frames())
    with pytest.raises(MotionRAGError, match=r"Frames\.pt: refused an input of \(1, 3, 2, 8, 8\)"):
        TorchScriptVideo(path)(torch.zeros(1, 2, 3, 8, 8))


def test_no_memory_is_not_called_a_matter_of_shapes(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(extractors, "_torchscript", lambda *_: full)
    with pytest.raises(torch.OutOfMemoryError):
        extractors._call("i3d.pt", "cpu", torch.zeros(1))


def test_too_few_frames():
    one = torch.zeros(1, 1, 3, 16, 16)
    with pytest.raises(MotionRAGError, match="optical flow needs clips of at least 2 frames, got 1"):
        LucasKanadeFlow()(one)
    with pytest.raises(MotionRAGError, match="interpolation needs clips of at least 3 frames, got 2"):
        FlowInterpolation()(one.expand(1, 2, 3, 16, 16))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of a few thousand weights that reads single letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=54, max_position_embeddings=12, bos_token_id=52, eos_token_id=53, pad_token_id=53)
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config=tiny | text, vision_config=tiny | dict(image_size=16, patch_size=8), projection_dim=8
        )
    ).save_pretrained(folder)
    return folder


def test_clip(clip_folder):
    extractor = ClipEmbeddings(str(clip_folder))
    video = torch.rand(2, 3, 3, 20, 30) * 2 - 1
    images, texts = extractor(video), extractor.text(["a ball", "a text of more than twelve letters"])
    assert images.shape == (2, 3, 8)
    assert texts.shape == (2, 8)
    for found in (images, texts):
        assert found.norm(dim=-1).flatten().tolist() == pytest.approx([1] * found[..., 0].numel())
    # what transformers makes of the same square picture and text
    model, tokenizer = extractors._clip(str(clip_folder), None, "cpu")
    square = torch.rand(1, 1, 3, 16, 16) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    theirs = model(
        **tokenizer(["a ball"], return_tensors="pt"), pixel_values=((square[0] + 1) / 2 - mean) / std
    )
    torch.testing.assert_close(extractor(square)[0], theirs.image_embeds)
    torch.testing.assert_close(texts[:1], theirs.text_embeds)


def test_clip_that_is_not_there(clip_folder, tmp_path):
    with pytest.raises(MotionRAGError, match="cannot be loaded"):
        ClipEmbeddings(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(MotionRAGError, match="its tokenizer cannot be loaded"):
        ClipEmbeddings(str(tmp_path))

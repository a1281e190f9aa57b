"""The frozen encoders: shapes, what they compute, staying frozen, and errors."""

import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Dinov2Model, VideoMAEModel

from motionrag.encoders import (
    AppearanceEncoder,
    CaptionEncoder,
    MotionEncoder,
    prepare_pixels,
    resolve_weights,
)
from motionrag.errors import MotionRAGError


@pytest.fixture(scope="module")
def motion(random_encoders):
    return MotionEncoder(random_encoders["motion"], size=32)


@pytest.fixture(scope="module")
def appearance(random_encoders):
    return AppearanceEncoder(random_encoders["appearance"], size=32)


@pytest.fixture(scope="module")
def caption():
    return CaptionEncoder()


def video(batch=2, frames=9, height=40, width=50, seed=0):
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_motion_features_are_the_networks_last_hidden_state(motion, random_encoders):
    assert (motion.width, motion.tokens, motion.frames, motion.size, motion.classes) == (24, 64, 8, 32, 5)
    features = motion(video())
    assert features.shape == (2, 64, 24)
    plain = VideoMAEModel.from_pretrained(random_encoders["motion"]).eval()
    pixels = motion.pixels(video())
    assert pixels.shape == (2, 8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(features, plain(pixels).last_hidden_state)
    assert motion.logits(video()).shape == (2, 5)


def test_appearance_features_are_the_networks_last_hidden_state(appearance, random_encoders):
    images = video()[:, 0]
    features = appearance(images)
    assert features.shape == (2, appearance.tokens, appearance.width) == (2, 17, 24)
    plain = Dinov2Model.from_pretrained(random_encoders["appearance"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(features, plain(appearance.pixels(images)).last_hidden_state)


def test_a_batch_equals_each_alone(motion, appearance):
    clips = video(3)
    torch.testing.assert_close(motion(clips), torch.cat([motion(clip[None]) for clip in clips]))
    torch.testing.assert_close(motion.logits(clips), torch.cat([motion.logits(clip[None]) for clip in clips]))
    images = clips[:, 0]
    torch.testing.assert_close(appearance(images), torch.cat([appearance(image[None]) for image in images]))


def test_other_frames_other_motion_features(motion):
    clip = video(1)
    assert not torch.allclose(motion(clip), motion(clip.flip(1)))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(8, 90), width=st.integers(8, 90))
def test_pixels_of_any_size_become_a_normalised_square(height, width):
    pixels = prepare_pixels(torch.full((1, 3, height, width), 0.5), 32)
    assert pixels.shape == (1, 3, 32, 32)
    expected = (0.75 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels, expected[None, :, None, None].expand_as(pixels))


def test_the_centre_is_kept():
    image = torch.full((1, 3, 32, 96), -1.0)
    image[..., 32:64] = 1  # the middle third
    assert prepare_pixels(image, 32).amin() > 0


def test_encoders_stay_frozen(motion, appearance, caption):
    owner = torch.nn.ModuleList([motion, appearance, caption])
    owner.train()
    for module in owner.modules():
        assert module is owner or not module.training
    assert not any(parameter.requires_grad for parameter in owner.parameters())
    assert not motion(video().requires_grad_()).requires_grad


def test_identity_tells_weights_apart(motion, random_encoders, tmp_path):
    again = MotionEncoder(random_encoders["motion"], size=32)
    assert again.identity == motion.identity
    assert motion.identity["name"] == "motion-random"  # the folder's name, not its place
    torch.manual_seed(1)
    VideoMAEModel(again.model.config).save_pretrained(tmp_path / "other")
    other = MotionEncoder(str(tmp_path / "other"), size=32)
    assert other.identity["weights"] != motion.identity["weights"]
    # No classifier in there: what is random about it must not show.
    assert other.identity == MotionEncoder(str(tmp_path / "other"), size=32).identity
    with pytest.raises(MotionRAGError, match="motion encoder other has no classifier"):
        other.logits(video())


def test_captions_need_no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    encoder = CaptionEncoder()
    dog, puppy, market = encoder.encode(["a dog runs", "a puppy sprints", "the stock market fell"])
    assert dog @ puppy > 0.5 > dog @ market


def test_caption_embeddings(caption):
    texts = ["a ball rolls left", "a ball rolls right", "waves break", ""]
    embeddings = caption.encode(texts)
    assert embeddings.shape == (4, caption.width) == (4, 384)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(embeddings[1:2], caption.encode(texts[1:2]), atol=1e-5, rtol=0)
    similar = embeddings @ embeddings.T
    assert similar[0, 1] > similar[0, 2]
    assert caption.encode([]).shape == (0, 384)


def test_caption_tokens(caption):
    states, mask = caption.tokens(["a ball rolls", "it " * 50], max_length=12)
    assert states.shape == (2, 12, 384)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [5, 12]  # [CLS] a ball rolls [SEP]; cut
    alone, _ = caption.tokens(["a ball rolls"], max_length=12)
    torch.testing.assert_close(alone[0], states[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda paths: MotionEncoder("pkg:tiny/unknown"), "'pkg:tiny/unknown' are not in this installation"),
        (lambda paths: MotionEncoder("/nowhere/at all"), "'/nowhere/at all' cannot be loaded"),
        (lambda paths: AppearanceEncoder("someone/unknown"), "'someone/unknown' cannot be loaded"),
        (lambda paths: CaptionEncoder("someone/unknown"), "'someone/unknown' cannot be loaded"),
        (
            lambda paths: MotionEncoder(paths["motion"]),
            "size=224, but its position table is for 32; set size=32",
        ),
        (
            lambda paths: AppearanceEncoder(paths["appearance"], size=30),
            "size=30 is no multiple of its patch, 8",
        ),
        (lambda paths: AppearanceEncoder(paths["motion"], size=32), "weights are missing"),
    ],
    ids=["package", "folder", "hub", "caption", "size", "patch", "kind"],
)
def test_errors_are_one_clear_line(random_encoders, make, message):
    with pytest.raises(MotionRAGError, match=message) as error:
        make(random_encoders)
    assert "\n" not in str(error.value)


def test_shapes_are_checked(motion, appearance):
    with pytest.raises(ValueError, match=r"expected a video \(B,T,3,H,W\)"):
        motion(video()[0])
    with pytest.raises(ValueError, match=r"expected an image \(B,3,H,W\)"):
        appearance(video())


def test_other_names_than_pkg_are_left_alone():
    assert resolve_weights("facebook/dinov2-large") == "facebook/dinov2-large"

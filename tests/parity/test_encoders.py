"""What the motion encoder's network is given, against the reference's numbers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from motionrag.encoders import MotionEncoder

# ImageNet's numbers, to undo the normalisation that comes last
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def given(tmp_path, case):
    """Run a video through the encoder; return the pixels its network saw, in [0, 1]."""
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_frames": case["out.indices"].shape[1]}
    VideoMAEForVideoClassification(VideoMAEConfig(**sizes, **layers)).save_pretrained(tmp_path)
    encoder = MotionEncoder(str(tmp_path), size=32)
    seen = []

    def network(pixels):
        seen.append(pixels)
        return SimpleNamespace(last_hidden_state=pixels)

    encoder.model.videomae.forward = network

    def run(video):
        encoder(video)
        return (seen.pop().movedim(2, -1) * STD + MEAN)[..., 0, 0, 0]

    return run


def test_video_encoder_frame_sampling(case, given):
    indices = []
    for frames in case["in.T"].tolist():  # frame t is painted with the grey value t / 64
        video = torch.arange(frames)[None, :, None, None, None].expand(1, frames, 3, 32, 32) / 64
        indices.append(((given(video)[0] * 2 - 1) * 64).round().long())
    pixels = case["in.pixels"][:, None, None, None, None].expand(-1, 1, 3, 32, 32)
    case.check(indices=torch.stack(indices), pixel_scaled=given(pixels)[:, 0])

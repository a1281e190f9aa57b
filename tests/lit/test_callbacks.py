"""Callbacks: unreadable clips are counted and stop a run, pictures are written."""

import pytest
from PIL import Image

from motionrag.checkpoint import read_weights
from motionrag.data.video import UnreadableVideo
from motionrag.errors import MotionRAGError
from motionrag.lit.callbacks import SampleGrid, SaveWeights, SkippedClips, Throughput


@pytest.fixture
def damaged(memory_clips):
    """Clips of which two cannot be read."""

    class Damaged(memory_clips):
        def read(self, index, position=0, samples=1):
            if index in (1, 2):
                raise UnreadableVideo(self.ids[index], "broken")
            return super().read(index, position)

    return Damaged()


def test_unreadable_clips_are_named_and_counted(cama_module, fit, damaged):
    skipped = SkippedClips(max_share=0.5)
    with pytest.warns(UserWarning, match="skipped clip c1: broken"):
        _, trainer = fit(cama_module(), 6, skipped, clips=damaged)
    assert skipped.reasons == {"c1": "broken", "c2": "broken"}
    assert trainer.callback_metrics["data/skipped"] == 2


def test_too_many_unreadable_clips_stop_the_run(cama_module, fit, damaged):
    with (
        pytest.warns(UserWarning),
        pytest.raises(MotionRAGError, match="training clips cannot be read, more than"),
    ):
        fit(cama_module(), 6, SkippedClips(max_share=0.05), clips=damaged)


def test_pictures_speed_and_weights(adapter_module, fit, tmp_path):
    weights = SaveWeights(tmp_path / "w.safetensors", {"stage": "adapter"})
    _, trainer = fit(
        adapter_module(), 2, SampleGrid(clips=1, steps=1), Throughput(1), weights, val_check_interval=2
    )
    picture = Image.open(tmp_path / "samples" / "step-000002.png")
    assert picture.size == (9 * 32, 3 * 32)
    assert trainer.callback_metrics["clips_per_second"] > 0
    state, manifest = read_weights(tmp_path / "w.safetensors")
    assert manifest["about"]["steps"] == 2 and "val/loss" in manifest["about"]["metrics"]
    assert {k.split(".")[0] for k in state} == {"resampler", "motion_adapter"}

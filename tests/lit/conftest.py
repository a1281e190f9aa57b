"""All stages at minimal size on clips in memory: real networks, no files."""

from functools import partial

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from motionrag.backbones.cogvideox import CogVideoX
from motionrag.checkpoint import read_weights
from motionrag.cli import conf_dir, train
from motionrag.data.datamodule import MotionDataModule, Part
from motionrag.encoders import MotionEncoder
from motionrag.lit.adapter_module import AdapterModule
from motionrag.lit.cama_module import CAMAModule
from motionrag.lit.joint_module import JointModule
from motionrag.modules.cama import CAMA
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler

SIZES = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 3, "output_dim": 16}


class MemoryClips:
    """Clips whose appearance and motion features are noise around a few prototypes."""

    samples = 1

    def __init__(self, count=12):
        generator = torch.Generator().manual_seed(0)
        self.ids = self.sources = [f"c{i}" for i in range(count)]
        kinds = torch.randn(4, 6, 16, generator=generator)
        noise = torch.randn(count, 6, 16, generator=generator)
        self.motion = kinds[torch.arange(count) % 4] + 0.1 * noise
        self.appearance = torch.randn(count, 5, 8, generator=generator)
        self.video = torch.rand(count, 9, 3, 32, 32, generator=generator) * 2 - 1
        self.shards = self.buffer = None

    def read(self, index, position=0, samples=1):
        others = [(index + 4 * j) % len(self.ids) for j in (1, 2)]  # of the same kind
        return {
            "clip_id": self.ids[index],
            "captions": f"caption {index % 3}",
            "video": self.video[index],
            "target_motion": self.motion[index],
            "target_appearance": self.appearance[index],
            "reference_id": [self.ids[i] for i in others],
            "reference_motion": self.motion[others],
            "reference_appearance": self.appearance[others],
        }


@pytest.fixture
def memory_clips():
    """The class of clips in memory."""
    return MemoryClips


@pytest.fixture
def batch():
    """Two clips."""
    return Part(MemoryClips(), list(range(12))).__getitems__([0, 1])


def text(prompts):
    """Text states that depend on the prompt alone."""
    return torch.stack(
        [torch.randn(24, 384, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
    )


@pytest.fixture(scope="session")
def motion_encoder(tmp_path_factory):
    """A random VideoMAE of 6 tokens of 16."""
    folder = tmp_path_factory.mktemp("videomae")
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=16,
        patch_size=16,
        num_frames=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    return MotionEncoder(str(folder), size=16)


@pytest.fixture
def adapter_module(motion_encoder):
    """Make a Stage 1 module; options as of AdapterModule."""

    def make(init="zero", lr=1e-2, backbone=None, **options):
        torch.manual_seed(0)
        return AdapterModule(
            backbone or CogVideoX.tiny(text=text, num_layers=2, num_attention_heads=1),
            Resampler(embedding_dim=16, **SIZES),
            partial(MotionAdapter.for_modules, init=init),
            partial(torch.optim.AdamW, lr=lr),
            motion_encoder,
            **options,
        )

    return make


@pytest.fixture
def cama_module():
    """Make a Stage 2 module; options as of CAMAModule."""

    def make(lr=1e-3, **options):
        torch.manual_seed(0)
        cama = CAMA(Resampler(embedding_dim=8, **SIZES), width=16, depth=1, heads=2, ff_dim=32)
        resampler = Resampler(embedding_dim=16, **SIZES)
        return CAMAModule(cama, resampler, partial(torch.optim.AdamW, lr=lr), **options)

    return make


@pytest.fixture
def joint_module(motion_encoder):
    """Make a Stage 3 module; options as of AdapterModule."""

    def make(init="zero", lr=1e-2, backbone=None, **options):
        torch.manual_seed(0)
        return JointModule(
            cama=CAMA(Resampler(embedding_dim=8, **SIZES), width=16, depth=1, heads=2, ff_dim=32),
            backbone=backbone or CogVideoX.tiny(text=text, num_layers=2, num_attention_heads=1),
            resampler=Resampler(embedding_dim=16, **SIZES),
            motion_adapter=partial(MotionAdapter.for_modules, init=init),
            optimizer=partial(torch.optim.AdamW, lr=lr),
            motion_encoder=motion_encoder,
            **options,
        )

    return make


class Losses(L.Callback):
    """Keeps every training loss; `stop` ends the process's training without warning after that many steps."""

    def __init__(self, stop=None):
        self.values, self.stop = {}, stop

    def on_train_batch_end(self, trainer, module, outputs, batch, idx):
        self.values[trainer.global_step] = outputs["loss"].item()
        if self.stop and trainer.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt():
    """A callback that ends training after so many steps."""
    return Losses


@pytest.fixture
def fit(tmp_path):
    """Train a module on clips in memory; returns losses by step and the trainer."""

    def run(module, steps, *callbacks, clips=None, ckpt_path=None, batch_size=4, **options):
        losses = next((c for c in callbacks if isinstance(c, Losses)), Losses())
        trainer = L.Trainer(
            **{
                "accelerator": "cpu",
                "max_steps": steps,
                "logger": False,
                "enable_checkpointing": any(type(c).__name__ == "ModelCheckpoint" for c in callbacks),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "check_val_every_n_epoch": None,
                "val_check_interval": 1000,
                "default_root_dir": tmp_path,
                "callbacks": [losses, *(c for c in callbacks if c is not losses)],
                **options,
            }
        )
        data = MotionDataModule(clips or MemoryClips(), batch_size, val_share=0.3)
        try:
            trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        except SystemExit:  # how Lightning passes on an interruption
            assert losses.stop
        return losses.values, trainer

    return run


@pytest.fixture
def train_config():
    """Compose the config of `motionrag train`, for a run that only writes files."""

    def make(*overrides):
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return compose("train", overrides=["logger=csv", "callbacks.progress.refresh_rate=0", *overrides])

    return make


@pytest.fixture
def train_files(train_config, motionworld):
    """Train the experiment smoke or smoke_cama on shards and database of a few clips; returns what `read_weights` does."""
    places = {"smoke": [f"shards={motionworld}/shards"], "smoke_cama": []}

    def run(experiment, run_dir, *overrides):
        words = [f"experiment={experiment}", "make=null", f"run_dir={run_dir}", f"db={motionworld}/db"]
        return read_weights(train.run(train_config(*words, *places[experiment], *overrides))["weights"])

    return run

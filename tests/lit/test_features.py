"""Training from feature shards gives the losses of training from clips."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from motionrag.cli import train
from motionrag.data.datamodule import ShardClips
from motionrag.data.features import shards_fingerprint, write_features
from motionrag.data.motionworld import make_dataset
from motionrag.data.packing import pack
from motionrag.data.shards import ShardIndex
from motionrag.errors import MotionRAGError

SIZE = {"frames": 9, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight clips in shards of three."""
    folder = tmp_path_factory.mktemp("clips")
    pack(make_dataset(folder, 8, seed=0), folder / "videos", folder / "shards", shard_size=3)
    return folder / "shards"


def test_losses_are_those_of_the_clips_themselves(shards, adapter_module, fit, tmp_path):
    clips, module = ShardClips(shards, **SIZE, fps=8), adapter_module()
    write_features(
        tmp_path / "features", clips, module.frozen_features, module.frozen_identity(), batch_size=2
    )
    features = ShardClips(tmp_path / "features", **SIZE, fps=8)
    assert features.ids == clips.ids and features.made_by["backbone"]["frames"] == 9
    assert features.made_by["shards"] == shards_fingerprint(clips.stream)
    assert features.read(0)["video"].shape == (1, 3, 32, 32)
    options = {"batch_size": 3, "val_check_interval": 2}
    expected, whole = fit(adapter_module(), 3, clips=clips, **options)
    found, cached = fit(adapter_module(), 3, clips=features, **options)
    assert found == pytest.approx(expected, rel=1e-5)
    validated = [trainer.callback_metrics["val/loss"].item() for trainer in (cached, whole)]
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)


def test_a_killed_run_redoes_one_shard(shards, tmp_path):
    clips, encoded = ShardClips(shards, **SIZE), []

    def encode(batch):
        encoded.extend(batch.clip_id)
        if len(encoded) == 6:
            raise KeyboardInterrupt
        return {"target_motion": batch.video.mean((2, 3, 4))[..., None]}

    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path / "f", clips, encode, {"name": "a"}, batch_size=3)
    assert not (tmp_path / "f").exists()
    index = write_features(tmp_path / "f", clips, encode, {"name": "a"}, batch_size=3)
    assert encoded == clips.ids[:6] + clips.ids[3:]
    assert (
        index["features"] == {"name": "a", "shards": shards_fingerprint(clips.stream)}
        and len(ShardIndex.open(tmp_path / "f")) == 8
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".f.lock", "f"]


def test_shards_of_other_clips_are_not_mixed_in(shards, tmp_path):
    def encode(batch):
        if "stop" in about and batch.clip_id[0] == clips.ids[3]:
            raise KeyboardInterrupt
        return {"target_motion": batch.video.mean((2, 3, 4))[..., None]}

    clips, about = ShardClips(shards, **SIZE), ["stop"]
    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path / "f", clips, encode, {}, batch_size=3)
    pack(make_dataset(tmp_path, 8, seed=1), tmp_path / "videos", tmp_path / "shards", shard_size=3)
    others, about = ShardClips(tmp_path / "shards", **SIZE), []
    write_features(tmp_path / "f", others, encode, {}, batch_size=3)
    assert (
        ShardClips(tmp_path / "f", **SIZE).read(0)["target_motion"][:, 0]
        == others.read(0)["video"].mean((1, 2, 3))
    ).all()


def test_unreadable_clips_are_left_out_by_name_or_stop_it(shards, tmp_path, monkeypatch):
    def encode(batch):
        return {"target_motion": batch.video.mean((2, 3, 4))[..., None]}

    clips = ShardClips(shards, **SIZE)
    broken = clips.stream.folder / "clips-000002.tar"
    whole = broken.read_bytes()
    broken.unlink()
    try:
        index = write_features(tmp_path / "f", clips, encode, {}, max_bad=0.3)
        assert [item["id"] for item in index["skipped"]] == clips.ids[6:] and index["clips"] == 6
        assert ShardClips(tmp_path / "f", **SIZE).ids == clips.ids[:6]
        with pytest.raises(MotionRAGError, match="2 of 8 clips cannot be read, more than max_bad=0.1 allows"):
            write_features(tmp_path / "g", clips, encode, {}, max_bad=0.1)
    finally:
        broken.write_bytes(whole)


def test_features_of_other_networks_and_of_several_rates_are_refused(shards, tmp_path):
    identity = {"backbone": {"name": "a"}}
    module = SimpleNamespace(clip_options=lambda: SIZE, frozen_identity=lambda: identity)
    clips = {"_target_": "motionrag.data.datamodule.ShardClips", "shards": str(shards), "fps": 8}
    cfg = OmegaConf.create({"features": str(shards), "stage_name": "adapter", "clips": clips})
    with pytest.raises(MotionRAGError, match=r'were made by null, .* needs .*"name": "a"}, "fps": 8}'):
        train._clips(cfg, module)
    cfg.clips.decoder = "torchcodec"
    assert train._features_of(cfg, module)["decoder"] == "torchcodec"
    cfg.stage_name = "cama"
    with pytest.raises(MotionRAGError, match="features=... is for stage=adapter and stage=joint"):
        train._clips(cfg, module)
    with pytest.raises(MotionRAGError, match="one frame rate, clips.fps has 2"):
        write_features(tmp_path / "f", ShardClips(shards, **SIZE, fps=[8, 10]), dict, {})


def test_several_samples_are_refused_where_one_is_kept(shards, tmp_path):
    clips = ShardClips(shards, **SIZE, fps=8, samples=2)
    with pytest.raises(MotionRAGError, match="features hold one sample of each clip, not clips.samples=2"):
        write_features(tmp_path / "out", clips, dict, {})
    module = SimpleNamespace(clip_options=lambda: SIZE)
    clips = {
        "_target_": "motionrag.data.datamodule.ShardClips",
        "shards": str(shards),
        "fps": 8,
        "samples": 2,
    }
    for kept in ("cache", "fixed_image_noise"):
        own = {"cache": False, "fixed_image_noise": False}
        cfg = OmegaConf.create({"features": None, "clips": clips, "module": own})
        assert train._clips(cfg, module).samples == 2
        cfg.module[kept] = True
        with pytest.raises(MotionRAGError, match="clips.samples=2: module.cache and .* keep one sample"):
            train._clips(cfg, module)


def test_features_of_other_clips_are_refused(shards, tmp_path):
    identity = {"backbone": {"name": "a"}}
    module = SimpleNamespace(clip_options=lambda: SIZE, frozen_identity=lambda: identity)
    clips = {"_target_": "motionrag.data.datamodule.ShardClips", "shards": "${shards}", "fps": 8}
    clips |= {"cache": None, "cache_gb": 20}
    write_features(
        tmp_path / "f",
        ShardClips(shards, **SIZE),
        lambda batch: {"target_motion": batch.video.mean((2, 3, 4))[..., None]},
        identity | {"fps": 8},
    )
    cfg = {"features": str(tmp_path / "f"), "stage_name": "adapter", "clips": clips, "shards": str(shards)}
    cfg = OmegaConf.create(cfg)
    assert len(train._clips(cfg, module).ids) == 8
    pack(make_dataset(tmp_path, 8, seed=1), tmp_path / "videos", tmp_path / "others", shard_size=3)
    cfg.shards = str(tmp_path / "others")
    with pytest.raises(MotionRAGError, match="other clips than those of shards=.*/others: choose another"):
        train._clips(cfg, module)
    for absent in (None, "???"):  # only the features were copied here
        cfg.shards = absent
        assert len(train._clips(cfg, module).ids) == 8


def test_features_depend_on_the_weights_that_make_them(adapter_module):
    module = adapter_module()
    before = module.frozen_identity()
    with torch.no_grad():
        next(module.backbone.denoiser.parameters()).add_(1)
    assert module.frozen_identity() == before  # the denoiser makes none of them
    with torch.no_grad():
        next(module.backbone.vae.parameters()).add_(1)
    assert module.frozen_identity() != before


def test_training_from_features_leaves_the_text_encoder_where_it_is(adapter_module, fit, memory_clips, batch):
    class Features(memory_clips):
        def read(self, index, position=0, samples=1):
            clip = super().read(index)
            video = clip["video"][None]
            context = backbone.encode_context([clip["captions"]], video[:, 0])
            return clip | {"latents": backbone.encode_video(video)[0], "context": context[0]}

    module, moved = adapter_module(), []
    backbone = module.backbone
    backbone.encoders_to = moved.append
    fit(module, 1, clips=Features())
    assert not moved
    fit(adapter_module(backbone=backbone), 1)
    assert moved == [torch.device("cpu")]


def test_unreadable_clips_are_named_once_features_are_written(monkeypatch, capsys, shards, adapter_module):
    module = adapter_module()
    skipped = [{"id": "c7", "reason": "cut off"}]
    monkeypatch.setattr("motionrag.data.features.write_features", lambda *_: {"skipped": skipped})
    monkeypatch.setattr(
        "hydra.utils.instantiate",
        lambda cfg, **_: module if "resampler" in cfg else SimpleNamespace(ids=range(8)),
    )
    cfg = {"module": {"resampler": 1}, "clips": {"fps": 8}, "data": {"batch_size": 2}, "features": "F"}
    train.make_features(OmegaConf.create(cfg | {"stage_name": "adapter"}))
    assert "F: 1 of 8 clips cannot be read and are left out" in (said := capsys.readouterr().out)
    assert "c7: cut off" in said
    with pytest.raises(MotionRAGError, match="features=F is not there: write it with stage=adapter"):
        train.make_features(OmegaConf.create(cfg | {"stage_name": "joint"}))

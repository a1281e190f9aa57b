"""``motionrag train``: Stage 1 (motion adapter), Stage 2 (CAMA) or Stage 3 (both together)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import WandbLogger

    from motionrag.retrieval.database import RetrievalDatabase

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train, in one process or several; see ``conf/train.yaml`` for the keys."""
    from hydra.utils import instantiate

    from motionrag import sweeps
    from motionrag.checkpoint import read_checkpoint
    from motionrag.cli import launch
    from motionrag.errors import MotionRAGError

    processes = launch.processes(cfg.trainer)
    if OmegaConf.is_list(cfg.db):
        raise MotionRAGError(
            f"db={list(cfg.db)}: training needs the neighbours of a single database; make one of several with "
            "motionrag index merge db=NEW others=[A,B]"
        )
    if cfg.ckpt_path is not None:
        own = cfg.ckpt_path == "last"
        checkpoint = sweeps.checkpoint(Path(cfg.run_dir)) if own else Path(cfg.ckpt_path)
        if checkpoint.is_file():
            read_checkpoint(checkpoint)  # one line now for what would be tracebacks of every process
        elif not own:
            raise MotionRAGError(
                f"ckpt_path={cfg.ckpt_path}: no such checkpoint; give a .ckpt file, or last with hydra.run.dir=RUN"
            )
    if cfg.make is not None:
        instantiate(cfg.make)
    if cfg.features is not None and not _shards_at(cfg.features):
        make_features(cfg)
    return launch.start(processes, cfg, train) if processes > 1 else train(cfg)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as this process's part, write the trained weights and the last metrics."""
    import warnings

    import lightning as L
    import transformers
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from motionrag.checkpoint import count_parameters, read_weights, save_weights, trainable_state
    from motionrag.errors import MotionRAGError
    from motionrag.lit.callbacks import LogLines, SaveWeights

    for library in ("lightning.pytorch", "lightning.fabric"):  # hardware lists and advertisements
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The `srun` command is available")  # the launcher has chosen
    transformers.utils.logging.disable_progress_bar()
    run_dir = Path(cfg.run_dir)
    L.seed_everything(cfg.seeds.init, workers=True, verbose=False)
    module = instantiate(cfg.module)
    clips = _clips(cfg, module)
    about = _about(cfg, module, clips.db)
    data = instantiate(cfg.data, clips=clips)
    weights = run_dir / "weights" / f"{cfg.stage_name}.safetensors"
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    validate_every = cfg.trainer.get("val_check_interval")
    if isinstance(validate_every, int):  # steps; Lightning counts batches, of which a step may take several
        validate_every *= cfg.trainer.get("accumulate_grad_batches", 1)
    try:
        trainer = instantiate(
            cfg.trainer,
            val_check_interval=validate_every,
            callbacks=[*callbacks, SaveWeights(weights, about, _inputs(cfg, clips.db))],
            logger=[*(made for logger in cfg.logger.values() if (made := instantiate(logger))), LogLines()],
            default_root_dir=str(run_dir),
        )
    except InstantiationException as error:
        # no GPU here, more devices than there are, ...
        if isinstance(error.__cause__, MisconfigurationException | TypeError | ValueError):
            raise MotionRAGError(
                f"trainer: {error.__cause__} (choose with trainer=NAME, trainer.devices=N)"
            ) from error
        raise
    trainable = count_parameters(module.parameters())
    if trainer.is_global_zero:
        line = (
            f"{cfg.name}: {trainable:,} trainable parameters, {len(data.train_part)} training and "
            f"{len(data.val_part)} validation clips"
        )
        print(line)
        log.info(line)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    failed = 1
    try:
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)
        failed = 0
    finally:
        if wandb := sys.modules.get("wandb"):  # or the next run of a sweep would be logged into this one
            wandb.finish(exit_code=failed)
    if not trainer.is_global_zero:  # the first process has written the results
        return {}
    if not weights.is_file():  # ended between its last checkpoint and here: there was no step left to do
        save_weights(weights, trainable_state(module), about | {"steps": trainer.global_step, "metrics": {}})

    about = read_weights(weights)[1]["about"]  # written where the training ran, which may be a forked process
    metrics = about["metrics"]
    losses = ", ".join(
        f"{name} {metrics[name]:.4f}" for name in ("train/loss", "val/loss") if name in metrics
    )
    return {
        "summary": f"{about['steps']} steps, {losses} -> {weights}",
        "objective": metrics.get("val/loss"),
        "weights": str(weights),
        "trainable_parameters": trainable,
        "clips": {"train": len(data.train_part), "val": len(data.val_part)},
        **about,
    }


def _shards_at(place: str) -> bool:
    """Whether there are shards, or another machine will know."""
    from motionrag.data.shards import INDEX

    return place.startswith("pipe:") or "://" in place or (Path(place) / INDEX).is_file()


def make_features(cfg: DictConfig) -> None:
    """Write what the frozen networks make of the clips to `cfg.features`, in this process."""
    import torch
    from hydra.utils import instantiate

    from motionrag.data.features import write_features
    from motionrag.data.shards import INDEX
    from motionrag.errors import MotionRAGError

    if cfg.stage_name == "joint":
        raise MotionRAGError(
            f"features={cfg.features} is not there: write it with stage=adapter, Stage 3 reads the same"
        )
    module = instantiate(cfg.module)
    about = _features_of(cfg, module)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module.backbone.to(device).encoders_to(device)
    module.motion_encoder.to(device)
    clips = instantiate(cfg.clips, **module.clip_options())

    def encode(batch: Any) -> dict[str, Any]:
        return module.frozen_features(batch.to(device))

    index = write_features(cfg.features, clips, encode, about, int(cfg.data.batch_size))
    if index["skipped"]:
        first = index["skipped"][0]
        print(
            f"features={cfg.features}: {len(index['skipped'])} of {len(clips.ids)} clips cannot be read and are left "
            f"out (all in {INDEX}), the first: {first['id']}: {first['reason']}"
        )
    torch.cuda.empty_cache()  # for the training that follows, maybe in processes of its own


def _features_of(cfg: DictConfig, module: L.LightningModule) -> dict[str, Any]:
    from motionrag.errors import MotionRAGError

    if cfg.stage_name == "cama":
        raise MotionRAGError(
            "features=... is for stage=adapter and stage=joint; Stage 2 reads the features of the database"
        )
    fps = OmegaConf.to_container(cfg.clips)["fps"] if OmegaConf.is_list(cfg.clips.fps) else cfg.clips.fps
    about = {**module.frozen_identity(), "fps": fps}
    if cfg.clips.get("decoder", "pyav") != "pyav":  # features of earlier versions do not say
        about["decoder"] = cfg.clips.decoder
    return about


def _clips(cfg: DictConfig, module: L.LightningModule) -> Any:
    """The clips of the configuration, or their features; raises MotionRAGError for features of other networks, and where
    what is kept of one sample would be taken for another."""
    from hydra.utils import instantiate

    from motionrag.data.features import shards_fingerprint
    from motionrag.data.stream import Shards
    from motionrag.errors import MotionRAGError

    if cfg.features is None:
        clips = instantiate(cfg.clips, **module.clip_options())
        if clips.samples > 1 and (cfg.module.cache or cfg.module.fixed_image_noise):
            raise MotionRAGError(
                f"clips.samples={clips.samples}: module.cache and module.fixed_image_noise keep one sample of each clip"
            )
        return clips
    wanted = _features_of(cfg, module)
    clips = instantiate(cfg.clips, **module.clip_options(), shards=cfg.features)
    made_by = dict(clips.made_by or {})
    source = made_by.pop("shards", None)
    if made_by != wanted:
        raise MotionRAGError(
            f"features={cfg.features} were made by {json.dumps(made_by or None)}, this configuration needs "
            f"{json.dumps(wanted)}: choose another folder"
        )
    if OmegaConf.is_missing(cfg, "shards") or cfg.shards is None:  # the features alone were copied here
        return clips
    if source != shards_fingerprint(Shards(cfg.shards, cfg.clips.cache, cfg.clips.cache_gb)):
        raise MotionRAGError(
            f"features={cfg.features} were made of other clips than those of shards={cfg.shards}: choose another "
            "folder, or shards=null to train on them"
        )
    return clips


def _about(cfg: DictConfig, module: L.LightningModule, db: RetrievalDatabase | None) -> dict[str, Any]:
    """What the weights' manifest will say; raises MotionRAGError when the database was made by other encoders."""
    from motionrag.checkpoint import read_weights
    from motionrag.errors import MotionRAGError

    about: dict[str, Any] = {"stage": cfg.stage_name, "experiment": cfg.name, "seed": cfg.seed}
    about["seeds"] = dict(cfg.seeds)
    about |= _origin(cfg, db)
    about["sizes"] = {
        part: OmegaConf.to_container(cfg[part], resolve=True)
        for part in ("resampler", "cama")
        if part in cfg.module
    }
    if cfg.stage_name != "cama":
        about["backbone"] = module.backbone.name
        about["adapter_query"] = sorted(set(module.motion_adapter.query.values()))
        about |= {"adapter_only": only} if (only := module.motion_adapter.only) else {}
        about["encoders"] = {"motion": dict(module.motion_encoder.identity)}
        if db is not None:
            db.check_encoders({"motion": module.motion_encoder})
    if cfg.stage_name == "adapter":
        return about
    about["encoders"] = {role: db.manifest["encoders"][role] for role in ("motion", "appearance")}
    _check_widths(module, db)
    if cfg.stage_name == "joint":
        started = {part: path for part, path in cfg.weights.items() if path}
        about["started_from"] = {p: read_weights(path)[1].get("sha256") for p, path in started.items()}
        return about
    db.check_resampler(module.resampler)
    stage1 = read_weights(cfg.resampler_weights)[1] if cfg.resampler_weights else {}
    about["resampler_weights"] = stage1.get("sha256")
    trained_with = stage1.get("about", {}).get("encoders", {}).get("motion")
    weights = (trained_with or {}).get("weights")  # imported releases name theirs without a checksum
    if weights and weights != about["encoders"]["motion"]["weights"]:
        raise MotionRAGError(
            f"{cfg.resampler_weights} was trained on motion features of {trained_with['name']}, the database "
            f"{db.path} holds those of {about['encoders']['motion']['name']}: choose the database of that training"
        )
    return about


def _check_widths(module: L.LightningModule, db: RetrievalDatabase) -> None:
    from motionrag.errors import MotionRAGError

    for role, expected in module.feature_widths().items():
        found = db.manifest["encoders"][role]["width"]
        if found != expected:
            raise MotionRAGError(
                f"database {db.path} holds {role} features of width {found}, this configuration expects {expected}: "
                "choose resampler=/cama= of the right size, or another database"
            )


def _origin(cfg: DictConfig, db: RetrievalDatabase | None) -> dict[str, Any]:
    """Checksums of settings (of equal ones equal, wherever they ran) and database, and the code's commit."""
    from motionrag.io import read_json, sha256
    from motionrag.retrieval.database import MANIFEST

    settings = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("ckpt_path", None)
    text = json.dumps(settings, sort_keys=True, default=str).replace(str(cfg.run_dir), "RUN")
    record = Path(cfg.run_dir) / "provenance.json"
    return {
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "git": read_json(record)["git"] if record.is_file() else None,
        "database_sha256": sha256(db.path / MANIFEST) if db is not None else None,
    }


def _inputs(cfg: DictConfig, db: RetrievalDatabase | None) -> dict[str, str | Path | None]:
    """What the run is made from, for W&B's lineage."""
    started = {"start": cfg.module.get("weights"), "cama": cfg.module.get("cama_weights")}
    return {"database": db and db.path, "resampler": cfg.get("resampler_weights"), **started}


def wandb_logger(save_dir: str, resume: str | bool | None = None, **options: Any) -> WandbLogger | None:
    """A W&B logger that needs no login: online only for users who are logged in; WANDB_MODE has the last word.

    The run is named after its folder, which keeps its id: continued with `resume`, or given an `id` again, it stays one
    run. Where the server cannot be reached the run is kept offline, and where W&B is not installed there is no logger;
    both say so.
    """
    try:
        import wandb
    except ModuleNotFoundError:
        print(
            "W&B is not installed: numbers are kept in the run folder alone (logger=csv says no more of it)"
        )
        return None
    from lightning.pytorch.loggers import WandbLogger

    from motionrag.cli import launch
    from motionrag.io import write_text

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    os.environ["WANDB_MODE"] = mode
    kept = Path(save_dir) / "wandb.id"
    if "id" in options:
        options["resume"] = "allow"
    elif resume and kept.is_file():
        options |= {"id": kept.read_text().strip(), "resume": "allow"}
    elif launch.rank() == 0:
        options["id"] = secrets.token_hex(4)
        write_text(kept, options["id"] + "\n")
    # `mode` as well: a session of W&B that has begun, and asking for the key begins one, no longer reads the environment
    options |= {"save_dir": save_dir, "name": Path(save_dir).name, "mode": mode}
    logger = WandbLogger(offline=mode == "offline", **options)
    if mode == "online" and launch.rank() == 0:
        try:
            logger.experiment  # noqa: B018 (asks the server)
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            print(
                f"W&B cannot be reached, the run is kept offline ({reason}); later: wandb sync {save_dir}/wandb/*"
            )
            os.environ["WANDB_MODE"] = "offline"
            wandb.teardown()  # its session would hold on to the run's id
            return WandbLogger(offline=True, **options | {"mode": "offline"})
    return logger


def make_motionworld(
    out: str, clips: int, seed: int, domains: Mapping[str, float], encoders: DictConfig, **options: Any
) -> None:
    """Render MotionWorld clips and make shards and database of them under `out`, unless they are there already.

    Everything is built beside `out` and renamed at the end. Raises MotionRAGError if `out` holds other clips.
    """
    from hydra.utils import instantiate

    from motionrag.cli.encode import encode
    from motionrag.data.motionworld import make_dataset
    from motionrag.data.packing import pack
    from motionrag.data.shards import ShardIndex
    from motionrag.errors import MotionRAGError
    from motionrag.io import read_json, write_json
    from motionrag.retrieval.building import build

    folder = Path(out)
    recipe = {"clips": clips, "seed": seed, "domains": dict(domains), **options}
    if (folder / "recipe.json").is_file():
        if read_json(folder / "recipe.json") != recipe:
            raise MotionRAGError(
                f"{folder} holds clips of another recipe ({read_json(folder / 'recipe.json')}): remove it or "
                "choose another make.out"
            )
        return
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        table = make_dataset(partial, clips, seed, dict(domains), **options)
        pack(table, partial / "videos", partial / "shards")
        made = instantiate(encoders, _convert_="all")
        encode(ShardIndex.open(partial / "shards"), partial / "db", made, batch_size=32, max_bad=0.0)
        build(partial / "db", near_duplicate=None)  # its captions are made of few phrases
        write_json(partial / "recipe.json", recipe)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "recipe.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""``motionrag generate``: image + prompt (+ references) -> mp4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from motionrag.generate import MotionRAG


def build(cfg: DictConfig) -> MotionRAG:
    """The networks that ``generate`` and ``evaluate`` share, from their configs."""
    import torch
    from hydra.utils import instantiate

    from motionrag.backbones.base import RANDOM_WEIGHTS
    from motionrag.generate import MotionRAG, usable

    device = usable(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = instantiate(cfg.backbone)
    if backbone.random_weights:
        print(RANDOM_WEIGHTS.format(backbone.name))
    return MotionRAG(
        backbone=backbone,
        motion_encoder=instantiate(cfg.encoders.motion),
        appearance_encoder=instantiate(cfg.encoders.appearance),
        resampler=instantiate(cfg.resampler),
        motion_adapter=instantiate(cfg.motion_adapter),
        cama=instantiate(cfg.get("cama")),  # None with `~cama`
        adapter_weights=cfg.weights.adapter,
        cama_weights=cfg.weights.cama,
        device=device,
        offload=bool(cfg.offload),
    )


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write one video; see ``conf/generate.yaml`` for the keys."""
    import time

    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from motionrag.data.video import read_clip, write_mp4
    from motionrag.errors import MotionRAGError
    from motionrag.generate import check_sampling, fit, read_image, to_float, to_uint8
    from motionrag.retrieval.database import check_depth
    from motionrag.retrieval.group import open_database

    if cfg.db and cfg.references:
        raise MotionRAGError(
            "both db and references are given: choose a database or your own reference clips"
        )
    out = Path(str(cfg.out) if cfg.out else Path(HydraConfig.get().runtime.output_dir) / "video.mp4")
    if out.is_dir() or out.suffix != ".mp4":
        raise MotionRAGError(f"out={out}: expected the name of an mp4 file")
    check_sampling(int(cfg.steps), float(cfg.guidance), float(cfg.motion_scale))
    picture = read_image(str(cfg.image))
    db = open_database(cfg.db) if cfg.db else None
    if db:
        check_depth(db, int(cfg.k))  # before any network is loaded
    model = build(cfg)
    backbone = model.backbone
    image = fit(picture, backbone.height, backbone.width)
    used: list[dict[str, Any]] = []
    tokens = None
    if db:
        model.check_database(db)
        retriever = instantiate(cfg.retriever, db=db)
        ids, scores = retriever.retrieve(str(cfg.motion_prompt or cfg.prompt), int(cfg.k), image=image)
        tokens = model.adapt_tokens(*model.read_references(db, [ids]), image)
        used = [{"score": s, **db.clip(i)} for i, s in zip(ids, scores.tolist(), strict=True)]
    elif cfg.references:
        frames = model.motion_encoder.frames  # no more of them: a reference may be long
        clips = [to_float(read_clip(str(path), frames=frames).frames) for path in cfg.references]
        tokens = model.adapt(*model.encode_references(clips), image)
        used = [{"video": str(path)} for path in cfg.references]
    start = time.perf_counter()
    video = model.generate(
        image, [str(cfg.prompt)], tokens, steps=int(cfg.steps), guidance=float(cfg.guidance), seeds=[int(cfg.seed)],
        motion_scale=float(cfg.motion_scale), progress=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    write_mp4(out, to_uint8(video[0]), backbone.fps)
    source = f"{len(used)} references" if used else "no references"
    frames, _, height, width = video.shape[1:]
    return {
        "summary": f"{frames} frames of {width}x{height} from {source} in {seconds:.1f} s -> {out}",
        "video": str(out),
        "seconds": seconds,
        "references": used,
    }

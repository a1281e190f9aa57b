"""``motionrag retrieve "PROMPT"``: the reference clips for a prompt, and a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    import numpy as np

MARGIN = 12
TEXT_HEIGHT = 20


def run(cfg: DictConfig) -> dict[str, Any]:
    """Print the references, write ``contact_sheet.png`` and ``references.json``; see ``conf/retrieve.yaml``."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from rich.console import Console
    from rich.table import Table

    from motionrag.io import atomic_path, write_json
    from motionrag.retrieval.database import RetrievalDatabase, check_depth

    db = RetrievalDatabase(str(cfg.db))
    check_depth(db, int(cfg.k))  # before the encoder is loaded
    retriever = instantiate(cfg.retriever, db=db)
    ids, scores = retriever.retrieve(str(cfg.prompt), int(cfg.k))

    references = []
    table = Table("score", "id", "motion caption", "caption", title=f"references for: {cfg.prompt}")
    for clip_id, score in zip(ids, scores.tolist(), strict=True):
        clip = db.clip(clip_id)
        references.append({"score": score, **clip})
        table.add_row(f"{score:.3f}", clip_id, clip["motion_caption"], clip["caption"])
    Console().print(table)

    out = Path(str(cfg.out) if cfg.out else HydraConfig.get().runtime.output_dir)
    write_json(out / "references.json", {"prompt": str(cfg.prompt), "references": references})
    rows = [(f"{i['score']:.3f}  {i['id']}: {i['motion_caption']}", db.preview(i["id"])) for i in references]
    with atomic_path(out / "contact_sheet.png") as temporary:
        contact_sheet(str(cfg.prompt), rows).save(temporary)
    return {
        "summary": f"{len(ids)} of {len(db)} clips, best {ids[0]} ({scores[0]:.3f}); {out / 'contact_sheet.png'}",
        "prompt": str(cfg.prompt),
        "ids": ids,
        "scores": scores.tolist(),
    }


def contact_sheet(title: str, rows: list[tuple[str, np.ndarray]]) -> Any:
    """A Pillow image: the title, then for each row its text above its frames (uint8 (P,h,w,3)) side by side."""
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    font_file = font_manager.findfont("DejaVu Sans")  # comes with matplotlib, knows many scripts
    font, large = ImageFont.truetype(font_file, 13), ImageFont.truetype(font_file, 17)
    strips = [
        Image.fromarray(frames.transpose(1, 0, 2, 3).reshape(frames.shape[1], -1, 3)) for _, frames in rows
    ]
    texts = [large.getlength(title), *(font.getlength(text) for text, _ in rows)]
    width = 2 * MARGIN + int(max(*texts, *(strip.width for strip in strips)))
    height = 3 * MARGIN + TEXT_HEIGHT + sum(strip.height + TEXT_HEIGHT + MARGIN for strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill="black", font=large)
    top = 2 * MARGIN + TEXT_HEIGHT
    for (text, _), strip in zip(rows, strips, strict=True):
        draw.text((MARGIN, top), text, fill="black", font=font)
        sheet.paste(strip, (MARGIN, top + TEXT_HEIGHT))
        top += TEXT_HEIGHT + strip.height + MARGIN
    return sheet

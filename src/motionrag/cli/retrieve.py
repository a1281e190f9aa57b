"""``motionrag retrieve "PROMPT"``: the reference clips for a prompt, or a report on a whole database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    import numpy as np

    from motionrag.retrieval.database import RetrievalDatabase
    from motionrag.retrieval.retrievers import Retriever

MARGIN = 12
TEXT_HEIGHT = 20
SHOWN = 8  # queries in a report's picture, each with three references


def run(cfg: DictConfig) -> dict[str, Any]:
    """Print the references, write ``contact_sheet.png`` and ``references.json``; with ``label`` instead
    ``report.png`` and ``report.json``. See ``conf/retrieve.yaml``."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from motionrag.errors import MotionRAGError
    from motionrag.retrieval.database import check_depth
    from motionrag.retrieval.group import open_database

    if not cfg.prompt and cfg.image is None and cfg.label is None:
        raise MotionRAGError(
            'retrieve needs a prompt (motionrag retrieve "PROMPT" db=DB), image=FILE or label=COLUMN'
        )
    db = open_database(cfg.db)
    check_depth(db, int(cfg.k))  # before the encoder is loaded
    out = Path(str(cfg.out) if cfg.out else HydraConfig.get().runtime.output_dir)
    retriever = instantiate(cfg.retriever, db=db)
    if cfg.label is not None:
        return report(db, retriever, cfg, out)
    return references(db, retriever, cfg, out)


def references(db: RetrievalDatabase, retriever: Retriever, cfg: DictConfig, out: Path) -> dict[str, Any]:
    """The clips for one prompt or picture."""
    from rich.console import Console
    from rich.table import Table

    from motionrag.io import atomic_path, write_json

    prompt, image = str(cfg.prompt or ""), None
    title = prompt or Path(str(cfg.image)).name
    if cfg.image:
        from motionrag.generate import read_image

        image = read_image(str(cfg.image))
    ids, scores = retriever.retrieve(prompt, int(cfg.k), image=image)
    found = []
    table = Table("score", "id", "motion caption", "caption", title=f"references for: {title}")
    for clip_id, score in zip(ids, scores.tolist(), strict=True):
        clip = db.clip(clip_id)
        found.append({"score": score, **clip})
        table.add_row(f"{score:.3f}", clip_id, clip["motion_caption"], clip["caption"])
    Console().print(table)

    write_json(out / "references.json", {"prompt": prompt, "references": found})
    rows = [(f"{i['score']:.3f}  {i['id']}: {i['motion_caption']}", db.preview(i["id"])) for i in found]
    with atomic_path(out / "contact_sheet.png") as temporary:
        contact_sheet(title, rows).save(temporary)
    return {
        "summary": f"{len(ids)} of {len(db)} clips, best {ids[0]} ({scores[0]:.3f}); {out / 'contact_sheet.png'}",
        "prompt": prompt,
        "ids": ids,
        "scores": scores.tolist(),
    }


def report(db: RetrievalDatabase, retriever: Retriever, cfg: DictConfig, out: Path) -> dict[str, Any]:
    """How well the database's clips find clips of their own label."""
    from rich.progress import track

    from motionrag.io import atomic_path, write_json
    from motionrag.retrieval.report import assess

    label, k = str(cfg.label), int(cfg.k)
    numbers, found = assess(
        db, retriever, label, k, int(cfg.queries), lambda ids: track(ids, description="retrieving")
    )
    print("\n".join(f"{name:<16}  {value:.3f}" if isinstance(value, float) else f"{name:<16}  {value}"
                    for name, value in numbers.items()))  # fmt: skip
    rows = []
    for query in list(found)[:: -(-len(found) // SHOWN)]:
        rows.append((f"{query} [{db.value(query, label)}]: {db.motion_caption(query)}", db.preview(query)))
        for clip_id, score in zip(*(values[:3] for values in found[query]), strict=True):
            text = (
                f"        {score:.3f}  {clip_id} [{db.value(clip_id, label)}]: {db.motion_caption(clip_id)}"
            )
            rows.append((text, db.preview(clip_id)))
    with atomic_path(out / "report.png") as temporary:
        contact_sheet(f"clips of {db.path.name} and their nearest three", rows).save(temporary)
    write_json(
        out / "report.json",
        {
            **numbers,
            "found": {
                query: {"ids": ids, "scores": scores.tolist()} for query, (ids, scores) in found.items()
            },
        },
    )
    return {
        "summary": (
            f"{label}: recall@{k} {numbers[f'recall@{k}']:.3f}, precision@{k} {numbers[f'precision@{k}']:.3f} (chance "
            f"{numbers['chance']:.3f}), hubness {numbers['hubness']:.2f}, {numbers['queries']} queries; {out / 'report.png'}"
        ),
        **numbers,
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

"""A token store made of random features, without videos or networks."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from motionrag.io import write_json
from motionrag.retrieval.bank import PartWriter
from motionrag.retrieval.building import build
from motionrag.retrieval.database import STORE

WIDTH = 6


@dataclass
class FakeEncoder:
    """As much of an encoder as a database looks at."""

    identity: dict = field(default_factory=lambda: {"name": "fake", "width": WIDTH, "weights": "0" * 64})


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture
def write_store(tmp_path):
    """Write a store of ``sizes`` clips per part; returns its folder and the features by id.

    Clips 0 and 1, 2 and 3, ... come from the same source when ``paired``; ids start with ``prefix``; ``extra``
    gives a clip's further fields by its number; ``embeddings`` (n,W) are the captions', random if None.
    """

    def write(
        sizes=(3, 4),
        name="db",
        paired=False,
        seed=0,
        prefix="c",
        extra=lambda number: {},
        embeddings=None,
        caption_width=WIDTH,
        motion_encoder=None,
        precision="fp16",
    ):
        rng, out, features, number = np.random.default_rng(seed), tmp_path / name, {}, 0
        write_json(
            out / STORE,
            {
                "shards": [{"file": f"clips-{part}.tar"} for part in range(len(sizes))],
                "encoders": {role: FakeEncoder().identity for role in ("motion", "appearance")}
                | {"caption": FakeEncoder().identity | {"width": caption_width}}
                | ({"motion": motion_encoder} if motion_encoder else {}),
                "sampling": {},
            },
        )
        for part, size in enumerate(sizes):
            with PartWriter(out, f"clips-{part}", {"skipped": [], "preview_frames": 2}, precision) as writer:
                for _ in range(size):
                    source = f"{prefix}-source{number // 2 if paired else number}"
                    clip = {
                        "id": f"{prefix}{number}",
                        "caption": f"caption {number}",
                        "motion_caption": f"motion {number}",
                        "source": source,
                        "metadata": {},
                        **extra(number),
                    }
                    arrays = {
                        "motion": rng.normal(size=(5, 4)).astype(np.float16),
                        "appearance": rng.normal(size=(3, 2)).astype(np.float16),
                        "caption": unit(rng, WIDTH) if embeddings is None else embeddings[number],
                        "preview": np.full((2, 16, 24, 3), number % 20 * 9, np.uint8),
                    }
                    *rows, preview = (value[None] for value in arrays.values())
                    writer.add([clip], *rows, [preview[0]])
                    features[clip["id"]] = arrays
                    number += 1
        return out, features

    return write


@pytest.fixture
def write_database(write_store):
    """Like ``write_store``, indexed."""

    def write(*args, neighbours=4, **kwargs):
        out, features = write_store(*args, **kwargs)
        build(out, neighbours)
        return out, features

    return write

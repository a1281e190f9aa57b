"""How long one query takes: our index and the database around it, NumPy's exact search, LanceDB as the reference has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from motionrag.bench.store import vectors_like_captions, write
from motionrag.errors import MotionRAGError
from motionrag.retrieval.building import Contents, publish, read_entries
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.index import CaptionIndex, build_index, exact_search
from motionrag.retrieval.neighbours import NEIGHBOUR

TURN = 20  # queries of a method before the next one's

Search = Callable[[np.ndarray], Sequence]


def run(
    clips: int = 100_000,
    width: int = 768,
    kinds: Sequence[str] = ("auto",),
    k: int = 9,
    queries: int = 200,
    lancedb: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Time single queries for the ``k`` nearest of ``clips`` vectors (clips, width), indexes read from disk.

    The vectors lie around clips/50 centres, cosine to the centre about 0.7, as do the queries, which are others.
    Every method answers all queries once before, so that what it reads from disk is in memory. Then they take turns, a
    few queries each, so that a busy machine slows all of them and none finds another's data in the cache at every query;
    times are medians over queries. What else runs on a machine slows a long query more than one shorter than a turn of the
    scheduler: there compare cpu_ms, the time that all threads of this process took. Each index is timed alone, and as users have it: ``db.search`` of a database of
    these captions, which looks after the query and gives names for numbers.

    Returns rows {method, build_s, disk_mb, p50_ms, p90_ms, cpu_ms, recall, of_numpy, of_lancedb}: recall is the share of
    the true ``k`` nearest found, the last two how many times faster than those. Raises MotionRAGError if LanceDB is
    asked for and not installed.
    """
    rng = np.random.default_rng(seed)
    vectors, asked = vectors_like_captions(rng, clips, width, queries)
    numbers = np.arange(clips)
    truth, _ = exact_search(asked, numbers, vectors.__getitem__, k)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "db"
        write(path, vectors, (1, 1), 1000, seed)
        contents = Contents(read_entries(path))
        neighbours = np.zeros((clips, 1), NEIGHBOUR)  # nobody asks for them here
        methods: dict[str, tuple[Search, float, float]] = {
            "numpy, exact": (_numpy(vectors, k), 0.0, vectors.nbytes)
        }
        for kind in kinds:
            start = time.perf_counter()
            index, about = build_index(numbers, vectors.__getitem__, kind)
            file = Path(folder) / f"{kind}.faiss"
            index.save(file)
            taken = time.perf_counter() - start
            methods[f"motionrag, {about['kind']}, effort {index.effort}"] = (
                _ours(file, vectors, k), taken, file.stat().st_size,
            )  # fmt: skip
            publish(path, contents, index, about, neighbours, None)
            methods[f"db.search, {about['kind']}, effort {index.effort}"] = (
                _database(path, k), taken, file.stat().st_size,
            )  # fmt: skip
        if lancedb:
            methods["lancedb, ivf_pq"] = _lancedb(vectors, k, Path(folder) / "lance")
        times: dict[str, list[np.ndarray]] = {name: [] for name in methods}
        found: dict[str, list[np.ndarray]] = {}
        for name, (search, _, _) in methods.items():
            answers = [search(query) for query in asked]
            found[name] = [
                np.array([int(str(clip).removeprefix("clip-")) for clip in best]) for best in answers
            ]
        for turn in np.split(asked, range(TURN, len(asked), TURN)):
            for name, (search, _, _) in methods.items():
                for query in turn:
                    start = np.array([time.perf_counter(), time.process_time()])
                    search(query)
                    times[name].append([time.perf_counter(), time.process_time()] - start)
    medians = {name: 1000 * np.median(values, axis=0) for name, values in times.items()}
    median = {name: float(wall) for name, (wall, _) in medians.items()}
    rows = [
        {
            "method": name,
            "build_s": build,
            "disk_mb": size / 1e6,
            "p50_ms": median[name],
            "p90_ms": 1000 * float(np.quantile(times[name], 0.9, axis=0)[0]),
            "cpu_ms": float(medians[name][1]),
            "recall": float(
                np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found[name], truth, strict=True)])
            ),
            "of_numpy": median["numpy, exact"] / median[name],
            "of_lancedb": median["lancedb, ivf_pq"] / median[name] if lancedb else None,
        }
        for name, (_, build, size) in methods.items()
    ]
    best = min((row for row in rows if row["method"].startswith("motionrag")), key=lambda row: row["p50_ms"])
    whole = min((row for row in rows if row["method"].startswith("db.search")), key=lambda row: row["p50_ms"])
    peer = f", {best['of_lancedb']:.0f}x LanceDB" if lancedb else ""
    return {
        "summary": f"{best['method']}: {best['p50_ms']:.2g} ms at recall {best['recall']:.3f}, "
        f"{best['of_numpy']:.0f}x NumPy{peer}; db.search {whole['p50_ms']:.2g} ms",
        "title": f"nearest {k} of {clips} x {width}, one query at a time, medians of {queries}",
        "rows": rows,
    }


def _numpy(vectors: np.ndarray, k: int) -> Search:
    def search(query: np.ndarray) -> np.ndarray:
        scores = vectors @ query
        best = np.argpartition(-scores, k)[:k]
        return best[np.argsort(-scores[best])]

    return search


def _ours(file: Path, vectors: np.ndarray, k: int) -> Search:
    index = CaptionIndex.load(file, fetch=vectors.__getitem__)
    return lambda query: index.search(query, k)[0][0]


def _database(path: Path, k: int) -> Search:
    db = RetrievalDatabase(path)
    db.index  # noqa: B018 (opened now: the next kind's takes its name)
    return lambda query: db.search(query, k)[0][0]


def _lancedb(vectors: np.ndarray, k: int, folder: Path) -> tuple[Search, float, float]:
    try:
        import lancedb
        from lancedb.index import IvfPq
    except ImportError as error:
        raise MotionRAGError(
            "bench.lancedb=true, but LanceDB is not installed: pip install lancedb"
        ) from error
    import pyarrow as pa

    start = time.perf_counter()
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = lancedb.connect(str(folder)).create_table(
        "clips", pa.table({"number": pa.array(np.arange(len(vectors))), "vector": flat})
    )
    table.create_index("vector", config=IvfPq(distance_type="dot"))
    taken = time.perf_counter() - start

    def search(query: np.ndarray) -> np.ndarray:
        found = table.search(query).distance_type("dot").nprobes(50).refine_factor(30).limit(k)
        return found.select(["number", "_distance"]).to_arrow()["number"].to_numpy()

    return search, taken, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

"""1, 2 and 3 processes give the same numbers, with padding, unequal parts and processes without clips."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DistributedSampler

from motionrag.metrics import ClipBatch
from motionrag.metrics.bootstrap import difference, interval

CLIPS = 7


def load():
    """The tests beside this one (they are no package)."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location(
        "definitions", Path(__file__).with_name("test_definitions.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


definitions = load()


def parts(world: int) -> dict[str, list[list[int]]]:
    """Ways to give 7 clips to processes: way -> clips of each process."""
    samplers = [DistributedSampler(range(CLIPS), world, rank, shuffle=True) for rank in range(world)]
    padded = {"padded": [list(sampler) for sampler in samplers]}
    return padded if world == 2 else padded | {"last alone": [[], [], [*range(CLIPS)]]}


def measure(mine: list[int]) -> dict:
    """All numbers of all metrics, from the clips of this process in batches of two."""
    batch, found = definitions.make_batch(CLIPS, frames=5, seed=1), {}
    for name, make in definitions.METRICS.items():
        metric, other = make(), make()
        for rows in [mine[i : i + 2] for i in range(0, len(mine), 2)]:
            names = ("video", "truth", "prompts", "first_frame", "motion_tokens", "target_tokens")
            fields = {key: getattr(batch, key) for key in names}
            fields = {k: [v[i] for i in rows] if k == "prompts" else v[rows] for k, v in fields.items()}
            part = ClipBatch([batch.ids[i] for i in rows], **fields)
            metric.add(part)
            other.add(part.with_video(part.video * 0.7, part.motion_tokens + 1, part.target_tokens))
        found[name] = {"value": metric.compute().item()}
        if name in ("ActionScore", "FID"):
            found[name] |= {
                "interval": vars(interval(metric, 5)),
                "difference": vars(difference(metric, other, 5)),
            }
        if hasattr(metric, "per_clip"):
            found[name]["clips"] = dict(sorted(metric.per_clip().items()))
        if hasattr(metric, "counts"):
            found[name]["counts"] = list(metric.counts)
    return found


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    found = {way: measure(clips[rank]) for way, clips in parts(world).items()}
    (folder / f"{world}.{rank}.json").write_text(json.dumps(found))
    dist.barrier()  # a process that leaves early breaks the last exchange of the others
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_all_metrics_on_1_2_and_3_processes(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = json.loads(json.dumps(measure(list(range(CLIPS)))))
    finally:
        torch.set_num_threads(threads)
    assert alone["FID"]["counts"] == [CLIPS * 5] * 2
    assert alone["FVD"]["counts"] == [CLIPS] * 2
    assert len(alone["ActionScore"]["clips"]) == CLIPS
    for world in (2, 3):
        assert sum(map(len, parts(world)["padded"])) == {2: 8, 3: 9}[world]  # the sampler does repeat clips
        # forked: fresh interpreters would import torch again, ten seconds on a small machine
        mp.start_processes(_rank, (world, tmp_path), nprocs=world, start_method="fork")
        for rank in range(world):
            found = json.loads((tmp_path / f"{world}.{rank}.json").read_text())
            for way, numbers in found.items():
                assert numbers == alone, (world, rank, way)  # to the last bit

"""The stream of training clips: order, resuming, ranks, splits, unreadable clips."""

import itertools
import pickle
from collections import Counter
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.data import datamodule
from motionrag.data.batch import MotionBatch
from motionrag.data.datamodule import (
    ClipStream,
    MotionDataModule,
    Part,
    ReferenceClips,
    ShardClips,
    to_pixels,
)
from motionrag.data.motionworld import make_dataset
from motionrag.data.packing import pack
from motionrag.data.stream import Order
from motionrag.data.video import UnreadableVideo, read_clip
from motionrag.errors import MotionRAGError
from motionrag.io import write_json
from motionrag.retrieval.bank import PartWriter
from motionrag.retrieval.building import build
from motionrag.retrieval.database import STORE


class Numbers:
    """Clips whose only feature is their number; some cannot be read."""

    def __init__(self, count, bad=(), per_source=1, samples=1):
        self.samples = samples
        self.ids = [f"c{i}" for i in range(count)]
        self.sources = [f"s{i // per_source}" for i in range(count)]
        self.bad = set(bad)
        self.shards = self.buffer = None

    def split(self, column):
        return ["val" if i % 4 == 0 else "train" for i in range(len(self.ids))]

    def read(self, index, position=0, samples=1):
        if index in self.bad:
            raise UnreadableVideo(self.ids[index], "broken")
        return {"clip_id": self.ids[index], "captions": "", "target_motion": torch.full((1, 1), float(index))}


def take(stream, n):
    return list(itertools.islice(stream, n))


# --- the stream ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(clips=st.integers(1, 9), batch=st.integers(1, 4), seed=st.integers(0, 5))
def test_every_pass_shows_every_clip_once(clips, batch, seed):
    positions = list(itertools.chain(*take(ClipStream(batch), 3 * clips)))
    assert positions == list(range(len(positions)))
    places = [Order(clips, seed)[p] for p in positions]
    for number in range(3 * batch):
        assert sorted(places[number * clips : (number + 1) * clips]) == list(range(clips))


@settings(max_examples=30, deadline=None)
@given(world=st.integers(1, 3), batch=st.integers(1, 3), start=st.integers(0, 20))
def test_ranks_together_see_what_one_process_sees(world, batch, start):
    one = take(ClipStream(batch * world, start=start), 4)
    several = [take(ClipStream(batch, rank, world, start), 4) for rank in range(world)]
    for step in range(4):
        assert one[step] == list(itertools.chain(*(s[step] for s in several)))


@settings(max_examples=30, deadline=None)
@given(clips=st.integers(1, 9), samples=st.integers(1, 4), seed=st.integers(0, 5))
def test_every_pass_shows_every_sample_once_and_those_of_a_clip_together(clips, samples, seed):
    data = MotionDataModule(Numbers(clips, samples=samples), 1, val_share=0, seed=seed)
    order, size = Order(clips, seed), clips * samples
    seen = [data.train_part.index(position) for position in range(3 * size)]
    assert seen == [order[place] for place in range(3 * clips) for _ in range(samples)]
    for start in range(0, 3 * size, size):
        assert sorted(seen[start : start + size]) == sorted(list(range(clips)) * samples)


def test_a_resumed_stream_continues():
    assert take(ClipStream(3, start=15), 3) == take(ClipStream(3), 8)[5:]


# --- batches -------------------------------------------------------------------------------------------------------


def test_an_unreadable_clip_gives_way_to_the_next_and_is_named():
    part = Part(Numbers(6, bad=[2, 3]), [0, 2, 3, 5])
    batch = part.__getitems__([8, 9])
    assert batch.clip_id == ["c0", "c5"] and batch.position == [8, 9]
    assert [line.split(":")[0] for line in batch.skipped] == ["c2", "c3"]


def test_every_sample_of_an_unreadable_clip_gives_way_to_the_same_one_of_the_next():
    read = []

    class Noted(Numbers):
        def read(self, index, position=0, samples=1):
            read.append((index, position % samples))
            return super().read(index)

    part = Part(Noted(4, bad=[1], samples=2), [0, 1, 2, 3], range(8))
    batch = part.__getitems__([1, 2, 3, 4])
    assert batch.clip_id == ["c0", "c2", "c2", "c2"] and batch.position == [1, 2, 3, 4]
    assert read == [(0, 1), (1, 0), (2, 0), (1, 1), (2, 1), (2, 0)]
    assert batch.skipped == ["c1: broken"]
    with pytest.raises(MotionRAGError, match="none of the 4 clips"):
        Part(Noted(4, bad=range(4), samples=2), [0, 1, 2, 3], range(16)).__getitems__([1])


def test_nothing_readable_is_an_error():
    with pytest.raises(MotionRAGError, match="none of the 2 clips"):
        Part(Numbers(2, bad=[0, 1]), [0, 1]).__getitems__([0])


def test_batches_check_themselves():
    good = {"clip_id": ["a", "b"], "captions": ["", ""], "position": [0, 1]}
    MotionBatch(**good, video=torch.zeros(2, 3, 3, 4, 4)).check()
    for wrong in (
        {"video": torch.zeros(2, 3, 4, 4)},
        {"video": torch.full((2, 3, 3, 4, 4), 2.0)},
        {"target_motion": torch.zeros(3, 2, 2)},
        {"target_motion": torch.zeros(2, 2, 2), "reference_motion": torch.zeros(2, 4, 2, 3)},
        {"reference_motion": torch.zeros(2, 4, 2, 3), "reference_appearance": torch.zeros(2, 3, 2, 3)},
        {"captions": [""]},
    ):
        with pytest.raises(ValueError):
            MotionBatch(**{**good, **wrong}).check()


def module(clips, world=1, rank=0, processed=0, accumulate=1, **options):
    """A datamodule under a stand-in trainer."""
    data = MotionDataModule(clips, **{"batch_size": 2, "val_share": 0.3, **options})
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(
        world_size=world, global_rank=rank, fit_loop=loop, accumulate_grad_batches=accumulate
    )
    return data


def test_clips_of_one_source_stay_on_one_side():
    data = module(Numbers(60, per_source=3))
    train, val = ({data.clips.sources[i] for i in p.indices} for p in (data.train_part, data.val_part))
    assert train and val and not train & val
    again = module(Numbers(60, per_source=3))
    assert again.val_part.indices == data.val_part.indices


@pytest.mark.parametrize("size", [0, -1, 2.5, "two", None])
def test_a_batch_has_at_least_one_clip(size):
    with pytest.raises(MotionRAGError, match="data.batch_size=.*: expected at least 1 clip"):
        module(Numbers(3), batch_size=size)


def test_one_source_at_least_is_held_out():
    assert len(module(Numbers(3), val_share=0.001).val_part) == 1
    assert len(module(Numbers(3), val_share=0).val_part) == 0


def test_split_by_column():
    assert module(Numbers(8), split_column="split").val_part.indices == [0, 4]
    with pytest.raises(MotionRAGError, match="no training clips"):
        module(Numbers(3), val_share=1.0)


def test_validation_is_the_same_on_any_number_of_ranks():
    alone = [i for b in module(Numbers(40), batch_size=4).val_dataloader() for i in b.clip_id]
    ranks = [list(module(Numbers(40), world=2, rank=r).val_dataloader()) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    together = [i for pair in zip(*ranks, strict=True) for b in pair for i in b.clip_id]
    assert together == alone
    assert module(Numbers(5), val_share=0.0).val_dataloader() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_resumes_where_it_stopped(workers):
    whole = [b.clip_id for b in take(module(Numbers(9)).train_dataloader(), 7)]
    first = module(Numbers(9), workers=workers, processed=4)
    assert [b.clip_id for b in take(first.train_dataloader(), 4)] == whole[:4]
    resumed = module(Numbers(9), workers=workers)
    resumed.load_state_dict(first.state_dict())
    assert [b.clip_id for b in take(resumed.train_dataloader(), 3)] == whole[4:]


def test_resuming_with_other_processes_continues_at_the_same_clip():
    state = module(Numbers(9), batch_size=2, world=2, processed=3).state_dict()
    assert (state["clips"], state["batches"]) == (12, 3)
    other = module(Numbers(9), batch_size=3, processed=5)
    other.load_state_dict(state)
    state = other.state_dict()
    assert (state["clips"], state["batches"]) == (18, 5)


@pytest.mark.parametrize(
    "change", [{"clips": Numbers(10)}, {"clips": Numbers(9, samples=2)}, {"seed": 1}, {"val_share": 0.6}]
)
def test_a_place_among_other_clips_is_refused(change):
    state = module(Numbers(9), processed=3).state_dict()
    with pytest.raises(MotionRAGError, match="among other training clips, .*module.weights=CHECKPOINT"):
        module(**{"clips": Numbers(9)} | change).load_state_dict(state)
    del state["order"]  # of an earlier version
    module(**{"clips": Numbers(9)} | change).load_state_dict(state)


def test_a_step_of_several_batches_counts_when_it_is_whole():
    state = module(Numbers(9), batch_size=2, processed=5, accumulate=2).state_dict()
    assert (state["clips"], state["batches"]) == (8, 4)


class Large(Numbers):
    """Clips of 10 MB, made as those of shards are."""

    def read(self, index, position=0, samples=1):
        return super().read(index) | {"video": to_pixels(np.zeros((16, 240, 320, 3), np.uint8), 224, 224)}


def test_a_worker_does_not_grow():
    batches = iter(module(Large(40), workers=1, val_share=0).train_dataloader())
    [worker] = batches._workers

    def memory():
        status = Path(f"/proc/{worker.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    take(batches, 4)
    before = memory()
    take(batches, 12)
    assert memory() < before + 50  # it would grow by about 100


# --- clips from disk -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Seven synthetic clips in shards of three."""
    folder = tmp_path_factory.mktemp("world")
    table = make_dataset(folder, 7, seed=0)
    pack(table, folder / "videos", folder / "shards", shard_size=3)
    return folder


def test_clips_are_read_from_their_place_in_the_tar(shards):
    clips = ShardClips(shards / "shards", frames=9, height=32, width=32, fps=8)
    assert clips.ids == [f"clip-{i:05d}" for i in range(7)]
    assert clips.split("domain") == ["known"] * 7
    for index in (5, 0, 3):
        clip = clips.read(index)
        expected = read_clip(shards / "videos" / f"{clips.ids[index]}.mp4").frames
        assert torch.equal(clip["video"], to_pixels(expected, 32, 32))
        assert clip["captions"]
    with pytest.raises(MotionRAGError, match="no column 'colour', only"):
        clips.split("colour")


@pytest.mark.skipif(
    find_spec("torchcodec") is None,
    reason="torchcodec is not installed (pip install 'motionrag[torchcodec]')",
)
def test_workers_decode_with_torchcodec(shards):
    batches = {}
    for decoder in ("pyav", "torchcodec"):
        clips = ShardClips(shards / "shards", frames=9, height=32, width=32, fps=8, decoder=decoder)
        batches[decoder] = take(module(clips, workers=2).train_dataloader(), 4)
    for ours, theirs in zip(batches["torchcodec"], batches["pyav"], strict=True):
        assert ours.clip_id == theirs.clip_id and torch.equal(ours.video, theirs.video)


def test_kept_clips_are_decoded_once_and_can_go_to_a_spawned_worker(shards, monkeypatch):
    clips = ShardClips(shards / "shards", frames=9, height=32, width=32, fps=8, keep=True)
    video = clips.read(1)["video"]
    clips = pickle.loads(pickle.dumps(clips))
    monkeypatch.setattr(clips.stream, "read", None)
    assert torch.equal(clips.read(1)["video"], video)


def test_pixels_cover_the_size_and_are_cropped_in_the_middle():
    frames = np.zeros((2, 10, 30, 3), np.uint8)
    frames[:, :, 10:20] = 255
    out = to_pixels(frames, 20, 20)
    assert out.shape == (2, 3, 20, 20) and out.min() >= -1 and out.max() == 1
    assert out[..., 4:16].min() > 0.9
    assert torch.equal(to_pixels(frames, 10, 30)[0, 0, 0, :11], torch.tensor([-1.0] * 10 + [1.0]))


def samples(shards, rank=0, world=1, count=4, resumed=0, workers=0, **options):
    """Clips and pictures of so many batches of three samples a clip, as [(clip, rate, bytes of the video)]."""
    clips = ShardClips(shards / "shards", 3, 32, 32, fps=[4, 8], seed=5, samples=3)
    data = module(clips, world, rank, val_share=0, workers=workers, **options)
    data.load_state_dict({"clips": resumed, "batches": 0})
    return [
        [(i, float(f), v.numpy().tobytes()) for i, f, v in zip(b.clip_id, b.fps, b.video, strict=True)]
        for b in take(data.train_dataloader(), count)
    ]


def test_samples_of_a_clip_are_a_function_of_the_position_whatever_reads_them(shards):
    expected = [sample for batch in samples(shards, batch_size=21, count=2) for sample in batch]
    assert Counter(i for i, _, _ in expected[:21]) == dict.fromkeys([f"clip-{i:05d}" for i in range(7)], 3)
    assert len(set(expected)) > 21 and {f for _, f, _ in expected} == {4.0, 8.0}
    for size in (1, 2, 3, 4, 6):
        read = samples(shards, batch_size=size, count=36 // size, workers=2 * (size == 4))
        assert list(chain(*read)) == expected[:36]
    ranks = [samples(shards, rank, 2, batch_size=2, count=9, workers=rank) for rank in range(2)]
    assert [s for step in zip(*ranks, strict=True) for rank in step for s in rank] == expected[:36]
    for place in (1, 2, 5, 22):  # resumed in the middle of a clip, too
        assert (
            list(chain(*samples(shards, batch_size=2, count=4, resumed=place))) == expected[place : place + 8]
        )


def test_samples_of_a_clip_share_one_decoding_and_come_from_all_of_it(shards, monkeypatch):
    asked, read = [], datamodule.read_clips
    monkeypatch.setattr(
        datamodule, "read_clips", lambda data, wanted, **o: asked.append(wanted) or read(data, wanted, **o)
    )
    samples(shards, batch_size=6, count=7)
    assert len(asked) == 14  # 42 samples
    for wanted in asked:
        room = [9 / 8 - 3 / want.fps for want in wanted]  # of clips of 9 frames at 8 a second
        for number, (want, time) in enumerate(zip(wanted, room, strict=True)):
            assert number / 3 * time <= want.start_sec <= (number + 1) / 3 * time + 1e-6
    starts = [want.start_sec for wanted in asked for want in wanted]
    assert len(set(starts)) == len(starts)


def test_validation_reads_one_sample_of_a_clip_from_its_start(shards):
    several = ShardClips(shards / "shards", 3, 32, 32, fps=8, samples=3)
    batches = [
        list(module(clips).val_dataloader())
        for clips in (several, ShardClips(shards / "shards", 3, 32, 32, fps=8))
    ]
    assert batches[0] and len(batches[0]) == len(batches[1])
    for batch, other in zip(*batches, strict=True):
        assert batch.clip_id == other.clip_id and torch.equal(batch.video, other.video)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"samples": 0, "fps": 8}, "samples=0: expected at least 1"),
        ({"samples": 2}, "samples=2: frames spread over the whole clip are always the same, give clips.fps"),
        ({"samples": 2, "fps": 8, "keep": True}, "clips.keep=true keeps one"),
        ({"samples": 2, "fps": 8, "db": "db"}, "choose db=null"),
    ],
)
def test_several_samples_are_refused_where_they_would_be_the_same_or_wrong(shards, options, reason):
    with pytest.raises(MotionRAGError, match=reason):
        ShardClips(shards / "shards", 3, 32, 32, **options)


@pytest.fixture
def database(tmp_path):
    """A database of six clips with random features, two from each source."""
    rng, encoder = np.random.default_rng(0), {"name": "random", "width": 4, "weights": "0"}
    roles = ("motion", "appearance", "caption")
    write_json(
        tmp_path / "db" / STORE,
        {"shards": [{"file": "a.tar"}], "encoders": dict.fromkeys(roles, encoder), "sampling": {}},
    )
    clips = [
        {"id": f"c{i}", "caption": f"caption {i}", "motion_caption": "moves", "source": f"s{i // 2}"}
        for i in range(6)
    ]
    caption = rng.normal(size=(6, 4))
    with PartWriter(tmp_path / "db", "a", {"skipped": [], "preview_frames": 1}) as writer:
        writer.add(
            clips,
            rng.normal(size=(6, 5, 4)),
            rng.normal(size=(6, 3, 4)),
            caption / np.linalg.norm(caption, axis=1, keepdims=True),
            np.zeros((6, 1, 8, 8, 3), np.uint8),
        )
    build(tmp_path / "db", 4)
    return tmp_path / "db"


def test_references_are_the_neighbours_of_other_sources(database):
    clips = ReferenceClips(database, k=3)
    for index, clip_id in enumerate(clips.ids):
        clip = clips.read(index)
        neighbours = clips.db.neighbours(clip_id, 3)
        assert not {clips.db.clip(n)["source"] for n in neighbours} & {clips.sources[index]}
        assert torch.equal(clip["reference_motion"], clips.db.motion_features(neighbours))
        assert torch.equal(clip["target_appearance"], clips.db.appearance_features([clip_id])[0])
    batch = Part(clips, list(range(6))).__getitems__([1, 4])
    assert batch.reference_motion.shape == (2, 3, 5, 4) and batch.reference_appearance.shape == (2, 3, 3, 4)
    with pytest.raises(MotionRAGError, match="k=5"):
        ReferenceClips(database, k=5)


def test_validation_clips_are_nobodys_reference(database):
    clips = ReferenceClips(database, k=2)
    data = MotionDataModule(clips, 2, val_share=1e-9)  # one source is held out: two clips of six
    held_out = [clips.ids[i] for i in data.val_part.indices]
    assert len(held_out) == 2
    for part in (data.train_part, data.val_part):
        batch = part.__getitems__(list(range(len(part))))
        assert not set(held_out) & {i for row in batch.reference_id for i in row}
    with pytest.raises(MotionRAGError, match=r"k=3, but of the 4 neighbours .* only 2 .* neighbours=8"):
        MotionDataModule(ReferenceClips(database, k=3), 2, val_share=1e-9)


def test_shards_must_be_in_the_database(shards, database):
    with pytest.raises(MotionRAGError, match="7 of 7 clips .* are not in the database"):
        ShardClips(shards / "shards", 9, 32, 32, db=database)

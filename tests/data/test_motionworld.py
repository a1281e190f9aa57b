"""MotionWorld: what its clips promise to training, evaluation and the demo."""

import itertools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.data.motions import motions
from motionrag.data.motionworld import (
    COLOURS,
    GROUNDS,
    SHAPES,
    clip_stream,
    make_dataset,
    render,
    sample_clip,
    track_object,
)
from motionrag.data.packing import pack
from motionrag.data.shards import ShardIndex, read_shard
from motionrag.data.video import read_clip

DOMAINS = {"known": 46, "compound": 600, "curve": 1000, "new": 14}  # and how many motions each has
EVEN = dict.fromkeys(DOMAINS, 1.0)

seeds = st.integers(0, 2**32 - 1)
any_motion = st.sampled_from([motion for domain in DOMAINS for motion in motions(domain)])


def stream(n, seed=0, domains=EVEN, **options):
    return list(itertools.islice(clip_stream(seed, domains, **options), n))


def phrases(domain, held_out):
    groups = [motion.held_out if held_out else motion.phrases for motion in motions(domain)]
    return set(itertools.chain(*groups))


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "videos").iterdir()}


# ---------------------------------------------------------------- the vocabulary


def test_domains_and_their_motions():
    for domain, count in DOMAINS.items():
        assert len(motions(domain)) == count
        assert {motion.domain for motion in motions(domain)} == {domain}
    names = [motion.name for domain in DOMAINS for motion in motions(domain)]
    assert len(set(names)) == len(names)
    with pytest.raises(KeyError):
        motions("unknown")


def test_every_motion_has_words_for_training_and_others_for_testing():
    for motion in itertools.chain(*map(motions, DOMAINS)):
        assert len(motion.phrases) >= 3 and len(motion.held_out) >= 2 and motion.coarse
        assert len({*motion.phrases, *motion.held_out}) == len(motion.phrases) + len(motion.held_out)
    trained = set().union(*(phrases(domain, False) for domain in DOMAINS))
    tested = set().union(*(phrases(domain, True) for domain in DOMAINS))
    assert not trained & tested


@pytest.mark.parametrize("other", ["known", "compound", "curve"])
def test_no_words_of_new_motions_are_used_elsewhere(other):
    def words(domain):
        return phrases(domain, False) | phrases(domain, True)

    assert not words("new") & words(other)


def test_a_phrase_names_one_motion():
    for domain in ("known", "new"):
        used = Counter(text for motion in motions(domain) for text in motion.phrases + motion.held_out)
        assert not [text for text, count in used.items() if count > 1]


# ---------------------------------------------------------------- clips


def test_all_motions_render():
    rng = np.random.default_rng(0)
    for motion in itertools.chain(*map(motions, DOMAINS)):
        frames = render(sample_clip(rng, motion))
        assert frames.shape == (9, 32, 32, 3) and frames.dtype == np.uint8
        # it moves: some pixel changes by more than shading or compression could
        assert np.abs(frames.astype(int) - frames[0]).max() > 60, motion.name


@settings(max_examples=60, deadline=None)
@given(motion=any_motion, seed=seeds, frames=st.integers(2, 25), held_out=st.booleans())
def test_the_object_stays_in_the_frame(motion, seed, frames, held_out):
    clip = sample_clip(np.random.default_rng(seed), motion, frames, held_out)
    assert clip.track.shape == (frames, 4) and np.isfinite(clip.track).all()
    assert (clip.track[:, :2] > 0.169).all() and (clip.track[:, :2] < 0.831).all()
    assert (clip.looks.size * clip.track[:, 3] > 0.05).all()
    assert (clip.looks.size * clip.track[:, 3] < 0.36).all()


@settings(max_examples=60, deadline=None)
@given(motion=any_motion, seed=seeds, held_out=st.booleans())
def test_captions_say_looks_and_motion(motion, seed, held_out):
    clip = sample_clip(np.random.default_rng(seed), motion, held_out=held_out)
    assert clip.motion_caption in (motion.held_out if held_out else motion.phrases)
    first, second = clip.looks.colours
    assert first != second and {first, second} <= COLOURS.keys()
    assert clip.looks.shape in SHAPES and clip.looks.ground in GROUNDS
    article = "an" if first == "orange" else "a"  # the one name that starts with a vowel
    looks = f"{article} {first} and {second} {clip.looks.shape} on a {clip.looks.ground} background"
    assert clip.caption == f"{looks} {clip.motion_caption}"
    assert clip.coarse_caption == f"{looks} {motion.coarse}"


@settings(max_examples=20, deadline=None)
@given(motion=any_motion, seed=seeds, size=st.integers(16, 96))
def test_any_size_shows_the_same_clip(motion, seed, size):
    clip = sample_clip(np.random.default_rng(seed), motion, frames=3)
    frames = render(clip, size)
    assert frames.shape == (3, size, size, 3)
    assert np.array_equal(frames, render(clip, size))
    if size % 2 == 0:  # drawn larger and averaged it is about the same picture
        large = render(clip, 2 * size).reshape(3, size, 2, size, 2, 3).mean((2, 4))
        assert np.abs(large - frames).mean() < 3


def test_looks_do_not_depend_on_the_motion():
    slide, spin = (next(m for m in motions("known") if m.name == name) for name in ("slide right", "rock"))
    for seed in range(5):
        clips = [sample_clip(np.random.default_rng(seed), motion) for motion in (slide, spin)]
        assert clips[0].looks == clips[1].looks


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_tracker_finds_the_object(domain):
    errors = []
    for clip in stream(25, seed=1, domains={domain: 1.0}):
        true = clip.track[:, :2] * 32 - 0.5  # pixel centres
        errors.append(np.hypot(*(track_object(render(clip)) - true).T))
    errors = np.stack(errors)
    assert errors.mean(1).max() < 1  # every clip
    assert errors.mean() < 0.4


def test_the_tracker_without_an_object():
    ground = render(stream(1)[0])[:1, :1, :1].repeat(4, 0).repeat(32, 1).repeat(32, 2)
    assert np.array_equal(track_object(ground), np.full((4, 2), 15.5))
    frames = render(stream(1)[0])
    gone = np.concatenate([frames[:2], ground])
    places = track_object(gone)
    assert np.array_equal(places[2:], places[1:2].repeat(4, 0))


# ---------------------------------------------------------------- streams and files


def test_a_seed_is_a_stream():
    first, again, other = (stream(12, seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert a.caption == b.caption and a.motion.name == b.motion.name
        assert np.array_equal(render(a), render(b))
    assert [clip.caption for clip in first] != [clip.caption for clip in other]
    assert not np.array_equal(render(first[0]), render(other[0]))


def test_domains_are_drawn_by_weight():
    drawn = Counter(clip.motion.domain for clip in stream(400, domains={"known": 3.0, "new": 1.0}))
    assert drawn.keys() == {"known", "new"}
    assert 0.65 < drawn["known"] / 400 < 0.85


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        make_dataset(tmp_path / name, 4, seed, EVEN)
    one, two, three = (files(tmp_path / name) for name in ("one", "two", "three"))
    tables = [(tmp_path / name / "clips.csv").read_bytes() for name in ("one", "two", "three")]
    assert one == two and tables[0] == tables[1]
    assert one.keys() == three.keys() and tables[0] != tables[2]
    assert all(one[name] != three[name] for name in one)


def test_files_hold_what_was_rendered(tmp_path):
    make_dataset(tmp_path, 3, 7, EVEN, frames=11, size=48, fps=12)
    for clip, path in zip(stream(3, 7, frames=11), sorted((tmp_path / "videos").iterdir()), strict=True):
        read = read_clip(path)
        assert read.frames.shape == (11, 48, 48, 3) and read.fps == pytest.approx(12)
        assert np.abs(read.frames.astype(int) - render(clip, 48)).mean() < 3


def test_the_table_is_what_pack_reads(tmp_path):
    table = make_dataset(tmp_path / "world", 6, 2, EVEN, held_out=True, prefix="test")
    rows = pd.read_csv(table)
    index = pack(table, tmp_path / "world/videos", tmp_path / "shards")
    assert not index["skipped"] and not index.get("noted")
    shards = ShardIndex.open(tmp_path / "shards")
    records = [record for file in shards.files for record, _ in read_shard(file)]
    assert [record.id for record in records] == list(rows.id) == [f"test-{i:05d}" for i in range(6)]
    for record, clip in zip(records, stream(6, 2, held_out=True), strict=True):
        assert (record.caption, record.motion_caption) == (clip.caption, clip.motion_caption)
        assert (record.action, record.metadata["domain"]) == (clip.motion.name, clip.motion.domain)
        assert (record.frames, record.width, record.height, record.fps) == (9, 32, 32, 8)
    assert len({record.source for record in records}) == 6  # every clip may be a reference for every other

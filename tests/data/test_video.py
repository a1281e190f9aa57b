"""Reading and writing clips: the right frames, upright, from whole and from broken files."""

import io
import os
import pickle
import subprocess
import sys
import wave
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from motionrag.data import video
from motionrag.data.video import UnreadableVideo, Wanted, read_clip, read_clips, write_mp4
from motionrag.encoders import uniform_indices
from motionrag.errors import MotionRAGError

needs_torchcodec = pytest.mark.skipif(
    find_spec("torchcodec") is None,
    reason="torchcodec is not installed (pip install 'motionrag[torchcodec]')",
)

GREYS = np.arange(20) * 12  # the frame's number can be read off its grey value
FPS = 10


def grey_frames(height=48, width=64):
    return np.tile(GREYS.astype(np.uint8)[:, None, None, None], (1, height, width, 3))


def numbers(clip):
    """Which frames a clip made of grey frames holds."""
    return np.round(clip.frames.mean((1, 2, 3)) / 12).astype(int).tolist()


@pytest.fixture(scope="module")
def grey_mp4(tmp_path_factory):
    return write_mp4(tmp_path_factory.mktemp("video") / "grey.mp4", grey_frames(), FPS)


def write_with_stamps(path, frames, stamps, **options):
    """An mp4 whose frames are shown at ``stamps`` (of 1/1000 s)."""
    with av.open(str(path), "w", **options) as box:
        stream = box.add_stream("libx264", rate=25)
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for picture, stamp in zip(frames, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return path


# ---------------------------------------------------------------- which frames


@given(total=st.integers(1, 5000), count=st.integers(1, 64))
def test_uniform_indices_reach_from_first_to_last_in_even_steps(total, count):
    chosen = uniform_indices(total, count)
    assert len(chosen) == count
    assert chosen[0] == 0
    assert all(0 <= i < total for i in chosen)
    if count > 1:
        assert chosen[-1] == total - 1
        steps = np.diff(chosen)
        assert steps.min() >= 0
        assert steps.max() - steps.min() <= 2


def test_uniform_indices_round_halves_to_even():
    assert uniform_indices(8, 16) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert uniform_indices(2, 3) == [0, 0, 1]  # 0.5 -> 0
    assert uniform_indices(4, 3) == [0, 2, 3]  # 1.5 -> 2


@settings(max_examples=40, deadline=None)
@given(
    start=st.none() | st.integers(0, 15),
    length=st.none() | st.integers(1, 20),
    frames=st.none() | st.integers(1, 30),
)
def test_a_span_gives_its_frames(grey_mp4, start, length, frames):
    end = None if length is None else (start or 0) + length
    clip = read_clip(
        grey_mp4, None if start is None else start / FPS, None if end is None else end / FPS, frames=frames
    )
    span = list(range(20))[slice(start, end)]
    chosen = span if frames is None else [span[i] for i in uniform_indices(len(span), frames)]
    assert numbers(clip) == chosen
    assert clip.decoded == len(span)
    assert clip.note == ""
    if len(span) > 1:
        assert clip.fps == pytest.approx(FPS)
        assert clip.duration == pytest.approx(len(span) / FPS)


@settings(max_examples=40, deadline=None)
@given(fps=st.floats(1, 30), frames=st.none() | st.integers(1, 40))
def test_a_rate_gives_the_frames_nearest_in_time(grey_mp4, fps, frames):
    clip = read_clip(grey_mp4, frames=frames, fps=fps)
    assert len(clip.frames) == (frames or round(20 / FPS * fps))
    moments = np.arange(len(clip.frames)) / fps * FPS
    for number, moment in zip(numbers(clip), moments, strict=True):
        assert abs(number - min(moment, 19)) <= 0.5 + 1e-6
    missing = max(0, len(clip.frames) - round(20 / FPS * fps))
    assert clip.note == (
        f"{missing} of {frames} frames repeat the last one: the clip is too short" if missing else ""
    )


def test_uneven_time_stamps_count_not_frame_numbers(tmp_path):
    stamps = [0, 40, 80, 120, 1000, 1040, 1080, 2000]
    path = write_with_stamps(tmp_path / "uneven.mp4", grey_frames()[:8], stamps)
    clip = read_clip(path, fps=1)
    assert numbers(clip) == [0, 4]
    assert clip.fps == pytest.approx(7 / 2)  # measured, not the stated 25
    assert numbers(read_clip(path, start_sec=0.9, end_sec=1.06)) == [4, 5]


def test_the_first_time_stamp_need_not_be_zero(tmp_path):
    path = write_with_stamps(tmp_path / "late.mp4", grey_frames()[:6], [5000 + 100 * i for i in range(6)])
    assert numbers(read_clip(path, end_sec=0.3)) == [0, 1, 2]


def test_bytes_read_as_a_file_does(grey_mp4):
    of_file, of_bytes = read_clip(grey_mp4, frames=5), read_clip(grey_mp4.read_bytes(), frames=5)
    np.testing.assert_array_equal(of_file.frames, of_bytes.frames)
    assert of_file.fps == of_bytes.fps


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Sixty frames of noise that moves, key frames 12 apart, with frames that refer to later ones: closed, open GOPs."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 200, 3), dtype=np.uint8)
    frames = np.stack([noise[:, 2 * i : 2 * i + 64] for i in range(60)])
    folder, paths = tmp_path_factory.mktemp("moving"), []
    for name in ("closed", "open"):
        with av.open(str(folder / f"{name}.mp4"), "w", options={"movflags": "faststart"}) as box:
            stream = box.add_stream("libx264", rate=FPS)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            stream.options = {"g": "12", "bf": "3", "x264-params": f"open-gop={int(name == 'open')}"}
            for frame in frames:
                box.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            box.mux(stream.encode())
        paths.append(folder / f"{name}.mp4")
    return paths


@settings(max_examples=20, deadline=None)
@given(wanted=st.sets(st.integers(0, 59), min_size=1, max_size=6), kind=st.integers(0, 1))
def test_decoding_only_what_is_needed_gives_the_same_pictures(moving, wanted, kind):
    path = moving[kind]
    some = video._decode_some(path, "x", wanted, video._packets(path, "x"), None)
    whole = video._decode(path, "x", wanted, None, None)
    if (
        some is None
    ):  # a frame shown before the key frame that comes before it in the file: read from the start
        assert kind == 1 and min(wanted) % 12 in (9, 10, 11)
        return
    assert some.times == whole.times and some.pictures.keys() == whole.pictures.keys()
    for number, picture in whole.pictures.items():
        np.testing.assert_array_equal(some.pictures[number], picture)


@settings(max_examples=25, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.floats(0, 5), st.none() | st.floats(0.5, 6), st.none() | st.integers(1, 9)),
        min_size=1,
        max_size=4,
    ),
    kind=st.sampled_from(["closed", "open", "cut"]),
    fps=st.none() | st.sampled_from([4, 8]),
)
def test_several_clips_of_a_file_are_those_read_one_by_one(moving, spans, kind, fps):
    source = moving[kind == "open"].read_bytes()
    source = source[: len(source) * 9 // 10] if kind == "cut" else source
    wanted = [Wanted(start, end and start + end, frames, fps) for start, end, frames in spans]
    alone = []
    for want in wanted:
        try:
            alone.append(read_clip(source, *want))
        except UnreadableVideo as error:
            with pytest.raises(UnreadableVideo, match="no frames between"):
                read_clips(source, wanted)
            assert "no frames between" in str(error)
            return
    for one, other in zip(alone, read_clips(source, wanted), strict=True):
        if kind == "cut":  # how much of it is damaged is known to those who have read so far
            np.testing.assert_array_equal(one.frames, other.frames)
        else:
            assert_same(one, other)


class Counted:
    """A container that counts the frames it decodes."""

    def __init__(self, container, counts):
        self.container, self.counts = container, counts

    def __enter__(self):
        self.container.__enter__()
        return self

    def __exit__(self, *error):
        return self.container.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.container, name)

    def demux(self, stream):
        self.counts.append(0)
        for packet in self.container.demux(stream):
            self.counts[-1] += 1
            yield packet


def test_frames_before_the_key_frame_and_after_the_last_one_are_not_decoded(moving, monkeypatch):
    counts, open_file = [], video._open
    monkeypatch.setattr(video, "_open", lambda *args: Counted(open_file(*args), counts))
    clip = read_clip(
        moving[0], start_sec=3.0, fps=5, frames=4
    )  # frames 30, 32, 34, 36 after the key frame 24
    assert len(clip.frames) == 4 and clip.decoded == 30 and clip.duration == pytest.approx(3)
    assert counts[0] == 61 and counts[1] < 20  # all of them counted; 13 and those that the decoder holds back


def test_clips_that_overlap_are_decoded_once(moving, monkeypatch):
    counts, open_file = [], video._open
    monkeypatch.setattr(video, "_open", lambda *args: Counted(open_file(*args), counts))
    read_clips(moving[0], [Wanted(3.0, None, 4, 5), Wanted(3.2, None, 4, 5), Wanted(3.4, 4.0)])
    assert len(counts) == 2 and counts[0] == 61 and counts[1] < 24


def test_a_wrong_promise_is_noticed(moving):
    packets = video._packets(moving[0], "x")
    for stamps in (packets.stamps[1:], [s + 1 for s in packets.stamps], [None, *packets.stamps[1:]]):
        assert video._decode_some(moving[0], "x", {5}, replace(packets, stamps=stamps), None) is None


def test_an_empty_span_is_an_error(grey_mp4):
    with pytest.raises(UnreadableVideo, match=r"grey.mp4: no frames between 7 and the end s; .* 1\.90 s"):
        read_clip(grey_mp4, start_sec=7)


# ---------------------------------------------------------------- pictures


def test_mp4_round_trip_keeps_the_picture(tmp_path):
    y, x = np.mgrid[:48, :64]
    frames = np.stack([np.stack([x * 3 + i, y * 4, 0 * x + 99], -1) for i in range(6)]).astype(np.uint8)
    clip = read_clip(write_mp4(tmp_path / "a.mp4", frames, 8))
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == frames.shape
    assert clip.fps == pytest.approx(8)
    assert np.abs(clip.frames.astype(int) - frames).mean() < 3


def test_same_frames_same_bytes(tmp_path):
    a, b = (write_mp4(tmp_path / f"{name}.mp4", grey_frames(), 8).read_bytes() for name in "ab")
    assert a == b


def test_same_bytes_whatever_was_in_memory(tmp_path):
    # glibc fills new memory with this byte: an encoder that reads what it has not set gives itself away
    write = (
        "import sys, numpy as np; from motionrag.data.video import write_mp4\n"
        "frames = np.random.default_rng(0).integers(0, 255, (24, 8, 12, 3), dtype=np.uint8)\n"
        "write_mp4(sys.argv[1], frames.repeat(12, 1).repeat(12, 2), 8)"
    )
    written = set()
    for fill in ("85", "170"):
        path = tmp_path / f"{fill}.mp4"
        subprocess.run(
            [sys.executable, "-c", write, path], env=os.environ | {"MALLOC_PERTURB_": fill}, check=True
        )
        written.add(path.read_bytes())
    assert len(written) == 1


def test_odd_sides_are_padded(tmp_path):
    clip = read_clip(write_mp4(tmp_path / "odd.mp4", grey_frames(47, 63), FPS))
    assert clip.frames.shape == (20, 48, 64, 3)
    assert numbers(clip) == list(range(20))


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)]
)
def test_write_refuses_other_arrays(tmp_path, frames):
    with pytest.raises(ValueError, match="expected uint8 frames"):
        write_mp4(tmp_path / "x.mp4", frames, 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "expected"), [((48, 64), (24, 32)), ((64, 48), (32, 24)), ((48, 48), (24, 24))]
)
def test_short_side(tmp_path, size, expected):
    path = write_mp4(tmp_path / "a.mp4", grey_frames(*size), FPS)
    clip = read_clip(path, frames=2, short_side=24)
    assert clip.frames.shape == (2, *expected, 3)
    assert (clip.height, clip.width) == size


def rotated(tmp_path):
    """A video of 32 x 64, white in the upper left as stored, that is to be shown turned clockwise."""
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = 255
    data = bytearray(write_mp4(tmp_path / "a.mp4", frames, 8).read_bytes())
    # The track header's display matrix, 44 bytes after its name: a quarter turn clockwise.
    matrix = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = matrix
    return bytes(data)


def test_rotation_is_applied(tmp_path):
    clip = read_clip(rotated(tmp_path), short_side=32)
    assert clip.frames.shape == (3, 64, 32, 3)
    assert (clip.height, clip.width) == (64, 32)
    assert clip.frames[0, :32, 16:].mean() > 240  # upper right when upright
    assert clip.frames[0, 32:].mean() < 15


def test_the_picture_is_found_behind_a_sound_stream(tmp_path):
    path = tmp_path / "sound_first.mkv"
    with av.open(str(path), "w") as box:
        sound = box.add_stream("pcm_s16le", rate=8000, layout="mono")
        picture = box.add_stream("libx264", rate=FPS)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        noise.rate = 8000
        box.mux(sound.encode(noise))
        for frame in grey_frames():
            box.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(picture.encode())
    assert numbers(read_clip(path)) == list(range(20))


# ---------------------------------------------------------------- broken files


def cut(tmp_path):
    """Thirty frames of noise, the last third of the file gone."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
    data = write_mp4(tmp_path / "a.mp4", noise, FPS).read_bytes()
    return data[: len(data) * 2 // 3]


def test_a_cut_file_gives_what_is_there_and_a_note(tmp_path):
    clip = read_clip(cut(tmp_path), frames=8)
    assert 5 < clip.decoded < 30
    assert clip.note == f"stops after {clip.decoded} of 30 frames: damaged data"
    assert len(clip.frames) == 8


def sound_only():
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 8000)
    return data.getvalue()


def picture(kind):
    data = io.BytesIO()
    Image.new("RGB", (40, 30)).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty file \(0 bytes\)"),
        (b"these are words, not pictures\n" * 40, "not a readable video"),
        (sound_only(), "sound only, no video stream"),
        (picture("PNG"), "a still picture, not a video"),
        (picture("JPEG"), "a still picture, not a video"),
    ],
    ids=["empty", "text", "sound", "png", "jpeg"],
)
def test_unreadable_data_says_why(tmp_path, data, reason):
    (tmp_path / "x.mp4").write_bytes(data)
    for source in (tmp_path / "x.mp4", data):
        with pytest.raises(UnreadableVideo, match=reason) as error:
            read_clip(source)
        assert "\n" not in str(error.value)


def test_missing_files_and_folders_say_so(tmp_path):
    with pytest.raises(UnreadableVideo, match=r"nope.mp4: missing file"):
        read_clip(tmp_path / "nope.mp4")
    with pytest.raises(UnreadableVideo, match="not a file"):
        read_clip(tmp_path)


def test_the_error_survives_a_process_border():
    error = pickle.loads(pickle.dumps(UnreadableVideo("a.mp4", "missing file")))
    assert str(error) == "a.mp4: missing file"


# ---------------------------------------------------------------- torchcodec


def test_a_decoder_that_is_not_there_is_named(grey_mp4, monkeypatch):
    with pytest.raises(MotionRAGError, match="decoder=opencv: expected one of pyav, torchcodec"):
        read_clip(grey_mp4, decoder="opencv")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    video._torchcodec.cache_clear()
    with pytest.raises(
        MotionRAGError, match=r"^decoder=torchcodec: it does not work here .*choose decoder=pyav$"
    ):
        read_clip(grey_mp4, decoder="torchcodec")
    with pytest.raises(ValueError, match="short_side is for decoder='pyav'"):
        monkeypatch.setattr(video, "_torchcodec", lambda: None)
        read_clip(grey_mp4, short_side=16, decoder="torchcodec")


def both(source, monkeypatch, **options):
    """A clip by both decoders; how often torchcodec's pictures were used."""
    used, decode = [], video._decode_by_torchcodec

    def count(*args):
        used.append(decode(*args))
        return used[-1]

    monkeypatch.setattr(video, "_decode_by_torchcodec", count)
    clips = [read_clip(source, **options, decoder=decoder) for decoder in video.DECODERS]
    return *clips, sum(decoded is not None for decoded in used)


def assert_same(clip, other):
    np.testing.assert_array_equal(clip.frames, other.frames)
    assert replace(clip, frames=None) == replace(other, frames=None)


@needs_torchcodec
@pytest.mark.parametrize("kind", [0, 1], ids=["closed", "open"])
def test_torchcodec_gives_the_same_frames(moving, kind, monkeypatch):
    for options in (
        {"frames": 16},
        {"start_sec": 2.0, "end_sec": 4.5},
        {"start_sec": 1.1, "fps": 4, "frames": 30},
    ):
        clip, other, used = both(moving[kind], monkeypatch, **options)
        assert used == 1
        assert_same(clip, other)


@needs_torchcodec
def test_torchcodec_turns_pictures_and_takes_odd_sides(tmp_path, monkeypatch):
    odd = write_mp4(tmp_path / "odd.mp4", grey_frames(47, 63), FPS, pix_fmt="yuv444p")
    late = write_with_stamps(tmp_path / "late.mp4", grey_frames()[:6], [5000, 5100, 5200, 5300, 5900, 6000])
    for source, size in ((rotated(tmp_path), (64, 32)), (odd, (47, 63)), (late, (48, 64))):
        clip, other, used = both(source, monkeypatch)
        assert used == 1 and (other.height, other.width) == size
        assert_same(clip, other)


@needs_torchcodec
def test_what_is_damaged_is_told_in_the_same_words(tmp_path, monkeypatch):
    clip, other, used = both(cut(tmp_path), monkeypatch, frames=8)
    assert used == 0 and "damaged data" in other.note
    assert_same(clip, other)
    for data in (b"", b"words\n" * 40, sound_only(), picture("PNG")):
        told = []
        for decoder in video.DECODERS:
            with pytest.raises(UnreadableVideo) as error:
                read_clip(data, decoder=decoder)
            told.append(str(error.value))
        assert told[0] == told[1]


@needs_torchcodec
def test_a_frame_that_is_not_the_promised_one_is_not_used(moving):
    packets = video._packets(moving[0], "x")
    assert video._decode_by_torchcodec(moving[0], {5, 9}, packets) is not None
    for wrong in (
        replace(packets, times=packets.times[1:]),
        replace(packets, times=[t + 0.1 for t in packets.times]),
        replace(packets, stamps=[None, *packets.stamps[1:]]),
        replace(packets, format="avi"),
    ):
        assert video._decode_by_torchcodec(moving[0], {5, 9}, wrong) is None

"""Read clips out of any video file, and write mp4 files: PyAV with the traps of real files handled.

Shapes: ``T`` frames, ``H`` x ``W`` pixels; pictures are uint8 RGB in 0..255, upright.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from motionrag.encoders import uniform_indices
from motionrag.errors import MotionRAGError
from motionrag.io import atomic_path

#: Two time stamps closer than this are the same moment (the coarsest container clock ticks every 10 ms).
_SAME_MOMENT = 1e-3

#: What decodes the pictures. torchcodec does so with the FFmpeg of this machine, PyAV with the one that it brings.
DECODERS = ("pyav", "torchcodec")

#: Demuxers that make a "video" out of plain text, or out of one picture (those of single formats: png_pipe ...).
_TEXT_FORMATS = {"tty"}
_PICTURE_FORMATS = {"image2", "ico"}


class UnreadableVideo(MotionRAGError):
    """No frame can be had from a file. The message is ``name: reason``; ``reason`` alone is an attribute."""

    def __init__(self, name: str, reason: str = "") -> None:  # one argument: how worker processes pass it on
        super().__init__(f"{name}: {reason}" if reason else name)
        self.reason = reason or name


@dataclass(frozen=True)
class Clip:
    """Frames of one span of a video.

    frames: uint8 (T,H,W,3) RGB, upright. fps: measured frame rate of the source (0 for a single frame
    without a stated rate). decoded: how many frames the span holds, of which ``frames`` is a choice.
    width, height: upright size of the source. note: what is not as it should be, "" when all is well.
    """

    frames: np.ndarray
    fps: float
    decoded: int
    width: int
    height: int
    note: str = ""

    @property
    def duration(self) -> float:
        """Length of the span in seconds, the last frame's own time included; 0 when the rate is unknown."""
        return self.decoded / self.fps if self.fps else 0.0


def read_clip(
    source: str | Path | bytes,
    start_sec: float | None = None,
    end_sec: float | None = None,
    frames: int | None = None,
    fps: float | None = None,
    short_side: int | None = None,
    decoder: str = "pyav",
) -> Clip:
    """Decode a clip, converting only the frames that are wanted.

    source: a path, or the bytes of a whole file. start_sec, end_sec: the span ``start <= t < end`` in
    seconds after the first frame; None means from the beginning, to the end. Then

    - neither frames nor fps: every frame of the span;
    - frames: that many, spread uniformly (see :func:`motionrag.encoders.uniform_indices`);
    - fps: from the start at that rate, for each moment the frame nearest in time; with ``frames`` exactly
      that many, the last one repeated if the source is too short (the note says so).

    short_side: resize so that the shorter side has this many pixels (the other one rounded).
    decoder: of DECODERS. torchcodec takes frames by their time stamps: what is damaged, and files without good ones (AVI),
    go through PyAV all the same, so frames, errors and notes are the same ones.

    Frames come in decode order, which is right also where time stamps are not. Rates are measured from the
    time stamps: stated ones are often wrong. A damaged file gives the frames before the damage and a note.
    Raises :class:`UnreadableVideo` when there is no frame to give, :class:`MotionRAGError` for a decoder that is not
    there and ``ValueError`` for ``short_side`` under torchcodec.
    """
    return read_clips(source, [Wanted(start_sec, end_sec, frames, fps)], short_side, decoder)[0]


class Wanted(NamedTuple):
    """What is wanted of a file, as :func:`read_clip` takes it."""

    start_sec: float | None = None
    end_sec: float | None = None
    frames: int | None = None
    fps: float | None = None


def read_clips(
    source: str | Path | bytes,
    wanted: Sequence[Wanted],
    short_side: int | None = None,
    decoder: str = "pyav",
) -> list[Clip]:
    """Several clips of one file in one pass over it, each as :func:`read_clip` gives it; frames that several want are
    decoded once. All frames wanted are in memory together. Raises like it, also if only one clip cannot be had."""
    check_decoder(decoder)
    if decoder == "torchcodec" and short_side is not None:
        raise ValueError("short_side is for decoder='pyav'; torchcodec gives pictures at their own size")
    name = "video data" if isinstance(source, bytes) else Path(source).name
    if not isinstance(source, bytes):
        if not Path(source).exists():
            raise UnreadableVideo(name, "missing file")
        if not Path(source).is_file():
            raise UnreadableVideo(name, "not a file")
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if size == 0:
        raise UnreadableVideo(name, "empty file (0 bytes)")

    # The packets, which cost nothing to count, tell which frames will be wanted; decoding decides. Where
    # the two disagree (damage, hidden frames) the file is decoded again, from its start.
    packets = _packets(source, name)
    ends = [want.end_sec for want in wanted]
    end = None if None in ends else max(ends)
    choice = {number for want in wanted for number in _choose(packets.times, want)[0]}
    decoded = None
    if choice and decoder == "torchcodec":
        decoded = _decode_by_torchcodec(source, choice, packets)
    elif choice:
        decoded = _decode_some(source, name, choice, packets, short_side)
    if decoded is None:
        decoded = _decode(source, name, choice, end, short_side)
    if not decoded.times:
        reason = f"damaged data: {decoded.error}" if decoded.error else "no frame can be decoded"
        raise UnreadableVideo(name, reason)
    chosen = [_choose(decoded.times, want) for want in wanted]
    for want, (_, span) in zip(wanted, chosen, strict=True):
        if not span:
            raise UnreadableVideo(
                name,
                f"no frames between {want.start_sec or 0:g} and "
                f"{'the end' if want.end_sec is None else f'{want.end_sec:g}'} s; the last frame is at "
                f"{decoded.times[-1]:.2f} s",
            )
    right_choice = {number for numbers, _ in chosen for number in numbers}
    if not right_choice <= decoded.pictures.keys():
        decoded = _decode(source, name, right_choice, end, short_side)

    clips = []
    for want, (numbers, span) in zip(wanted, chosen, strict=True):
        notes = []
        if decoded.error:
            notes.append(f"stops after {len(decoded.times)} of {packets.announced} frames: damaged data")
        if want.fps and want.frames:
            missing = want.frames - _frames_at_rate(decoded.times, span, want.fps)
            if missing > 0:
                notes.append(f"{missing} of {want.frames} frames repeat the last one: the clip is too short")
        clips.append(
            Clip(
                frames=np.stack([decoded.pictures[i] for i in numbers]),
                fps=_rate(decoded.times, span, decoded.stated_fps),
                decoded=len(span),
                width=decoded.width,
                height=decoded.height,
                note="; ".join(notes),
            )
        )
    return clips


def check_decoder(decoder: str) -> None:
    """Raise MotionRAGError unless clips can be decoded by it here."""
    if decoder not in DECODERS:
        raise MotionRAGError(f"decoder={decoder}: expected one of {', '.join(DECODERS)}")
    if decoder == "torchcodec":
        _torchcodec()


def write_mp4(
    path: str | Path, frames: np.ndarray, fps: float, pix_fmt: str = "yuv420p", crf: int = 16
) -> Path:
    """Write uint8 RGB ``frames`` (T,H,W,3) as H.264/mp4 in one step; the same frames give the same bytes.

    Sides that the pixel format cannot hold (odd ones under yuv420p) are padded by repeating the edge.
    Raises ``ValueError`` for frames of another shape or type.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"expected uint8 frames (T,H,W,3), T > 0, got {frames.dtype} {frames.shape}")
    if "420" in pix_fmt:
        odd_height, odd_width = frames.shape[1] % 2, frames.shape[2] % 2
        frames = np.pad(frames, ((0, 0), (0, odd_height), (0, odd_width), (0, 0)), mode="edge")
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", options={"movflags": "faststart"}) as box,
    ):
        stream = box.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.thread_count = 1  # the bytes depend on the number of threads
        # frequent key frames: cheap seeks; x264's macroblock tree reads memory that it has not set, so that the
        # same frames now and then gave other bytes
        stream.options = {"crf": str(crf), "g": "30", "mbtree": "0"}
        for picture in frames:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        box.mux(stream.encode())
    return Path(path)


@dataclass
class _Decoded:
    times: list[float]  # of all frames, in seconds after the first
    pictures: dict[int, np.ndarray]  # the wanted ones, by frame number
    stated_fps: float
    width: int = 0
    height: int = 0
    error: str = ""


def _open(source: str | Path | bytes, name: str) -> av.container.InputContainer:
    """Open tolerantly (names in files need not be UTF-8) and make sure that there is a picture to decode."""
    # A playlist is a text that names other files; only the file itself is to be read.
    options = {"protocol_whitelist": "file"}
    target = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        container = av.open(target, metadata_errors="ignore", options=options)
    except (av.FFmpegError, OSError) as error:
        raise UnreadableVideo(name, f"not a readable video ({_text(error)})") from error
    if not container.streams.video:
        has_sound = bool(container.streams.audio)
        container.close()
        raise UnreadableVideo(name, f"{'sound only, ' if has_sound else ''}no video stream")
    kind = container.format.name
    if kind in _TEXT_FORMATS or kind in _PICTURE_FORMATS or kind.endswith("_pipe"):
        container.close()
        raise UnreadableVideo(name, f"a {'text' if kind in _TEXT_FORMATS else 'still picture'}, not a video")
    container.streams.video[0].thread_count = 1  # fastest in total when many processes decode
    return container


@dataclass
class _Packets:
    stamps: list[int | None]
    times: list[float]  # of the frames, as the packets promise them
    announced: int  # frames
    format: str  # of the file
    stream: int  # its number in the file
    stated_fps: float

    @property
    def found_by_time(self) -> bool:
        """Whether every frame has a time stamp of its own."""
        return None not in self.stamps and len(set(self.stamps)) == len(self.stamps)


def _packets(source: str | Path | bytes, name: str) -> _Packets:
    stamps = []
    with _open(source, name) as container:
        stream = container.streams.video[0]
        announced = stream.frames
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    stamps.append(packet.pts)
        except av.FFmpegError:
            pass  # decoding meets the same damage and reports it
        fps = float(stream.average_rate or 0)
        announced = max(announced, len(stamps))
        kind = container.format.name
        return _Packets(stamps, _times(stamps, stream), announced, kind, stream.index, fps)


def _times(stamps: list[int | None], stream: av.video.stream.VideoStream) -> list[float]:
    """Seconds after the first frame for frames in decode order.

    Sorted, because some files number frames out of order; counted by the stated rate if stamps are missing.
    """
    if any(stamp is None for stamp in stamps) or len(set(stamps)) < len(stamps):
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        return [i / rate for i in range(len(stamps))]
    ordered = sorted(stamps)
    return [float((stamp - ordered[0]) * stream.time_base) for stamp in ordered]


def _choose(times: list[float], want: Wanted) -> tuple[list[int], range]:
    """Numbers of the wanted frames, and the frame numbers of the span (both empty if it holds none)."""
    start, end, frames, fps = want
    low = np.searchsorted(times, (start or 0.0) - _SAME_MOMENT)
    high = len(times) if end is None else np.searchsorted(times, end - _SAME_MOMENT)
    span = range(int(low), int(high))
    if not span:
        return [], span
    if fps is None:
        picked = range(len(span)) if frames is None else uniform_indices(len(span), frames)
        return [span[i] for i in picked], span
    moments = times[span[0]] + np.arange(frames or _frames_at_rate(times, span, fps)) / fps
    inside = np.asarray(times[span.start : span.stop])
    nearest = np.abs(inside - moments[:, None]).argmin(axis=1)
    return [span[int(i)] for i in nearest], span


def _frames_at_rate(times: list[float], span: range, fps: float) -> int:
    """How many frames ``fps`` per second the span has, its last frame shown for as long as the others."""
    length = times[span[-1]] - times[span[0]]
    if len(span) > 1:
        length += length / (len(span) - 1)
    return max(1, round(length * fps))


def _rate(times: list[float], span: range, stated: float) -> float:
    length = times[span[-1]] - times[span[0]]
    return (len(span) - 1) / length if length else stated


def _decode_some(
    source: str | Path | bytes, name: str, wanted: set[int], packets: _Packets, short_side: int | None
) -> _Decoded | None:
    """Decode from the key frame before the first wanted frame to the last one, and no more.

    None if that does not go as the packets promise: frames are missing, out of order or damaged.
    """
    if not packets.found_by_time:
        return None
    stamps = sorted(packets.stamps)
    numbers = {stamp: number for number, stamp in enumerate(stamps)}
    first, last = min(wanted), max(wanted)
    before = None
    with _open(source, name) as container:
        stream = container.streams.video[0]
        result = _Decoded(packets.times, {}, packets.stated_fps)
        convert = _Converter(result, short_side)
        try:
            if first:
                container.seek(stamps[first], stream=stream)
            for packet in container.demux(stream):
                # A frame that no other refers to is decoded only if it is wanted: the others stay bit for bit.
                needed = packet.pts is None or numbers.get(packet.pts) in wanted
                stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
                for frame in packet.decode():
                    if before is None and not frame.key_frame:
                        continue  # it refers to frames that were not read
                    number = numbers.get(frame.pts)
                    if number is None or (before is not None and number <= before) or frame.is_corrupt:
                        return None
                    before = number
                    if number in wanted:
                        result.pictures[number] = convert(frame)
                if before is not None and before >= last:
                    break
        except av.FFmpegError:
            return None
    return result if result.pictures.keys() == wanted else None


def _decode_by_torchcodec(source: str | Path | bytes, choice: set[int], packets: _Packets) -> _Decoded | None:
    """The same by torchcodec, whose frames are numbered by their time stamps, too."""
    # AVI has no time stamps; those made up for it may swap frames
    if not packets.found_by_time or packets.format == "avi":
        return None
    wanted = sorted(choice)
    target = source if isinstance(source, bytes) else str(source)
    try:
        file = _torchcodec()(target, stream_index=packets.stream, dimension_order="NHWC")
        if len(file) != len(packets.times):
            return None
        found = file.get_frames_at(wanted)
    except (RuntimeError, ValueError, IndexError):  # what it says of damaged files
        return None
    times = found.pts_seconds.numpy() - file.metadata.begin_stream_seconds
    if np.abs(times - np.asarray(packets.times)[wanted]).max() > _SAME_MOMENT:
        return None
    pictures = found.data.numpy()
    height, width = pictures.shape[1:3]
    return _Decoded(
        packets.times, dict(zip(wanted, pictures, strict=True)), packets.stated_fps, width, height
    )


@cache
def _torchcodec() -> Callable[..., Any]:
    """torchcodec's decoder, once it has decoded something: some versions can be imported without their libraries."""
    try:
        from torchcodec.decoders import VideoDecoder

        with tempfile.TemporaryDirectory() as folder:
            VideoDecoder(str(write_mp4(Path(folder) / "black.mp4", np.zeros((1, 16, 16, 3), np.uint8), 1)))[0]
    except (ImportError, OSError, RuntimeError) as error:
        raise MotionRAGError(
            f"decoder=torchcodec: it does not work here ({' '.join(str(error).split())[:120]}); install a version for "
            f"this torch (pip install 'motionrag[torchcodec]', of a CPU's torch 'torchcodec<0.14') and FFmpeg's shared "
            "libraries, or choose decoder=pyav"
        ) from error
    return VideoDecoder


def _decode(
    source: str | Path | bytes, name: str, wanted: set[int], end: float | None, short_side: int | None
) -> _Decoded:
    """Decode up to the first error (a decoder that goes on after one invents pictures)."""
    stamps: list[int | None] = []
    with _open(source, name) as container:
        stream = container.streams.video[0]
        result = _Decoded([], {}, float(stream.average_rate or 0))
        convert = _Converter(result, short_side)
        first = None
        try:
            for frame in container.decode(stream):
                if not stamps:
                    first = frame.time
                if len(stamps) in wanted:
                    result.pictures[len(stamps)] = convert(frame)
                stamps.append(frame.pts)
                # A second of grace: time stamps may be out of order.
                if None not in (end, first, frame.time) and frame.time - first > end + 1:
                    break
        except av.FFmpegError as error:
            result.error = _text(error)
        result.times = _times(stamps, stream)
    return result


class _Converter:
    """Frames to upright pictures, all turned and scaled as the first one; its upright size goes into `result`."""

    def __init__(self, result: _Decoded, short_side: int | None) -> None:
        self.result, self.short_side = result, short_side
        self.scaler = av.video.reformatter.VideoReformatter()
        self.turns: int | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        if self.turns is None:
            self.turns = round(frame.rotation / 90) % 4
            self.size = _scaled(frame.width, frame.height, self.short_side)
            upright = (frame.height, frame.width) if self.turns % 2 else (frame.width, frame.height)
            self.result.width, self.result.height = upright
        # threads=1: more of them deadlock in forked workers
        rgb = self.scaler.reformat(frame, *self.size, format="rgb24", interpolation="AREA", threads=1)
        return np.rot90(rgb.to_ndarray(), self.turns)


def _scaled(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    if short_side is None:
        return width, height
    scale = short_side / min(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

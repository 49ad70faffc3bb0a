"""Sound files and arrays as samples: one channel, 16 kHz, float32, within limits.

Owns the limits in bytes, seconds, channels and rates, and the official order of work: the mean of all channels, then the rate.
soundfile decodes and soxr resamples; both are imported when the first sound comes. Refuses to know frames. Read `audio.py` next.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemcutter.errors import RequestError, spell_value
from gemcutter.media.source_bytes import read_bytes

if TYPE_CHECKING:
    from soundfile import SoundFile

    SoundSource = str | Path | bytes | bytearray | memoryview | tuple[np.ndarray, int]
else:
    SoundSource = object  # checked, not trusted

RATE = 16_000  # samples a second that models hear
MAX_SECONDS = 30
MAX_SAMPLES = MAX_SECONDS * RATE
PADDING_S = 0.1  # beyond MAX_SECONDS, which encoders add to fill their last blocks; cut off
MAX_FILE_BYTES = 64 << 20
MAX_CHANNELS = 64
RATES = range(1_000, 384_001)
LOUDEST = 100.0  # full scale is 1; beyond this samples are counted in another unit, or are damaged
# What is decoded, by libsndfile's names.
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3")
KNOWN_FORMATS = "WAV, FLAC, Ogg or MP3"
BLOCK_VALUES = 1 << 18  # that are decoded at a time
INTEGERS = {"int16": 1 << 15, "int32": 1 << 31}  # dtypes of arrays, and the value that is full scale
FLOATS = ("float32", "float64")


def read_samples(source: SoundSource, name: str = "audio") -> np.ndarray:
    """Return the samples [T] of a sound, float32, RATE of them a second and MAX_SAMPLES at most.

    Raises RequestError, which begins with `name`, for what is no sound, is damaged, holds nothing or what is not finite, or
    exceeds MAX_FILE_BYTES, MAX_SECONDS, MAX_CHANNELS or RATES.
    """
    found, rate = _of_array(source, name) if isinstance(source, tuple | np.ndarray) else _of_file(source, name)
    if not len(found):
        raise RequestError(f"{name}: no samples; there is nothing to hear")
    if not np.isfinite(found).all():
        raise RequestError(f"{name}: samples that are not finite; is it damaged?")
    if (peak := float(np.abs(found).max())) > LOUDEST:
        raise RequestError(f"{name}: samples of up to {peak:.3g}; as floating-point numbers they reach from -1 to 1")
    return np.ascontiguousarray(_resample(found, rate)[:MAX_SAMPLES])


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return samples at RATE, as many as their time has, rounded up."""
    if rate == RATE:
        return samples
    import soxr

    count = -(-len(samples) * RATE // rate)
    made = np.asarray(soxr.resample(samples, rate, RATE, quality="HQ"), np.float32)
    return np.pad(made, (0, max(0, count - len(made))))[:count]


# ---- files ----


def _of_file(source: object, name: str) -> tuple[np.ndarray, int]:
    """Return a file's samples [T], the mean of its channels, and its rate."""
    with opened(source, name) as file:
        most, found, count = _most_samples(file.samplerate), list[np.ndarray](), 0
        for block in blocks(file, name):
            count += len(block)
            if count > most:
                raise _too_long(name)
            found.append(block)
        return np.concatenate(found) if found else np.empty(0, np.float32), file.samplerate


@contextmanager
def opened(source: object, name: str) -> Iterator[SoundFile]:
    """Open a sound for `blocks`. Raises RequestError, which begins with `name`, for what is no sound or is damaged."""
    data = read_bytes(source, name, "or a pair of a numpy array and its rate", MAX_FILE_BYTES)
    _refuse_by_name(data, name)
    import soundfile

    try:
        with soundfile.SoundFile(_BytesFile(data)) as file:
            if file.format not in FORMATS:
                raise RequestError(f"{name}: {file.format} files are not read; give {KNOWN_FORMATS}")
            _check_rate(file.samplerate, name)
            _check_channels(file.channels, name)
            yield file
    except RequestError:
        raise
    except soundfile.LibsndfileError as error:
        if error.code == 1:  # of an unknown format
            raise RequestError(f"{name}: no sound that can be read; give {KNOWN_FORMATS}") from None
        raise _damaged(name, error.error_string) from error
    except Exception as error:  # the file is a stranger's, and decoders raise whatever they meet
        raise _damaged(name, f"{type(error).__name__}: {error}") from error


def blocks(file: SoundFile, name: str) -> Iterator[np.ndarray]:
    """Yield the samples of an open sound block by block, the mean of its channels: a header may promise less, or anything."""
    count = 0
    while len(block := file.read(BLOCK_VALUES // file.channels, dtype="float32", always_2d=True)):
        count += len(block)
        yield _mean(block)
    if file.format == "FLAC" and count < file.frames:
        raise RequestError(f"{name}: {count:,} of {file.frames:,} samples can be decoded; is the file damaged?")


class _BytesFile:
    """A file in memory for libsndfile, which damaged headers make seek before its beginning."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self._size = len(data)
        self.read, self.tell = self._file.read, self._file.tell

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, or to the beginning where there is none."""
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._file.tell(), io.SEEK_END: self._size}[whence]
        return self._file.seek(max(begin + offset, 0))


def _refuse_by_name(data: bytes, name: str) -> None:
    """Raise RequestError for sounds that people have and libsndfile does not read, with what to do instead."""
    known = {"an MP4 or M4A": data[4:8] == b"ftyp", "a WebM or Matroska": data.startswith(b"\x1aE\xdf\xa3")}
    known["a WMA"] = data.startswith(b"0&\xb2u\x8ef\xcf\x11")
    for kind, is_it in known.items():
        if is_it:
            raise RequestError(f"{name}: {kind} file; save its sound as {KNOWN_FORMATS}")


def _mean(samples_TC: np.ndarray) -> np.ndarray:
    """Return the mean of all channels, float32."""
    found: np.ndarray = samples_TC[:, 0] if samples_TC.shape[1] == 1 else samples_TC.T.mean(axis=0)
    return found


def _most_samples(rate: int) -> int:
    return int((MAX_SECONDS + PADDING_S) * rate)


def _check_rate(rate: int, name: str) -> None:
    if rate not in RATES:
        raise RequestError(f"{name}: {rate:,} samples a second; expected {RATES.start:,} to {RATES.stop - 1:,}")


def _check_channels(channels: int, name: str) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise RequestError(f"{name}: {channels} channels; expected 1 to {MAX_CHANNELS}")


def _too_long(name: str) -> RequestError:
    return RequestError(f"{name}: longer than {MAX_SECONDS} s; cut it into several sounds")


def _damaged(name: str, reason: str) -> RequestError:
    return RequestError(f"{name}: can't be decoded ({reason[:200]}); is the file damaged?")


# ---- arrays ----


def _of_array(source: object, name: str) -> tuple[np.ndarray, int]:
    """Return an array's samples [T], the mean of its channels, float32, and its rate."""
    if not isinstance(source, tuple) or len(source) != 2 or not isinstance(source[0], np.ndarray):
        found = f"({', '.join(type(each).__name__ for each in source)})" if isinstance(source, tuple) else "an array alone"
        raise RequestError(f"{name}: expected a pair of a numpy array and its rate in samples a second, found {found}")
    array, rate = source
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer):
        raise RequestError(f"{name}: expected a rate of whole samples a second, found {spell_value(rate)}")
    _check_rate(int(rate), name)
    if array.ndim not in (1, 2) or array.dtype.name not in (*INTEGERS, *FLOATS):
        wanted = f"[samples] or [samples, channels] of {', '.join((*INTEGERS, *FLOATS))}"
        raise RequestError(f"{name}: expected an array {wanted}, found {list(array.shape)} of {array.dtype}")
    samples_TC = array.reshape(len(array), -1) if array.size else np.empty((0, 1), np.float32)
    _check_channels(samples_TC.shape[1], name)
    if len(samples_TC) > _most_samples(int(rate)):
        raise _too_long(name)
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        samples_TC = samples_TC.astype(np.float32)
    return _mean(samples_TC) / np.float32(INTEGERS.get(array.dtype.name, 1)), int(rate)

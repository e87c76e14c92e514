"""Decoding in processes: fair, bounded, and over when its client is gone."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from media.files import encoded, noise, pillow
from parity.videos import moving_crops, write_video
from PIL import Image
from waiting import HANG

from lmdeploy_vico.media.decoder import MediaDecoder
from lmdeploy_vico.media.decoding.pictures import DECODING
from lmdeploy_vico.media.errors import MediaBusyError, MediaError
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.workers.worker import KEPT, MODULE

PICTURE = encoded(noise(), 'PNG')


@pytest.fixture
def decoder():
    """``decoder(**options)``: all are closed at the end."""
    made = []

    def make(processes=2, **options):
        made.append(MediaDecoder(processes, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def children():
    """The processes that decode for this one."""
    return [child for child in psutil.Process().children() if child.is_running() and MODULE in child.cmdline()]


def picture(decoder, data=PICTURE, share=None, **options):
    return asyncio.run(decoder.picture(data, PictureOptions(), share, **options))


def slow_picture():
    """A progressive JPEG of a few kilobytes that takes very long: a great many scans, each over all of its blocks."""
    data = encoded(Image.new('L', (4000, 4000), 128), 'JPEG', progressive=True)
    first = data.index(b'\xff\xda')
    end = data.rindex(b'\xff\xd9')
    scans = data[first:end]
    last = scans[scans.rindex(b'\xff\xda') :]
    return data[:end] + last * 400 + data[end:]


def test_the_pixels_are_pillows(decoder):
    found = picture(decoder())
    assert found.mode == 'RGB'
    np.testing.assert_array_equal(np.asarray(found), pillow(PICTURE))


def test_frames_of_a_video(decoder, pictures, tmp_path):
    frames = moving_crops(pictures['coffee'], 10)
    data = write_video(tmp_path / 'coffee.avi', frames, 'MJPG').read_bytes()
    found = asyncio.run(decoder().video(data, VideoOptions(num_frames=4)))
    assert [frame.size for frame in found] == [frames[0].shape[1::-1]] * 4
    assert all(frame.mode == 'RGB' for frame in found)


def test_a_process_loads_no_torch_and_no_lmdeploy():
    code = f'import sys, {MODULE}; print(sorted({{"torch", "lmdeploy", "numba"}} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, check=True).stdout.strip() == b'[]'


@pytest.mark.parametrize('eager', [True, False])
@pytest.mark.busy
def test_processes_are_there_when_they_are_needed_and_gone_afterwards(decoder, eager):
    one = decoder(2, eager=eager)
    deadline = time.monotonic() + HANG
    while eager and len(children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(children()) == (2 if eager else 0)
    picture(one)
    started = children()
    one.close()
    assert not any(child.is_running() for child in started)


def test_half_pictures_are_refused_in_a_process(decoder):
    """Whatever LMDeploy has told Pillow in this one."""
    with pytest.raises(MediaError, match='damaged or truncated'):
        picture(decoder(), PICTURE[: len(PICTURE) // 2])


def test_errors_are_sentences(decoder):
    one = decoder()
    with pytest.raises(MediaError, match='not an image in a format that can be read'):
        picture(one, b'hello')
    with pytest.raises(MediaError, match='not a video that can be read'):
        asyncio.run(one.video(b'hello', VideoOptions()))
    picture(one)  # and the next one is decoded


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_taken_before_a_picture_is_decoded_and_kept_for_its_pixels(decoder):
    pixels, budget = 56 * 40, MemoryBudget(10**9)
    share = MemoryShare(budget)
    asked = []
    with share.in_use():
        picture(decoder(), share=share, extra=lambda width, height: asked.append((width, height)) or 1000)
        assert budget.taken == pixels * KEPT + 1000
    assert asked == [(56, 40)] and budget.taken == 0 and DECODING > KEPT


@pytest.mark.parametrize(
    'kind, options, each',
    [('PNG', {}, 11), ('WEBP', {'lossless': True, 'quality': 0, 'method': 0}, 18), ('AVIF', {}, 16)],
)
def test_what_does_not_fit_is_refused_by_its_header(decoder, kind, options, each):
    """All these are small files of many pixels; none is decoded, so none takes memory or time."""
    data = encoded(Image.new('RGB', (6000, 6000)), kind, **options)
    one = decoder(1)
    picture(one)
    [child] = children()
    before = child.memory_info().rss
    share = MemoryShare(MemoryBudget(10**8))
    taken = 6000 * 6000 * each
    with share.in_use(), pytest.raises(MediaError, match=rf'takes at least {taken} bytes .* more than the limit'):
        picture(one, data, share)
    assert children() == [child] and child.memory_info().rss - before < 6000 * 6000
    picture(one)


def test_what_does_not_fit_beside_others(decoder):
    budget = MemoryBudget(30_000)
    mine, other = MemoryShare(budget), MemoryShare(budget)
    with mine.in_use(), other.in_use():
        other.take(10_000)
        with pytest.raises(MediaBusyError, match='Try again later'):
            picture(decoder(), share=mine)
        assert budget.taken == 10_000


@pytest.mark.slow
def test_a_process_takes_no_more_than_it_may(decoder):
    """Where nothing is counted, the kernel refuses, and the process says so and goes on."""
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(Image.new('RGB', (13000, 13000)), 'PNG', exif=exif)  # 676 MB, and as many again to turn it
    one = decoder(1, memory=10**6)  # and a gigabyte for libraries
    with pytest.raises(MediaError, match='too large to be decoded: the memory does not suffice'):
        picture(one, data)
    [child] = children()
    picture(one)
    assert children() == [child]


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.busy(times=10)
def test_a_picture_that_takes_too_long_is_given_up(decoder):
    one = decoder(1, picture_seconds=1)
    with pytest.raises(MediaError, match='takes longer to decode than 1 seconds of a processor'):
        picture(one, slow_picture())
    np.testing.assert_array_equal(np.asarray(picture(one)), pillow(PICTURE))


@pytest.mark.busy(times=10)
def test_others_go_on_meanwhile(decoder):
    """Slow pictures of one client, more than there are processes, keep no other client waiting."""
    one = decoder(2, picture_seconds=60)
    slow = slow_picture()

    async def run():
        mine = [asyncio.ensure_future(one.picture(slow, PictureOptions(), client='a')) for _ in range(4)]
        await asyncio.sleep(0)
        for _ in range(3):
            await one.picture(PICTURE, PictureOptions(), client='b')
        assert not any(task.done() for task in mine)
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.busy(times=10)
def test_what_nobody_waits_for_is_ended(decoder):
    one = decoder(1, picture_seconds=1000)
    budget = MemoryBudget(10**9)

    async def run():
        share = MemoryShare(budget)
        with share.in_use():
            slow = asyncio.ensure_future(one.picture(slow_picture(), PictureOptions(), share))
            waiting = asyncio.ensure_future(one.picture(PICTURE, PictureOptions(), share, client='other'))
            deadline = time.monotonic() + HANG
            while not budget.taken:  # it is being decoded
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            slow.cancel()
            waiting.cancel()
            await asyncio.gather(slow, waiting, return_exceptions=True)
        return await one.picture(PICTURE, PictureOptions())

    np.testing.assert_array_equal(np.asarray(asyncio.run(run())), pillow(PICTURE))
    assert budget.taken == 0


# --- processes that end ----------------------------------------------------------------------------------------------


@pytest.mark.busy(times=10)
def test_a_process_that_was_killed_is_replaced(decoder):
    one = decoder(1)
    picture(one)
    for _ in range(3):
        [child] = children()
        child.kill()
        child.wait(HANG)
        np.testing.assert_array_equal(np.asarray(picture(one)), pillow(PICTURE))


def test_closing_ends_what_is_being_decoded_and_starts_nothing(decoder):
    one = decoder(1, picture_seconds=1000)
    budget = MemoryBudget(10**9)

    async def run():
        share = MemoryShare(budget)
        with share.in_use():
            slow = asyncio.ensure_future(one.picture(slow_picture(), PictureOptions(), share))
            waiting = asyncio.ensure_future(one.picture(PICTURE, PictureOptions(), share, client='other'))
            deadline = time.monotonic() + HANG
            while not budget.taken:  # it is being decoded
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            one.close()
            return await asyncio.gather(slow, waiting, return_exceptions=True)

    for error in asyncio.run(run()):
        assert isinstance(error, MediaBusyError) and 'shutting down' in str(error)
    assert children() == []


@pytest.mark.busy(times=10)
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_server(how):
    """Also those that are decoding, and whatever ended it."""
    program = (
        'import asyncio, sys\n'
        'from lmdeploy_vico.media.decoder import MediaDecoder\n'
        'from lmdeploy_vico.media.options import PictureOptions\n'
        'decoder = MediaDecoder(2, picture_seconds=1000)\n'
        'asyncio.run(decoder.picture(sys.stdin.buffer.read(), PictureOptions()))\n'
    )
    server = subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE)
    server.stdin.write(slow_picture())
    server.stdin.close()
    deadline = time.monotonic() + HANG
    decoding = []
    while not decoding:
        assert time.monotonic() < deadline and server.poll() is None
        decoding = [child for child in psutil.Process(server.pid).children() if child.cpu_times().user > 0.5]
        time.sleep(0.01)
    os.kill(server.pid, how)
    server.wait(HANG)
    assert psutil.wait_procs(decoding, HANG)[1] == []


def test_nothing_is_left_behind(decoder, tmp_path):
    before = set(os.listdir('/dev/shm')), len(os.listdir('/proc/self/fd'))
    one = decoder(2)
    for _ in range(3):
        picture(one)
    one.close()
    assert (set(os.listdir('/dev/shm')), len(os.listdir('/proc/self/fd'))) == before

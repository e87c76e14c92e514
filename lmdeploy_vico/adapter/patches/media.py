"""Changes to LMDeploy's decoding of images and videos, made when a ViCO model starts: other servers keep LMDeploy's.

Damaged pictures and videos, and those that are too large, are refused with a sentence that says what is wrong.
"""

from typing import Any

from lmdeploy_vico.patching import Call, Patch, Target, Trigger

_IMAGES = 'lmdeploy.vl.media.image:ImageMediaIO'
_VIDEOS = 'lmdeploy.vl.media.video:VideoMediaIO'
_VIDEO_LOADER = 'lmdeploy.vl.media.video_loader:OpenCVVideoLoader'
_VAGUE = 'LMDeploy reports every decoding error but ValueError as "Request preprocessing failed."'


def refuse_truncated_images(target: Target) -> None:
    """Have Pillow refuse truncated files."""
    target.replace(False)


def explain_image_errors(call: Call) -> Any:
    """Say in a sentence why an image cannot be decoded."""
    from lmdeploy_vico.adapter.server.decoding import load_image

    return load_image(call.proceed)


def explain_video_errors(call: Call) -> Any:
    """Say in a sentence why a video cannot be decoded, and refuse one of which too many frames are missing."""
    from lmdeploy_vico.adapter.server.decoding import load_video

    return load_video(call.instance, call.proceed)


def explain_missing_video_backend(call: Call) -> None:
    """Say which package is missing where videos cannot be read."""
    from lmdeploy_vico.adapter.server.decoding import make_video_loader

    make_video_loader(call.proceed)


def guard_video_frames(call: Call) -> Any:
    """Stop reading where a video has ended, bound the memory of its frames, and shrink those of large videos."""
    from lmdeploy_vico.adapter.server.decoding import Capture
    from lmdeploy_vico.adapter.server.served import charge

    capture = Capture(call['cap'], call['num_expected_frames'])
    charge(capture.memory)
    return call.proceed(cap=capture)


def count_picture_memory(call: Call) -> Any:
    """Ask for a picture's memory before it is decoded.

    Every format of Pillow's calls the target first, those too that contain files of another size.
    """
    from lmdeploy_vico.adapter.server.decoding import charge_picture

    charge_picture(call.instance)
    return call.proceed()


def _loaders(owner: str, path: str) -> dict[str, str]:
    """LMDeploy's methods that decode an item, with their signatures; ``path`` is the name of a file's argument."""
    return {
        f'{owner}.load_bytes': '(self, data)',
        f'{owner}.load_base64': '(self, media_type, data)',
        f'{owner}.load_file': f'(self, {path})',
    }


PATCHES = (
    Patch(
        refuse_truncated_images,
        'PIL.ImageFile:LOAD_TRUNCATED_IMAGES',
        why='LMDeploy tells Pillow to accept truncated files, so half a picture would be answered as if it were whole.',
        until='LMDeploy rejects truncated images.',
        process='server',
        trigger=Trigger.MODEL,
    ),
    *(
        Patch(
            explain_image_errors,
            target,
            signature,
            why=_VAGUE,
            until='LMDeploy names the error of an image that cannot be decoded.',
            process='server',
            trigger=Trigger.MODEL,
        )
        for target, signature in _loaders(_IMAGES, 'file_path').items()
    ),
    *(
        Patch(
            explain_video_errors,
            target,
            signature,
            why=f'{_VAGUE} It skips the frames of a video that it cannot read.',
            until='LMDeploy rejects truncated videos and names the error.',
            process='server',
            trigger=Trigger.MODEL,
            uses={f'{_VIDEO_LOADER}.smart_nframes': '(self, total_frames_num, num_frames, fps, duration)'},
        )
        for target, signature in _loaders(_VIDEOS, 'filepath').items()
    ),
    Patch(
        explain_missing_video_backend,
        f'{_VIDEOS}.__init__',
        '(self, image_io, num_frames=32, **kwargs)',
        why=_VAGUE,
        until='LMDeploy says which package reads videos.',
        process='server',
        trigger=Trigger.MODEL,
    ),
    Patch(
        guard_video_frames,
        f'{_VIDEO_LOADER}._read_frames',
        '(cap, frame_indices, num_expected_frames, max_frame_idx)',
        why='Where a video has ended, LMDeploy goes on for as many frames as the header announces, which can take '
        'minutes. It keeps the frames in full size, whether there is memory for them or not.',
        until='LMDeploy stops at the end of a video and bounds the memory of its frames.',
        process='server',
        trigger=Trigger.MODEL,
    ),
    Patch(
        count_picture_memory,
        'PIL.ImageFile:ImageFile.load_prepare',
        '(self)',
        why='LMDeploy decodes whatever comes, whether there is memory for it or not.',
        until='LMDeploy bounds the memory of the images that it decodes.',
        process='server',
        trigger=Trigger.MODEL,
    ),
)

"""Which files are decoded: a short list of formats, each known by its first bytes.

Whatever is not on it never reaches a decoder. Pillow alone reads some forty formats, among them programs (EPS) and
compressed archives (FITS), and FFmpeg some three hundred, among them texts that name other files, hosts and ports (SDP,
playlists).
"""

from lmdeploy_vico.media.errors import MediaError

IMAGES = {
    'PNG': (b'\x89PNG\r\n\x1a\n',),
    'JPEG': (b'\xff\xd8\xff',),
    'WEBP': (b'RIFF',),
    'AVIF': (b'',),
    'GIF': (b'GIF87a', b'GIF89a'),
    'BMP': (b'BM',),
    'TIFF': (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'),
    'PPM': tuple(b'P%d' % kind for kind in range(1, 7)),
}
IMAGE_NAMES = 'PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF and PBM, PGM or PPM'
VIDEO_NAMES = 'MP4, MOV, WebM, Matroska, AVI and MPEG transport streams'
# FFmpeg's names of those, for its own list.
FFMPEG_FORMATS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts'

_AVIF_BRANDS = {b'avif', b'avis'}
_MOV_ATOMS = {b'ftyp', b'moov', b'mdat', b'wide', b'free', b'skip', b'pnot'}
_MATROSKA = b'\x1aE\xdf\xa3'
_TS_PACKET = 188  # bytes, each packet begins with the same one
_TS_SYNC = 0x47


def image_format(data: bytes) -> str:
    """The name by which Pillow knows the format of ``data``.

    Args:
        data: a file, or its first 64 bytes.

    Raises:
        MediaError: it is none of those that are decoded.
    """
    if data[:4] == b'RIFF':
        found = 'WEBP' if data[8:12] == b'WEBP' else None
    elif data[4:8] == b'ftyp':
        found = 'AVIF' if _AVIF_BRANDS & _brands(data) else None
    else:
        found = next((name for name, starts in IMAGES.items() if any(s and data.startswith(s) for s in starts)), None)
    if found is None:
        raise MediaError(f'The data is not an image in a format that can be read: {IMAGE_NAMES}.')
    return found


def require_video(data: bytes) -> None:
    """Raise MediaError unless ``data`` begins as one of the containers that are decoded does."""
    avi = data[:4] == b'RIFF' and data[8:12] == b'AVI '
    transport = len(data) > 2 * _TS_PACKET and all(data[at] == _TS_SYNC for at in (0, _TS_PACKET, 2 * _TS_PACKET))
    mov = data[4:8] in _MOV_ATOMS and not _AVIF_BRANDS & _brands(data)
    if not (avi or transport or mov or data.startswith(_MATROSKA)):
        raise MediaError(f'The data is not a video that can be read: {VIDEO_NAMES} are.')


def _brands(data: bytes) -> set[bytes]:
    """The brands of an ISO media file: what it says that it can be read as."""
    if data[4:8] != b'ftyp':
        return set()
    end = min(int.from_bytes(data[:4], 'big'), 64)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}

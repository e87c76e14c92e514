"""Server-wide options, from ``LMDEPLOY_VICO_<NAME>`` or ``--hf-overrides '{"vico": {"<name>": ...}}'``.

Each is declared once, as a field of :class:`Options`: from there come its checks, its error messages, what
``lmdeploy-vico options`` prints and the table in docs/options.md.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmdeploy_vico.choices import NO_SPEEDUPS, PYTORCH, Compression, Experiment, Speedups
from lmdeploy_vico.host_memory import GIB, share_of_memory
from lmdeploy_vico.kernels.choice import AUTO
from lmdeploy_vico.media.options import default_processes
from lmdeploy_vico.option_kinds import (
    COMPRESSION,
    DEVICES,
    DIRECTORY,
    ENGINES,
    FLAG,
    KERNELS,
    NAMES,
    SCOPES,
    SECONDS,
    SHARE,
    Kind,
    at_least,
)

PREFIX = 'LMDEPLOY_VICO_'
OVERRIDES_KEY = 'vico'
ENVIRONMENT_ONLY = ('language_engine',)  # LMDeploy chooses the engine before it looks at --hf-overrides
_METADATA = 'option'
_OVERRIDES = f'--hf-overrides "{OVERRIDES_KEY}"'


class OptionError(ValueError):
    """An unknown option or a bad value; the message names it, where it was set, and what is accepted.

    Attributes:
        option: the name of one whose value turns out not to work here, if the message does not say where it was set.
    """

    def __init__(self, message: str, option: str = '') -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True)
class Declaration:
    """What is said of one option.

    Attributes:
        kind: what values it takes.
        default: in words.
        meaning: sentences in Markdown.
    """

    kind: Kind
    default: str
    meaning: str


def _option(kind: Kind, default: Any, meaning: str, words: str = '') -> Any:
    """Declare an option; ``default`` is a value, or a function that computes one and is described by ``words``."""
    declaration = Declaration(kind, words or str(default), meaning)
    where = 'default_factory' if callable(default) else 'default'
    return dataclasses.field(**{where: default}, metadata={_METADATA: declaration})


@dataclass(frozen=True)
class Options:
    """What an operator can set.

    Raises:
        OptionError: a value that is not accepted.
    """

    compression: Compression = _option(
        COMPRESSION,
        'auto',
        'How much is compressed for requests that do not say. `auto` follows the thresholds of the checkpoint.',
    )
    routing_scope: str = _option(
        SCOPES,
        'prompt',
        'Which tiles are compared with each other. `prompt`, the published rule: those of all images of a prompt. An '
        'image in a later turn of a conversation can then route earlier ones otherwise, and the prefix cache does not '
        'find what follows them. `image`: those of each image, or video, by itself, so that it is the same in every '
        'turn; an image of one tile is then not compressed by `auto`.',
    )
    pressure_compression: float = _option(
        SHARE,
        0.0,
        'The most that is compressed beyond `compression` while the language model is overloaded: a share of the tiles '
        'of a request, rounded down, those with the highest scores among the full ones. Where images are routed by '
        'themselves (`routing_scope`), it is rounded down for each, so that one of a single tile is left alone. 0 '
        'switches it off. It breaks batch independence: the same request then has another answer beside many others. '
        'It does nothing for the 503s of a full tile queue, since every tile is encoded before it is routed. A request '
        'that states its compression, `"auto"` for instance, is left alone. It is refused with a `compression` for '
        'experiments.',
        '0',
    )
    pressure_waiting: int = _option(
        at_least(1),
        16,
        'Prompts that wait for their prefill at which all of `pressure_compression` is compressed; above half as many, '
        'a part. So does a KV cache of which requests use 95 %, and in part from 85 % on.',
    )
    max_tiles: int = _option(
        at_least(1),
        40,
        'The most tiles that an image is cut into, without its thumbnail, whatever a client or the checkpoint asks '
        'for (`max_dynamic_patch`).',
    )
    max_images: int = _option(
        at_least(0), 1024, 'Images that a prompt may have. A prompt with more gets a 400 before anything is fetched.'
    )
    max_videos: int = _option(
        at_least(0), 64, 'Videos that a prompt may have. A prompt with more gets a 400 before anything is fetched.'
    )
    max_prompt_tiles: int = _option(
        at_least(1),
        4096,
        'Tiles that all images and video frames of a prompt may have together, thumbnails included. A prompt with more '
        'gets a 400 when the sizes of its images are known, before anything is encoded.',
    )
    preprocess_threads: int = _option(
        at_least(1),
        lambda: min(os.cpu_count() or 1, 16),
        'Threads that resize images and cut them into tiles.',
        'the number of cores, at most 16',
    )
    vision_device: str = _option(
        DEVICES,
        'auto',
        "Where images are encoded. `auto` takes each device that this server's engine uses, or the CPU if it uses "
        'none. Several devices of one kind share the tiles. It must be given where the engine joins a Ray cluster '
        'that already runs, and where it has ranks on other machines. `ray:` names a cluster with encoders.',
    )
    encoder_seconds: float = _option(
        SECONDS,
        60.0,
        'Seconds that a start, and requests, wait while no encoder is in the Ray cluster. Then the start fails, and '
        'requests with images get a 503 until one comes.',
    )
    tile_batch: int = _option(
        at_least(0), 0, 'Tiles in a device batch. 0 chooses a number for the checkpoint and the device.'
    )
    max_queued_tiles: int = _option(
        at_least(1),
        2048,
        'Tiles that may wait to be encoded. A request that would make them more gets a 503 with `Retry-After`; one '
        'that finds none waiting may have any number.',
    )
    max_decoded_bytes: int = _option(
        at_least(1),
        partial(share_of_memory, 16 * GIB, 8),
        'Host memory that all clients together can make the server take for what they send: request bodies, files that '
        'are fetched, decoded images and video frames (11 to 18 bytes a pixel while they are decoded, then 4), and '
        'what resizing them takes. It is counted before it is taken. A request that alone needs more gets a 400; one '
        'that finds no room beside the others gets a 503 with `Retry-After`.',
        '16 GiB, at most 1/8 of the memory',
    )
    media_store_bytes: int = _option(
        at_least(0),
        partial(share_of_memory, 2**28, 64),
        'Host memory for encoded images and videos that clients name by a `uuid`, so that they need not send them '
        'again. Those used least recently are dropped. 0 keeps none, and every item needs its `url`.',
        '256 MiB, at most 1/64 of the memory',
    )
    max_body_bytes: int = _option(
        at_least(1), 2**28, 'The most bytes of the body of a request; a longer one gets a 413.', '256 MiB'
    )
    max_media_bytes: int = _option(
        at_least(1),
        2**27,
        'The most bytes of the file of an image or video, however it is sent or fetched, after decompression.',
        '128 MiB',
    )
    fetch_seconds: float = _option(
        SECONDS, 20.0, 'Seconds that fetching an image or video may take, from the first connection to the last byte.'
    )
    allowed_local_media_path: str = _option(
        DIRECTORY,
        '',
        'A directory whose files clients may name, by path or `file:` URL, as images and videos. Without one no file '
        "of the server's machine is read. (`pipeline` reads what its caller names.)",
        'empty',
    )
    decode_processes: int = _option(
        at_least(1),
        default_processes,
        'Processes that decode images and videos, about 40 MB each, and 50 more once it has read a video. One client '
        'has at most all but one of them at a time.',
        'the number of cores, at least 2 and at most 16',
    )
    image_decode_seconds: float = _option(
        SECONDS, 10.0, 'Seconds of a processor that decoding an image may take; then it is given up, with a 400.'
    )
    video_decode_seconds: float = _option(SECONDS, 120.0, 'The same for a video.')
    upright_images: bool = _option(
        FLAG, True, 'Turn images as their EXIF orientation says, as viewers do. LMDeploy itself does not.', '1'
    )
    white_background: bool = _option(
        FLAG,
        True,
        'Put what is transparent in an image on white. LMDeploy itself drops the transparency, which turns black text '
        'on nothing into a black picture.',
        '1',
    )
    cache_bytes: int = _option(
        at_least(0),
        partial(share_of_memory, 4 * GIB, 16),
        'Host memory for encoded tiles that may be asked about again, whatever their compression; 0 keeps none. Where '
        'CUDA devices encode, it is pinned once, while the engine starts, with at most 400 MiB and 300 MiB a device '
        'for what is in flight. Where the host cannot give that much, a warning says so and the server runs with what '
        'it got.',
        '4 GiB, at most 1/16 of the memory',
    )
    control_endpoints: bool = _option(
        FLAG,
        False,
        'Let clients put the engine to sleep, wake it up, and replace its weights: `/sleep`, `/wakeup`, '
        '`/update_weights`, `/update_weights_from_ipc`, `/update_weights_from_distributed`, '
        '`/init_weights_update_group`, `/destroy_weights_update_group`. `/update_weights` unpickles what it is sent: '
        'whoever can reach it can run code on the server. With `--empty-init` they are always open.',
        '0',
    )
    shutdown_grace: float = _option(
        SECONDS,
        10.0,
        'Seconds that running requests have to end when the server is stopped by SIGTERM or SIGINT, or its engine has '
        'died. Meanwhile new ones, and `/health`, get a 503.',
    )
    exit_on_engine_death: bool = _option(
        FLAG,
        True,
        'End the server with status 1 when its engine has died, so that a supervisor starts it again. Otherwise it '
        'stays, and answers 503.',
        '1',
    )
    kernels: str = _option(
        KERNELS,
        AUTO,
        'What computes the operations of `kernels/`. `auto` takes Triton on CUDA devices from compute capability 8.0 '
        'on, and torch elsewhere.',
    )
    vit_speedups: Speedups = _option(
        NAMES,
        NO_SPEEDUPS,
        'Faster ways to compute parts of the ViT: `cudnn_attention` (Hopper GPUs), `residual_norm`, `padded_patches` '
        "and `strided_qk_norm` (InternViT-6B). Each may change the last bits of a tile's tokens; none makes them "
        'depend on other tiles. One that cannot run stops the start. `python -m benchmarks vit-speed` says which '
        'pay on a GPU. None has been measured yet, so all are off.',
        'empty',
    )
    language_engine: str = _option(
        ENGINES,
        PYTORCH,
        'What runs the language model. It is set in the environment only. `turbomind` is experimental: no GPU has run '
        'it yet ([turbomind.md](turbomind.md)).',
    )
    page: bool = _option(
        FLAG,
        False,
        'Serve a page at `/vico` that shows what the router makes of pictures, answers at several compressions side by '
        'side, and counters. The page is public and holds no data; what it asks, `POST /vico/route` among it, needs '
        'the API key, and has the limits of any request.',
        '0',
    )
    dummy_weights: bool = _option(
        FLAG,
        False,
        'Make all weights up on the device instead of reading them from files, to size a deployment. The answers are '
        'random.',
        '0',
    )
    synthetic_images: bool = _option(
        FLAG,
        False,
        'Let an image item ask for made-up visual tokens, to measure the language model alone: `"synthetic": '
        '{"tiles": 10, "compressed": 5, "seed": 7}`, beside a `url` of any picture, which is ignored. Without '
        '"compressed" no tile is, unless `pressure_compression` has it.',
        '0',
    )

    def __post_init__(self) -> None:
        for name in DECLARATIONS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if self.pressure_compression and isinstance(self.compression, Experiment):
            raise OptionError(
                f'pressure_compression has no effect with compression {self.compression}, which is for experiments: '
                'set only one of the two.'
            )

    @classmethod
    def load(cls, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> 'Options':
        """Read the options; ``--hf-overrides`` wins over the environment.

        Args:
            overrides: what ``--hf-overrides`` was given, or None.
            environ: by default the process's environment.

        Raises:
            OptionError: an unknown name or a bad value.
        """
        section = (overrides or {}).get(OVERRIDES_KEY, {})
        if not isinstance(section, Mapping):
            raise OptionError(f'--hf-overrides: "{OVERRIDES_KEY}" must be an object, not {section!r}.')
        for name in section:
            _check_name(name, f'{_OVERRIDES} {name!r}')
            if name in ENVIRONMENT_ONLY:
                raise OptionError(
                    f'{_OVERRIDES}: {name} is set by {_variable(name)} only, as LMDeploy chooses its engine before it '
                    'looks at --hf-overrides.'
                )
        values = {**environment_options(environ), **section}
        where = {name: _OVERRIDES if name in section else _variable(name) for name in values}
        return cls(**{name: _checked(name, value, where[name]) for name, value in values.items()})


def source(name: str, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> str:
    """Say where the value of an option comes from; empty for its default. Arguments as for :meth:`Options.load`."""
    if name in (overrides or {}).get(OVERRIDES_KEY, {}):
        return _OVERRIDES
    return _variable(name) if name in environment_options(environ) else ''


def _variable(name: str) -> str:
    return f'the environment variable {PREFIX}{name.upper()}'


DECLARATIONS: Mapping[str, Declaration] = {
    field.name: field.metadata[_METADATA] for field in dataclasses.fields(Options)
}


def environment_options(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The options that the environment sets, by name; raises OptionError for an unknown one."""
    values: dict[str, Any] = {}
    for variable, text in (os.environ if environ is None else environ).items():
        if variable.startswith(PREFIX):
            name = variable[len(PREFIX) :].lower()
            _check_name(name, variable)
            values[name] = _number(text) if DECLARATIONS[name].kind.numeric else text
    return values


def _checked(name: str, value: Any, source: str = '') -> Any:
    kind = DECLARATIONS[name].kind
    try:
        return kind.parse(value)
    except ValueError as error:
        said = f', as {source} says' if source else ''
        raise OptionError(f'{name} must be {kind.accepted}, not {value!r}{said}.') from error


def _check_name(name: str, given: str) -> None:
    if name not in DECLARATIONS:
        raise OptionError(f'{given} is not an option; the options are {", ".join(DECLARATIONS)}.')


def _number(text: str) -> Any:
    """The number that a text stands for, or the text itself."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text

"""What keeps a server from starting is said in a sentence: to the operator, once, without a traceback."""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.options import OptionError, Options, source
from lmdeploy_vico.patching import PatchError
from lmdeploy_vico.stage.errors import DeviceStartError

REFUSALS = (OptionError, UnsupportedCheckpointError, PatchError, DeviceStartError)


@contextmanager
def in_a_sentence(overrides: Mapping[str, Any] | None) -> Iterator[None]:
    """End the process with status 1 if what is done inside is refused, after one line on stderr that says why.

    Any other error is none that the plugin has foreseen, and keeps its traceback.

    Args:
        overrides: what ``--hf-overrides`` was given, or None.
    """
    try:
        yield
    except REFUSALS as error:
        sys.stderr.write(f'lmdeploy-vico: {explained(error, overrides)}\n')
        if multiprocessing.parent_process() is not None:
            # The server of a data-parallel rank: its orderly end would wait for its engine's process.
            sys.stderr.flush()
            os._exit(1)
        raise SystemExit(1) from None


def explained(error: Exception, overrides: Mapping[str, Any] | None) -> str:
    """Return what an error says, and where the option was set that it is about."""
    said = str(error)
    if not isinstance(error, OptionError) or not error.option:  # a name that is no option says where it stands
        return said
    where = source(error.option, overrides)
    return f'{said} {error.option} is set by {where}.' if where else said


def check_options(model_path: str, overrides: Mapping[str, Any] | None) -> None:
    """Check the options of a server before any of its processes is started; those of another model are left alone.

    Raises:
        OptionError: an unknown name or a bad value.
        UnsupportedCheckpointError: the config of the checkpoint contradicts itself.
    """
    if load_vico_config(model_path) is not None:
        Options.load(overrides)

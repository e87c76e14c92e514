"""The reader's checkpoint that comes with the package."""

import shutil
from pathlib import Path

from lmdeploy_vico.checkpoints.random.limits import MARKER, READER_MADE_BY
from lmdeploy_vico.checkpoints.random.tiny import copy_remote_code, write_json
from lmdeploy_vico.reader import ReaderError

FOLDER = Path(__file__).with_name('checkpoint')
MADE = 'made.json'  # which command, commit and versions have made it


def write_reader(path: Path) -> None:
    """Write the checkpoint into a folder.

    Raises:
        ReaderError: something is there already.
        OSError: it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ReaderError(f'{path} exists and is not an empty folder: choose another.')
    path.mkdir(parents=True, exist_ok=True)
    for file in FOLDER.iterdir():
        if file.name != MADE:
            shutil.copyfile(file, path / file.name)
    copy_remote_code(path)
    write_json(path / MARKER, {'made_by': READER_MADE_BY})

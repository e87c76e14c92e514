"""Makes the reader of a run the one that comes with the package.

python -m benchmarks.reader.ship RUN

Run it in the checkout that has made the run: its commit is noted.
"""

import argparse
import shutil
from pathlib import Path

from benchmarks.lib.facts import facts
from lmdeploy_vico.checkpoints.random.tiny import REMOTE_CODE, write_json
from lmdeploy_vico.checkpoints.safetensors_format import INDEX_FILE
from lmdeploy_vico.reader.recipe import READER, seed_of
from lmdeploy_vico.reader.shipped import FOLDER, MADE
from lmdeploy_vico.training.model.writer import CONFIG, copy_rest


def main() -> None:
    """Copy what is served, and say what made it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, metavar='RUN', help='the folder of `lmdeploy-vico reader RUN --train`')
    arguments = parser.parse_args()
    made = facts()  # before the tree changes: the commit is that which is checked out
    source = arguments.run / READER
    if not (source / 'report.json').is_file():
        raise SystemExit(f'{source} is not the checkpoint of a complete run.')
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    copy_rest(source, FOLDER)
    for file in (*source.glob('*.safetensors'), source / INDEX_FILE, source / CONFIG):
        shutil.copyfile(file, FOLDER / file.name)
    (FOLDER / REMOTE_CODE).unlink()  # it is in the package already
    command = f'lmdeploy-vico reader RUN --train --seed {seed_of(arguments.run)}'
    write_json(FOLDER / MADE, {'command': command, **made})


if __name__ == '__main__':
    main()

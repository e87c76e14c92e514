"""Puts the stand-in in the place of TurboMind's binding, in every Python process that has this folder on its path."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import wrapt

TESTS = Path(__file__).parents[2]
BINDING = 'lmdeploy.turbomind._turbomind'


class Finder:
    """Finds the stand-in by the binding's name."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != BINDING:
            return None
        return importlib.util.spec_from_file_location(name, TESTS / 'turbomind' / 'native.py')


def pretend(torch: Any) -> None:
    from turbomind import cuda

    cuda.pretend(torch.cuda)


sys.path.append(str(TESTS))
sys.meta_path.insert(0, Finder)
wrapt.register_post_import_hook(pretend, 'torch')

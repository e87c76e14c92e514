"""Programs of the system that these tests need."""

import shutil


def program(name: str, packages: str) -> str:
    """Its path; fails where it is missing, and says how it is installed."""
    found = shutil.which(name)
    assert found, f'{name} is missing: apt-get install {packages}'
    return found

"""The modules that a quantised checkpoint stores unquantised, by the checkpoint's names."""

import re
from collections.abc import Mapping
from typing import Any

from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL
from lmdeploy_vico.config import UnsupportedCheckpointError

_PATTERN = 're:'
# The keys of the list, unless the checkpoint is a compressed-tensors one; LMDeploy reads the same keys.
_LISTS = ('ignored_layers', 'modules_to_not_convert')


class SkippedModules:
    """The modules named by the list in a ``quantization_config``; ask with ``name in modules``.

    An entry is a module's name, or a regular expression (``re:...``) that matches from the beginning of a name. In a
    compressed-tensors checkpoint an entry names one module in full. Elsewhere it may be any run of a name's dotted
    words: a module stands for everything below it, and ``lm_head`` for itself wherever it is. Names with and without
    ``language_model.`` mean the same, since some quantisers saw the language model alone. Entries about the vision side
    match nothing.

    Raises:
        UnsupportedCheckpointError: an entry is not a string, or not a valid regular expression.
    """

    def __init__(self, quantization_config: Mapping[str, Any]) -> None:
        self._whole = quantization_config.get('quant_method') == 'compressed-tensors'
        lists = ('ignore',) if self._whole else _LISTS
        entries: Any = next((found for key in lists if (found := quantization_config.get(key))), [])
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UnsupportedCheckpointError(f'quantization_config lists skipped modules as {entries!r}, not by name.')
        self._patterns = [_compile(entry) for entry in entries if entry.startswith(_PATTERN)]
        names = (entry.removesuffix('.weight').strip('.') for entry in entries if not entry.startswith(_PATTERN))
        self._names = {name.removeprefix(LANGUAGE_MODEL) for name in names}

    def __contains__(self, module: str) -> bool:
        """Return whether a module is skipped; ``module`` is its name in the checkpoint (``language_model...``)."""
        bare = module.removeprefix(LANGUAGE_MODEL)
        # An expression that mentions the language model, if only to exclude it, was written for full names.
        if any(p.match(module) or ('language' not in p.pattern and p.match(bare)) for p in self._patterns):
            return True
        return bare in self._names or (not self._whole and any(part in self._names for part in _parts(module)))


def _parts(name: str) -> list[str]:
    """Return every run of a dotted name's words."""
    words = name.split('.')
    return ['.'.join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]


def _compile(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix(_PATTERN))
    except re.error as error:
        raise UnsupportedCheckpointError(
            f'quantization_config skips {entry!r}, which is not a regular expression: {error}.'
        ) from error

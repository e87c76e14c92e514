"""The reader through an api_server: it reads what it has never seen, and the router costs next to nothing."""

import pytest
from rich.console import Console

from benchmarks.reader.asking import Client, everywhere
from benchmarks.reader.run import Set, documents, table


@pytest.mark.long
def test_twenty_questions(serve, reader, tmp_path):
    """One picture of one tile, others of several: the answers are right, with and without the router."""
    data = documents(tmp_path, 'few', Set(21, (1, 3, 5)), 20)
    scratch = tmp_path / 'answers'
    scratch.mkdir()
    answers = Client(serve(reader), Console(quiet=True), scratch).ask(data, everywhere(data, 'none', 'auto'))
    lines = table(data.questions, answers)['all kinds']
    # The committed shares are 95 %: of twenty, 16 and more are right in 99 of 100 draws. Noise would answer none.
    assert lines['none']['right'][0] >= 80
    assert lines['auto']['right'][0] >= 80 and lines['auto']['compressed tiles'] > 30

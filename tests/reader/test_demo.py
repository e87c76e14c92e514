"""What the demonstration shows: questions with one right answer, and counts that come from the server's usage."""

import io

from rich.console import Console

from lmdeploy_vico.reader.demo import Reply, answers_table, counts_table, documents, photographs, summary, tiles_of
from lmdeploy_vico.reader.documents.codes import is_withheld

TEXT = 15  # tokens of a prompt beside its pictures


def said(exhibits, answers):
    """Four tiles a picture, two of them compressed by the router."""
    tokens = {'none': 4 * 256, 'auto': 2 * 256 + 2 * 64, 'all': 4 * 64}
    return [
        {way: Reply(TEXT + count, 0.1, answers.get(way, exhibit.answer)) for way, count in tokens.items()}
        for exhibit in exhibits
    ]


def printed(shown):
    output = io.StringIO()
    Console(file=output, width=120).print(shown)
    return output.getvalue()


def test_documents_ask_what_is_on_them():
    exhibits = documents()
    assert len({exhibit.name for exhibit in exhibits}) == len(exhibits) == 7
    codes = [exhibit.answer for exhibit in exhibits if exhibit.question.startswith('Code of')]
    assert len(codes) == 5 and all(map(is_withheld, codes))
    again = documents()
    assert all((one.pixels == other.pixels).all() for one, other in zip(exhibits, again, strict=True))


def test_photographs_have_no_answer():
    assert {(exhibit.answer, exhibit.pixels.ndim) for exhibit in photographs()} == {(None, 3)}


def test_tiles_are_counted_by_tokens():
    [replies] = said(documents()[:1], {})
    assert (tiles_of(replies, 'auto'), tiles_of(replies, 'all'), tiles_of(replies, 'none')) == ((4, 2), (4, 4), (4, 0))


def test_what_is_printed():
    exhibits = documents()[:2]
    replies = said(exhibits, {'all': '0000'})
    rows = printed(answers_table(exhibits, replies))
    assert rows.count('0000 ✗') == 2 and rows.count(exhibits[0].answer) == 3
    counts = printed(counts_table(exhibits, replies))
    assert counts.count('655') == counts.count('1039') == counts.count('37%') == 2
    line = summary(exhibits, replies)
    assert 'gave 4 of 8 tiles 64 tokens' in line and '37% fewer prompt tokens' in line
    assert '2 of 2 answers are right: without compression 2 are, with all tiles at 64 tokens 0.' in line

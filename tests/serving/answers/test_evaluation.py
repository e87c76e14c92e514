"""The evaluation against a served checkpoint: what it counts is what an independent implementation routes."""

import csv
import json
import math
from pathlib import Path

import pytest
from parity.conversations import data_url
from parity.videos import moving_crops, read_video, write_video
from serving.configurations import DEFAULT, LMDEPLOYS

from lmdeploy_vico import cli

MODES = ['none', 'auto', 'all', '0.5', 'random:0.4', 'image:0.5']
FRAMES = 64


@pytest.fixture
def data(pictures, tmp_path):
    """A data set of photographs, and its pictures."""
    shown = [pictures[name].convert('RGB') for name in ('coffee', 'page', 'text')]
    path = tmp_path / 'photographs.tsv'
    with path.open('w', newline='') as file:
        writer = csv.writer(file, delimiter='\t')
        writer.writerow(['index', 'question', 'answer', 'image'])
        writer.writerows([n, 'What is it?', 'x', data_url(one).partition(',')[2]] for n, one in enumerate(shown))
    return path, shown


def evaluate(target, path, output, modes, *arguments):
    """The results by compression, and the answers to questions by their index and compression.

    Args:
        target: a server's address, or a checkpoint to serve.
    """
    where = '--model' if isinstance(target, Path) else '--base-url', str(target)
    files = '--data', str(path), '--output-file', str(output)
    assert cli.main(['eval', *where, *files, '--compression', *modes, *arguments]) == 0
    results = {line['compression']: line for line in json.loads(output.read_text())['results']}
    _, *lines = output.with_name(f'{output.name}.answers.jsonl').read_text().splitlines()
    answers = {(line['index'], line['compression']): line for line in map(json.loads, lines)}
    return results, answers


@DEFAULT
def test_shares_of_compressed_tiles(client, judge, data, tmp_path):
    path, shown = data
    found, answers = evaluate(client.server.url, path, tmp_path / 'one.json', MODES, '--max-tokens', '2')
    tokens = {}
    for mode in MODES:
        compression = float(mode) if mode == '0.5' else mode
        tokens[mode] = [judge().reference.encode([one], compression)[0].tile_tokens for one in shown]
        assert [answers[str(n), mode]['image_tokens'] for n in range(len(shown))] == list(map(sum, tokens[mode])), mode
        assert found[mode]['tiles'] == sum(map(len, tokens[mode]))
        assert found[mode]['compressed_tiles'] == sum(one.count(64) for one in tokens[mode]), mode
    for random, one in zip(tokens['random:0.4'], tokens['none'], strict=True):
        assert random.count(64) == math.floor(0.4 * len(one) + 0.5)
    again, _ = evaluate(client.server.url, path, tmp_path / 'other.json', MODES[::-1], '--max-tokens', '2')
    alone, _ = evaluate(
        client.server.url, path, tmp_path / 'alone.json', MODES, '--max-tokens', '2', '--max-concurrency', '1'
    )
    for other in (again, alone):
        assert {mode: other[mode]['compressed_tiles'] for mode in MODES} == {
            mode: found[mode]['compressed_tiles'] for mode in MODES
        }


@pytest.mark.long
@DEFAULT
def test_a_video_with_subtitles_and_without(client, judge, pictures, tmp_path):
    frames = moving_crops(pictures['page'], 70, step=(1, 1)) + moving_crops(pictures['rocket'], 30)
    video = write_video(tmp_path / 'clip.mp4', frames)
    path = tmp_path / 'videos.tsv'
    path.write_text(
        'index\tvideo\tsubtitles\tquestion\tcandidates\tanswer\n'
        "0\tclip\tWe are landing now.\tWhat flies?\t['A. A rocket.', 'B. A page.']\tA\n"
    )
    shown = read_video(video, FRAMES)
    # A video is routed as a whole, a frame is one tile.
    encoded = judge().reference.encode(shown, 'auto', max_tiles=[1] * FRAMES, videos=[0] * FRAMES)
    routed = [tokens for frame in encoded for tokens in frame.tile_tokens]
    assert {64, 256} == set(routed)
    modes = ['none', 'auto', 'all']
    seen = {}
    for name, arguments in {'without': [], 'with': ['--subtitles']}.items():
        results, answers = evaluate(
            client.server.url, path, tmp_path / f'{name}.json', modes, '--max-tokens', '2', *arguments
        )
        assert [results[mode]['tiles'] for mode in modes] == [FRAMES] * 3
        assert results['none']['compressed_tiles'] == 0 and results['all']['compressed_tiles'] == FRAMES
        assert answers['0', 'auto']['image_tokens'] == sum(routed)
        assert results['auto']['compressed_tiles'] == routed.count(64)
        seen[name] = answers
    said = 'Subtitles of the video:\nWe are landing now.\n'
    for mode in modes:
        more = seen['with']['0', mode]['prompt_tokens'] - seen['without']['0', mode]['prompt_tokens']
        assert more > len(said.split()), mode


@pytest.mark.long
@LMDEPLOYS
def test_answers_of_a_plain_internvl_server(client, make_checkpoint, data, tmp_path):
    """The ViCO checkpoint at ``none`` answers as the InternVL model with the same weights in LMDeploy's own classes."""
    path, _ = data
    # In float32, in which no rounding decides between nearly equal tokens.
    arguments = ['none'], '--max-tokens', '12'
    counted, ours = evaluate(make_checkpoint(dtype='float32'), path, tmp_path / 'vico.json', *arguments)
    uncounted, theirs = evaluate(client.server.url, path, tmp_path / 'plain.json', *arguments)
    # Only the plugin says what of a prompt is visual.
    assert (counted['none']['compressed_tiles'], uncounted['none']['tiles']) == (0, None)
    said = [{key: (one['text'], one['prompt_tokens']) for key, one in answers.items()} for answers in (ours, theirs)]
    assert len(set(said[0].values())) == 3 and all(text for text, _ in said[0].values())
    assert said[0] == said[1]

"""The recipe: which commands make the reader, in which order; a router that moves and nothing else."""

import json
import shutil

import pytest
import torch
from rich.console import Console

from lmdeploy_vico.checkpoints.names import GATING, POOLING
from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint
from lmdeploy_vico.cli import parser
from lmdeploy_vico.reader import ReaderError, recipe
from lmdeploy_vico.reader.recipe import Documents, Recipe, Settings, give_router, seed_of
from lmdeploy_vico.training.model.weights import Tensors

FEW = Settings(documents={name: Documents(2, {'fine': 1.0}, (1, 2)) for name in ('train', 'pages', 'held-out')})


class Commands:
    """In place of ``subprocess.run``: notes commands, and writes what they would."""

    def __init__(self, path, checkpoints):
        self.path, self.checkpoints, self.status, self.asked = path, checkpoints, 0, []

    def __call__(self, command, env, check):
        assert env['OMP_NUM_THREADS'] == '1' and env['CUDA_VISIBLE_DEVICES'] == ''
        words = command[command.index('-m', 3) + 1 :]
        self.asked.append(words)
        self.returncode = self.status
        if not self.status:
            self.write(words)
        return self

    def write(self, words):
        made = {
            'lmdeploy_vico.reader.lessons.run': ('plain', 'vanilla'),
            'consistency': ('vico',),
            'router': ('reader',),
        }
        for name in made[words[0] if words[0] in made else words[2]]:
            shutil.copytree(self.checkpoints[name == 'reader'], self.path / name, dirs_exist_ok=True)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tiny')
    return [make_tiny_checkpoint(folder / str(seed), seed=seed) for seed in (1, 2)]


@pytest.fixture
def commands(tmp_path, monkeypatch, checkpoints):
    stand_in = Commands(tmp_path, checkpoints)
    monkeypatch.setattr(recipe.subprocess, 'run', stand_in)
    return stand_in


def make(path, settings=FEW):
    return Recipe(path, settings, 3, Console(quiet=True)).make()


def test_the_commands_in_their_order(tmp_path, commands):
    assert make(tmp_path) == tmp_path / 'reader'
    lessons, consistency, router = commands.asked
    assert lessons == ['lmdeploy_vico.reader.lessons.run', str(tmp_path), '--seed', '3']
    for words, stage, model, data, output in (
        (consistency, 'consistency', 'vanilla', 'train', 'vico'),
        (router, 'router', 'vico', 'pages', 'reader'),
    ):
        assert words[:3] == ['lmdeploy_vico.cli', 'train', stage]
        asked = parser().parse_args(words[1:])  # the options are those of the command
        assert (asked.model, asked.reference) == (tmp_path / model, tmp_path / 'plain')
        assert (asked.data, asked.output) == (tmp_path / f'{data}.jsonl', tmp_path / output)
        assert asked.held_out == tmp_path / 'held-out.jsonl' and asked.seed == 3
        assert len(asked.data.read_text().splitlines()) == 2


def test_what_is_done_is_not_done_again(tmp_path, commands):
    make(tmp_path)
    before = (tmp_path / 'train.jsonl').read_text()
    shutil.rmtree(tmp_path / 'pictures')
    make(tmp_path)
    assert [words[0] for words in commands.asked[3:]] == ['lmdeploy_vico.cli'] * 2, 'they go on by themselves'
    assert (tmp_path / 'train.jsonl').read_text() == before and not (tmp_path / 'pictures').exists()


def test_a_folder_has_one_seed(tmp_path, commands):
    make(tmp_path)
    assert seed_of(tmp_path) == 3
    with pytest.raises(ReaderError, match='is a run with --seed 3: go on with that, or take another folder'):
        Recipe(tmp_path, FEW, 4, Console(quiet=True)).make()
    (tmp_path / 'run.json').write_text('{"seed"')
    with pytest.raises(ReaderError, match='does not say with which seed the run was begun'):
        make(tmp_path)


def test_documents_are_different_ones(tmp_path, commands):
    make(tmp_path)
    conversations = [
        json.loads(line)['conversations'] for file in FEW.documents for line in (tmp_path / f'{file}.jsonl').open()
    ]
    assert len({json.dumps(one) for one in conversations}) == len(conversations)


def test_a_command_that_fails(tmp_path, commands):
    commands.status = 7
    with pytest.raises(ReaderError, match='lessons.run ended with status 7; repeat the command'):
        make(tmp_path)


def test_only_the_router_is_given(tmp_path, checkpoints):
    giver, taker = (
        shutil.copytree(path, tmp_path / name) for path, name in zip(checkpoints, ('giver', 'taker'), strict=True)
    )
    config = json.loads((giver / 'config.json').read_text())
    (giver / 'config.json').write_text(json.dumps(config | {'flash_absolute_threshold': 0.25}))
    give_router(giver, taker, tmp_path / 'both')
    both, theirs, own = (Tensors(tmp_path / name) for name in ('both', 'giver', 'taker'))
    for name in own.shapes:
        source = theirs if name.startswith((POOLING, GATING)) else own
        assert torch.equal(both.read(name), source.read(name))
    assert json.loads((tmp_path / 'both' / 'config.json').read_text())['flash_absolute_threshold'] == 0.25

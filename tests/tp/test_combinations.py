"""Both executors, with two and four ranks, dense models and mixtures of experts, caching, block sizes and chunks."""

import pytest
from serving.client import Client
from tp import processes
from tp.asking import check_answers
from tp.combinations import CHUNK, COMBINATIONS, all_pairs, pairs

OWN_CLUSTER = 'run in a cluster that was started for them'  # lmdeploy_vico/cpu/cluster.py


def test_every_pair_of_settings_is_in_a_combination():
    assert set().union(*map(pairs, COMBINATIONS)) == all_pairs()


@pytest.mark.tp
@pytest.mark.server
@pytest.mark.parametrize('combination', COMBINATIONS, ids=str)
def test_answers_are_right(combination, serve_ranks, make_checkpoint, prompts, judge):
    server = serve_ranks(make_checkpoint(**combination.kind), *combination.arguments)
    assert len(processes.ranks(server.pid, combination.executor)) == combination.tp
    assert server.log_text().count(OWN_CLUSTER) == (combination.executor == 'ray')
    client, check = Client(server), judge(**combination.kind).check
    answers = check_answers([client], prompts, check)
    if combination.chunked:
        assert any(answer.prompt_tokens > CHUNK for answer in answers)
    for name in ('one photograph', 'images in the history', 'text only, two turns'):
        again = client.chat(prompts[name])
        check(prompts[name], again, name=name)
        reused = (again.prompt_tokens - 1) // combination.block * combination.block if combination.caching else 0
        assert again.cached_tokens == reused, name
    # The ranks are those that were there at the beginning: none was started anew.
    assert len(processes.ranks(server.pid, combination.executor)) == combination.tp

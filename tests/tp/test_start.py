"""One server whose ranks Ray runs: part of make test-long, as the others take minutes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving.client import Client
from tp import processes


@pytest.mark.long
@pytest.mark.server
def test_ray_runs_the_ranks(serve_ranks, make_checkpoint, prompts, judge):
    server = serve_ranks(make_checkpoint(), '--tp', '2', '--distributed-executor-backend', 'ray')
    assert server.log_text().count('ranks (2) run in a cluster that was started for them') == 1
    workers = processes.ranks(server.pid, 'ray')
    assert len(workers) == 2
    assert [worker.environ()['CUDA_VISIBLE_DEVICES'] for worker in workers] == ['', '']
    client, names = Client(server), ('one photograph', 'text only', 'images in the history')
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: client.chat(prompts[name]), names))
    for name, answer in zip(names, answers, strict=True):
        judge().check(prompts[name], answer, name=name)

"""The unmodified ``lmdeploy serve api_server``: right answers alone and in company, for all kinds of checkpoints."""

import re

import pytest
from serving.client import check_alone_and_together
from serving.configurations import KINDS


@pytest.fixture(
    scope='module',
    params=[pytest.param(kind, id=name, marks=pytest.mark.served(checkpoint=kind)) for name, kind in KINDS.items()],
)
def kind(request):
    return request.param


def test_alone_and_in_random_batches(client, kind, prompts, judge):
    check_alone_and_together(client, prompts, judge(**kind).check)


@pytest.mark.parametrize('compression', ['none', 'all', 0.25])
def test_compression_of_a_request(client, kind, prompts, judge, compression):
    name = 'images in the history'
    answer = client.chat(prompts[name], mm_processor_kwargs={'image': {'compression': compression}})
    judge(**kind).check(prompts[name], answer, compression, name=name)


@pytest.mark.usefixtures('kind')
def test_start_up_log_says_what_runs(client):
    log = client.server.log_text()
    assert 'vision kernels on cpu: torch' in log
    assert log.count('no CUDA device: running on the CPU reference backend') == 1
    assert len(re.findall(r'vision side: on cpu \([0-9.]+ GiB of weights\)\n', log)) == 1
    assert 'vision data type: float32\n' in log and 'tile batch: 1\n' in log
    ours = [line.partition(' - lmdeploy-vico - INFO - ')[2] for line in log.splitlines()]
    said = [re.sub(r'/\S+', 'PATH', line) for line in ours if line]
    assert len(said) > 10 and max(map(len, said)) <= 90
    assert 'trust' not in log and 'Traceback' not in log

"""A short run of either stage, in one go, which others are compared with."""

import pytest
from training.runs import SHORT, SHORT_ROUTER, made, options


@pytest.fixture(scope='session')
def policy(make_checkpoint):
    """A ViCO checkpoint; here a random one, whose router is not fresh."""
    return make_checkpoint(dtype='float32')


@pytest.fixture(scope='session')
def short(start, plain, few, tmp_path_factory):
    """A short run of consistency training."""
    path = tmp_path_factory.mktemp('short') / 'run'
    made('consistency', *options(start, plain, few, path, *SHORT)).run()
    return path


@pytest.fixture(scope='session')
def short_router(policy, plain, data, tmp_path_factory):
    """A short run of router training."""
    path = tmp_path_factory.mktemp('router') / 'run'
    made('router', *options(policy, plain, data, path, *SHORT_ROUTER)).run()
    return path

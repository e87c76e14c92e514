"""What LMDeploy answers where a ViCO model is served, and where none is."""

import json
from types import SimpleNamespace

import pytest
from lmdeploy.serve.anthropic import errors as anthropic
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.openai import errors as openai
from lmdeploy.serve.openai.responses import request as responses

from lmdeploy_vico.adapter.patches import forms
from lmdeploy_vico.patching import Trigger, register

LONG = 'The beginning ' + 'x' * 5000 + ' the end.'
ANSWERS = {
    'openai': lambda: openai.create_error_response(400, LONG),
    'openai, of a request': lambda: openai.create_request_error_response(RequestError(ErrorCode.INVALID_REQUEST, LONG)),
    'openai, streamed': lambda: openai.request_error_payload(RequestError(ErrorCode.INVALID_REQUEST, LONG)),
    'anthropic': lambda: anthropic.create_error_response(ANY_STATUS, LONG),
    'anthropic, of a request': lambda: anthropic.create_request_error_response(
        RequestError(ErrorCode.INVALID_REQUEST, LONG)
    ),
    'responses': lambda: responses.error_response(400, LONG),
}
ANY_STATUS = SimpleNamespace(value=400)


@pytest.fixture
def reached(monkeypatch):
    """``reached(True)``: a ViCO model has been started in this process."""
    return lambda yes: monkeypatch.setattr(register, '_reached', {Trigger.MODEL} if yes else set())


def text_of(answer):
    return json.dumps(answer) if isinstance(answer, dict) else answer.body.decode()


@pytest.mark.parametrize('answer', ANSWERS.values(), ids=ANSWERS.keys())
def test_long_messages(answer, reached):
    reached(True)
    assert len(text_of(answer())) < 1300
    assert 'The beginning' in text_of(answer()) and 'the end.' in text_of(answer())
    reached(False)
    assert LONG in text_of(answer())


def test_counting_is_lmdeploys_where_no_vico_model_is_served(reached):
    reached(False)
    made = []
    forms.count_what_is_billed(SimpleNamespace(proceed=lambda: made.append('theirs')))
    assert made == ['theirs']

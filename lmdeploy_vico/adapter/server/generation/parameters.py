"""The table of generation parameters: for each field of LMDeploy's GenerationConfig, what the engine is given."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from lmdeploy_vico.adapter.server.generation.bias import LogitBias
from lmdeploy_vico.adapter.server.generation.errors import ParameterError
from lmdeploy_vico.adapter.server.generation.rules import (
    Limits,
    Rule,
    anything,
    flag,
    integer,
    list_of,
    number,
    one_of,
    only_if,
    optional,
    word,
)
from lmdeploy_vico.wording import shown

Config = TypeVar('Config')

INT32 = 2**31 - 1
GREEDY = 1e-5  # a lower temperature leaves only the most probable token, and dividing by it overflows
COLDEST = 0.01  # the lowest that is divided by
MOST_LOGPROBS = 1024  # for each token
MOST_TOKEN_IDS = 1024  # in a list; a batch's lists are as long as the longest
MOST_IN_TURBOMIND = 32  # it cuts a longer list off and goes on, at the end tokens perhaps
TURBOMIND_TOP_K = 1024  # its kernel throws at more, where nothing catches it: the process ends
MOST_STOPS = 16  # each is looked for in the whole vocabulary
LONGEST_STOP = 256  # characters
LONGEST_NGRAM = 1024  # tokens; LMDeploy looks no further back


def _last_token(limits: Limits) -> int:
    return limits.vocabulary - 1


def _one_choice(name: str, value: Any, limits: Limits) -> int:
    """Several choices are several requests to the engine, which /v1/chat/completions makes itself."""
    del limits
    if isinstance(value, bool) or value != 1:
        raise ParameterError(f'{name} must be 1 here, not {shown(value)}: /v1/chat/completions gives several choices.')
    return 1


def _top_k(name: str, value: Any, limits: Limits) -> int:
    """All tokens, which LMDeploy writes as 0, where a request asks for as many as there are or more."""
    count = int(integer(0, lambda limits: limits.vocabulary, clamp=True)(name, value, limits))
    if count == limits.vocabulary:
        return 0
    if limits.turbomind and count > TURBOMIND_TOP_K:
        raise ParameterError(
            f'{name} must be at most {TURBOMIND_TOP_K}, or 0 for no limit, not {count}: TurboMind, which runs this '
            "server's language model, takes no more."
        )
    return count


def _temperature(name: str, value: Any, limits: Limits) -> float:
    temperature = float(number(0, 2)(name, value, limits))
    return 0.0 if temperature < GREEDY else max(temperature, COLDEST)


def _any_integer(name: str, value: Any, limits: Limits) -> int:
    """The engine uses the lowest 32 bits of a seed."""
    del limits
    if not isinstance(value, int) or isinstance(value, bool):
        raise ParameterError(f'{name} must be an integer, not {shown(value)}.')
    return value % 2**64


def _words(name: str, value: Any, limits: Limits) -> Any:
    """A text, or a list of texts."""
    words = [value] if isinstance(value, str) else value
    return list_of(word(LONGEST_STOP), MOST_STOPS)(name, words, limits)


def _processors(name: str, value: Any, limits: Limits) -> Any:
    """The processors of a program that runs the engine itself are its own business; a server's are checked."""
    del name
    for processor in value:
        if isinstance(processor, LogitBias):
            for token_id in processor.token_ids:
                integer(0, _last_token)('A token id of logit_bias', token_id, limits)
    return value


_NEEDS_END = (
    'repetition_ngram_size ends an answer with its end token, so it cannot be used with ignore_eos, min_new_tokens or '
    'bad words that contain it.'
)
_DISAGGREGATED = 'this server has no role in disaggregated serving (--role).'
_disaggregated = only_if(lambda limits: limits.disaggregated, _DISAGGREGATED, anything)
_TURBOMIND = "TurboMind, which runs this server's language model, does not have it."
_ONE_LOGPROB = (
    'Log probabilities need sampling here: temperature above 0, top_k other than 1, top_p above 0, min_p below 1; in a '
    "pipeline do_sample=True. TurboMind, which runs this server's language model, knows only those of tokens that may "
    'be sampled. The PyTorch engine has them for greedy answers too.'
)
_BANNING = ('min_new_tokens', 'bad_words', 'bad_token_ids')
_NOTHING_LEFT = (
    'response_format cannot be used with min_new_tokens, bad_words or bad_token_ids here. What they ban may be all '
    "that it allows, which would leave TurboMind, which runs this server's language model, no token to generate."
)
_PYTORCH_ONLY = (lambda limits: not limits.turbomind, _TURBOMIND)
_token_ids = optional(list_of(integer(0, _last_token), MOST_TOKEN_IDS))


class Parameter(NamedTuple):
    """How clients call a parameter, and its rule."""

    name: str
    rule: Rule


TABLE: Mapping[str, Parameter] = {
    'n': Parameter('n', _one_choice),
    'max_new_tokens': Parameter('max_tokens', optional(integer(0, lambda limits: limits.context, clamp=True))),
    'min_new_tokens': Parameter('min_new_tokens', optional(integer(0, lambda limits: limits.context))),
    'do_sample': Parameter('do_sample', flag),
    'top_p': Parameter('top_p', number(0, 1)),
    'top_k': Parameter('top_k', _top_k),
    'min_p': Parameter('min_p', number(0, 1)),
    'temperature': Parameter('temperature', _temperature),
    'repetition_penalty': Parameter('repetition_penalty', number(0.01, 100)),
    'repetition_ngram_size': Parameter(
        'repetition_ngram_size', only_if(*_PYTORCH_ONLY, integer(0, LONGEST_NGRAM), absent=(0,))
    ),
    'repetition_ngram_threshold': Parameter('repetition_ngram_threshold', integer(0, INT32)),
    'random_seed': Parameter('seed', optional(_any_integer)),
    'ignore_eos': Parameter('ignore_eos', flag),
    'stop_words': Parameter('stop', optional(_words)),
    'bad_words': Parameter('bad_words', optional(_words)),
    'stop_token_ids': Parameter('stop_token_ids', _token_ids),
    'bad_token_ids': Parameter('bad_token_ids', _token_ids),
    'skip_special_tokens': Parameter('skip_special_tokens', flag),
    'spaces_between_special_tokens': Parameter('spaces_between_special_tokens', flag),
    'include_stop_str_in_output': Parameter('include_stop_str_in_output', flag),
    'logprobs': Parameter(
        'The number of logprobs',
        only_if(
            lambda limits: limits.logprobs,
            'this server computes no log probabilities (--logprobs-mode).',
            integer(0, lambda limits: min(limits.vocabulary, MOST_LOGPROBS)),
        ),
    ),
    'logprob_start_len': Parameter('logprob_start_len', only_if(*_PYTORCH_ONLY, integer(-1, INT32), absent=(-1,))),
    'response_format': Parameter('response_format', anything),  # see grammar.py
    'logits_processors': Parameter('logit_bias', only_if(*_PYTORCH_ONLY, optional(_processors))),
    'output_logits': Parameter('output_logits', one_of(None, 'all', 'generation')),
    'output_last_hidden_state': Parameter('output_last_hidden_state', one_of(None, 'all', 'generation')),
    'return_ppl': Parameter('return_ppl', flag),
    'return_routed_experts': Parameter(
        'return_routed_experts',
        only_if(
            lambda limits: limits.routed_experts,
            'this server does not return routed experts (--enable-return-routed-experts).',
            flag,
        ),
    ),
    'with_cache': Parameter('with_cache', _disaggregated),
    'preserve_cache': Parameter('preserve_cache', _disaggregated),
    'migration_request': Parameter('migration_request', _disaggregated),
}


def fit(config: Config, limits: Limits) -> Config:
    """Return a copy of a GenerationConfig with what the engine accepts.

    Raises:
        ParameterError: a parameter, or two together, are out of the engine's reach; the message names them.
    """
    values = fit_values(vars(config), limits)
    _check_together(values)
    if limits.turbomind:
        if not values['temperature']:
            values |= {'top_k': 1, 'temperature': 1.0}  # TurboMind divides by it
        if values['logprobs'] and _keeps_one_token(values):
            raise ParameterError(_ONE_LOGPROB)
        if values['response_format'] and any(values[field] for field in _BANNING):
            raise ParameterError(_NOTHING_LEFT)
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def _keeps_one_token(values: Mapping[str, Any]) -> bool:
    """Return whether the next token is the most probable one, by whichever parameter says so."""
    return not values['do_sample'] or values['top_k'] == 1 or values['top_p'] == 0 or values['min_p'] == 1


def _check_together(values: Mapping[str, Any]) -> None:
    least, most = values['min_new_tokens'] or 0, values['max_new_tokens']
    if most is not None and least > most:
        raise ParameterError(f'min_new_tokens must be at most max_tokens, {most}, not {least}.')
    if values['repetition_ngram_size'] and (values['ignore_eos'] or least):
        raise ParameterError(_NEEDS_END)
    if values['logprob_start_len'] >= 0 and values['logprobs'] is None:
        raise ParameterError('logprob_start_len is for log probabilities, which the request does not ask for.')


def fit_values(values: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Return what the engine is given for each of these fields.

    Raises:
        ParameterError: a value is out of the engine's reach.
    """
    return {
        field: TABLE[field].rule(TABLE[field].name, value, limits) for field, value in values.items() if field in TABLE
    }


def check_tokens(config: Any, limits: Limits) -> None:
    """Check a config in which LMDeploy has turned words into token ids.

    Raises:
        ParameterError: there may come a step at which no token is left to generate, or there are more than the engine
            looks at.
    """
    stop, bad = set(config.stop_token_ids or ()), set(config.bad_token_ids or ())
    if limits.turbomind and max(len(stop), len(bad)) > MOST_IN_TURBOMIND:
        raise ParameterError(
            f'Stop words and stop_token_ids, with the end tokens, may be at most {MOST_IN_TURBOMIND} tokens, and so '
            "may bad words and bad_token_ids: TurboMind, which runs this server's language model, looks at no more."
        )
    if len(stop | bad) >= limits.vocabulary:
        raise ParameterError('stop_token_ids and bad_token_ids leave no token of the vocabulary to generate.')
    if config.repetition_ngram_size and stop & bad:
        raise ParameterError(_NEEDS_END)

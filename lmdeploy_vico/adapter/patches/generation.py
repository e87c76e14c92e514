"""Changes to what LMDeploy's API process hands to its engine, and to the text of answers, for ViCO models.

What no endpoint checks ends the engine for all clients, so it is checked where the requests of all endpoints pass.
"""

from typing import Any

from lmdeploy_vico.adapter.patches.server import vico_model
from lmdeploy_vico.patching import Call, Patch, Trigger, register

_ENGINE = 'lmdeploy.serve.core.vl_async_engine:VLAsyncEngine'
_SERVER = 'lmdeploy.serve.openai'
_UNCHECKED = 'LMDeploy hands parameters on that its engine cannot use, and the engine ends for all clients.'


def start_generation(call: Call) -> None:
    """Have a ViCO model's engine check its requests, its tokenizer give whole characters, and its control be closed."""
    call.proceed()
    engine = call.instance
    model = vico_model(engine)
    if model is not None:
        from lmdeploy_vico.adapter.server.generation.service import Generation

        engine.vico_generation = Generation(engine, model.hf_config.llm_config.vocab_size)
        model.valve = engine.vico_generation.valve


async def check_before_preparing(call: Call) -> Any:
    """Try the grammar of a response format in a thread, and refuse adapters that do not exist."""
    generation = _generation(call.instance)
    if generation is None:
        return await call.proceed()
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    try:
        config = await generation.check(call['gen_config'], call['adapter_name'])
    except (ValueError, RequestError) as error:
        session = call['session_id']
        if not isinstance(session, int) and session._handle is None:
            call.instance.session_mgr.remove(session)
        if isinstance(error, RequestError):
            raise
        raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from error
    return await call.proceed(gen_config=config)


def fit_parameters(call: Call) -> Any:
    """Clamp each parameter to what the engine accepts, or refuse it."""
    generation = _generation(call.instance)
    if generation is None:
        return call.proceed()
    from lmdeploy.messages import GenerationConfig

    fitted = generation.fit(call['gen_config'] or GenerationConfig(), call['input_ids'])
    config = call.proceed(gen_config=fitted)
    generation.check_complete(config)
    return config


def explain_parameter_errors(call: Call) -> Any:
    """Say in a sentence why no GenerationConfig can be made of a request."""
    try:
        return call.proceed()
    except (AssertionError, TypeError, ValueError) as error:
        if not register.reached(Trigger.MODEL):
            raise
        from lmdeploy_vico.adapter.server.generation.service import parameter_error

        raise parameter_error(call['request'], error) from error


def make_bias_portable(call: Call) -> Any:
    """Make the processor of ``logit_bias`` one that can be sent to the engine process."""
    if not register.reached(Trigger.MODEL):
        return call.proceed()
    from lmdeploy_vico.adapter.server.generation.bias import LogitBias

    return LogitBias.parse(call['logit_bias'])


def call_tokens_by_their_bytes(call: Call) -> Any:
    """Give the text and the bytes of tokens in log probabilities."""
    tokenizer = call['tokenizer']
    if register.reached(Trigger.MODEL):
        from lmdeploy_vico.adapter.server.generation.text import NamesAsBytes, is_byte_level

        if is_byte_level(tokenizer):
            return call.proceed(tokenizer=NamesAsBytes(tokenizer))
    return call.proceed()


def refuse_what_completions_lack(call: Call) -> str:
    """Refuse an empty list of prompts, and log probabilities, which the endpoint has no answer for."""
    if register.reached(Trigger.MODEL):
        request = call['request']
        if isinstance(request.prompt, list) and not request.prompt:
            return 'The prompt must not be empty.'
        if request.logprobs:
            return 'logprobs are not returned by /v1/completions. Use /v1/chat/completions or /generate.'
        if request.n is None:
            request.n = 1
    return str(call.proceed())


def refuse_sessions_in_use(call: Call) -> int:
    """Answer 409 to a request with the session id of another one that is running."""
    try:
        return int(call.proceed())
    except ValueError as error:
        if not register.reached(Trigger.MODEL):
            raise
        from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

        raise RequestError(ErrorCode.REQUEST_CONFLICT, 'The session_id is in use by another request.') from error


def know_sessions_by_their_clients_ids(call: Call) -> bool:
    """Compare the session id of a request with those that clients gave, not with the server's own numbers."""
    if register.reached(Trigger.MODEL):
        return call['session_id'] in call.instance.user_session_id_map
    return bool(call.proceed())


def answer_errors_of_endpoints(call: Call) -> None:
    """Answer the errors that an endpoint's code lets through: 400 instead of 500.

    Attached to a function that every server calls with its application, after its model has been started.
    """
    call.proceed()
    if register.reached(Trigger.MODEL):
        from lmdeploy_vico.adapter.server.generation.endpoints import add_error_handlers

        add_error_handlers(call['app'])


async def check_ids_of_perplexity(call: Call) -> Any:
    """Refuse token ids outside the vocabulary, and more of them than fit the context."""
    model, ids, context = vico_model(call.instance), call['input_ids'], call.instance.session_len
    if model is not None:
        model.check_ids(ids)
        if len(ids) >= context:
            raise ValueError(f'The input must have fewer tokens than the context, {context}, not {len(ids)}.')
    return await call.proceed()


async def refuse_reward_scores(call: Call) -> Any:
    """Answer 400 where the model has no reward score."""
    if _generation(call.instance) is None:
        return await call.proceed()
    from lmdeploy_vico.adapter.server.generation.endpoints import unsupported

    raise unsupported('The served model gives no reward scores.')


def refuse_disaggregation(call: Call) -> Any:
    """Refuse calls of disaggregated serving on a server that has no role in it."""
    generation = _generation(call.instance)
    if generation is not None and not generation.disaggregated:
        from lmdeploy_vico.adapter.server.generation.endpoints import unsupported

        raise unsupported('This server has no role in disaggregated serving (--role).')
    return call.proceed()


def complete_the_text(call: Call) -> Any:
    """Have the text of an answer be the decoding of its tokens, to the last character."""
    answers = call.proceed()
    generation = _generation(call.instance)
    if generation is None:
        return answers
    from lmdeploy_vico.adapter.server.generation.text import completed

    return completed(answers, generation.tokenizer, call['request'].gen_config)


def _generation(engine: Any) -> Any:
    """The checks of an engine, if it serves a ViCO model, else None."""
    return getattr(engine, 'vico_generation', None)


PATCHES = (
    Patch(
        start_generation,
        f'{_ENGINE}.__init__',
        "(self, model_path, backend='turbomind', backend_config=None, vision_config=None, trust_remote_code=False, "
        'allowed_media_domains=None, **kwargs)',
        why='LMDeploy decodes a window of tokens that grows as long as no whole character comes of it, and drops what '
        'is not whole when an answer ends. It decodes a third of the vocabulary, in its loop, for a stop word of one '
        'letter. Any client can put its engine to sleep, and have it unpickle what it sends.',
        until='LMDeploy checks parameters, decodes byte by byte, and opens such endpoints by a flag.',
        process='server',
        # By which the engine's load is read, for the option pressure_compression.
        uses={
            'lmdeploy.serve.core.async_engine:AsyncEngine.get_schedule_metrics': '(self)',
            'lmdeploy.serve.managers.session_manager:RequestHandlePool.get': '(self)',
            'lmdeploy.pytorch.envs:enable_request_cache_usage_metric': None,
        },
    ),
    Patch(
        check_before_preparing,
        f'{_ENGINE}.preprocess',
        '(self, messages, session_id, gen_config=None, tools=None, reasoning_effort=None, do_preprocess=True, '
        'adapter_name=None, input_ids=None, enable_thinking=None, chat_template_kwargs=None, media_io_kwargs=None, '
        'mm_processor_kwargs=None, **kwargs)',
        why='LMDeploy compiles a response format in its loop, of any size and for any time, and only in part: what '
        'then fails in the engine ends it. It looks an adapter up unchecked.',
        until='LMDeploy compiles response formats in a thread, and checks adapters.',
        process='server',
    ),
    Patch(
        fit_parameters,
        f'{_ENGINE}._determine_gen_config',
        '(self, input_ids, gen_config=None)',
        why=_UNCHECKED,
        until='LMDeploy checks every field of GenerationConfig, and that a prompt is not empty.',
        process='server',
    ),
    Patch(
        explain_parameter_errors,
        'lmdeploy.serve.core.generation_config:build_generation_config',
        '(request, default_gen_config, *, max_new_tokens=None, **extra_kwargs)',
        why='LMDeploy asserts ranges without a word, which some endpoints answer with a 500.',
        until='LMDeploy answers 400 to parameters that are out of range.',
        process='server',
    ),
    Patch(
        make_bias_portable,
        f'{_SERVER}.chat_completions.logits_processors:logit_bias_logits_processor',
        '(logit_bias, tokenizer)',
        why="LMDeploy's processor is a local function, which cannot be sent to the engine process: 500.",
        until='LMDeploy sends logit_bias to its engine as data.',
        process='server',
    ),
    Patch(
        call_tokens_by_their_bytes,
        f'{_SERVER}.chat_completions.logprobs:_create_chat_completion_logprobs',
        '(tokenizer, token_ids=None, logprobs=None)',
        why='LMDeploy calls tokens as the vocabulary writes their bytes, so that a space is "Ġ" and Chinese cannot be '
        'read, and answers 500 where an id has no token: those by which a vocabulary is padded.',
        until='LMDeploy gives the text and the bytes of tokens.',
        process='server',
    ),
    Patch(
        refuse_what_completions_lack,
        f'{_SERVER}.endpoints.completions:check_request',
        '(request, server_context)',
        why='LMDeploy answers no prompts with no choices, breaks a stream off where log probabilities were asked for, '
        'and leaves them out otherwise. It compares n with a number where it is null.',
        until='LMDeploy answers such requests, or refuses them.',
        process='server',
    ),
    Patch(
        refuse_sessions_in_use,
        'lmdeploy.serve.managers.session_manager:SessionManager.map_user_session_id',
        '(self, user_session_id)',
        why='LMDeploy answers 500 to a session id that is in use.',
        until='LMDeploy answers 409.',
        process='server',
    ),
    Patch(
        know_sessions_by_their_clients_ids,
        'lmdeploy.serve.managers.session_manager:SessionManager.has',
        '(self, session_id)',
        why='Endpoints ask this of the id in a request, and LMDeploy looks among ids that it made itself: 400 for an '
        "id that is free, whenever another client's request happens to have that number.",
        until='LMDeploy asks for the ids of clients.',
        process='server',
    ),
    Patch(
        answer_errors_of_endpoints,
        f'{_SERVER}.api_server:mount_metrics',
        '(app, backend_config)',
        why='LMDeploy answers a request with 500 if an endpoint raises its own RequestError outside of a try block, or '
        'makes another request of it that is not valid.',
        until='LMDeploy has handlers for these errors.',
        process='server',
        uses={'lmdeploy.serve.utils.server_utils:protocol_error_response': '(path, error)'},
    ),
    Patch(
        check_ids_of_perplexity,
        f'{_ENGINE}.async_get_ppl',
        '(self, input_ids)',
        why='LMDeploy looks ids up unchecked, so one bad id of one client ends the engine for all. So does an input as '
        'long as the context.',
        until='LMDeploy checks input_ids.',
        process='server',
    ),
    Patch(
        refuse_reward_scores,
        f'{_ENGINE}.async_get_reward_score',
        '(self, input_ids)',
        why='LMDeploy answers 500 where the model is not a reward model.',
        until='LMDeploy answers 400.',
        process='server',
    ),
    *(
        Patch(
            refuse_disaggregation,
            f'{_ENGINE}.{name}',
            signature,
            why='Any client can end the sessions of others, or have the engine connect to other machines.',
            until='LMDeploy serves these endpoints only with a role.',
            process='server',
        )
        for name, signature in (
            ('free_cache', '(self, session_id)'),
            ('p2p_initialize', '(self, init_request)'),
            ('p2p_connect', '(self, conn_request)'),
            ('p2p_drop_connect', '(self, drop_conn_request)'),
        )
    ),
    Patch(
        complete_the_text,
        f'{_ENGINE}.generate',
        '(self, request, stream_response=True)',
        why='LMDeploy drops the whole characters at the end of an answer that come in one piece with a part of the '
        'next one, or repeats them.',
        until="The text of LMDeploy's answers is the decoding of their tokens.",
        process='server',
        uses={'lmdeploy.tokenizer:DetokenizeState': None},
    ),
)

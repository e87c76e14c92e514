"""A plain InternVL checkpoint keeps LMDeploy's own classes and answers."""

from concurrent.futures import ThreadPoolExecutor

from serving.client import Client
from serving.configurations import DEFAULT, LMDEPLOYS, PLAIN

NAMES = ('one photograph', 'a scanned page', 'two images with text between', 'text only, two turns')


@LMDEPLOYS
def test_same_answers_with_the_plugin_and_without(client, serve, make_checkpoint, prompts, judge):
    # The wrong option is none of this model's.
    with_plugin = Client(serve(make_checkpoint(**PLAIN), '--trust-remote-code', LMDEPLOY_VICO_MAX_TILES='lots'))
    answers = {}
    for mode, asked in {'with': with_plugin, 'without': client}.items():
        answers[mode] = [asked.chat(prompts[name]) for name in NAMES]
        with ThreadPoolExecutor(len(NAMES)) as pool:
            assert list(pool.map(asked.chat, [prompts[name] for name in NAMES])) == answers[mode]
        assert 'vision side:' not in asked.server.log_text()
        hello = [{'role': 'user', 'content': 'Hello!'}]
        usage = asked.openai.chat.completions.create(model=asked.model, messages=hello, max_tokens=1).usage
        assert set(usage.prompt_tokens_details.to_dict()) == {'cached_tokens'}
    assert answers['with'] == answers['without']
    for name, answer in zip(NAMES, answers['with'], strict=True):
        judge(**PLAIN).check(prompts[name], answer, name=name)


@DEFAULT
def test_uncompressed_is_the_reference_at_256_tokens(client, prompts, judge):
    for name in NAMES:
        answer = client.chat(prompts[name], mm_processor_kwargs={'image': {'compression': 'none'}})
        judge().check(prompts[name], answer, 'none', name=name)

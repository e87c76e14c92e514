"""A plain InternVL checkpoint keeps LMDeploy's own classes and answers."""

from concurrent.futures import ThreadPoolExecutor

from serving.client import Client
from serving.configurations import DEFAULT

NAMES = ('one photograph', 'a scanned page', 'two images with text between', 'text only, two turns')


def test_same_answers_with_the_plugin_and_without(serve, make_checkpoint, prompts, judge):
    plain = {'flash': False, 'dtype': 'float32'}
    answers = {}
    for mode in ('1', 'cpu'):
        # LMDeploy's classes need the checkpoint's remote code for its config. The wrong option is none of this model's.
        environment = {'LMDEPLOY_VICO': mode, 'LMDEPLOY_VICO_MAX_TILES': 'lots'}
        server = serve(make_checkpoint(**plain), '--trust-remote-code', **environment)
        client = Client(server)
        answers[mode] = [client.chat(prompts[name]) for name in NAMES]
        with ThreadPoolExecutor(len(NAMES)) as pool:
            assert list(pool.map(client.chat, [prompts[name] for name in NAMES])) == answers[mode]
        assert 'vision side:' not in server.log_text()
        hello = [{'role': 'user', 'content': 'Hello!'}]
        usage = client.openai.chat.completions.create(model=client.model, messages=hello, max_tokens=1).usage
        assert set(usage.prompt_tokens_details.to_dict()) == {'cached_tokens'}
        server.stop()
    assert answers['1'] == answers['cpu']
    for name, answer in zip(NAMES, answers['1'], strict=True):
        judge(**plain).check(prompts[name], answer, name=name)


@DEFAULT
def test_uncompressed_is_the_reference_at_256_tokens(client, prompts, judge):
    for name in NAMES:
        answer = client.chat(prompts[name], mm_processor_kwargs={'image': {'compression': 'none'}})
        judge().check(prompts[name], answer, 'none', name=name)

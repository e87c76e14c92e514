"""What lies directly above TurboMind's binding, on the stand-in for it, in a process of its own."""

import pytest
from turbomind.program import run

pytestmark = pytest.mark.slow  # LMDeploy is imported anew each time


def test_changes_to_its_module_fit_the_installed_lmdeploy():
    code = """
    from lmdeploy_vico.adapter.patches.table import all_patches, can_be_checked
    from lmdeploy_vico.patching import Trigger, check
    ours = [patch for patch in all_patches() if patch.trigger is Trigger.TURBOMIND]
    for patch in ours:
        assert can_be_checked(patch)
        check(patch)
    print(len(ours))
    """
    assert run(code) == '3'


HANDED_OVER = """
import asyncio, gc, weakref, sys
from types import SimpleNamespace
import torch
from lmdeploy.messages import GenerationConfig
from lmdeploy.turbomind import turbomind
from lmdeploy_vico.adapter.server.turbomind.inputs import VisualInput
from lmdeploy_vico.patching import Trigger, register
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.vision.projection import VisualTokens

register.apply(Trigger.TURBOMIND)
received = {}


class ModelRequest:
    def forward(self, inputs, mm_inputs, session, config, stream, metrics, cb):
        received.update({name: tensor.tensor for name, tensor in inputs.items()}, mm_inputs=mm_inputs)
        self.state = SimpleNamespace(status=7, seq_len=len(received['input_ids']) + 1)
        cb()
        output = turbomind._tm.from_dlpack(torch.arange(200, dtype=torch.int32))
        return {'output_ids': output}, self, None

    def consume(self):
        return self.state

    def cancel(self):
        pass


config = SimpleNamespace(dtype='bfloat16', enable_metrics=False, empty_init=False, language_model_only=True)
engine = SimpleNamespace(
    engine_config=config, model_comm=SimpleNamespace(create_request=ModelRequest),
    mm_input_converter=lambda multimodal: multimodal,
)
instance = turbomind.TurboMindInstance(engine)


async def answer():
    rows = torch.randn(64, 8)
    encoded = EncodedImage(VisualTokens(rows, [64], [0.5]), [b'x'])
    visual = VisualInput.of([encoded], [2], torch.bfloat16, '')
    place, prompt = visual.values.data_ptr(), {'multimodal': [visual]}
    features = weakref.ref(encoded)
    stream = instance.async_stream_infer(1, [5] * 70, gen_config=GenerationConfig(), **prompt)
    prompt.pop('multimodal')  # as LMDeploy does when it has handed it over
    del encoded, rows, visual
    async for output in stream:
        gc.collect()
        assert features() is None, 'what the vision side made is kept for the time of the answer'
        assert received['input_embeddings'].data_ptr() == place, 'embeddings were copied on the event loop'
    assert received['input_embedding_ranges'].tolist() == [[2, 66]]
    assert received['mm_inputs'] is None
    texts = instance.async_stream_infer(1, [5] * 70, gen_config=GenerationConfig())
    received.clear()
    async for output in texts:
        assert set(received) == {'input_ids', 'mm_inputs'}
    pictures = [{'pixel_values': 1}, {'pixel_values': 2}]  # of one of LMDeploy's own models in the same process
    async for output in instance.async_stream_infer(1, [5], gen_config=GenerationConfig(), multimodal=pictures):
        assert received['mm_inputs'] == pictures
    values, ranges = instance.prepare_embeddings([torch.ones(3, 8)], [(0, 3)])  # as LMDeploy's own models do
    assert values.dtype == torch.bfloat16 and ranges.tolist() == [[0, 3]]
    print('handed over')


asyncio.run(answer())
"""


def test_embeddings_reach_the_engine_without_another_copy_and_nothing_else_is_kept():
    assert run(HANDED_OVER) == 'handed over'


BUILT = """
import sys
from types import SimpleNamespace
import pytest
import torch
from lmdeploy.messages import TurbomindEngineConfig
from lmdeploy.serve.core.exceptions import RequestError
from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.adapter.server.turbomind.language import TurbomindLanguage
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.options import OptionError, Options
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.vision.projection import VisualTokens

config = load_vico_config(sys.argv[1])
given = TurbomindEngineConfig(tp=1)
language = TurbomindLanguage(config, given, Options())
assert language.building(given).language_model_only and not given.language_model_only


def engine(dtype, width):
    model = SimpleNamespace(text_model=SimpleNamespace(cfg=SimpleNamespace(hidden_size=width)))
    return SimpleNamespace(engine_config=SimpleNamespace(dtype=dtype), source_model=model)


with pytest.raises(OptionError, match='TurboMind runs in float32, in which it takes no visual tokens'):
    language.built(engine('float32', language.width))
with pytest.raises(UnsupportedCheckpointError, match='tokens of 128 values, and .* takes 64: the two do not belong'):
    language.built(engine('bfloat16', 64))
language.built(engine('float16', language.width))
assert language.engine_dtype == torch.float16 and language.dtype == torch.bfloat16  # of another machine, perhaps
language = TurbomindLanguage(config, TurbomindEngineConfig(dtype='float16'), Options())
assert (language.engine_dtype, language.dtype) == (torch.float16, torch.float32)
rows = torch.full((64, language.width), 65504.0)
image = EncodedImage(VisualTokens(rows, [64], [0.5]), [b'x'])
ids, [visual] = language.assemble([[1], [2]], [image], 9)
assert ids == [1] + [9] * 64 + [2] and visual.values.dtype == torch.float16 and visual.values.isfinite().all()
rows[5, 3] = 7e4
with pytest.raises(RequestError, match='beyond the range of float16.* started with --dtype bfloat16'):
    language.assemble([[1], [2]], [image], 9)
forced = TurbomindLanguage(config, TurbomindEngineConfig(dtype='bfloat16'), Options())
forced.built(engine('float16', forced.width))  # which LMDeploy takes where a device has no kernels for bfloat16
with pytest.raises(RequestError, match='beyond .* leaves it no other .* LMDEPLOY_VICO_LANGUAGE_ENGINE=pytorch'):
    forced.assemble([[1], [2]], [image], 9)
assert language.assemble([[1]], [], 9) == ([1], [])
print(language.engine_dtype)
with pytest.raises(OptionError, match='--tp 2, --dp 1, --cp 1 and --ep 3 do not work together on 1 devices'):
    TurbomindLanguage(config, TurbomindEngineConfig(tp=2, ep=3), Options())
with pytest.raises(OptionError, match=r'TurboMind is told to use the devices \\[3\\]: set vision_device'):
    TurbomindLanguage(config, TurbomindEngineConfig(devices=[3]), Options())
assert TurbomindLanguage(config, TurbomindEngineConfig(devices=[3]), Options(vision_device='cpu')).config.tp == 1
"""


def test_what_has_been_built_is_compared_with_the_vision_side(make_checkpoint):
    assert run(BUILT, make_checkpoint()) == 'torch.float16'


def test_no_float16_overflow_in_silence():
    """LMDeploy's own conversion turns what float16 cannot hold into infinity: when this fails, the check can go."""
    code = """
    import torch
    from types import SimpleNamespace
    from lmdeploy.turbomind import turbomind
    instance = turbomind.TurboMindInstance.__new__(turbomind.TurboMindInstance)
    instance.tm_model = SimpleNamespace(engine_config=SimpleNamespace(dtype='float16'))
    values, _ = instance.prepare_embeddings([torch.full((1, 1), 1e6)], [(0, 1)])
    print(values.item())
    """
    assert run(code) == 'inf'

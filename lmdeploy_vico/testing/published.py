"""The published models' shapes, and checkpoints of them that have everything but weights, for sizing a deployment."""

from dataclasses import dataclass
from pathlib import Path

from lmdeploy_vico.testing.checkpoint import MARKER, prepare_directory, write_configuration, write_json
from lmdeploy_vico.testing.configuration import Size
from lmdeploy_vico.testing.tokenizer import write_tokenizer

VOCABULARY = 151936  # embedding rows of the published language models
WEIGHTS = ('*.safetensors', '*.safetensors.index.json')


class WeightsExistError(FileExistsError):
    """A directory holds weights, beside which a config without weights would describe what is not there."""


@dataclass(frozen=True)
class Model:
    """A model's shape: ``llm`` is 'dense' (Qwen3) or 'moe' (Qwen3-MoE), ``vit`` the norm of its InternViT."""

    size: Size
    llm: str = 'dense'
    vit: str = 'layer_norm'
    vocab_size: int = VOCABULARY


INTERNVIT_300M = (1024, 24, 16, 4096)
INTERNVIT_6B = (3200, 45, 25, 12800)


def _dense(vit: tuple[int, int, int, int], hidden: int, layers: int, heads: int, mlp: int) -> Model:
    size = Size(*vit, hidden, layers, heads, 8, 128, mlp, experts=0, experts_per_token=0, expert_mlp=0)
    return Model(size, 'dense', _vit_norm(vit))


def _moe(vit: tuple[int, int, int, int], hidden: int, layers: int, heads: int, mlp: int, expert_mlp: int) -> Model:
    size = Size(*vit, hidden, layers, heads, 4, 128, mlp, experts=128, experts_per_token=8, expert_mlp=expert_mlp)
    return Model(size, 'moe', _vit_norm(vit))


def _vit_norm(vit: tuple[int, int, int, int]) -> str:
    return 'rms_norm' if vit is INTERNVIT_6B else 'layer_norm'


# No language model has tied embeddings: the 1B is published with 1.06 billion parameters, 0.16 of them its head.
MODELS = {
    '1B': _dense(INTERNVIT_300M, 1024, 28, 16, 3072),
    '2B': _dense(INTERNVIT_300M, 2048, 28, 16, 6144),
    '4B': _dense(INTERNVIT_300M, 2560, 36, 32, 9728),
    '8B': _dense(INTERNVIT_300M, 4096, 36, 32, 12288),
    '14B': _dense(INTERNVIT_300M, 5120, 40, 40, 17408),
    '30B-A3B': _moe(INTERNVIT_300M, 2048, 48, 32, 6144, expert_mlp=768),
    '38B': _dense(INTERNVIT_6B, 5120, 64, 64, 25600),
    '241B': _moe(INTERNVIT_6B, 4096, 94, 64, 12288, expert_mlp=1536),
}


def make_checkpoint_without_weights(path: str | Path, model: str | Model, force: bool = False) -> Path:
    """Write config and tokenizer of a model, to be served with ``LMDEPLOY_VICO_DUMMY_WEIGHTS=1``; return the directory.

    The configuration has the shapes of ``model``, which is one of :data:`MODELS` if it is a name; tokenizer and routing
    thresholds are those of the tiny checkpoints, so that most token ids such a model generates have no text. Raises
    ValueError for an unknown name, WeightsExistError when ``path`` holds weights, and FileExistsError when it holds
    anything but a tiny checkpoint, unless ``force`` is set.
    """
    if isinstance(model, str) and model not in MODELS:
        raise ValueError(f'a model is one of {", ".join(MODELS)}; got {model!r}')
    shape = MODELS[model] if isinstance(model, str) else model
    path = Path(path)
    if any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        raise WeightsExistError(f'{path} holds weights, which would not fit this config: choose another directory')
    prepare_directory(path, force)
    write_json(path / MARKER, {'made_by': 'lmdeploy-vico tiny --like', 'like': model if isinstance(model, str) else ''})
    token_ids = write_tokenizer(path)
    write_configuration(path, shape.size, shape.llm, shape.vit, shape.vocab_size, token_ids)
    return path

"""Checkpoints whose language model is quantised, tensor by tensor as quantisers store them; the vision side is not."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL
from lmdeploy_vico.checkpoints.random.configuration import Size, checkpoint_config
from lmdeploy_vico.checkpoints.random.published import Model, tensor_shapes
from lmdeploy_vico.checkpoints.random.tiny import write_configuration
from lmdeploy_vico.checkpoints.random.tokenizer import write_tokenizer

# As small as blocks of 128 x 128 allow: queries, keys and values have 256, 128 and 128 rows.
SIZE = Size(64, 2, 4, 128, 256, 2, 4, 2, 64, 256, 4, 2, 128)
GROUP = 32

CONFIGS = {
    'awq': {'quant_method': 'awq', 'bits': 4, 'group_size': GROUP, 'version': 'gemm', 'zero_point': True},
    'fp8': {'quant_method': 'fp8', 'fmt': 'e4m3', 'activation_scheme': 'dynamic', 'weight_block_size': [128, 128]},
    'compressed-tensors': {
        'quant_method': 'compressed-tensors',
        'format': 'pack-quantized',
        'quantization_status': 'compressed',
        'config_groups': {
            'group_0': {
                'targets': ['Linear'],
                'input_activations': None,
                'output_activations': None,
                'weights': {
                    'num_bits': 4,
                    'group_size': GROUP,
                    'strategy': 'group',
                    'symmetric': True,
                    'dynamic': False,
                    'type': 'int',
                },
            }
        },
    },
}
SKIP_LIST = {'awq': 'modules_to_not_convert', 'fp8': 'modules_to_not_convert', 'compressed-tensors': 'ignore'}


def quantise(method: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random tensors in the place of a linear layer's weight ``[rows, columns]``."""

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    if method == 'awq':
        return {
            'qweight': integers(columns, rows // 8),
            'qzeros': integers(columns // GROUP, rows // 8),
            'scales': scales(columns // GROUP, rows).half(),
        }
    if method == 'fp8':
        return {
            'weight': torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn),
            'weight_scale_inv': scales(-(-rows // 128), -(-columns // 128)),
        }
    return {
        'weight_packed': integers(rows, columns // 8),
        'weight_scale': scales(rows, columns // GROUP).bfloat16(),
        'weight_shape': torch.tensor([rows, columns], dtype=torch.int32),
    }


def make_quantised(
    path: Path, method: str, llm: str, plain: tuple[str, ...], skip_list: list[str] | None, place: str = 'top'
) -> dict[str, torch.Tensor]:
    """Write a checkpoint and return its tensors.

    Args:
        method: one of :data:`CONFIGS`.
        llm: 'dense' or 'moe'.
        plain: parts of the names of projections whose weights stay in bfloat16.
        skip_list: what the quantisation's config says of them; None for no list.
        place: where config.json has it: 'top', 'llm_config' or 'both'.
    """
    path.mkdir(exist_ok=True)
    vocabulary = 1024
    token_ids = write_tokenizer(path)
    config = checkpoint_config(SIZE, llm, 'layer_norm', vocabulary, token_ids)
    quantisation = CONFIGS[method] | ({} if skip_list is None else {SKIP_LIST[method]: skip_list})
    for part in {'top': [config], 'llm_config': [config['llm_config']], 'both': [config, config['llm_config']]}[place]:
        part['quantization_config'] = quantisation
    write_configuration(path, config, token_ids)

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in tensor_shapes(Model(SIZE, llm, vocab_size=vocabulary)).items():
        module = name.removesuffix('.weight')
        if module.startswith(LANGUAGE_MODEL) and module.endswith('_proj') and not any(part in module for part in plain):
            stored = quantise(method, *shape, generator)
            tensors |= {f'{module}.{kind}': tensor for kind, tensor in stored.items()}
        else:
            tensors[name] = torch.randn(shape, generator=generator).bfloat16()
    save_file(tensors, path / 'model.safetensors')
    return tensors

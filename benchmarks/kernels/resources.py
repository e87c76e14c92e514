"""What the Triton kernels take of a GPU, found without one: each is compiled for sm_80, sm_89 and sm_90.

The specialisations are those that the models use: the kernels' own launchers are run on tensors without storage, with
the limits of an A100, an L40S and an H200, and what they would launch is compiled with Triton's own compiler.

    python -m benchmarks kernel-resources            # print the table
    python -m benchmarks kernel-resources --update   # and write it to benchmarks/results/kernel-resources.json
"""

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks import RESULTS
from lmdeploy_vico.config import GRID
from lmdeploy_vico.config import ROUTER_HEADS as HEADS
from lmdeploy_vico.kernels import attention_pool, linear, pack, pixel_shuffle, residual_norm
from lmdeploy_vico.kernels.implementation import INTERPRETED, Limits

TABLE = RESULTS / 'kernel-resources.json'
TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'

# By compute capability: multiprocessors, and bytes of shared memory that one program may have.
CHIPS = {
    80: Limits(processors=108, shared_memory=166_912),
    89: Limits(processors=142, shared_memory=101_376),
    90: Limits(processors=132, shared_memory=232_448),
}
# (ViT width, tiles of a batch): the encoder's own, and the largest of the kernel benchmarks.
BATCHES = ((1024, 8), (1024, 256), (3200, 2), (3200, 256))
LLM_WIDTHS = (1024, 2048, 2560, 4096, 5120)
VIT_NORMS = {1024: True, 3200: False}  # by width: whether it is a LayerNorm, or an RMSNorm
# Both types take the same blocks and copies, and differ in a few registers: the chip that runs most shows how many.
DTYPES = {80: (torch.bfloat16,), 89: (torch.bfloat16,), 90: (torch.bfloat16, torch.float16)}
PATCHES = GRID * GRID
INSTRUCTION = 16  # bytes
# What is counted in the machine code: stores of what has no room in registers, and kinds of other instructions.
COUNTED = {
    'spills': r'\bSTL(?:\.\S+)? ',
    'matrix_instructions': r'\b(?:HMMA|HGMMA)\.',
    'async_copies': r'\bLDGSTS\.',
    'wide_accesses': r'\b(?:LDG|STG|LDGSTS)\.\S*128\b',
    'narrow_accesses': r'\b(?:LDG|STG|LDGSTS)\.(?!\S*128)',
}

_SCALARS = {bool: 'i1', int: 'i32', float: 'fp32'}
_ELEMENTS = {
    torch.bfloat16: 'bf16',
    torch.float16: 'fp16',
    torch.float32: 'fp32',
    torch.bool: 'i1',
    torch.int32: 'i32',
    torch.int64: 'i64',
}


def launches(dtype: torch.dtype) -> None:
    """Run the launchers with the models' shapes."""
    for width, tiles in BATCHES:
        x = torch.empty(tiles, PATCHES + 1, width, dtype=dtype, device='meta')[:, 1:]
        queries = torch.empty(HEADS, tiles, width, device='meta').transpose(0, 1)
        for u in (queries, queries[:1]):
            attention_pool.attention_pool_triton(x, u, 0.125)
        for a, w, gelu in layers(width, tiles, dtype):
            linear.linear_triton(a, w, w[0, :, 0] if a.shape[0] == 1 else None, gelu)
        full, compressing = (
            pixel_shuffle.Norm(*(torch.empty(ratio**2 * width, dtype=dtype, device='meta') for _ in range(2)))
            for ratio in (2, 4)
        )
        compressed = torch.empty(tiles, dtype=torch.bool, device='meta')
        pixel_shuffle.pixel_shuffle_triton(x, compressed, full, compressing, 1e-5, (tiles, tiles))
    for width in LLM_WIDTHS if dtype == torch.bfloat16 else ():  # it moves values of 16 bits, whatever they mean
        out = torch.empty(4096, width, dtype=dtype, device='meta')
        pack.pack_triton(out, [out[:256], out[:64]], [0, 256])
        pack.pack_triton(out, [out[:64], out[:64]], [0, 256], torch.empty(2, dtype=torch.int64, device='meta'), [0, 1])
    for width, layer_norm in VIT_NORMS.items():
        fused = torch.empty(2, PATCHES + 1, 3 * width, dtype=dtype, device='meta')
        x, affine = torch.empty_like(fused[..., :width]), torch.empty(width, dtype=dtype, device='meta')
        bias = affine if layer_norm else None
        residual_norm.residual_norm_triton(x, x, affine, affine, bias, 1e-6)
        if not layer_norm:  # of that ViT, q and k are normalised too
            residual_norm.residual_norm_triton(fused.chunk(3, -1)[1], None, None, affine, bias, 1e-6)


def layers(width: int, tiles: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """The linear layers of the router: rows, weights, and whether a GELU follows."""
    shapes = ((width, width, False), (width, 4 * width, True), (4 * width, width, False), (width, 2, False))
    for inputs, outputs, gelu in shapes:
        a = torch.empty(1, tiles, inputs, device='meta')
        yield a, torch.empty(1, outputs, inputs, dtype=dtype, device='meta'), gelu
    head = width // HEADS
    by_head = torch.empty(HEADS, head, width, dtype=dtype, device='meta')
    yield torch.empty(tiles, HEADS, head, device='meta').transpose(0, 1), by_head.transpose(1, 2), False
    yield torch.empty(tiles, HEADS, width, device='meta').transpose(0, 1), by_head, False


def specialisations(chip: int) -> list[dict[str, Any]]:
    """What is launched for the models on a chip, without repetitions."""
    recorded: dict[str, dict[str, Any]] = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        spec = specialise(kernel, arguments)
        recorded.setdefault(json.dumps(spec, sort_keys=True), spec)

    with (
        patch.object(JITFunction, 'run', record),
        patch.object(attention_pool, 'device_limits', lambda device: CHIPS[chip]),
        patch.object(linear, 'device_limits', lambda device: CHIPS[chip]),
    ):
        for dtype in DTYPES[chip]:
            launches(dtype)
    return list(recorded.values())


def specialise(kernel: JITFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """What Triton compiles a launch for: types, constants, which arguments divide by 16, and options."""
    types, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        value = arguments.pop(parameter.name)
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            types[parameter.name], constants[parameter.name] = 'constexpr', _plain(value)
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = '*' + _ELEMENTS[value.dtype]
            aligned.append(parameter.name)
        else:
            types[parameter.name] = _SCALARS[type(value)]
            if special and value % 16 == 0:
                aligned.append(parameter.name)
    return {
        'kernel': kernel.__name__,
        'module': kernel.__module__,
        'types': types,
        'constants': constants,
        'aligned': aligned,
        'options': arguments,
    }


def _plain(value: Any) -> Any:
    return {'dtype': value.name} if isinstance(value, triton.language.dtype) else value


class Compiled(NamedTuple):
    """One specialisation: the row of the table up to its stack, bytes of shared memory, and its machine code."""

    row: dict[str, Any]
    shared_memory: int
    code: bytes


def compile_and_measure(spec: dict[str, Any], chip: int) -> Compiled:
    """Compile one specialisation."""
    kernel = getattr(sys.modules[spec['module']], spec['kernel'])
    names = [parameter.name for parameter in kernel.params]
    constants = {
        (names.index(name),): triton.language.dtype(value['dtype']) if isinstance(value, dict) else value
        for name, value in spec['constants'].items()
    }
    attributes = {(names.index(name),): [['tt.divisibility', 16]] for name in spec['aligned']}
    source = ASTSource(kernel, spec['types'], constants, attributes)
    compiled = triton.compile(source, target=GPUTarget('cuda', chip, 32), options=dict(spec['options']))
    with tempfile.NamedTemporaryFile(suffix='.cubin') as binary:
        binary.write(compiled.asm['cubin'])
        binary.flush()
        usage = _run('cuobjdump', '--dump-resource-usage', binary.name)
    row = {
        'chip': f'sm_{chip}',
        'kernel': spec['kernel'],
        'types': ' '.join(kind for kind in spec['types'].values() if kind.startswith('*')),
        'constants': ' '.join(f'{name}={_short(value)}' for name, value in spec['constants'].items()),
        'aligned': ' '.join(name for name in spec['aligned'] if not spec['types'][name].startswith('*')),
        'warps': spec['options']['num_warps'],
        'registers': _resource('REG', usage),
        'stack': _resource('STACK', usage),
    }
    return Compiled(row, compiled.metadata.shared, machine_code(compiled.asm['cubin']))


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin's only function: the section ``.text.NAME`` of an ELF file of 64 bits."""
    [headers] = struct.unpack_from('<Q', cubin, 0x28)
    size, count, names = struct.unpack_from('<HHH', cubin, 0x3A)
    # Of each section: where its name is among the names, its offset in the file, and its bytes.
    sections = [struct.unpack_from('<I20xQQ', cubin, headers + index * size) for index in range(count)]
    found = [
        cubin[offset : offset + length]
        for name, offset, length in sections
        if cubin.startswith(b'.text.', sections[names][1] + name)
    ]
    [code] = found
    return code


def count_instructions(codes: Sequence[bytes], chip: int) -> list[dict[str, int]]:
    """What is counted in each of the codes; all are disassembled together, as starting the program takes longest."""
    with tempfile.NamedTemporaryFile(suffix='.bin') as binary:
        binary.write(b''.join(codes))
        binary.flush()
        # Without an analysis of the data flow, which takes long.
        listing = _run('nvdisasm', '-ndf', '--binary', f'SM{chip}{"a" if chip == 90 else ""}', binary.name)
    lines = {int(place, 16): text for place, text in re.findall(r'/\*([0-9a-f]+)\*/ +(.*)', listing)}
    ends = list(accumulate(map(len, codes)))
    if len(lines) * INSTRUCTION != ends[-1]:
        raise RuntimeError(f'nvdisasm printed {len(lines)} instructions of {ends[-1] // INSTRUCTION}.')
    counts = []
    for code, end in zip(codes, ends, strict=True):
        text = '\n'.join(lines[place] for place in range(end - len(code), end, INSTRUCTION))
        counts.append({name: len(re.findall(pattern, text)) for name, pattern in COUNTED.items()})
    return counts


def _resource(name: str, usage: str) -> int:
    [number] = re.findall(rf'\b{name}:(\d+)', usage)
    return int(number)


def _short(value: Any) -> Any:
    return value['dtype'] if isinstance(value, dict) else value


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def measure() -> dict[str, Any]:
    """Compile everything, on all cores."""
    jobs = [(spec, chip) for chip in CHIPS for spec in specialisations(chip)]
    with ProcessPoolExecutor(mp_context=get_context('fork')) as pool:
        compiled = list(pool.map(compile_and_measure, *zip(*jobs, strict=True)))
    rows = []
    for chip in CHIPS:
        here = [one for one, (_, other) in zip(compiled, jobs, strict=True) if other == chip]
        for one, counts in zip(here, count_instructions([one.code for one in here], chip), strict=True):
            rows.append(one.row | {'spills': counts['spills'], 'shared_memory': one.shared_memory} | counts)
    return {'triton': triton.__version__, 'rows': rows}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table('chip', 'kernel', 'types', 'constants', title='Kernel resources')
    numbers = ('warps', 'registers', 'stack', 'spills', 'shared_memory', 'matrix_instructions', 'async_copies')
    for name in numbers:
        table.add_column(name.replace('_', ' '), justify='right')
    for row in rows:
        columns = (row['chip'], row['kernel'], row['types'], row['constants'])
        table.add_row(*columns, *(str(row[name]) for name in numbers))
    Console(width=220).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--update', action='store_true', help=f'write the table to {TABLE.name}')
    parser.add_argument('--output', type=Path, help='write the table, as JSON, to this file')
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error('unset TRITON_INTERPRET: kernels made for the interpreter cannot be compiled')
    results = measure()
    show(results['rows'])
    for path in ([TABLE] if arguments.update else []) + ([arguments.output] if arguments.output else []):
        rows = ',\n'.join('  ' + json.dumps(row) for row in results['rows'])
        path.write_text(f'{{"triton": "{results["triton"]}", "rows": [\n{rows}\n]}}\n')
    return 0

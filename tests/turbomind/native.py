"""A stand-in for ``lmdeploy.turbomind._turbomind``, the binding of LMDeploy's engine in C++, which needs a CUDA driver.

Everything in Python above it is LMDeploy's own: it takes weights as they are committed to C++, and requests as they are
handed over. It checks what ``input_processor.cc`` checks, and what that file leaves unchecked. It is no part of the
package and says nothing about TurboMind's own arithmetic, memory or speed.
"""

import copy
import enum
import logging
from typing import Any

import torch
from turbomind.engine import Engine, Request
from turbomind.guided import GrammarCompiler as GrammarCompiler
from turbomind.guided import TokenizerInfo as TokenizerInfo
from turbomind.weights import language_model

logger = logging.getLogger('lmdeploy_vico.stand_in')  # which is shown


class DataType(enum.Enum):
    TYPE_INVALID = 0
    TYPE_UINT4 = 1
    TYPE_UINT8 = 2
    TYPE_INT8 = 3
    TYPE_UINT32 = 4
    TYPE_INT32 = 5
    TYPE_INT64 = 6
    TYPE_FP16 = 7
    TYPE_BF16 = 8
    TYPE_FP32 = 9
    TYPE_FP8_E4M3 = 10
    TYPE_FP4_E2M1 = 11
    TYPE_GENERIC_FLOAT = 12


TORCH = {
    DataType.TYPE_UINT8: torch.uint8,
    DataType.TYPE_INT8: torch.int8,
    DataType.TYPE_INT32: torch.int32,
    DataType.TYPE_INT64: torch.int64,
    DataType.TYPE_FP16: torch.float16,
    DataType.TYPE_BF16: torch.bfloat16,
    DataType.TYPE_FP32: torch.float32,
}
TYPES = {dtype: name for name, dtype in TORCH.items()}


class ActivationType(enum.Enum):
    kSilu = 0  # noqa: N815
    kSiluGptOss = 1  # noqa: N815


class Tensor:
    """A tensor of C++ that shares its memory with the one it was made of."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.type = TYPES[tensor.dtype]

    @property
    def byte_size(self) -> int:
        return self.tensor.nbytes

    def copy_from(self, source: torch.Tensor) -> None:
        assert source.dtype == self.tensor.dtype and source.nbytes == self.tensor.nbytes
        self.tensor.view(-1).copy_(source.reshape(-1))

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def from_dlpack(tensor: Any) -> Tensor:
    return Tensor(torch.from_dlpack(tensor))


class TensorMap(dict):
    """Tensors by name."""


class Config:
    """A struct of settings."""

    def __init__(self) -> None:
        self.data_type = DataType.TYPE_INVALID

    def clone(self) -> 'Config':
        return copy.deepcopy(self)


class NormConfig(Config): ...


class FfnConfig(Config): ...


class ModelWeightConfig(Config): ...


class DecoderLayerConfig(Config): ...


class ModuleListConfig(Config): ...


class LinearConfig(Config): ...


class WeightQuery(Config): ...


class EngineConfig(Config): ...


class AttentionConfig(Config):
    def __init__(self) -> None:
        super().__init__()
        self.rope = Config()


class DataFormat:
    def __init__(self, weight: DataType, block: list[int], scales: DataType, zeros: DataType) -> None:
        self.weight = weight


class Parameter:
    def __init__(self, module: 'Module', name: str) -> None:
        self._module, self._name = module, name

    def alloc(self, shape: list[int], dtype: DataType) -> Tensor:
        tensor = Tensor(torch.full(shape, torch.nan, dtype=TORCH[dtype]))
        self._module.parameters[self._name] = tensor.tensor
        return tensor


class Module:
    """A module of C++: its settings, parameters and children."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config
        self.parameters: dict[str, torch.Tensor] = {}
        self.children: dict[str, Module] = {}

    def param(self, name: str) -> Parameter:
        return Parameter(self, name)

    def set_plan(self, plan: Any) -> None:
        assert isinstance(plan, WeightPlan)

    def add_child_raw(self, name: str, child: 'Module') -> None:
        assert name not in self.children
        self.children[name] = child


def create_module(config: Config) -> Module:
    return Module(config.clone())


class WeightPlan:
    family = 'stand-in'
    bridge = (1, 1, DataType.TYPE_INVALID, DataType.TYPE_INVALID)
    shape_constraints = ((1, 1), (1, 1))

    def gate_up(self, activation: ActivationType, columns: int) -> int:
        return 0  # not fused


class Gemm:
    def data_types(self, data_format: DataFormat) -> set[DataType]:
        return {DataType.TYPE_BF16, DataType.TYPE_FP16}

    def get_weight_plan(self, query: WeightQuery) -> WeightPlan:
        return WeightPlan()


class SessionParam:
    def __init__(self, id: int, step: int) -> None:
        self.id, self.step = id, step


class GenerationConfig:
    """The defaults of ``request.h``."""

    def __init__(self) -> None:
        self.max_new_tokens = self.min_new_tokens = 0
        self.eos_ids: list[int] = []
        self.stop_ids: list[list[int]] = [[], []]
        self.bad_ids: list[list[int]] = [[], []]
        self.top_k, self.top_p, self.min_p = 1, 0.0, 0.0
        self.temperature = self.repetition_penalty = 1.0
        self.random_seed = self.output_logprobs = self.output_last_hidden_state = self.output_logits = 0
        self.return_ppl = False


class DeviceContext:
    def __enter__(self) -> None: ...

    def __exit__(self, *details: object) -> None: ...


class TurboMind:
    """The engine in C++ with one device."""

    def __init__(self, config: EngineConfig) -> None:
        self._config, self._root = config, Module()
        self._engine: Engine | None = None

    @staticmethod
    def create(model_dir: str, engine_config: EngineConfig) -> 'TurboMind':
        assert not model_dir and list(engine_config.devices) == [0]
        return TurboMind(engine_config)

    def is_dummy_node(self) -> bool:
        return False

    def create_context(self, index: int) -> None:
        assert index == 0

    create_root = process_weight = create_context

    def root(self, index: int) -> Module:
        return self._root

    def context(self, index: int) -> DeviceContext:
        return DeviceContext()

    def gemm(self, index: int) -> Gemm:
        return Gemm()

    def attn_tp_rank(self, index: int) -> int:
        return 0

    mlp_tp_rank = ep_rank = model_tp_rank = attn_tp_rank

    def create_engine(self, index: int) -> None:
        assert set(self._root.children) == {'text_model'}, 'LMDeploy has built its own vision model'
        dtype = TORCH[self._config.data_type]
        logger.warning('a stand-in serves in the place of TurboMind, in %s', dtype)
        self._engine = Engine(language_model(self._root.children['text_model']), dtype, self._config.session_len)

    def create_request(self) -> 'ModelRequest':
        assert self._engine is not None
        return ModelRequest(self._engine)

    def get_schedule_metrics(self, index: int) -> Any:
        assert self._engine is not None
        return self._engine.metrics()


class ModelRequest:
    """What serves one request after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: Request | None = None
        self._grammar: Any = None

    def set_grammar(self, grammar: Any) -> None:
        """Have a grammar guide the next request, and none after it."""
        self._grammar = grammar

    def forward(
        self,
        inputs: TensorMap,
        mm_inputs: Any,
        session: Any,
        config: Any,
        stream: bool,
        metrics: bool,
        cb: Any,
    ) -> tuple[TensorMap, Request, Any]:
        given = {name: tensor.tensor for name, tensor in inputs.items()}
        grammar, self._grammar = self._grammar, None
        self._running = request = Request(given, mm_inputs, config, stream, cb, self._engine, grammar)
        self._engine.add(request)
        outputs = TensorMap({name: Tensor(tensor) for name, tensor in request.outputs.items()})
        return outputs, request, request.metrics if metrics else None

    def cancel(self) -> None:
        if self._running is not None:
            self._running.canceled = True

"""What the server of a ViCO model asks before it generates: one object for each engine."""

from collections.abc import Sequence
from typing import Any

from lmdeploy.messages import TurbomindEngineConfig
from lmdeploy.pytorch.disagg.config import EngineRole
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

from lmdeploy_vico.adapter.server.generation.control import close_control
from lmdeploy_vico.adapter.server.generation.errors import ParameterError
from lmdeploy_vico.adapter.server.generation.grammar import GrammarCheck, compiler_of
from lmdeploy_vico.adapter.server.generation.parameters import check_tokens, fit, fit_values
from lmdeploy_vico.adapter.server.generation.rules import Limits
from lmdeploy_vico.adapter.server.generation.stops import stop_token_finder
from lmdeploy_vico.adapter.server.generation.text import Detokenizer, is_byte_level
from lmdeploy_vico.adapter.server.pressure.engine import valve_of
from lmdeploy_vico.adapter.server.turbomind import grammar as turbomind_grammar
from lmdeploy_vico.options import Options
from lmdeploy_vico.wording import shown

_WIDE = Limits(vocabulary=2**31 - 1, context=2**31 - 1, disaggregated=True)


class Generation:
    """Checks the requests of an engine.

    Args:
        engine: LMDeploy's AsyncEngine, complete.
        vocabulary: tokens of its language model.

    Attributes:
        tokenizer: of transformers'.
        valve: decides what is compressed while the engine is overloaded; None where nothing is.
    """

    def __init__(self, engine: Any, vocabulary: int) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self.tokenizer = engine.tokenizer.model.model
        self._turbomind = isinstance(engine.backend_config, TurbomindEngineConfig)
        self._check_grammar = (
            GrammarCheck(turbomind_grammar.compiler_of(engine.engine), remembered=turbomind_grammar.REMEMBERED)
            if self._turbomind
            else GrammarCheck(compiler_of(self.tokenizer, vocabulary))
        )
        if is_byte_level(self.tokenizer):
            # Take the place of methods, for this tokenizer only.
            engine.tokenizer.detokenize_incrementally = Detokenizer(self.tokenizer)
            engine.tokenizer.model.indexes_containing_token = stop_token_finder(engine.tokenizer.model)
        options = Options.load(engine.backend_config.hf_overrides)
        if not options.control_endpoints:
            close_control(engine)
        self.valve = valve_of(engine, options)

    @property
    def disaggregated(self) -> bool:
        """Whether the server has a role in disaggregated serving."""
        return getattr(self._engine.backend_config, 'role', EngineRole.Hybrid) != EngineRole.Hybrid

    async def check(self, config: Any, adapter_name: str | None) -> Any:
        """Check what takes time, and what is no field of the config; called before a request is prepared.

        Returns:
            the GenerationConfig, if there is one, with which the request goes on.

        Raises:
            ParameterError, OverloadError: the request must not go on; the message says why.
        """
        adapters = getattr(self._engine.backend_config, 'adapters', None) or {}
        if adapter_name is not None and adapter_name not in adapters:
            raise ParameterError(f'There is no adapter {shown(adapter_name)}.')
        if config is None or config.response_format is None:
            return config
        grammar = await self._check_grammar(config.response_format)
        return turbomind_grammar.guided(config, grammar) if self._turbomind else config

    def fit(self, config: Any, input_ids: Sequence[int]) -> Any:
        """Return a copy of a GenerationConfig that the engine can use with this prompt.

        Raises:
            ParameterError: there is none.
        """
        if not len(input_ids):
            raise ParameterError('The prompt must not be empty.')
        return fit(config, self._limits(len(input_ids)))

    def check_complete(self, config: Any) -> None:
        """Check a config in which LMDeploy has turned words into token ids.

        Raises:
            ParameterError: it leaves nothing to generate.
        """
        check_tokens(config, self._limits(0))

    def _limits(self, prompt: int) -> Limits:
        config = self._engine.backend_config
        return Limits(
            vocabulary=self._vocabulary,
            context=self._engine.session_len - prompt,
            logprobs=getattr(config, 'logprobs_mode', 'not an option of this engine') is not None,
            routed_experts=bool(getattr(config, 'enable_return_routed_experts', False)),
            disaggregated=self.disaggregated,
            turbomind=self._turbomind,
        )


def parameter_error(request: Any, error: Exception) -> RequestError:
    """What a client is told when LMDeploy's GenerationConfig cannot be made of its request.

    Args:
        request: as LMDeploy parsed it.
        error: of the config, which often says nothing.
    """
    message = str(error) or 'A generation parameter is out of its range.'
    try:
        fit_values({name: value for name, value in request if value is not None}, _WIDE)
    except ParameterError as explained:
        message = str(explained)
    return RequestError(ErrorCode.INVALID_REQUEST, message)

"""Memory and time of a run, by a model that is stated: :data:`ASSUMPTIONS` is printed below every table of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lmdeploy_vico.checkpoints.flops import VIT_TOKENS
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.training.cost.shapes import Shapes
from lmdeploy_vico.training.model.losses import CHUNK

ASSUMPTIONS = """\
Memory: 16 bytes for each trained parameter (float32 weight and gradient, AdamW), 2 for each frozen one and for each of
the reference, shared by the GPUs. Gathered, in bfloat16: the root of both models and two units; the root's gradient.
Gradients of one of them at a time in float32, to be reduced. With adapters, these and mlp2 are what is trained, and
there is no reference beside the model.
Activations: the inputs of all units, what one unit computes from them, and the logits of 1024 tokens, four times in
float32. Allocator and NCCL come on top: leave a tenth free.
Time: 2 FLOP a parameter and token, and attention; a trained part three times that, and once more as it is computed
again; one with adapters three times in all. Half of a sample's tiles are compressed for the policy, none for the
reference. Reading data is not counted, nor is communication.
"""


@dataclass(frozen=True)
class Workload:
    """What a sample is, and what there is to compute it.

    Attributes:
        tiles, text: of a sample; half of the tokens of text are of responses.
        gpus: how many.
        flops: that each does in a second.
        batch, micro_batch, steps: of the run; and ``warm_up`` steps before it.
    """

    tiles: int
    text: int
    gpus: int
    flops: float
    batch: int
    micro_batch: int
    steps: int
    warm_up: int = 0

    @property
    def reference_tokens(self) -> int:
        """Tokens of a sample with no tile compressed."""
        return self.tiles * TOKENS_FULL + self.text

    @property
    def policy_tokens(self) -> float:
        """Tokens of a sample with half of its tiles compressed."""
        return self.tiles * (TOKENS_FULL + TOKENS_COMPRESSED) / 2 + self.text


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        trained: parameters.
        states, gathered, activations: bytes on each GPU.
        tokens: of a step, for policy and reference together.
        seconds: of a step.
        hours: of the run.
    """

    trained: int
    states: float
    gathered: float
    activations: float
    tokens: float
    seconds: float
    hours: float

    @property
    def memory(self) -> float:
        """Bytes on each GPU."""
        return self.states + self.gathered + self.activations


def consistency(shapes: Shapes, parts: Sequence[str], work: Workload) -> Estimate:
    """Consistency training of these parts, sharded over all GPUs; or of the adapters where ``shapes`` has some."""
    lora = sum(shapes.adapters.values())
    weights = sum(shapes.parameters[part] for part in ({'mlp2'} if lora else {*parts, 'mlp2'}))
    reference = 0 if lora else shapes.total  # with adapters off, the model is its own
    states = (16 * (weights + lora) + 2 * (shapes.total - weights) + 2 * reference) / work.gpus
    main = _sample(shapes, (), work, adapters=True) if lora else _sample(shapes, parts, work)
    warm_up = _sample(shapes, (), work)
    tokens = work.batch * (work.reference_tokens + work.policy_tokens)
    seconds = work.batch * main / work.gpus / work.flops
    hours = (work.steps * seconds + work.warm_up * seconds * warm_up / main) / 3600
    return Estimate(weights + lora, states, _gathered(shapes), _activations(shapes, work), tokens, seconds, hours)


def router(shapes: Shapes, work: Workload) -> Estimate:
    """Router training, loss ratios first: every tile of the run is judged once, by two whole models.

    Memory is that of the ratios, in bfloat16; several GPUs share the models. Tokens and seconds are of a step and of
    its ratios.
    """
    policy = 2 * (shapes.language_flops(work.reference_tokens, work.text / 2) + shapes.vit_flops(work.tiles))
    reference = policy / 2
    ratios = work.batch * (policy + reference) / work.gpus
    # The gradient of the router is nothing beside the ViT's forward pass.
    step = work.batch * shapes.vit_flops(1) / work.gpus
    seconds = (ratios + step) / work.flops
    logits = 2 * CHUNK * shapes.llm['vocab_size'] * 4
    unit = 2 * work.reference_tokens * _inner(shapes) * 2
    trained = shapes.parameters['router']
    tokens = 3 * work.batch * work.reference_tokens
    gathered = 2 * 2 * (shapes.units['root'] + shapes.largest_unit) if work.gpus > 1 else 0
    states = 2 * 2 * shapes.total / work.gpus
    return Estimate(trained, states, gathered, unit + logits, tokens, seconds, work.steps * seconds / 3600)


def _gathered(shapes: Shapes) -> float:
    """Bytes of what FSDP has gathered in consistency training, and of its gradients."""
    root, unit = shapes.units['root'], shapes.largest_unit
    if not shapes.adapters:
        return 2 * 3 * root + 2 * 2 * unit + 4 * max(root, unit)  # gradients are reduced in float32
    # One model, in which mlp2 and the adapters alone have gradients.
    of_units = max(count for name, count in shapes.adapters.items() if name != 'root')
    of_root = shapes.adapters['root']
    trained = shapes.parameters['mlp2'] + of_root
    return 2 * (root + of_root + trained) + 2 * 2 * (unit + of_units) + 4 * max(trained, of_units)


def _sample(shapes: Shapes, parts: Collection[str], work: Workload, adapters: bool = False) -> float:
    """FLOP of a sample in training: the reference's forward pass, and the policy's with its gradient.

    Args:
        shapes: the model's.
        parts: that are trained, besides mlp2.
        work: what a sample is.
        adapters: whether those of all parts are trained: their own work is nothing beside that of what they add to.
    """
    responses, half = work.text / 2, work.tiles / 2
    reference = shapes.vit_flops(work.tiles) + shapes.language_flops(work.reference_tokens, responses)
    # Gradients pass through the language model to the projectors even where its weights are frozen, and to adapters.
    vit = shapes.vit_flops(work.tiles) * (4 if 'vit' in parts else 3 if adapters else 1)
    language = shapes.language_flops(work.policy_tokens, responses) * (4 if 'language' in parts else 3)
    return reference + vit + language + 3 * shapes.projector_flops(half, half)


def _activations(shapes: Shapes, work: Workload) -> float:
    """Bytes of a micro-batch of the policy."""
    llm = shapes.llm
    tiles, tokens = work.micro_batch * work.tiles, work.micro_batch * work.reference_tokens
    inputs = 2 * (
        tiles * VIT_TOKENS * shapes.vit_width * shapes.vit_layers
        + tokens * llm['hidden_size'] * llm['num_hidden_layers']
    )
    inside = 2 * max(tiles * VIT_TOKENS * 14 * shapes.vit_width, tokens * _inner(shapes))
    return inputs + inside + 4 * CHUNK * llm['vocab_size'] * 4


def _inner(shapes: Shapes) -> int:
    """Values of a token inside a layer of the language model: queries, keys, values, their result, and the MLP's."""
    llm = shapes.llm
    attention = 2 * (llm['num_attention_heads'] + llm['num_key_value_heads']) * llm['head_dim']
    mlp = (
        llm['num_experts_per_tok'] * llm['moe_intermediate_size'] if 'num_experts' in llm else llm['intermediate_size']
    )
    return int(attention + 3 * mlp + 4 * llm['hidden_size'])

"""Tiny text-only Qwen3 checkpoints with random weights, an adapter for them, and the cache-free reference."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHAT_TEMPLATE = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
SHAPE = {
    'vocab_size': 320,
    'hidden_size': 64,
    'intermediate_size': 128,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 32,
    'max_position_embeddings': 4096,
    'bos_token_id': 0,
    'eos_token_id': 2,
    'tie_word_embeddings': False,
    'initializer_range': 0.2,
}
LORA_RANK, LORA_ALPHA, LORA_TARGETS = 4, 16, ('q_proj', 'v_proj', 'o_proj', 'down_proj')


def make_text_checkpoint(path: Path, moe: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Write a two-layer Qwen3 (or Qwen3Moe) checkpoint with a byte-level tokenizer."""
    torch.manual_seed(20)
    if moe:
        experts = {'num_experts': 8, 'num_experts_per_tok': 2, 'moe_intermediate_size': 64, 'norm_topk_prob': True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts, decoder_sparse_step=1))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    model.to(dtype).save_pretrained(path)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(['the quick brown fox jumps over the lazy dog'] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return path


def make_adapter(path: Path) -> Path:
    """Write a LoRA adapter for the dense checkpoint, in peft's layout, large enough to change the answers."""
    generator = torch.Generator().manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(LORA_TARGETS):
            key = f'base_model.model.{name}'
            tensors[f'{key}.lora_A.weight'] = torch.randn(LORA_RANK, module.in_features, generator=generator) * 0.1
            tensors[f'{key}.lora_B.weight'] = torch.randn(module.out_features, LORA_RANK, generator=generator) * 0.1
    path.mkdir()
    save_file(tensors, path / 'adapter_model.safetensors')
    config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'r': LORA_RANK,
        'lora_alpha': LORA_ALPHA,
        'target_modules': list(LORA_TARGETS),
        'base_model_name_or_path': None,
    }
    (path / 'adapter_config.json').write_text(json.dumps(config))
    return path


def load_reference(checkpoint: Path, adapter: Path | None = None) -> torch.nn.Module:
    """The checkpoint in transformers, in float32, with the adapter merged into its weights."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if adapter is not None:
        from safetensors.torch import load_file

        tensors = load_file(adapter / 'adapter_model.safetensors')
        for name, module in model.named_modules():
            key = f'base_model.model.{name}'
            if f'{key}.lora_A.weight' in tensors:
                product = tensors[f'{key}.lora_B.weight'] @ tensors[f'{key}.lora_A.weight']
                module.weight.data += product * (LORA_ALPHA / LORA_RANK)
    return model


@torch.inference_mode()
def worst_gap(
    model: torch.nn.Module, prompt_ids: list[int], answer_ids: list[int], repetition_penalty: float = 1.0
) -> float:
    """How far the answer's tokens are below the reference's best, teacher-forced and without a cache.

    A repetition penalty divides the positive and multiplies the negative logits of the tokens answered so far, but
    for the latest one: LMDeploy prepares a step before it has read the token of the step before.

    Returns the largest of ``(best logit - the token's logit) / std of the logits``; 0 for the reference's own answer.
    """
    logits = model(torch.tensor([prompt_ids + answer_ids]), use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    for step in range(1, len(answer_ids)):
        said = list(set(answer_ids[: step - 1]))
        score = logits[step, said]
        logits[step, said] = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    chosen = logits.gather(1, torch.tensor(answer_ids)[:, None])[:, 0]
    return ((logits.max(-1).values - chosen) / logits.std(-1)).max().item()

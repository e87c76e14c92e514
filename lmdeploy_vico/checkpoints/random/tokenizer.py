"""A byte-level BPE tokenizer trained from scratch, in the files and with the special tokens of the published ones."""

import json
from pathlib import Path

VOCABULARY = 896
OFTEN = 20  # times that the wanted words stand in the corpus: more often than any other pair of letters in it

# In the published order: ids are consecutive after the ordinary vocabulary, `<img>` being the 27th.
SPECIAL_TOKENS = (
    '<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|object_ref_start|>', '<|object_ref_end|>', '<|box_start|>',
    '<|box_end|>', '<|quad_start|>', '<|quad_end|>', '<|vision_start|>', '<|vision_end|>', '<|vision_pad|>',
    '<|image_pad|>', '<|video_pad|>', '<tool_call>', '</tool_call>', '<|fim_prefix|>', '<|fim_middle|>',
    '<|fim_suffix|>', '<|fim_pad|>', '<|repo_name|>', '<|file_sep|>', '<tool_response>', '</tool_response>',
    '<think>', '</think>', '<img>', '</img>', '<IMG_CONTEXT>', '<quad>', '</quad>', '<ref>', '</ref>', '<box>',
    '</box>',
)  # fmt: skip
# Ordinary text to a decoder that skips special tokens, as in Qwen3.
SHOWN_TOKENS = frozenset(
    {'<tool_call>', '</tool_call>', '<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>', '<|fim_pad|>'}
    | {'<|repo_name|>', '<|file_sep|>', '<tool_response>', '</tool_response>', '<think>', '</think>'}
)
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# ChatML: no default system prompt, the content of every message as it stands.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] in ['image', 'image_url'] %}{{ '<img><IMG_CONTEXT></img>\\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = """
Describe this image in detail. What is in the picture? How many people are there, and what are they doing?
Read the text on the page and write it down, line by line. Which of the two pictures shows more detail?
The astronaut stands in front of a flag and a model of the shuttle; her suit is orange, her hair is dark.
A cup of coffee and a spoon on a wooden table. A ginger cat looks at the camera with green eyes.
A rocket leaves its launch pad in the evening; smoke and light fill the lower part of the photograph.
Please answer with a single word. Please answer in one short sentence. Explain your reasoning step by step.
The first image is brighter than the second image. The left half is smooth and the right half is full of edges.
A smooth sky needs few visual tokens, while a dense document needs many. Each tile is routed on its own.
You are a helpful assistant. You answer questions about images and text, and you say so when you do not know.
Compare the two images above: what is the same, what has changed, and where? List the objects from left to right.
There is a small house near the river, with a red roof, three windows and a garden behind a white wall.
Translate the sign into English. What is the total at the bottom of the receipt? What time does the clock show?
In the table below, column one is the year and column two the number of visitors; which year had the most?
Numbers: 0 1 2 3 4 5 6 7 8 9 10 12 16 24 32 64 100 128 256 448 512 1000 1024 2048 4096.
def area(width: int, height: int) -> int: return width * height  # the number of pixels in a rectangle
for tile in tiles: tokens = 64 if compressed(tile) else 256; total = total + tokens; print(total)
import torch; from pathlib import Path; with open(path, 'rb') as file: data = file.read()
{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": "..."}}]}
Water, fire, earth, air; black, white, red, green, blue, yellow, orange, brown, grey, pink and purple.
one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand
Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August
because before after during without within between under over above below around through against across along
morning evening night summer winter spring mountain forest island ocean street bridge station market school church
question answer reason result example problem number letter word sentence paragraph chapter title author history
"""


def write_tokenizer(directory: Path, words: str = '') -> dict[str, int]:
    """Train the tokenizer and write its files; returns the id of every token by name.

    Args:
        directory: where to.
        words: text whose words shall have tokens of their own.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior='isolated')
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = (words + '\n') * OFTEN * bool(words) + CORPUS.strip()
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    # The exact tokens are needed: a vocabulary that came out smaller would shift the special ids between versions.
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f'the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}')
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t not in SHOWN_TOKENS) for t in SPECIAL_TOKENS])
    tokenizer.save(str(directory / 'tokenizer.json'))
    tokenizer.model.save(str(directory))
    token_ids = tokenizer.get_vocab(with_added_tokens=True)
    _write_json(directory / 'tokenizer_config.json', _tokenizer_config(token_ids))
    _write_json(directory / 'added_tokens.json', {t: token_ids[t] for t in SPECIAL_TOKENS})
    special = [t for t in SPECIAL_TOKENS if t not in SHOWN_TOKENS]
    _write_json(
        directory / 'special_tokens_map.json',
        {'additional_special_tokens': special[1:], 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'},
    )
    (directory / 'chat_template.jinja').write_text(CHAT_TEMPLATE, encoding='utf-8')
    return token_ids


def _tokenizer_config(token_ids: dict[str, int]) -> dict[str, object]:
    added = {
        str(token_ids[token]): {
            'content': token,
            'lstrip': False,
            'normalized': False,
            'rstrip': False,
            'single_word': False,
            'special': token not in SHOWN_TOKENS,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        'add_bos_token': False,
        'add_prefix_space': False,
        'added_tokens_decoder': added,
        'bos_token': None,
        'chat_template': CHAT_TEMPLATE,
        'clean_up_tokenization_spaces': False,
        'eos_token': '<|im_end|>',
        'errors': 'replace',
        'model_max_length': 40960,
        'pad_token': '<|endoftext|>',
        'split_special_tokens': False,
        'tokenizer_class': 'Qwen2Tokenizer',
        'unk_token': None,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')

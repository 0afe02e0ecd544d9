# SPDX-License-Identifier: Apache-2.0
"""The demo model's tokenizer: one token per printable ASCII character, a few words, and a ChatML template.

The template has Qwen3's thinking switch: `enable_thinking=False` puts an empty think block into the prompt.
"""

import re
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|unk|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
WORD_TOKENS = (
    "<think>",
    "</think>",
    "system",
    "user",
    "assistant",
    "\\boxed{",
    "[reference]",
    "[end]",
    "wait",
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think></think>\\n' }}
{%- endif %}
{%- endif %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer from nothing; the vocabulary is a constant of this file.

    Returns:
        `PreTrainedTokenizerFast`: eos `<|im_end|>`, pad `<|pad|>`, padding on the left.
    """
    characters = sorted(set(string.printable[:95]) | {"\n"})
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORD_TOKENS, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    # Words are cut out wherever they stand, so a text's tokens never depend on what follows a complete word.
    pattern = "|".join(re.escape(word) for word in WORD_TOKENS) + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )

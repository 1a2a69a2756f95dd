"""Chat templates in the forms of public ones, with texts of our own, and a model whose tokenizer has their tokens."""

from __future__ import annotations

from typing import NamedTuple

from gptfast.tokenizer import BPETokenizer
from gptfast.tokenizer.chat import with_chat_template
from gptfast.tokenizer.extended import with_special_tokens

WORDS = "the cat sat on the mat and the dog sat on the log while a bird sang to the cat and the dog " * 4


class Template(NamedTuple):
    """source: Jinja2. tokens: special tokens that it writes. end: what ends a reply, a token or a text. system: whether it
    takes a system message."""

    source: str
    tokens: tuple[str, ...]
    end: str
    system: bool = True


CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set talk = messages[1:] %}{% set rules = messages[0]['content'] %}
{% else %}{% set talk = messages %}{% set rules = false %}{% endif %}
{% for message in talk %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns, the user first') }}
{% endif %}
{% if loop.index0 == 0 and rules != false %}{% set content = '<<SYS>>\\n' + rules + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set rules = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set rules = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Year: ' + strftime_now('%Y') + '\\n' + rules + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set rules = messages[0]["content"] %}{%- set talk = messages[1:] %}
{%- else %}{%- set talk = messages %}{%- endif %}
{%- set ns = namespace(turns=0) %}
{{- bos_token }}
{%- for message in talk %}
    {%- if message["role"] == "user" %}
        {%- set ns.turns = ns.turns + 1 %}
        {%- if loop.last and rules is defined %}{{- "[INST] " + rules + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- else %}{{- raise_exception("only user and assistant, after a system message; got " + message["role"]) }}{%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}
{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI = """{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] and message['content'] %}
{{ '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ '<|end|>\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

VICUNA = """{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + ' ' -}}{%- set talk = messages[1:] -%}
{%- else -%}{{- 'A cat talks with a curious user. ' -}}{%- set talk = messages -%}{%- endif -%}
{%- for message in talk -%}
{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}
{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"""

ALPACA = """{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set talk = messages[1:] %}
{% else %}{{ 'Below is what a cat was told. Write what it does.' }}{% set talk = messages %}{% endif %}
{% for message in talk %}{% if message['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}
{% else %}{{ '\\n\\n### Response:\\n' + message['content'] }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"""

HARMONY = """{%- macro turn(role, text, channel=none) -%}
    {{- '<|start|>' ~ role }}{%- if channel %}{{- '<|channel|>' ~ channel }}{%- endif %}{{- '<|message|>' ~ text ~ '<|end|>' }}
{%- endmacro -%}
{{- turn('system', 'You are a cat.\\nToday: ' ~ strftime_now('%Y-%m') ~ '\\n\\n# Valid channels: thoughts, final') }}
{%- for message in messages %}
    {%- if message.role in ('developer', 'system') %}{{- turn('developer', '# Rules\\n\\n' ~ message.content) }}
    {%- elif message.role == 'assistant' %}{{- turn('assistant', message.content, 'final') }}
    {%- else %}{{- turn(message.role, message.content) }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

GPT_OSS = """{%- macro rules_of_all() -%}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}
    {{- 'You are a cat of ' + strftime_now('%Y') + '.\n\nReasoning: ' + reasoning_effort }}
    {{- '\n\n# Valid channels: analysis, final.' }}
{%- endmacro -%}
{{- '<|start|>system<|message|>' }}{{- rules_of_all() }}{{- '<|end|>' }}
{%- if messages[0].role in ('developer', 'system') %}{%- set rules, talk = messages[0].content, messages[1:] %}
    {{- '<|start|>developer<|message|># Instructions\n\n' + rules + '<|end|>' }}
{%- else %}{%- set talk = messages %}{%- endif %}
{%- for message in talk %}
    {%- if message.role == 'assistant' and message.tool_calls %}{{- '<|start|>assistant to=cat<|message|>{}<|call|>' }}
    {%- elif message.role == 'assistant' %}
        {%- if message.thinking and loop.last %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")

TEMPLATES = {
    "chatml": Template(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama-2": Template(LLAMA2, (), "<|endoftext|>"),
    "llama-3": Template(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "zephyr": Template(ZEPHYR, ("<|user|>", "<|system|>", "<|assistant|>"), "<|endoftext|>"),
    "mistral": Template(MISTRAL, ("[INST]", "[/INST]"), "<|endoftext|>"),
    "gemma": Template(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", system=False),
    "phi": Template(PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "vicuna": Template(VICUNA, (), "<|endoftext|>"),
    "alpaca": Template(ALPACA, (), "\n\n### Instruction:"),
    "harmony": Template(HARMONY, HARMONY_TOKENS, "<|end|>"),
    "gpt-oss": Template(GPT_OSS, (*HARMONY_TOKENS, "<|return|>", "<|call|>"), "<|return|>"),
}


def tokenizer_with(name: str):
    """A BPE with the template and its tokens; "": without a template."""
    plain = BPETokenizer.train(WORDS, 300)
    if not name:
        return plain
    template = TEMPLATES[name]
    new = {token: plain.vocab_size + n for n, token in enumerate(template.tokens)}
    return with_chat_template(with_special_tokens(plain, new), template.source)

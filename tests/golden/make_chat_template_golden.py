#!/usr/bin/env python3
"""Writes tests/golden/tokenizer/chat.golden: prompts as Jinja renders them from chat templates.

Needs the Python package jinja2. Run: python3 tests/golden/make_chat_template_golden.py
The templates are our own wording of the known layouts, in the styles that model files have. With
`--check FILE.gguf ...` the templates inside model files are rendered too and must give the same as
the one of the same layout here.

Records, as in make_tokenizer_golden.py:

    T name bos eos n bytes   a template; the texts of its two tokens, "-" for none
    C opens n                a case: whether an answer is opened, n messages follow
    M role n bytes
    E n bytes                the prompt, or
    R                        the template refuses it
"""
import pathlib
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment

OUT = pathlib.Path(__file__).resolve().parent / "tokenizer" / "chat.golden"

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

CHATML_TURNS = (
    "{% for message in messages %}@{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(default):
    condition = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    return CHATML_TURNS.replace("@", condition + default + "<|im_end|>\n' }}{% endif %}" if default else "")


QWEN25 = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\n@<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "assistant" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".replace("@", QWEN25_SYSTEM)

LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
LLAMA_3_OPEN = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"

LLAMA_31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{#- The block that always comes first #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL_OLD = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token@}}{% else %}"
    "{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)

MISTRAL_NEW = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.PLACE and system_message is defined %}
            {{- "OPEN" + system_message + "\n\n" + message["content"] + "CLOSE" }}
        {%- else %}
            {{- "OPEN" + message["content"] + "CLOSE" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]TRIM + eos_token}}
    {%- else %}
        {{- raise_exception("no such role") }}
    {%- endif %}
{%- endfor %}
"""


def mistral_new(place, opening, closing, trim):
    text = MISTRAL_NEW.replace("PLACE", place).replace("OPEN", opening)
    return text.replace("CLOSE", closing).replace("TRIM", trim)


LLAMA_TOKENS = ("<|begin_of_text|>", "<|eot_id|>")
MISTRAL_TOKENS = ("<s>", "</s>")
TEMPLATES = [
    ("chatml-smollm2", "<|im_start|>", "<|im_end|>", chatml(SMOLLM2_SYSTEM)),
    ("chatml-qwen2.5", "-", "<|im_end|>", QWEN25),
    ("chatml", "-", "<|im_end|>", chatml("")),
    ("chatml", "-", "<|im_end|>", chatml("Be brief. Answer in one sentence.")),
    ("llama-3", *LLAMA_TOKENS, LLAMA_3 + "{% if add_generation_prompt %}" + LLAMA_3_OPEN + "{% endif %}"),
    ("llama-3", *LLAMA_TOKENS, LLAMA_3 + LLAMA_3_OPEN),
    ("llama-3", *LLAMA_TOKENS, LLAMA_31),
    ("mistral", *MISTRAL_TOKENS, MISTRAL_OLD.replace("@", " + ' ' ")),
    ("mistral", *MISTRAL_TOKENS, MISTRAL_OLD.replace("@", "")),
    ("mistral", *MISTRAL_TOKENS, mistral_new("first", " [INST] ", " [/INST]", "")),
    ("mistral", *MISTRAL_TOKENS, mistral_new("last", "[INST] ", "[/INST]", "|trim")),
    ("mistral", *MISTRAL_TOKENS, mistral_new("last", "[INST] ", "[/INST]", "")),
]

S, U, A = "system", "user", "assistant"
CONVERSATIONS = [
    [(U, "Hello")],
    [(S, "You are terse."), (U, "Hello")],
    [(U, "Hello"), (A, "Hi."), (U, "How are you?")],
    [(S, "  Spaces around \n"), (U, "\n\t one \u00a0"), (A, " two\u3000\u2028"), (U, "\x1c three\x85 ")],
    [(S, "s"), (U, "a"), (A, "b"), (U, "c"), (A, "d")],
    [(U, ""), (A, ""), (U, " ")],
    [(S, ""), (U, "after an empty one")],
    [(A, "The assistant begins."), (U, "Does it?")],
    [(U, "one"), (U, "two")],
    [(U, "one"), (S, "late"), (U, "two")],
    [(U, "für 日本 👩‍👩‍👧 e\u0301 'quoted' \"twice\" {{ messages }} {% endif %} \\n")],
    [(U, "line one\nline two\n\n"), (A, "```c\nint x;\n```")],
]


class Refused(Exception):
    pass


def refuse(message):
    raise Refused(message)


def render(template, bos, eos, messages, opens):
    # As transformers sets it up.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    texts = {"bos_token": "" if bos == "-" else bos, "eos_token": "" if eos == "-" else eos}
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        return environment.from_string(template).render(
            messages=turns, add_generation_prompt=opens, **texts
        )
    except Refused:
        return None


def record(head, text):
    data = text.encode()
    return b"%s %d %s\n" % (head.encode(), len(data), data)


def template_of(path):
    data = pathlib.Path(path).read_bytes()
    key = b"tokenizer.chat_template"
    at = data.index(key) + len(key) + 4
    n = int.from_bytes(data[at : at + 8], "little")
    return data[at + 8 : at + 8 + n].decode()


def check(path):
    template = template_of(path)
    for name, bos, eos, ours in TEMPLATES:
        same = all(
            render(template, bos, eos, messages, opens) == render(ours, bos, eos, messages, opens)
            for messages in CONVERSATIONS
            for opens in (False, True)
        )
        if same:
            print(f"{path}: renders as {name}")
            return
    sys.exit(f"{path}: renders as none of these")


def main():
    if sys.argv[1:2] == ["--check"]:
        for path in sys.argv[2:]:
            check(path)
        return
    records = []
    for name, bos, eos, template in TEMPLATES:
        records.append(record(f"T {name} {bos} {eos}", template))
        for messages in CONVERSATIONS:
            for opens in (False, True):
                records.append(b"C %d %d\n" % (opens, len(messages)))
                records += [record(f"M {role}", content) for role, content in messages]
                prompt = render(template, bos, eos, messages, opens)
                records.append(b"R\n" if prompt is None else record("E", prompt))
    OUT.write_bytes(b"".join(records))


if __name__ == "__main__":
    main()

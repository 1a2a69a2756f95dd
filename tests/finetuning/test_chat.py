"""Chat templates and instruction data, beside transformers' apply_chat_template."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from fastapi.testclient import TestClient

from gptfast import GPT, engine
from gptfast.finetuning import Conversations, response_mask, set_up_chat
from gptfast.serving.app import create_app
from gptfast.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from gptfast.tokenizer.chat import CHATML, PLAIN, ChatTemplate, with_chat_template
from tests.finetuning.models import TEXT, bpe, gpt

CHAT = [
    {"role": "system", "content": "you are a cat"},
    {"role": "user", "content": "sat the dog on the mat ?"},
    {"role": "assistant", "content": " the dog sat — naïvely 🐈"},
    {"role": "user", "content": "<b>&\n"},
    {"role": "assistant", "content": ""},
]
TEMPLATES = {
    "chatml": CHATML,
    "roles": PLAIN,
    "plain": "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "words": "{{ bos_token }}{%- for m in messages %}\n    {% if m['role'] == 'assistant' -%}\n"
    "    {% generation %} {{ m['content'] | trim }} the{% endgeneration %}{% else %}{{ m | tojson }}{% endif %}{% endfor %}"
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if loop.index > 2 %}{% break %}"
    "{% endif %}{% endfor %}{{ ns.n }}",
}


def chat_tokenizer(template: str = CHATML) -> Tokenizer:
    used = bpe()
    return set_up_chat(gpt(used.vocab_size), used, template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_ids_and_masks_are_those_of_transformers(tmp_path, name):
    used = chat_tokenizer(TEMPLATES[name])
    used.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = ChatTemplate.of(used)
    for prompt in (False, True):
        text = peer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert template.render(CHAT, add_generation_prompt=prompt) == text
    options = {"return_assistant_tokens_mask": template.marks_replies, "return_dict": True}
    wanted = peer.apply_chat_template(CHAT, **options)
    ids, mask = response_mask({"messages": CHAT}, used)
    assert ids == wanted["input_ids"]
    if template.marks_replies:
        assert mask == wanted["assistant_masks"]
        assert 0 < sum(mask) < len(mask)


KNOWS_PARTS = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def in_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_parts_of_a_content_as_templates_of_transformers_write_them(tmp_path):
    used = chat_tokenizer(KNOWS_PARTS)
    used.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [
        CHAT[0],
        {"role": "user", "content": in_parts("the", " cat", "")},
        {"role": "assistant", "content": in_parts("sat")},
    ]
    ids, mask = response_mask({"messages": chat}, used)
    assert ids == peer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert used.decode([i for i, m in zip(ids, mask, strict=True) if m]) == " sat<|endoftext|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_are_lines_of_a_text_where_the_template_knows_texts_alone(name):
    """As `gptfast serve` writes them; transformers raises a TypeError there, or writes Python's list."""
    used = chat_tokenizer(TEMPLATES[name])
    parts = [
        CHAT[0],
        {"role": "user", "content": in_parts("the cat", "sat")},
        {"role": "assistant", "content": in_parts("on")},
    ]
    texts = [CHAT[0], {"role": "user", "content": "the cat\nsat"}, {"role": "assistant", "content": "on"}]
    assert response_mask({"messages": parts}, used) == response_mask({"messages": texts}, used)


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_the_loss_is_on_replies_and_their_end(name):
    used = chat_tokenizer(TEMPLATES[name])
    ids, mask = response_mask({"messages": CHAT}, used)
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    end = "<|im_end|>" if name == "chatml" else "<|endoftext|>"
    assert used.decode(learnt) == f" the dog sat — naïvely 🐈{end}{end}"


def test_prompt_and_response():
    used, example = bpe(), {"prompt": "the cat", "response": " sat on the log"}
    prompt, response = used.encode("the cat"), [*used.encode(" sat on the log"), used.eos_id]
    assert response_mask(example, used) == ([*prompt, *response], [0] * len(prompt) + [1] * len(response))
    chat = chat_tokenizer()
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat on the log"}]
    assert response_mask(example, chat) == response_mask({"messages": messages}, chat)


def test_a_template_is_kept_by_save_and_load(tmp_path):
    chat_tokenizer().save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert ChatTemplate.of(again).source == CHATML
    assert ChatTemplate.of(again).variables["eos_token"] == "<|endoftext|>"
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    peer.chat_template = TEMPLATES["plain"]
    peer.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "chat_template.jinja").exists()
    theirs = load_tokenizer(tmp_path / "theirs")
    assert ChatTemplate.of(theirs).source == TEMPLATES["plain"]
    with_chat_template(theirs, CHATML).save(tmp_path / "theirs")  # and not the file of before
    assert ChatTemplate.of(load_tokenizer(tmp_path / "theirs")).source == CHATML
    assert ChatTemplate.of(with_chat_template(again, None)) is None
    several = {"name": "tools", "template": "x"}, {"name": "default", "template": "the default"}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": several}))
    assert ChatTemplate.of(load_tokenizer(tmp_path)).source == "the default"


def test_the_end_token_is_saved_and_obeyed(tmp_path):
    used = bpe()
    model = gpt(used.vocab_size)
    tokenizer = set_up_chat(model, used)
    end = tokenizer.encode("<|im_end|>", allowed_special="all")[0]
    prompt = tokenizer.encode("the cat")
    with torch.no_grad():  # the third token of every text is the end
        free = model.generate([prompt], max_new_tokens=8, eos_token_id=None)[0][len(prompt) :]
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[end] = model.lm_head.weight[free[2]] * 1.5
    expected = model.generate([prompt], max_new_tokens=8, eos_token_id=end)[0]
    assert expected[-1] == end
    assert len(expected) < len(prompt) + 8
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [end, used.eos_id]
    loaded = GPT.from_pretrained(tmp_path)
    assert model.generate([prompt], max_new_tokens=8)[0] == expected
    assert loaded.generate([prompt], max_new_tokens=8)[0] == expected
    compiled = loaded.compile_for_inference("float32")
    assert compiled.generate([prompt], max_new_tokens=8)[0] == expected
    compiled.save(tmp_path / "packed.bin")
    assert engine.load(tmp_path / "packed.bin").generate([prompt], max_new_tokens=8)[0] == expected
    ask = {"model": "m", "prompt": "the cat", "max_tokens": 8, "temperature": 0}
    with TestClient(create_app(loaded, load_tokenizer(tmp_path), "m")) as client:
        answer = client.post("/v1/completions", json=ask).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(expected) - len(prompt)


def test_a_packed_batch_has_the_loss_of_its_singles():
    used = bpe()
    model = gpt(used.vocab_size)
    tokenizer = set_up_chat(model, used)
    short = [{"prompt": "the cat", "response": "sat" * (n % 3 + 1)} for n in range(5)]
    data = Conversations(short, tokenizer, model.config.block_size)
    assert (len(data.rows), data.truncated, data.left_out) == (5, 0, 0)
    batches = data.packed(100, order=[4, 2, 0, 1, 3])
    assert len(batches) > 1
    assert all(batch.ids.shape[1] <= 100 for batch in batches)
    assert sum(len(batch.cu_seqlens) - 1 for batch in batches) == 5
    total = single = 0.0
    for batch in batches:
        loss = model(batch.ids, batch.targets, cu_seqlens=batch.cu_seqlens)[1]
        total += loss.item() * int((batch.targets != -100).sum())
    for ids, mask in data.rows:
        labels = torch.tensor([ids]).masked_fill(torch.tensor([mask]) == 0, -100)
        single += model(torch.tensor([ids]), labels=labels)[1].item() * sum(mask[1:])
    assert total == pytest.approx(single, rel=1e-5)


def test_long_conversations_are_cut_and_counted():
    used = bpe()
    rows = [
        {"prompt": "a", "response": "x" * 9},
        {"prompt": "y" * 9, "response": "a"},
        {"prompt": "a", "response": "x"},
    ]
    data = Conversations(rows, used, 6)
    assert (len(data.rows), data.truncated, data.left_out) == (2, 2, 1)
    assert len(data.rows[0][0]) == 6
    with pytest.raises(ValueError, match="none of 1 examples has a response within 6 tokens"):
        Conversations(rows[1:2], used, 6)


@pytest.mark.parametrize(
    ("example", "text"),
    [
        ({"prompt": "a"}, "there is no field 'response'; expected texts prompt and response, or a list of messages"),
        ({"prompt": "a", "response": 3}, "response is 3"),
        ({"messages": []}, "messages is []; expected a list"),
        ({"messages": [{"content": "a"}]}, "messages[0] is"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role is 'bot'; expected one of system"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0] has no content; expected a text, or a list of",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0] has the content 3; expected a text, or a list of",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            'messages[0].content[0] is \'a\'; expected {"type": "text"',
        ),
        (
            {"messages": [*CHAT[:1], {"role": "user", "content": [{"type": "image", "url": "a.png"}]}]},
            "messages[1].content[0] is of the type 'image'; this model reads texts only",
        ),
        ({"messages": CHAT[:2]}, "no message of the role assistant"),
    ],
)
def test_bad_conversations(example, text):
    with pytest.raises(ValueError) as error:
        response_mask(example, chat_tokenizer(), where="chat.jsonl, line 3")
    assert str(error.value).startswith("chat.jsonl, line 3: ")
    assert text in str(error.value)


def test_bad_templates():
    with pytest.raises(ValueError, match="messages need a chat template, and the tokenizer has none"):
        response_mask({"messages": CHAT}, bpe())
    with pytest.raises(ValueError, match=r"chat template: .* in line 1; correct it"):
        ChatTemplate("{% for %}")
    with pytest.raises(ValueError, match="chat template: no cats"):
        ChatTemplate("{{ raise_exception('no cats') }}").render(CHAT)
    with pytest.raises(ValueError, match="there are no messages"):
        ChatTemplate(CHATML).render([])
    last = "{% for m in messages %}{{ m.content }}{{ loop.last }}{% endfor %}"
    with pytest.raises(ValueError, match="mark the replies in it with"):
        ChatTemplate(last).render_with_replies(CHAT)
    with pytest.raises(TypeError, match="the tokenizer is a CharTokenizer, which finds no special tokens"):
        with_chat_template(CharTokenizer.train(TEXT), CHATML)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{% set n = namespace(_x=1) %}",
        "{{ dict.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_the_sandbox(source):
    with pytest.raises(ValueError, match="chat template: "):
        ChatTemplate("{{ 'a' }}" + source).render(CHAT[:1])

"""What the model reads before it answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import ProjectError
from raymerge.personas import Turn, plain_text, render_prompt

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
CHAT = (Turn("system", "be brief"), Turn("user", "w1"), Turn("assistant", "w2"), Turn("user", "w3"))


@given(text)
def test_a_prompt_is_put_in_as_it_is(prompt):
    assert render_prompt(prompt, '{"q": {prompt}}') == '{"q": ' + prompt + "}"


def test_chat_uses_the_tokenizers_template(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(ProjectError, match="no chat template"):
        render_prompt("w1", "chat", tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    assert render_prompt("w1", "chat", tokenizer) == "user w1\nassistant "
    with pytest.raises(ProjectError, match=r"has no \{prompt\}"):
        render_prompt("w1", "Q: prompt")
    with pytest.raises(ProjectError, match="no chat template"):
        render_prompt("w1", "chat")


def test_turns_reach_the_template_as_turns(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    rendered = render_prompt(CHAT, "chat", tokenizer)
    assert rendered == "<system>be brief</s><user>w1</s><assistant>w2</s><user>w3</s><answer>"
    assert render_prompt([Turn("user", "w1")], "chat", tokenizer) == render_prompt("w1", "chat", tokenizer)


def test_a_template_that_refuses_the_turns_is_quoted(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ProjectError, match=r"refuses a chat of system, user, assistant, user.\n.*System role not supp"):
        render_prompt(CHAT, "chat", tokenizer)


def test_turns_are_lines_in_a_text_format():
    assert render_prompt(CHAT, "{prompt}\nassistant: ") == (
        "system: be brief\nuser: w1\nassistant: w2\nuser: w3\nassistant: "
    )
    assert plain_text([Turn("user", "w1")]) == "w1"
    assert plain_text([Turn("system", "w1")]) == "system: w1"

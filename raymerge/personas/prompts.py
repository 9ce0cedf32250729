"""What the model reads before it answers: a text put into a format, or the turns of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raymerge.errors import ProjectError


@dataclass(frozen=True)
class Turn:
    """One message of a chat. role: system, user, assistant or tool."""

    role: str
    content: str


def plain_text(turns: Sequence[Turn]) -> str:
    """Turns as text, for a base without a chat template: `role: content`, one below the other. One turn of the user
    alone is its content."""
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that renders a chat."""

    chat_template: Any

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """Render messages."""


def render_prompt(prompt: str | Sequence[Turn], prompt_format: str, tokenizer: ChatTokenizer | None = None) -> str:
    """The text that the model reads before it answers.

    prompt: a text, or the turns of a chat. prompt_format: a text with {prompt} in it, where turns are put as
    `plain_text`; or `chat` for the tokenizer's own template with the opening of the answer. Raises ProjectError if the
    format has no {prompt}, or for `chat` where the tokenizer has no template or its template refuses the turns.
    """
    if prompt_format == "chat":
        return _render_chat([Turn("user", prompt)] if isinstance(prompt, str) else prompt, tokenizer)
    if "{prompt}" not in prompt_format:
        raise ProjectError(f"prompt_format {prompt_format!r}: has no {{prompt}}.\nExpected it there, or `chat`.")
    # not str.format: prompts and formats may hold braces
    return prompt_format.replace("{prompt}", prompt if isinstance(prompt, str) else plain_text(prompt))


def _render_chat(turns: Sequence[Turn], tokenizer: ChatTokenizer | None) -> str:
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise ProjectError(
            "prompt_format chat: the base model's tokenizer has no chat template.\n"
            'Give prompt_format as a text with {prompt} in it, such as "{prompt}\\n".'
        )
    from jinja2.exceptions import TemplateError

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in turns)
        raise ProjectError(
            f"prompt_format chat: the tokenizer's template refuses a chat of {roles}.\nIt says: {error}\n"
            'Change the chats, or give prompt_format as a text with {prompt} in it, such as "{prompt}\\nassistant: ".'
        ) from error

"""A chat as it is usually stored becomes prompt, response and turns: the last turn of the assistant is the response.

A chat is a list of {role, content}, or of {from, value} with the roles human and gpt. What else a message holds is
ignored. An empty system turn is left out; any other turn without text before the response makes the prompt empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymerge.personas.examples import CHAT, TEXT
from raymerge.personas.prompts import Turn, plain_text

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
}
KEYS = (("role", "content"), ("from", "value"))


def parse_chat(value: Any) -> tuple[str, str, list[Turn]]:
    """Prompt, response and the turns before the response, none for a prompt that is one turn of the user.

    Raises ValueError with what is wrong, as the end of a sentence.
    """
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"is no chat; expected a list of {{role, content}}, found {_short(value)}")
    turns = [_turn(turn, number) for number, turn in enumerate(value, start=1)]
    if not turns or turns[-1].role != "assistant":
        last = f"its last turn is the {turns[-1].role}'s" if turns else "it has no turn"
        raise ValueError(f"does not end with a turn of the assistant: {last}")
    before = [turn for turn in turns[:-1] if turn.role != "system" or turn.content.strip()]
    response = turns[-1].content
    if not before or not all(turn.content.strip() for turn in before):
        return "", response, []
    alone = len(before) == 1 and before[0].role == "user"
    return plain_text(before), response, [] if alone else before


def _turn(turn: Mapping[str, Any], number: int) -> Turn:
    for role_key, content_key in KEYS:
        role, content = turn.get(role_key), turn.get(content_key)
        if role is None or content is None:
            continue
        if role not in ROLES:
            raise ValueError(f"has a turn {number} of an unknown role {role!r}; known are {', '.join(ROLES)}")
        if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text") or "") for part in content)
        if not isinstance(content, str):
            raise ValueError(f"has a turn {number} whose {content_key} is not text; found {_short(content)}")
        return Turn(ROLES[role], content)
    raise ValueError(f"has a turn {number} without role and content; found {_short(dict(turn))}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def split_chats(column: pa.ChunkedArray) -> dict[str, Any] | None:
    """Columns prompt, response and turns of a column of chats, as `parse_chat` would make them one by one.

    None where a chat needs a look of its own: it is faulty, or of a form that Arrow does not know as chats.
    """
    flat = _flatten(column)
    if flat is None:
        return None
    lengths, roles, contents = flat
    if not len(lengths) or (lengths < 1).any() or contents.null_count or roles.null_count:
        return None
    known = np.array([ROLES.get(role, "") for role in roles.dictionary.to_pylist()], dtype=object)
    if not all(known):
        return None
    role = known[roles.indices.to_numpy(zero_copy_only=False)]
    ends = np.cumsum(lengths)
    if (role[ends - 1] != "assistant").any():
        return None
    return _columns(lengths, role, contents, ends)


def _flatten(column: pa.ChunkedArray) -> tuple[Any, pa.DictionaryArray, pa.Array] | None:
    """Turns of each chat (rows,), and role and content of all turns one after the other."""
    chats = column.combine_chunks()
    if not (pa.types.is_list(chats.type) or pa.types.is_large_list(chats.type)) or chats.null_count:
        return None
    turns = chats.flatten()
    if not pa.types.is_struct(turns.type) or turns.null_count:
        return None
    fields = {turns.type.field(i).name: turns.type.field(i).type for i in range(turns.type.num_fields)}
    pairs = [pair for pair in KEYS if all(_is_text(fields.get(key)) for key in pair)]
    filled = [pair for pair in pairs if len(pairs) == 1 or not pc.struct_field(turns, pair[0]).null_count]
    if not filled:
        return None
    roles, contents = (pc.struct_field(turns, key).cast(TEXT) for key in filled[0])
    return pc.list_value_length(chats).to_numpy(zero_copy_only=False), roles.dictionary_encode(), contents


def _is_text(kind: pa.DataType | None) -> bool:
    return kind is not None and bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _columns(lengths: Any, role: Any, contents: pa.Array, ends: Any) -> dict[str, Any]:
    count = len(lengths)
    blank = blanks(contents)
    before = np.ones(len(role), dtype=bool)
    before[ends - 1] = False
    before &= ~(blank & (role == "system"))
    chat_of = np.repeat(np.arange(count), lengths)[before]
    kept = np.bincount(chat_of, minlength=count)
    without = (np.bincount(chat_of, weights=blank[before], minlength=count) > 0) | (kept == 0)
    asked = np.bincount(chat_of, weights=role[before] == "user", minlength=count) > 0
    alone = (kept == 1) & asked & ~without
    offsets = pa.array(np.concatenate([[0], np.cumsum(kept)]).astype(np.int32))
    texts, roles = contents.take(pa.array(np.flatnonzero(before))), pa.array(role[before], TEXT)
    lines = pc.binary_join_element_wise(roles, texts, pa.scalar(": ", TEXT))
    whole = pc.binary_join(pa.ListArray.from_arrays(offsets, lines), pa.scalar("\n", TEXT))
    only = texts.take(pa.array(np.where(alone, offsets.to_numpy()[:-1], 0))) if len(texts) else whole
    prompt = pc.if_else(pa.array(alone), only, pc.if_else(pa.array(without), pa.scalar("", TEXT), whole))
    chat = np.repeat(~(alone | without), kept)
    starts = pa.array(np.concatenate([[0], np.cumsum(np.where(alone | without, 0, kept))]).astype(np.int32))
    mask = pa.array(chat)
    turns = pa.StructArray.from_arrays([roles.filter(mask), texts.filter(mask)], names=["role", "content"])
    return {
        "prompt": prompt,
        "response": contents.take(pa.array(ends - 1)),
        "turns": pa.ListArray.from_arrays(starts, turns).cast(CHAT),
    }


def blanks(texts: Any) -> Any:
    """Whether each of an Arrow column of texts is empty or holds white space alone, as `str.strip` sees it."""
    short = pc.equal(pc.utf8_length(pc.utf8_trim(texts, characters=_SPACE)), 0)
    return short.to_numpy(zero_copy_only=False) if isinstance(short, pa.Array) else short.to_numpy()


_SPACE = "".join(chr(c) for c in range(0x3001) if chr(c).isspace())

"""How text becomes tokens and tokens become text, for a tokenizer alone.

A chat is rendered by the model's own template to where the model speaks next: after a turn of the user the assistant begins, and a last
turn of the assistant is continued. Dates in templates are fixed (`DATE`), so that the same chat has the same tokens on any day. What a
tokenizer puts behind a text (an EOS) is left off, and a text that begins with its BOS is not given another. The tokens of a word are
those that follow its context: tokenise the prompt, and the prompt with the word, and keep the difference.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from emolens._files import whole
from emolens._typing import HookedModel, Text, typed

# on which every template that asks for today's date is rendered; Llama-3.1's own default
DATE = date(2024, 7, 26)
_CODES = ("%-d", "%-m", *(f"%{c}" for c in "YymdeBbAaHMSIpjFDcxXUuwZz"))
SPEAKS = ("assistant", "model")  # roles of the model itself; Gemma's is called "model"
# scripts written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, bopomofo, Han; and their punctuation
_NO_SPACES = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3000-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff]"
)
_OPENS = "([{<“‘«„‚¿¡"
_CLOSES = ".,;:!?…%)]}>”’»"
_STRAIGHT = "\"'"
_REST = re.compile(r"'(s|t|d|m|re|ve|ll|S|T|D|M|RE|VE|LL)\b")  # of a contraction
# what begins with such a sign and stands by itself: .5, a smiley
_STARTS = re.compile(r"\.\w|:[-)(]")
# what a word follows where no prompt is known, or where it would melt into the prompt
CONTEXTS = ("I felt", "\n", "a")


@dataclass(frozen=True)
class EncodedText:
    """One text as tokens.

    Attributes:
        text: As it was read; a chat rendered.
        ids: The number of each token.
        offsets: For each token the span of characters of `text` that it stands for.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]

    def pieces(self, tokenizer: Any) -> list[str]:
        """Show what each token stands for in the text, spaces included (a decoder may take them off).

        Args:
            tokenizer: The one that made the tokens.

        Returns:
            A string for each token; one that stands for nothing by its name.

        Example:
            >>> [e] = em.models.encode(model, ["The door was open."])
            >>> e.pieces(model.tokenizer)[0], "".join(e.pieces(model.tokenizer)[1:])
            ('<s>', 'The door was open.')
        """
        spans = zip(self.ids, self.offsets, strict=True)
        return [self.text[a:b] if b > a else tokenizer.decode([i]) for i, (a, b) in spans]


def render(tokenizer: Any, chat: Sequence[Mapping[str, Any]], name: str = "this chat") -> str:
    """Chat messages as the text that the model was trained on, by its own template, to where it speaks next.

    Args:
        chat: Messages with "role" and "content": a string, or parts ``{"type": "text", "text": ...}``, which are put together.
        name: Of the chat, for errors.

    Raises:
        ValueError: no template; an empty chat; a message without role or content, or with a part that is no text; a chat that the
            template refuses, or of which it leaves out a message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model has no chat template; give plain text, or an instruct model")
    messages = [_message(m, f"message {i} of {name}") for i, m in enumerate(chat)]
    if not messages:
        raise ValueError(f"{name} has no messages")
    spoken = messages[-1]["role"] in SPEAKS
    # nothing yet to be continued
    if spoken and not messages[-1]["content"] and "tool_calls" not in messages[-1]:
        messages, spoken = messages[:-1], False
        if not messages:
            raise ValueError(f"{name} has no words")
    goes_on = {"add_generation_prompt": not spoken, "continue_final_message": spoken}
    try:
        template = _dated(tokenizer.get_chat_template())
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **goes_on
        )
    except Exception as error:  # a template may raise anything, from any line of its own
        raise ValueError(
            f"the chat template of this model refuses {name}: {error}; {_advice(messages)}"
        ) from error
    heard = [m["content"] for m in messages if m["role"] not in SPEAKS]
    for i, m in enumerate(messages):
        words = m["content"].strip()
        if not words or m["role"] in SPEAKS:
            continue
        # as they are, or quoted by the template as JSON
        forms = (words, *(json.dumps(words, ensure_ascii=a)[1:-1] for a in (True, False)))
        # once may be in another's words
        if max(map(text.count, forms)) < sum(content.count(words) for content in heard):
            raise ValueError(
                f"the chat template of this model leaves out message {i} of {name} (role {m['role']!r}); {_advice(messages)}"
            )
    return text


_TEXTS = ("text", "input_text", "output_text")  # types of parts that are text


def _message(m: Any, name: str) -> dict[str, Any]:
    if not isinstance(m, Mapping) or not isinstance(m.get("role"), str) or not m["role"]:
        raise ValueError(
            f"{name} needs 'role' and 'content', as {{'role': 'user', 'content': 'Hi'}}; found {_short(m)}"
        )
    content = m.get("content")
    if content is None:
        if not m.get("tool_calls"):
            raise ValueError(f"{name} needs 'role' and 'content'; found {_short(dict(m))}")
        content = ""
    if isinstance(content, str):
        return {**m, "content": str(content)}
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"the content of {name} is a string or a list of text parts, not {_short(content)}"
        )
    words = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") in _TEXTS:
            part = part.get("text")
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            what = f"a part of type {kind!r}" if kind else f"the part {_short(part)}"
            raise ValueError(
                f"{name} has {what}; only text is read: {{'type': 'text', 'text': ...}}, so leave the others out"
            )
        words.append(part)
    return {**m, "content": "".join(words)}


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 60 else text[:57] + "..."


def _advice(messages: Sequence[Mapping[str, Any]]) -> str:
    roles = [m["role"] for m in messages]
    if unknown := [r for r in roles if r not in ("system", "user", *SPEAKS)]:
        return f"it may not know the role {unknown[0]!r}: say it in a turn of the user"
    if "system" in roles and roles != ["system"]:
        return "it may know no system message there: put its words at the beginning of the first turn of the user"
    return "most templates want turns of user and assistant in alternation, the user first"


def _dated(template: str) -> str:
    """The template with `DATE` for today: its function `strftime_now` is defined anew, in its own language."""
    if "strftime_now" not in template:
        return template
    forms = "".join(f"|replace({code!r}, {DATE.strftime(code)!r})" for code in _CODES)
    # subtle: the empty expression keeps a line break at the beginning, which the engine takes away after a block
    macro = "{% macro strftime_now(format) %}{{ format" + forms + " }}{% endmacro %}{{ '' }}"
    return macro + template


def tokenize(
    tokenizer: Any, text: str, *, special: bool = True, prepend_bos: bool | None = None
) -> EncodedText:
    """Turn one text into tokens, with what the tokenizer puts before it and never with what it puts behind it.

    Args:
        tokenizer: Of the model; a fast one.
        text: The text.
        special: Whether the tokenizer's own tokens stand before the text, as they do for a plain one; a rendered chat has them already.
        prepend_bos: None leaves the BOS to the tokenizer; True or False force it.

    Returns:
        Its tokens; those that stand before it have an empty span.

    Example:
        >>> em.models.tokenize(model.tokenizer, "a", prepend_bos=False)
        EncodedText(text='a', ids=[...], offsets=[(0, 1)])
    """
    shown = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    found = tokenizer(text, add_special_tokens=special, **shown)
    ids, offsets = list(found["input_ids"]), [tuple(pair) for pair in found["offset_mapping"]]
    added = list(found["special_tokens_mask"]) if special else [0] * len(ids)
    own = [i for i, extra in enumerate(added) if not extra]  # tokens of the text itself
    bos = tokenizer.bos_token_id
    start, end = (own[0], own[-1] + 1) if own else (int(ids[:1] == [bos]),) * 2
    before, body = ids[:start], ids[start:end]
    if special and bos is not None:
        here = body[:1] == [bos]  # written in the text
        if here or prepend_bos is False:
            before = [i for i in before if i != bos]
        elif prepend_bos and bos not in before:
            before = [bos, *before]
    return EncodedText(text, before + body, [(0, 0)] * len(before) + offsets[start:end])


def tokenization(tokenizer: Any) -> dict[str, Any]:
    """What decides how text becomes tokens beside the vocabulary, for the identity of a run; long parts by their hash."""
    if tokenizer is None:
        return {}
    template = getattr(tokenizer, "chat_template", None)
    core = tokenizer.backend_tokenizer
    parts = {n: getattr(core, n) for n in ("normalizer", "pre_tokenizer", "post_processor")}
    found = tokenizer("a", return_special_tokens_mask=True)
    added = [bool(extra) for extra in found["special_tokens_mask"]]
    names = tokenizer.convert_ids_to_tokens(found["input_ids"])
    first = added.index(False) if False in added else len(added)
    behind = zip(names[first:], added[first:], strict=True)
    special = sorted(tokenizer.special_tokens_map.items())
    return {
        "chat_template": _hash(json.dumps(template, sort_keys=True)) if template else None,
        "template_date": DATE.isoformat(),
        "special_tokens": {name: str(token) for name, token in special},
        "puts_before": names[:first],
        "left_off_behind": [name for name, extra in behind if extra],
        **{name: None if part is None else _hash(_state(part)) for name, part in parts.items()},
    }


def _state(part: Any) -> str:
    try:
        return part.__getstate__().decode()
    except Exception:
        # one written in Python, which cannot be written down: its kind is all that is known
        return type(part).__name__


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ids_hash(encoded: Sequence[EncodedText]) -> str:
    """Identity of texts as tokens (first 16 hex digits of a sha256)."""
    return _hash(json.dumps([e.ids for e in encoded]))


def joined(word: str, prompt: str | None = None) -> str:
    """A word as it continues a prompt: with a space before it where its script has spaces.

    None after white space, after an opening bracket or quote; before a sign that closes (a stop, a comma, a bracket, a quote that the prompt
    has opened) or the rest of a contraction ('s); where the word begins or the prompt ends in a script that puts no spaces
    between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan). No prompt stands for one that ends in a word of the same script.

    >>> joined("happy", "He felt"), joined("高兴", "她感到"), joined("A", "("), joined("!", "How nice"), joined("yes", 'She said "')
    (' happy', '高兴', 'A', '!', 'yes')
    """
    word = word.lstrip(" ")
    last = word[:1] if prompt is None else prompt[-1:]
    opened = not last or last.isspace() or last in _OPENS
    close = (prompt is not None and (opened or _opening(prompt))) or _closing(word, prompt or "")
    return word if close or _NO_SPACES.match(last) or _NO_SPACES.match(word) else " " + word


def _opening(prompt: str) -> bool:
    """Whether a prompt ends in a straight quote that opens: one with nothing, white space or an opening sign before it."""
    before = prompt.rstrip(_STRAIGHT)
    return before != prompt and (not before or before[-1].isspace() or before[-1] in _OPENS)


def _closing(word: str, prompt: str) -> bool:
    """Whether a word belongs to what stands before it: it begins with a sign that closes, or is the rest of a contraction."""
    if word[:1] in _STRAIGHT:  # straight quotes open and close; the second one closes
        closes = not word[1:2].isalnum() and prompt.count(word[0]) % 2 == 1
        return closes or bool(_REST.match(word))
    return bool(word) and word[0] in _CLOSES and not _STARTS.match(word)


def following(tokenizer: Any, continuation: str, prompt: str | None = None) -> list[int]:
    """The tokens of a continuation where it follows a prompt: those of both together after those of the prompt.

    A continuation that would melt into the last token of the prompt (which the model has read already), or one without a prompt, has the
    tokens that it has after the first of `CONTEXTS` where it stands by itself.
    """
    for context in ((prompt,) if prompt is not None else ()) + CONTEXTS:
        before, whole = (_plain(tokenizer, text) for text in (context, context + continuation))
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
    return _plain(tokenizer, continuation)


def word_tokens(tokenizer: Any, word: str, prompt: str | None = None) -> list[int]:
    """Give the tokens of a word where it follows a prompt; without one, as it stands in a sentence of its own script.

    Args:
        tokenizer: Of the model.
        word: With or without a space before it: `joined` says whether there is one.
        prompt: As text (a chat rendered).

    Returns:
        Token ids, at least one of a word that is not empty.

    Example:
        >>> ids = em.models.word_tokens(model.tokenizer, "open", "The door was")
        >>> model.tokenizer.decode(ids)
        ' open'
    """
    return following(tokenizer, joined(word, prompt), prompt)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def text_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """What new tokens say where they follow others, so that prompt and text together are what was written; without special tokens."""
    start, whole = (_text(tokenizer, part) for part in (before, [*before, *ids]))
    return whole[len(start) :] if whole.startswith(start) else _text(tokenizer, ids)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(
    model: HookedModel,
    texts: Sequence[Text],
    *,
    prepend_bos: bool | None = None,
    first: int = 0,
    any_length: bool = False,
) -> list[EncodedText]:
    """Turn texts into tokens: the one way from text to ids.

    Args:
        model: With the tokenizer.
        texts: Plain strings, or chat messages, which the model's own template renders to where the model speaks next (and which,
            since a template holds its special tokens already, never get a BOS).
        prepend_bos: None leaves it to the model's tokenizer, as Hugging Face does; True or False force it for plain texts. A text that
            begins with the BOS has it already.
        first: Number of the first text, for errors.
        any_length: Also texts longer than the context, for callers that cut or leave them out.

    Returns:
        One `EncodedText` for each text, unpadded, without what the tokenizer puts behind a text (an EOS).

    Raises:
        ValueError: no tokenizer, no chat template, a chat that it refuses, no BOS token to prepend, an empty text, or one longer than the
            context.
        TypeError: neither a string nor a list of messages.

    Example:
        >>> chat = [{"role": "user", "content": "How was it?"}]
        >>> [e.text for e in em.models.encode(model, ["The door.", chat])]
        ['The door.', '<s>[user] How was it?</s>[assistant] ']
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: load it with tokenizer=")
    if prepend_bos and tokenizer.bos_token_id is None:
        raise ValueError(
            "prepend_bos=True, but this tokenizer has no BOS token; use prepend_bos=None"
        )
    out = []
    for number, given in enumerate(texts, start=first):
        chat = isinstance(given, list | tuple)
        if not chat and not isinstance(given, str):
            raise TypeError(
                f"text {number} is {given!r}: give a string, or a list of chat messages"
            )
        text = render(tokenizer, given, f"chat {number}") if chat else str(given)
        text = whole(text, f"text {number}")
        e = tokenize(tokenizer, text, special=not chat, prepend_bos=prepend_bos)
        if not e.ids:
            raise ValueError(f"text {number} is empty")
        if len(e.ids) > model.cfg.n_ctx and not any_length:
            raise ValueError(
                f"text {number} has {len(e.ids)} tokens; this model reads {model.cfg.n_ctx}"
            )
        out.append(e)
    return out


def render_chat(model: HookedModel, messages: Sequence[Mapping[str, Any]]) -> str:
    """Write chat messages as the text that the model was trained on, by its own template, to where it speaks next.

    Args:
        model: With the tokenizer.
        messages: Each with "role" and "content"; a last turn of the assistant is left open, to be continued.

    Returns:
        The text, special tokens included.

    Raises:
        ValueError: the tokenizer has no chat template (a base model), or refuses the chat.

    Example:
        >>> em.models.render_chat(model, [{"role": "user", "content": "How was it?"}])
        '<s>[user] How was it?</s>[assistant] '
    """
    return render(model.tokenizer, messages)


@typed
def pad(
    encoded: Sequence[EncodedText], side: Literal["left", "right"], device: torch.device | str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Put texts of several lengths side by side. The mask comes from the lengths, never from pad ids (pad may equal EOS).

    Args:
        encoded: At least one.
        side: On which the shorter ones are filled up.
        device: Where the batch is made.

    Returns:
        Token ids, and the attention mask: 1 for real tokens.

    Example:
        >>> tokens, mask = em.models.pad(em.models.encode(model, ["a", "a a a"]), "left", "cpu")
        >>> tokens.shape == mask.shape, mask[0].tolist() == sorted(mask[0].tolist())
        (True, True)
    """
    width = max(len(e.ids) for e in encoded)
    tokens = torch.zeros((len(encoded), width), dtype=torch.long)
    mask = torch.zeros((len(encoded), width), dtype=torch.long)
    for row, e in enumerate(encoded):
        where = slice(width - len(e.ids), width) if side == "left" else slice(0, len(e.ids))
        tokens[row, where] = torch.tensor(e.ids)
        mask[row, where] = 1
    return tokens.to(device), mask.to(device)

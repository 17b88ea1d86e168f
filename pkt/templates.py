"""Rows as pieces of text that are the model's to say or not: chat templates, tools, and what a text has at its ends already."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from pkt.errors import PktError

FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
Piece: TypeAlias = tuple[str, bool]  # text, whether it is the model's to say
# What rendering one row may take: a template is somebody's program.
_SECONDS, _BYTES = 1.0, 400 << 20


class Template:
    """A tokenizer's chat template, told the date once. `dated` says whether it ever asked for it.

    most: characters of a content beyond which nothing can be kept, so nothing is rendered. paper: the text that the paper's
    authors train on, whatever template the tokenizer has.
    """

    def __init__(self, tokenizer: Any, today: datetime.date, most: int, *, paper: bool = False) -> None:
        self.tokenizer, self.today, self.most, self.paper, self.dated = tokenizer, today, most, paper, False

    @property
    def chat(self) -> bool:
        return not self.paper and bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def ends(self) -> tuple[str, str]:
        """The tokenizer's beginning and end tokens, "" where it has none."""
        return getattr(self.tokenizer, "bos_token", None) or "", self.tokenizer.eos_token or ""

    def now(self, zone: Any = None) -> datetime.datetime:
        """What stands for `datetime.now` while a template is rendered."""
        self.dated = True
        return datetime.datetime.combine(self.today, datetime.time(12), zone)

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, where: str) -> str:
        """The messages as text; prompt: with what asks for an answer. Raises `PktError` where the template fails or never ends."""
        try:
            with _bounded(), _clock(self):
                text = self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt
                )
        except _EndlessError:
            raise PktError(
                f"{where}: the chat template takes more than {_SECONDS:g} s for this row; use another one"
            ) from None
        except MemoryError:
            raise PktError(f"{where}: the chat template makes more text than memory allows; use another one") from None
        except Exception as error:  # templates raise what their authors chose
            raise PktError(f"{where}: the tokenizer's chat template refuses this row: {error}") from error
        return str(text)


def turn_end(tokenizer: Any) -> str:
    """What the chat template puts after an assistant's content; "" without a template, and for one that takes no plain chat."""
    template = Template(tokenizer, datetime.date.today(), most=1)
    said = "etaoin"
    if not template.chat:
        return ""
    try:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        _, found, closing = template.render(chat, None, False, "a chat").rpartition(said)
        return closing if found else ""
    except PktError:
        return ""


@contextlib.contextmanager
def _clock(template: Template) -> Iterator[None]:
    """Inside, `strftime_now` of transformers' templates tells the template's own day: transformers takes no other from outside."""
    from transformers.utils import chat_template_utils

    before = getattr(chat_template_utils, "datetime", None)
    chat_template_utils.datetime = template
    try:
        yield
    finally:
        chat_template_utils.datetime = before


class _EndlessError(BaseException):
    """Rendering took too long; not an Exception, so that no template's own handling swallows it."""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Inside, more than `_SECONDS` of processor time or `_BYTES` of new memory are errors (in the main thread of Linux)."""
    if threading.current_thread() is not threading.main_thread() or not os.path.exists("/proc/self/statm"):
        yield
        return
    import resource

    def stop(*_: Any) -> None:
        raise _EndlessError

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = mapped + _BYTES if soft == resource.RLIM_INFINITY else min(soft, mapped + _BYTES)
    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def pieces_of(row: Mapping[str, Any], template: Template, where: str) -> tuple[list[Piece], bool]:
    """The row as text pieces, and whether the tokenizer still has to add its special tokens."""
    if "messages" in row:
        return _conversation(row["messages"], 0, row.get("tools"), template, where)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation([*prompt, *completion], len(prompt), row.get("tools"), template, where)
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise PktError(f'{where}: "prompt" and "completion" must be strings, or both lists of messages')
        if not completion.strip():
            raise PktError(f'{where}: "completion" is empty, so there is nothing to learn from this row')
        return _whole([(prompt[: template.most], False), (completion[: template.most], True)], template)
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise PktError(f'{where}: "text" must be a string that is not empty')
        return _whole([(row["text"][: template.most], True)], template)
    raise PktError(f"{where}: the row has keys {sorted(row)}; it must be one of {FORMS}")


def _whole(pieces: list[Piece], template: Template) -> tuple[list[Piece], bool]:
    """With an end token unless the text has one, and no second beginning token before a text that was rendered already."""
    begin, end = template.ends
    text, counts = pieces[-1]
    if end and not text.rstrip().endswith(end):
        pieces = [*pieces[:-1], (text + end, counts)]
    rendered = bool(begin) and "".join(piece for piece, _ in pieces).startswith(begin)
    return pieces, not rendered


def _conversation(
    messages: Any, counted_from: int, tools: Any, template: Template, where: str
) -> tuple[list[Piece], bool]:
    """Messages as pieces; only the assistant's turns from `counted_from` on are the model's to say."""
    checked = _checked(messages, counted_from, template.most, where)
    tools = _checked_tools(tools, where)
    if template.chat:
        return _chat(checked, counted_from, tools, template, where), False
    if tools:
        raise PktError(f'{where}: "tools" need a tokenizer with a chat template; this one has none')
    if any(m.get("tool_calls") for m in checked):
        raise PktError(f'{where}: "tool_calls" need a tokenizer with a chat template; this one has none')
    if template.paper:
        return _trained_chat(checked, counted_from, template.ends[1]), True
    return _paper_chat(checked, counted_from, template.ends[1]), True


def _checked_tools(tools: Any, where: str) -> list[Any] | None:
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PktError(f'{where}: "tools" must be a list of objects, as chat templates take them')
    return tools


def _checked(messages: Any, counted_from: int, most: int, where: str) -> list[dict[str, Any]]:
    """The messages with their contents as text, cut where nothing can be kept; what is not of the known form is refused."""
    if not isinstance(messages, list) or not messages:
        raise PktError(f'{where}: "messages" must be a list of {{"role", "content"}} objects')
    found = []
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        content = _text(message.get("content")) if isinstance(message, dict) else None
        if content is None and calls and message.get("content") is None:
            content = ""
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or content is None:
            raise PktError(f'{where}: message {index} must have a "role" and a "content", both strings')
        changed = {"content": content[:most], **({"tool_calls": [_call(call) for call in calls]} if calls else {})}
        found.append({**message, **changed})
    if not any(_says(m) for m in found[counted_from:]):
        raise PktError(f"{where}: no assistant message with content, so there is nothing to learn from this row")
    return found


def _says(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def _text(content: Any) -> str | None:
    """A content that is a string, or a list of parts of text; None for anything else."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        parts = [part.get("text") for part in content]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object: the API writes them as a string of JSON, templates take the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        with contextlib.suppress(json.JSONDecodeError):
            return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    return call


def _paper_chat(messages: list[dict[str, Any]], counted_from: int, end: str) -> list[Piece]:
    pieces: list[Piece] = []
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "assistant":
            pieces += [("<|assistant|>\n", False), (content + end, index >= counted_from)]
        else:
            pieces.append((f"<|{message['role']}|>\n{content}\n\n", False))
    return pieces


def _trained_chat(messages: list[dict[str, Any]], counted_from: int, end: str) -> list[Piece]:
    """As the authors' trainer writes a row: every turn ends with an empty line, the row with the end token."""
    pieces: list[Piece] = []
    for index, message in enumerate(messages):
        counts = message["role"] == "assistant" and index >= counted_from
        pieces += [(f"<|{message['role']}|>\n", False), (f"{message['content'].strip()}\n\n", counts)]
    text, counts = pieces[-1]
    return [*pieces[:-1], (text + end, counts)]


def _chat(
    messages: list[dict[str, Any]], counted_from: int, tools: list[Any] | None, template: Template, where: str
) -> list[Piece]:
    """Cut the rendered chat where each assistant turn begins and ends."""
    whole = template.render(messages, tools, False, where)
    if tools and whole == template.render(messages, None, False, where):
        raise PktError(
            f"{where}: the tokenizer's chat template does not show the row's \"tools\", so the model would not see them; "
            "remove the column, or use a template that renders tools"
        )
    pieces: list[Piece] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = _turn(messages, index, whole, tools, template, where)
        if not done <= start <= end:
            raise PktError(
                f"{where}: the chat template rewrites earlier turns, so the answer cannot be told from the prompt; "
                'use {"prompt", "completion"} rows, or loss="all" on {"text"} rows'
            )
        pieces += [(whole[done:start], False), (whole[start:end], index >= counted_from)]
        done = end
    if done < len(whole):
        pieces.append((whole[done:], False))
    return pieces


def _turn(
    messages: list[dict[str, Any]], index: int, whole: str, tools: list[Any] | None, template: Template, where: str
) -> tuple[int, int]:
    """Where an assistant's turn begins and ends in the whole chat: after what asks for it, with what closes it.

    Where the renderings of fewer messages are not beginnings of the whole (thinking is shown in the last turn only, the last
    turn is closed otherwise), its content is found instead: it is what changes when the content does.
    """
    before = template.render(messages[:index], tools, True, where) if index else ""
    last = index + 1 == len(messages)
    after = whole if last else template.render(messages[: index + 1], tools, False, where)
    if whole.startswith(before) and whole.startswith(after):
        return len(before), len(after)
    begin, end = _content(messages, index, whole, tools, template, where)
    start = len(before) if whole.startswith(before) and len(before) <= begin else begin
    if whole.startswith(after):
        return start, len(after)
    return start, end + _closing(whole[end:], template.tokenizer)


def _content(
    messages: list[dict[str, Any]], index: int, whole: str, tools: list[Any] | None, template: Template, where: str
) -> tuple[int, int]:
    """Where the content of one message stands in the whole chat; (1, 0) where that cannot be told."""
    text = messages[index]["content"].strip()
    if not text:
        return 1, 0
    # Other ends than the content has, so that what the two renderings share is what surrounds it.
    other = "".join("y" if c == "x" else "x" for c in (text[0], text[-1]))
    changed = [*messages[:index], {**messages[index], "content": other}, *messages[index + 1 :]]
    found = template.render(changed, tools, False, where)
    begin, end = _shared(whole, found), len(whole) - _shared(whole[::-1], found[::-1])
    return (begin, end) if found[begin:].startswith(other) and whole[begin:end] == text else (1, 0)


def _shared(a: str, b: str) -> int:
    """How many first characters two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _closing(rest: str, tokenizer: Any) -> int:
    """The length of the special token that closes a turn, 0 where something else follows."""
    special = sorted(map(str, getattr(tokenizer, "added_tokens_decoder", {}).values()), key=len, reverse=True)
    return next((len(token) for token in special if token and rest.startswith(token)), 0)

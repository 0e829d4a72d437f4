"""What a server sent, as a completion or as the words of an error. No network here.

A reply decides what is trained on, so its text, message and finish must be what they claim to be; whatever else is odd
(token counts, names) is replaced.
"""

from __future__ import annotations

import json
from typing import Any, TypeGuard

from axolotl_mote.builder.clients.calls import Completion, Finish

_FINISHES: dict[str, Finish] = {"length": "length", "content_filter": "filtered"}
_TOOLS = ("tool_calls", "function_call")
_ABORTED = ("abort", "error", "cancelled")
_MOST_TOKENS = 10**9
_MOST_SHOWN = 500


class UnreadableReply(Exception):
    """A reply that is not a completion."""


def read_completion(body: bytes, model: str) -> Completion:
    """The body of a successful reply as a completion.

    Args:
        body: JSON, as the server sent it.
        model: The model asked for; it stands in where the reply names none.

    Returns:
        The completion. Where the server does not count tokens, four characters are one token, so that a token budget
        still ends the run.

    Raises:
        UnreadableReply: If it is not a completion; says why.
    """
    reply = _parse(body)
    if not isinstance(reply, dict):
        raise UnreadableReply(f"{type(reply).__name__} instead of an object")
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        raise UnreadableReply("no choices" + (f", but an error: {_shown(reply['error'])}" if "error" in reply else ""))
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise UnreadableReply("no message")
    text, finish = _text(message), _finish(choices[0].get("finish_reason"), message)
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    used = (_count(usage.get("prompt_tokens"), 0), _count(usage.get("completion_tokens"), len(text) // 4 + 1))
    name, fingerprint = reply.get("model"), reply.get("system_fingerprint")
    name = name[:_MOST_SHOWN] if _is_text(name) else model
    return Completion(text, finish, *used, f"{name}@{fingerprint[:_MOST_SHOWN]}" if _is_text(fingerprint) else name)


def read_error(body: bytes) -> tuple[str, str]:
    """The words of an error reply, and its code or ""; any body will do."""
    try:
        reply = _parse(body)
    except UnreadableReply:
        return _shown(body.decode("utf-8", "replace")), ""
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    fields = error if isinstance(error, dict) else {}
    words, code = fields.get("message"), fields.get("code")
    return _shown(words if _is_text(words) else error), code if isinstance(code, str) else ""


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, deep nesting
        raise UnreadableReply(f"no JSON: {error}") from error


def _text(message: dict[str, Any]) -> str:
    """The text of a message; content in parts is joined, and without any a refusal counts."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if isinstance(part, dict) and _is_text(part.get("text")))
    if content is not None and not isinstance(content, str):
        raise UnreadableReply(f"{type(content).__name__} as content")
    refusal = message.get("refusal")
    return content or (refusal if isinstance(refusal, str) else "")


def _finish(reason: Any, message: dict[str, Any]) -> Finish:
    """How a text ended. Without a text: why there is none."""
    if reason is not None and not isinstance(reason, str):
        raise UnreadableReply(f"{type(reason).__name__} as finish_reason")
    if reason in _ABORTED:
        raise UnreadableReply(f"finish_reason {reason}")
    empty = not _text(message).strip()
    if reason in _FINISHES and (_FINISHES[reason] == "filtered" or not empty):
        return _FINISHES[reason]
    if reason in _TOOLS or (empty and any(message.get(key) for key in _TOOLS)):
        return "tool_call"
    if empty and any(_is_text(message.get(key)) for key in ("reasoning_content", "reasoning")):
        return "only_reasoning"
    return _FINISHES.get(reason or "", "stop")


def _count(value: Any, otherwise: int) -> int:
    """A number of tokens; also one in digits. ``otherwise`` for anything else, such as NaN or a negative one."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TOKENS:
        return otherwise
    return int(value)


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."

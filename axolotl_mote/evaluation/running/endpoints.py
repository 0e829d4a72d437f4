"""Systems and grader as models of inspect_ai: how they are made, whether they can be reached, when they are freed.

Making a model loads nothing; a local one is loaded at its first request. It knows neither tasks nor answers.
"""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from inspect_ai.model import GenerateConfig, Model, get_model

from axolotl_mote.evaluation.settings import (
    NO_STEPS,
    Endpoint,
    Settings,
    System,
    endpoint_identity,
    identity_hash,
)

_SERVICE = "openai-api/server"
_NO_KEY = "AXOLOTL_MOTE_NO_KEY"


def model_of(settings: Settings, system: System, mode: str) -> Model:
    """The inspect_ai model of a system in one mode; nothing is loaded yet.

    Raises:
        ValueError: If the folder is no system, or lacks the steps.
    """
    sampling = settings.sampling
    config: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        config["top_p"] = sampling.top_p
        if system.is_local or settings.epochs == 1:  # with one seed a server may answer alike in every epoch
            config["seed"] = sampling.seed
    arguments: dict[str, Any] = {"batch_size": settings.batch_size}
    if mode != NO_STEPS:
        arguments["steps"] = mode
    if system.check:
        arguments["check"] = True
    return _endpoint_model(system, config, arguments)


def grader_of(settings: Settings) -> Model | None:
    """The inspect_ai model of the LLM judges; None if there is no grader.

    Raises:
        ValueError: If the folder is no model.
    """
    if settings.grader is None:
        return None
    return _endpoint_model(settings.grader, {}, {"batch_size": settings.batch_size})


def _endpoint_model(endpoint: Endpoint, config: dict[str, Any], arguments: dict[str, Any]) -> Model:
    """A model of its own for every cell: clients of servers do not survive the event loop of another one."""
    config["max_connections"] = endpoint.concurrency
    if endpoint.inspect_model:
        return get_model(endpoint.inspect_model, config=GenerateConfig(**config), memoize=False)
    if endpoint.server:
        key = endpoint.api_key_env or _NO_KEY
        os.environ.setdefault(_NO_KEY, "none")
        config["timeout"] = endpoint.retry_for
        if endpoint.extra_body:
            config["extra_body"] = endpoint.extra_body
        return get_model(
            f"{_SERVICE}/{endpoint.model}",
            config=GenerateConfig(**config),
            base_url=endpoint.server,
            memoize=False,
            api_key_var=key,
        )
    config["max_connections"] = 2 * arguments["batch_size"]  # one batch that is answered and one that waits
    arguments |= {"dtype": endpoint.dtype, "device": endpoint.device, "base_model": endpoint.base_model}
    given = {key: value for key, value in arguments.items() if value is not None}
    name = endpoint.adapter or endpoint.model
    return get_model(f"mote/{name}", config=GenerateConfig(**config), memoize=False, **given)


def server_fault(endpoint: Endpoint, timeout: float = 10.0) -> str | None:
    """Why a server does not answer; None if it does, whatever it says, or if there is none."""
    if endpoint.server is None:
        return None
    try:
        with urllib.request.urlopen(f"{endpoint.server.rstrip('/')}/models", timeout=timeout):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{endpoint.server} does not answer: {one_line(str(error)) or type(error).__name__}"


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind a failed request; None if the server gave none."""
    status = getattr(_cause(error), "status_code", None)
    return status if isinstance(status, int) else None


def reason(error: BaseException) -> str:
    """What made a request fail, in one line; not that it was retried, and not the request."""
    cause = _cause(error)
    text = one_line(str(cause))
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def one_line(text: str) -> str:
    """A text without line breaks and without addresses in memory, so that it is the same in every run."""
    return " ".join(re.sub(r" at 0x[0-9a-f]{6,}", "", text).split())


def _cause(error: BaseException) -> BaseException:
    """The error at the bottom of a chain."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return error


def grader_hash(settings: Settings) -> str | None:
    """Tells graders apart; None if there is none."""
    return identity_hash(endpoint_identity(settings.grader)) if settings.grader else None


@contextmanager
def kept(endpoint: Endpoint | None) -> Iterator[None]:
    """Keep the weights of a local model from its first request to the end of the block, and free them there.

    Models of one cell hold the same weights; see ``closing``.
    """
    if endpoint is None or not endpoint.is_local:
        yield
        return
    from axolotl_mote.evaluation.systems import acquire, find_system, release

    name = str(endpoint.adapter or endpoint.model)
    held = acquire(find_system(name, endpoint.base_model, dtype=endpoint.dtype, device=endpoint.device))
    try:
        yield
    finally:
        release(held)


def closing(endpoint: Endpoint | None, model: Model | None) -> AbstractContextManager[Any]:
    """Give up a local model's hold of its weights at the end of the block; others have none.

    Args:
        endpoint: What the model was made of.
        model: The model of one cell.
    """
    return model if model is not None and endpoint is not None and endpoint.is_local else nullcontext()

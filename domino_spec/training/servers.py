"""An OpenAI-compatible server of the target answers prompts, many at once.

For targets that a serving engine runs faster than this package. Answers come back as text and are encoded again with
the target's chat template, so they are its words, but not always in the tokens in which it wrote them.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from domino_spec.recipe import DataRecipe
from domino_spec.settings import UserError
from domino_spec.target.load import TargetText
from domino_spec.target.text import Message
from domino_spec.training.answers import (
    SERVER,
    TOO_LONG,
    Dialogue,
    RegenerateProgress,
    RegenerateResult,
    Regeneration,
    only_run,
)
from domino_spec.training.conversations import ChatFormat, knows_thinking
from domino_spec.training.regenerate import answer_seed

T = TypeVar("T")
R = TypeVar("R")

KEY_VARIABLE = "DOMINO_SPEC_SERVER_KEY"
"""Environment variable with the key that a server may ask for."""
RETRIES = 5
TIMEOUT_SECONDS = 600.0
"""Of one request: a long answer from a busy server takes its time."""
LONGEST_WAIT_SECONDS = 60.0
FAILURES_TO_GIVE_UP = 20
"""Conversations in a row without an answer after which a run stops: the server is down or refuses everything."""
_WORTH_RETRYING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class ServerError(Exception):
    """A request failed for good; its text is the reason, the same for all of its kind."""


class _TryAgain(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the server asked for."""


@dataclass(frozen=True)
class Reply:
    """A server's answer."""

    content: str
    reasoning: str
    """What a reasoning parser of the server took out of the answer."""
    truncated: bool
    """Cut at the asked number of tokens."""
    tokens: int
    """Generated, as the server counts them; 0 where it does not say."""


class Server:
    """An OpenAI-compatible server.

    Args:
        url: such as http://localhost:8000, with or without /v1.
        model: what the server calls the target; None takes the only one that it names.
        retries: further tries of a request that may pass.
        first_wait: seconds before the first of them; it doubles from try to try.
        timeout: seconds for one try.

    Raises:
        UserError: the model is to be taken from the server, which cannot be reached or names several.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        retries: int = RETRIES,
        first_wait: float = 1.0,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        url = url.rstrip("/").removesuffix("/chat/completions")
        self.url = url if url.endswith("/v1") else f"{url}/v1"
        self._retries, self._first_wait, self._timeout = retries, first_wait, timeout
        self._stopped = threading.Event()
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        try:
            names = [str(entry["id"]) for entry in self._request("models", None)["data"]]
        except ServerError as error:
            raise UserError(f"cannot ask the server at {self.url} for its models: {error}") from None
        except (KeyError, TypeError):
            raise UserError(
                f"the server at {self.url} does not say which models it has; set data.server_model"
            ) from None
        if len(names) != 1:
            raise UserError(
                f"the server at {self.url} has {len(names)} models; set data.server_model to one of {names}"
            )
        return names[0]

    def chat(self, messages: list[Message], **settings: Any) -> Reply:
        """The assistant's next turn.

        Args:
            messages: so far.
            settings: further keys of the request, such as `temperature` and `max_tokens`.

        Raises:
            ServerError: after retries, or at once where they cannot help.
        """
        body = {"model": self.model, "messages": messages, **settings}
        return self._request("chat/completions", body, _parse_reply)

    def stop(self) -> None:
        """Let no further try begin."""
        self._stopped.set()

    def _request(
        self, path: str, body: dict[str, Any] | None, parse: Callable[[Any], Any] = lambda value: value
    ) -> Any:
        for attempt in range(self._retries + 1):
            try:
                return parse(self._try(path, body))
            except _TryAgain as error:
                # Half of the wait is drawn by lot, so that requests refused together do not come back together.
                wait = self._first_wait * 2**attempt * (0.5 + random.random() / 2) if error.wait is None else error.wait
                last = attempt == self._retries
                if last or self._stopped.wait(min(wait, LONGEST_WAIT_SECONDS)):
                    raise ServerError(str(error)) from None
        raise AssertionError("unreachable")

    def _try(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code in _WORTH_RETRYING:
                raise _TryAgain(reason, _seconds(error.headers.get("Retry-After"))) from None
            raise ServerError(reason + _detail(error)) from None
        except ValueError:  # a UnicodeDecodeError is one too
            raise _TryAgain("a reply that is not JSON") from None
        except TimeoutError:
            raise _TryAgain("no reply in time") from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _TryAgain(
                "no reply in time" if isinstance(cause, TimeoutError) else f"no connection ({cause})"
            ) from None


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date, which is rare
        return None


def _detail(error: urllib.error.HTTPError) -> str:
    """What the body of a refusal says, in short."""
    try:
        text = json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return ""
    return f" ({' '.join(str(text).split())[:120]})"


def _parse_reply(value: Any) -> Reply:
    try:
        choice = value["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        tokens = (value.get("usage") or {}).get("completion_tokens") or 0
        if not (isinstance(content, str) and isinstance(reasoning, str) and isinstance(tokens, int)):
            raise TypeError
        return Reply(content, reasoning, choice.get("finish_reason") == "length", tokens)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _TryAgain("a reply without an answer") from None


def regenerate_with_server(
    server: Server,
    target: TargetText,
    prompts: str | Path,
    out: str | Path,
    recipe: DataRecipe,
    on_progress: Callable[[RegenerateProgress], None] = lambda progress: None,
) -> RegenerateResult:
    """Let a server answer every prompt that `out` does not answer yet, `recipe.concurrency` conversations at once.

    Args:
        server: runs the target.
        target: its tokenizer and length.
        prompts: conversations, see `datasets.read_conversations`.
        out: JSONL to append to, as `regenerate` writes it; answers stand in the order in which they came.
        recipe: settings.
        on_progress: called after every conversation.

    Raises:
        UserError: as `regenerate`, or the server answers nothing at all.
    """
    with only_run(out):
        run = Regeneration.start(prompts, out, recipe, target.tokenizer, on_progress)
        _answer_all(server, target, run, recipe)
        return run.result()


def _answer_all(server: Server, target: TargetText, run: Regeneration, recipe: DataRecipe) -> None:
    chat = ChatFormat(target.tokenizer, target.stop_token_ids, recipe.thinking)
    tokenizing = threading.Lock()  # tokenizers are not made for several threads
    failures = 0

    def answer(dialogue: Dialogue) -> tuple[Dialogue, int]:
        return dialogue, _answer(server, chat, dialogue, recipe, target.max_length, tokenizing)

    try:
        for dialogue, tokens in done_in_parallel(run.waiting, answer, recipe.concurrency):
            run.finish([dialogue], tokens)
            failures = failures + 1 if dialogue.ended == SERVER else 0
            if failures >= FAILURES_TO_GIVE_UP:
                raise UserError(
                    f"the server at {server.url} left {failures} conversations in a row unanswered "
                    f"({dialogue.error}); what it answered before is in {run.out}"
                )
    finally:
        server.stop()


def _answer(
    server: Server, chat: ChatFormat, dialogue: Dialogue, recipe: DataRecipe, max_length: int, lock: threading.Lock
) -> int:
    """Have every turn of a conversation answered; returns the number of tokens generated."""
    settings: dict[str, Any] = {"temperature": recipe.temperature, "max_tokens": recipe.max_new_tokens}
    if recipe.temperature > 0:
        settings["seed"] = answer_seed(dialogue.id)
    if recipe.thinking is not None and knows_thinking(chat.tokenizer):
        settings["chat_template_kwargs"] = {"enable_thinking": recipe.thinking}
    tokens = 0
    while not dialogue.is_done:
        messages = dialogue.messages
        with lock:
            prompt = dialogue.prompt_ids
        if len(prompt) + recipe.max_new_tokens > max_length:
            dialogue.ended = TOO_LONG
            break
        try:
            reply = server.chat(messages, **settings)
        except ServerError as error:
            dialogue.ended, dialogue.error = SERVER, str(error)
            break
        said = {"role": "assistant", "content": reply.content}
        thought = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
        with lock:
            # Thinking that was cut before its end cannot be told apart from thinking that ended there.
            lost = reply.truncated and reply.reasoning and not reply.content
            ids = [] if lost else chat.answer_ids([*messages, {**said, **thought}], ended=not reply.truncated)
        tokens += reply.tokens or len(ids)
        dialogue.answer(prompt, ids, reply.content, reply.truncated)
    return tokens


def done_in_parallel(items: Iterable[T], work: Callable[[T], R], threads: int) -> Iterator[R]:
    """Results of `work` on every item, in the order in which they are done.

    The threads end with the process: whoever stops reading, or presses Ctrl-C, does not wait for open requests. An
    error in `work` is raised here.
    """
    waiting = iter(items)
    taking, stopped = threading.Lock(), threading.Event()
    results: queue.Queue[tuple[R | None, BaseException | None, bool]] = queue.Queue()

    def serve() -> None:
        try:
            while not stopped.is_set():
                with taking:
                    item = next(waiting)
                results.put((work(item), None, False))
        except StopIteration:
            results.put((None, None, True))
        except BaseException as error:  # raised again in the thread that reads; it would otherwise wait forever
            results.put((None, error, True))

    for _ in range(threads):
        threading.Thread(target=serve, daemon=True).start()
    try:
        ended = 0
        while ended < threads:
            result, error, is_end = results.get()
            if error is not None:
                raise error
            ended += is_end
            if not is_end:
                yield result  # type: ignore[misc]
    finally:
        stopped.set()

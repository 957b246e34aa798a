"""An OpenAI-compatible server of the target answers prompts, many at once, if a serving engine runs the target faster.

Answers come back as text and are encoded again with the target's chat template: the same words, but not always in the
tokens in which the server wrote them.
"""

from __future__ import annotations

import json
import os
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from domino_spec.clients.openai import Client, Fault, base_url
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
    answer_seed,
    only_run,
)
from domino_spec.training.conversations import ChatFormat, knows_thinking

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


class ServerError(Exception):
    """A request failed after all retries; its text is the reason, the same for all of its kind."""


@dataclass(frozen=True)
class Reply:
    """A server's answer."""

    content: str
    reasoning: str
    """Thinking that the server's reasoning parser separated from the answer."""
    truncated: bool
    """Cut at the asked number of tokens."""
    tokens: int
    """Generated, as the server counts them; 0 if it does not say."""


class Server:
    """An OpenAI-compatible server of the target; several threads may ask it at once.

    Args:
        url: such as http://localhost:8000, with or without /v1.
        model: what the server calls the target; None takes the only one that it names.
        retries: further tries of a request that failed in a way that may pass.
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
        self.url = base_url(url)
        self._retries, self._first_wait, self._timeout = retries, first_wait, timeout
        self._stopped, self._local = threading.Event(), threading.local()
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        try:
            listed = self._retried(lambda client: json.loads(client.get("/models", self._timeout)))
            names = [str(entry["id"]) for entry in listed["data"]]
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
            ServerError: after retries, or at once if they cannot help.
        """
        body = {"model": self.model, "messages": messages, **settings}
        return self._retried(lambda client: _parse_reply(client.complete(body, self._timeout)))

    def stop(self) -> None:
        """Start no further try."""
        self._stopped.set()

    def _retried(self, ask: Callable[[Client], R]) -> R:
        if not hasattr(self._local, "client"):  # each thread has its own connection
            self._local.client = Client(self.url, os.environ.get(KEY_VARIABLE), use_proxies=True)
        for attempt in range(self._retries + 1):
            try:
                return ask(self._local.client)
            except ValueError:
                fault = Fault("a reply that is not JSON")
            except Fault as error:
                fault = error
            # Half of the wait is random, so that requests refused together do not come back together.
            wait = self._first_wait * 2**attempt * (0.5 + random.random() / 2)
            wait = min(wait if fault.retry_after is None else fault.retry_after, LONGEST_WAIT_SECONDS)
            if not fault.may_pass or attempt == self._retries or self._stopped.wait(wait):
                break
        raise ServerError(str(fault))


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
        raise Fault("a reply without an answer") from None


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
            # Thinking that was cut before its end looks like thinking that ended there.
            lost = reply.truncated and reply.reasoning and not reply.content
            ids = [] if lost else chat.answer_ids([*messages, {**said, **thought}], ended=not reply.truncated)
        tokens += reply.tokens or len(ids)
        dialogue.answer(prompt, ids, reply.content, reply.truncated)
    return tokens


def done_in_parallel(items: Iterable[T], work: Callable[[T], R], threads: int) -> Iterator[R]:
    """Results of `work` on every item, in the order in which they are done.

    The threads end with the process, so a reader that stops, or Ctrl-C, does not wait for open requests. An
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

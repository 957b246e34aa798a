"""A server answers prompts: many at once, each once, with an account of what was lost on the way."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from domino_spec.recipe import DataRecipe
from domino_spec.settings import UserError
from domino_spec.target.load import TargetText
from domino_spec.training import servers as servers_module
from domino_spec.training.answers import regenerate
from domino_spec.training.data import load_sequences
from domino_spec.training.servers import Server, done_in_parallel, regenerate_with_server
from tests.cli_fixtures import fail, make_target_dir, run, write_recipe  # noqa: F401
from tests.tiny import EOS, VOCAB, as_target, word_tokenizer

RECIPE = DataRecipe(max_new_tokens=10, concurrency=3)
PROMPTS = [
    {"id": "a", "turns": ["w5 w6 w7"], "category": "x"},
    {"id": "b", "turns": ["w8"]},
    {"id": "c", "turns": ["w9 w10", "w11 w12 w13"]},
    {"id": "d", "messages": [{"role": "system", "content": "w20"}, {"role": "user", "content": "w14"}]},
    {"id": "e", "turns": ["w18 w19"]},
]
Handle = Callable[[dict[str, Any]], "tuple[int, Any]"]


class StandIn:
    """A chat server in a thread; `handle` gives status and body, to be replaced by tests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.handle: Handle = lambda body: (200, reply(said(body)))
        self.models: Any = {"data": [{"id": "the-target"}]}
        self.reply_headers: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/v1/models"
                self._send(200, outer.models)

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append(dict(self.headers))
                self._send(*outer.handle(body))

            def _send(self, status: int, value: Any) -> None:
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in outer.reply_headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self) -> Counter[str]:
        """How often each last message was sent."""
        return Counter(r["messages"][-1]["content"] for r in self.requests)


def said(body: dict[str, Any]) -> str:
    """An answer that shows what was asked."""
    return "w30 " + body["messages"][-1]["content"]


def reply(content: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}],
        "usage": {"completion_tokens": 4},
    }


@pytest.fixture
def stand_in(monkeypatch) -> Iterator[StandIn]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = StandIn()
    yield server
    server.stop()


@pytest.fixture
def text() -> TargetText:
    """w1 opens the user's turn and w3 the system's, w2 asks for an answer, <eos> ends every turn."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': 'w1 ', 'system': 'w3 ', 'assistant': 'w2 '}[m['role']] }}"
        "{{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    )
    return TargetText(tokenizer, frozenset({EOS}), 512)


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", PROMPTS)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({r["id"] for r in rows}) == len(rows), "answered twice"
    return {row["id"]: row for row in rows}


def server(stand_in: StandIn, **options) -> Server:
    return Server(stand_in.url, "m", **{"first_wait": 0.001, **options})


def words(text: str) -> list[int]:
    return [EOS if w == "<eos>" else int(w[1:]) for w in text.split()]


def test_answers_are_the_servers_in_the_targets_own_template(tmp_path, stand_in, text, prompts):
    out = tmp_path / "answers.jsonl"
    result = regenerate_with_server(server(stand_in), text, prompts, out, RECIPE)
    rows = read(out)
    assert set(rows) == {"a", "b", "c#1", "c#2", "d", "e"}
    assert rows["a"]["prompt_ids"] == words("w1 w5 w6 w7 <eos> w2")
    assert rows["a"]["response_ids"] == words("w30 w5 w6 w7 <eos>")
    assert rows["d"]["prompt_ids"] == words("w3 w20 <eos> w1 w14 <eos> w2")
    later = "w1 w9 w10 <eos> w2 w30 w9 w10 <eos> w1 w11 w12 w13 <eos> w2"
    assert rows["c#2"]["prompt_ids"] == words(later)
    assert set(rows["a"]) == {"id", "category", "temperature", "prompt_ids", "response_ids"}
    assert rows["a"]["category"] == "x"
    assert (result.answered, result.already_answered, result.new_tokens, result.left_out) == (5, 0, 6 * 4, "")
    # Both turns of the conversation are learned in one sequence.
    assert "c#2" in {s.id for s in load_sequences(out, 99, VOCAB) if len(s.answers) == 2}


def test_a_request_says_what_the_recipe_says(tmp_path, stand_in, text, prompts):
    tokenizer = text.tokenizer
    tokenizer.chat_template += "{% if enable_thinking %}w4 {% endif %}"
    sampled = DataRecipe(max_new_tokens=10, temperature=0.7, thinking=True)
    regenerate_with_server(server(stand_in), text, prompts, tmp_path / "sampled.jsonl", sampled)
    request = next(r for r in stand_in.requests if r["messages"][-1]["content"] == "w14")
    assert request["messages"] == PROMPTS[3]["messages"] and request["model"] == "m"
    assert (request["max_tokens"], request["temperature"]) == (10, 0.7)
    assert request["chat_template_kwargs"] == {"enable_thinking": True}
    assert len({r["seed"] for r in stand_in.requests}) == 5, "one for each conversation"
    rows = read(tmp_path / "sampled.jsonl")
    assert rows["b"]["thinking"] is True and rows["b"]["prompt_ids"] == words("w1 w8 <eos> w2 w4")

    stand_in.requests.clear()
    plain = DataRecipe(max_new_tokens=10, thinking=None)
    regenerate_with_server(server(stand_in), text, prompts, tmp_path / "plain.jsonl", plain)
    assert not any({"seed", "chat_template_kwargs"} & r.keys() for r in stand_in.requests)
    assert read(tmp_path / "plain.jsonl")["b"]["thinking"] is None


def test_thinking_that_the_server_parted_from_the_answer_is_put_back(tmp_path, stand_in, text):
    tokenizer = text.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}",
        "{% if m.reasoning_content %}w40 {{ m.reasoning_content }} w41 {% endif %}{{ m['content'] }}",
    )
    stand_in.handle = lambda body: (200, reply("w7 w7", reasoning_content="w6 w6"))
    prompts = write(tmp_path / "p.jsonl", [{"id": "a", "turns": ["w5", "w8"]}])
    regenerate_with_server(server(stand_in), text, prompts, tmp_path / "out.jsonl", RECIPE)
    rows = read(tmp_path / "out.jsonl")
    assert rows["a#1"]["response_ids"] == words("w40 w6 w6 w41 w7 w7 <eos>")
    assert rows["a#2"]["prompt_ids"] == words("w1 w5 <eos> w2 w7 w7 <eos> w1 w8 <eos> w2"), "as clients send it"


def test_as_many_conversations_as_asked_are_open_at_once(tmp_path, stand_in, text):
    together = threading.Barrier(3)  # broken, and the request answered with an error, unless three meet

    def handle(body: dict) -> tuple[int, Any]:
        together.wait(60)
        return 200, reply(said(body))

    stand_in.handle = handle
    six = write(tmp_path / "six.jsonl", [{"id": f"p{i}", "turns": [f"w{i + 5}"]} for i in range(6)])
    result = regenerate_with_server(server(stand_in), text, six, tmp_path / "out.jsonl", RECIPE)
    assert result.answered == 6 and len(stand_in.requests) == 6


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_refusal_that_passes_costs_nothing(tmp_path, stand_in, text, prompts, status):
    refused: set[str] = set()

    def handle(body: dict) -> tuple[int, Any]:
        asked = body["messages"][-1]["content"]
        if asked not in refused:
            refused.add(asked)
            return status, {"error": {"message": "busy"}}
        return 200, reply(said(body))

    stand_in.handle = handle
    result = regenerate_with_server(server(stand_in), text, prompts, tmp_path / "out.jsonl", RECIPE)
    assert result.answered == 5 and result.server_errors == {}
    assert set(stand_in.asked().values()) == {2}


def test_the_servers_own_waiting_time_is_kept(stand_in, monkeypatch):
    waits: list[float] = []
    stand_in.handle = lambda body: (429, {})
    stand_in.reply_headers = {"Retry-After": "7"}
    patient = server(stand_in, retries=2)
    monkeypatch.setattr(patient._stopped, "wait", lambda seconds: bool(waits.append(seconds)))
    with pytest.raises(servers_module.ServerError, match="HTTP 429"):
        patient.chat([])
    assert waits == [7.0, 7.0]


def test_waiting_times_double_up_to_a_limit(stand_in, monkeypatch):
    waits: list[float] = []
    stand_in.handle = lambda body: (503, {})
    patient = server(stand_in, retries=9, first_wait=1.0)
    monkeypatch.setattr(patient._stopped, "wait", lambda seconds: bool(waits.append(seconds)))
    with pytest.raises(servers_module.ServerError):
        patient.chat([])
    assert all(2**k / 2 <= wait <= 2**k for k, wait in enumerate(waits[:6])) and len(waits) == 9
    assert waits[-1] == servers_module.LONGEST_WAIT_SECONDS


MALFORMED = [b"<html>", b'{"choices": [', {"choices": []}, {"choices": [{"message": {"content": 3}}]}, [1], b"\xff"]


@pytest.mark.parametrize("body", MALFORMED, ids=str)
def test_a_malformed_reply_is_asked_for_again_and_then_left_out(tmp_path, stand_in, text, prompts, body):
    bad = lambda request: request["messages"][-1]["content"] == "w8"  # noqa: E731
    stand_in.handle = lambda request: (200, body if bad(request) else reply(said(request)))
    result = regenerate_with_server(server(stand_in, retries=2), text, prompts, tmp_path / "out.jsonl", RECIPE)
    assert stand_in.asked()["w8"] == 3
    assert set(read(tmp_path / "out.jsonl")) == {"a", "c#1", "c#2", "d", "e"}
    ((reason, count),) = result.server_errors.items()
    assert reason.startswith("a reply") and count == 1
    assert result.left_out == f"1 {reason}"


def test_what_cannot_be_answered_is_not_asked_again_in_one_run_but_in_the_next(tmp_path, stand_in, text, prompts):
    stand_in.handle = lambda body: (
        (400, {"error": {"message": "too\nlong"}})
        if body["messages"][-1]["content"] == "w11 w12 w13"
        else (200, reply(said(body)))
    )
    out = tmp_path / "out.jsonl"
    result = regenerate_with_server(server(stand_in), text, prompts, out, RECIPE)
    assert stand_in.asked()["w11 w12 w13"] == 1
    assert result.server_errors == {"HTTP 400 Bad Request (too long)": 1}
    assert "c#1" in read(out) and "c#2" not in read(out), "the answers before it are kept"
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["server_errors"] == result.server_errors and report["answered"] == 5

    stand_in.handle = lambda body: (200, reply(said(body)))
    again = regenerate_with_server(server(stand_in), text, prompts, out, RECIPE)
    assert (again.answered, again.already_answered) == (1, 4) and "c#2" in read(out)


def test_a_server_that_is_gone_ends_the_run_in_one_line(tmp_path, stand_in, text):
    many = write(tmp_path / "many.jsonl", [{"id": f"p{i}", "turns": [f"w{i % 50} w{i // 50}"]} for i in range(60)])
    answered: list[str] = []

    def handle(body: dict) -> tuple[int, Any]:
        if len(answered) < 5:
            answered.append(body["messages"][-1]["content"])
            return 200, reply(said(body))
        return 404, {"error": {"message": "no such model"}}

    stand_in.handle = handle
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"unanswered \(HTTP 404 Not Found \(no such model\)\)") as error:
        regenerate_with_server(server(stand_in), text, many, out, RECIPE)
    assert "\n" not in str(error.value)
    assert len(read(out)) == 5 and len(stand_in.requests) < 60


def test_no_server_at_all_is_said_at_once(stand_in):
    stand_in.stop()
    with pytest.raises(UserError, match=r"cannot ask the server at .*/v1 for its models: no connection") as error:
        Server(stand_in.url, first_wait=0.001)
    assert "\n" not in str(error.value)


def test_the_only_model_of_a_server_is_taken(stand_in):
    for url in ("", "/", "/v1", "/v1/", "/v1/chat/completions"):
        assert Server(stand_in.url + url).model == "the-target"
    stand_in.models = {"data": [{"id": "x"}, {"id": "y"}]}
    with pytest.raises(UserError, match=r"has 2 models; set data.server_model to one of \['x', 'y'\]"):
        Server(stand_in.url)
    stand_in.models = {"object": "list"}
    with pytest.raises(UserError, match="does not say which models it has"):
        Server(stand_in.url)


def test_a_key_is_sent_only_where_there_is_one(stand_in, monkeypatch):
    server(stand_in).chat([{"role": "user", "content": "w3"}])
    monkeypatch.setenv(servers_module.KEY_VARIABLE, "abc")
    server(stand_in).chat([{"role": "user", "content": "w3"}])
    assert [h.get("Authorization") for h in stand_in.headers] == [None, "Bearer abc"]


@pytest.mark.parametrize("keep", [True, False])
def test_truncated_answers_are_kept_without_an_end_or_left_out(tmp_path, stand_in, text, prompts, keep):
    cut = lambda body: "length" if body["messages"][-1]["content"] == "w9 w10" else "stop"  # noqa: E731
    stand_in.handle = lambda body: (200, reply(said(body), cut(body)))
    out = tmp_path / "out.jsonl"
    recipe = DataRecipe(max_new_tokens=10, keep_truncated=keep)
    result = regenerate_with_server(server(stand_in), text, prompts, out, recipe)
    rows = read(out)
    assert result.truncated == 1 and set(rows) >= {"a", "b", "d", "e"}
    if keep:
        assert rows["c#1"]["response_ids"] == words("w30 w9 w10") and "c#2" in rows
    else:
        assert not {"c#1", "c#2"} & rows.keys(), "what builds on it is not asked"


def test_everything_left_out_is_counted_with_its_reason(tmp_path, stand_in, text):
    suite = write(tmp_path / "suite.jsonl", [{"id": "s", "turns": ["W8 "]}])
    rows = [
        *PROMPTS,
        {"id": "again", "turns": [" w5  w6 w7"]},
        {"id": "long", "turns": [" ".join(["w3"] * 505)]},
        {"id": "empty", "turns": ["w21"]},
        {"id": "odd", "messages": [{"role": "tool", "content": "w3"}]},
    ]
    stand_in.handle = lambda body: (200, reply(None if body["messages"][-1]["content"] == "w21" else said(body)))
    recipe = DataRecipe(max_new_tokens=10, exclude=(str(suite),))
    out = tmp_path / "out.jsonl"
    result = regenerate_with_server(server(stand_in), text, write(tmp_path / "p.jsonl", rows), out, recipe)
    assert set(read(out)) == {"a", "c#1", "c#2", "d", "e"}
    assert (result.answered, result.too_long, result.empty_answers) == (4, 1, 1)
    assert (result.duplicate_prompts, result.in_evaluation) == (1, 1)
    assert result.unusable == {"a role other than system, user and assistant": 1}
    assert result.left_out == (
        "1 too long for the target, 1 without an answer, 1 with the prompt of another, 1 in an evaluation suite, "
        "1 a role other than system, user and assistant"
    )
    assert " ".join(["w3"] * 505) not in stand_in.asked(), "what is too long is not sent"


def test_an_interrupted_run_is_continued(tmp_path, stand_in, text, prompts):
    """Killed after a few answers, in the middle of writing a line."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    regenerate_with_server(server(stand_in), text, prompts, whole, RECIPE)

    def interrupt(progress):
        if progress.answered >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate_with_server(server(stand_in), text, prompts, out, RECIPE, interrupt)
    kept = out.read_text()
    done = set(read(out))
    out.write_text(kept + '{"id":"e","prom')
    stand_in.requests.clear()
    result = regenerate_with_server(server(stand_in), text, prompts, out, RECIPE)
    assert out.read_text().startswith(kept), "what was there is left as it is"
    assert read(out) == read(whole)
    assert (result.already_answered, result.answered) == (2, 3)
    answered = {row["turns"][0] for row in PROMPTS if row["id"] in done and "turns" in row}
    assert not answered & set(stand_in.asked()), "asked again"


def test_progress_counts_up_to_the_end(tmp_path, stand_in, text, prompts):
    seen = []
    result = regenerate_with_server(server(stand_in), text, prompts, tmp_path / "out.jsonl", RECIPE, seen.append)
    assert [p.answered for p in seen] == [1, 2, 3, 4, 5] and seen[-1].total == 5
    assert seen[-1].new_tokens == result.new_tokens


def test_both_engines_write_the_same_rows(tmp_path, stand_in, model, text, prompts):
    """The server's words being the target's own, what is trained on does not depend on who answered."""
    recipe = DataRecipe(max_new_tokens=60)
    regenerate(as_target(model, text.tokenizer), None, prompts, tmp_path / "engine.jsonl", recipe)
    rows = read(tmp_path / "engine.jsonl")
    answers = {tuple(r["prompt_ids"]): r["response_ids"] for r in rows.values()}

    def handle(body: dict) -> tuple[int, Any]:
        ids = text.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
        answer = answers[tuple(ids)]
        spoken = text.tokenizer.decode(answer).removesuffix("<eos>").strip()
        return 200, reply(spoken, "stop" if answer[-1] == EOS else "length")

    stand_in.handle = handle
    regenerate_with_server(server(stand_in), text, prompts, tmp_path / "server.jsonl", recipe)
    assert read(tmp_path / "server.jsonl") == rows
    assert {row["response_ids"][-1] == EOS for row in rows.values()} == {True, False}, "both endings came up"


def test_results_come_as_they_are_done_and_errors_are_raised():
    first = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert first.wait(60)
        else:
            first.set()
        return item

    assert list(done_in_parallel([0, 1], work, 2)) == [1, 0]
    with pytest.raises(ZeroDivisionError):
        list(done_in_parallel([1, 0], lambda item: 1 // item, 2))
    assert list(done_in_parallel([], work, 2)) == []


# The command


def test_the_command_lets_a_server_answer(tmp_path, stand_in, target_dir):
    prompts = write(tmp_path / "p.jsonl", [{"id": "a", "turns": ["w5 w6"]}, {"id": "b", "turns": ["w5  W6"]}])
    recipe = write_recipe(tmp_path / "recipe.yaml", target_dir, prompts=str(prompts), concurrency=2)
    out = tmp_path / "out.jsonl"
    arguments = ("regenerate", recipe, "--out", out, "--server", stand_in.url)
    result = json.loads(run(*arguments, "--json").stdout)
    assert (result["answered"], result["duplicate_prompts"], result["in_evaluation"]) == (1, 1, 0)
    assert stand_in.requests[0]["model"] == "the-target"
    assert read(out)["a"]["response_ids"] == words("w30 w5 w6")
    lines = run(*arguments).stdout.splitlines()
    assert lines[-2:] == [
        f"{out}: 0 conversations answered now, 1 before",
        "left out: 1 with the prompt of another",
    ]


def test_wrong_use_of_a_server_is_one_line(tmp_path, stand_in, target_dir):
    prompts = write(tmp_path / "p.jsonl", [{"id": "a", "turns": ["w5"]}])
    recipe = write_recipe(tmp_path / "recipe.yaml", target_dir, prompts=str(prompts))
    assert "server must be a URL" in fail("regenerate", recipe, "--server", "localhost:8000")
    assert "--draft is for the engine" in fail("regenerate", recipe, "--server", stand_in.url, "--draft", "x")
    named = write_recipe(tmp_path / "named.yaml", target_dir, prompts=str(prompts), responses="sharegpt")
    assert "give --out for the answers" in fail("regenerate", named)

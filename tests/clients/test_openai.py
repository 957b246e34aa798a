"""The client of servers: what it reads from a stream, and what it calls everything that is no answer."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from starlette.responses import JSONResponse, StreamingResponse

from domino_spec.clients.openai import Client, Fault, base_url
from domino_spec.settings import UserError
from tests.clients.fake import PATIENCE, Fake, error, event, faking, free_address, streamed

BODY = {"messages": [{"role": "user", "content": "a b c"}], "stream": True}
USAGE = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}
END = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


def delta(**values) -> dict:
    return {"choices": [{"delta": values, "finish_reason": None}]}


@pytest.fixture
def fake():
    server = Fake()
    with faking(server):
        yield server


@pytest.fixture
def client(fake):
    made = Client(fake.address)
    yield made
    made.close()


def test_an_answer_is_its_text_its_tokens_and_the_times_of_its_chunks(fake, client):
    fake.tokens_per_chunk = 3
    before = time.perf_counter()
    for _ in range(2):  # the second one over the same connection
        answer = client.stream(BODY, PATIENCE)
        assert (answer.text, answer.finish_reason) == ("a b c ", "stop")
        assert (answer.prompt_tokens, answer.completion_tokens) == (3, 9)
        times = [before, answer.sent, *answer.chunks, answer.last_token, answer.ended]
        assert len(answer.chunks) == 3 and times == sorted(times), "an opening without text is no chunk"
        assert answer.verify_passes is None


def test_a_stream_may_be_cut_anywhere(fake, client):
    text = ": hello\r\n\r\n" + "".join(map(event, (delta(content="ä"), delta(content="b"), END, USAGE)))
    data = text.replace("\n", "\r\n").encode() + b"data: [DONE]\n\n"
    for size in (1, 7, 64):
        fake.refuse = lambda body, size=size: streamed(*(data[i : i + size] for i in range(0, len(data), size)))
        answer = client.stream(BODY, PATIENCE)
        assert answer.text == "äb" and len(answer.chunks) == 2 and answer.completion_tokens == 2


def test_reasoning_counts_as_text_and_comes_first(fake, client):
    for key in ("reasoning_content", "reasoning"):
        chunks = (delta(**{key: "so "}), delta(**{key: "what: "}), delta(content="this"), END, USAGE)
        fake.refuse = lambda body, chunks=chunks: streamed(*map(event, chunks), "data: [DONE]\n\n")
        answer = client.stream(BODY, PATIENCE)
        assert answer.text == "so what: this" and answer.content == "this" and len(answer.chunks) == 3


def test_engines_say_in_the_answer_how_drafting_did(fake, client):
    fake.extra = {"num_verify_passes": 5, "num_accepted_drafts": 7}
    answer = client.stream(BODY, PATIENCE)
    assert (answer.verify_passes, answer.accepted_drafts) == (5, 7)
    fake.extra = {}
    details = {"spec_verify_ct": 2, "spec_num_correct_drafts": 3, "spec_accept_length": 2.5}
    fake.last = [{"choices": [], "sglext": {"spec_tokens_details": details}}]
    answer = client.stream(BODY, PATIENCE)
    assert (answer.verify_passes, answer.accepted_drafts) == (2, 3)


@pytest.mark.parametrize(
    ("response", "reason", "status"),
    [
        (error(400, "the  prompt\nis too long"), "HTTP 400 Bad Request (the prompt is too long)", 400),
        (JSONResponse({"detail": "no"}, 422), "HTTP 422 Unprocessable Entity (no)", 422),
        (
            JSONResponse({"choices": []}),
            "an answer in one piece (application/json), where a stream was asked for",
            None,
        ),
        (streamed(event(delta(content="x"))), "the stream broke off", None),
        (streamed(event(delta(content="x")), event(END), "data: [DONE]\n\n"), "an answer without usage", None),
        (streamed("data: nonsense\n\n"), "a chunk that is not JSON", None),
        (streamed(event([1])), "a chunk that is not OpenAI's", None),
        (streamed(event({"choices": [{"delta": "x"}]})), "a chunk that is not OpenAI's", None),
        (streamed(event({"error": {"message": "no room"}})), "an error in the stream (no room)", None),
    ],
)
def test_what_is_no_answer_has_a_reason(fake, client, response, reason, status):
    fake.refuse = lambda body: response
    with pytest.raises(Fault) as caught:
        client.stream(BODY, PATIENCE)
    assert str(caught.value).startswith(reason) and caught.value.status == status
    assert caught.value.seconds_until_room is None and caught.value.received is not None
    fake.refuse = lambda body: None
    assert client.stream(BODY, PATIENCE).text == "a b c ", "the next one is not affected"


def test_a_server_without_room_says_when_to_come_back(fake, client):
    for headers, status, seconds in (({"retry-after": "7"}, 429, 7), ({}, 429, 1), ({"retry-after": "2"}, 503, 2)):
        fake.refuse = lambda body, headers=headers, status=status: error(status, "full", **headers)
        with pytest.raises(Fault) as caught:
            client.stream(BODY, PATIENCE)
        assert caught.value.seconds_until_room == seconds
    fake.refuse = lambda body: error(503, "down for good")
    with pytest.raises(Fault) as caught:
        client.stream(BODY, PATIENCE)
    assert caught.value.seconds_until_room is None


def test_an_answer_that_does_not_end_in_time_is_given_up_and_what_came_is_kept(fake, client):
    async def stall():
        yield event(delta(content="x"))
        await asyncio.sleep(PATIENCE)

    fake.refuse = lambda body: StreamingResponse(stall(), media_type="text/event-stream")
    with pytest.raises(Fault, match=r"no whole answer within 0\.5 s") as caught:
        client.stream(BODY, 0.5)
    assert caught.value.received.text == "x"


def test_the_time_limit_is_for_the_whole_answer_not_for_each_chunk(fake, client):
    async def trickle():
        for _ in range(1000):
            yield event(delta(content="x"))
            await asyncio.sleep(0.05)

    fake.refuse = lambda body: StreamingResponse(trickle(), media_type="text/event-stream")
    before = time.perf_counter()
    with pytest.raises(Fault, match=r"no whole answer within 0\.5 s") as caught:
        client.stream(BODY, 0.5)
    assert 0.4 < time.perf_counter() - before < 25
    assert set(caught.value.received.text) == {"x"}
    fake.refuse = lambda body: None
    assert client.stream(BODY, PATIENCE).text == "a b c ", "the next one is not affected"


def test_a_key_that_no_header_can_carry_is_refused():
    with pytest.raises(UserError, match="no header can carry"):
        Client("http://h/v1", "ö")


def test_another_thread_can_end_the_waiting(fake, client):
    async def stall():
        yield event(delta(content="x"))
        client.abort()
        await asyncio.sleep(PATIENCE)

    fake.refuse = lambda body: StreamingResponse(stall(), media_type="text/event-stream")
    with pytest.raises(Fault):
        client.stream(BODY, PATIENCE)
    fake.refuse = lambda body: None
    with pytest.raises(Fault, match="no connection"):
        client.stream(BODY, PATIENCE)


def test_nobody_listening_is_said():
    with pytest.raises(Fault, match=r"no connection \(Connection refused\)"):
        Client(free_address()).stream(BODY, PATIENCE)


def test_a_kept_connection_that_the_server_has_closed_is_opened_anew():
    listening = socket.create_server(("127.0.0.1", 0))
    served = []

    def answer_once_per_connection() -> None:
        for _ in range(3):
            peer, _ = listening.accept()
            with peer:
                served.append(peer.recv(65536))
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    thread = threading.Thread(target=answer_once_per_connection, daemon=True)
    thread.start()
    client = Client(f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
    assert [client.get("/models", PATIENCE) for _ in range(3)] == ["ok"] * 3
    thread.join(PATIENCE)
    listening.close()
    assert len(served) == 3 and all(b"GET /v1/models" in request for request in served)


@pytest.mark.parametrize("given", ["http://h:1", "http://h:1/", "http://h:1/v1/", "http://h:1/v1/chat/completions"])
def test_addresses_are_taken_with_and_without_v1(given):
    assert base_url(given) == "http://h:1/v1"


@pytest.mark.parametrize(
    "given", ["h:1", "ftp://h", "http://", "http://h:99999", "http://h:x", "http://h /v1", "", "no"]
)
def test_what_is_no_address_is_refused(given):
    with pytest.raises(UserError, match="give one such as"):
        base_url(given)

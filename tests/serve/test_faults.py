"""What goes wrong hits only whom it must: a full queue, lost clients, slow answers, values that are not finite."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest
import torch

from tests import tiny
from tests.serve.running import MODEL, PATIENCE, Gate, eventually, serving, word_target

LONG = dict(temperature=0, max_tokens=200)


@pytest.fixture
def pool():
    """Threads that ask while the test goes on."""
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_a_full_queue_says_when_to_come_back(words, draft, pool):
    with serving(words, draft, slots=1, max_queue=1, num_drafts=3) as server:
        alone = server.complete("w3", temperature=0, max_tokens=9).choices[0].text
        with Gate(server.engine):
            asked = [pool.submit(server.complete, "w3", temperature=0, max_tokens=9) for _ in range(2)]
            eventually(lambda: server.runner.num_running + server.runner.num_waiting == 2)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError, match="queue is full") as caught:
                    server.complete("w3", stream=stream)
                assert int(caught.value.response.headers["retry-after"]) >= 1
            assert server.metric("domino_spec_waiting_requests") == server.metric("domino_spec_running_requests") == 1
        assert [a.result().choices[0].text for a in asked] == [alone, alone]
        with Gate(server.engine):
            running = pool.submit(server.complete, "w3", max_tokens=3)
            eventually(lambda: server.runner.num_running == 1)
            with pytest.raises(openai.RateLimitError):  # all choices or none
                server.complete("w3", n=2)
            assert server.runner.num_waiting == 0
        running.result()
        assert server.metric("domino_spec_requests_total", outcome="queue_full") == 3


def test_a_request_that_takes_too_long_is_ended(words, draft):
    with serving(words, draft, slots=1, timeout=0.5) as server:
        gate = Gate(server.engine)
        with gate, pytest.raises(openai.InternalServerError, match=r"longer than 0\.5 seconds") as caught:
            server.complete("w3", **LONG)
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        assert caught.value.response.headers["x-should-retry"] == "false"
        eventually(server.is_idle)
        stream = server.complete("w3", stream=True, **LONG)
        next(stream)
        with gate, pytest.raises(openai.APIError, match="longer than"):
            list(stream)
        eventually(server.is_idle)
        eventually(lambda: len([r for r in server.log if r["status"] == 504]) == 2)
        assert server.complete("w3", temperature=0, max_tokens=3).usage.completion_tokens == 3


def raw_request(server, body: dict) -> socket.socket:
    """A request on a connection that the test can cut."""
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    content = json.dumps({"model": MODEL, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_and_its_place_in_the_queue(words, draft, stream):
    with serving(words, draft, slots=1, num_drafts=3) as server:
        alone = server.complete("w5", temperature=0, max_tokens=9).choices[0].text
        gate = Gate(server.engine)
        with gate:
            body = dict(prompt="w3", stream=stream, **LONG)
            running, waiting = raw_request(server, body), raw_request(server, body)
            eventually(lambda: (server.runner.num_running, server.runner.num_waiting) == (1, 1))
            waiting.close()
            eventually(lambda: server.runner.num_waiting == 0)
            running.close()
            eventually(lambda: server.runner.num_running == 0)
        eventually(server.is_idle)
        assert server.engine.stats.committed_tokens < 2 * LONG["max_tokens"]
        eventually(lambda: [r["status"] for r in server.log].count(499) == 2)
        assert server.complete("w5", temperature=0, max_tokens=9).choices[0].text == alone


def test_a_stream_that_is_closed_early_frees_its_slot(words, draft):
    with serving(words, draft, slots=1, num_drafts=3) as server:
        stream = server.complete("w3", stream=True, **LONG)
        with Gate(server.engine):
            next(stream)
            stream.close()
            eventually(lambda: server.runner.num_running == 0)
        eventually(server.is_idle)
        eventually(lambda: server.log and server.log[-1]["status"] == 499)
        assert 0 < server.log[-1]["tokens"] < LONG["max_tokens"]


def poisoned_target():
    """A target whose embedding of w55 is not a number, though its output layer is sound."""
    target, clean = word_target(), word_target()
    with torch.no_grad():
        target.model.get_input_embeddings().weight[55] = torch.nan
    target._lm_head = clean._lm_head
    return target


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_request_whose_output_is_not_finite_fails_alone(pool, temperature):
    target = poisoned_target()
    draft = tiny.tiny_draft(target, draft_vocab_ids=torch.arange(50))
    # Nobody else may write the poison.
    options = dict(max_tokens=40, temperature=temperature, seed=3, logit_bias={"55": -100})
    with serving(target, draft, slots=4, num_drafts=3) as server:
        alone = {p: server.complete(p, **options).choices[0].text for p in ("w3", "w4", "w5")}
        healthy = {p: [pool.submit(server.complete, p, **options) for _ in range(3)] for p in alone}
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="not finite") as caught:
                server.complete("w6 w55 w7", stream=stream, **options)
            assert (caught.value.status_code, caught.value.code) == (500, "output_not_finite")
            assert caught.value.type == "server_error"
            with pytest.raises(openai.InternalServerError):  # the other choices of the request end with it
                server.complete(["w3", "w6 w55 w7"], stream=stream, **options)
        for prompt, answers in healthy.items():
            assert [a.result().choices[0].text for a in answers] == [alone[prompt]] * 3
        eventually(server.is_idle)
        assert server.complete("w3", **options).choices[0].text == alone["w3"]
        assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_of_the_output_layer_that_is_not_finite_is_an_error_and_no_text(stream):
    target = word_target()
    lm_head = target._lm_head
    with serving(target, slots=2) as server:
        target._lm_head = lambda hidden: lm_head(hidden).index_fill(-1, torch.tensor([7]), torch.nan)
        for asked in (server.complete, server.chat):
            with pytest.raises(openai.InternalServerError, match="not finite") as caught:
                asked("w3 w4", stream=stream, logprobs=True if asked == server.chat else 2, max_tokens=5)
            assert (caught.value.status_code, caught.value.code) == (500, "output_not_finite")
        target._lm_head = lm_head
        assert server.complete("w3 w4", max_tokens=5).choices[0].text


def test_metrics_say_whether_the_server_drafts_and_why_not(words, draft):
    with serving(words, draft, slots=1, num_drafts=3, method="domino") as server:
        assert server.metric("domino_spec_drafting") == 1
        assert server.metric("domino_spec_method_info", method="domino", drafting_off="") == 1
        assert server.engine.watch is not None and server.engine.watch.passes == 0, "warming up does not count"
        server.complete("w3", max_tokens=8, temperature=0)
        assert server.engine.watch.passes == server.engine.stats.verify_passes > 0
    with serving(words, slots=1, method="none", drafting_off="no draft was given") as server:
        assert server.metric("domino_spec_drafting") == 0
        assert server.metric("domino_spec_method_info", method="none", drafting_off="no draft was given") == 1
        assert server.engine.watch is None


@pytest.mark.filterwarnings("ignore")
def test_when_the_engine_crashes_everybody_is_told(words, draft, pool):
    with serving(words, draft, slots=1) as server:
        gate = Gate(server.engine)
        with gate:
            asked = [pool.submit(server.complete, "w3", **LONG) for _ in range(2)]
            eventually(lambda: server.runner.num_running + server.runner.num_waiting == 2)
            server.engine.drafter = None  # the next step fails
        for answer in asked:
            with pytest.raises(openai.InternalServerError, match="engine has failed"):
                answer.result()
        health = server.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        with pytest.raises(openai.InternalServerError, match="must be restarted"):
            server.complete("w3")


@pytest.mark.slow
def test_draining_finishes_what_runs_and_refuses_what_comes(words, draft, pool):
    with serving(words, draft, slots=1) as server:
        text = server.complete("w3", **LONG).choices[0].text
        gate = Gate(server.engine)
        stream = server.complete("w3", stream=True, **LONG)
        first = next(stream).choices[0].text
        with gate:
            queued = pool.submit(server.complete, "w3", **LONG)
            eventually(lambda: server.runner.num_waiting == 1)
            server.server.handle_exit(15, None)
            eventually(lambda: server.runner.draining)
            with pytest.raises(openai.InternalServerError, match="server is stopping") as caught:
                server.complete("w3")
            assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) >= 1
            assert server.http.get("/health").json() == {"status": "draining"}
        assert first + "".join(c.choices[0].text for c in stream) == text
        assert queued.result().choices[0].text == text
        eventually(lambda: server.server.should_exit)


def test_who_is_not_done_when_draining_ends_is_told_so(words, draft):
    with serving(words, draft, slots=1, drain_seconds=0.2) as server:
        stream = server.complete("w3", stream=True, **LONG)
        with Gate(server.engine):
            next(stream)
            server.server.handle_exit(15, None)
            with pytest.raises(openai.APIError, match="server is stopping"):
                list(stream)


def test_an_api_key_is_asked_for_everywhere_but_health(words):
    with serving(words, slots=1, api_key="sesame-é") as server:
        wrong = server.new_client(openai.OpenAI, "wrong")
        for ask in (
            wrong.models.list,
            partial(wrong.completions.create, model=MODEL, prompt="w3"),
            partial(wrong.completions.create, model=MODEL, prompt="w3", stream=True),
        ):
            with pytest.raises(openai.AuthenticationError) as caught:
                ask()
            assert caught.value.code == "invalid_api_key"
        assert server.http.get("/metrics").status_code == server.http.get("/v1/models").status_code == 401
        assert server.http.get("/health").status_code == 200
        for scheme in ("Bearer", "bearer"):
            headers = {"Authorization": f"{scheme} sesame-é".encode()}
            assert server.http.get("/v1/models", headers=headers).status_code == 200
        wrong.close()


def test_web_pages_may_ask_only_where_they_are_named(words):
    asking = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with serving(words, slots=1) as server:
        assert "access-control-allow-origin" not in server.http.get("/v1/models", headers=asking).headers
    with serving(words, slots=1, cors_origins=("https://page.example",), api_key="k") as server:
        allowed = server.http.options("/v1/completions", headers=asking)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = server.http.options("/v1/completions", headers={**asking, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = server.http.get("/v1/models", headers=asking)
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


def test_the_log_has_a_line_per_request_and_no_prompt(words, draft):
    with serving(words, draft, slots=2) as server:
        answer = server.http.post(
            "/v1/completions",
            json=dict(model=MODEL, prompt="w31 w32", temperature=0, max_tokens=8),
            headers={"X-Request-Id": "mine-1"},
        )
        assert answer.headers["x-request-id"] == "mine-1"
        odd = server.http.get("/v1/models", headers={"X-Request-Id": 'a" b\\'})
        assert odd.headers["x-request-id"].startswith("req-")
        server.http.get("/health")
        server.http.get("/v1/secret-path")
        eventually(lambda: len(server.log) == 3)
        first, second, third = server.log
        assert (first["id"], first["route"], first["status"]) == ("mine-1", "/v1/completions", 200)
        assert (first["prompt_tokens"], first["tokens"], first["finish"]) == (2, 8, "length")
        assert first["tau"] >= 1 and first["seconds"] > 0 and first["queue_seconds"] >= 0 and not first["stream"]
        assert second["route"] == "/v1/models" and (third["route"], third["status"]) == ("other", 404)
        assert "w31" not in json.dumps(server.log) and "secret" not in json.dumps(server.log)


def test_metrics_count_what_was_done(words, draft):
    with serving(words, draft, slots=2, num_drafts=3) as server:
        usage = [server.complete("w3 w4 w5", temperature=0, max_tokens=20).usage for _ in range(2)]
        list(server.complete("w3 w4 w5", temperature=0, max_tokens=20, stream=True))
        with pytest.raises(openai.BadRequestError):
            server.complete("")
        metric = partial(server.metric)
        assert metric("domino_spec_generated_tokens_total") == 60
        assert metric("domino_spec_prompt_tokens_total") == 9
        assert metric("domino_spec_requests_total", route="/v1/completions", outcome="ok") == 3
        assert metric("domino_spec_requests_total", route="/v1/completions", outcome="refused") == 1
        for name in ("queue_seconds", "time_to_first_token_seconds"):
            assert metric(f"domino_spec_{name}_count") == 3
        assert metric("domino_spec_inter_token_seconds_count") < 60
        counts = {name: usage[0].model_extra[f"num_{name}"] for name in ("verify_passes", "drafts", "accepted_drafts")}
        for name, count in counts.items():
            assert metric(f"domino_spec_{name}_total") == 3 * count
        assert metric("domino_spec_drafted_share") == 1
        assert metric("domino_spec_acceptance_length") == pytest.approx(usage[0].model_extra["acceptance_length"])


def resident_bytes() -> int:
    """Memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_a_thousand_requests_of_which_a_fifth_leaves(words, draft):
    """No wrong answer, no slot lost, no memory that grows."""
    rng = random.Random(4)
    kinds = [
        dict(
            prompt=[rng.randrange(57) for _ in range(rng.randint(1, 30))],
            max_tokens=rng.randint(1, 40),
            temperature=rng.choice([0, 0.8]),
            seed=rng.randrange(1000),
            n=rng.choice([1, 1, 1, 2]),
        )
        for _ in range(50)
    ]
    with serving(words, draft, slots=6, max_queue=80, capacity=80, prefix_bytes=2**20) as server:
        right = [[c.text for c in server.complete(**kind).choices] for kind in kinds]

        async def one(client, limit: asyncio.Semaphore) -> str:
            async with limit:
                which, leaves, stream = rng.randrange(50), rng.random() < 0.2, rng.random() < 0.5
                patience = rng.random() * 0.3
                create = client.completions.create(model=MODEL, stream=stream, **kinds[which])
                if leaves and not stream:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(create, patience)
                    return "left"
                answer = await create
                if not stream:
                    assert [c.text for c in answer.choices] == right[which]
                    return "done"
                texts = [""] * kinds[which]["n"]
                wanted = rng.randint(0, 5) if leaves else 10**6
                async for chunk in answer:
                    for choice in chunk.choices:
                        texts[choice.index] += choice.text
                    wanted -= 1
                    if wanted < 0:
                        await answer.close()
                        return "left"
                if not leaves:
                    assert texts == right[which]
                return "done"

        async def crowd(count: int) -> list[str]:
            limit = asyncio.Semaphore(32)
            async with server.new_client(openai.AsyncOpenAI) as client:
                return await asyncio.gather(*(one(client, limit) for _ in range(count)))

        asyncio.run(crowd(200))
        eventually(server.is_idle)
        before = resident_bytes()
        ended = asyncio.run(crowd(800))
        eventually(server.is_idle)
        assert ended.count("left") > 80 and ended.count("done") > 500
        assert not (server.engine._running or server.engine._waiting or server.engine._reading)
        assert not (server.runner._running or server.runner._queue or server.runner._cancelled)
        assert 0 < server.engine.prefixes.num_bytes <= 2**20
        assert resident_bytes() - before < 64 * 2**20
        assert server.metric("domino_spec_requests_total", outcome="failed") == 0
        for kind, texts in zip(kinds[:5], right[:5], strict=True):
            assert [c.text for c in server.complete(**kind).choices] == texts

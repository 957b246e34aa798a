"""`bench --server` against servers that do what the test wants, and against this package's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from domino_spec.bench.rows import read_measured
from domino_spec.bench.server.run import run_server_bench
from domino_spec.bench.suites import load_suite
from domino_spec.settings import UserError
from tests.bench.conftest import read_raw
from tests.cli_fixtures import fail, run, write_jsonl
from tests.clients.fake import Fake, error, faking, free_address, prompt_of

CONVERSATIONS = {"a": ["w3 w4 w5", "w6 w7"], "b": ["w8 w9"], "c": ["w10 w11 w12 w13"]}


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("suites") / "talk.jsonl"
    return write_jsonl(path, [{"id": name, "turns": turns} for name, turns in CONVERSATIONS.items()])


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr("domino_spec.bench.server.run.write_plots", lambda report, out: [])


@pytest.fixture
def pair():
    """Two servers, each of which notices when the other one is asked at the same time."""
    none, domino = Fake(), Fake()
    none.seen_idle, domino.seen_idle = (lambda: domino.in_flight == 0), (lambda: none.in_flight == 0)
    with faking(none, domino):
        yield none, domino


def measure(pair: tuple[Fake, Fake], suite: Path, out: Path, **changes: Any) -> dict[str, Any]:
    servers = [f"{name}={fake.address}" for name, fake in zip(("none", "domino"), pair, strict=True)]
    options: dict[str, Any] = dict(concurrency=[1, 2], max_new_tokens=16, say=lambda line: None)
    return run_server_bench(**{**options, "servers": servers, "suites": [str(suite)], "out": out, **changes})


def requests_of(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_raw(out) if row["kind"] == "request"]


def windows_of(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_raw(out) if row["kind"] == "window"]


@pytest.fixture(scope="module")
def finished(suite, tmp_path_factory) -> tuple[Path, Fake, Fake, dict[str, Any]]:
    """A whole bench of two servers with everything a report can show, and what the servers saw."""
    none, domino = Fake(owner="vllm"), Fake(owner="sglang")
    none.seen_idle, domino.seen_idle = (lambda: domino.in_flight == 0), (lambda: none.in_flight == 0)
    domino.tokens_per_chunk = 2
    details = {"spec_verify_ct": 4, "spec_num_correct_drafts": 6}
    domino.last = [{"choices": [], "sglext": {"spec_tokens_details": details}}]
    none.info = domino.info = {"version": "9.9"}
    out = tmp_path_factory.mktemp("finished") / "bench"
    with faking(none, domino):
        report = measure((none, domino), suite, out, repeats=2, temperatures=[0.0, 1.0], concurrency=[4, 1])
    return out, none, domino, report


def test_every_window_is_measured_once_and_servers_take_turns(finished):
    out, none, domino, report = finished
    keys = [(w["repeat"], w["temperature"], w["concurrency"], w["server"]) for w in windows_of(out)]
    assert len(keys) == len(set(keys)) == report["settings"]["planned_windows"] == 16
    pairs = [[key[-1] for key in keys[i : i + 2]] for i in range(0, 16, 2)]
    assert pairs == [["none", "domino"], ["domino", "none"]] * 4
    assert all(len({key[:-1] for key in keys[i : i + 2]}) == 1 for i in range(0, 16, 2))
    assert not none.never_alone and not domino.never_alone


def test_a_window_asks_the_suite_often_enough_and_warm_ups_are_not_counted(finished):
    out, none, _, _ = finished
    asked = Counter((r["concurrency"], r["id"]) for r in requests_of(out) if r["server"] == "none")
    names = ["a", "a#2", "b", "c"]  # 4 turns: one round of 4 for 1 in flight, two for 4
    assert asked == {(1, name): 4 for name in names} | {(4, name): 8 for name in names}
    assert len(none.bodies) == 1 + 1 + 4 * (4 + 1) + 4 * (8 + 4), "a probe, an earlier answer, windows with warm-ups"
    assert Counter(body["max_tokens"] for body in none.bodies) == {4: 1, 16: 1 + 4 * 12, 8: 4 * 5}


def test_requests_are_what_openai_takes_and_seeds_differ_where_texts_may(finished):
    _, none, domino, _ = finished
    for body in none.bodies:
        assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["model"] == "m"
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert ("seed" in body) == ("top_p" in body) == (body["temperature"] > 0)
    seeds = [b["seed"] for b in none.bodies if b["temperature"] == 1 and b["max_tokens"] == 16]
    assert Counter(seeds) == {0: 8, 1: 8, 2: 4, 3: 4}, "of two repeats, and of two rounds with 4 in flight"
    assert all("return_spec_tokens_details" not in body for body in none.bodies)
    assert all(body["return_spec_tokens_details"] for body in domino.bodies)


def test_later_turns_follow_the_baselines_own_answers(finished):
    out, none, domino, _ = finished
    expected = [
        {"role": "user", "content": "w3 w4 w5"},
        {"role": "assistant", "content": "w3 w4 w5 "},
        {"role": "user", "content": "w6 w7"},
    ]
    for fake in (none, domino):
        later = [body["messages"] for body in fake.bodies if prompt_of(body) == "w6 w7"]
        assert later and all(messages == expected for messages in later)
    assert len((out / "earlier_answers.jsonl").read_text().splitlines()) == 1


def test_every_figure_of_the_report_can_be_computed_from_raw_jsonl(finished):
    out, _, _, report = finished
    assert json.loads((out / "report.json").read_text()) == report
    assert len(report["figures"]) == 8
    for entry in report["figures"]:
        place = {name: entry[name] for name in ("server", "suite", "temperature", "concurrency")}
        own = [r for r in requests_of(out) if all(r[name] == value for name, value in place.items())]
        windows = [w for w in windows_of(out) if all(w[name] == value for name, value in place.items())]
        seconds, tokens = sum(w["seconds"] for w in windows), sum(r["completion_tokens"] for r in own)
        assert entry["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert entry["tokens"] == tokens and entry["requests"] == len(own) == sum(w["requests"] for w in windows)
        firsts = sorted(r["chunks"][0] for r in own)
        assert entry["first_token"]["p50"] == pytest.approx((firsts[len(own) // 2 - 1] + firsts[len(own) // 2]) / 2)
        low, high = entry["tokens_per_second_interval"]
        assert low <= entry["tokens_per_second"] <= high
        other = next(
            e for e in report["figures"] if e["server"] == "none" and all(e[n] == place[n] for n in list(place)[1:])
        )
        if entry["server"] == "domino":
            ratio = entry["tokens_per_second"] / other["tokens_per_second"]
            assert entry["speedup"] == pytest.approx(ratio) and entry["tokens_per_chunk"] == 2
            assert entry["acceptance_length"] == 2.5 and entry["acceptance_source"] == "the answers themselves"
        else:
            assert entry["speedup"] is None and entry["acceptance_source"] == "not reported"
    # Requests lie inside their window, and no more of them are in flight at any time than were asked for.
    for window in windows_of(out):
        own = [r for r in requests_of(out) if all(r[n] == window[n] for n in ("server", "concurrency", "temperature"))]
        own = [r for r in own if r["repeat"] == window["repeat"]]
        assert max(r["sent"] + r["seconds"] for r in own) == pytest.approx(window["seconds"], abs=2e-6)
        marks = sorted(
            [(r["sent"] + r["seconds"], -1) for r in own] + [(r["started"] + 3e-6, 1) for r in own], key=lambda m: m[0]
        )
        level = [sum(step for _, step in marks[: i + 1]) for i in range(len(marks))]
        assert max(level) <= window["concurrency"]


def test_the_report_shows_it_to_people(finished):
    out, _, _, report = finished
    text = (out / "report.md").read_text(encoding="utf-8")
    for part in ("| suite | server | 1 | 4 |", "laid out like Table 3", "vllm 9.9", "the answers themselves", "p50"):
        assert part in text
    for name in ("throughput", "speedup", "latency"):
        assert (out / f"{name}.png").is_file() and f"![{name}]({name}.png)" in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and "Serving benchmark report: none, domino" in page
    assert report["text_equality"] and all(e["equal"] == e["compared"] > 0 for e in report["text_equality"])
    assert "http" not in json.dumps(report["errors"]) and report["errors"] == []


def test_a_finished_bench_asks_nothing_more_and_another_one_is_refused(pair, suite, tmp_path, no_plots):
    report = measure(pair, suite, tmp_path)
    before, asked = (tmp_path / "raw.jsonl").read_bytes(), len(pair[0].bodies)
    assert measure(pair, suite, tmp_path) == report
    assert (tmp_path / "raw.jsonl").read_bytes() == before and len(pair[0].bodies) == asked + 1, "the probe alone"
    with pytest.raises(UserError, match="holds measurements with max_new_tokens 16, not 17"):
        measure(pair, suite, tmp_path, max_new_tokens=17)


def test_so_many_requests_are_in_flight(pair, suite, tmp_path, no_plots):
    none, domino = pair

    def wait_for_six(body: dict[str, Any]) -> None:
        for fake in pair:
            fake.together = 6 if body["max_tokens"] == 16 else 1

    none.refuse = domino.refuse = wait_for_six
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": "x", "turns": ["w1"]}])
    measure(pair, one, tmp_path / "out", concurrency=[6])
    assert none.most_in_flight == domino.most_in_flight == 6


# Interruptions


def count_to(number: int, then: BaseException):
    """Something to call that raises at last."""
    left = [number]

    def call(*arguments: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise then

    return call


def test_ctrl_c_between_windows_and_in_one_loses_nothing(pair, suite, tmp_path, no_plots, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        measure(pair, suite, tmp_path, say=count_to(3, KeyboardInterrupt()))  # an earlier answer, two windows
    assert len(windows_of(tmp_path)) == 2
    from domino_spec.bench.server import run as measuring

    append, interrupt = measuring.append_request, count_to(3, KeyboardInterrupt())
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "append_request", lambda out, row: (append(out, row), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            measure(pair, suite, tmp_path)
    assert len(windows_of(tmp_path)) == 2 and len(requests_of(tmp_path)) == 8 + 3
    with open(tmp_path / "raw.jsonl", "a") as raw:
        raw.write('{"kind": "request", "server": "no')  # a writer was killed
    report = measure(pair, suite, tmp_path)
    assert report["measured_windows"] == report["settings"]["planned_windows"] == 4
    assert len(requests_of(tmp_path)) == 3 + 4 * 4, "the interrupted window's rows are kept"
    begun = {(r["concurrency"], r["server"]): r["attempt"] for r in requests_of(tmp_path)}
    assert sorted(begun.values()) == [0, 0, 0, 1]
    assert all(len(rows) == 4 for rows in read_measured(tmp_path).requests.values())
    assert sum(entry["requests"] for entry in report["figures"]) == 16, "and not counted"


def test_a_server_that_goes_away_ends_the_bench_in_one_line_and_it_goes_on_later(pair, suite, tmp_path, no_plots):
    _, domino = pair
    asked = Counter()

    def refuse(body):
        asked["all"] += 1
        return error(401, "the key has changed") if asked["all"] > 4 else None

    domino.refuse = refuse
    with pytest.raises(UserError, match=r"server domino at .* wants another API key .* the same command goes on"):
        measure(pair, suite, tmp_path)
    kept = requests_of(tmp_path)
    assert [w["server"] for w in windows_of(tmp_path)] == ["none"] and len(kept) > 4
    domino.refuse = lambda body: None
    assert measure(pair, suite, tmp_path)["measured_windows"] == 4
    assert requests_of(tmp_path)[: len(kept)] == kept


def test_a_window_without_any_answer_ends_the_bench(pair, suite, tmp_path, no_plots):
    pair[1].refuse = lambda body: error(500, "broken") if body["max_tokens"] == 16 else None
    with pytest.raises(UserError, match=r"server domino at .* cannot be measured: HTTP 500 .*\(broken\)"):
        measure(pair, suite, tmp_path)


# What may go wrong without ending it


def test_single_failures_are_counted_and_reported(pair, suite, tmp_path, no_plots):
    pair[1].refuse = lambda body: error(500, "oops") if prompt_of(body) == "w8 w9" else None
    report = measure(pair, suite, tmp_path, concurrency=[1])
    entry = next(e for e in report["figures"] if e["server"] == "domino")
    assert (entry["requests"], entry["errors"], entry["tokens"]) == (4, 1, 3 + 2 + 4)
    (failure,) = report["errors"]
    assert (failure["server"], failure["times"]) == ("domino", 1) and "oops" in failure["error"]
    text = (tmp_path / "report.md").read_text()
    assert "**1 requests have no answer**" in text and "HTTP 500 Internal Server Error (oops)" in text


def test_a_server_without_room_is_asked_again(pair, suite, tmp_path, no_plots):
    turned_away: Counter[str] = Counter()

    def full(body):
        turned_away[prompt_of(body)] += 1
        return error(429, "full", **{"retry-after": "0"}) if turned_away[prompt_of(body)] % 3 else None

    pair[1].refuse = full
    report = measure(pair, suite, tmp_path, concurrency=[2])
    entry = next(e for e in report["figures"] if e["server"] == "domino")
    assert entry["errors"] == 0 and entry["rejected"] >= 2 and entry["requests"] == 4
    assert sum(r["rejected"] for r in requests_of(tmp_path)) == entry["rejected"]
    assert all(r["started"] < r["sent"] for r in requests_of(tmp_path) if r["rejected"])


def test_texts_that_differ_are_shown_and_do_not_fail(pair, suite, tmp_path, no_plots):
    pair[1].answer = lambda body: ["w8 ", "`w|0`\n"] if prompt_of(body) == "w8 w9" else prompt_of(body).split(" ")
    pair[0].answer = lambda body: prompt_of(body).split(" ") if prompt_of(body) != "w8 w9" else ["w8 ", "w9"]
    report = measure(pair, suite, tmp_path, concurrency=[1])
    (equality,) = report["text_equality"]
    assert (equality["server"], equality["compared"], equality["equal"]) == ("domino", 4, 3)
    (difference,) = report["differences"]
    assert (difference["id"], difference["position"]) == ("b", 3)
    assert (difference["wrote"], difference["reference_wrote"]) == ("`w|0`\n", "w9")
    assert "| `'w\\|0'↵` | `w9` |" in (tmp_path / "report.md").read_text()


def test_a_server_that_refuses_template_settings_is_asked_without(pair, suite, tmp_path, no_plots):
    pair[0].refuse = lambda body: error(400, "unknown field") if "chat_template_kwargs" in body else None
    report = measure(pair, suite, tmp_path, concurrency=[1])
    assert report["settings"]["servers"]["none"]["takes_template_settings"] is False
    assert "**none cannot be told whether to think**" in (tmp_path / "report.md").read_text()
    assert all("chat_template_kwargs" not in body for body in pair[0].bodies[1:])


def test_acceptance_is_what_the_counters_grew_in_the_window_without_the_warm_up(pair, suite, tmp_path, no_plots):
    domino, drafts = pair[1], "vllm:spec_decode_num_drafts_total"
    accepted = "vllm:spec_decode_num_accepted_tokens_total"

    def metrics():
        long = sum(body["max_tokens"] == 16 for body in domino.bodies)
        return f"{drafts} {2 * len(domino.bodies)}\n{accepted} {7 * long + 100 * (len(domino.bodies) - long)}\n"

    domino.metrics = metrics
    report = measure(pair, suite, tmp_path, concurrency=[1])
    entry = next(e for e in report["figures"] if e["server"] == "domino")
    assert entry["acceptance_length"] == 1 + 7 / 2 and entry["acceptance_source"] == "counters of /metrics"
    (window,) = (w for w in windows_of(tmp_path) if w["server"] == "domino")
    assert {r["name"]: r["after"] - r["before"] for r in window["readings"]} == {drafts: 8, accepted: 28}


def test_one_server_alone_has_a_report_without_speed_ups(suite, tmp_path):
    alone = Fake()
    with faking(alone):
        report = run_server_bench(
            servers=[alone.address],
            suites=[str(suite)],
            out=tmp_path,
            concurrency=[1],
            limit=2,
            say=lambda line: None,
        )
    assert report["baseline"] == alone.address.split("/")[2] and report["figures"][0]["speedup"] is None
    text = (tmp_path / "report.md").read_text()
    assert "Table 2" in text and "Table 3" not in text and not (tmp_path / "speedup.png").exists()


# The command


def bench(out: Path, suite: object, *options: object):
    return fail("bench", "--suite", suite, "--out", out, "--concurrency", 1, *options)


def test_servers_that_cannot_be_measured_are_named_before_anything_is(suite, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    fake, out = Fake(models=("one", "two")), tmp_path / "out"
    with faking(fake):
        at = ("--server", f"mine={fake.address}")
        assert "server gone at" in bench(out, suite, "--server", f"gone={free_address()}")
        assert "cannot be reached (no connection (Connection refused)): is it running" in bench(
            out, suite, "--server", free_address()
        )
        assert "has 2 models (one, two): choose one by --served-model" in bench(out, suite, *at)
        assert "has no model 'three'; it has one, two" in bench(out, suite, *at, "--served-model", "three")
        fake.models, fake.api_key = ("one",), "sesame"
        line = bench(out, suite, *at, "--api-key", "wrong")
        assert "wants another API key (HTTP 401" in line and "give --api-key or OPENAI_API_KEY" in line
        assert "no header can carry" in bench(out, suite, *at, "--api-key", "ö\n")
        fake.api_key = None
        assert "does not answer like an OpenAI-compatible server" in bench(
            out, suite, "--server", fake.address.replace("/v1", "/elsewhere")
        )
        fake.with_usage = False
        assert "an answer without usage" in bench(out, suite, *at)
        fake.refuse = lambda body: error(200, "no stream")
        assert "an answer in one piece (application/json)" in bench(out, suite, *at)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft", "mine"], "--draft is of methods that this process runs: leave it out with --server"),
        (["--methods", "none"], "--methods is of methods"),
        (["--target", "smollm2-135m"], "--target is of methods"),
        (["--threads", 1], "--threads is of methods"),
        (["--compare", "a", "b"], "--compare is of methods"),
        (["--concurrency", "0,1"], "needs concurrency of at least 1, got 0"),
        (["--concurrency", "many"], "--concurrency must be numbers"),
        (["--concurrency", ","], "needs concurrency of at least 1"),
        (["--temperatures", "-1"], "temperatures must be 0 or more"),
        (["--max-new-tokens", 0], "max_new_tokens of at least 1"),
        (["--request-timeout", 0], "--request-timeout must be seconds above 0"),
        (["--limit", 0], "limit must be at least 1"),
        (["--server", "h:1"], "is not the address of a server"),
        (["--server", "http://h:1"], "two servers are called h:1"),
    ],
)
def test_options_that_cannot_be_used_are_refused_in_one_line(options, message, suite, tmp_path):
    line = fail("bench", "--server", "http://h:1/v1", "--suite", suite, "--out", tmp_path / "out", *options)
    assert message in line and not (tmp_path / "out").exists()


def test_options_of_servers_need_one():
    assert "--concurrency goes with --server URL" in fail("bench", "--suite", "x", "--out", "o", "--concurrency", 1)
    assert "no suite given" in fail("bench", "--server", "http://h:1")
    assert "--out DIR" in fail("bench", "--server", "http://h:1", "--suite", "x")


def test_the_command_measures_with_a_key_that_is_not_written_down(suite, tmp_path, monkeypatch):
    fake = Fake()
    fake.api_key = "sesame"
    options = ["--suite", str(suite), "--limit", 1, "--concurrency", "1", "--max-new-tokens", 4, "--json"]
    with faking(fake):
        monkeypatch.setenv("OPENAI_API_KEY", "sesame")
        result = run("bench", "--server", fake.address, "--out", tmp_path / "env", *options)
        assert result.exit_code == 0 and json.loads(result.stdout)["measured_windows"] == 1
        monkeypatch.delenv("OPENAI_API_KEY")
        command = ["bench", "--server", fake.address, "--api-key", "sesame", "--out", str(tmp_path / "key")]
        monkeypatch.setattr("sys.argv", ["domino-spec", *command])
        assert run(*command, *options).exit_code == 0
    for path in tmp_path.rglob("*.*"):
        assert b"sesame" not in path.read_bytes()
    (session,) = json.loads((tmp_path / "key" / "settings.json").read_text())["sessions"]
    assert "--api-key ..." in session["command"]


# Our own server


@pytest.mark.slow
def test_our_own_server_with_and_without_a_draft(suite, tmp_path, no_plots):
    pytest.importorskip("prometheus_client")
    pytest.importorskip("openai")
    from tests import tiny
    from tests.serve.running import serving, word_target

    target = word_target()
    draft = tiny.tiny_draft(target)
    with (
        serving(target, slots=2, capacity=128) as none,
        serving(target, draft, slots=2, capacity=128, num_drafts=3, max_queue=0) as domino,
    ):
        report = run_server_bench(
            servers=[f"none={none.address}", f"domino={domino.address}/v1"],
            suites=[str(suite)],
            out=tmp_path,
            concurrency=[1, 2],
            max_new_tokens=12,
            say=lambda line: None,
        )
        figures = {(e["server"], e["concurrency"]): e for e in report["figures"]}
        assert len(load_suite(suite)) == 3 and all(e["requests"] == 4 and e["errors"] == 0 for e in figures.values())
        assert all(e["equal"] == e["compared"] for e in report["text_equality"]), "fp32 on one machine"
        assert figures["none", 1]["acceptance_source"] == "nothing drafted"
        for concurrency in (1, 2):
            own = [r for r in requests_of(tmp_path) if (r["server"], r["concurrency"]) == ("domino", concurrency)]
            told = 1 + sum(r["accepted_drafts"] for r in own) / sum(r["verify_passes"] for r in own)
            entry = figures["domino", concurrency]
            assert entry["acceptance_source"] == "counters of /metrics" and 1 <= entry["acceptance_length"] <= 4
            assert entry["acceptance_length"] == pytest.approx(told), "the counters and the answers say the same"
            assert entry["tokens"] == sum(len(r["text"].split()) for r in own)
        assert none.is_idle() and domino.is_idle()

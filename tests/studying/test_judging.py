"""A judge is asked in both orders, a tie is half a win, and an endpoint that goes away costs nothing that was said."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from made_up import one_test

import pkt
from pkt import PktError
from pkt.models import load_tokenizer
from pkt.seeds import load_seeds
from pkt.studying import Layout, Store, judging, open_study, study, work
from pkt.studying.judging import Judge, instructions, longest_wins, score, win_rates

ASSETS = Path(pkt.__file__).parent / "demo" / "assets"
Reply = Callable[[str, str, str], tuple[int, Any]]


class Endpoint:
    """An OpenAI-compatible endpoint that replies as it is told to."""

    def __init__(self) -> None:
        self.reply: Reply = lambda question, a, b: (200, said("C"))
        self.asked: list[tuple[str, str, str]] = []
        self.headers: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                assert body["temperature"] == 0
                text = body["messages"][0]["content"]
                question = text.split("Instruction:\n")[1].split("\n\nAnswer A:")[0]
                a, b = text.split("Answer A:\n")[1].split("\n\nReply with")[0].split("\n\nAnswer B:\n")
                outer.asked.append((question, a, b))
                outer.headers.append(self.headers)
                status, value = outer.reply(question, a, b)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def said(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}]}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(judging, "_PAUSE", 0.0)
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("A", 1.0), (" B.", 0.0), ("**A**", 1.0), ("Answer B", 0.0), ("answer: A", 1.0), ("C", 0.5), ("Both are bad", 0.5),
     ("", 0.5), ("As an AI model", 0.5), ("a", 0.5)],
)  # fmt: skip
def test_a_reply_is_read_by_its_letter(reply: str, expected: float) -> None:
    assert score(reply) == expected


def test_the_longest_wins_and_ties_are_half() -> None:
    assert longest_wins(["long one", "x", "yes", ""], ["short", "longer", "no!", ""]) == [1.0, 0.0, 0.5, 0.5]


def test_both_orders_are_asked_and_a_judge_that_likes_a_place_says_nothing(endpoint: Endpoint, tmp_path: Path) -> None:
    judge = Judge("j", endpoint.url)
    endpoint.reply = lambda question, a, b: (200, said("A"))
    assert win_rates(judge, ["q"] * 3, ["x"] * 3, ["y"] * 3, tmp_path / "place.jsonl") == [0.5] * 3
    assert sorted(endpoint.asked) == sorted([("q", "x", "y"), ("q", "y", "x")] * 3)
    endpoint.reply = lambda question, a, b: (200, said("A" if "good" in a else "B" if "good" in b else "C"))
    answers, references = ["good 1", "bad", "bad"], ["bad", "good 2", "worse"]
    assert win_rates(judge, ["q"] * 3, answers, references, tmp_path / "good.jsonl") == [1.0, 0.0, 0.5]


def test_an_endpoint_that_goes_away_keeps_what_it_said(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one line that says how far it came; the next call asks only what is left, a torn line included."""
    monkeypatch.setenv("MY_KEY", "secret")
    judge = Judge("j", endpoint.url, key="MY_KEY", at_once=1)
    questions, answers, references = ([f"{kind}{i}" for i in range(6)] for kind in ("q", "a", "r"))
    endpoint.reply = lambda q, a, b: (200, said("A" if a.startswith("a") else "B")) if q < "q3" else (503, {})
    with pytest.raises(
        PktError, match=r"does not answer \(HTTP 503 .*\); 3 of 6 items are judged and kept: run"
    ) as caught:
        win_rates(judge, questions, answers, references, tmp_path / "kept.jsonl")
    assert "\n" not in str(caught.value)
    assert "secret" not in (tmp_path / "kept.jsonl").read_text()
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert sum(question == "q3" for question, *_ in endpoint.asked) == 3  # tried again twice
    with (tmp_path / "kept.jsonl").open("a") as file:
        file.write('{"item": 3, "sa')
    endpoint.asked.clear()
    endpoint.reply = lambda q, a, b: (200, said("A" if a.startswith("a") else "B"))
    assert win_rates(judge, questions, answers, references, tmp_path / "kept.jsonl") == [1.0] * 6
    assert {question for question, *_ in endpoint.asked} == {"q3", "q4", "q5"}
    endpoint.asked.clear()
    assert win_rates(judge, questions, answers, references, tmp_path / "kept.jsonl") == [1.0] * 6
    assert not endpoint.asked


@pytest.mark.parametrize(
    ("status", "value", "reason", "tries"),
    [(401, {}, "HTTP 401", 1), (429, {}, "HTTP 429", 3), (200, {"choices": []}, "no choices", 1), (200, [], "no choices", 1)],
)  # fmt: skip
def test_what_else_an_endpoint_may_say(
    endpoint: Endpoint, tmp_path: Path, status: int, value: Any, reason: str, tries: int
) -> None:
    endpoint.reply = lambda question, a, b: (status, value)
    with pytest.raises(PktError, match=reason):
        win_rates(Judge("j", endpoint.url, at_once=1), ["q"], ["a"], ["b"], tmp_path / "kept.jsonl")
    assert len(endpoint.asked) == tries


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_PAUSE", 0.0)
    with pytest.raises(PktError, match=r"http://127.0.0.1:1/v1 does not answer .*0 of 1 items"):
        win_rates(Judge("j", "http://127.0.0.1:1/v1"), ["q"], ["a"], ["b"], tmp_path / "kept.jsonl")


def test_a_model_here_judges_by_its_letters(tmp_path: Path) -> None:
    """Alike answers tie over both orders; what it says is what plain transformers gives the letters."""
    judge = Judge(str(ASSETS / "student"))
    assert win_rates(judge, ["q"], ["same"], ["same"], tmp_path / "same.jsonl") == [0.5]
    replies = json.loads((tmp_path / "same.jsonl").read_text())["said"]
    assert replies[0] == replies[1]
    assert replies[0] in ("A", "B")


def test_instructions_are_what_the_user_said(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One."}]},
        {"prompt": "Count again:", "completion": " two"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(ASSETS / "student")
    seeds = load_seeds(tmp_path / "rows.jsonl", tokenizer)
    assert instructions(seeds, tokenizer) == ["Count.", "Count again:"]


STUDY = one_test(
    'chat: {data: demo:data/test.jsonl, metrics: [win_rate], limit: 3, max_new_tokens: 4, judge: {model: j, endpoint: "URL"}}',
    decides="chat.win_rate",
)


def test_a_study_goes_on_without_training_again(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the judge is away every training is done and its answers kept; then only the judge is asked."""
    (tmp_path / "s.yaml").write_text(STUDY.replace("URL", endpoint.url), encoding="utf-8")
    layout = Layout(open_study(tmp_path / "s.yaml"))
    assert layout.study.tasks["sums"].tests["chat"].metrics == ("win_rate", "longest_wins")
    endpoint.reply = lambda question, a, b: (503, {})
    begun: list[str] = []
    real = work.begin
    monkeypatch.setattr(work, "begin", lambda *given: (begun.append(given[2]), real(*given))[1])
    found = study(tmp_path / "s.yaml", tmp_path / "out")
    assert {failure["error"].split(" (")[0] for failure in found["failures"]} == {
        f"the judge at {endpoint.url} does not answer"
    }
    assert "run the same command again" in found["failures"][0]["error"]
    assert found["tasks"]["sums"]["starts"]["lora"]["trained"] == 0

    def longer(question: str, a: str, b: str) -> tuple[int, Any]:
        return 200, said("C" if len(a) == len(b) else "A" if len(a) > len(b) else "B")

    endpoint.reply = longer
    begun.clear()
    found = study(tmp_path / "s.yaml", tmp_path / "out")
    assert not found["failures"]
    # The first seed's model had not got past the test before its training.
    assert len(begun) == 2
    for start in found["tasks"]["sums"]["starts"].values():
        for run in (*start["after"], start["before"]):
            assert run["chat"]["win_rate"] == run["chat"]["longest_wins"]
    assert {c["family"] for c in found["comparisons"]} == {"deciding", "chat.longest_wins"}
    # Answers are kept item by item, and another judge reads the same.
    store = Store(tmp_path / "out")
    kept = [json.loads(file.read_text()) for file in (store.folder / "answers").rglob("*.json")]
    assert all(len(value["answers"]) == 3 for value in kept)
    begun.clear()
    (tmp_path / "s.yaml").write_text(
        STUDY.replace("URL", endpoint.url).replace("model: j", "model: k"), encoding="utf-8"
    )
    assert not study(tmp_path / "s.yaml", tmp_path / "out")["failures"]
    assert not begun


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (', judge: {model: j, endpoint: "URL"}', "", "s.yaml:4: tasks.sums.tests.chat: win_rate and judge belong together"),
        ("metrics: [win_rate]", "metrics: [nll]", "win_rate and judge belong together"),
        ("URL", "file:///etc/passwd", "must begin with http:// or https://"),
        ("model: j, ", "", "tasks.sums.tests.chat.judge.model is missing"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_be_asked_is_refused(old: str, new: str, told: str, tmp_path: Path) -> None:
    text = STUDY.replace(old, new)
    if "decides: chat.win_rate" in text and "[nll]" in text:
        text = text.replace("decides: chat.win_rate", "decides: chat.nll")
    (tmp_path / "s.yaml").write_text(text.replace("URL", "http://localhost/v1"), encoding="utf-8")
    with pytest.raises(PktError, match=told):
        open_study(tmp_path / "s.yaml")

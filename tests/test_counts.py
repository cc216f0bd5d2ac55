"""What is counted of the daemon's work and of requests to Alyx."""

import threading

import httpx
import pytest

from regd.alyx import AlyxClient
from regd.counts import SLOW_S, Counts, endpoint
from regd.errors import AlyxOdd


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/sessions", "/sessions"),
        ("/sessions/6b0d5a0e-4bd5-4c63-8f4e-0d5c1f2d8d11", "/sessions/{id}"),
        ("/labs/mainenlab/", "/labs/{id}"),
        ("register-file", "/register-file"),
        ("/a/b/c", "/a/{id}"),
    ],
)
def test_a_path_is_counted_by_its_kind(path: str, template: str) -> None:
    assert endpoint(path) == template


def test_a_duration_is_in_the_bucket_that_bounds_it() -> None:
    counts = Counts()
    for took_s in (0.0, SLOW_S[0], SLOW_S[0] * 1.001, SLOW_S[-1], 61.0, 1e6):
        counts.requested("GET", "/sessions", 200, took_s, good=True)
    (took,) = counts.requests().values()
    assert [n for n in enumerate(took.buckets) if n[1]] == [
        (0, 2),
        (1, 1),
        (len(SLOW_S) - 1, 1),
        (len(SLOW_S), 2),
    ]
    assert took.total_s == pytest.approx(sum((SLOW_S[0] * 2.001, 60.0, 61.0, 1e6)))


def test_threads_lose_no_count() -> None:
    counts = Counts()

    def work() -> None:
        for _ in range(2000):
            counts.add(hints=1, hashed_bytes=3)
            counts.requested("GET", "/sessions", None, 0.001, good=False)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counts.hints, counts.hashed_bytes) == (8000, 24000)
    assert counts.requests()["GET", "/sessions", "none"].buckets[0] == 8000


def test_every_attempt_counts_and_a_login_page_is_no_contact() -> None:
    answers = iter(
        [
            httpx.ConnectError("nobody is there"),
            httpx.Response(429, json={"detail": "slower"}),
            httpx.Response(200, text="<html>Welcome to our Wi-Fi</html>"),
        ]
    )

    def alyx(_request: httpx.Request) -> httpx.Response:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    transport = httpx.MockTransport(alyx)
    with AlyxClient(
        "https://alyx.test", token="0" * 40, transport=transport, sleep=lambda _: None
    ) as client:
        with pytest.raises(AlyxOdd):
            client.post("/sessions", {})
        counts = client.counts
    assert {status for _, _, status in counts.requests()} == {"none", "429", "200"}
    assert all(sum(took.buckets) == 1 for took in counts.requests().values())
    assert counts.answered_at is None


def test_contact_and_latency_of_each_kind() -> None:
    time_s = [0.0]

    def alyx(request: httpx.Request) -> httpx.Response:
        time_s[0] += 0.3 if request.method == "POST" else 0.02
        return httpx.Response(201 if request.method == "POST" else 200, json={"id": "x"})

    client = AlyxClient(
        "https://alyx.test",
        token="0" * 40,
        transport=httpx.MockTransport(alyx),
        clock=lambda: time_s[0],
    )
    client.counts = Counts(lambda: 1000.0)
    with client:
        client.post("/sessions", {})
        client.get("/subjects/one")
        client.get("/subjects/another")
    requests = client.counts.requests()
    assert client.counts.answered_at == 1000.0
    assert [*requests] == [("GET", "/subjects/{id}", "200"), ("POST", "/sessions", "201")]
    assert [sum(took.buckets) for took in requests.values()] == [2, 1]
    assert [took.total_s for took in requests.values()] == pytest.approx([0.04, 0.3])

"""Serving under stress through a real Triton: metrics, overload, models that die or are reloaded."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tritonclient.grpc
import yaml
from repositories import GPT, TRANSFORMER, arrays, ask, ask_later, golden_cases, grpc, http, post, tensor, write_model
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend.serving.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parents[1]
ADMIN = {"admin-key": "test"}
REQUESTS = int(os.environ.get("LIGHTSEQ_FAULT_REQUESTS", 400))  # `make test-faults` asks for 10,000
CONNECTIONS = 64
CASES = golden_cases("t01_base")


def write_crowded(root: Path) -> None:
    """The models that a Crowd asks."""
    write_model(root, "translate", golden("t01_base.pb"), TRANSFORMER, parameters={"queue": 24})
    write_model(root, "generate", golden("g01_base.pb"), GPT)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("repository")
    write_crowded(root)
    write_model(root, "reloaded", golden("t01_base.pb"), TRANSFORMER, parameters={"slots": 8, "max_beam_size": 8})
    models = ["translate", "generate", "reloaded"]
    with EmbeddedServer(root, device="cpu", models=models, admin_key=ADMIN["admin-key"]) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: EmbeddedServer) -> Iterator[Any]:
    with grpc(served.grpc) as connected:
        yield connected


def expected(case: dict[str, Any]) -> list[Any]:
    return [row["ids"] for row in case["rows"]]


# Metrics ----------------------------------------------------------------------------------------------------------


def metrics_page(server: EmbeddedServer) -> str:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as page:
        return page.read().decode()


def metric(server: EmbeddedServer, name: str, model: str) -> float:
    (value,) = re.findall(rf'^{name}\{{[^}}]*model="{model}"[^}}]*\}} (\S+)$', metrics_page(server), re.MULTILINE)
    return float(value)


def expressions() -> list[str]:
    """Of the dashboard, the alerts and the autoscaler: all that name our metrics."""
    panels = json.loads((ROOT / "docker/monitoring/grafana/dashboard.json").read_text())["panels"]
    (group,) = yaml.safe_load((ROOT / "docker/monitoring/alerts.yml").read_text())["groups"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    return shown + [rule["expr"] for rule in group["rules"]]


def test_dashboard_and_alerts_ask_for_metrics_that_there_are(served: EmbeddedServer, client: Any) -> None:
    shown = set(re.findall(r"^(lightseq_\w+)\{", metrics_page(served), re.MULTILINE))
    asked = {name for expression in expressions() for name in re.findall(r"lightseq_\w+", expression)}
    assert len(asked) > 15
    assert asked - shown == set()
    unseen = {name for name in shown if not name.endswith(("_bucket", "_sum", "_count"))} - asked
    assert unseen == set()  # what is exported has a panel


@pytest.mark.parametrize("name", ["lightseq_queue_seconds", "lightseq_first_token_seconds", "lightseq_token_seconds"])
def test_histograms_count_sequences(served: EmbeddedServer, client: Any, name: str) -> None:
    before = metric(served, f"{name}_count", "generate")
    ask(client, "generate", "token_ids", [[5, 6], [7, 8]], max_new_tokens=4, sampling_method="topk", top_k=3, seed=1)
    deadline = time.monotonic() + 10
    while metric(served, f"{name}_count", "generate") < before + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(served, f"{name}_count", "generate") == before + 2
    assert f"# TYPE {name} histogram" in metrics_page(served)
    assert metric(served, f"{name}_sum", "generate") > 0


# Overload ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", ["high", "normal", "low"])
def test_priority_of_a_request_is_taken_and_changes_no_answer(client: Any, priority: str) -> None:
    outputs = ask(client, "translate", "source_ids", CASES[0]["source_ids"], queue_priority=priority)
    assert outputs["target_ids"].tolist() == expected(CASES[0])


def test_unknown_priority_is_a_bad_request(served: EmbeddedServer) -> None:
    status, answer = post(
        f"http://{served.http}/v2/models/translate/generate", {"source_ids": [79], "queue_priority": "urgent"}
    )
    assert (status, answer) == (400, {"error": "queue_priority is 'urgent'; priorities are high, normal, low"})


ALLOWED = {
    "good": {"answered", "StatusCode.UNAVAILABLE"},
    "text": {"answered", "StatusCode.UNAVAILABLE"},
    "bad": {"StatusCode.INVALID_ARGUMENT"},
    "timeout": {"answered", "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"},
    "gone": {"gone"},
}


class Crowd:
    """Requests of all kinds from many connections, and what became of each. Bounded in number and time.

    kinds: of requests, and how often each comes
    """

    KINDS: ClassVar = {"good": 55, "text": 20, "bad": 10, "timeout": 10, "gone": 5}

    def __init__(self, server: EmbeddedServer, alone: dict[str, Any], kinds: dict[str, int] = KINDS):
        self.server, self.alone, self.outcomes, self.wrong = server, alone, Counter(), []
        self._kinds = kinds
        self._lock = threading.Lock()

    def run(self, requests: int) -> None:
        each = [requests // CONNECTIONS + (number < requests % CONNECTIONS) for number in range(CONNECTIONS)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for done in [pool.submit(self.connection, number, range(count)) for number, count in enumerate(each)]:
                done.result()

    def connection(self, number: int, turns: Iterable[object]) -> None:
        """One connection's requests, a turn each; what they are hangs on its number."""
        choose = random.Random(number)
        with grpc(self.server.grpc) as client:
            for _ in turns:
                kind = choose.choices([*self._kinds], [*self._kinds.values()])[0]
                outcome = getattr(self, f"_{kind}")(client, choose)
                with self._lock:
                    self.outcomes[kind, outcome] += 1

    def unexpected(self) -> list[tuple[str, str]]:
        """Kinds of requests and outcomes that must not be."""
        return [(kind, outcome) for kind, outcome in self.outcomes if outcome not in ALLOWED[kind]]

    def _good(self, client: Any, choose: random.Random) -> str:
        ids, options, wanted = choose.choice(self.alone["translate"])
        priority = choose.choice(["high", "normal", "low"])
        return self._answer(client, "translate", "source_ids", ids, wanted, options, priority)

    def _text(self, client: Any, choose: random.Random) -> str:
        ids, options, wanted = choose.choice(self.alone["generate"])
        return self._answer(client, "generate", "token_ids", ids, wanted, options, "normal")

    def _answer(
        self, client: Any, model: str, name: str, ids: Any, wanted: Any, options: dict[str, Any], priority: str
    ) -> str:
        """Each call of tritonclient returns once, with one answer, or raises: a second final answer is an error of the
        stream, which fails what comes next on the connection."""
        try:
            outputs = ask(client, model, name, ids, **options, queue_priority=priority)
        except InferenceServerException as error:
            return str(error.status())
        got = outputs["target_ids" if model == "translate" else "result"].tolist()
        if got != wanted:
            with self._lock:
                self.wrong.append((ids, options, got, wanted))
        return "answered"

    def _bad(self, client: Any, choose: random.Random) -> str:
        ids, options = choose.choice(
            [([[96]], {}), ([[0, 0]], {}), ([[3] * 49], {}), ([[5]], {"beam_size": 99}), ([[5]], {"unknown": 1})]
        )
        try:
            ask(client, "translate", "source_ids", ids, **options)
        except InferenceServerException as error:
            return str(error.status())
        return "answered"

    def _timeout(self, client: Any, choose: random.Random) -> str:
        given = [tensor(tritonclient.grpc, "source_ids", choose.choice(CASES)["source_ids"])]
        try:
            arrays(client.infer("translate", given, client_timeout=choose.choice([0.001, 0.01, 0.05])))
        except InferenceServerException as error:
            return str(error.status())
        return "answered"

    def _gone(self, client: Any, choose: random.Random) -> str:
        """An HTTP caller that closes its connection without waiting for the answer."""
        host, port = self.server.http.split(":")
        body = json.dumps({"token_ids": [5, 6], "max_new_tokens": choose.randrange(1, 30)}).encode()
        head = f"POST /v2/models/generate/generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head.encode() + body)
        return "gone"


@pytest.fixture(scope="module")
def alone(client: Any) -> dict[str, Any]:
    return answers_alone(client)


def answers_alone(client: Any) -> dict[str, Any]:
    """By model: requests as (ids, options, what they give with nobody else there)."""

    def asked(model: str, name: str, output: str, ids: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        return ids, options, ask(client, model, name, ids, **options)[output].tolist()

    sampled = {"sampling_method": "topp", "top_p": 0.9}
    texts = [([[5 + n, 6, 7][: 1 + n % 3]], {**sampled, "seed": n, "max_new_tokens": 2 + 3 * n}) for n in range(8)]
    return {
        "translate": [asked("translate", "source_ids", "target_ids", case["source_ids"], {}) for case in CASES],
        "generate": [asked("generate", "token_ids", "result", *text) for text in texts],
    }


@pytest.mark.timeout(600)
def test_crowd_of_good_bad_and_vanishing_callers_gets_one_right_answer_each(
    served: EmbeddedServer, client: Any, alone: dict[str, Any]
) -> None:
    processes = model_process(served, "translate"), engine_process(served, "translate")
    Crowd(served, alone).run(CONNECTIONS)
    before = [resident(process) for process in processes]
    crowd = Crowd(served, alone)
    crowd.run(REQUESTS)
    assert sum(crowd.outcomes.values()) == REQUESTS
    assert crowd.wrong == []
    assert crowd.unexpected() == []
    assert crowd.outcomes["good", "answered"] > 0
    assert crowd.outcomes["good", "StatusCode.UNAVAILABLE"] > 0  # 64 callers, 24 places and 8 searches
    wait_until_idle(served, "translate")
    wait_until_idle(served, "generate")
    assert ask(client, "translate", "source_ids", CASES[0]["source_ids"])["target_ids"].tolist() == expected(CASES[0])
    for process, bytes_before in zip(processes, before, strict=True):
        assert resident(process) - bytes_before < 24 << 20


def wait_until_idle(server: EmbeddedServer, model: str) -> None:
    deadline = time.monotonic() + 20
    names = ("lightseq_slots_in_use", "lightseq_queue_rows", "lightseq_queue_tokens")
    while sum(metric(server, name, model) for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [metric(server, name, model) for name in names] == [0, 0, 0]


# Models that go away ----------------------------------------------------------------------------------------------


def model_process(server: EmbeddedServer, model: str) -> int:
    """The process id of a model's Python stub."""
    return child(server.pid, f"/{model}/1/model.py")


def engine_process(server: EmbeddedServer, model: str) -> int:
    return child(model_process(server, model), "lightseq_backend.serving.engine_process")


def child(parent: int, word: str) -> int:
    """The process id of the parent's only child whose command line has that."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            its_parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended
            continue
        if its_parent == parent and word.encode() in command:
            found.append(int(entry.name))
    assert len(found) == 1, found
    return found[0]


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_unloading_and_loading_under_load_answers_every_request_once(served: EmbeddedServer, client: Any) -> None:
    ending, outcomes, wrong = threading.Event(), Counter(), []

    def go_on_asking() -> None:
        with grpc(served.grpc) as own:
            while not ending.is_set():
                case = CASES[0]
                try:
                    got = ask(own, "reloaded", "source_ids", case["source_ids"])["target_ids"].tolist()
                except InferenceServerException as error:
                    outcomes[error.status()] += 1
                    time.sleep(0.01)
                else:
                    outcomes["answered"] += 1
                    if got != expected(case):
                        wrong.append(got)

    callers = [threading.Thread(target=go_on_asking) for _ in range(8)]
    with http(served.http) as admin:
        for caller in callers:
            caller.start()
        try:
            for _ in range(2):
                admin.unload_model("reloaded", headers=ADMIN)
                admin.load_model("reloaded", headers=ADMIN)
        finally:
            ending.set()
            for caller in callers:
                caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert wrong == []
    assert outcomes["answered"] > 0
    # Triton's own words while there is no such model.
    assert set(outcomes) <= {"answered", "StatusCode.UNAVAILABLE", "StatusCode.NOT_FOUND"}
    assert ask(client, "reloaded", "source_ids", CASES[0]["source_ids"])["target_ids"].tolist() == expected(CASES[0])


def test_stopping_server_answers_what_it_cannot_finish(tmp_path: Path) -> None:
    parameters = {"burst": 100, "slots": 4, "queue": 4000}
    write_model(tmp_path, "slow", golden("t01_base.pb"), TRANSFORMER, parameters=parameters)
    outcomes: Counter[tuple[str, str]] = Counter()
    with EmbeddedServer(tmp_path, device="cpu", stop_timeout=5) as server, grpc(server.grpc) as client:
        answers = [ask_later(client, "slow", "source_ids", CASES[0]["source_ids"]) for _ in range(3000)]
        answers[0]()
        server.stop()
        for answer in answers:
            try:
                answer()
                outcomes["answered", ""] += 1
            except InferenceServerException as error:
                outcomes[error.message().removeprefix("[request id: <id_unknown>] "), error.status()] += 1
    stopped = ("the engine was stopped", "StatusCode.UNAVAILABLE")
    # These came while it was, or on a busy machine when Triton itself was already ending, with words of its own.
    refused = {
        ("the engine is stopping", "StatusCode.UNAVAILABLE"),
        ("Request for unknown model: 'slow' has no available versions", "StatusCode.NOT_FOUND"),
        (
            "Server is stopping, scheduler for model has stopped accepting new inference requests",
            "StatusCode.UNAVAILABLE",
        ),
    }
    assert outcomes[stopped] > 0
    assert set(outcomes) <= {("answered", ""), stopped, *refused}


def test_killed_model_process_is_noticed_and_healed_by_a_reload_or_a_new_server(tmp_path: Path) -> None:
    """What it was busy with is never answered by Triton 24.10: the caller's own timeout is what ends it. Where it died
    with a lock in its hand, two times of five, Triton dies with it; then whoever started the server must see that."""
    for model in ("killed", "other"):
        write_model(tmp_path, model, golden("t01_base.pb"), TRANSFORMER, parameters={"burst": 100, "slots": 4})
    served = {"device": "cpu", "admin_key": ADMIN["admin-key"], "models": ["killed", "other"], "stop_timeout": 3}
    source, wanted = CASES[0]["source_ids"], expected(CASES[0])
    with EmbeddedServer(tmp_path, **served) as server, grpc(server.grpc) as client:
        busy = [ask_later(client, "killed", "source_ids", source) for _ in range(30)]
        busy[0]()
        os.kill(model_process(server, "killed"), signal.SIGKILL)
        with pytest.raises(InferenceServerException) as failed:
            ask(client, "killed", "source_ids", source)
        if failed.value.status() == "StatusCode.UNAVAILABLE":
            assert server.wait() != 0
            assert "lock_exception" in server.log
            server.start()
        else:
            assert "Stub process 'killed_0_0' is not healthy" in failed.value.message()
            assert ask(client, "other", "source_ids", source)["target_ids"].tolist() == wanted
            load_anew(server, "killed")
        with grpc(server.grpc) as again:
            for model in ("killed", "other"):
                assert ask(again, model, "source_ids", source)["target_ids"].tolist() == wanted


def test_killed_engine_process_fails_what_waits_with_the_reason_and_is_healed_by_a_reload(
    served: EmbeddedServer, client: Any
) -> None:
    source, wanted = CASES[0]["source_ids"], expected(CASES[0])
    busy = [ask_later(client, "reloaded", "source_ids", source) for _ in range(200)]
    busy[0]()
    engine = engine_process(served, "reloaded")
    os.kill(engine, signal.SIGKILL)
    reason = "RuntimeError: the engine's process has ended: signal 9; the model must be loaded again"
    outcomes: Counter[Any] = Counter()
    for answer in [*busy[1:], lambda: ask(client, "reloaded", "source_ids", source)]:
        try:
            outcomes["answered"] += answer()["target_ids"].tolist() == wanted
        except InferenceServerException as error:
            outcomes[error.status(), error.message()] += 1
    assert outcomes["StatusCode.INTERNAL", reason] > 1
    assert outcomes["answered"] + outcomes["StatusCode.INTERNAL", reason] == len(busy)
    assert ask(client, "translate", "source_ids", source)["target_ids"].tolist() == wanted
    load_anew(served, "reloaded")
    assert ask(client, "reloaded", "source_ids", source)["target_ids"].tolist() == wanted
    assert engine_process(served, "reloaded") != engine


def load_anew(server: EmbeddedServer, model: str) -> None:
    """Triton takes a while to see that an unloaded model has no process any more."""
    with http(server.http) as admin:
        admin.unload_model(model, headers=ADMIN)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            admin.load_model(model, headers=ADMIN)
            status, _ = post(f"http://{server.http}/v2/models/{model}/generate", {"source_ids": [79]})
            if status == 200:
                return
            time.sleep(0.2)
    pytest.fail(f"{model} is not healed by loading it")

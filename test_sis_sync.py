"""The tests of sis_sync, in the order of its contract; and `bench`, `fuzz` and `timing`, to be run by hand.

    python3 -m pytest -q test_sis_sync.py       # or: make test
    python3 test_sis_sync.py bench              # or: make bench
    python3 test_sis_sync.py fuzz 600           # ten minutes of mutated requests
    python3 test_sis_sync.py timing             # whether a 401 tells how much of a secret was right

Most tests talk to a real server process over a real socket, with a real database file; what is
pure is tested as the function it is.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import configparser
import contextlib
import csv
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

import sis_sync

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / "sis_sync.py"
SECRET = "sis_a-secret-for-the-tests-only"
OTHER_SECRET = "sis_another-secret-for-the-tests"
SYNC = sis_sync.SYNC_PATH
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
FAST = "requests_per_minute = 100000\n"

# Temporary files in memory where there is such a place: hundreds of little databases, each synced
# to its disk, would only measure that disk. `bench` does measure it, and chooses its own.
if os.access("/dev/shm", os.W_OK):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

# The command line. With -m, Python keeps the compiled module between the hundred-odd runs.
COMMAND = (sys.executable, "-m", "sis_sync")
ENVIRONMENT = {**os.environ, "SIS_SYNC_SECRET": SECRET, "SIS_SYNC_CONFIG": "", "PYTHONPATH": str(HERE),
               "PYTHONDONTWRITEBYTECODE": ""}


# ---------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------

class Answer(NamedTuple):
    """An answer that was read to the end of its connection."""

    status: int
    headers: dict[str, str]
    document: Any
    body: bytes

    @property
    def code(self) -> str:
        return str(self.document.get("error", ""))


def parse_answer(data: bytes, head_only: bool = False) -> Answer:
    """Every answer keeps the promises that hold for all of them, or this fails."""
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    match = re.fullmatch(r"HTTP/1\.[01] (\d{3}) [A-Za-z -]+", status_line)
    assert match, data[:200]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert re.fullmatch("[0-9a-f]{16}", headers["x-request-id"])
    assert "date" in headers
    if head_only:
        assert body == b""
        return Answer(int(match[1]), headers, {}, body)
    assert int(headers["content-length"]) == len(body) > 0
    document = json.loads(body)
    if int(match[1]) != 200:
        problem = {(row.code, row.status): row for row in sis_sync.ERRORS}[
            document["error"], int(match[1])]
        assert set(document) <= {"error", "detail", *problem.carries}
        assert isinstance(document["detail"], str) and document["detail"]
    return Answer(int(match[1]), headers, document, body)


def read_to_end(connection: socket.socket) -> bytes:
    pieces = []
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces)


def head_of(method: str = "POST", target: str = SYNC, version: str = "HTTP/1.1",
            secret: str | None = SECRET, **headers: Any) -> bytes:
    fields = {"Host": "localhost", "Authorization": f"Bearer {secret}" if secret else None,
              **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"{method} {target} {version}",
             *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def request_of(body: bytes | Mapping[str, Any] | list[Any], **headers: Any) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head_of(**{"Content_Length": len(data), "Content_Type": "application/json", **headers}) + data


def student(number: object = 1, **values: Any) -> dict[str, Any]:
    return {"student_id_ext": f"U{number}", "email": f"u{number}@example.edu", **values}


def batch(*students: Any, cohort_id: Any = "2026", **values: Any) -> dict[str, Any]:
    return {"cohort_id": cohort_id, "students": list(students), **values}


class Process:
    """A server as an operator runs it: a process, an ini file, a log on stderr."""

    def __init__(self, folder: pathlib.Path, ini: str = "", environment: Mapping[str, str] = {},
                 words: Sequence[str] = (), **popen: Any) -> None:
        self.folder, self.database = folder, folder / "sis_sync.db"
        self.ini = folder / "sis_sync.ini"
        if ini:
            self.ini.write_text(ini, encoding="utf-8")
        self.environment = {**ENVIRONMENT, **environment}
        self.words = (*COMMAND, *(("--config", str(self.ini)) if ini else ()),
                      *words)
        self.popen = popen
        self.log: list[str] = []
        self.changed = threading.Condition()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.words, env=self.environment, stderr=subprocess.PIPE,
                                        stdout=subprocess.PIPE, encoding="utf-8", **self.popen)
        self.log.clear()                # or the port of an earlier start would be found in it
        self.reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self.reader.start()
        self.port = int(self.wait_for(r"listens on https?://.*:(\d+)/")[1])

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr
        for line in process.stderr:
            with self.changed:
                self.log.append(line.rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.log.append("(end)")
            self.changed.notify_all()

    def wait_for(self, pattern: str, seconds: float = 20) -> re.Match[str]:
        """The last line of the log that matches, as soon as there is one."""
        found: list[re.Match[str]] = []

        def seen() -> bool:
            found[:] = [match for line in self.log if (match := re.search(pattern, line))]
            return bool(found) or (self.log[-1:] == ["(end)"])

        with self.changed:
            assert self.changed.wait_for(seen, seconds) and found, "\n".join(self.log)
        return found[-1]

    def connect(self, source: str = "127.0.0.1", timeout: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout, (source, 0))

    def exchange(self, data: bytes, size: int = 1 << 30, source: str = "127.0.0.1") -> Answer:
        """Send bytes, in pieces of `size`; read to the end, which the server must bring about."""
        with self.connect(source) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for start in range(0, len(data), size):
                    connection.sendall(data[start:start + size])
            return parse_answer(read_to_end(connection), data.startswith(b"HEAD "))

    def push(self, *students: Any, secret: str = SECRET, **values: Any) -> Answer:
        return self.exchange(request_of(batch(*students, **values), Authorization=f"Bearer {secret}"))

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(query, values).fetchall()

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(20)
        self.reader.join(20)
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        return status


def ini_of(server: str = "", limits: str = FAST, institutions: str = "") -> str:
    return (f"[server]\nport = 0\n{server}\n[limits]\n{limits}\n"
            + (institutions or "[institution example]\n"))


@contextlib.contextmanager
def running(folder: pathlib.Path, *words: Any, **options: Any) -> Iterator[Process]:
    process = Process(folder, *words, **options)
    try:
        yield process
    finally:
        process.stop(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)


def configuration_of(folder: pathlib.Path, text: str = "",
                     environment: Mapping[str, str] | None = None) -> sis_sync.Configuration:
    path = folder / "test.ini"
    path.write_text(text, encoding="utf-8")
    return sis_sync.load_configuration(
        str(path), {"SIS_SYNC_SECRET": SECRET} if environment is None else environment)


def faults_of(folder: pathlib.Path, text: str) -> list[str]:
    """What a start with this file says, without the file's path."""
    with pytest.raises(sis_sync.CommandError) as caught:
        configuration_of(folder, text)
    return [line.partition(".ini: ")[2] for line in caught.value.args]


class Result(NamedTuple):
    """What a command came to."""

    returncode: int
    stdout: bytes
    stderr: bytes


def run(*words: Any, stdin: str | bytes = b"", environment: Mapping[str, str] = {}) -> Result:
    """The command line, in this process: the same as a process of its own, ten times as fast."""
    before = sys.stdin, sys.stdout, sys.stderr, dict(os.environ)
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (
        stdin.encode() if isinstance(stdin, str) else stdin, b"", b"")]
    sys.stdin, sys.stdout, sys.stderr = streams
    os.environ.update({**ENVIRONMENT, **environment})
    try:
        status = sis_sync.main([str(word) for word in words])
    except SystemExit as end:           # argparse's
        status = int(end.code or 0)
    finally:
        sys.stdin, sys.stdout, sys.stderr = before[:3]
        os.environ.clear()
        os.environ.update(before[3])
    for stream in streams[1:]:
        stream.flush()
    return Result(status, *(stream.buffer.getvalue() for stream in streams[1:]))


def run_process(*words: Any, command: Sequence[str] = COMMAND, **environment: str) -> Result:
    """The command line, as a process."""
    result = subprocess.run([*command, *map(str, words)], capture_output=True, timeout=60, check=False,
                            env={**ENVIRONMENT, **environment})
    return Result(result.returncode, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Process]:
    """One server for all tests that leave it as it was. After them its log is looked through."""
    folder = tmp_path_factory.mktemp("server")
    with running(folder, ini_of(institutions=(
            "[institution example]\n"
            "[institution listed]\nsecrets = env:LISTED\ncohorts = 2026, 2027\n"
            "programs = BUSI\n  NURS\ncampuses = Sunshine Coast\n"
            "[institution strict]\nsecrets = env:STRICT\nbad_rows = reject\n")),
            environment={"LISTED": OTHER_SECRET, "STRICT": "sis_the-strict-ones-secret"}) as process:
        yield process
        assert process.exchange(head_of("GET", "/healthz")).status == 200
        process.stop()
    log = "\n".join(process.log)
    assert "Traceback" not in log
    assert " 500 " not in log
    for private in (SECRET, OTHER_SECRET, "strict-ones", "@example.edu", "O'Brien", "Zo"):
        assert private not in log

@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[sis_sync.Service]:
    service = sis_sync.Service(configuration_of(tmp_path, ini_of()))
    yield service
    service.roster.close()


def handle(service: sis_sync.Service, body: Any = b"", method: str = "POST", path: str = SYNC,
           peer: str = "192.0.2.1", **headers: Any) -> Answer:
    """The pure core: no socket."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"authorization": f"Bearer {SECRET}", "content-length": str(len(data)),
              **{name.replace("_", "-"): value for name, value in headers.items()}}
    response = service.handle(sis_sync.Request(
        peer, method, path, headers={name: value for name, value in fields.items()
                                     if value is not None}, body=io.BytesIO(data)))
    return Answer(response.status, {name.lower(): value for name, value in response.headers},
                  json.loads(response.body or b"{}"), response.body)


# ---------------------------------------------------------------------------------------------
# Section 1: the shape
# ---------------------------------------------------------------------------------------------

def test_the_module_needs_nothing_but_the_standard_library() -> None:
    names = {node.module if isinstance(node, ast.ImportFrom) else alias.name
             for node in ast.walk(ast.parse(MODULE.read_text("utf-8")))
             if isinstance(node, (ast.Import, ast.ImportFrom))
             for alias in node.names}
    assert names
    known: frozenset[str] = getattr(sys, "stdlib_module_names", frozenset())     # from Python 3.10
    assert {str(name).partition(".")[0] for name in names} <= known or not known


def test_the_sql_is_what_sqlite_3_24_understands() -> None:
    source = MODULE.read_text("utf-8")
    assert "ON CONFLICT" in source
    for newer in (" RETURNING", "STRICT,", ") STRICT", "->>", "unixepoch("):
        assert newer not in source


def test_the_top_level_holds_what_the_contract_names_and_nothing_else() -> None:
    if not (HERE / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) <= {
        "sis_sync.py", "test_sis_sync.py", "sis_sync.ini", "Makefile", "LICENSE", "README.md",
        ".ci/run", ".gitignore"}


def test_the_module_alone_in_an_empty_folder_serves(tmp_path: pathlib.Path) -> None:
    shutil.copy(MODULE, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "sis_sync.py", "serve", "--port", "0"], cwd=tmp_path,
        env={**os.environ, "SIS_SYNC_SECRET": SECRET, "SIS_SYNC_CONFIG": ""},
        stderr=subprocess.PIPE, text=True)
    assert process.stderr
    port = int(re.search(r":(\d+)/", process.stderr.readline())[1])  # type: ignore[index]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", SYNC, json.dumps(batch(student())), {
        "Authorization": f"Bearer {SECRET}"})
    assert connection.getresponse().status == 200
    connection.close()
    process.terminate()
    process.communicate(timeout=20)
    assert (tmp_path / "sis_sync.db").exists()


def test_a_new_field_is_one_line_and_arrives_everywhere(tmp_path: pathlib.Path) -> None:
    line = 'Field("first_in_family", bool,'
    source = MODULE.read_text("utf-8")
    assert source.count(line) == 1
    (tmp_path / "grown.py").write_text(source.replace(
        line, 'Field("study_mode", str, False, 1, 9, True, None, "", "how they study"),\n    ' + line), "utf-8")
    database = tmp_path / "sis_sync.db"
    sis_sync.Roster(str(database)).close()          # made before the field was there
    spec = importlib.util.spec_from_file_location("grown", tmp_path / "grown.py")
    assert spec and spec.loader
    grown = importlib.util.module_from_spec(spec)
    sys.modules["grown"] = grown
    spec.loader.exec_module(grown)
    ini = tmp_path / "test.ini"
    ini.write_text(ini_of())
    service = grown.Service(grown.load_configuration(str(ini), {"SIS_SYNC_SECRET": SECRET}))
    answer = handle_with(grown, service, batch(student(1, study_mode="online"),
                                               student(2, study_mode="much too long")))
    assert answer["details"]["imported"] == 1
    assert answer["errors"] == [{"row": 2, "field": "study_mode", "error": "invalid_field",
                                 "message": "study_mode must be 1 to 9 characters"}]
    again = handle_with(grown, service, batch(student(1, study_mode="on campus")))
    assert again["details"] == {"imported": 0, "updated": 1, "unchanged": 0}
    schema = grown.openapi(1)["components"]["schemas"]["Student"]["properties"]["study_mode"]
    assert schema == {"type": ["string", "null"], "maxLength": 9, "description": "how they study"}
    service.roster.close()
    command = (sys.executable, str(tmp_path / "grown.py"))
    exported = run_process("--config", ini, "export", command=command).stdout.decode()
    assert exported.splitlines()[1] == "U1,u1@example.edu,,,,,on campus,"


def handle_with(module: Any, service: Any, document: Mapping[str, Any]) -> Any:
    data = json.dumps(document).encode()
    response = service.handle(module.Request("192.0.2.1", "POST", SYNC, body=io.BytesIO(data), headers={
        "authorization": f"Bearer {SECRET}", "content-length": str(len(data))}))
    return json.loads(response.body)


def wsgi(application: Any, method: str, path: str, body: bytes = b"", **environ: Any) -> tuple[str, Any]:
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "REMOTE_ADDR": "192.0.2.1", "QUERY_STRING": "", "SCRIPT_NAME": "",
               "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)),
               "CONTENT_TYPE": "application/json", **environ}
    setup_testing_defaults(environ)
    seen: list[str] = []
    result = application(environ, lambda status, headers, error=None: seen.append(status))
    data = b"".join(result)
    if hasattr(result, "close"):
        result.close()
    return seen[0], json.loads(data) if data else None


@pytest.fixture
def application(tmp_path: pathlib.Path, monkeypatch: Any) -> Iterator[Any]:
    """The WSGI callable, under the checks of wsgiref.validate."""
    (tmp_path / "wsgi.ini").write_text(ini_of())
    monkeypatch.setenv("SIS_SYNC_CONFIG", str(tmp_path / "wsgi.ini"))
    monkeypatch.setenv("SIS_SYNC_SECRET", SECRET)
    sis_sync.wsgi_service.cache_clear()
    yield validator(sis_sync.application)
    sis_sync.wsgi_service().roster.close()
    sis_sync.wsgi_service.cache_clear()


class TestWSGI:
    def test_it_answers_as_the_server_does(self, application: Any) -> None:
        body = json.dumps(batch(student())).encode()
        status, document = wsgi(application, "POST", SYNC, body,
                                HTTP_AUTHORIZATION=f"Bearer {SECRET}")
        assert (status, document["imported"]) == ("200 OK", 1)
        assert wsgi(application, "GET", "/healthz") == ("200 OK", {"status": "ok"})
        assert wsgi(application, "HEAD", "/healthz") == ("200 OK", None)
        status, document = wsgi(application, "POST", SYNC, body)
        assert (status, document["error"]) == ("401 Unauthorized", "unauthorized")

    def test_a_body_without_a_length_is_read_where_the_server_ends_it(self, application: Any) -> None:
        body = json.dumps(batch(student())).encode()
        for terminated, expected in ((True, "200 OK"), (False, "400 Bad Request")):
            status, _ = wsgi(application, "POST", SYNC, body, CONTENT_LENGTH="",
                             HTTP_AUTHORIZATION=f"Bearer {SECRET}",
                             **{"wsgi.input_terminated": terminated})
            assert status == expected

    def test_a_body_shorter_than_its_length_is_refused(self, application: Any) -> None:
        body = json.dumps(batch(student())).encode()
        status, document = wsgi(application, "POST", SYNC, body, CONTENT_LENGTH=str(len(body) + 1),
                                HTTP_AUTHORIZATION=f"Bearer {SECRET}")
        assert (status, document["error"]) == ("400 Bad Request", "malformed_request")

    def test_a_faulty_configuration_is_a_500_and_a_line_in_the_log(
            self, tmp_path: pathlib.Path, monkeypatch: Any, capfd: Any) -> None:
        (tmp_path / "bad.ini").write_text("[server]\nprot = 1\n")
        monkeypatch.setenv("SIS_SYNC_CONFIG", str(tmp_path / "bad.ini"))
        sis_sync.wsgi_service.cache_clear()
        status, document = wsgi(validator(sis_sync.application), "GET", "/healthz")
        assert (status, document["error"]) == ("500 Internal Server Error", "server_error")
        assert "did you mean port?" in capfd.readouterr().err
        assert wsgi(validator(sis_sync.application), "HEAD", "/healthz") == ("500 Internal Server Error", None)

    def test_what_it_logs_is_escaped_whatever_the_server_lets_through(self, application: Any, capfd: Any) -> None:
        assert wsgi(sis_sync.application, "G\x1b[31mT", "/x\n")[0] == "501 Not Implemented"
        assert r" G\x1b[31mT /x\x0a 501 " in capfd.readouterr().err

    def test_below_a_prefix_it_is_found_by_the_path_after_it(self, application: Any) -> None:
        assert wsgi(application, "GET", "/healthz", SCRIPT_NAME="/roster")[0] == "200 OK"


# ---------------------------------------------------------------------------------------------
# Section 2: the endpoint
# ---------------------------------------------------------------------------------------------

FULL = {"student_id_ext": "U2025001", "email": "alex.connor@student.example.edu.au",
        "first_name": "Alex", "last_name": "Connor", "program_code": "BUSI",
        "campus_name": "Sunshine Coast", "first_in_family": False}
ROW = ", ".join(sis_sync.NAMES)

TEXT = [name for name in sis_sync.NAMES if name != "first_in_family"]
# Field, value sent, value stored, or the error and its message.
GOOD: list[tuple[str, Any, Any]] = [
    ("student_id_ext", "0", "0"), ("student_id_ext", "0012", "0012"), ("student_id_ext", "x" * 255, "x" * 255),
    ("student_id_ext", "  U 1\t", "U 1"),
    ("email", "a@b", "a@b"), ("email", "a" * 252 + "@b", "a" * 252 + "@b"),
    ("email", "\u00a0a@b\n", "a@b"), ("email", "o'brien+x@b.例え", "o'brien+x@b.例え"),
    *((name, value, value) for name in TEXT[2:]
      for value in ("O'Brien", "Nguyễn", "Zoë", "王", "e\u0301", "क्\u200dष", "👩\u200d🎓", "x" * 255, "a\x80b", "=1+1")),
    *((name, None, None) for name in sis_sync.NAMES[2:]),
    *((name, "", None) for name in TEXT[2:]), *((name, " \u3000\r\n", None) for name in TEXT[2:]),
    ("first_in_family", True, 1), ("first_in_family", False, 0),
]
NUMBERS_AND_SUCH: list[Any] = [1, 1.5, True, [], {}, ["x"]]
NO_BOOLEANS: list[Any] = ["true", "", 1, 0, 0.0, [], {}]
BAD: list[tuple[str, Any, str, str]] = [
    *((name, value, "missing_field", f"{name} required")
      for name in ("student_id_ext", "email") for value in (None, "", " \u2003")),
    *((name, value, "invalid_field", f"{name} must be a string")
      for name in TEXT for value in NUMBERS_AND_SUCH),
    *(("first_in_family", value, "invalid_field", "first_in_family must be true, false or null")
      for value in NO_BOOLEANS),
    ("email", "a" * 251 + "@bcd", "invalid_field", "email must be 3 to 254 characters"),
    *((name, "x" * 256, "invalid_field", f"{name} must be 1 to 255 characters")
      for name in TEXT if name != "email"),
    *(("email", value, "invalid_field",
       "email must be an e-mail address: something, one @, something, no white space")
      for value in ("abc", "@bc", "ab@", "a@b@c", "a b@c", "a@b\u00a0c", "a@b, c@d")),
    *((name, f"a@{character}b", "invalid_field",
       f"{name} holds U+{ord(character):04X}, a control character or half of a surrogate pair")
      for name in TEXT for character in ("\0", "\x1f", "\x7f", "\n", "\ud800", "\udfff")),
    *((name, f"\x1fa@b{name}", "invalid_field",
       f"{name} holds U+001F, a control character or half of a surrogate pair") for name in TEXT),
]


class TestFields:
    @pytest.mark.parametrize("name, value, stored", GOOD)
    def test_a_good_value_is_kept_as_it_was_sent(self, name: str, value: Any, stored: Any) -> None:
        records, faults = sis_sync.check_rows([{**FULL, name: value}], sis_sync.ANYONE)
        assert not faults
        assert dict(zip(sis_sync.NAMES, records[0]))[name] == stored

    @pytest.mark.parametrize("name, value, error, message", BAD)
    def test_a_bad_value_is_reported_and_not_kept(self, name: str, value: Any, error: str,
                                                  message: str) -> None:
        records, faults = sis_sync.check_rows([{**FULL, name: value}], sis_sync.ANYONE)
        assert not records
        assert faults == {0: sis_sync.Fault(name, error, message)}

    def test_of_all_of_these_in_one_batch_the_good_are_stored_and_the_bad_reported(
            self, service: sis_sync.Service) -> None:
        students: list[dict[str, Any]] = []
        for index, (name, value, *_) in enumerate([*GOOD, *BAD]):
            students.append({**FULL, "student_id_ext": f"U{index}", name: value})
        ids = [row for row in GOOD if row[0] == "student_id_ext"]
        answer = handle(service, batch(*students)).document
        assert [(error["row"], error["field"], error["error"], error["message"])
                for error in answer["errors"]] == [
            (index, name, error, message) for index, (name, _, error, message) in
            enumerate(BAD, len(GOOD) + 1)]
        stored = {row[0]: row for row in rows_of(service)}
        assert {row[2] for row in ids} <= set(stored)
        for index, (name, _, value) in enumerate(GOOD):
            if name != "student_id_ext":
                assert stored[f"U{index}"][sis_sync.NAMES.index(name)] == value

    def test_every_field_of_the_contract_is_in_the_table_and_in_the_corpus(self) -> None:
        assert sis_sync.NAMES == tuple(FULL)
        assert {row[0] for row in GOOD} == {row[0] for row in BAD} == set(FULL)

    @pytest.mark.parametrize("seed", range(20))
    def test_a_column_and_its_values_one_by_one_are_judged_alike(self, seed: int) -> None:
        """The quick look at a whole column must not know other rules than check_value does."""
        pick = random.Random(seed)
        white = sis_sync.WHITE_SPACE + "\x1c\x1f\u200b\ufeff"
        some = frozenset(("BUSI", "a@b"))

        def value() -> Any:
            return pick.choice((
                None, "", "a@b", "BUSI", True, pick.choice(white) + "a@b" + pick.choice(white),
                "".join(pick.choices("a@b é\u0301\u200d王\x80", k=pick.randrange(9))),
                pick.choice(("x" * 64, "x" * 254, "x" * 255, "x" * 256, 1, [], "\ud800", "a\0")) if
                pick.random() < 0.1 else f"u{pick.random()}@x"))

        for field in (*sis_sync.FIELDS, sis_sync.COHORT):
            for size in (0, 1, 2, 5):
                listed = pick.choice((frozenset(), some)) if field.listed else frozenset()
                column = [value() for _ in range(size)]
                values, faults = sis_sync.check_column(field, column, listed)
                one_by_one = [sis_sync.check_value(field, item, listed) for item in column]
                if field is sis_sync.KEY:
                    sis_sync.mark_duplicates(one_by_one)
                assert faults == {index: item for index, item in enumerate(one_by_one)
                                  if isinstance(item, sis_sync.Fault)}
                assert [None if index in faults else item for index, item in enumerate(values)] == [
                    None if isinstance(item, sis_sync.Fault) else item for item in one_by_one]
                assert len(values) == size

    def test_unknown_keys_are_ignored_at_both_levels(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch({**FULL, "": [], "Email": 1}, extra={"deep": [None]}))
        assert answer.document["imported"] == 1

    def test_a_field_left_out_is_null_and_a_row_is_the_whole_record(
            self, service: sis_sync.Service) -> None:
        handle(service, batch(FULL))
        answer = handle(service, batch({"student_id_ext": "U2025001", "email": "new@b"}))
        assert answer.document["details"] == {"imported": 0, "updated": 1, "unchanged": 0}
        assert rows_of(service) == [("U2025001", "new@b", None, None, None, None, None)]

    def test_strings_come_back_as_they_were_sent(self, tmp_path: pathlib.Path) -> None:
        """Neither composed nor decomposed, escaped in JSON or not."""
        names = ["O'Brien", "Nguyễn", "Nguye\u0302\u0303n", "Zoë", "王", "👩\u200d🎓", "a\u2028b"]
        with running(tmp_path, ini_of()) as process:
            for escaped in (True, False):
                students = [student(number, last_name=name) for number, name in enumerate(names)]
                body = json.dumps(batch(*students), ensure_ascii=escaped).encode()
                assert process.exchange(request_of(body)).document["imported"] == len(names)
                assert [row[0] for row in process.rows(
                    "SELECT last_name FROM entries ORDER BY student_id_ext")] == names


def rows_of(service: sis_sync.Service, columns: str = ROW) -> list[tuple[Any, ...]]:
    connection = service.roster._connection
    assert connection
    return connection.execute(
        f"SELECT {columns} FROM entries ORDER BY roster_id, student_id_ext").fetchall()


class TestRows:
    def test_the_answer_is_as_in_the_contract(self, service: sis_sync.Service) -> None:
        handle(service, batch(*map(student, range(20))))
        students = [*map(student, range(40)), {"student_id_ext": "U99"}, "no object"]
        for number in range(5):
            students[number] = student(number, first_name="Changed")
        answer = handle(service, batch(*students))
        assert answer.status == 200
        assert answer.document == {
            "received": 42, "imported": 40,
            "details": {"imported": 20, "updated": 20, "unchanged": 15},
            "errors": [{"row": 41, "field": "email", "error": "missing_field",
                        "message": "email required"},
                       {"row": 42, "field": None, "error": "not_an_object",
                        "message": "a student must be an object"}]}

    @pytest.mark.parametrize("row", [None, 1, "U1", [], [student()], True])
    def test_a_row_that_is_no_object_is_reported(self, service: sis_sync.Service, row: Any) -> None:
        answer = handle(service, batch(row, student()))
        assert [error["error"] for error in answer.document["errors"]] == ["not_an_object"]
        assert answer.document["imported"] == 1

    def test_the_first_of_two_rows_with_one_id_counts(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch(student(1, first_name="First"), student(2), {**student(3), "student_id_ext": "U 1"},
                                       {"student_id_ext": " U1 ", "email": "second@b"}))
        assert answer.document["errors"] == [
            {"row": 4, "field": "student_id_ext", "error": "duplicate_student",
             "message": "the same student_id_ext stood higher up in the batch"}]
        assert rows_of(service, "student_id_ext, first_name") == [
            ("U 1", None), ("U1", "First"), ("U2", None)]

    def test_a_row_is_reported_once_for_its_first_fault_in_the_order_of_the_table(
            self, service: sis_sync.Service) -> None:
        wrong: dict[str, Any] = dict.fromkeys(FULL, 1)
        for name, value in FULL.items():
            answer = handle(service, batch(wrong))
            assert [error["field"] for error in answer.document["errors"]] == [name]
            wrong[name] = value

    def test_no_message_repeats_what_the_row_said(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch(*({**FULL, name: "private-\x00"} for name in TEXT),
                                       {**FULL, "email": "private"}, {"private": 1}))
        assert len(answer.document["errors"]) == len(TEXT) + 2
        assert b"private" not in answer.body and b"Connor" not in answer.body

    def test_the_lists_of_an_institution_are_kept(self, server: Process) -> None:
        answer = server.push(
            student(1, program_code="BUSI", campus_name="Sunshine Coast"), student(2, program_code="busi"),
            student(3, campus_name="Moon"), student(4, program_code=" NURS "), student(5),
            secret=OTHER_SECRET)
        assert [(error["row"], error["field"], error["error"]) for error in answer.document["errors"]] == [
            (2, "program_code", "unknown_program"), (3, "campus_name", "unknown_campus")]
        assert answer.document["imported"] == 3

    def test_with_bad_rows_reject_one_bad_row_refuses_the_batch(self, server: Process) -> None:
        secret = "sis_the-strict-ones-secret"
        count = "SELECT count(*) FROM syncs WHERE institution = 'strict'"
        answer = server.push(student(1), {"student_id_ext": "U2"}, secret=secret)
        assert (answer.status, answer.code) == (400, "invalid_rows")
        assert answer.document["errors"] == [
            {"row": 2, "field": "email", "error": "missing_field", "message": "email required"}]
        assert server.rows(count) == [(0,)]
        assert server.push(student(1), secret=secret).status == 200
        assert server.rows(count) == [(1,)]

    def test_an_empty_batch_is_a_sync(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch())
        assert answer.document == {"received": 0, "imported": 0, "errors": [], "details": {
            "imported": 0, "updated": 0, "unchanged": 0}}

    def test_every_error_of_a_row_has_been_provoked(self, service: sis_sync.Service,
                                                    server: Process) -> None:
        answer = server.push(None, student(1), student(1), {}, {**FULL, "email": 1},
                             student(2, program_code="?"), student(3, campus_name="?"),
                             secret=OTHER_SECRET)
        assert {error["error"] for error in answer.document["errors"]} == set(sis_sync.ROW_ERRORS)


class TestRoster:
    def test_an_entry_knows_when_it_was_created_changed_and_seen(
            self, service: sis_sync.Service, monkeypatch: Any) -> None:
        now = 1_800_000_000
        monkeypatch.setattr(time, "time", lambda: now)
        handle(service, batch(student(1), student(2)))
        now += 10
        handle(service, batch(student(1), student(2, first_name="New")))
        now += 10
        handle(service, batch(student(2, first_name="New")))
        times = "created_at - 1800000000, changed_at - 1800000000, seen_at - 1800000000"
        assert rows_of(service, times) == [(0, 0, 10), (0, 10, 20)]

    def test_two_cohorts_have_an_entry_each_and_never_disturb_each_other(
            self, service: sis_sync.Service) -> None:
        handle(service, batch(student(1, first_name="A"), cohort_id="a"))
        answer = handle(service, batch(student(1, first_name="B"), cohort_id="b"))
        assert answer.document["details"]["imported"] == 1
        assert rows_of(service, "first_name") == [("A",), ("B",)]

    def test_two_institutions_never_touch_each_other(self, server: Process) -> None:
        before = server.push(student("both", first_name="One")).document
        answer = server.push(student("both", first_name="Two"), secret=OTHER_SECRET).document
        assert before["details"]["imported"] == answer["details"]["imported"] == 1
        assert server.push(student("both", first_name="One")).document["details"]["unchanged"] == 1
        assert server.rows(
            "SELECT institution, first_name FROM entries JOIN rosters USING (roster_id) "
            "WHERE student_id_ext = 'Uboth' ORDER BY institution") == [
                ("example", "One"), ("listed", "Two")]

    @pytest.mark.parametrize("seed", range(5))
    def test_the_counts_are_exact_whatever_is_pushed(self, service: sis_sync.Service, seed: int) -> None:
        """Against a dict, over random batches of which some rows are known, changed, the same."""
        pick = random.Random(seed)
        known: dict[tuple[str, str], dict[str, Any]] = {}
        for _ in range(12):
            cohort = pick.choice("ab")
            students = [student(number, first_name=pick.choice((None, "A", "B")),
                                first_in_family=pick.choice((None, True, False)))
                        for number in pick.sample(range(900), pick.choice((0, 1, 300, 700)))]
            keys = [(cohort, row["student_id_ext"]) for row in students]
            answer = handle(service, batch(*students, cohort_id=cohort)).document
            assert answer["details"] == {
                "imported": sum(key not in known for key in keys),
                "updated": sum(key in known for key in keys),
                "unchanged": sum(known.get(key) == row for key, row in zip(keys, students))}
            known.update(zip(keys, students))
        assert len(rows_of(service)) == len(known)

    def test_a_sync_leaves_a_line_in_the_history_with_its_first_100_errors(
            self, service: sis_sync.Service) -> None:
        handle(service, batch(student(1), *([{}] * 150)), peer="192.0.2.7")
        connection = service.roster._connection
        assert connection
        (row,) = connection.execute(
            "SELECT institution, cohort_id, client, received, new, updated, unchanged, rejected, "
            "errors FROM syncs").fetchall()
        assert row[:-1] == ("example", "2026", "192.0.2.7", 151, 1, 0, 0, 150)
        assert [error["row"] for error in json.loads(row[-1])] == list(range(2, 102))

    def test_the_history_is_kept_for_400_days(self, service: sis_sync.Service, monkeypatch: Any) -> None:
        start = time.time()
        for day in (0, 1, 400.5):
            monkeypatch.setattr(time, "time", lambda day=day: start + day * 86400)
            handle(service, batch())
        connection = service.roster._connection
        assert connection
        assert connection.execute("SELECT count(*) FROM syncs").fetchall() == [(2,)]

    @posix
    def test_kill_9_loses_nothing_that_was_answered_and_leaves_nothing_half_done(
            self, tmp_path: pathlib.Path) -> None:
        process = Process(tmp_path, ini_of())
        done: dict[str, bool] = {}
        ended = threading.Event()

        def keep_pushing(name: str) -> None:
            for number in itertools.count():
                cohort = f"{name}-{number}"
                done[cohort] = False
                with contextlib.suppress(OSError, AssertionError):
                    done[cohort] = process.push(*map(student, range(200)), cohort_id=cohort).status == 200
                if ended.is_set():
                    return

        for round_number in range(12):
            ended.clear()
            threads = [threading.Thread(target=keep_pushing, args=(f"{round_number}-{name}",)) for name in "ab"]
            for thread in threads:
                thread.start()
            threading.Event().wait(random.uniform(0.02, 0.3))   # the moment is what is random
            process.process.kill()
            ended.set()
            for thread in threads:
                thread.join()
            process.stop()
            process.start()
        process.stop()
        kept = dict(process.rows("SELECT cohort_id, count(*) FROM entries JOIN rosters "
                                 "USING (roster_id) GROUP BY cohort_id"))
        history = dict(process.rows("SELECT cohort_id, new FROM syncs"))
        answered = {cohort for cohort, was_answered in done.items() if was_answered}
        assert len(answered) > 12
        assert answered <= set(kept) <= set(done)
        assert set(kept.values()) == {200}
        assert kept == history
        assert process.rows("PRAGMA integrity_check") == [("ok",)]


# ---------------------------------------------------------------------------------------------
# Section 3: errors
# ---------------------------------------------------------------------------------------------

JSON_FAULTS = [
    ("empty", b"", "the body is empty"),
    ("not JSON", b"{'cohort_id': 1}", "the body is not JSON"),
    ("cut off", b'{"cohort_id": "20', "the body is not JSON"),
    ("two documents", b"{} {}", "the body is not JSON"),
    ("NaN", b'{"x": NaN}', "NaN is not JSON"), ("Infinity", b'{"x": Infinity}', "Infinity is not JSON"),
    ("-Infinity", b'{"x": -Infinity}', "-Infinity is not JSON"),
    ("nested", b"[" * 100_000, "the body is nested too deep"),
    ("nested and closed", b"[" * 100_000 + b"]" * 100_000, "the body is nested too deep"),
    ("objects nested", b'{"a":' * 100_000, "the body is nested too deep"),
    ("long number", b'{"x": ' + b"9" * 9000 + b"}", "a number of more than 1000 digits"),
    ("long fraction", b'{"x": 0.' + b"9" * 9000 + b"}", "a number of more than 1000 digits"),
    ("latin-1", '{"x": "Zoë"}'.encode("latin-1"), "the body is not UTF-8 at byte 9"),
    ("UTF-16", '{"x": 1}'.encode("utf-16"), "the body is not UTF-8 at byte 0"),
    ("UTF-16 without a BOM", '{"x": 1}'.encode("utf-16-le"), "the body is not JSON"),
    ("UTF-32", '{"x": 1}'.encode("utf-32"), "the body is not UTF-8 at byte 0"),
    ("a surrogate in bytes", b'{"x": "\xed\xa0\x80"}', "the body is not UTF-8 at byte 7"),
    ("a bare control character", b'{"x": "\x01"}', "the body is not JSON"),
    ("gzip that is none", None, "broken or cut off gzip"),
]
BODY_FAULTS: list[tuple[str, Any, str, str]] = [
    ("an array", [], "invalid_field", "body"), ("a string", "x", "invalid_field", "body"),
    ("null", None, "invalid_field", "body"), ("a number", 1, "invalid_field", "body"),
    ("no cohort", {"students": []}, "missing_field", "cohort_id"),
    ("cohort null", {"cohort_id": None, "students": []}, "missing_field", "cohort_id"),
    ("cohort blank", {"cohort_id": " \t", "students": []}, "missing_field", "cohort_id"),
    ("cohort a number", {"cohort_id": 2026, "students": []}, "invalid_field", "cohort_id"),
    ("cohort too long", {"cohort_id": "x" * 65, "students": []}, "invalid_field", "cohort_id"),
    ("cohort with NUL", {"cohort_id": "a\0b", "students": []}, "invalid_field", "cohort_id"),
    ("cohort half a pair", {"cohort_id": "a\ud83db", "students": []}, "invalid_field", "cohort_id"),
    ("no students", {"cohort_id": "1"}, "missing_field", "students"),
    ("students null", {"cohort_id": "1", "students": None}, "missing_field", "students"),
    ("students an object", {"cohort_id": "1", "students": student()}, "invalid_field", "students"),
    ("students a string", {"cohort_id": "1", "students": "x"}, "invalid_field", "students"),
]


class TestErrors:
    @pytest.mark.parametrize("name, body, detail", JSON_FAULTS, ids=[row[0] for row in JSON_FAULTS])
    def test_what_is_not_json_is_malformed_json(self, server: Process, name: str, body: bytes | None,
                                                detail: str) -> None:
        answer = server.exchange(request_of(b"no gzip", Content_Encoding="gzip") if body is None
                                 else request_of(body))
        assert (answer.status, answer.code) == (400, "malformed_json")
        assert detail in answer.document["detail"]

    @pytest.mark.parametrize("name, body, code, field", BODY_FAULTS, ids=[row[0] for row in BODY_FAULTS])
    def test_a_body_that_breaks_a_rule_names_its_field(self, server: Process, name: str, body: Any,
                                                       code: str, field: str) -> None:
        answer = server.exchange(request_of(json.dumps(body).encode()))
        assert (answer.status, answer.code, answer.document["field"]) == (400, code, field)

    def test_a_cohort_of_64_characters_and_a_bom_are_fine(self, server: Process) -> None:
        body = b"\xef\xbb\xbf" + json.dumps(batch(cohort_id=" " + "ü" * 64 + " ")).encode()
        assert server.exchange(request_of(body)).status == 200

    def test_of_two_equal_keys_the_last_one_counts(self, server: Process) -> None:
        answer = server.exchange(request_of(b'{"cohort_id": 1, "cohort_id": "1", "students": []}'))
        assert answer.status == 200

    def test_a_cohort_that_is_not_listed_is_unknown(self, server: Process) -> None:
        answer = server.push(cohort_id="2028", secret=OTHER_SECRET)
        assert (answer.status, answer.code) == (400, "unknown_cohort")
        assert server.push(cohort_id="2027", secret=OTHER_SECRET).status == 200

    @pytest.mark.parametrize("authorization", [
        None, "", "Bearer", "Bearer ", "Bearer  ", "Basic " + SECRET, SECRET, "Bearer " + SECRET[:-1],
        "Bearer " + SECRET + "x", "Bearer x" + SECRET[1:], f"Bearer {SECRET} {SECRET}",
        f"Bearer {SECRET}, Bearer {SECRET}", "Bearer Zo\xeb", "Bearer " + "x" * 4000,
        "Bearer " + hashlib.sha256(SECRET.encode()).hexdigest()])
    def test_whoever_has_no_secret_gets_one_and_the_same_answer(self, server: Process,
                                                                authorization: str | None) -> None:
        answer = server.exchange(head_of(Authorization=authorization, Content_Length=0))
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.document == {"error": "unauthorized",
                                   "detail": "the Authorization header holds no valid secret"}

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
    def test_the_scheme_is_known_in_any_case(self, server: Process, scheme: str) -> None:
        assert server.exchange(request_of(batch(), Authorization=f"{scheme} {SECRET}")).status == 200

    def test_a_secret_beyond_ascii_works(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(), environment={"SIS_SYNC_SECRET": "ein-langes-Geheimnis-ß-王"}) as process:
            secret = "ein-langes-Geheimnis-ß-王".encode().decode("latin-1")
            assert process.push(secret=secret).status == 200

    @pytest.mark.parametrize("path", ["/", "/api/sis/sync/", "/api/sis", "//api/sis/sync", "/healthz2",
                                      "/API/SIS/SYNC", "/api/sis/sync%20"])
    def test_another_path_is_not_found(self, server: Process, path: str) -> None:
        assert server.exchange(head_of("POST", path)).code == "not_found"

    @pytest.mark.parametrize("method, path, allow", [
        *((method, SYNC, "POST") for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")),
        *((method, path, "GET, HEAD") for method in ("POST", "DELETE")
          for path in ("/healthz", "/openapi.json"))])
    def test_another_method_is_not_allowed_and_the_right_one_named(
            self, server: Process, method: str, path: str, allow: str) -> None:
        answer = server.exchange(head_of(method, path))
        assert (answer.status, answer.code, answer.headers["allow"]) == (405, "method_not_allowed", allow)

    def test_a_refusal_of_the_headers_knows_the_request_line(self, server: Process) -> None:
        assert server.exchange(b"HEAD / HTTP/1.1\r\nX: " + b"x" * 17000 + b"\r\n\r\n").status == 431   # and no body
        with server.connect() as connection:
            connection.sendall(b"GET /old HTTP/1.0\r\nX: y\r\n folded\r\n\r\n")
            assert read_to_end(connection).startswith(b"HTTP/1.0 400 Bad Request\r\n")
        server.wait_for("GET /old 400 .*malformed_request: a header must be")

    def test_head_on_the_endpoint_is_a_405_without_a_body(self, server: Process) -> None:
        assert server.exchange(head_of("HEAD", SYNC)).status == 405

    @pytest.mark.parametrize("method", ["post", "BREW", "PROPFIND"])
    def test_an_unknown_method_is_not_implemented(self, server: Process, method: str) -> None:
        assert server.exchange(head_of(method, SYNC)).code == "not_implemented"

    @pytest.mark.parametrize("content_type, status", [
        (None, 200), ("application/json", 200), ("Application/JSON; charset=UTF-8", 200),
        ('application/json;charset="utf-8"', 200), ("application/json; odata=verbose", 200),
        ("application/json; charset=latin-1", 415), ("text/plain", 415), ("text/json", 415), ("", 415),
        ("application/x-www-form-urlencoded", 415), ("application/json, text/plain", 415)])
    def test_the_media_type_must_be_json(self, server: Process, content_type: str | None,
                                         status: int) -> None:
        answer = server.exchange(request_of(batch(), Content_Type=content_type))
        assert answer.status == status
        assert status == 200 or answer.code == "unsupported_media_type"

    @pytest.mark.parametrize("coding, status", [
        ("identity", 200), ("gzip", 200), ("GZIP", 200), ("x-gzip", 200), ("br", 415), ("deflate", 415),
        ("gzip, gzip", 415), ("zstd", 415)])
    def test_the_content_coding_must_be_gzip_or_none(self, server: Process, coding: str,
                                                     status: int) -> None:
        body = json.dumps(batch(student())).encode()
        if "gzip" in coding.lower():
            body = gzip.compress(body[:20]) + gzip.compress(body[20:])
        answer = server.exchange(request_of(body, Content_Encoding=coding))
        assert answer.status == status
        assert status == 200 or answer.code == "unsupported_media_type"

    def test_a_gzip_bomb_is_too_large_and_a_torn_one_malformed(self, server: Process) -> None:
        bomb = gzip.compress(b" " * (64 << 20))
        assert len(bomb) < 100_000
        answer = server.exchange(request_of(bomb, Content_Encoding="gzip"))
        assert (answer.status, answer.code) == (413, "batch_too_large")
        for torn in (bomb[:100], gzip.compress(b"{}")[:-1], gzip.compress(b"{}")[:-8] + b"12345678"):
            answer = server.exchange(request_of(torn, Content_Encoding="gzip"))
            assert (answer.status, answer.code) == (400, "malformed_json")

    def test_5000_students_are_taken_and_5001_are_too_many(self, server: Process) -> None:
        students = [student(f"many{number}") for number in range(5001)]
        assert server.push(*students[:5000]).document["imported"] == 5000
        answer = server.push(*students)
        assert (answer.status, answer.code, answer.document["max"]) == (413, "batch_too_large", 5000)
        assert "max_bytes" not in answer.document

    def test_more_bytes_than_the_cap_are_refused_before_they_are_read(self, server: Process) -> None:
        for length in (8 * 1024 * 1024 + 1, 10 ** 13, 10 ** 900):
            answer = server.exchange(head_of(Content_Length=length))     # not a byte of it is sent
            assert (answer.status, answer.code) == (413, "batch_too_large")
            assert (answer.document["max"], answer.document["max_bytes"]) == (5000, 8388608)
        spaces = b" " * (8 * 1024 * 1024 - 2) + b"{}"
        assert server.exchange(request_of(spaces)).code == "missing_field"

    def test_every_error_says_what_the_table_says(self) -> None:
        for problem in sis_sync.ERRORS:
            answer = sis_sync.Response.of_refusal(sis_sync.Refusal(problem.code, status=problem.status))
            assert json.loads(answer.body) == {"error": problem.code, "detail": problem.meaning}
            assert answer.status == problem.status


class TestOrder:
    """Each of these requests has every fault from its own on; the first is answered."""

    ORDER = ("malformed_request", "not_implemented", "not_found", "method_not_allowed",
             "unauthorized", "batch_too_large", "unsupported_media_type", "malformed_json",
             "missing_field", "invalid_field")

    @pytest.mark.parametrize("code", ORDER)
    def test_the_first_fault_in_the_order_of_the_contract_is_answered(self, server: Process,
                                                                     code: str) -> None:
        fine = self.ORDER.index(code)
        body = [b"{}" if fine == 8 else b'{"cohort_id": "1", "students": 1}' if fine == 9 else b"{"][0]
        data = head_of(
            "BREW" if fine < 2 else "PUT" if fine < 4 else "POST", "/nowhere" if fine < 3 else SYNC,
            secret="wrong" if fine < 5 else SECRET,
            Content_Length=10 ** 9 if fine < 6 else len(body),
            Content_Type="text/plain" if fine < 7 else "application/json",
            **({"Transfer_Encoding": "chunked"} if fine < 1 else {}))
        assert server.exchange(data + (b"" if fine < 6 else body)).code == code

    def test_without_any_secret_set_even_a_stranger_gets_503(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(), environment={"SIS_SYNC_SECRET": ""}) as process:
            answer = process.exchange(head_of(secret="anything", Content_Length=10 ** 9))
            assert (answer.status, answer.code) == (503, "not_configured")
            assert process.exchange(head_of("GET")).code == "method_not_allowed"
            assert process.exchange(head_of("GET", "/healthz")).status == 200

    def test_nobody_without_a_secret_makes_the_server_read_a_body(self, service: sis_sync.Service) -> None:
        class Untouchable:
            def read(self, size: int) -> bytes:
                raise AssertionError("the body was read")

        for headers in ({}, {"authorization": "Bearer wrong"},
                        {"authorization": f"Bearer {SECRET}", "content-type": "text/plain"},
                        {"authorization": f"Bearer {SECRET}", "content-length": "9999999999"}):
            response = service.handle(sis_sync.Request(
                "192.0.2.1", "POST", SYNC, headers=headers, body=Untouchable()))
            assert response.status in (401, 413, 415)


class TestRateLimit:
    def test_a_burst_of_20_is_granted_and_then_one_every_3_seconds(self) -> None:
        limiter, now = sis_sync.RateLimiter(), 12345.678
        assert [limiter.take("a", 20, now) for _ in range(22)] == [0] * 20 + [3, 3]
        assert limiter.take("b", 20, now) == 0
        assert limiter.take("a", 20, now + 1.5) == 2
        assert limiter.take("a", 20, now + 2.99) == 1
        assert limiter.take("a", 20, now + 3) == 0
        assert limiter.take("a", 20, now + 3) == 3

    @pytest.mark.parametrize("per_minute", [1, 7, 20, 60, 999, 100_000])
    def test_a_retry_after_the_seconds_told_succeeds(self, per_minute: int) -> None:
        limiter, now = sis_sync.RateLimiter(), 0.1
        granted = 0
        for _ in range(3 * min(per_minute, 100)):
            wait = limiter.take("a", per_minute, now)
            if wait:
                now += wait
                assert limiter.take("a", per_minute, now) == 0
            granted += 1
        assert granted

    @pytest.mark.parametrize("per_minute", [1, 3, 7, 20, 49])
    def test_a_burst_is_as_large_as_the_number_says(self, per_minute: int) -> None:
        for now in (0.0, 0.1, 1e5 + 1 / 3, 1e9 + 1 / 7):
            limiter = sis_sync.RateLimiter()
            answers = [limiter.take("a", per_minute, now) for _ in range(per_minute + 1)]
            assert answers == [0] * per_minute + [math.ceil(60 / per_minute)]

    def test_the_memory_is_bounded_and_full_buckets_go_first(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(sis_sync, "MAX_BUCKETS", 100)
        limiter = sis_sync.RateLimiter()
        for number in range(95):
            limiter.take(f"old {number}", 20, 0.0)
        for _ in range(20):
            limiter.take("busy", 20, 10.0)
        for number in range(1000):
            limiter.take(f"new {number}", 20, 10.0 if number < 20 else 60.0)
            assert len(limiter._full_at) <= 100
        limiter = sis_sync.RateLimiter()
        for _ in range(20):
            limiter.take("busy", 20, 10.0)
        for number in range(150):
            limiter.take(f"old {number}", 20, 0.0 if number < 90 else 10.0)
        assert limiter.take("busy", 20, 10.0) > 0

    @pytest.mark.parametrize("live", [10, 45, 50, 70, 89, 90])
    def test_making_room_for_one_client_forgets_no_other_that_is_not_full(self, monkeypatch: Any, live: int) -> None:
        monkeypatch.setattr(sis_sync, "MAX_BUCKETS", 100)
        limiter = sis_sync.RateLimiter()
        for number in range(100 - live):
            limiter.take(f"full {number}", 20, 0.0)
        for number in range(live):
            for _ in range(20):
                limiter.take(f"live {number}", 20, 10.0)
        limiter.take("one more", 20, 10.0)
        assert len(limiter._full_at) <= 100
        # Past nine tenths there is no room for all; the one least recently used goes.
        assert all(limiter.take(f"live {number}", 20, 10.0) for number in range(live == 90, live))

    def test_a_refusal_tells_when_to_come_back_and_spends_nothing(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits="requests_per_minute = 20")) as process:
            answers = [process.push(student(number)) for number in range(23)]
            assert [answer.status for answer in answers[:20]] == [200] * 20
            assert [answer.status for answer in answers[20:]] == [429] * 3
            for answer in answers[20:]:
                assert answer.code == "rate_limited"
                assert answer.headers["retry-after"] == str(answer.document["retry_after"])
                assert 1 <= answer.document["retry_after"] <= 3
            assert process.rows("SELECT count(*) FROM entries") == [(20,)]
            # The strangers of this address have a bucket of their own, and it is not full yet.
            wrong = [process.push(secret="wrong").status for _ in range(21)]
            assert wrong == [401] * 20 + [429]
            assert process.exchange(head_of("GET", "/healthz")).status == 200
            assert process.exchange(head_of("GET", "/openapi.json")).status == 200

    def test_a_stranger_spends_nothing_of_an_institution_s_allowance(self, service: sis_sync.Service) -> None:
        service.configuration = service.configuration._replace(
            settings={**service.configuration.settings, "requests_per_minute": 2})
        assert [handle(service, batch(), authorization="Bearer x").status for _ in range(3)] == [401, 401, 429]
        assert [handle(service, batch()).status for _ in range(3)] == [200, 200, 429]
        assert handle(service, batch(), peer="192.0.2.2").status == 429     # the institution, not the address
        assert handle(service, batch(), authorization="Bearer x", peer="192.0.2.2").status == 401

    @pytest.mark.parametrize("one, other, same", [
        ("192.0.2.1", "192.0.2.2", False), ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False), ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True)])
    def test_an_ipv6_client_is_its_64(self, one: str, other: str, same: bool) -> None:
        keys = [sis_sync.client_key(sis_sync.client_address(address, "", ())) for address in (one, other)]
        assert (keys[0] == keys[1]) is same


def test_a_secret_is_compared_with_every_digest_whatever_came_before(monkeypatch: Any) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(5)]
    institutions = [sis_sync.Institution("a", tuple(digests[:2]), {}),
                    sis_sync.Institution("b", tuple(digests[2:]), {})]
    for header in ("Bearer \x00", "Bearer \x04", "Bearer wrong", "Basic \x00", ""):
        compared.clear()
        sis_sync.institution_of(header, institutions)
        assert compared == digests


# ---------------------------------------------------------------------------------------------
# Section 4: other routes
# ---------------------------------------------------------------------------------------------

class TestOtherRoutes:
    def test_healthz_says_ok_without_a_secret(self, server: Process) -> None:
        answer = server.exchange(head_of("GET", "/healthz?probe=1", secret=None))
        assert (answer.status, answer.document) == (200, {"status": "ok"})

    def test_head_is_get_without_the_body(self, server: Process) -> None:
        for path in ("/healthz", "/openapi.json"):
            length = server.exchange(head_of("GET", path)).headers["content-length"]
            answer = server.exchange(head_of("HEAD", path))
            assert (answer.status, answer.headers["content-length"]) == (200, length)

    def test_openapi_says_what_the_tables_say(self, server: Process) -> None:
        document = server.exchange(head_of("GET", "/openapi.json", secret=None)).document
        assert document["openapi"] == "3.1.0"
        schemas = document["components"]["schemas"]
        assert list(schemas["Student"]["properties"]) == list(sis_sync.NAMES)
        assert schemas["Student"]["required"] == ["student_id_ext", "email"]
        for field in sis_sync.FIELDS:
            schema = schemas["Student"]["properties"][field.name]
            assert schema.get("maxLength", 0) == field.longest
            assert ("null" in schema["type"]) is not field.required
        assert schemas["Batch"]["properties"]["students"]["maxItems"] == 5000
        assert {item["const"] for item in schemas["RowError"]["properties"]["error"]["oneOf"]} == set(
            sis_sync.ROW_ERRORS)
        described = {(int(status), item["const"])
                     for path in document["paths"].values() for operation in path.values()
                     for status, answer in operation["responses"].items() if status != "200"
                     for item in answer["content"]["application/json"]["schema"]["properties"]["error"]["oneOf"]}
        assert described == {(problem.status, problem.code) for problem in sis_sync.ERRORS}
        assert set(sis_sync.CARRIED) == {name for problem in sis_sync.ERRORS for name in problem.carries}

        def references(node: Any) -> Iterator[str]:
            for key, value in (node.items() if isinstance(node, dict) else enumerate(node)):
                if key == "$ref":
                    yield value
                elif isinstance(value, (dict, list)):
                    yield from references(value)

        found = set(references(document))
        assert found == {f"#/components/schemas/{name}" for name in schemas}


# ---------------------------------------------------------------------------------------------
# Section 5: configuration
# ---------------------------------------------------------------------------------------------

SETTING_VALUES = {     # key: good text, what it is read as, bad texts
    "host": ("::1", "::1", ["localhost", "", "127.0.0.1 ; comment", "1.2.3"]),
    "port": ("0", 0, ["-1", "65536", "+5", "8_0", "٥", "80 80", "", "8080 # web", "80.0"]),
    "database": ("a b.db", None, ["a\n  b"]),
    "tls_certificate": ("", "", ["a\n  b", "missing.pem"]),
    "tls_key": ("", "", ["key-without-certificate.pem"]),
    "trusted_proxies": ("10.0.0.0/8, ::1", None, ["10.0.0.1/8", "proxy.example", "10.0.0.0/99"]),
    "requests_per_minute": ("1", 1, ["0", "-1", "many"]),
    "max_students": ("100", 100, ["0", "1e3"]),
    "max_body_bytes": ("1024", 1024, ["1023", "8 MiB"]),
    "max_connections": ("1", 1, ["0"]),
    "max_connections_per_client": ("1", 1, ["0"]),
    "request_timeout": ("1", 1, ["0", "3601", "0.5"]),
    "secrets": ("env:SIS_SYNC_SECRET", None, ["hunter2", "env:", "env:A-B", "sha256:12", "file:",
                                              "sha256:" + "g" * 64, "env:A, env:B"]),
    "cohorts": ("a, b\n  c d", frozenset(("a", "b", "c d")), []),
    "programs": ("a,,b,", frozenset(("a", "b")), []),
    "campuses": ("", frozenset(), []),
    "bad_rows": ("reject", "reject", ["Reject", "no", ""]),
}


def section_of(setting: sis_sync.Setting) -> str:
    return "institution test" if setting.section == "institution" else setting.section


class TestConfiguration:
    def test_every_setting_is_in_the_corpus(self) -> None:
        assert [setting.key for setting in sis_sync.SETTINGS] == list(SETTING_VALUES)

    @pytest.mark.parametrize("setting", sis_sync.SETTINGS, ids=lambda setting: setting.key)
    def test_a_setting_is_read_and_its_default_taken_when_it_is_left_out(
            self, tmp_path: pathlib.Path, setting: sis_sync.Setting) -> None:
        text, value, _ = SETTING_VALUES[setting.key]
        left_out = configuration_of(tmp_path, "[institution test]\n")
        spelt_out = configuration_of(
            tmp_path, f"[{section_of(setting)}]\n{setting.key} = {setting.default}\n")
        assert left_out.settings == spelt_out.settings
        assert left_out.institutions[0][1:] == spelt_out.institutions[0][1:]
        configuration = configuration_of(tmp_path, f"[{section_of(setting)}]\n{setting.key} = {text}\n")
        institution = configuration.institutions[0]
        found = {**configuration.settings, **institution.lists, "bad_rows": institution.bad_rows}
        if value is not None:
            assert found[setting.key] == value

    @pytest.mark.parametrize("key, text", [(key, text) for key, row in SETTING_VALUES.items()
                                           for text in row[2]])
    def test_a_bad_value_is_refused_with_section_key_and_what_is_allowed(
            self, tmp_path: pathlib.Path, key: str, text: str) -> None:
        (setting,) = (setting for setting in sis_sync.SETTINGS if setting.key == key)
        (fault,) = faults_of(tmp_path, f"[{section_of(setting)}]\n{key} = {text}\n")
        assert fault.startswith(f"[{section_of(setting)}] ") and key in fault
        if key == "secrets":
            assert fault == f"[institution test] secrets: found something else; allowed: {setting.kind.allowed}"
        elif not key.startswith("tls"):
            found = "\n".join(line.strip() for line in text.splitlines())
            assert fault.endswith(f" {key}: found {found!r}; allowed: {setting.kind.allowed}")

    def test_all_faults_are_told_at_once_each_with_the_nearest_name(self, tmp_path: pathlib.Path) -> None:
        keys = {section: ", ".join(setting.key for setting in sis_sync.SETTINGS if setting.section == section)
                for section in ("server", "limits", "institution")}
        assert faults_of(tmp_path, "[sever]\nport = 1\n[server]\nprot = 1\nport = x\n[limits]\n"
                         "max_student = 5\n[institution UPPER]\n[institution a]\nsecret = x\n"
                         "[DEFAULT]\nport = 1\n") == [
            f"[server] prot: unknown key; allowed: {keys['server']}; did you mean port?",
            "[server] port: found 'x'; allowed: a whole number from 0 to 65535",
            f"[limits] max_student: unknown key; allowed: {keys['limits']}; did you mean max_students?",
            *((f"[{name}]: unknown section; allowed: [server], [limits], [institution NAME] "
               f"(NAME: a-z, 0-9, hyphens){hint}") for name, hint in (
                  ("sever", "; did you mean server?"), ("institution UPPER", "; did you mean institution?"))),
            f"[institution a] secret: unknown key; allowed: {keys['institution']}; did you mean secrets?",
            ("[DEFAULT]: unknown section; allowed: [server], [limits], [institution NAME] "
             "(NAME: a-z, 0-9, hyphens)")]

    @pytest.mark.parametrize("text, fault", [
        ("port = 1\n", "line 1: stands before the first [section]"),
        ("[server]\nport\n", "line 2: is neither [section] nor key = value"),
        ("[server]\nport = 1\nport = 2\n", "[server] port: stands twice (line 3)"),
        ("[limits]\n[limits]\n", "[limits] : stands twice (line 2)")])
    def test_what_is_no_ini_file_is_refused_without_showing_its_lines(
            self, tmp_path: pathlib.Path, text: str, fault: str) -> None:
        assert fault in faults_of(tmp_path, text)

    def test_a_bom_and_a_percent_sign_do_no_harm(self, tmp_path: pathlib.Path) -> None:
        configuration = configuration_of(tmp_path, "\ufeff[server]\ndatabase = 100%s.db\n")
        assert configuration.settings["database"] == str(tmp_path / "100%s.db")

    def test_a_file_that_is_not_utf_8_or_not_there_is_refused(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "latin.ini").write_bytes("[server]\n# Zoë\n".encode("latin-1"))
        for name, words in (("latin.ini", "it is not UTF-8"), ("missing.ini", "No such file")):
            for path, environment in ((str(tmp_path / name), {}),
                                      (None, {"SIS_SYNC_CONFIG": str(tmp_path / name)})):
                with pytest.raises(sis_sync.CommandError, match=words):
                    sis_sync.load_configuration(path, environment)

    def test_without_a_file_there_is_one_institution(self, monkeypatch: Any, tmp_path: pathlib.Path) -> None:
        monkeypatch.setattr(sis_sync, "DEFAULT_FILE", tmp_path / "sis_sync.ini")
        configuration = sis_sync.load_configuration(None, {"SIS_SYNC_SECRET": SECRET})
        assert configuration.institutions == (sis_sync.Institution(
            "default", (hashlib.sha256(SECRET.encode()).digest(),),
            dict.fromkeys(sis_sync.LISTS, frozenset()), "skip"),)
        assert configuration.settings["database"] == str(tmp_path / "sis_sync.db")
        assert not configuration.warnings

    def test_a_file_without_an_institution_has_the_default_one(self, tmp_path: pathlib.Path) -> None:
        assert configuration_of(tmp_path, "[server]\n").institutions[0].name == "default"

    def test_secrets_come_from_the_environment_files_and_digests(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "secret.txt").write_text(f"\ufeff{OTHER_SECRET}\r\n", "utf-8")
        digest = hashlib.sha256(b"third").hexdigest()
        configuration = configuration_of(
            tmp_path, "[institution a]\nsecrets = env:SIS_SYNC_SECRET file:secret.txt\n"
            f"  sha256:{digest.upper()}\n")
        (institution,) = configuration.institutions
        assert institution.digests == (hashlib.sha256(SECRET.encode()).digest(),
                                       hashlib.sha256(OTHER_SECRET.encode()).digest(),
                                       bytes.fromhex(digest))
        for secret in (SECRET, OTHER_SECRET, "third"):
            assert sis_sync.institution_of(f"Bearer {secret}", [institution]) is institution

    def test_a_secret_that_is_not_set_is_a_warning(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "empty.txt").write_text("\n")
        configuration = configuration_of(
            tmp_path, "[institution a]\nsecrets = env:NOT_SET file:missing.txt file:empty.txt\n")
        assert not configuration.configured
        assert configuration.warnings == (
            *(f"[institution a] secrets: {source} is missing, empty or not readable: it is not set"
              for source in ("env:NOT_SET", "file:missing.txt", "file:empty.txt")),
            "no institution has a secret set: every push will be answered 503")

    def test_a_short_secret_is_a_warning(self, tmp_path: pathlib.Path) -> None:
        for secret, warned in (("x" * 15, True), ("x" * 16, False)):
            assert bool(configuration_of(tmp_path, "", {"SIS_SYNC_SECRET": secret}).warnings) is warned

    def test_two_institutions_with_one_secret_and_the_digest_of_nothing_are_refused(
            self, tmp_path: pathlib.Path) -> None:
        digest = hashlib.sha256(SECRET.encode()).hexdigest()
        assert faults_of(tmp_path, "[institution a]\n[institution b]\n"
                         f"secrets = sha256:{digest}\n[institution c]\n"
                         f"secrets = sha256:{hashlib.sha256().hexdigest()}\n") == [
            "[institution b] secrets: one of them is also a's",
            "[institution c] secrets: the sha256 of no secret at all"]

    def test_an_address_open_to_others_without_tls_is_a_warning(self, tmp_path: pathlib.Path) -> None:
        for host, warned in (("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("192.0.2.1", True)):
            configuration = configuration_of(tmp_path, f"[server]\nhost = {host}\n")
            assert any("TLS" in warning for warning in configuration.warnings) is warned

    @pytest.mark.parametrize("peer, forwarded, client", [
        ("192.0.2.1", "198.51.100.1", "192.0.2.1"), ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"), ("10.0.0.1", "1.1.1.1, 198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.1, 10.0.0.2", "198.51.100.1"),
        ("10.0.0.1", "10.0.0.3,10.0.0.2", "10.0.0.3"), ("10.0.0.1", "1.1.1.1, junk", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.9:5123", "203.0.113.9"), ("10.0.0.1", "[2001:db8::1]:80", "2001:db8::1"),
        ("10.0.0.1", "[2001:db8::1]", "2001:db8::1"),
        ("::ffff:10.0.0.1", "2001:db8::1", "2001:db8::1"), ("", "1.1.1.1", "-")])
    def test_only_a_trusted_proxy_is_believed_and_only_as_far_as_it_wrote(
            self, tmp_path: pathlib.Path, peer: str, forwarded: str, client: str) -> None:
        settings = configuration_of(tmp_path, "[server]\ntrusted_proxies = 10.0.0.0/8\n").settings
        assert sis_sync.client_address(peer, forwarded, settings["trusted_proxies"]) == client

    def test_the_file_as_shipped_is_the_table_of_settings(self) -> None:
        text = (HERE / "sis_sync.ini").read_text("utf-8")
        for setting in sis_sync.SETTINGS:
            line = f"{setting.key} = {setting.default}".strip()
            assert f"# {setting.meaning}\n{line}\n" in text, setting.key
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text)
        assert {(name.partition(" ")[0], key) for name in parser.sections() for key in parser[name]} == {
            (setting.section, setting.key) for setting in sis_sync.SETTINGS}
        configuration = sis_sync.load_configuration(str(HERE / "sis_sync.ini"), {"SIS_SYNC_SECRET": SECRET})
        assert not configuration.warnings

    @posix
    def test_sighup_reads_the_file_again_and_a_faulty_one_changes_nothing(
            self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(institutions="[institution a]\nsecrets = env:SIS_SYNC_SECRET\n"),
                     environment={"NEXT": OTHER_SECRET}) as process:
            assert process.push(secret=OTHER_SECRET).status == 401
            process.ini.write_text(ini_of(limits=FAST + "max_students = 1", institutions=(
                "[institution a]\nsecrets = env:NEXT\ncohorts = 2026\n")))
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("reloaded")
            assert process.push(secret=OTHER_SECRET).status == 200
            assert process.push(secret=SECRET).status == 401
            assert process.push(cohort_id="2027", secret=OTHER_SECRET).code == "unknown_cohort"
            assert process.push(student(1), student(2), secret=OTHER_SECRET).document["max"] == 1
            process.ini.write_text("[limits]\nmax_students = none\n")
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("not reloaded: .*max_students")
            assert process.push(student(1), secret=OTHER_SECRET).status == 200

    def test_a_file_that_was_made_since_the_start_is_read_and_one_that_is_gone_changes_nothing(
            self, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(sis_sync, "DEFAULT_FILE", tmp_path / "sis_sync.ini")
        monkeypatch.setenv("SIS_SYNC_SECRET", SECRET)
        monkeypatch.delenv("SIS_SYNC_CONFIG", raising=False)
        service = sis_sync.Service(sis_sync.load_configuration())
        (tmp_path / "sis_sync.ini").write_text("[limits]\nmax_students = 7\n")
        for _ in range(2):
            sis_sync.reload(service, argparse.Namespace())
            assert service.configuration.settings["max_students"] == 7
            (tmp_path / "sis_sync.ini").unlink(missing_ok=True)
        service.roster.close()

    @posix
    @pytest.mark.parametrize("text", ["[server]\nport = 1\nport = 2\n", "[limits]\n[limits]\n", "\0",
                                      "[institution a]\nsecrets = file:a\0b\n", "[server]\ntls_key = a\0b\n", "no ini"])
    def test_no_file_however_odd_stops_a_running_server(self, tmp_path: pathlib.Path, text: str) -> None:
        with running(tmp_path, ini_of()) as process:
            process.ini.write_text(text)
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("not reloaded")
            assert process.push(student(1)).status == 200

    @posix
    def test_a_request_in_flight_finishes_under_the_old_configuration(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process:
            data = request_of(batch(student(1), student(2)))
            with process.connect() as connection:
                connection.sendall(data[:-20])
                self.wait_until_read(process)
                process.ini.write_text(ini_of(limits=FAST + "max_students = 1"))
                process.process.send_signal(signal.SIGHUP)
                process.wait_for("reloaded")
                connection.sendall(data[-20:])
                assert parse_answer(read_to_end(connection)).status == 200
            assert process.push(student(1), student(2)).status == 413

    @staticmethod
    def wait_until_read(process: Process) -> None:
        """An exchange that begins later has been answered: the earlier head has been read too."""
        for _ in range(5):
            assert process.exchange(head_of("GET", "/healthz")).status == 200

    def test_a_start_with_a_faulty_file_says_so_and_exits_2(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "bad.ini").write_text("[server]\nport = x\n[limit]\n")
        result = run_process("--config", tmp_path / "bad.ini")
        assert result.returncode == 2 and not result.stdout
        assert len(result.stderr.decode().splitlines()) == 2


# ---------------------------------------------------------------------------------------------
# Section 6: the server
# ---------------------------------------------------------------------------------------------

HOST = b"Host: localhost\r\n"
GET = b"GET /healthz HTTP/1.1\r\n"
MALFORMED = [       # name, bytes, status, code
    ("no Host", GET + b"\r\n", 400, "malformed_request"),
    ("two Hosts", GET + HOST + HOST + b"\r\n", 400, "malformed_request"),
    ("two different Hosts", GET + HOST + b"host: other\r\n\r\n", 400, "malformed_request"),
    ("a Host that is none", GET + b"Host: a b\r\n\r\n", 400, "malformed_request"),
    ("two spaces", b"GET  /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("a tab for a space", b"GET\t/healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("a trailing space", b"GET /healthz HTTP/1.1 \r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("a leading space", b" GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("NEL and NBSP for spaces", b"GET\x85/healthz\xa0HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("no version", b"GET /healthz\r\n\r\n", 400, "malformed_request"),
    ("one word", b"GET\r\n\r\n", 400, "malformed_request"),
    ("lower-case http", b"GET /healthz http/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("a target without a slash", b"GET healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("a fragment", b"GET /healthz#x HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("a target beyond ASCII", b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("an asterisk with GET", b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("a method that is no token", b"G(T /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("HTTP/0.9", b"HTTP/0.9 says hello\r\n\r\n", 400, "malformed_request"),
    ("HTTP/2.0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version_not_supported"),
    ("two Hosts in HTTP/1.0", b"GET /healthz HTTP/1.0\r\n" + HOST + HOST + b"\r\n", 400, "malformed_request"),
    ("HTTP/0.9, and then nothing", b"GET /healthz\r\n", 400, "malformed_request"),
    ("HTTP/2.0 with a path", b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505, "http_version_not_supported"),
    ("HTTP/1.2", b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", 505, "http_version_not_supported"),
    ("HTTP/1.10", b"GET / HTTP/1.10\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("LF alone", b"GET /healthz HTTP/1.1\nHost: x\n\n", 400, "malformed_request"),
    ("LF alone in one header", GET + b"Host: x\nX: y\r\n\r\n", 400, "malformed_request"),
    ("a bare CR", GET + HOST + b"X: a\rContent-Length: 5\r\n\r\n", 400, "malformed_request"),
    ("two CRs", GET + HOST + b"X: a\r\r\n\r\n", 400, "malformed_request"),
    ("NUL in a header", GET + HOST + b"X: a\0b\r\n\r\n", 400, "malformed_request"),
    ("DEL in a header", GET + HOST + b"X: a\x7fb\r\n\r\n", 400, "malformed_request"),
    ("ESC in the request line", b"GET /\x1b[31m HTTP/1.1\r\n" + HOST + b"\r\n", 400, "malformed_request"),
    ("a folded header", GET + HOST + b"X: a\r\n b\r\n\r\n", 400, "malformed_request"),
    ("a header folded by a tab", GET + b"Host: x\r\n\ty\r\n\r\n", 400, "malformed_request"),
    ("a space before the colon", GET + HOST + b"Content-Length : 5\r\n\r\n", 400, "malformed_request"),
    ("a header without a colon", GET + HOST + b"Authorization\r\n\r\n", 400, "malformed_request"),
    ("a header without a name", GET + HOST + b": x\r\n\r\n", 400, "malformed_request"),
    ("a name beyond ASCII", GET + HOST + b"X\xe9: x\r\n\r\n", 400, "malformed_request"),
    ("a second empty line first", b"\r\n\r\n" + GET + HOST + b"\r\n", 400, "malformed_request"),
    ("length and chunked", head_of(Content_Length=5, Transfer_Encoding="chunked"), 400, "malformed_request"),
    ("two lengths", GET + HOST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n", 400, "malformed_request"),
    *((f"a length of {length!r}", head_of(Content_Length=length), 400, "malformed_request")
      for length in ("+5", "-1", "5_000", "0x5", "5, 5", "", "5 5", "\xb2", "1e3", "9" * 4001)),
    *((f"Transfer-Encoding {coding!r}", head_of(Transfer_Encoding=coding), 501, "not_implemented")
      for coding in ("gzip", "identity", "gzip, chunked", "chunked, chunked", "", "xchunked")),
    ("chunked in HTTP/1.0", head_of(version="HTTP/1.0", Transfer_Encoding="chunked"), 400, "malformed_request"),
    ("TLS on a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed_request"),
    ("a long request line", b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414, "request_too_large"),
    ("an endless request line", b"x" * 20000, 414, "request_too_large"),
    ("long headers", GET + HOST + b"X: " + b"x" * 17000 + b"\r\n\r\n", 431, "request_too_large"),
    ("many headers", GET + HOST + b"X: x\r\n" * 101 + b"\r\n", 431, "request_too_large"),
    ("endless headers", GET + b"X: x\r\n" * 5000, 431, "request_too_large"),
]
CHUNK_FAULTS = [
    b"x\r\n", b"\r\n", b"-1\r\n", b"0x5\r\nabcde\r\n", b"5\nabcde\r\n", b"5\r\nabcdef\r\n", b" 5\r\nabcde\r\n",
    b"5\r\nabcde0\r\n\r\n", b"5_0\r\n", b"+5\r\nabcde\r\n", b"5;" + b"x" * 300 + b"\r\nabcde\r\n",
    b"1" * 17 + b"\r\n", b"5;a\x01\r\nabcde\r\n0\r\n\r\n", b"5\nabcde\n", b"2\r\n{}\r\n0\r\nbad trailer\r\n\r\n",
    b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"2\r\n{}\r\n00\r\n folded\r\n\r\n"]


def chunked(body: bytes, size: int, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    pieces = [body[start:start + size] for start in range(0, len(body), size)]
    return b"".join(b"%X%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces) + \
        b"0\r\n" + trailer + b"\r\n"


class TestStrictHTTP:
    @pytest.mark.parametrize("name, data, status, code", MALFORMED, ids=[row[0] for row in MALFORMED])
    def test_what_rfc_9112_does_not_allow_is_refused_and_the_connection_closed(
            self, server: Process, name: str, data: bytes, status: int, code: str) -> None:
        answer = server.exchange(data)      # reads to the end of the connection
        assert (answer.status, answer.code) == (status, code)

    @pytest.mark.parametrize("body", CHUNK_FAULTS)
    def test_faulty_chunks_are_refused(self, server: Process, body: bytes) -> None:
        answer = server.exchange(head_of(Transfer_Encoding="chunked") + body)
        assert (answer.status, answer.code) == (400, "malformed_request")

    def test_nothing_that_follows_a_request_is_taken_for_another(self, server: Process) -> None:
        smuggled = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"
        for data in (head_of("GET", "/healthz"), head_of("POST", SYNC, secret=None, Content_Length=5),
                     request_of(batch()), head_of(Transfer_Encoding="chunked") + chunked(b"{}", 1),
                     head_of(Content_Length=5, Transfer_Encoding="chunked") + b"0\r\n\r\n",
                     head_of("GET", "/healthz", Content_Length=3)):
            server.exchange(data + smuggled)
        # Whatever is read after this marker was written after it.
        server.exchange(head_of("GET", "/marker"))
        server.wait_for("/marker")
        assert not any("/smuggled" in line for line in server.log)

    @pytest.mark.parametrize("data", [
        b"\r\n" + GET + HOST + b"\r\n", GET + b"hOsT:localhost:8080\r\n\r\n", GET + b"Host:\t[::1]:80 \r\n\r\n",
        GET + b"Host: \r\n\r\n", b"GET http://example.edu/healthz HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET HTTPS://example.edu:1/healthz?a=b HTTP/1.1\r\n" + HOST + b"\r\n", GET + HOST + b"X:\r\n\r\n",
        GET + HOST + b"X: caf\xe9 \t \r\n\r\n", GET + HOST + b"Expect: something\r\n\r\n"])
    def test_what_rfc_9112_allows_is_answered(self, server: Process, data: bytes) -> None:
        assert server.exchange(data).status == 200
        assert server.exchange(data, size=1).status == 200     # byte by byte

    def test_http_1_0_is_answered_as_such_and_needs_no_host(self, server: Process) -> None:
        with server.connect() as connection:
            connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert read_to_end(connection).startswith(b"HTTP/1.0 200 OK\r\n")

    def test_the_forms_of_a_target_that_have_no_path_are_understood(self, server: Process) -> None:
        assert server.exchange(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n").code == "not_found"
        assert server.exchange(b"CONNECT example.edu:443 HTTP/1.1\r\n" + HOST + b"\r\n").code == "not_found"
        assert server.exchange(b"GET http://example.edu HTTP/1.1\r\n" + HOST + b"\r\n").code == "not_found"

    def test_a_client_that_comes_and_goes_without_a_word_is_no_line_in_the_log(self, server: Process) -> None:
        lines = self.lines_so_far(server, "/before-nothing")
        with server.connect() as connection:
            connection.shutdown(socket.SHUT_WR)
            assert read_to_end(connection) == b""
        assert self.lines_so_far(server, "/after-nothing") == lines + 1

    @staticmethod
    def lines_so_far(server: Process, marker: str) -> int:
        """How long the log is, with a request of our own as its last line."""
        server.exchange(head_of("GET", marker))
        server.wait_for(f"{marker} 404")
        return len(server.log)

    def test_a_whole_push_byte_by_byte_is_the_same_push(self, server: Process) -> None:
        data = request_of(batch(student("slow"), {}))
        assert server.exchange(data, size=1).document["imported"] == 1


class TestBodies:
    BODY = json.dumps(batch(*(student(f"chunk{number}", last_name="Zoë") for number in range(300)))).encode()

    @pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
    def test_a_chunked_body_is_read(self, server: Process, size: int) -> None:
        answer = server.exchange(head_of(Transfer_Encoding="Chunked") + chunked(
            self.BODY, size, b" ; name=\"value\"", b"X-Checksum: 1\r\n"), size=4096)
        assert answer.document["imported"] == 300

    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_gzip_and_chunked_go_together(self, server: Process, size: int) -> None:
        body = gzip.compress(self.BODY[:50]) + gzip.compress(self.BODY[50:])
        answer = server.exchange(head_of(Transfer_Encoding="chunked", Content_Encoding="gzip") + chunked(body, size))
        assert answer.document["imported"] == 300

    def test_gzip_is_read_in_whatever_pieces_it_comes(self, server: Process) -> None:
        body = gzip.compress(json.dumps(batch(student("pieces"))).encode())
        assert server.exchange(request_of(body, Content_Encoding="gzip"), size=1).document["imported"] == 1

    def test_a_chunked_body_over_the_cap_is_too_large(self, server: Process) -> None:
        answer = server.exchange(head_of(Transfer_Encoding="chunked") + chunked(b" " * (9 << 20), 65536))
        assert (answer.status, answer.document["max_bytes"]) == (413, 8388608)

    def test_a_promised_chunk_is_not_waited_for_beyond_the_cap(self, server: Process) -> None:
        data = head_of(Transfer_Encoding="chunked") + b"FFFFFFFFFF\r\n" + b" " * (8 << 20) + b"xx"
        assert server.exchange(data).code == "batch_too_large"

    def test_no_body_at_all_is_an_empty_one(self, server: Process) -> None:
        assert server.exchange(head_of()).document["detail"] == "the body is empty"

    @pytest.mark.parametrize("data", [
        request_of(b'{"cohort_id": "1", "students": []}')[:-1], head_of(Transfer_Encoding="chunked") + b"2\r\n{}\r\n",
        head_of(Transfer_Encoding="chunked") + b"2\r\n{", head_of(Transfer_Encoding="chunked"), GET, b"G"])
    def test_a_request_that_ends_too_early_is_malformed_and_stores_nothing(
            self, server: Process, data: bytes) -> None:
        syncs = server.rows("SELECT count(*) FROM syncs")
        with server.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = parse_answer(read_to_end(connection))
        assert (answer.status, answer.code) == (400, "malformed_request")
        assert server.rows("SELECT count(*) FROM syncs") == syncs

    def test_100_continue_is_sent_only_when_the_body_is_wanted(self, server: Process) -> None:
        body = json.dumps(batch()).encode()
        head = head_of(Content_Length=len(body), Expect="100-Continue")
        with server.connect() as connection:
            connection.sendall(head)
            assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert parse_answer(read_to_end(connection)).status == 200
        for headers, status in ((b"wrong", 401), (b"", 413)):
            with server.connect() as connection:
                length = 5 if status == 401 else 10 ** 9
                connection.sendall(head_of(secret="wrong" if status == 401 else SECRET,
                                           Content_Length=length, Expect="100-continue"))
                assert parse_answer(read_to_end(connection)).status == status

    @pytest.mark.parametrize("secret, length, status", [
        ("wrong", 20 << 20, 401), (SECRET, 20 << 20, 413), ("wrong", 2 << 20, 401), (SECRET, 9 << 20, 413)])
    def test_an_early_answer_reaches_a_client_that_is_busy_sending(
            self, server: Process, secret: str, length: int, status: int) -> None:
        for _ in range(5):
            with server.connect() as connection:
                connection.sendall(head_of(secret=secret, Content_Length=length) + b"x" * length)
                assert parse_answer(read_to_end(connection)).status == status


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: Any) -> Iterator[Process]:
    with running(tmp_path_factory.mktemp("hasty"), ini_of(
            limits=FAST + "request_timeout = 1\nmax_students = 100000")) as process:
        yield process


class TestClocks:
    def test_a_request_that_does_not_arrive_in_time_is_a_408(self, hasty: Process) -> None:
        """Wherever it stops, and also if a byte comes now and then: else this would never end."""
        starts = [b"G", GET + HOST + b"X: ", head_of(Content_Length=1000) + b"{",
                  head_of(Transfer_Encoding="chunked") + b"FF;"]
        with contextlib.ExitStack() as stack:
            silent, trickling = ([stack.enter_context(hasty.connect()) for _ in starts] for _ in "ab")
            for connection, start in zip(silent + trickling, starts + starts):
                connection.sendall(start)
            answers = {connection: b"" for connection in trickling}
            while not all(answers.values()):
                for connection in trickling:
                    connection.settimeout(0.02)
                    with contextlib.suppress(ConnectionError):
                        connection.sendall(b"x")
                    with contextlib.suppress(socket.timeout):
                        answers[connection] += connection.recv(65536)
            for connection in trickling:
                connection.settimeout(20)
            for connection in silent + trickling:
                answer = parse_answer(answers.get(connection, b"") + read_to_end(connection))
                assert (answer.status, answer.code) == (408, "request_timeout")

    def test_a_client_that_does_not_read_its_answer_is_let_go(self, hasty: Process) -> None:
        with hasty.connect() as connection:
            # The answer, 10 MB, is more than the system buffers on both sides.
            connection.sendall(request_of(batch(*([{}] * 100_000))))
            hasty.wait_for("100000/0/100000 .*client gone")

    def test_a_client_that_keeps_sending_after_its_answer_is_let_go(self, hasty: Process) -> None:
        with hasty.connect() as connection:
            connection.settimeout(0.05)
            with pytest.raises((ConnectionError, socket.timeout)):
                while True:
                    connection.sendall(b"x" * 20000)
                    with contextlib.suppress(socket.timeout):
                        connection.recv(65536)


def threads_of(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.process.pid}/task"))


def memory_of(process: Process, key: str = "VmRSS") -> float:
    """In MB."""
    status = pathlib.Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")


class TestCrowds:
    def test_past_the_connections_of_one_address_it_gets_busy_and_others_are_served(
            self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits=FAST + "max_connections_per_client = 3")) as process:
            waiting = [process.connect() for _ in range(3)]
            answer = process.exchange(b"")
            assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "busy", "1")
            assert process.exchange(head_of("GET", "/healthz"), source="127.0.0.2").status == 200
            for connection in waiting:
                connection.close()
            process.wait_for("busy")
            assert self.served_again(process)

    def test_past_all_connections_everybody_gets_busy_at_once(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits=FAST + "max_connections = 3")) as process:
            waiting = [process.connect() for _ in range(3)]
            assert process.exchange(b"", source="127.0.0.2").code == "busy"
            # Also for a client that is sending already.
            assert process.exchange(request_of(batch(student()))).code == "busy"
            for connection in waiting:
                connection.close()
            assert self.served_again(process)

    def test_a_trusted_proxy_is_not_one_client(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of("trusted_proxies = 127.0.0.1",
                                      FAST + "max_connections_per_client = 2")) as process:
            waiting = [process.connect() for _ in range(5)]
            answer = process.exchange(head_of("GET", "/healthz", X_Forwarded_For="198.51.100.9"))
            assert answer.status == 200
            process.wait_for(r" 198\.51\.100\.9 - GET /healthz 200")
            for connection in waiting:
                connection.close()

    def test_busy_reaches_a_client_that_is_busy_sending(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits=FAST + "max_connections = 2")) as process:
            waiting = [process.connect() for _ in range(2)]
            for _ in range(3):
                with process.connect() as connection:
                    connection.sendall(head_of(Content_Length=8 << 20) + b"x" * (8 << 20))
                    assert parse_answer(read_to_end(connection)).code == "busy"
            for connection in waiting:
                connection.close()

    @staticmethod
    def served_again(process: Process) -> bool:
        """Once the server has noticed that the others are gone."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if process.exchange(head_of("GET", "/healthz")).status == 200:
                return True
        return False

    @linux
    def test_a_thousand_slow_connections_leave_another_address_served(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process:
            answer = process.exchange(head_of("GET", "/healthz"))
            threads, memory = threads_of(process), memory_of(process)
            starts = (b"", GET, request_of(batch(student()))[:-5], head_of("GET", "/openapi.json"))
            with contextlib.ExitStack() as stack:
                for number in range(1000):
                    connection = stack.enter_context(process.connect("127.0.0.2"))
                    with contextlib.suppress(ConnectionError):
                        connection.sendall(starts[number % len(starts)])
                    if number % 50 == 0:
                        answer = process.exchange(head_of("GET", "/healthz"))
                        assert answer.status == 200
                        assert threads_of(process) <= threads + 33
                assert process.push(student()).status == 200
                assert memory_of(process) < memory + 30


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: Any) -> pathlib.Path:
    """A self-signed certificate and its key in one file."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                    "-keyout", path.with_suffix(".key"), "-out", path], check=True, capture_output=True)
    return pathlib.Path(path)


def tls_ini(certificate: pathlib.Path, limits: str = FAST) -> str:
    return ini_of(f"tls_certificate = {certificate}\ntls_key = {certificate.with_suffix('.key')}", limits)


class TestTLS:
    def exchange(self, process: Process, certificate: pathlib.Path, data: bytes, **versions: Any) -> Answer:
        context = ssl.create_default_context(cafile=str(certificate))
        for name, value in versions.items():
            setattr(context, name, value)
        with context.wrap_socket(process.connect(), server_hostname="localhost") as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            return parse_answer(read_to_end(connection))    # raises if it is cut off

    def test_the_endpoint_is_served_over_tls(self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        with running(tmp_path, tls_ini(certificate)) as process:
            process.wait_for("listens on https://")
            data = request_of(batch(*map(student, range(2000)), *([{}] * 3000)))
            answer = self.exchange(process, certificate, data)
            assert (answer.document["imported"], len(answer.document["errors"])) == (2000, 3000)
            early = head_of(secret="wrong", Content_Length=2 << 20) + b"x" * (2 << 20)
            assert self.exchange(process, certificate, early).status == 401

    @pytest.mark.skipif(not ssl.HAS_TLSv1_1, reason="this Python has no TLS 1.1")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_older_than_tls_1_2_is_refused(self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        with running(tmp_path, tls_ini(certificate)) as process:
            data = head_of("GET", "/healthz")
            with pytest.raises((ssl.SSLError, ConnectionError)):
                self.exchange(process, certificate, data, minimum_version=ssl.TLSVersion.TLSv1,
                              maximum_version=ssl.TLSVersion.TLSv1_1)
            assert self.exchange(process, certificate, data, minimum_version=ssl.TLSVersion.TLSv1_2,
                                 maximum_version=ssl.TLSVersion.TLSv1_2).status == 200

    def test_a_silent_client_or_one_that_trickles_its_handshake_stops_nobody(
            self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        with running(tmp_path, tls_ini(certificate, FAST + "request_timeout = 1")) as process:
            with process.connect() as silent, process.connect() as trickling:
                trickling.sendall(b"\x16\x03\x01\x02\x00")
                assert self.exchange(process, certificate, head_of("GET", "/healthz")).status == 200
                trickling.settimeout(0.1)
                ended = False
                while not ended:
                    try:
                        trickling.sendall(b"\x01")
                        ended = trickling.recv(1) == b""
                    except socket.timeout:  # noqa: UP041  a TimeoutError only since Python 3.10
                        continue
                    except ConnectionError:
                        ended = True
                assert read_to_end(silent) == b""
            process.wait_for("TLS handshake failed")

    def test_an_encrypted_key_is_refused_and_no_password_asked_for(
            self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        key = tmp_path / "encrypted.key"
        subprocess.run(["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-out", key, "-in",
                        certificate.with_suffix(".key")], check=True, capture_output=True)
        (fault,) = faults_of(tmp_path, f"[server]\ntls_certificate = {certificate}\ntls_key = {key}\n")
        assert "the key not encrypted" in fault

    @posix
    def test_from_https_to_http_takes_a_restart(self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        with running(tmp_path, tls_ini(certificate)) as process:
            process.ini.write_text(ini_of())
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("from http to https or back takes a restart")
            assert self.exchange(process, certificate, head_of("GET", "/healthz")).status == 200

    @posix
    def test_a_new_certificate_is_taken_on_sighup(self, tmp_path: pathlib.Path,
                                                 certificate: pathlib.Path) -> None:
        copy = tmp_path / "server.pem"
        for suffix in (".pem", ".key"):
            shutil.copy(certificate.with_suffix(suffix), copy.with_suffix(suffix))
        with running(tmp_path, tls_ini(copy)) as process:
            subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                            "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                            "-keyout", copy.with_suffix(".key"), "-out", copy], check=True, capture_output=True)
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("reloaded")
            assert self.exchange(process, copy, head_of("GET", "/healthz")).status == 200
            copy.write_text("no certificate")
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("not reloaded: .*tls_certificate")
            with pytest.raises(ssl.SSLCertVerificationError):
                self.exchange(process, certificate, head_of("GET", "/healthz"))


class TestLeaving:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @posix
    def test_a_request_in_flight_finishes_and_the_exit_status_is_0(self, tmp_path: pathlib.Path,
                                                                  number: int) -> None:
        with running(tmp_path, ini_of()) as process:
            data = request_of(batch(student(1)))
            idle = process.connect()
            with process.connect() as connection:
                connection.sendall(data[:-5])
                TestConfiguration.wait_until_read(process)
                process.process.send_signal(number)
                process.wait_for("stopping")
                connection.sendall(data[-5:])
                assert parse_answer(read_to_end(connection)).document["imported"] == 1
            assert read_to_end(idle) == b""
            idle.close()
            assert process.process.wait(20) == 0
            assert not pathlib.Path(f"{process.database}-wal").exists()
            with pytest.raises(ConnectionRefusedError):
                process.connect()

    @posix
    def test_what_is_stored_while_it_stops_is_also_answered(self, tmp_path: pathlib.Path) -> None:
        """Requests that were waiting to be read when the signal came: all or nothing, for each."""
        with running(tmp_path, ini_of()) as process:
            waiting = [process.connect() for _ in range(10)]
            TestConfiguration.wait_until_read(process)
            process.process.send_signal(signal.SIGSTOP)
            for number, connection in enumerate(waiting):
                connection.sendall(request_of(batch(student(number), cohort_id=str(number))))
            process.process.send_signal(signal.SIGTERM)
            process.process.send_signal(signal.SIGCONT)
            answered = {str(number) for number, connection in enumerate(waiting)
                        if b" 200 OK" in read_to_end(connection)}
            assert process.process.wait(20) == 0
            assert {row[0] for row in process.rows("SELECT cohort_id FROM syncs")} == answered
            for connection in waiting:
                connection.close()

    @posix
    def test_a_client_that_stays_after_its_answer_is_not_waited_for(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process, process.connect() as connection:
            data = request_of(batch(student(1)))
            connection.sendall(data[:-5])
            TestConfiguration.wait_until_read(process)
            process.process.send_signal(signal.SIGTERM)
            process.wait_for("stopping")
            connection.sendall(data[-5:])
            assert parse_answer(read_to_end(connection)).status == 200
            assert process.process.wait(8) == 0     # the client's half of the connection is open still

    @posix
    def test_a_second_signal_ends_it_at_once(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process, process.connect() as connection:
            connection.sendall(request_of(batch(student(1)))[:-5])
            TestConfiguration.wait_until_read(process)
            process.process.send_signal(signal.SIGTERM)
            process.wait_for("stopping")
            process.process.send_signal(signal.SIGTERM)
            assert process.process.wait(20) == -signal.SIGTERM

    def test_a_port_that_is_taken_is_one_clear_line(self, tmp_path: pathlib.Path, server: Process) -> None:
        (tmp_path / "taken.ini").write_text(f"[server]\nport = {server.port}\n")
        result = run_process("--config", tmp_path / "taken.ini")
        assert result.returncode == 2
        assert f"cannot listen on 127.0.0.1 port {server.port}" in result.stderr.decode()
        assert "Traceback" not in result.stderr.decode()

    @pytest.mark.parametrize("where", [1, 30, 120, 200, 10_000])
    def test_a_reset_at_any_byte_is_one_line_at_most(self, server: Process, where: int) -> None:
        data = request_of(batch(*map(student, range(500))))
        lines = TestStrictHTTP.lines_so_far(server, f"/before-{where}")
        connection = server.connect()
        connection.sendall(data[:where])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        assert TestStrictHTTP.lines_so_far(server, f"/after-{where}") - lines <= 2


class TestLog:
    def test_a_line_holds_what_the_contract_says(self, server: Process) -> None:
        answer = server.push(student(1), {}, student(2))
        identifier = answer.headers["x-request-id"]
        line = server.wait_for(identifier).string
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z {identifier} 127\.0\.0\.1 example "
                            r"POST /api/sis/sync 200 3/2/1 \d+ms", line)
        answer = server.exchange(head_of(secret="wrong"))
        line = server.wait_for(answer.headers["x-request-id"]).string
        assert re.search(r" 127\.0\.0\.1 - POST /api/sis/sync 401 - \d+ms unauthorized$", line)

    def test_what_the_client_wrote_is_escaped_and_its_query_left_out(self, server: Process) -> None:
        server.exchange(b'GET /log-"\\%0a?secret=' + SECRET.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        line = server.wait_for("/log-").string
        assert ' GET /log-"\\x5c%0a 404 ' in line

    def test_a_fault_of_the_server_is_a_500_without_its_cause_and_a_line_with_it(
            self, service: sis_sync.Service, monkeypatch: Any, caplog: Any) -> None:
        def fail(*_: object) -> None:
            raise KeyError("a student's data")

        monkeypatch.setattr(sis_sync, "check_rows", fail)
        monkeypatch.setattr(sis_sync.log, "propagate", True)
        answer = handle(service, batch())
        assert (answer.status, answer.code) == (500, "server_error")
        assert answer.document["request_id"] == answer.headers["x-request-id"]
        assert "student's data" not in caplog.text + answer.body.decode()
        assert f"{answer.document['request_id']} server_error KeyError" in caplog.text


class TestDatabase:
    @posix
    def test_the_files_are_their_owner_s_alone(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "sis_sync.db").touch(0o644)
        with running(tmp_path, ini_of()) as process:
            process.push(student())
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("sis_sync.db*")}
        assert modes == dict.fromkeys(("sis_sync.db", "sis_sync.db-wal", "sis_sync.db-shm"), 0o600)

    def test_the_log_is_synced_to_the_disk_at_every_commit(self, service: sis_sync.Service) -> None:
        connection = service.roster._connection
        assert connection
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)      # FULL
        assert connection.execute("PRAGMA user_version").fetchone() == (len(sis_sync.MIGRATIONS),)

    def test_a_lock_held_by_another_process_is_busy_after_a_while_and_then_over(
            self, service: sis_sync.Service, monkeypatch: Any) -> None:
        assert sis_sync.BUSY_TIMEOUT == 5.0
        monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.2)
        with contextlib.closing(sqlite3.connect(service.roster.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = handle(service, batch(student()))
            assert (answer.status, answer.code) == (503, "busy")
            assert answer.headers["retry-after"] == "5"
            assert handle(service, method="GET", path="/healthz").status == 200
            other.execute("ROLLBACK")
        assert handle(service, batch(student())).status == 200

    def test_a_lock_of_another_thread_is_busy_after_a_while_too(
            self, service: sis_sync.Service, monkeypatch: Any) -> None:
        monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.2)
        with service.roster.transaction():
            assert handle(service, batch(student())).code == "busy"
        assert handle(service, batch(student())).status == 200

    @posix
    def test_a_database_replaced_during_a_transaction_is_never_a_200(self, service: sis_sync.Service) -> None:
        with pytest.raises(OSError, match="replaced"), service.roster.transaction():
            shutil.copy(service.roster.path, f"{service.roster.path}.copy")
            os.replace(f"{service.roster.path}.copy", service.roster.path)
        assert handle(service, batch(student())).status == 200

    @posix
    def test_a_deleted_database_is_a_500_until_it_is_back(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process:
            process.push(student(1))
            backup = tmp_path / "backup.db"
            assert run("--config", process.ini, "backup", backup).returncode == 0
            for path in tmp_path.glob("sis_sync.db*"):
                path.unlink()
            answer = process.push(student(2))
            assert (answer.status, answer.code) == (500, "server_error")
            process.wait_for(f"{answer.document['request_id']} server_error FileNotFoundError")
            answer = process.exchange(head_of("GET", "/healthz"))
            assert (answer.status, answer.code) == (503, "unhealthy")
            shutil.copy(backup, process.database)
            assert process.push(student(1), student(3)).document["details"] == {
                "imported": 1, "updated": 1, "unchanged": 1}
            assert process.exchange(head_of("GET", "/healthz")).status == 200
            process.log[:] = [line for line in process.log if "server_error" not in line]

    @posix
    def test_a_database_restored_under_a_running_server_is_the_one_that_is_used(
            self, tmp_path: pathlib.Path) -> None:
        """SQLite would apply the log of the old file to the new one, and ruin it."""
        with running(tmp_path, ini_of()) as process:
            process.push(*(student(number) for number in range(3000)))
            backup = tmp_path / "backup.db"
            assert run("--config", process.ini, "backup", backup).returncode == 0
            for page in range(4):
                process.push(*(student(f"{page}-{number}") for number in range(5000)))
            backup.chmod(0o644)
            os.replace(backup, process.database)
            assert process.exchange(head_of("GET", "/healthz")).status == 200
            answer = process.push(*(student(number) for number in range(3001))).document
            assert answer["details"] == {"imported": 1, "updated": 3000, "unchanged": 3000}
            assert process.rows("PRAGMA integrity_check") == [("ok",)]
            assert process.rows("SELECT count(*) FROM entries") == [(3001,)]
            assert process.database.stat().st_mode & 0o777 == 0o600

    @linux
    def test_a_full_disk_is_a_500_that_stores_nothing_and_then_it_goes_on(self, tmp_path: pathlib.Path) -> None:
        import resource
        with running(tmp_path, ini_of()) as process:
            assert process.push(student("first")).status == 200
            pid, limits = process.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (60_000, limits[1]))
            answers = [process.push(*(student(f"{number}-{index}") for index in range(2000)))
                       for number in range(3)]
            assert {(answer.status, answer.code) for answer in answers} == {(500, "server_error")}
            process.wait_for("server_error OperationalError: (disk I/O error|database or disk is full)")
            assert process.exchange(head_of("GET", "/healthz")).status == 200
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
            assert process.push(student("last")).document["details"]["imported"] == 1
            assert process.rows("SELECT student_id_ext FROM entries") == [("Ufirst",), ("Ulast",)]
            assert process.rows("SELECT count(*) FROM syncs") == [(2,)]

    @linux
    def test_a_read_only_database_is_refused_at_start(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "sis_sync.ini").write_text(ini_of())
        sis_sync.Roster(str(tmp_path / "sis_sync.db")).close()
        words: list[Any] = [*COMMAND, "--config", tmp_path / "sis_sync.ini"]
        if os.geteuid() == 0:       # root may write everything, unless it is told not to
            if not shutil.which("setpriv"):
                pytest.skip("needs setpriv")
            words = ["setpriv", "--bounding-set", "-dac_override", *words]
        for path, mode in ((tmp_path / "sis_sync.db", 0o400), (tmp_path, 0o500)):
            before = path.stat().st_mode
            path.chmod(mode)
            try:
                result = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=20,
                                        check=False)
            finally:
                path.chmod(before)
            assert result.returncode == 2
            assert re.search(r"sis_sync\.db: .*([Pp]ermission denied|unable to open|readonly)", result.stderr)
            assert "Traceback" not in result.stderr

    def test_a_newer_schema_another_s_database_and_no_database_are_refused(self, tmp_path: pathlib.Path) -> None:
        newest = len(sis_sync.MIGRATIONS)
        (tmp_path / "none.db").write_bytes(b"this is not a database, but it is long enough" * 100)
        for name, statement in (("newer", "PRAGMA user_version = 99"), ("other", "CREATE TABLE t (x)"),
                                ("same version", f"PRAGMA user_version = {newest}")):
            with contextlib.closing(sqlite3.connect(tmp_path / f"{name}.db")) as connection:
                connection.execute(statement)
        before = {path.name: (path.read_bytes(), path.stat().st_mode) for path in tmp_path.glob("*.db")}
        for name, words in (("newer", f"newer than {newest}: use a newer sis_sync.py"),
                            ("other", "a database of another program"),
                            ("same version", "a database of another program"), ("none", "file is not a database")):
            (tmp_path / "test.ini").write_text(f"[server]\nport = 0\ndatabase = {name}.db\n")
            for command, status in (((), 2), (("check",), 1)):
                result = run("--config", tmp_path / "test.ini", *command)
                assert result.returncode == status
                assert words in (result.stdout + result.stderr).decode()
                assert b"Traceback" not in result.stderr
        assert {path.name: (path.read_bytes(), path.stat().st_mode) for path in tmp_path.glob("*.db")} == before

    def test_an_older_schema_is_migrated(self, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
        path = str(tmp_path / "old.db")
        sis_sync.Roster(path).close()
        monkeypatch.setattr(sis_sync, "MIGRATIONS", (
            *sis_sync.MIGRATIONS, ("CREATE TABLE added (x)", "INSERT INTO added VALUES (1)")))
        for _ in range(2):
            sis_sync.Roster(path).close()
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (len(sis_sync.MIGRATIONS),)
            assert connection.execute("SELECT x FROM added").fetchall() == [(1,)]

    def test_a_migration_that_fails_changes_nothing(self, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
        path = str(tmp_path / "old.db")
        sis_sync.Roster(path).close()
        version = len(sis_sync.MIGRATIONS)
        monkeypatch.setattr(sis_sync, "MIGRATIONS", (*sis_sync.MIGRATIONS, ("CREATE TABLE added (x)", "no SQL")))
        with pytest.raises(sis_sync.CommandError):
            sis_sync.Roster(path)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (version,)
            assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'added'").fetchone() == (0,)


# ---------------------------------------------------------------------------------------------
# Section 7: the command line
# ---------------------------------------------------------------------------------------------

class TestCommands:
    @pytest.mark.parametrize("words", [(), *((name,) for name in sis_sync.COMMANDS)])
    def test_every_command_explains_itself(self, words: tuple[str, ...]) -> None:
        result = run(*words, "--help")
        assert result.returncode == 0 and not result.stderr
        text = result.stdout.decode()
        if not words:
            assert all(re.search(rf"^    {name}\b", text, re.MULTILINE) for name in sis_sync.COMMANDS)
        for names, settings in sis_sync.COMMANDS[words[0]][1] if words else ():
            assert settings["help"].split()[0] in text
            assert str(settings["metavar"] if names[0] == "file" else names[0]) in text

    def test_version(self) -> None:
        assert run("--version").stdout.decode() == f"sis_sync {sis_sync.__version__}\n"

    @pytest.mark.parametrize("words", [("nonsense",), ("push",), ("backup",), ("export", "--not-seen-since", "x"),
                                       ("push", "f", "--cohort", "1", "--map", "x=y"), ("--config",)])
    def test_a_wrong_command_line_is_2_without_a_traceback(self, words: tuple[str, ...]) -> None:
        result = run(*words)
        assert result.returncode == 2
        assert b"usage:" in result.stderr and b"Traceback" not in result.stderr

    def test_secret_prints_a_secret_and_its_digest(self) -> None:
        secret, digest = run("secret").stdout.decode().splitlines()
        assert re.fullmatch(r"sis_[A-Za-z0-9_-]{43}", secret)
        assert digest == "sha256:" + hashlib.sha256(secret.encode()).hexdigest()
        assert run("secret").stdout.decode().splitlines()[0] != secret
        result = run("secret", "--hash", stdin=f"{secret}\n")
        assert result.stdout.decode() == f"{digest}\n"
        assert run("secret", "--hash").returncode == 2
        digest = "sha256:" + hashlib.sha256(b"caf\xe9").hexdigest()
        assert run("secret", "--hash", stdin=b"\xef\xbb\xbfcaf\xe9\r\n").stdout.decode().strip() == digest

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_a_stdout_that_fails_is_no_traceback(self, tmp_path: pathlib.Path) -> None:
        words = [*COMMAND, "secret"]
        with open("/dev/full", "w") as full:
            result = subprocess.run(words, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False)
        assert (result.returncode, "No space left" in result.stderr) == (2, True)
        assert "Traceback" not in result.stderr and "Exception" not in result.stderr
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as closed:
            result = subprocess.run(words, env=ENVIRONMENT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=20,
                                    check=False)
        assert "Exception" not in result.stderr and "Traceback" not in result.stderr

    def test_check_says_all_that_is_wrong_and_changes_nothing(self, tmp_path: pathlib.Path) -> None:
        ini = tmp_path / "sis_sync.ini"
        ini.write_text(ini_of())
        result = run("--config", ini, "check")
        assert (result.returncode, result.stdout.decode()) == (0, f"{ini}: good\n")
        assert not (tmp_path / "sis_sync.db").exists()
        assert run("check", "--config", ini, environment={"SIS_SYNC_SECRET": ""}).returncode == 0
        ini.write_text("[server]\nport = x\n[limit]\n")
        result = run("--config", ini, "check")
        assert (result.returncode, len(result.stdout.splitlines())) == (1, 2)
        ini.write_text("[server]\ndatabase = no/such/folder/x.db\n")
        result = run("--config", ini, "check")
        assert (result.returncode, b"no database can be made here" in result.stdout) == (1, True)

    def test_demo_shows_everything_and_ends(self) -> None:
        result = run_process("demo", "--once", SIS_SYNC_SECRET="")
        text = result.stdout.decode()
        assert result.returncode == 0, result.stderr
        assert "12,000 new, 0 updated, 0 unchanged" in text
        assert "0 new, 12,000 updated, 12,000 unchanged" in text
        for answer in ("200 {", '400 {"error": "missing_field"', '401 {"error": "unauthorized"',
                       '413 {"error": "batch_too_large"', '429 {"error": "rate_limited"', "curl http://"):
            assert answer in text
        folder = re.search(r"database and log in (\S+)", text)
        assert folder and not os.path.exists(folder[1])

    @posix
    def test_demo_serves_until_ctrl_c(self) -> None:
        process = subprocess.Popen([*COMMAND, "demo"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        lines = iter(process.stdout)
        url = next(match for line in lines if (match := re.search(r"curl http://127.0.0.1:(\d+)", line)))
        assert any("until you press Ctrl-C" in line for line in lines)
        connection = http.client.HTTPConnection("127.0.0.1", int(url[1]), timeout=20)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 0

    def test_the_options_of_serve_override_the_file(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, "[server]\nport = 1\nhost = 192.0.2.1\n", words=(
                "serve", "--port", "0", "--host", "127.0.0.1")) as process:
            assert process.exchange(head_of("GET", "/healthz")).status == 200
        result = run("--config", process.ini, "serve", "--port", "x")
        assert result.returncode == 2 and b"[server] port: found 'x'" in result.stderr

    def test_a_start_tells_where_it_listens_and_who_has_a_secret(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(institutions=(
                "[institution a]\n[institution b]\nsecrets = env:NOT_SET\n"))) as process:
            process.wait_for(r"warning: \[institution b\] secrets: env:NOT_SET is missing, empty")
            log = "\n".join(process.log)
        assert "institution a: 1 secret set" in log
        assert f"database: {process.database}" in log
        assert f"configuration: {process.ini}" in log
        assert "institution b: no secret set" in log


def csv_of(students: Sequence[Mapping[str, Any]], columns: Sequence[str] = sis_sync.NAMES,
           delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(students)
    return text.getvalue()


def rows_in(folder: pathlib.Path, data: str | bytes, mapping: Mapping[str, str] = {},
            name: str = "roster.csv") -> tuple[list[sis_sync.Row], str]:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    file = sis_sync.open_roster_file(str(path), mapping)
    rows = list(file.rows)
    assert file.total == len(rows)
    return rows, "\n".join(file.notes)


def value_of(row: sis_sync.Row, name: str) -> object:
    assert not isinstance(row.student, sis_sync.Fault)
    return row.student[name]


class TestRosterFiles:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_csv_is_read_as_it_is_found(self, tmp_path: pathlib.Path, encoding: str, delimiter: str) -> None:
        students = [{**FULL, "last_name": "Müller; Zoë", "first_name": 'The "x", y', "first_in_family": ""},
                    {**FULL, "student_id_ext": "00123", "first_in_family": "Yes"}]
        rows, notes = rows_in(tmp_path, csv_of(students, delimiter=delimiter).encode(encoding))
        assert [row.line for row in rows] == [2, 3]
        assert rows[0].student == {**students[0], "first_in_family": None}
        assert value_of(rows[1], "student_id_ext") == "00123"
        assert ("Windows-1252" in notes) is (encoding == "cp1252")

    @pytest.mark.parametrize("text, value", [
        ("TRUE", True), ("Yes", True), ("1", True), ("y", True), (" t ", True), ("False", False), ("no", False),
        ("0", False), ("", None), (" ", None), ("maybe", "maybe")])
    def test_a_boolean_is_known_in_its_usual_spellings(self, tmp_path: pathlib.Path, text: str, value: Any) -> None:
        rows, _ = rows_in(tmp_path, csv_of([{**FULL, "first_in_family": text}]))
        assert value_of(rows[0], "first_in_family") == value

    def test_headers_are_known_in_other_case_and_with_spaces(self, tmp_path: pathlib.Path) -> None:
        rows, notes = rows_in(tmp_path, "Student ID Ext, E-Mail ,FIRST_NAME,Other\nU1,a@b,Zoë,x\n")
        assert rows == [sis_sync.Row(2, {"student_id_ext": "U1", "email": "a@b", "first_name": "Zoë"})]
        assert "student_id_ext from 'Student ID Ext'" in notes
        assert "no column for last_name, program_code, campus_name, first_in_family" in notes

    def test_map_names_a_column(self, tmp_path: pathlib.Path) -> None:
        rows, _ = rows_in(tmp_path, "No,Mail\nU1,a@b\n", {"student_id_ext": "No", "email": "mail"})
        assert rows == [sis_sync.Row(2, {"student_id_ext": "U1", "email": "a@b"})]

    @pytest.mark.parametrize("data, line", [
        ("sep=;\nstudent_id_ext;email\nU1;a@b\n", 3), ("\n \nstudent_id_ext;email\nU1;a@b\n", 4),
        ("student_id_ext,email,,\n , \nU1,a@b,,\n", 3), ("student_id_ext,email\rU1,a@b\r", 2)])
    def test_what_surrounds_the_rows_is_seen_through(self, tmp_path: pathlib.Path, data: str, line: int) -> None:
        rows, _ = rows_in(tmp_path, data)
        assert rows == [sis_sync.Row(line, {"student_id_ext": "U1", "email": "a@b"})]

    def test_blank_lines_and_quoted_line_breaks_keep_the_line_numbers_right(self, tmp_path: pathlib.Path) -> None:
        rows, _ = rows_in(tmp_path, 'student_id_ext,email,first_name\r\n\r\nU1,a@b,"x\r\ny"\r\n,,\r\nU2,c@d,\r\n')
        assert [row.line for row in rows] == [3, 6]

    def test_a_row_with_too_few_or_too_many_columns_is_a_fault(self, tmp_path: pathlib.Path) -> None:
        rows, _ = rows_in(tmp_path, "student_id_ext,email,first_name\nU1,a@b\nU2,a@b,c,d\nU3,a@b,c,,\n")
        assert [row.student if isinstance(row.student, sis_sync.Fault) else None for row in rows] == [
            sis_sync.Fault(None, "wrong_columns", "2 columns where the header has 3"),
            sis_sync.Fault(None, "wrong_columns", "4 columns where the header has 3"), None]

    @pytest.mark.parametrize("number", ["1.23457E+11", "1,23457E+11", "2E+15", "1.2e+07"])
    def test_an_id_that_excel_shortened_is_a_fault_that_says_so(self, tmp_path: pathlib.Path, number: str) -> None:
        rows, _ = rows_in(tmp_path, csv_of([{**FULL, "student_id_ext": number}]))
        fault = rows[0].student
        assert isinstance(fault, sis_sync.Fault) and fault.error == "scientific_notation"
        assert "format the column as text" in fault.message

    @pytest.mark.parametrize("data, words", [
        (b"", "is empty"), (b"\n \n", "is empty"), (b"a,b\n1,2\n", "its header has: a, b"), (b"email,email,student_id_ext\n", "two columns"),
        ("student_id_ext,email\n".encode("utf-16"), "is UTF-16"), (b"PK\x03\x04junk", "is an Excel workbook"), (b"\x81\x8d\xff", "neither UTF-8 nor"),
        (b'student_id_ext,email\n"' + b"x" * 140_000, "is no CSV"), (b'{"students": 1}', "must be an array"),
        (b"[1, 2", "is not JSON")])
    def test_a_file_that_can_t_be_understood_is_refused(self, tmp_path: pathlib.Path, data: bytes,
                                                        words: str) -> None:
        with pytest.raises(sis_sync.CommandError) as caught:
            rows_in(tmp_path, data)
        assert words in "\n".join(caught.value.args)

    @pytest.mark.parametrize("document", [[student(1), "x"], {"cohort_id": "y", "students": [student(1), "x"]}])
    def test_json_is_an_array_or_a_request_body(self, tmp_path: pathlib.Path, document: Any) -> None:
        rows, _ = rows_in(tmp_path, "\ufeff \n" + json.dumps(document), name="roster.json")
        assert rows == [sis_sync.Row(1, student(1)), sis_sync.Row(2, "x")]  # type: ignore[arg-type]

    ONEROSTER = ("sourcedId,status,givenName,familyName,email,identifier{}\n"
                 "s1,active,Zoë,Ng,z@b,0012{}\ns2,tobedeleted,A,B,c@d,0013{}\ns3,,T,U,t@b,0014{}\n")

    def test_oneroster_1_1_is_known_and_only_its_students_are_taken(self, tmp_path: pathlib.Path) -> None:
        text = self.ONEROSTER.format(",role", ",student", ",student", ",teacher")
        rows, notes = rows_in(tmp_path, text)
        expected = {"student_id_ext": "s1", "email": "z@b", "first_name": "Zoë", "last_name": "Ng"}
        assert rows == [sis_sync.Row(2, expected)]
        assert "student_id_ext from 'sourcedId'" in notes
        rows, notes = rows_in(tmp_path, text, {"student_id_ext": "identifier"})
        assert rows == [sis_sync.Row(2, {**expected, "student_id_ext": "0012"})]

    def test_oneroster_1_2_takes_the_roles_from_roles_csv(self, tmp_path: pathlib.Path) -> None:
        text = self.ONEROSTER.format("", "", "", "")
        rows, notes = rows_in(tmp_path, text)
        assert [row.line for row in rows] == [2, 4] and "put roles.csv beside it" in notes
        (tmp_path / "roles.csv").write_text("sourcedId,status,userSourcedId,roleType,role\n"
                                            "r1,active,s1,primary,student\nr2,active,s3,primary,teacher\n")
        rows, notes = rows_in(tmp_path, text)
        assert [row.line for row in rows] == [2]
        (tmp_path / "roles.csv").write_bytes(b"userSourcedId,role\n\xff,student\n")
        with pytest.raises(sis_sync.CommandError, match="roles.csv: "):
            rows_in(tmp_path, text)

    @linux
    def test_a_huge_file_takes_no_more_memory_than_a_small_one(self, tmp_path: pathlib.Path) -> None:
        """60 MB of it, in at most 8 MB more."""
        path = tmp_path / "huge.csv"
        with open(path, "w", encoding="utf-8") as file:
            file.write("student_id_ext,email,first_name\n")
            file.writelines(f"U{number},u{number}@example.edu,{'x' * 250}\n" for number in range(200_000))
        source = ("import resource, sis_sync, sys; file = sis_sync.open_roster_file(sys.argv[1], {});"
                  "print(file.total, sum(1 for row in file.rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        sizes = []
        for lines in (1, 200_000):
            if lines == 1:
                small = tmp_path / "small.csv"
                small.write_text("student_id_ext,email,first_name\nU1,a@b,x\n")
            result = subprocess.run([sys.executable, "-c", source, small if lines == 1 else path], cwd=HERE,
                                    capture_output=True, text=True, check=True)
            total, count, size = map(int, result.stdout.split())
            assert total == count == lines
            sizes.append(size)
        assert sizes[1] < sizes[0] + 8 * 1024       # kilobytes


class TestPush:
    def push(self, process: Process, *words: Any, stdin: str | bytes = b"", cohort: str = "2026",
             **options: Any) -> Result:
        return run("push", *words, "--url", f"http://127.0.0.1:{process.port}", "--cohort", cohort,
                   stdin=stdin, **options)

    def test_a_messy_csv_arrives_and_every_bad_line_is_told(self, server: Process, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "messy.csv"
        path.write_bytes("Student_ID_Ext;E-mail;First Name;First In Family\r\n"
                         "00017;o'brien@example.edu;Zoë;Yes\r\n\r\n"
                         ";no-id@example.edu;A;\r\n1,2E+10;x@example.edu;B;no\r\n"
                         "00018;c@example.edu\r\n00019;d@example.edu;\"a\nb\";0\r\n"
                         "00020;e@example.edu;;\r\n00020;f@example.edu;;\r\n".encode("cp1252"))
        result = self.push(server, path, "--json", cohort="messy")
        assert result.returncode == 1
        summary = json.loads(result.stdout)
        assert (summary["sent"], summary["new"], summary["updated"], summary["unchanged"]) == (5, 2, 0, 0)
        assert [(row["line"], row["error"]) for row in summary["rejected"]] == [
            (4, "missing_field"), (5, "scientific_notation"), (6, "wrong_columns"), (7, "invalid_field"),
            (10, "duplicate_student")]
        text = self.push(server, path, cohort="messy").stdout.decode()
        assert "new 0, updated 2 (of these unchanged 2), rejected 5" in text
        assert "line 10: duplicate_student: the same student_id_ext stood higher up in the batch" in text
        assert "Mend these lines" in text
        assert server.rows("SELECT student_id_ext, first_name, first_in_family FROM entries JOIN rosters USING "
                           "(roster_id) WHERE cohort_id = 'messy'") == [("00017", "Zoë", 1), ("00020", None, None)]

    def test_standard_input_is_a_file_too(self, server: Process) -> None:
        result = self.push(server, "-", stdin=csv_of([FULL]), cohort="stdin")
        assert result.returncode == 0
        assert b"new 1, updated 0 (of these unchanged 0), rejected 0" in result.stdout

    def test_elsewhere_than_on_a_terminal_there_is_a_line_for_each_page(self, server: Process) -> None:
        result = self.push(server, "-", "--batch", "2", stdin=csv_of([student(n) for n in range(5)]), cohort="pages")
        lines = [line for line in result.stderr.decode().splitlines() if " of 5 students" in line]
        assert [line.partition(",")[0] for line in lines] == ["2 of 5 students", "4 of 5 students", "5 of 5 students"]

    @posix
    def test_it_goes_on_when_nobody_looks_any_more(self, server: Process) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as closed:
            result = subprocess.run(
                [*COMMAND, "push", "-", "--url", f"http://127.0.0.1:{server.port}", "--cohort", "unseen", "--batch", "2"],
                input=csv_of([student(number) for number in range(9)]).encode(), stderr=closed,
                stdout=subprocess.PIPE, env=ENVIRONMENT, timeout=20, check=False)
        assert result.returncode == 0
        assert b"new 9," in result.stdout

    def test_on_a_terminal_there_is_a_bar(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        stream = Terminal()
        progress = sis_sync.Progress(stream, 12_000)
        summary = sis_sync.Summary(sent=6000, started=time.monotonic() - 60)
        progress.show(summary, "rate limited: 12 s")
        assert re.search(r"^\r\x1b\[K\[##########          \] 6,000 of 12,000 students, 100/s, [01]:\d\d left, "
                         r"rate limited: 12 s$", stream.getvalue())

    def test_a_dry_run_judges_like_the_server_and_sends_nothing(self, tmp_path: pathlib.Path) -> None:
        students = [{"student_id_ext": f"U{number}", "email": value if name == "email" else "a@b", name: value}
                    for number, (name, value, *_) in enumerate([*GOOD, *BAD]) if name != "student_id_ext"]
        path = tmp_path / "roster.json"
        path.write_text(json.dumps(students))
        result = run("push", path, "--cohort", "1", "--dry-run", "--json")
        assert result.returncode == 1
        service = sis_sync.Service(configuration_of(tmp_path, ini_of()))
        answer = handle(service, batch(*students)).document
        service.roster.close()
        assert answer["errors"]
        assert [(row["line"], row["field"], row["error"], row["message"]) for row in json.loads(
            result.stdout)["rejected"]] == [tuple(error.values()) for error in answer["errors"]]
        assert run("push", path, "--cohort", "x" * 65, "--dry-run").returncode == 2

    def test_12000_students_go_through_a_rate_limit(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits="requests_per_minute = 60")) as process:
            for _ in range(59):
                process.push()
            path = tmp_path / "roster.csv"
            path.write_text(csv_of(sis_sync.made_up_students(12_000)), "utf-8")
            result = self.push(process, path)
            assert result.returncode == 0, result.stderr
            assert b"new 12,000, updated 0" in result.stdout
            assert b"rate limited: 1 s" in result.stderr
            assert process.rows("SELECT count(*) FROM entries") == [(12_000,)]

    def test_a_page_that_is_too_large_is_halved_and_its_lines_stay_right(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits=FAST + "max_students = 150")) as process:
            students = [student(number) for number in range(1000)]
            for number in (0, 499, 998):
                students[number]["email"] = ""
            result = self.push(process, "-", "--json", stdin=csv_of(students))
            summary = json.loads(result.stdout)
            assert (summary["new"], summary["sent"]) == (997, 1000)
            assert [row["line"] for row in summary["rejected"]] == [2, 501, 1000]
            received = [row[0] for row in process.rows("SELECT received FROM syncs")]
            assert sum(received) == 1000 and max(received) <= 150
            process.wait_for("413")
            assert len([line for line in process.log if " 413 " in line]) <= 4      # it is learnt once

    @contextlib.contextmanager
    def pushing(self, process: Process, number: int, *words: str) -> Iterator[Any]:
        """A push of so many students, going on as a process of its own."""
        words = (*COMMAND, "push", "-", "--url", f"http://127.0.0.1:{process.port}", "--cohort", "2026", *words)
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=process.environment, encoding="utf-8") as client:
            assert client.stdin
            client.stdin.write(csv_of(sis_sync.made_up_students(number)))
            client.stdin.close()
            yield client

    @posix
    def test_a_server_killed_and_restarted_midway_does_no_harm(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process:
            process.ini.write_text(ini_of(f"port = {process.port}").replace("port = 0\n", ""))
            with self.pushing(process, 12_000, "--batch", "100") as client:
                assert any("1,000 of" in line for line in client.stderr)
                process.stop(signal.SIGKILL)
                assert any("no answer" in line for line in client.stderr)
                process.start()
                rest = client.stderr.read()
                assert client.wait(60) == 0, rest
                assert "rejected 0" in client.stdout.read()
            assert process.rows("SELECT count(*) FROM entries") == [(12_000,)]

    @posix
    def test_a_secret_rotated_midway_stops_the_push_and_says_how_far_it_came(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits="requests_per_minute = 60"),
                     environment={"NEXT": OTHER_SECRET}) as process, \
                self.pushing(process, 2000, "--batch", "10") as client:
            assert any("rate limited" in line for line in client.stderr)
            process.ini.write_text(ini_of(institutions="[institution example]\nsecrets = env:NEXT\n"))
            process.process.send_signal(signal.SIGHUP)
            rest, text = client.stderr.read(), client.stdout.read()
            assert client.wait(60) == 2
            assert "stopped: the server answered 401 unauthorized: " in rest
            (stored,) = process.rows("SELECT count(*) FROM entries")[0]
            assert 600 <= stored < 2000 and f"new {stored:,}," in text

    @posix
    def test_ctrl_c_ends_at_a_page_s_border_with_the_summary_so_far(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits="requests_per_minute = 20")) as process, \
                self.pushing(process, 2000, "--batch", "10", "--json") as client:
            assert any("rate limited" in line for line in client.stderr)
            client.send_signal(signal.SIGINT)
            output, rest = client.stdout.read(), client.stderr.read()
            assert client.wait(20) == 130
            assert "Traceback" not in rest
            assert (json.loads(output)["new"], json.loads(output)["stopped"]) == (200, "Ctrl-C")
            assert process.rows("SELECT count(*) FROM entries") == [(200,)]

    def test_a_refusal_of_the_whole_batch_names_its_lines(self, server: Process) -> None:
        result = self.push(server, "-", "--json", stdin=csv_of([student(1), {"student_id_ext": "U2"}]),
                           environment={"SIS_SYNC_SECRET": "sis_the-strict-ones-secret"})
        assert result.returncode == 2
        assert [row["line"] for row in json.loads(result.stdout)["rejected"]] == [3]
        assert b"stopped: the server answered 400 invalid_rows: " in result.stderr

    def test_what_can_t_work_is_one_clear_line_and_2(self, server: Process, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "roster.csv"
        path.write_text(csv_of([FULL]))
        url = f"http://127.0.0.1:{server.port}"
        for words, environment, line in (
                ((path, "--url", url), {"SIS_SYNC_SECRET": "wrong"}, "the server answered 401"),
                ((path, "--url", url), {"SIS_SYNC_SECRET": ""}, "the secret must be in SIS_SYNC_SECRET"),
                ((path, "--url", url, "--secret-file", tmp_path / "no"), {}, "cannot be read"),
                ((path, "--url", "ftp://x"), {}, "--url ftp://x: must be http:// or https://"),
                *(((path, "--url", odd), {}, f"--url {odd}: must be")
                  for odd in ("http://[::1", "http://h:abc/", "http://h:99999/", "http://a..b/", "http://")),
                ((path, "--url", "https://127.0.0.1:1", "--ca-file", tmp_path / "no.pem"), {}, "--ca-file"),
                ((path,), {}, "push takes --url URL"),
                ((tmp_path / "missing.csv", "--url", url), {}, "No such file"),
                ((tmp_path, "--url", url), {}, "Is a directory"),
                ((path, "--url", url, "--cohort", "x" * 65), {}, "400 invalid_field: cohort_id must be")):
            result = run("push", *words, *(() if "--cohort" in words else ("--cohort", "1")),
                         environment=environment)
            assert result.returncode == 2
            assert line in result.stderr.decode()
            assert b"Traceback" not in result.stderr

    def test_a_secret_can_be_in_a_file(self, server: Process, tmp_path: pathlib.Path) -> None:
        (tmp_path / "secret").write_text(f"\ufeff{SECRET}\n", "utf-8")
        result = self.push(server, "-", "--secret-file", tmp_path / "secret", stdin=csv_of([FULL]),
                           environment={"SIS_SYNC_SECRET": ""})
        assert result.returncode == 0

    def test_an_untrusted_certificate_stops_at_once_and_ca_file_makes_it_trusted(
            self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        with running(tmp_path, tls_ini(certificate)) as process:
            words = ("push", "-", "--url", f"https://localhost:{process.port}", "--cohort", "1")
            result = run(*words, stdin=csv_of([FULL]))
            assert result.returncode == 2
            assert b"certificate is not trusted" in result.stderr
            result = run(*words, "--ca-file", certificate, stdin=csv_of([FULL]))
            assert result.returncode == 0, result.stderr


def a_server_that_answers(answers: Sequence[bytes]) -> tuple[str, list[bytes], threading.Thread]:
    """Another server than ours: it gives these answers, one a connection, and keeps what it read."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []

    def serve() -> None:
        with listener:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    head, _, body = b"", b"", b""
                    data = b""
                    while b"\r\n\r\n" not in data:
                        data += connection.recv(65536)
                    head, _, body = data.partition(b"\r\n\r\n")
                    length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
                    while len(body) < length:
                        body += connection.recv(65536)
                    requests.append(body)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", requests, thread


class TestPatience:
    """The pushing side against servers that fail, without the waiting."""

    GOOD = (b'HTTP/1.1 200 OK\r\n\r\n{"received": 1, "imported": 1, "details": {"imported": 1, "updated": 0, '
            b'"unchanged": 0}, "errors": []}')

    def push(self, *answers: bytes) -> tuple[sis_sync.Client, list[float], list[bytes]]:
        url, requests, thread = a_server_that_answers(answers)
        client = sis_sync.Client(url, SECRET, "1", sis_sync.Progress(io.StringIO(), 1))
        waits: list[float] = []
        client.wait = lambda seconds, why: waits.append(seconds)  # type: ignore[method-assign]
        try:
            client.push([sis_sync.Row(2, student())], 10)
        finally:
            thread.join(20)
        return client, waits, requests

    def test_429_and_503_are_waited_for_as_retry_after_says(self) -> None:
        client, waits, requests = self.push(
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\n\r\n{}",
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\n\r\n<html>", self.GOOD)
        assert waits == [7, 2]
        assert client.summary.new == 1
        assert len(set(requests)) == 1      # the very same page each time

    def test_a_date_and_a_missing_retry_after_are_understood(self) -> None:
        client, waits, _ = self.push(
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n",
            b"HTTP/1.1 429 Too Many Requests\r\n\r\n", b"HTTP/1.1 408 Timeout\r\n\r\n", self.GOOD)
        assert waits[0] == 1 and len(waits) == 3
        assert client.summary.new == 1

    def test_other_faults_are_tried_again_with_growing_waits(self) -> None:
        faults = [b"", b"HTTP/1.1 500 Oops\r\n\r\n{}", b"nonsense\r\n\r\n", b"HTTP/1.1 502 Bad\r\n\r\n<html>",
                  b"HTTP/1.1 503 No\r\n\r\n{}"]
        client, waits, _ = self.push(*faults, self.GOOD)
        assert client.summary.new == 1
        for number, seconds in enumerate(waits):
            assert 0.75 * 2 ** number <= seconds <= 1.25 * 2 ** number
        with pytest.raises(sis_sync.CommandError, match="stopped: the server answered 500"):
            self.push(*[b"HTTP/1.1 500 Oops\r\n\r\n{}"] * 6)

    @pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad\r\n\r\n{}", b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n",
                                        b"HTTP/1.1 404 No\r\n\r\n<html>", b"HTTP/1.1 413 Large\r\n\r\n{}",
                                        b"HTTP/1.1 200 OK\r\n\r\n<html>", b'HTTP/1.1 200 OK\r\n\r\n{"details": 1}',
                                        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
                                        GOOD.replace(b"[]", b'[{"row": 2}]'), GOOD.replace(b"[]", b'["x"]'),
                                        GOOD.replace(b'"imported": 1, "updated"', b'"imported": "x", "updated"'),
                                        b'HTTP/1.1 400 Bad\r\n\r\n{"errors": null}',
                                        b'HTTP/1.1 422 Bad\r\n\r\n{"errors": {"email": ["x"]}}'])
    def test_what_no_repetition_mends_stops_at_once(self, answer: bytes) -> None:
        with pytest.raises(sis_sync.CommandError, match="stopped: "):
            self.push(answer)


class TestExport:
    @pytest.fixture
    def filled(self, tmp_path: pathlib.Path) -> pathlib.Path:
        """The ini of a database with rosters of two institutions in it."""
        ini = tmp_path / "sis_sync.ini"
        ini.write_text(ini_of(institutions="[institution a]\n[institution b]\nsecrets = env:NOT_SET\n"))
        service = sis_sync.Service(sis_sync.load_configuration(str(ini), {"SIS_SYNC_SECRET": SECRET}))
        handle(service, batch(FULL, student("=1", first_name="=1+1", last_name="-x", campus_name="a,\"b\"")))
        handle(service, batch(student(9), cohort_id="2027"))
        service.configuration = service.configuration._replace(institutions=(
            service.configuration.institutions[0]._replace(name="b"),))
        handle(service, batch(student(5)))
        service.roster.close()
        return ini

    def test_it_is_csv_with_the_field_names(self, filled: pathlib.Path) -> None:
        result = run("--config", filled, "export", "--institution", "a", "--cohort", "2026")
        assert result.stdout.decode().split("\r\n") == [
            ",".join(sis_sync.NAMES),
            "U2025001,alex.connor@student.example.edu.au,Alex,Connor,BUSI,Sunshine Coast,false",
            'U=1,u=1@example.edu,=1+1,-x,,"a,""b""",', ""]

    def test_for_a_spreadsheet_it_has_a_bom_and_no_formula(self, filled: pathlib.Path) -> None:
        result = run("--config", filled, "export", "--institution", "a", "--cohort", "2026", "--excel")
        assert result.stdout.startswith(b"\xef\xbb\xbfstudent_id_ext,")
        assert b",'=1+1,'-x," in result.stdout

    def test_the_database_itself_is_not_overwritten(self, filled: pathlib.Path) -> None:
        database = filled.with_name("sis_sync.db")
        before = database.read_bytes()
        result = run("--config", filled, "export", "--institution", "b", "--output", database)
        assert (result.returncode, b"is the database itself" in result.stderr) == (2, True)
        assert database.read_bytes() == before

    def test_several_rosters_are_named_and_none_is_guessed(self, filled: pathlib.Path) -> None:
        result = run("--config", filled, "export")
        assert (result.returncode, result.stdout) == (2, b"")
        assert "--institution a --cohort 2026\n" in result.stderr.decode()
        assert run("--config", filled, "export", "--institution", "b").returncode == 0
        result = run("--config", filled, "export", "--cohort", "x")
        assert b"no such roster; there are:\nsis_sync:   --institution a --cohort 2026" in result.stderr

    def test_who_silently_left_the_feed_is_listed(self, filled: pathlib.Path) -> None:
        with contextlib.closing(sqlite3.connect(filled.with_name("sis_sync.db"))) as connection:
            connection.execute("UPDATE entries SET seen_at = 1767225599 WHERE student_id_ext = 'U2025001'")
            connection.commit()
        words = ("--config", filled, "export", "--institution", "a", "--cohort", "2026", "--not-seen-since")
        assert [line.partition(b",")[0] for line in run(*words, "2026-01-01").stdout.splitlines()[1:]] == [b"U2025001"]
        assert len(run(*words, "2025-12-31").stdout.splitlines()) == 1

    @posix
    def test_the_output_file_is_its_owner_s_alone(self, filled: pathlib.Path, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "out.csv"
        assert run("--config", filled, "export", "--institution", "b", "--output", path).returncode == 0
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.read_text().splitlines()[1] == "U5,u5@example.edu,,,,,"
        result = run("--config", filled, "export", "--institution", "b", "--output", tmp_path / "no" / "x")
        assert (result.returncode, b"No such file" in result.stderr) == (2, True)
        mode = os.stat("/dev/null").st_mode
        assert run("--config", filled, "export", "--institution", "b", "--output", "/dev/null").returncode == 0
        assert os.stat("/dev/null").st_mode == mode

    def test_a_database_that_is_not_there_is_not_made(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "sis_sync.ini").write_text(ini_of())
        for words in (("export",), ("history",), ("backup", tmp_path / "copy.db")):
            result = run("--config", tmp_path / "sis_sync.ini", *words)
            assert (result.returncode, b"there is no database yet" in result.stderr) == (2, True)
        assert [path.name for path in tmp_path.iterdir()] == ["sis_sync.ini"]

    def test_a_command_that_reads_leaves_nothing_behind(self, filled: pathlib.Path, tmp_path: pathlib.Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        for words in (("export", "--institution", "b"), ("history",), ("check",), ("history", "--stale", "1")):
            run("--config", filled, *words)
            assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("seed", range(3))
    def test_pushed_exported_and_pushed_again_it_is_unchanged_in_any_order_of_pages(
            self, tmp_path: pathlib.Path, seed: int) -> None:
        pick = random.Random(seed)
        letters = "aZ09 ,;\"'=+-@\\|\u00e9e\u0301王\u200d👩\x85\u2028\ufeff\xad"

        def text(most: int) -> str:
            return "".join(pick.choices(letters, k=pick.randrange(most)))

        students = [{"student_id_ext": pick.choice("0=-'") + f"{number:03}{text(9)}", "email": f"u{number}@{number}",
                     "first_name": text(20), "last_name": text(20), "program_code": pick.choice((None, "", "B")),
                     "campus_name": text(40), "first_in_family": pick.choice((None, True, False))}
                    for number in range(700)]
        dumps = []
        with running(tmp_path, ini_of()) as process:
            for cohort in ("one", "two"):
                pages = [students[start:start + 100] for start in range(0, 700, 100)]
                if cohort == "two":
                    pages += pick.sample(pages, 3)
                    pick.shuffle(pages)
                for page in pages:
                    answer = process.push(*page, cohort_id=cohort).document
                    assert answer["errors"] == []
                exported = run("--config", process.ini, "export", "--cohort", cohort).stdout
                result = run("push", "-", "--cohort", cohort, "--url", f"http://127.0.0.1:{process.port}", "--json",
                             stdin=exported)
                summary = json.loads(result.stdout)
                assert (summary["updated"], summary["unchanged"], summary["rejected"]) == (700, 700, [])
                assert run("--config", process.ini, "export", "--cohort", cohort).stdout == exported
                dumps.append(exported)
        assert dumps[0] == dumps[1]


class TestHistory:
    @pytest.fixture
    def ini(self, tmp_path: pathlib.Path) -> pathlib.Path:
        ini = tmp_path / "sis_sync.ini"
        name = "a-very-long-name-of-an-institution"
        ini.write_text(ini_of(institutions=f"[institution {name}]\n[institution other]\nsecrets = env:NO\n"))
        service = sis_sync.Service(sis_sync.load_configuration(str(ini), {"SIS_SYNC_SECRET": SECRET}))
        handle(service, batch(student(1), student(2), cohort_id="0e0f4a52-6d1f-4f8e-9a77-0d5d3b1c2a10"),
               peer="2001:db8:1234:5678:9abc:def0:1234:5678")
        handle(service, batch(student(1), {}, *[None] * 120))
        service.roster.close()
        return ini

    def test_it_is_an_aligned_table_of_100_columns_the_latest_first(self, ini: pathlib.Path) -> None:
        lines = run("--config", ini, "history").stdout.decode().splitlines()
        assert len(lines) == 3
        assert lines[0].split() == ["time", "institution", "cohort", "client", "received", "new", "updated",
                                    "unchanged", "rejected", "ms"]
        assert {len(line) for line in lines} == {100}
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ a-very", lines[1])
        assert lines[1].split()[4:9] == ["122", "1", "0", "0", "121"]

    def test_errors_lists_the_rejected_rows(self, ini: pathlib.Path) -> None:
        lines = run("--config", ini, "history", "--errors", "--limit", "1").stdout.decode().splitlines()
        assert lines[2:4] == ["    row 2: missing_field: student_id_ext required",
                              "    row 3: not_an_object: a student must be an object"]
        assert lines[-1] == "    and 21 more" and len(lines) == 103

    def test_json(self, ini: pathlib.Path) -> None:
        syncs = json.loads(run("--config", ini, "history", "--json").stdout)
        assert [(sync["received"], sync["new"], len(sync["errors"])) for sync in syncs] == [(122, 1, 100), (2, 2, 0)]
        assert list(syncs[0]) == [*sis_sync.HISTORY_COLUMNS, "errors"]

    def test_stale_names_who_has_gone_quiet_for_cron(self, ini: pathlib.Path) -> None:
        result = run("--config", ini, "history", "--stale", "1")
        assert (result.returncode, result.stdout.decode()) == (1, "other: last sync never\n")
        with contextlib.closing(sqlite3.connect(ini.with_name("sis_sync.db"))) as connection:
            connection.execute("UPDATE syncs SET time = time - 7200")
            connection.commit()
        lines = run("--config", ini, "history", "--stale", "1").stdout.decode().splitlines()
        assert len(lines) == 2 and lines[0].startswith("a-very-long-name-of-an-institution: last sync 20")
        result = run("--config", ini, "history", "--stale", "3")
        assert (result.returncode, result.stdout.decode()) == (1, "other: last sync never\n")
        ini.write_text(ini.read_text().replace("[institution other]\nsecrets = env:NO\n", ""))
        result = run("--config", ini, "history", "--stale", "3")
        assert (result.returncode, result.stdout) == (0, b"")


class TestBackup:
    def test_it_copies_a_live_database_as_it_is_at_one_moment(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process:
            ended = threading.Event()
            pushed = threading.Semaphore(0)

            def keep_pushing() -> None:
                number = 0
                while not ended.is_set():
                    process.push(*map(student, range(50)), cohort_id=str(number))
                    number += 1
                    pushed.release()

            thread = threading.Thread(target=keep_pushing)
            thread.start()
            copies = [tmp_path / f"copy{number}.db" for number in range(3)]
            for copy in copies:
                pushed.acquire()
                result = run("--config", process.ini, "backup", copy)
                assert result.returncode == 0, result.stderr
            ended.set()
            thread.join()
            for copy in copies:
                if os.name == "posix":
                    assert copy.stat().st_mode & 0o777 == 0o600
                with contextlib.closing(sqlite3.connect(copy)) as connection:
                    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                    counts = connection.execute("SELECT count(*) FROM entries GROUP BY roster_id").fetchall()
                    assert counts and set(counts) == {(50,)}
                    assert len(counts) == connection.execute("SELECT count(*) FROM syncs").fetchone()[0]

    def test_it_overwrites_nothing(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "sis_sync.ini").write_text(ini_of())
        sis_sync.Roster(str(tmp_path / "sis_sync.db")).close()
        (tmp_path / "there.db").write_text("precious")
        result = run("--config", tmp_path / "sis_sync.ini", "backup", tmp_path / "there.db")
        assert (result.returncode, b"File exists" in result.stderr) == (2, True)
        assert (tmp_path / "there.db").read_text() == "precious"


# ---------------------------------------------------------------------------------------------
# All sections: what nobody thought of, and other servers with our application behind them
# ---------------------------------------------------------------------------------------------

SEEDS = [
    request_of(batch(student(1, first_name="Zoë"), {}, None)), head_of("GET", "/healthz"), head_of("HEAD", "/openapi.json"),
    request_of(batch(), secret="wrong"), request_of(gzip.compress(b'{"cohort_id": "1", "students": []}'), Content_Encoding="gzip"),
    head_of(Transfer_Encoding="chunked") + chunked(json.dumps(batch(student(2))).encode(), 20, b";a=b", b"T: 1\r\n"),
    head_of(Transfer_Encoding="chunked", Content_Encoding="gzip") + chunked(gzip.compress(b"{}"), 7),
    b"GET http://example.edu/healthz?x=y HTTP/1.0\r\n\r\n", request_of(b'[{"a": [1, 2.5e3, "\\ud83d", true, null]}]'),
    request_of(batch(student(3)), Expect="100-continue"), head_of(Content_Length=9 << 20),
]
PARTICLES = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"-1", b"99999999999999999999", b"\xff", b"\x85", b"\xed\xa0\x80",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n", b"HTTP/1.1", b"chunked", b"gzip", b'"', b"[", b"{", b"]", b"}",
    b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"null", b"Bearer ", b"A" * 300, b"[" * 2000, b"\x1f\x8b\x08", b"\r\n\r\n"]


def mutated(pick: random.Random) -> bytes:
    """A request with one to four accidents, anywhere in it."""
    data = bytearray(pick.choice(SEEDS))
    for _ in range(pick.randrange(1, 5)):
        at, to = sorted((pick.randrange(len(data) + 1), pick.randrange(len(data) + 1)))
        accident = pick.randrange(6)
        if accident == 0 and data:
            data[at % len(data)] = pick.randrange(256)
        elif accident == 1:
            data[at:at] = pick.choice(PARTICLES)
        elif accident == 2:
            del data[at:min(to, at + pick.choice((1, 2, 20, 1000)))]
        elif accident == 3:
            data[at:at] = data[at:to]
        elif accident == 4:
            data[at:to] = pick.choice(SEEDS)[at:to]
        else:
            del data[to:]
    return bytes(data)


def fuzz_once(process: Process, pick: random.Random) -> int:
    """One mutated request: whatever it is, it gets an answer as promised, or it said nothing at all."""
    data = mutated(pick)
    # From many addresses, as one has too few ports for a thousand connections a second.
    source = f"127.0.0.{pick.randrange(1, 255)}" if sys.platform == "linux" else "127.0.0.1"
    with process.connect(source) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        answer = read_to_end(connection)
    answer = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"", 1)
    if not data:
        return 0
    try:
        status = parse_answer(answer, data.lstrip(b"\r\n").startswith(b"HEAD ") and answer.endswith(b"\r\n\r\n")).status
        assert status < 500 or status in (501, 505)
    except Exception:
        print(f"the request was {data!r}\nthe answer was {answer[:500]!r}", file=sys.stderr)
        raise
    return status


def settled(process: Process, threads: int) -> bool:
    """Whether all connections have ended, once the server has had the time to notice."""
    deadline = time.monotonic() + 20
    while threads_of(process) > threads and time.monotonic() < deadline:
        process.exchange(head_of("GET", "/healthz"))
    return threads_of(process) <= threads


@linux
def test_thousands_of_mutated_requests_do_no_harm(tmp_path: pathlib.Path) -> None:
    with running(tmp_path, ini_of(limits=FAST + "request_timeout = 5")) as process:
        pick = random.Random(2026)
        process.push(student(1))
        threads, memory = threads_of(process), memory_of(process)
        statuses = [fuzz_once(process, pick) for _ in range(2500)]
        assert {200, 400, 401, 404, 413, 415, 501} <= set(statuses)     # the mutations reach everything
        assert settled(process, threads + 1)
        assert memory_of(process) < memory + 20
        assert process.push(student(1)).status == 200
        process.stop()
        log = "\n".join(process.log)
        assert "Traceback" not in log and "server_error" not in log and SECRET not in log


@pytest.mark.parametrize("words", [
    ("gunicorn", "--threads", "4", "--bind", "127.0.0.1:0", "sis_sync:application"),
    ("waitress", "--listen=127.0.0.1:0", "sis_sync:application")], ids=lambda words: words[0])
def test_behind_another_server_our_answers_are_the_same(tmp_path: pathlib.Path, words: tuple[str, ...]) -> None:
    """Where that server passes a request on; what it refuses itself, it answers in its own way."""
    pytest.importorskip(words[0])
    (tmp_path / "sis_sync.ini").write_text(ini_of())
    process = subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.PIPE, text=True,
                               env={**ENVIRONMENT, "SIS_SYNC_CONFIG": str(tmp_path / "sis_sync.ini")})
    assert process.stderr
    port = int(next(match[1] for line in process.stderr if (match := re.search(r"http://127.0.0.1:(\d+)", line))))
    reader = threading.Thread(target=process.stderr.read, daemon=True)     # so that its log never blocks it
    reader.start()

    def exchange(data: bytes) -> tuple[int, Any]:
        connection = socket.create_connection(("127.0.0.1", port), 20)
        with connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            answer = read_to_end(connection)
        head, _, body = answer.partition(b"\r\n\r\n")
        ours = b"application/json" in head
        return int(answer.split(b" ", 2)[1] if answer else 0), json.loads(body) if ours and body else None

    try:
        closing = {"Connection": "close"}
        body = json.dumps(batch(student(1), {})).encode()
        for data, status, code in (
                (request_of(body, **closing), 200, None),
                (head_of(Transfer_Encoding="chunked", Content_Type="application/json", **closing) + chunked(body, 9), 200, None),
                (request_of(gzip.compress(body), Content_Encoding="gzip", **closing), 200, None),
                (head_of("GET", "/healthz", **closing), 200, None), (head_of("PUT", **closing), 405, "method_not_allowed"),
                (head_of("GET", "/x", **closing), 404, "not_found"), (head_of(secret="wrong", **closing), 401, "unauthorized"),
                (request_of(b"{", **closing), 400, "malformed_json"),
                (request_of(body, Content_Type="text/plain", Connection="close"), 415, "unsupported_media_type"),
                (head_of(Content_Length=9 << 20, **closing) + b" " * (9 << 20), 413, "batch_too_large")):
            answered, document = exchange(data)
            assert (answered, document and document.get("error")) == (status, code)
        passed_on = 0
        for _, data, status, code in MALFORMED:
            answered, document = exchange(data)
            assert answered < 500 or answered in (501, 505)
            if document and "error" in document:
                passed_on += 1
                assert (answered, document["error"]) in {
                    (problem.status, problem.code) for problem in sis_sync.ERRORS}
        assert exchange(head_of("GET", "/healthz", **closing)) == (200, {"status": "ok"})
    finally:
        process.terminate()
        process.wait(20)
        reader.join(20)
        process.stderr.close()


# ---------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------

class TestReadme:
    TEXT = (HERE / "README.md").read_text("utf-8") if (HERE / "README.md").exists() else ""

    def test_it_lists_every_command(self) -> None:
        assert set(re.findall(r"^\| `([a-z]+)[ `]", self.TEXT.partition("## The commands")[2].partition("\n## ")[0],
                              re.MULTILINE)) == set(sis_sync.COMMANDS)

    def test_it_lists_every_error_with_its_status(self) -> None:
        rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", self.TEXT, re.MULTILINE)
        assert rows and {(int(status), code) for status, code in rows} == {
            (problem.status, problem.code) for problem in sis_sync.ERRORS}
        for code in sis_sync.ROW_ERRORS:
            assert f"`{code}`" in self.TEXT

    def test_it_lists_every_field_and_every_setting(self) -> None:
        for field in sis_sync.FIELDS:
            assert f"`{field.name}`" in self.TEXT
        for setting in sis_sync.SETTINGS:
            assert re.search(rf"^\| `{setting.key}` \| {re.escape(f'`{setting.default}`' if setting.default else '')} ?\|",
                             self.TEXT, re.MULTILINE), setting.key

    def test_it_tells_the_size_of_the_module(self) -> None:
        lines = len(MODULE.read_text("utf-8").splitlines())
        told = re.search(r"([\d,]+) lines", self.TEXT)
        assert told and abs(int(told[1].replace(",", "")) - lines) < 50


# ---------------------------------------------------------------------------------------------
# Section 8: speed and cost, by hand: make bench
# ---------------------------------------------------------------------------------------------

class Benchmark:
    """Rounds of floor and requests in turn, so that a machine that slows down slows all of them."""

    SIZE = 5000

    def __init__(self, folder: pathlib.Path, stored: int) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.round = 0
        self.floor = self.make_floor(folder / "floor")
        self.servers = {"": self.make_server(folder / "empty", 0)}
        if stored:
            self.servers[f", {stored:,} stored"] = self.make_server(folder / "stored", stored)

    @staticmethod
    def make_floor(folder: pathlib.Path) -> sqlite3.Connection:
        """A database just like the server's, with nothing in front of it."""
        folder.mkdir()
        path = folder / "floor.db"
        sis_sync.Roster(str(path)).close()
        return sis_sync.open_database(str(path))

    def make_server(self, folder: pathlib.Path, stored: int) -> Process:
        folder.mkdir()
        path = folder / "sis_sync.db"
        sis_sync.Roster(str(path)).close()
        with contextlib.closing(sis_sync.open_database(str(path))) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            for first in range(0, stored, 100_000):
                connection.execute("BEGIN")
                roster = sis_sync.roster_of(connection, "other", str(first))
                students = self.students(f"S{first}", min(100_000, stored - first))
                connection.executemany(sis_sync.upsert(1), (
                    (roster, 1, 1, 1, *student.values()) for student in students))
                connection.execute("COMMIT")
                if first % 1_000_000 == 0 and sys.stderr.isatty():
                    print(f"\rfilling the database: {first:,} of {stored:,}", end="", file=sys.stderr)
        process = Process(folder, ini_of(limits="requests_per_minute = 100000"))
        process.rest = memory_of(process) if linux_proc() else 0.0     # type: ignore[attr-defined]
        return process

    @staticmethod
    def students(prefix: str, number: int) -> list[dict[str, Any]]:
        return [{"student_id_ext": f"{prefix}-{index:06}",
                 "email": f"alex.connor{index}@student.example.edu.au", "first_name": f"Alex{index % 500}",
                 "last_name": f"Connor{index % 700}", "program_code": "BUSI",
                 "campus_name": "Sunshine Coast", "first_in_family": index % 3 == 0} for index in range(number)]

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def push(self, process: Process, data: bytes) -> bytes:
        with process.connect() as connection:
            connection.sendall(data)
            return read_to_end(connection)

    def one_round(self) -> None:
        self.round += 1
        students = self.students(f"R{self.round}", self.SIZE)
        body = json.dumps(batch(*students)).encode()
        for student in random.Random(self.round).sample(students, self.SIZE // 10):
            student["program_code"] = "NURS"
        new, changed = request_of(body), request_of(batch(*students))
        with self.timed("floor: json.loads and executemany"):
            self.run_floor(body)
        for suffix, process in self.servers.items():
            for name, data, expected in (("import of new students", new, b'"imported": 5000, "updated": 0'),
                                         ("identical re-send", new, b'"unchanged": 5000'),
                                         ("re-send, 10 % changed", changed, b'"unchanged": 4500')):
                with self.timed(name + suffix):
                    answer = self.push(process, data)
                assert expected in answer, answer

    # The upsert as anybody would write it, a row a statement.
    UPSERT = (f"INSERT INTO entries (roster_id, {', '.join(sis_sync.NAMES)}, created_at, changed_at, seen_at) "
              f"VALUES ({', '.join('?' * (len(sis_sync.NAMES) + 4))}) "
              + sis_sync.upsert(1).partition("WHERE true")[2])

    def run_floor(self, body: bytes) -> None:
        students, now = json.loads(body)["students"], int(time.time())
        self.floor.execute("BEGIN IMMEDIATE")
        self.floor.executemany(self.UPSERT, (
            (1, *map(student.get, sis_sync.NAMES), now, now, now) for student in students))
        self.floor.execute("COMMIT")

    def eight_at_once(self, rounds: int) -> None:
        """Each of eight clients pushes 5,000 new students; a round is over when all have their answer."""
        for _ in range(rounds):
            self.round += 1
            datas = [request_of(batch(*self.students(f"C{self.round}-{client}", self.SIZE))) for client in range(8)]
            with concurrent.futures.ThreadPoolExecutor(8) as clients, self.timed("8 clients at once, 5,000 each"):
                answers = list(clients.map(lambda data: self.push(self.servers[""], data), datas))
            assert all(b'"imported": 5000, "updated": 0' in answer for answer in answers)

    def small_requests(self, number: int) -> float:
        """401s a second, a connection each, one after the other."""
        data = head_of(secret="wrong", Content_Length=0)
        start = time.perf_counter()
        for _ in range(number):
            assert b" 401 " in self.push(self.servers[""], data)
        return number / (time.perf_counter() - start)


def linux_proc() -> bool:
    return os.path.exists("/proc/self/status")


def bench(arguments: argparse.Namespace) -> int:
    database = pathlib.Path(sis_sync.load_configuration().settings["database"])
    with tempfile.TemporaryDirectory(prefix="sis_sync-bench-", dir=database.parent) as folder:
        benchmark = Benchmark(pathlib.Path(folder), arguments.stored)
        benchmark.one_round()           # to warm up
        benchmark.seconds.clear()
        for _ in range(arguments.rounds):
            benchmark.one_round()
        benchmark.eight_at_once(max(3, arguments.rounds // 4))
        small = benchmark.small_requests(300)
        process = benchmark.servers[""]
        memory = {"at rest": process.rest,      # type: ignore[attr-defined]
                  "peak": memory_of(process, "VmHWM")} if linux_proc() else {}
        for server in benchmark.servers.values():
            server.stop()
        benchmark.floor.close()
    print_bench(benchmark.seconds, small, memory, arguments.json)
    return 0


def print_bench(seconds: Mapping[str, Sequence[float]], small: float, memory: Mapping[str, float],
                as_json: bool) -> None:
    floor = next(iter(seconds.values()))
    rows = []
    for name, values in seconds.items():
        students = 40_000 if name.startswith("8 ") else 5000
        # The ratio is the median of the rounds' own ratios: a machine that slows down for some
        # rounds slows the floor of these rounds, too.
        floors = floor if len(values) == len(floor) else [statistics.median(floor)] * len(values)
        rows.append({"name": name, "median_ms": 1000 * statistics.median(values), "minimum_ms": 1000 * min(values),
                     "maximum_ms": 1000 * max(values), "students_per_second": students / statistics.median(values),
                     "ratio_to_floor": statistics.median(
                         value / students * 5000 / base for value, base in zip(values, floors))})
    if as_json:
        print(json.dumps({"python": sys.version.split()[0], "sqlite": sqlite3.sqlite_version, "rows": rows,
                          "small_requests_per_second": small, "memory_mb": memory}))
        return
    print(f"CPython {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, batches of 5,000 students\n")
    print(f"{'':<48}{'median':>9}{'min':>8}{'max':>8}{'students/s':>12}{'x floor':>9}")
    for row in rows:
        print(f"{row['name']:<48}{row['median_ms']:>6.1f} ms{row['minimum_ms']:>8.1f}{row['maximum_ms']:>8.1f}"
              f"{row['students_per_second']:>12,.0f}{row['ratio_to_floor']:>9.2f}")
    print(f"\n401s a second, a connection each: {small:,.0f}")
    if memory:
        print("memory: " + ", ".join(f"{value:.0f} MB {name}" for name, value in memory.items()))


def fuzz(arguments: argparse.Namespace) -> int:
    """Mutated requests for so many seconds, each seed's outcome the same every time."""
    with tempfile.TemporaryDirectory() as folder, running(
            pathlib.Path(folder), ini_of(limits=FAST + "request_timeout = 5")) as process:
        pick = random.Random(arguments.seed)
        process.push(student(1))
        threads, memory = threads_of(process), memory_of(process)
        counts: dict[int, int] = {}
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            status = fuzz_once(process, pick)
            counts[status] = counts.get(status, 0) + 1
        assert settled(process, threads + 1) and process.push(student(1)).status == 200
        print(f"{sum(counts.values()):,} requests, by status: {dict(sorted(counts.items()))}; "
              f"memory {memory:.0f} MB before, {memory_of(process):.0f} MB after")
        process.stop()
        assert not [line for line in process.log if "Traceback" in line or "server_error" in line]
    return 0


def timing(arguments: argparse.Namespace) -> int:
    """Whether the time of a 401 tells a wrong first byte from a wrong last one: Welch's t."""
    wrong = {"first": "X" + SECRET[1:], "last": SECRET[:-1] + "X"}
    samples: dict[str, list[float]] = {name: [] for name in wrong}
    with tempfile.TemporaryDirectory() as folder, running(pathlib.Path(folder), ini_of()) as process:
        for _ in range(arguments.samples):
            for name in random.sample(list(wrong), 2):
                data = head_of(secret=wrong[name], Content_Length=0)
                with process.connect() as connection:
                    start = time.perf_counter()
                    connection.sendall(data)
                    answer = connection.recv(65536)
                    samples[name].append(time.perf_counter() - start)
                    assert b" 401 " in answer
    # Without the slowest twentieth of each, which is the system's scheduling.
    first, last = (sorted(values)[:len(values) * 19 // 20] for values in samples.values())
    t = (statistics.mean(first) - statistics.mean(last)) / math.sqrt(
        statistics.variance(first) / len(first) + statistics.variance(last) / len(last))
    print(f"a wrong first byte: {1e6 * statistics.mean(first):.1f} us, a wrong last byte: "
          f"{1e6 * statistics.mean(last):.1f} us, {arguments.samples:,} samples of each; Welch's t = {t:.2f}")
    return 0 if abs(t) < 4.5 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="What is measured by hand.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("bench", help="speed, as ratios to the floor")
    command.add_argument("--rounds", type=int, default=21)
    command.add_argument("--stored", type=int, default=0, metavar="N",
                         help="also against a database that holds N students of other batches")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=bench)
    command = commands.add_parser("fuzz", help="mutated requests, for so many seconds")
    command.add_argument("seconds", type=float)
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=fuzz)
    command = commands.add_parser("timing", help="what the time of a 401 tells")
    command.add_argument("--samples", type=int, default=5000)
    command.set_defaults(run=timing)
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())

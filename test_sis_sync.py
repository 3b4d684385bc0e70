"""The tests of sis_sync, in the order of its contract; and what is to be run by hand.

    python3 -m pytest -q test_sis_sync.py       # or: make test
    python3 test_sis_sync.py bench              # or: make bench
    python3 test_sis_sync.py fuzz 600           # ten minutes of mutated requests
    python3 test_sis_sync.py cost               # the most expensive requests that were found
    python3 test_sis_sync.py crash 300          # kill -9 at random moments under load
    python3 test_sis_sync.py stops 200          # SIGTERM likewise
    python3 test_sis_sync.py timing             # whether a 401 tells how much of a secret was right

Most tests talk to a real server process over a real socket, with a real database file; what is
pure is tested as the function it is.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import configparser
import contextlib
import csv
import doctest
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
cpython = pytest.mark.skipif(sys.implementation.name != "cpython", reason="measures CPython's memory")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
FAST = "requests_per_minute = 100000\n"
FULL: dict[str, Any] = {field.name: field.example for field in sis_sync.FIELDS}

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


NAMED_HEADERS = {name.lower() for error in sis_sync.ERRORS for name in error.headers}


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
        rows = [row for row in sis_sync.ERRORS
                if (row.code, row.status) == (document["error"], int(match[1]))]
        assert rows and set(document) <= {"error", "detail", *(name for row in rows for name in row.carries)}
        assert {name.lower() for row in rows for name in row.headers} >= set(headers) & NAMED_HEADERS
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
                 words: Sequence[str] = (), command: Sequence[str] = COMMAND, **popen: Any) -> None:
        self.folder, self.database = folder, folder / "sis_sync.db"
        self.ini = folder / "sis_sync.ini"
        if ini:
            self.ini.write_text(ini, encoding="utf-8")
        self.environment = {**ENVIRONMENT, **environment}
        self.words = (*command, *(("--config", str(self.ini)) if ini else ()),
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


def warnings_of(folder: pathlib.Path, text: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """What a start with this file warns of."""
    handler = logging.StreamHandler(io.StringIO())
    handler.setLevel(logging.WARNING)
    sis_sync.log.addHandler(handler)
    try:
        configuration_of(folder, text, environment)
    finally:
        sis_sync.log.removeHandler(handler)
    return [line.partition("warning: ")[2] for line in handler.stream.getvalue().splitlines()]


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


def peak_during(function: Any) -> int:
    """The most bytes that Python had allocated meanwhile."""
    tracemalloc = pytest.importorskip("tracemalloc")        # PyPy has none
    tracemalloc.start()
    try:
        function()
        return int(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


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
                                     if value is not None}, body=[data]))
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
    port = int(next(filter(None, map(re.compile(r"listens on .*:(\d+)/").search, process.stderr)))[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", SYNC, json.dumps(batch(student())), {
        "Authorization": f"Bearer {SECRET}"})
    assert connection.getresponse().status == 200
    connection.close()
    process.terminate()
    process.communicate(timeout=20)
    assert (tmp_path / "sis_sync.db").exists()


def python_older_than_needed(name: str) -> str:
    """One that runs, and not a stand-in for one; else the test is skipped."""
    path = shutil.which(name)
    if not path or subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"no {name} here")
    return path


@pytest.mark.parametrize("name", ["python3.7", "python3.8"])
def test_an_older_python_gets_one_line_and_status_2(name: str) -> None:
    result = run_process("--version", command=(python_older_than_needed(name), str(MODULE)))
    assert (result.returncode, result.stdout) == (2, b"")
    assert re.fullmatch(r"sis_sync:? needs Python 3\.9 or newer; this is 3\.[78]\.\d+\r?\n", result.stderr.decode())


def test_a_python_too_old_to_read_the_file_shows_a_line_that_says_what_is_needed() -> None:
    result = run_process("--version", command=(python_older_than_needed("python3.6"), str(MODULE)))
    assert result.returncode and b"sis_sync needs Python 3.9 or newer" in result.stderr


class TestGrowth:
    """What is likely to be asked for next is a line in a table. Each is tried on a copy of the module."""

    def grown(self, folder: pathlib.Path, **before: str) -> Any:
        """The module with lines put in: each before the only line that begins with its anchor."""
        source = MODULE.read_text("utf-8")
        for anchor, lines in before.items():
            start = {"fields": '    Field("first_in_family"', "routes": "ROUTES = {", "route": '    "/healthz": (',
                     "commands": "COMMANDS: ", "command": '    "backup": ('}[anchor]
            assert source.count(f"\n{start}") == 1
            source = source.replace(f"\n{start}", f"\n{lines}\n{start}")
        (folder / "grown.py").write_text(source, "utf-8")
        spec = importlib.util.spec_from_file_location("grown", folder / "grown.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["grown"] = module               # where dataclasses look it up
        spec.loader.exec_module(module)
        return module

    def service_of(self, module: Any, folder: pathlib.Path) -> Any:
        (folder / "test.ini").write_text(ini_of())
        return module.Service(module.load_configuration(str(folder / "test.ini"), {"SIS_SYNC_SECRET": SECRET}))

    def ask(self, module: Any, service: Any, method: str, path: str, document: Any = None) -> tuple[Any, Any]:
        data = json.dumps(document).encode() if document else b""
        response = service.handle(module.Request("192.0.2.1", method, path, body=[data], headers={
            "authorization": f"Bearer {SECRET}", "content-length": str(len(data))}))
        return response, json.loads(response.body or b"null")

    def test_a_new_field_is_one_line_and_arrives_everywhere(self, tmp_path: pathlib.Path) -> None:
        with contextlib.closing(sis_sync.Roster(str(tmp_path / "sis_sync.db"))) as roster, roster.transaction():
            pass                                    # a database from before the field was there
        grown = self.grown(tmp_path, fields='    Field("locker", "which locker", longest=9),')
        service = self.service_of(grown, tmp_path)
        _, answer = self.ask(grown, service, "POST", SYNC, batch(
            student(1, locker="A 12"), student(2, locker="much too long"), student(3)))
        assert (answer["details"]["imported"], answer["ignored"]) == (2, [])
        assert answer["errors"] == [{"row": 2, "field": "locker", "error": "invalid_field",
                                     "message": "locker must be at most 9 characters"}]
        _, again = self.ask(grown, service, "POST", SYNC, batch(student(1, locker="B 7"), student(3)))
        assert again["details"] == {"imported": 0, "updated": 2, "unchanged": 1}
        _, document = self.ask(grown, service, "GET", "/openapi.json")
        schema = document["components"]["schemas"]["Student"]["properties"]["locker"]
        assert (schema["type"], schema["maxLength"], schema["description"]) == (
            ["string", "null"], 9, "which locker")
        service.roster.close()
        with contextlib.closing(sqlite3.connect(tmp_path / "sis_sync.db")) as connection:
            assert connection.execute("SELECT locker FROM roster ORDER BY student_id_ext").fetchall() == [
                ("B 7",), (None,)]
        command = (sys.executable, str(tmp_path / "grown.py"))
        exported = run_process("--config", tmp_path / "test.ini", "export", command=command).stdout.decode()
        assert exported.splitlines()[0].split(",") == list(grown.NAMES)
        assert [row["locker"] for row in csv.DictReader(io.StringIO(exported))] == ["B 7", ""]

    def test_a_new_route_is_one_function_and_one_row(self, tmp_path: pathlib.Path) -> None:
        grown = self.grown(
            tmp_path, routes="def version(service, request, configuration):\n"
                             "    return {'version': __version__}\n\n",
            route='    "/version": ("GET", version, "Which version this is"),')
        service = self.service_of(grown, tmp_path)
        assert self.ask(grown, service, "GET", "/version")[1] == {"version": sis_sync.__version__}
        assert self.ask(grown, service, "HEAD", "/version")[0].status == 200
        response, _ = self.ask(grown, service, "POST", "/version")
        assert (response.status, dict(response.headers)["Allow"]) == (405, "GET, HEAD")
        _, document = self.ask(grown, service, "GET", "/openapi.json")
        assert document["paths"]["/version"]["get"]["summary"] == "Which version this is"
        assert {"200", "405", "503"} <= set(document["paths"]["/version"]["get"]["responses"])
        service.roster.close()

    def test_a_new_command_is_one_function_and_one_row(self, tmp_path: pathlib.Path) -> None:
        self.grown(tmp_path, commands='def command_greet(arguments):\n    """Say hello."""\n'
                                      "    print('hello', arguments.whom)\n    return 0\n\n",
                   command='    "greet": (command_greet, (("whom", "who is greeted", {}),)),')
        command = (sys.executable, str(tmp_path / "grown.py"))
        assert run_process("greet", "Zoe", command=command) == Result(0, b"hello Zoe" + os.linesep.encode(), b"")
        assert b"Say hello." in run_process("--help", command=command).stdout
        assert b"who is greeted" in run_process("greet", "--help", command=command).stdout


def wsgi(application: Any, method: str, path: str, body: bytes = b"", **environ: Any) -> tuple[str, Any]:
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "REMOTE_ADDR": "192.0.2.1", "QUERY_STRING": "",
               "SCRIPT_NAME": "", "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)),
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

    def test_a_chunked_body_that_the_host_does_not_hand_on_is_told_so(self, application: Any) -> None:
        status, document = wsgi(application, "POST", SYNC, b"", CONTENT_LENGTH="", HTTP_TRANSFER_ENCODING="chunked",
                                HTTP_AUTHORIZATION=f"Bearer {SECRET}")
        assert (status, document["detail"]) == (
            "400 Bad Request", "this host does not hand chunked bodies on: send a Content-Length")

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
        *_, line = capfd.readouterr().err.splitlines()      # behind a warning: no secret is set
        assert "GET /healthz 500" in line and line.endswith("did you mean port?")
        assert wsgi(validator(sis_sync.application), "HEAD", "/healthz") == ("500 Internal Server Error", None)

    def test_what_it_logs_is_escaped_whatever_the_server_lets_through(self, application: Any, capfd: Any) -> None:
        assert wsgi(sis_sync.application, "G\x1b[31mT", "/x\n")[0] == "501 Not Implemented"
        assert r" G\x1b[31mT /x\x0a 501 " in capfd.readouterr().err

    def test_below_a_prefix_it_is_found_by_the_path_after_it(self, application: Any) -> None:
        assert wsgi(application, "GET", "/healthz", SCRIPT_NAME="/roster")[0] == "200 OK"


# ---------------------------------------------------------------------------------------------
# Section 2: the endpoint
# ---------------------------------------------------------------------------------------------

ROW = ", ".join(sis_sync.NAMES)

TEXT = [field for field in sis_sync.FIELDS if field.kind is str]
OPTIONAL = [field for field in TEXT if not field.required]
BOOLEANS = [field for field in sis_sync.FIELDS if field.kind is bool]
# Unicode's White_Space; and what looks like some and is none.
BLANKS = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
          "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000")
NO_BLANKS = "\u180e\u200b\u2060\ufeff"
# Field, value sent, value stored, or the error and its message.
GOOD: list[tuple[str, Any, Any]] = [
    ("student_id_ext", "0", "0"), ("student_id_ext", "0012", "0012"),
    ("student_id_ext", "x" * 255, "x" * 255),
    ("student_id_ext", "  U 1\t", "U 1"),
    ("email", "a@b", "a@b"), ("email", "a" * 252 + "@b", "a" * 252 + "@b"),
    ("email", "\u00a0a@b\n", "a@b"), ("email", "o'brien+x@b.例え", "o'brien+x@b.例え"),
    *((field.name, value, value) for field in OPTIONAL
      for value in ("O'Brien", "Nguyễn", "Zoë", "王", "e\u0301", "क्\u200dष", "👩\u200d🎓", "x" * field.longest,
                    "a\x80b", "=1+1", "a \u3000b", "a\x85b")
      if len(value) <= field.longest),
    *(("first_name", f"{blank}a{blank}", "a") for blank in BLANKS),
    *(("first_name", f"{other}a{other}", f"{other}a{other}") for other in NO_BLANKS),
    *((field.name, None, None) for field in sis_sync.FIELDS if not field.required),
    *((field.name, value, None) for field in OPTIONAL for value in ("", " \u3000\r\n")),
    *((field.name, value, int(value)) for field in BOOLEANS for value in (True, False)),
]
NUMBERS_AND_SUCH: list[Any] = [1, 1.5, True, [], {}, ["x"]]
NO_BOOLEANS: list[Any] = ["true", "", 1, 0, 0.0, [], {}]
BAD: list[tuple[str, Any, str, str]] = [
    *((field.name, value, "missing_field", f"{field.name} required")
      for field in TEXT if field.required for value in (None, "", " \u2003")),
    *((field.name, value, "invalid_field", f"{field.name} must be a string")
      for field in TEXT for value in NUMBERS_AND_SUCH),
    *((field.name, value, "invalid_field", f"{field.name} must be true, false or null")
      for field in BOOLEANS for value in NO_BOOLEANS),
    *((field.name, value, "invalid_field", f"{field.name} must be at most {field.longest} characters")
      for field in TEXT for value in ["a@" + "b" * (field.longest - 1)]),
    *(("email", value, "invalid_field",
       "email must be an e-mail address: something, one @, something, no white space")
      for value in ("a", "@", "abc", "@bc", "ab@", "a@b@c", "a@b, c@d", *(f"a@b{blank}c" for blank in BLANKS[5:]))),
    *((field.name, f"a@{character}b", "invalid_field", f"{field.name} holds U+{ord(character):04X}, {what}")
      for field in TEXT
      for what, characters in (("a control character", "\0\t\n\x1c\x1f\x7f"),
                               ("half of a surrogate pair", "\ud800\udbff\udc00\udfff"))
      for character in characters),
    *((field.name, f"\x1fa@b{field.name}", "invalid_field", f"{field.name} holds U+001F, a control character")
      for field in TEXT),
]


class TestFields:
    @pytest.mark.parametrize("name, value, stored", GOOD)
    def test_a_good_value_is_kept_as_it_was_sent(self, name: str, value: Any, stored: Any) -> None:
        records, errors = sis_sync.check_rows([{**FULL, name: value}], sis_sync.ANYONE)
        assert not errors
        assert dict(zip(sis_sync.NAMES, records[0]))[name] == stored

    @pytest.mark.parametrize("name, value, error, message", BAD)
    def test_a_bad_value_is_reported_and_not_kept(self, name: str, value: Any, error: str,
                                                  message: str) -> None:
        records, errors = sis_sync.check_rows([{**FULL, name: value}], sis_sync.ANYONE)
        assert not records
        assert errors == [sis_sync.RowError(1, name, error, message)]

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

    def test_the_fields_are_those_of_the_contract_s_own_table(self) -> None:
        """The one test that a new field breaks."""
        assert [(field.name, field.required, field.listed, field.longest if field.kind is str else 0)
                for field in (sis_sync.COHORT, *sis_sync.FIELDS)] == [
            ("cohort_id", True, "cohorts", 64),
            ("student_id_ext", True, "", 255),
            ("email", True, "", 254),
            ("first_name", False, "", 255),
            ("last_name", False, "", 255),
            ("program_code", False, "programs", 255),
            ("campus_name", False, "campuses", 255),
            ("first_in_family", False, "", 0)]

    def test_every_field_is_in_the_corpus(self) -> None:
        assert {row[0] for row in GOOD} == {row[0] for row in BAD} == set(sis_sync.NAMES)

    SOME = frozenset(("BUSI", "a@b"))

    def some_value(self, pick: random.Random, kind: type) -> Any:
        white = sis_sync.WHITE_SPACE + "\x1c\x1f\u200b\ufeff"
        if kind is bool and pick.random() < 0.8:
            return pick.choice((True, False, None))
        return pick.choice((
            None, "", "a@b", "BUSI", True, pick.choice(white) + "a@b" + pick.choice(white),
            "".join(pick.choices("a@b é\u0301\u200d王\x80", k=pick.randrange(9))),
            pick.choice(("a@b\n", "a\nb", f"a@b\n{pick.random()}@d", "a@b\n\nc@d")),
            pick.choice(("x" * 64, "x" * 65, "x" * 254, "x" * 255, "x" * 256, 1, 0.0, [], {}, "\ud800", "a\0"))
            if pick.random() < 0.1 else f"u{pick.random()}@x"))

    @pytest.mark.parametrize("seed", range(20))
    def test_a_column_and_its_values_one_by_one_are_judged_alike(self, seed: int) -> None:
        """The quick look at a whole column must not know other rules than check_value does."""
        pick = random.Random(seed)
        for field in sis_sync.FIELDS:
            for size in (0, 1, 2, 5, 5):
                listed = pick.choice((frozenset(), self.SOME)) if field.listed else frozenset()
                column = [self.some_value(pick, field.kind) for _ in range(size)]
                expected: list[Any] = [sis_sync.check_value(field, value, listed) for value in column]
                if field is sis_sync.KEY:
                    seen: list[Any] = []
                    for index, value in enumerate(expected):
                        if value in seen:
                            expected[index] = sis_sync.RowError(
                                0, field.name, "duplicate_student",
                                f"the same {field.name} stood higher up in the batch")
                        elif isinstance(value, str):
                            seen.append(value)
                records, errors = sis_sync.check_rows(
                    [{**FULL, sis_sync.KEY.name: f"U{index}", field.name: value} for index, value in enumerate(column)],
                    sis_sync.Institution("any", (), {field.listed: listed}))
                assert errors == [value._replace(row=row) for row, value in enumerate(expected, 1)
                                  if isinstance(value, sis_sync.RowError)]
                place = sis_sync.NAMES.index(field.name)
                kept = [int(value) if isinstance(value, bool) else value
                        for value in expected if not isinstance(value, sis_sync.RowError)]
                assert [(record[place], type(record[place])) for record in records] == [
                    (value, type(value)) for value in kept]

    @pytest.mark.parametrize("seed", range(5))
    def test_the_cohort_is_judged_as_any_value(self, service: sis_sync.Service, seed: int) -> None:
        pick = random.Random(seed)
        for value in (self.some_value(pick, str) for _ in range(20)):
            expected = sis_sync.check_value(sis_sync.COHORT, value, frozenset())
            answer = handle(service, batch(cohort_id=value))
            if isinstance(expected, sis_sync.RowError):
                assert (answer.status, answer.document) == (400, {
                    "error": expected.error, "detail": expected.message, "field": "cohort_id"})
            else:
                assert answer.status == 200

    def test_a_field_left_out_is_null_and_a_row_is_the_whole_record(
            self, service: sis_sync.Service) -> None:
        handle(service, batch(FULL))
        answer = handle(service, batch({"student_id_ext": FULL["student_id_ext"], "email": "new@b"}))
        assert answer.document["details"] == {"imported": 0, "updated": 1, "unchanged": 0}
        assert rows_of(service) == [(FULL["student_id_ext"], "new@b", *[None] * (len(FULL) - 2))]

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
                        "message": "a student must be an object"}],
            "ignored": []}

    @pytest.mark.parametrize("row", [None, 1, "U1", [], [student()], True])
    def test_a_row_that_is_no_object_is_reported(self, service: sis_sync.Service, row: Any) -> None:
        answer = handle(service, batch(row, student()))
        assert [error["error"] for error in answer.document["errors"]] == ["not_an_object"]
        assert answer.document["imported"] == 1

    def test_the_first_of_two_rows_with_one_id_counts(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch(student(1, first_name="First"), student(2),
                                       {**student(3), "student_id_ext": "U 1"},
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
        answer = handle(service, batch(*({**FULL, field.name: "private-\x00"} for field in TEXT),
                                       {**FULL, "email": "private"}, {"last_name": "private"}))
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
        assert answer.document == {"received": 0, "imported": 0, "errors": [], "ignored": [], "details": {
            "imported": 0, "updated": 0, "unchanged": 0}}

    def test_keys_that_are_no_field_are_ignored_at_both_levels_and_named(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch({**FULL, "firstName": [], "": 1, "zzz": None, "cohort_id": "x"},
                                       {**student(2), "firstName": 1, "students": {}}, "no object", {"Zoë": 1},
                                       extra={"deep": [None]}, email=1, zzz=2))
        assert answer.document["imported"] == 2
        # `email` is a field of a student, and no key of the body; `cohort_id` is one of the body.
        assert answer.document["ignored"] == ["", "Zoë", "cohort_id", "email", "extra", "firstName", "students", "zzz"]

    def test_a_batch_of_fields_alone_has_nothing_ignored(self, server: Process) -> None:
        assert server.push(FULL, dict.fromkeys(sis_sync.NAMES), student()).document["ignored"] == []

    def test_of_many_ignored_keys_the_first_20_are_named_and_cut_at_64_characters(
            self, service: sis_sync.Service) -> None:
        keys = [f"{number:02}" + "ü" * 70 for number in range(30)]
        answer = handle(service, batch(*({**student(number), key: 1} for number, key in enumerate(reversed(keys)))))
        assert answer.document["ignored"] == [key[:64] for key in keys[:20]]

    def test_two_ignored_keys_that_are_one_after_the_cut_are_named_once(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch({**FULL, "x" * 70: 1, "x" * 70 + "y": 2}))
        assert answer.document["ignored"] == ["x" * 64]

    def test_a_key_that_no_text_can_hold_is_named_all_the_same(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch({**FULL, "\ud800": 1, "\0\n": 2}))
        assert answer.document["ignored"] == ["\0\n", "\ud800"]
        assert answer.body.isascii()

    def test_with_bad_rows_reject_nothing_is_said_of_ignored_keys(self, server: Process) -> None:
        answer = server.push(student(1, email=None, more=1), secret="sis_the-strict-ones-secret")
        assert "ignored" not in answer.document

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

    def test_the_history_keeps_the_latest_10000_syncs_of_each_institution_whatever_the_clock(
            self, service: sis_sync.Service, monkeypatch: Any) -> None:
        handle(service, batch())
        connection = service.roster._connection
        assert connection
        names = [row[1] for row in connection.execute("PRAGMA table_info(syncs)")][1:]
        others = [name if name != "institution" else "'another'" for name in names]
        for columns, number in ((names, 9_999), (others, 10_003)):
            connection.execute(
                f"WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {number}) "
                f"INSERT INTO syncs ({', '.join(names)}) SELECT {', '.join(columns)} FROM syncs, number "
                "WHERE sync_id = 1")
        monkeypatch.setattr(time, "time", lambda: 86400.0)          # a clock that lost its battery
        handle(service, batch())
        handle(service, batch())
        assert connection.execute("SELECT institution, count(*), min(sync_id), min(time) FROM syncs "
                                  "GROUP BY institution ORDER BY institution DESC").fetchall() == [
            ("example", 10_000, 3, 86400), ("another", 10_003, 10_001, connection.execute(
                "SELECT time FROM syncs WHERE sync_id = 3").fetchone()[0])]

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

        for round_number in range(8):
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
        assert len(answered) > 8
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
    ("UTF-16, named", '{"x": 1}'.encode("utf-16"), "it looks like UTF-16 or UTF-32"),
    ("UTF-16 without a BOM", '{"x": 1}'.encode("utf-16-le"), "the body is not JSON"),
    ("UTF-16 without a BOM, named", '{"x": 1}'.encode("utf-16-be"), "it looks like UTF-16 or UTF-32"),
    ("UTF-32", '{"x": 1}'.encode("utf-32"), "it looks like UTF-16 or UTF-32"),
    ("gzip and no word of it", gzip.compress(b"{}"), "; it is gzip: say so with Content-Encoding: gzip"),
    ("a document in each line", b'{"student_id_ext": "1"}\n{"student_id_ext": "2"}\n',
     "; it looks like a document in each line: send one, with all in students"),
    ("a document in each CRLF line", b'{"x": 1}\r\n{"x": 2}', "; it looks like a document in each line"),
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


OPENAPI: Any = sis_sync.openapi_document(5000)

# The part of JSON Schema that /openapi.json uses. Any other keyword fails, so that none is believed unasked.
ANNOTATIONS = {"description", "examples"}
TYPES: dict[str, tuple[type, ...]] = {"object": (dict,), "array": (list,), "string": (str,), "integer": (int,),
                                      "boolean": (bool,), "null": (type(None),)}


def is_of_type(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name != "integer" or not isinstance(value, bool))


def same(one: Any, other: Any) -> bool:
    """Equal as JSON has it: true is not 1."""
    return type(one) is type(other) and bool(one == other)


# What each keyword asks of a value of its type.
RULES: dict[str, tuple[str, Any]] = {
    "minLength": ("string", lambda text, limit: len(text) >= limit),
    "maxLength": ("string", lambda text, limit: len(text) <= limit),
    # In JSON Schema $ is the very end; in Python's re a line end may follow.
    "pattern": ("string", lambda text, pattern: re.search(re.sub(r"\$\Z", r"\\Z", pattern), text)),
    "maxItems": ("array", lambda items, limit: len(items) <= limit),
    "minimum": ("integer", lambda number, limit: number >= limit),
    "required": ("object", lambda value, names: set(names) <= set(value)),
}


def schema_faults(schema: Mapping[str, Any], value: Any, where: str = "") -> Iterator[str]:
    """Where the value does not keep to the schema. Nothing: it does."""
    for keyword, rule in schema.items():
        if keyword == "$ref":
            target = OPENAPI
            for step in rule.split("/")[1:]:
                target = target[step]
            yield from schema_faults(target, value, where)
        elif keyword == "type":
            if not any(is_of_type(value, name) for name in ([rule] if isinstance(rule, str) else rule)):
                yield f"{where}: no {rule}"
        elif keyword == "enum":
            if not any(same(value, item) for item in rule):
                yield f"{where}: not one of {rule}"
        elif keyword == "properties":
            for name in (set(rule) & set(value) if isinstance(value, dict) else ()):
                yield from schema_faults(rule[name], value[name], f"{where}.{name}")
        elif keyword == "items":
            for index, item in enumerate(value if isinstance(value, list) else ()):
                yield from schema_faults(rule, item, f"{where}[{index}]")
        elif keyword in RULES:
            kind, holds = RULES[keyword]
            if is_of_type(value, kind) and not holds(value, rule):
                yield f"{where}: {keyword} {rule}"
        else:
            assert keyword in ANNOTATIONS, keyword


def accepts(schema: Mapping[str, Any], value: Any) -> bool:
    return not any(schema_faults(schema, value))


def assert_described(path: str, answer: Answer) -> None:
    """The answer is as the document says of its path and status; what is no path has the errors that any has."""
    (operation,) = OPENAPI["paths"].get(path, OPENAPI["paths"][SYNC]).values()
    described = operation["responses"][str(answer.status)]
    if answer.body:
        schema = described["content"]["application/json"]["schema"]
        assert not list(schema_faults(schema, answer.document)), answer.document
        assert set(answer.document) <= set(schema["properties"] or answer.document)
    named = {name.lower() for name in described["headers"]}
    assert set(answer.headers) & (NAMED_HEADERS | {"x-request-id"}) <= named


class Described:
    """Whatever is answered in the tests of such a class, /openapi.json says so."""

    @pytest.fixture(autouse=True)
    def _described(self, monkeypatch: Any) -> None:
        exchange, pure = Process.exchange, handle

        def exchange_and_look(process: Process, data: bytes, *words: Any, **options: Any) -> Answer:
            answer = exchange(process, data, *words, **options)
            target = data.split(b" ", 2)[1].partition(b"?")[0].decode("latin-1")
            assert_described(target, answer)
            return answer

        def handle_and_look(service: sis_sync.Service, *words: Any, **options: Any) -> Answer:
            answer = pure(service, *words, **options)
            assert_described(options.get("path", SYNC), answer)
            return answer

        monkeypatch.setattr(Process, "exchange", exchange_and_look)
        monkeypatch.setitem(globals(), "handle", handle_and_look)


class TestErrors(Described):
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
        assert answer.document == {
            "error": "unauthorized",
            "detail": "no valid secret; send the header Authorization: Bearer <institution secret>"}

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
        ("application/json;xcharset=latin1", 200), ("application/json; charset=utf-8; charset=UTF8", 200),
        ("application/json;charset=utf-8;charset=latin-1", 415),
        ("application/json;charset=latin-1;charset=utf-8", 415),
        ("application/json; charset=latin-1", 415), ("text/plain", 415), ("text/json", 415), ("", 415),
        ("application/x-www-form-urlencoded", 415), ("application/json, text/plain", 415)])
    def test_the_media_type_must_be_json(self, server: Process, content_type: str | None,
                                         status: int) -> None:
        answer = server.exchange(request_of(batch(), Content_Type=content_type))
        assert answer.status == status
        if status == 415:
            assert (answer.code, answer.headers["accept"]) == ("unsupported_media_type", "application/json")
            assert answer.document["detail"].startswith("Content-Type must be application/json, in utf-8; ")

    @pytest.mark.parametrize("coding, status", [
        ("identity", 200), ("gzip", 200), ("GZIP", 200), ("x-gzip", 200), ("br", 415), ("deflate", 415),
        ("gzip, gzip", 415), ("zstd", 415)])
    def test_the_content_coding_must_be_gzip_or_none(self, server: Process, coding: str,
                                                     status: int) -> None:
        body = json.dumps(batch(student())).encode()
        if "gzip" in coding.lower():
            body = gzip.compress(body)
        answer = server.exchange(request_of(body, Content_Encoding=coding))
        assert answer.status == status
        if status == 415:
            assert (answer.code, answer.headers["accept-encoding"]) == ("unsupported_media_type", "gzip, identity")
            assert answer.document["detail"].endswith("; Content-Encoding gzip or identity")

    def test_gzip_that_comes_to_nothing_has_the_cap_of_its_bytes(self, server: Process) -> None:
        """A header whose file name does not end, or empty blocks: chunked, they could go on for ever."""
        for data in (b"\x1f\x8b\x08\x08" + b"\0" * 6 + b"n" * (9 << 20),
                     b"\x1f\x8b\x08\x00" + b"\0" * 6 + b"\0\0\0\xff\xff" * (2 << 20)):
            answer = server.exchange(head_of(Transfer_Encoding="chunked", Content_Encoding="gzip")
                                     + chunked(data, 65536))
            assert (answer.status, answer.document["max_bytes"]) == (413, 8388608)

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
            answer = sis_sync.Response.of_refusal(
                sis_sync.Request(), sis_sync.Refusal(problem.code, status=problem.status))
            # The two of batch_too_large tell themselves apart by what they carry.
            meaning = next(row.meaning for row in sis_sync.ERRORS
                           if (row.code, row.status) == (problem.code, problem.status))
            assert json.loads(answer.body) == {"error": problem.code, "detail": meaning}
            assert answer.status == problem.status

    def test_what_nobody_foresaw_is_a_server_error_without_a_word_of_the_cause(
            self, service: sis_sync.Service, capfd: Any) -> None:
        def failing() -> Iterator[bytes]:
            raise KeyError("O'Brien")
            yield b""

        response = service.handle(sis_sync.Request("192.0.2.1", "POST", SYNC, headers={
            "authorization": f"Bearer {SECRET}", "content-length": "2"}, body=failing()))
        document, headers = json.loads(response.body), dict(response.headers)
        assert response.status == 500
        assert document == {"error": "server_error", "detail": "a fault of the server, told in its log",
                            "request_id": headers["X-Request-ID"]}
        assert "O'Brien" not in capfd.readouterr().err
        assert_described(SYNC, Answer(500, {}, document, response.body))

    def test_who_waits_too_long_for_its_turn_is_told_that_the_server_is_busy(
            self, service: sis_sync.Service, monkeypatch: Any) -> None:
        monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.01)
        with service.turn:
            answer = handle(service, batch(student()))
        assert (answer.status, answer.code) == (503, "busy")
        assert answer.headers["retry-after"] == str(answer.document["retry_after"])
        assert handle(service, batch(student())).status == 200

    @posix
    def test_the_health_of_a_database_that_is_gone_is_as_described(self, service: sis_sync.Service) -> None:
        os.rename(service.roster.path, service.roster.path + ".away")
        answer = handle(service, method="GET", path="/healthz")
        assert (answer.status, answer.code) == (503, "unhealthy")


class TestWords(Described):
    """What an error says, word for word where the words are what mends it."""

    @pytest.mark.parametrize("body, field, words", [
        ({"data": batch()}, "cohort_id", "cohort_id required, at the top level"),
        ({"roster": {"cohort_id": "2026"}, "students": []}, "cohort_id", "cohort_id required, at the top level"),
        ({"cohort_id": "1", "data": {"students": []}}, "students", "students required, at the top level"),
        ({"cohortId": "1", "students": []}, "cohort_id", "cohort_id required, spelt like this, not cohortId"),
        ({"Cohort ID": "1", "students": []}, "cohort_id", "cohort_id required, spelt like this, not Cohort ID"),
        ({"cohort_id": "1", "Students": []}, "students", "students required, spelt like this, not Students"),
        ({"students": []}, "cohort_id", "cohort_id required"),
        ({"cohort_id": "1", "student": []}, "students", "students required"),
        ({"cohort_id": "1", "students": student()}, "students", "students must be an array, also for a single student"),
        ([batch()], "body", "the body must be an object"),
        ({"cohort_id": "a\tb", "students": []}, "cohort_id", "cohort_id holds U+0009, a control character"),
        ({"cohort_id": "\udc00", "students": []}, "cohort_id", "cohort_id holds U+DC00, half of a surrogate pair"),
    ])
    def test_a_fault_of_the_body(self, server: Process, body: Any, field: str, words: str) -> None:
        answer = server.exchange(request_of(json.dumps(body).encode()))
        assert (answer.status, answer.document["field"], answer.document["detail"]) == (400, field, words)

    @pytest.mark.parametrize("row, words", [
        ({"studentIdExt": "1", "email": "a@b"}, "student_id_ext required, spelt like this, not studentIdExt"),
        ({"Student ID (ext)": "1", "email": "a@b"}, "student_id_ext required, spelt like this, not Student ID (ext)"),
        ({"student": student()}, "student_id_ext required, not one level down"),
        ({"student_id_ext": "1", "contact": {"email": "a@b"}}, "email required, not one level down"),
        ({"student_id_ext": "1", "E-Mail": "a@b"}, "email required, spelt like this, not E-Mail"),
        ({"student_id_ext": "1", "contact": {"mail": "a@b"}, "mail": "a@b"}, "email required"),
        # A key is shown so that it neither steers a terminal nor fills the history.
        ({"student_id_ext": "1", "e\x1b[mail": "a@b"}, r"email required, spelt like this, not e\x1b[mail"),
        ({"student_id_ext": "1", "\ne\nmail": "a@b"}, r"email required, spelt like this, not \ne\nmail"),
        ({"student_id_ext": "1", "e\ud800mail": "a@b"}, r"email required, spelt like this, not e\ud800mail"),
        ({"student_id_ext": "1", "email" + "_" * 999: ""}, f"email required, spelt like this, not email{'_' * 59}"),
    ], ids=itertools.count())
    def test_a_fault_of_a_row(self, server: Process, row: Any, words: str) -> None:
        (error,) = server.push(row).document["errors"]
        assert error["message"] == words

    @pytest.mark.parametrize("row, words", [
        ({"program_code": "busi"},
         "program_code is not in the institution's list of programs; one that is differs in case alone"),
        ({"campus_name": "SUNSHINE coast"},
         "campus_name is not in the institution's list of campuses; one that is differs in case alone"),
        ({"program_code": "LAW"}, "program_code is not in the institution's list of programs"),
        ({"campus_name": "Sunshine"}, "campus_name is not in the institution's list of campuses"),
    ])
    def test_a_value_that_is_not_listed(self, server: Process, row: Any, words: str) -> None:
        (error,) = server.push({**student(), **row}, secret=OTHER_SECRET).document["errors"]
        assert error["message"] == words

    def test_a_cohort_that_differs_from_a_listed_one_in_case_alone(self, tmp_path: pathlib.Path) -> None:
        service = sis_sync.Service(configuration_of(tmp_path, ini_of(
            institutions="[institution a]\ncohorts = Autumn 2026\n")))
        words = "cohort_id is not in the institution's list of cohorts"
        for cohort, more in (("autumn 2026", "; one that is differs in case alone"), ("autumn 2027", "")):
            answer = handle(service, batch(cohort_id=cohort))
            assert (answer.code, answer.document["detail"]) == ("unknown_cohort", words + more)
        service.roster.close()

    def test_a_method_in_small_letters(self, server: Process) -> None:
        for method, words in (("post", "methods are in capitals"),
                              ("Get", "methods are in capitals"),
                              ("BREW", "the method or the transfer coding is unknown")):
            answer = server.exchange(head_of(method, SYNC))
            assert (answer.status, answer.document["detail"]) == (501, words)

    def test_a_path_where_nothing_is(self, server: Process) -> None:
        answer = server.exchange(head_of("POST", "/api/sis/sync/"))
        assert answer.document["detail"] == "there is nothing at this path; a push goes to /api/sis/sync"

    def test_another_method(self, server: Process) -> None:
        assert server.exchange(head_of("GET", SYNC)).document["detail"] == "allowed here: POST"


def calls_during(function: Any) -> int:
    """How much is done, in calls of functions: a measure that is the same on every machine."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def gzip_named(name: bytes, body: bytes) -> bytes:
    """RFC 1952: a gzip file that says what the file's name was."""
    plain = gzip.compress(body)
    assert plain[3] == 0
    return plain[:3] + b"\x08" + plain[4:10] + name + plain[10:]


EMPTY = b'{"cohort_id": "2026", "students": []}'
GZIP_COSTS = [
    ("a file name of 1 MiB", lambda: gzip_named(b"x" * (1 << 20) + b"\0", EMPTY), 200),
    ("a file name without an end", lambda: gzip_named(b"x" * (1 << 20), b"")[:1 << 20], 400),
    ("zeros behind it", lambda: gzip.compress(EMPTY) + b"\0" * (1 << 20), 400),
    ("a zero behind it", lambda: gzip.compress(EMPTY) + b"\0", 400),
    ("anything behind it", lambda: gzip.compress(EMPTY) + b"x" * (1 << 20), 400),
    ("much behind much", lambda: gzip.compress(EMPTY + b" " * 200_000) + b"x" * 70_000, 400),
    ("50,000 empty members", lambda: gzip.compress(b"") * 50_000, 400),
    ("50,000 empty members behind it", lambda: gzip.compress(EMPTY) + gzip.compress(b"") * 50_000, 400),
    ("two members", lambda: gzip.compress(EMPTY[:9]) + gzip.compress(EMPTY[9:]), 400),
]
TREES: list[tuple[str, bytes]] = [
    ("arrays", b"[[[[]]]],"), ("objects", b'{"":{}},'), ("empty arrays", b"[],"), ("numbers", b"0,"),
    ("strings", b'"",')]


class TestCost(Described):
    """What one request can cost is linear in its bytes, as bounds that are the same on every machine."""

    @pytest.mark.parametrize("name, body, status", GZIP_COSTS, ids=[row[0] for row in GZIP_COSTS])
    def test_gzip_is_read_in_pieces_and_one_member_is_all(self, service: sis_sync.Service, name: str, body: Any,
                                                         status: int) -> None:
        data = body()
        answers: list[Answer] = []

        def push() -> None:
            pieces = [data[start:start + 65536] for start in range(0, len(data), 65536)]
            response = service.handle(sis_sync.Request("192.0.2.1", "POST", SYNC, body=pieces, headers={
                "authorization": f"Bearer {SECRET}", "content-length": str(len(data)), "content-encoding": "gzip"}))
            answers.append(Answer(response.status, {}, json.loads(response.body), response.body))

        push()                                      # so that no first time is measured
        assert calls_during(push) < 3000            # the gzip module: a call for each byte, or ten for each member
        assert [answer.status for answer in answers] == [status] * 2
        if status == 400:
            assert answers[1].document == {
                "error": "malformed_json", "detail": "broken or cut off gzip, or more than one member"}

    def test_gzip_that_comes_byte_by_byte_is_read_as_well(self, service: sis_sync.Service) -> None:
        data = gzip.compress(json.dumps(batch(*map(student, range(50)))).encode())
        response = service.handle(sis_sync.Request(
            "192.0.2.1", "POST", SYNC, body=[data[index:index + 1] for index in range(len(data))], headers={
                "authorization": f"Bearer {SECRET}", "content-length": str(len(data)), "content-encoding": "gzip"}))
        assert json.loads(response.body)["imported"] == 50

    @pytest.mark.parametrize("before, after", [(b"[", b"null]"), (b'{"cohort_id": "2026", "students": [', b"null]}")])
    @pytest.mark.parametrize("name, tree", TREES, ids=[row[0] for row in TREES])
    def test_a_tree_is_refused_before_it_grows(self, service: sis_sync.Service, name: str, tree: bytes,
                                               before: bytes, after: bytes) -> None:
        room = 8 * 1024 * 1024 - len(before + after)
        data = before + tree * (room // len(tree)) + after
        answers: list[Answer] = []
        peak = peak_during(lambda: answers.append(handle(service, data)))
        (answer,) = answers
        assert (answer.status, answer.code, answer.document["max"]) == (413, "batch_too_large", 5000)
        assert "max_bytes" not in answer.document
        assert peak < 4 * len(data)                 # the tree would take 40 to 50 times as much

    @pytest.mark.parametrize("body", [
        b"[" * 8_388_608, b'{"":' * 2_000_000, b"[" * 30_000 + b"]" * 30_000,
        b'{"cohort_id": "2026", "students": ' + b"[" * 40_000, b'[{"":' * 20_000],
        ids=["arrays", "objects", "closed", "students", "both"])
    def test_what_is_nested_deep_is_no_json_to_us(self, service: sis_sync.Service, body: bytes) -> None:
        answer = handle(service, body)
        assert (answer.status, answer.code) == (400, "malformed_json")
        assert answer.document["detail"] == "the body is nested too deep"

    def test_python_has_no_warning_for_the_operator_s_terminal(self, service: sis_sync.Service) -> None:
        re.purge()                                  # it warns of a pattern when it compiles it
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert handle(service, b"[" * 100_000).status == 400
            assert handle(service, batch(student(1, first_name="\n"), student(2, first_name="a\nb"))).status == 200
            assert handle(service, b"{}\n{}", content_type="application/json;charset=utf-8").status == 400

    def test_a_full_batch_with_a_few_braces_in_its_values_is_no_tree(self, service: sis_sync.Service) -> None:
        answer = handle(service, batch(*(student(number, first_name="{first_name}", last_name="{{last}} [sic]")
                                         for number in range(5000))))
        assert answer.document["imported"] == 5000

    def test_a_full_batch_with_a_few_unknown_objects_in_each_row_is_no_tree(self, service: sis_sync.Service) -> None:
        more = {"address": {"lines": ["x", "y"]}, "phones": [{"home": "1"}, {"mobile": "2"}]}
        answer = handle(service, batch(*(student(number, **more) for number in range(5000))))
        assert (answer.document["imported"], answer.document["ignored"]) == (5000, ["address", "phones"])

    @posix
    def test_deep_nesting_does_not_outgrow_a_small_stack(self, tmp_path: pathlib.Path) -> None:
        """As with `ulimit -s 1024`: C code that recurses would end the process, not the request."""
        import resource

        def small_stack() -> None:
            resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))

        with running(tmp_path, ini_of(), preexec_fn=small_stack) as process:
            for body in (b"[" * 9000, b"[" * 9000 + b"]" * 9000, b'{"":' * 9000, b'{"cohort_id": ' + b"[" * 9000):
                assert process.exchange(request_of(body)).status == 400
            assert process.push(student()).document["imported"] == 1
            assert process.stop() == 0


class TestOrder(Described):
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
        def untouchable() -> Iterator[bytes]:
            pytest.fail("the body was read")
            yield b""

        for headers in ({}, {"authorization": "Bearer wrong"},
                        {"authorization": f"Bearer {SECRET}", "content-type": "text/plain"},
                        {"authorization": f"Bearer {SECRET}", "content-length": "9999999999"}):
            response = service.handle(sis_sync.Request(
                "192.0.2.1", "POST", SYNC, headers=headers, body=untouchable()))
            assert response.status in (401, 413, 415)


class TestRateLimit(Described):
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
        keys = [sis_sync.client_key(sis_sync.client_of(address, "", ())) for address in (one, other)]
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

    def test_what_is_served_is_made_from_the_tables(self, server: Process) -> None:
        answer = server.exchange(head_of("GET", "/openapi.json", secret=None))
        assert answer.document == sis_sync.openapi_document(5000)

    def test_the_greatest_number_of_students_is_the_configured_one(self, tmp_path: pathlib.Path) -> None:
        service = sis_sync.Service(configuration_of(tmp_path, ini_of(limits="max_students = 7")))
        document = handle(service, method="GET", path="/openapi.json").document
        assert document["components"]["schemas"]["Batch"]["properties"]["students"]["maxItems"] == 7
        service.roster.close()


def schemas_in(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema in a document, with where it stands; what an example holds is none."""
    if isinstance(node, dict) and ({"type", "$ref", "enum"} & set(node)) and "scheme" not in node:
        yield where, node
    for key, value in (node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()):
        if key != "examples":
            yield from schemas_in(value, f"{where}/{key}")


SCHEMAS = OPENAPI["components"]["schemas"]


ANSWERS: list[tuple[str, str, Any]] = [
    (path, status, answer) for path, (method, _, _) in sis_sync.ROUTES.items()
    for status, answer in OPENAPI["paths"][path][method.lower()]["responses"].items()]


class TestOpenAPI:
    def errors_of(self, path: str, status: str) -> list[sis_sync.Error]:
        return [error for error in sis_sync.ERRORS if str(error.status) == status
                and error.only in ("", sis_sync.ROUTES[path][1].__name__)]

    def test_it_says_what_it_is_and_where(self) -> None:
        assert OPENAPI["openapi"] == "3.1.0"
        assert OPENAPI["info"]["version"] == sis_sync.__version__
        assert OPENAPI["servers"] == [{"url": "/"}]
        words = json.dumps(OPENAPI)
        for said in ("gzip", "chunked", "The whole record", "requests_per_minute", "half of a surrogate pair",
                     "were not stored", "student_id_ext once"):
            assert said in words

    def test_the_fields_are_those_of_the_table(self) -> None:
        assert list(SCHEMAS["Student"]["properties"]) == list(sis_sync.NAMES)
        assert SCHEMAS["Student"]["required"] == [field.name for field in sis_sync.FIELDS if field.required]
        assert SCHEMAS["Batch"]["required"] == ["cohort_id", "students"]
        assert SCHEMAS["Batch"]["properties"]["students"]["maxItems"] == 5000
        for field in (*sis_sync.FIELDS, sis_sync.COHORT):
            schema = {**SCHEMAS["Student"]["properties"], **SCHEMAS["Batch"]["properties"]}[field.name]
            assert ("null" in schema["type"]) is not field.required
            assert field.kind is bool or (schema.get("minLength", 0), schema["maxLength"]) == (
                int(field.required), field.longest)

    def test_the_codes_are_enums_and_those_of_the_tables(self) -> None:
        assert SCHEMAS["RowError"]["properties"]["error"]["enum"] == list(sis_sync.ROW_ERRORS)
        described = {(path, int(status), code) for path, status, answer in ANSWERS if status != "200"
                     for code in answer["content"]["application/json"]["schema"]["properties"]["error"]["enum"]}
        assert described == {(path, error.status, error.code) for path, (_, answer, _) in sis_sync.ROUTES.items()
                             for error in sis_sync.ERRORS if error.only in ("", answer.__name__)}
        assert {row[1:] for row in described} == {(error.status, error.code) for error in sis_sync.ERRORS}
        assert "oneOf" not in json.dumps(OPENAPI)

    def test_every_path_can_answer_that_the_server_is_busy(self) -> None:
        busy = {path for path, status, answer in ANSWERS if status == "503"
                and "busy" in answer["content"]["application/json"]["schema"]["properties"]["error"]["enum"]}
        assert busy == set(OPENAPI["paths"]) == set(sis_sync.ROUTES)

    def test_what_an_answer_always_carries_is_required(self) -> None:
        assert set(sis_sync.CARRIED) == {name for error in sis_sync.ERRORS for name in error.carries}
        for path, status, answer in ANSWERS:
            schema, errors = answer["content"]["application/json"]["schema"], self.errors_of(path, status)
            if status == "200":
                continue
            always = set.intersection(*(set(error.carries) for error in errors))
            assert set(schema["required"]) == {"error", "detail"} | always
            assert set(schema["properties"]) == {"error", "detail"}.union(*(error.carries for error in errors))
        required = {(path, status): answer["content"]["application/json"]["schema"].get("required")
                    for path, status, answer in ANSWERS}
        assert set(required[SYNC, "413"]) == {"error", "detail", "max"}
        assert set(required[SYNC, "429"]) == {"error", "detail", "retry_after"}
        assert set(required["/healthz", "500"]) == {"error", "detail", "request_id"}
        assert set(required[SYNC, "200"]) == {"received", "imported", "details", "errors", "ignored"}
        assert set(SCHEMAS["RowError"]["required"]) == {"row", "field", "error", "message"}

    def test_the_headers_of_each_answer_are_named(self) -> None:
        for path, status, answer in ANSWERS:
            expected = {"X-Request-ID"}.union(*(error.headers for error in self.errors_of(path, status)))
            assert set(answer["headers"]) == expected
            assert all(header["schema"]["type"] == ("integer" if name == "Retry-After" else "string")
                       for name, header in answer["headers"].items())
        named = {status: set(answer["headers"]) - {"X-Request-ID"} for path, status, answer in ANSWERS
                 if path == SYNC}
        assert named["401"] == {"WWW-Authenticate"} and named["405"] == {"Allow"}
        assert named["415"] == {"Accept", "Accept-Encoding"}
        assert named["429"] == named["503"] == {"Retry-After"}

    def test_there_is_an_example_of_the_request_and_of_each_answer(self) -> None:
        content = OPENAPI["paths"][SYNC]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"] == {"$ref": "#/components/schemas/Batch"}
        (example,) = SCHEMAS["Batch"]["examples"]
        assert example["students"] == [FULL]
        for path, status, answer in ANSWERS:
            schema = answer["content"]["application/json"]["schema"]
            if status != "200":
                assert [(example["error"], set(example) - {"error", "detail"}) for example in schema["examples"]] == [
                    (error.code, set(error.carries)) for error in self.errors_of(path, status)]
            elif path != "/openapi.json":     # which is an example of itself
                assert schema["examples"]

    def test_the_examples_keep_to_their_schemas_and_the_server_takes_them(self, service: sis_sync.Service) -> None:
        number = 0
        for where, schema in schemas_in(OPENAPI):
            for example in schema.get("examples", ()):
                number += 1
                assert not list(schema_faults(schema, example)), where
        assert number > 2 * len(sis_sync.ERRORS)
        answer = handle(service, SCHEMAS["Batch"]["examples"][0])
        assert (answer.status, answer.document["errors"], answer.document["ignored"]) == (200, [], [])

    def test_the_example_of_the_200_adds_up(self) -> None:
        (example,) = OPENAPI["paths"][SYNC]["post"]["responses"]["200"]["content"]["application/json"]["schema"][
            "examples"]
        assert example["received"] == example["imported"] + len(example["errors"])
        assert example["imported"] == example["details"]["imported"] + example["details"]["updated"]
        assert example["details"]["unchanged"] <= example["details"]["updated"]
        assert all(1 <= error["row"] <= example["received"] for error in example["errors"])

    def test_every_reference_leads_somewhere_and_every_schema_is_referred_to(self) -> None:
        references = {schema["$ref"] for _, schema in schemas_in(OPENAPI) if "$ref" in schema}
        assert references == {f"#/components/schemas/{name}" for name in SCHEMAS}

    def test_the_operations_have_a_name_each_for_generated_clients(self) -> None:
        names = [operation["operationId"] for path in OPENAPI["paths"].values() for operation in path.values()]
        assert len(names) == len(set(names)) == len(sis_sync.ROUTES) and all(map(str.isidentifier, names))

    def test_the_secret_is_asked_for_where_it_is_needed(self) -> None:
        assert OPENAPI["components"]["securitySchemes"]["secret"]["scheme"] == "bearer"
        assert {path: operation["security"] for path, methods in OPENAPI["paths"].items()
                for operation in methods.values()} == {
            path: [{"secret": []}] if method == "POST" else [] for path, (method, _, _) in sis_sync.ROUTES.items()}

    def test_the_patterns_are_plain(self) -> None:
        """Classes, groups, repetition: what Go, JavaScript and Rust mean by it as Python does."""
        patterns = {schema["pattern"] for _, schema in schemas_in(OPENAPI) if "pattern" in schema}
        assert patterns
        for pattern in patterns:
            assert pattern.startswith("^") and pattern.endswith("$")
            rest = re.sub(r"\[(?:[^\]\\]|\\x[0-9a-f]{2})+\]", "c", pattern[1:-1])       # each class a letter
            assert re.fullmatch(r"(?:c|@|\+|\*|\?|\(\?:|\))+", rest), rest
            assert not re.search("[\ud800-\udfff]", pattern)      # no half of a pair, which Go can't read
            assert pattern.splitlines() == [pattern]        # and no line end, where it becomes source code

    def test_the_checker_finds_what_is_wrong(self) -> None:
        schema = SCHEMAS["Batch"]
        assert accepts(schema, batch(FULL))
        wrong: Any
        for wrong in ([], {}, {"cohort_id": "1"}, batch(1), batch({}), batch(cohort_id=""), batch(cohort_id="x" * 65),
                      batch(cohort_id=1), batch({**FULL, "email": "a@b@c"}), batch({**FULL, "email": "a@b\n"}),
                      batch({**FULL, "first_in_family": 1}), batch({**FULL, "last_name": ["x"]}),
                      batch(*[FULL] * 5001)):
            assert not accepts(schema, wrong)
        assert not accepts(SCHEMAS["RowError"], {
            "row": 0, "field": None, "error": "missing_field", "message": ""})
        assert not accepts(SCHEMAS["RowError"], {
            "row": 1, "field": None, "error": "unheard_of", "message": ""})


class TestSchemaAgainstServer:
    """What the schema accepts, the server accepts; and what it keeps is what the schema says."""

    # White space of every kind, and what is some only to a few; control characters; all planes.
    CHARACTERS = ("ab@ @." + sis_sync.WHITE_SPACE + "\0\x1b\x1c\x1d\x1e\x1f\x7f\x80\x9f\u00ad\u180e\u200b\u200d\u2060"
                  "\ufeff\ufffd\uffff\u0301é王\U0001f393\U0010ffff\"\\{}[]^$|\u202e")

    def some_text(self, pick: random.Random, field: sis_sync.Field) -> str:
        size = pick.choice((0, 1, 2, 3, 5, 9, 64, 65, field.longest, field.longest + 1))
        text = "".join(pick.choices("abcdé王\U0001f393", k=max(0, size)))
        for _ in range(pick.choice((0, 0, 1, 1, 2, 5))):
            place = pick.choice((0, len(text), pick.randrange(len(text) + 1)))
            text = text[:place] + pick.choice(self.CHARACTERS) + text[place:]
        if field.pattern == sis_sync.EMAIL and pick.random() < 0.8:
            text = f"{text[:len(text) // 2]}@{text[len(text) // 2:]}"
        return text

    def some_value(self, pick: random.Random, field: sis_sync.Field) -> Any:
        if pick.random() < 0.1:
            return pick.choice((None, True, False, 0, 1, 1.0, -1, "", " ", "null", "true", [], ["a@b"], {}, {"a": 1}))
        return pick.choice((True, False, None)) if field.kind is bool else self.some_text(pick, field)

    def some_student(self, pick: random.Random) -> dict[str, Any]:
        """Most of them good but for a field or two."""
        row = {field.name: self.some_value(pick, field) if pick.random() < 0.25 else field.example
               for field in sis_sync.FIELDS if field.required or pick.random() < 0.8}
        for name in [name for name in row if pick.random() < 0.02]:
            del row[name]
        return {**row, **({pick.choice(("", "Email", "x")): pick.choice((1, None, []))} if pick.random() < 0.1 else {})}

    def test_row_by_row(self) -> None:
        pick = random.Random(11)
        schema = OPENAPI["components"]["schemas"]["Student"]
        verdicts = {(one, other): 0 for one in (True, False) for other in (True, False)}
        for _ in range(4000):
            row = self.some_student(pick)
            faults = list(schema_faults(schema, row))
            records, errors = sis_sync.check_rows([row], sis_sync.ANYONE)
            verdicts[not faults, not errors] += 1
            assert faults or not errors, (row, errors)
            for record in records:      # stripped, as the document says
                kept = {field.name: bool(value) if field.kind is bool and value is not None else value
                        for field, value in zip(sis_sync.FIELDS, record)}
                # U+2027 to U+202E are within the range that stands for the line separators.
                assert accepts(schema, kept) or re.search("[\u2027-\u202e]", json.dumps(kept, ensure_ascii=False)), kept
        # Of each kind there are many, and some that only the server takes, for it strips them.
        assert verdicts[True, True] > 1000 and verdicts[False, False] > 1000 and verdicts[False, True] > 50

    def test_body_by_body(self, service: sis_sync.Service) -> None:
        pick = random.Random(12)
        schema = OPENAPI["components"]["schemas"]["Batch"]
        good = 0
        for number in range(600):
            rows: Any = [{**self.some_student(pick), "student_id_ext": f"U{number}-{index}"} if pick.random() < 0.5
                         else student(f"{number}-{index}") for index in range(pick.choice((0, 1, 2, 4)))]
            if pick.random() < 0.05:
                rows = pick.choice((None, {}, "x", [None], [[]], ["x"], [rows]))
            body: Any = batch(*rows) if isinstance(rows, list) else {"cohort_id": "1", "students": rows}
            if pick.random() < 0.4:
                body["cohort_id"] = self.some_value(pick, sis_sync.COHORT)
            if pick.random() < 0.05:
                body = pick.choice(([], None, 1, "x", [body], {"data": body}, {**body, "x": {"y": [body]}}))
            answer = handle(service, body)
            assert_described(SYNC, answer)
            if accepts(schema, body):
                good += 1
                assert (answer.status, answer.document["errors"]) == (200, []), body
        assert 150 < good < 500

    @pytest.mark.parametrize("text", ["a " * 127 + "\x01", "a" * 254 + "\x01", "a@" * 126 + "\x01", "@" * 253 + "\x01"],
                             ids=["words", "one word", "addresses", "signs"])
    def test_no_pattern_takes_more_than_linear_time(self, text: str) -> None:
        """A pattern that could try things in two ways at each letter would not come to an end."""
        for field in sis_sync.FIELDS:
            if field.kind is str:
                assert isinstance(sis_sync.check_value(field, text, frozenset()), sis_sync.RowError)
                assert not accepts(OPENAPI["components"]["schemas"]["Student"]["properties"][
                    field.name], text)


# ---------------------------------------------------------------------------------------------
# Section 5: configuration
# ---------------------------------------------------------------------------------------------

def patched(statements: str) -> tuple[str, ...]:
    """The command line, after a few statements: with a limit small enough to be reached."""
    return (sys.executable, "-c", f"import sys, sis_sync\n{statements}\nsys.exit(sis_sync.main())")


SETTING_VALUES = {     # key: good text, what it is read as, bad texts
    "host": ("::1", "::1", ["localhost", "", "1.2.3"]),
    "port": ("0", 0, ["-1", "65536", "+5", "8_0", "٥", "80 80", "", "80.0"]),
    "database": ("a b.db", None, ["a\n  b", ""]),
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


class Setting(NamedTuple):
    """A row of the table."""

    section: str
    key: str
    default: str
    read: Callable[[str], Any]

    @property
    def allowed(self) -> str:
        """What it says that it must be."""
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            self.read("=\n  b = c\0")
        return str(caught.value).partition("; must be ")[2]


SETTINGS = list(itertools.starmap(Setting, sis_sync.SETTINGS))


def section_of(setting: Setting) -> str:
    return "institution test" if setting.section == "institution" else setting.section


class TestConfiguration:
    def test_every_setting_is_in_the_corpus(self) -> None:
        assert [setting.key for setting in SETTINGS] == list(SETTING_VALUES)

    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
    def test_a_setting_is_read_and_its_default_taken_when_it_is_left_out(
            self, tmp_path: pathlib.Path, setting: Setting) -> None:
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
        (setting,) = (setting for setting in SETTINGS if setting.key == key)
        (fault,) = faults_of(tmp_path, f"[{section_of(setting)}]\n{key} = {text}\n")
        assert fault.startswith(f"[{section_of(setting)}] ") and key in fault
        if not key.startswith("tls"):
            found = "\n".join(line.strip() for line in text.splitlines())
            shown = "something else" if key == "secrets" else repr(found)
            assert fault.endswith(f" {key}: found {shown}; must be {setting.allowed}")

    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
    def test_a_comment_behind_a_value_is_refused_with_what_to_do(
            self, tmp_path: pathlib.Path, setting: Setting) -> None:
        good = SETTING_VALUES[setting.key][0] or "x"
        for text in (f"{good} ; comment", f"{good} # comment", f"{good}\t#", f"{good} ;"):
            faults = faults_of(tmp_path, f"[{section_of(setting)}]\n{setting.key} = {text}\n")
            words = f"[{section_of(setting)}] {setting.key}: a comment stands on a line of its own"
            assert faults.count(words) == 1, text
        if setting.key in ("database", "cohorts"):      # without white space in front it is a part of the value
            configuration_of(tmp_path, f"[{section_of(setting)}]\n{setting.key} = a;b#c\n")

    def test_a_comment_on_a_line_of_its_own_is_none_of_a_value(self, tmp_path: pathlib.Path) -> None:
        configuration = configuration_of(tmp_path, "# a\n[institution test]\n; b = c\ncohorts = 1,\n  2\n# d\n")
        assert configuration.institutions[0].lists["cohorts"] == {"1", "2"}

    def test_all_faults_are_told_at_once_each_with_the_nearest_name(self, tmp_path: pathlib.Path) -> None:
        keys = {section: ", ".join(setting.key for setting in SETTINGS if setting.section == section)
                for section in ("server", "limits", "institution")}
        assert faults_of(tmp_path, "[sever]\nport = 1\n[server]\nprot = 1\nport = x\n[limits]\n"
                         "max_student = 5\n[institution UPPER]\n[institution a]\nsecret = x\n"
                         "[DEFAULT]\nport = 1\n") == [
            f"[server] prot: unknown key; allowed: {keys['server']}; did you mean port?",
            "[server] port: found 'x'; must be a whole number from 0 to 65535",
            f"[limits] max_student: unknown key; allowed: {keys['limits']}; did you mean max_students?",
            *((f"[{name}]: unknown section; allowed: server, limits, institution NAME{hint} "
               f"(NAME: a-z, 0-9, hyphens)") for name, hint in (
                  ("sever", "; did you mean server?"), ("institution UPPER", "; did you mean institution NAME?"))),
            f"[institution a] secret: unknown key; allowed: {keys['institution']}; did you mean secrets?",
            ("[DEFAULT]: unknown section; allowed: server, limits, institution NAME "
             "(NAME: a-z, 0-9, hyphens)")]

    @pytest.mark.parametrize("text, fault", [
        ("port = 1\n", "line 1: is before or behind a [section]"),
        ("[server]\nport\n", "line 2: is neither [section] nor key = value"),
        ("[server]\nport = 1\nport = 2\n", "line 3: this key stands twice in its section"),
        ("[limits]\n[limits]\n", "line 2: this [section] stands twice")])
    def test_what_is_no_ini_file_is_refused_without_showing_its_lines(
            self, tmp_path: pathlib.Path, text: str, fault: str) -> None:
        assert fault in faults_of(tmp_path, text)

    def test_a_secret_on_a_line_of_its_own_is_not_shown_as_a_key(self, tmp_path: pathlib.Path) -> None:
        secret = "c2VjcmV0LW9mLW1pbmUtMTIzNDU2Nzg5MA=="
        for text, words in ((f"secrets =\n{secret}\n", "[institution a] what is before the =: unknown key"),
                            (f"{secret}\n{secret}\n", "line 3: this key stands twice in its section")):
            (fault,) = faults_of(tmp_path, f"[institution a]\n{text}")
            assert fault.startswith(words) and "c2Vj" not in fault

    def test_what_stands_after_a_section_s_name_is_refused_not_passed_over(self, tmp_path: pathlib.Path) -> None:
        (fault,) = faults_of(tmp_path, "[server]\n[limits] max_students = 5\n")
        assert fault.startswith("[server] [limits] max_students: unknown key")
        (fault,) = faults_of(tmp_path, "[institution a] secrets = c2VjcmV0\n")
        assert fault == "line 1: is before or behind a [section]"
        assert faults_of(tmp_path, "[server]\n[limits] max_students\n") == ["line 2: is neither [section] nor key = value"]

    def test_a_bom_and_a_percent_sign_do_no_harm(self, tmp_path: pathlib.Path) -> None:
        configuration = configuration_of(tmp_path, "\ufeff[server]\ndatabase = 100%s.db\n")
        assert configuration.settings["database"] == str(tmp_path / "100%s.db")

    def test_a_file_that_is_not_utf_8_or_not_there_is_refused(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "latin.ini").write_bytes("[server]\n# Zoë\n".encode("latin-1"))
        for name, words in (("latin.ini", "'utf-8' codec can't decode byte 0xeb"), ("missing.ini", "No such file")):
            for path, environment in ((str(tmp_path / name), {}),
                                      (None, {"SIS_SYNC_CONFIG": str(tmp_path / name)})):
                with pytest.raises(sis_sync.CommandError, match=words):
                    sis_sync.load_configuration(path, environment)

    def test_without_a_file_there_is_one_institution(self, monkeypatch: Any, tmp_path: pathlib.Path) -> None:
        monkeypatch.setattr(sis_sync, "DEFAULT_FILE", tmp_path / "sis_sync.ini")
        configuration = sis_sync.load_configuration(None, {"SIS_SYNC_SECRET": SECRET})
        assert configuration.source == "" and configuration.institutions == (sis_sync.Institution(
            "default", (hashlib.sha256(SECRET.encode()).digest(),),
            dict.fromkeys(sis_sync.LISTS, frozenset()), "skip"),)
        assert configuration.settings["database"] == str(tmp_path / "sis_sync.db")

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

    @pytest.mark.parametrize("secret, words", [
        (b"two words of a secret", "put the secret there alone"),
        (b"a-tab\tin-the-secret-here", "put the secret there alone"),
        (b"a-control\x7fcharacter-in-it", "put the secret there alone"), (b"x" * 1025, "at most 1024 bytes"),
        (b"line-one-of-the-secret\nsecond", "put the secret there alone"),
        (b"sha256:" + b"a" * 64, "write that line itself after secrets ="),
        (b"SHA256:" + b"A" * 64, "write that line itself after secrets =")])
    def test_a_secret_that_no_header_can_carry_or_a_digest_is_refused_with_what_to_do(
            self, tmp_path: pathlib.Path, secret: bytes, words: str) -> None:
        (tmp_path / "secret.txt").write_bytes(secret + b"\r\n")
        path = tmp_path / "test.ini"
        for source in ("env:S", "file:secret.txt"):
            path.write_text(f"[institution a]\nsecrets = {source}\n", "utf-8")
            with pytest.raises(sis_sync.CommandError) as caught:
                sis_sync.load_configuration(str(path), {"S": secret.decode()})
            (fault,) = caught.value.args
            told = {"env:S": "env:S", "file:secret.txt": tmp_path / "secret.txt"}[source]
            assert f"[institution a] secrets: {told}: " in fault and words in fault
            assert secret.decode()[:20] not in fault

    def test_a_file_into_which_secret_was_written_whole_is_refused(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "secret.txt").write_bytes(run("secret").stdout)
        (fault,) = faults_of(tmp_path, "[institution a]\nsecrets = file:secret.txt\n")
        assert "put the secret there alone" in fault

    @pytest.mark.parametrize("secret", [b"x" * 1024, "Gehei\xdf-und-l\xe4nger".encode(), b"!~" * 10])
    def test_a_secret_that_a_header_can_carry_is_taken(self, tmp_path: pathlib.Path, secret: bytes) -> None:
        (tmp_path / "secret.txt").write_bytes(secret + b"\n")
        (institution,) = configuration_of(tmp_path, "[institution a]\nsecrets = file:secret.txt\n").institutions
        assert sis_sync.institution_of(f"Bearer {secret.decode('latin-1')}", [institution])

    def test_a_network_with_host_bits_is_refused_and_says_so(self, tmp_path: pathlib.Path) -> None:
        (fault,) = faults_of(tmp_path, "[server]\ntrusted_proxies = 127.0.0.1/8\n")
        assert fault.startswith("[server] trusted_proxies: found '127.0.0.1/8'; ") and "host bits" in fault

    def test_a_secret_that_is_not_set_is_a_warning(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "empty.txt").write_text("\n")
        text = "[institution a]\nsecrets = env:NOT_SET file:missing.txt file:empty.txt\n"
        assert configuration_of(tmp_path, text).institutions[0].digests == ()
        missing = tmp_path / "missing.txt"
        told = [warning.replace(f"PosixPath({str(missing)!r})", repr(str(missing)))        # as PyPy has it
                for warning in warnings_of(tmp_path, text)]
        assert told == [
            *(f"[institution a] secrets: not set: {why}" for why in (
                "env:NOT_SET: missing or empty", f"[Errno 2] No such file or directory: {str(missing)!r}",
                f"{tmp_path / 'empty.txt'}: missing or empty")),
            "no institution has a secret set: every push will be answered 503"]

    def test_a_short_secret_is_a_warning(self, tmp_path: pathlib.Path) -> None:
        for secret, warned in (("x" * 15, True), ("x" * 16, False)):
            assert bool(warnings_of(tmp_path, "", {"SIS_SYNC_SECRET": secret})) is warned

    def test_two_institutions_with_one_secret_and_the_digest_of_nothing_are_refused(
            self, tmp_path: pathlib.Path) -> None:
        digest = hashlib.sha256(SECRET.encode()).hexdigest()
        assert faults_of(tmp_path, "[institution a]\n[institution b]\n"
                         f"secrets = sha256:{digest}\n[institution c]\n"
                         f"secrets = sha256:{hashlib.sha256().hexdigest()}\n") == [
            "[institution b] secrets: one of them is also that of institution a",
            "[institution c] secrets: one of them is also that of no secret at all"]

    def test_an_address_open_to_others_without_tls_is_a_warning(self, tmp_path: pathlib.Path) -> None:
        for host, warned in (("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("192.0.2.1", True)):
            warnings = warnings_of(tmp_path, f"[server]\nhost = {host}\n")
            assert any("TLS" in warning for warning in warnings) is warned

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
        assert sis_sync.client_of(peer, forwarded, settings["trusted_proxies"]) == client

    def test_the_file_as_shipped_is_the_table_of_settings(self, tmp_path: pathlib.Path) -> None:
        text = (HERE / "sis_sync.ini").read_text("utf-8")
        for setting in SETTINGS:
            line = f"{setting.key} = {setting.default}".strip()
            assert len(re.findall(rf"^# \S.*\n{re.escape(line)}$", text, re.MULTILINE)) == 1, setting.key
        assert len(re.findall(r"^[^#\[\n]", text, re.MULTILINE)) == len(SETTINGS)
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text)
        assert {(name.partition(" ")[0], key) for name in parser.sections() for key in parser[name]} == {
            (setting.section, setting.key) for setting in SETTINGS}
        assert not warnings_of(tmp_path, text)

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
            sis_sync.reload(service, argparse.Namespace(config=None))
            assert service.configuration.settings["max_students"] == 7
            (tmp_path / "sis_sync.ini").unlink(missing_ok=True)
        service.roster.close()

    @posix
    def test_a_server_on_a_terminal_ends_when_the_terminal_closes(self, tmp_path: pathlib.Path) -> None:
        """That sends SIGHUP too; sent by a person it reloads, here as elsewhere."""
        import fcntl
        import pty
        import termios
        ours, its = pty.openpty()
        with running(tmp_path, ini_of(), stdin=its, start_new_session=True,
                     preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) as process:
            os.close(its)
            process.process.send_signal(signal.SIGHUP)
            process.wait_for(": reloaded|Z reloaded")
            assert process.push(student(1)).status == 200
            os.close(ours)
            assert process.process.wait(20) == 0
            process.wait_for("stopped")

    @posix
    def test_no_file_however_odd_stops_a_running_server(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process:
            for text in ("[server]\nport = 1\nport = 2\n", "[limits]\n[limits]\n", "\0", "no ini",
                         "[institution a]\nsecrets = file:a\0b\n", "[server]\ntls_key = a\0b\n",
                         "[server]\ntls_certificate = a\0b\n"):
                process.ini.write_text(text)
                process.process.send_signal(signal.SIGHUP)
                process.wait_for("not reloaded")
                assert process.push(student(1)).status == 200
                with process.changed:
                    process.log.clear()

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
    *((f"Transfer-Encoding {coding!r}", head_of(Transfer_Encoding=coding), 400, "malformed_request")
      for coding in ("gzip", "identity", "chunked, gzip", "chunked, identity", "xchunked", "chunked;a=b", "chunked,",
                     "", ",", "chun ked")),
    ("white space that is none of HTTP's before chunked", head_of(Transfer_Encoding="\xa0chunked"), 400,
     "malformed_request"),
    *((f"Transfer-Encoding {coding!r}", head_of(Transfer_Encoding=coding), 501, "not_implemented")
      for coding in ("gzip, chunked", "chunked, chunked", "identity,chunked", "gzip,\tCHUNKED", ", chunked")),
    ("two Transfer-Encodings", head_of(Transfer_Encoding="chunked\r\nTransfer-Encoding: chunked"), 501,
     "not_implemented"),
    *((f"the target {target}", f"GET {target} HTTP/1.1\r\n".encode() + HOST + b"\r\n", 400, "malformed_request")
      for target in ("http://:80/", "http://u:p@x/", "http://u@x/", "http://x:abc/", "http:///healthz", "http://",
                     "http://x:80:80/", "http://%zz/", "http://[::::]/", "http://[::1/", "ftp://x/")),
    *((f"Host: {host}", GET + f"Host: {host}\r\n\r\n".encode("latin-1"), 400, "malformed_request")
      for host in ("%zz", "%4", "[::::]", "[::1", "::1", "[1]", "[]", "x:abc", "x:80:80", "u@x", "x/y", "a,b", "\xe9",
                   "[::1]x", '"x"')),
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
    b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"2\r\n{}\r\n00\r\n folded\r\n\r\n",
    *(line + b"\r\n{}   \r\n0\r\n\r\n" for line in (
        b"5 ", b"5\t", b"5;", b"5; ", b"5;;a", b"5;a=", b"5;a=;b", b'5;a=\xb7"b c"', b'5;a="b', b'5;a="b"c', b"5;a b",
        b'5;a="\x01"', b'5;a="\\"', b"5;\xe9", b"5;a=\xe9", b"5 a", b"5;=b"))]
CHUNK_EXTENSIONS = [b";a", b";a=b", b" ; a = b", b";\ta", b';a="b c;d"', b';a="\\"\xe9"', b';a=""', b";a;b=c;d"]


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

    @pytest.mark.parametrize("extension", CHUNK_EXTENSIONS)
    def test_chunk_extensions_are_taken_and_dropped(self, server: Process, extension: bytes) -> None:
        data = head_of(Transfer_Encoding="chunked") + chunked(json.dumps(batch()).encode(), 20, extension)
        assert server.exchange(data).status == 200

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

    def test_https_on_a_plain_port_is_told_so(self, server: Process) -> None:
        with server.connect() as connection:
            hello = ssl.MemoryBIO()
            client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            connection.sendall(hello.read())
            answer = parse_answer(read_to_end(connection))
        assert (answer.status, answer.document["detail"]) == (400, "this port speaks http, not https")

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
        body = gzip.compress(self.BODY)
        answer = server.exchange(head_of(Transfer_Encoding="chunked", Content_Encoding="gzip") + chunked(body, size))
        assert answer.document["imported"] == 300

    @pytest.mark.parametrize("size", [1, 1000])
    def test_a_second_gzip_member_or_anything_else_behind_the_first_is_refused(
            self, server: Process, size: int) -> None:
        for more in (gzip.compress(b" "), b"\0" * 10, b"x"):
            answer = server.exchange(head_of(Transfer_Encoding="chunked", Content_Encoding="gzip") + chunked(
                gzip.compress(self.BODY) + more, size))
            assert answer.code == "malformed_json" and "more than one member" in answer.document["detail"]

    def test_gzip_is_read_in_whatever_pieces_it_comes(self, server: Process) -> None:
        body = gzip.compress(json.dumps(batch(student("pieces"))).encode())
        assert server.exchange(request_of(body, Content_Encoding="gzip"), size=1).document["imported"] == 1

    def test_many_small_chunks_are_read_and_far_too_many_refused(self, server: Process) -> None:
        """Each costs as much work as a packet: of a large body, the mean must be a piece worth it."""
        body = json.dumps(batch()).encode()
        most = sis_sync.MAX_SMALL_CHUNKS
        for number, status in ((most, 200), (2 * most, 400)):
            data = head_of(Transfer_Encoding="chunked") + chunked(body + b" " * (2 * number - len(body)), 2)
            answer = server.exchange(data)
            assert answer.status == status, answer.body
        assert answer.document == {"error": "malformed_request", "detail": "the body comes in too many small chunks"}
        data = head_of(Transfer_Encoding="chunked") + chunked(body + b" " * (16 * (most + 10)), 16)
        assert server.exchange(data).status == 200

    def test_a_body_in_tiny_pieces_is_one_buffer(self, service: sis_sync.Service) -> None:
        """In a list, each piece would take forty bytes and more."""
        size = 1 << 19
        body = json.dumps(batch()).encode().ljust(size)
        request = sis_sync.Request("192.0.2.1", "POST", SYNC, {"authorization": f"Bearer {SECRET}"},
                                   (body[start:start + 2] for start in range(0, size, 2)))
        statuses: list[int] = []
        assert peak_during(lambda: statuses.append(service.handle(request).status)) < 8 * size
        assert statuses == [200]

    def test_a_request_in_too_many_small_pieces_is_refused(self, service: sis_sync.Service) -> None:
        """Here each byte is read before the next is sent, which a network does not promise."""
        most = sis_sync.MAX_SMALL_PIECES
        ours, its = socket.socketpair()
        with ours, its, pytest.raises(sis_sync.Refusal) as caught:
            stream = sis_sync.Stream(its, "192.0.2.1", service)
            for number in range(2 * most):
                ours.sendall(b"x")
                assert stream.readinto(bytearray(9)) == 1
        assert caught.value.error.status == 400 and "too many small pieces" in caught.value.detail
        assert number >= most
        ours, its = socket.socketpair()
        with ours, its:
            stream = sis_sync.Stream(its, "192.0.2.1", service)
            for _ in range(most + 100):     # as large as the mean must be
                ours.sendall(b"x" * sis_sync.MEAN_PIECE)
                stream.readinto(bytearray(100))

    def test_a_body_for_which_there_is_no_room_waits_and_is_then_told_busy(self, tmp_path: pathlib.Path) -> None:
        size = 1024
        limits = FAST + f"max_body_bytes = {size}\nrequest_timeout = "
        body = json.dumps(batch()).encode().ljust(size)
        with running(tmp_path, ini_of(limits=limits + "3600")) as process, contextlib.ExitStack() as stack:
            holders = [stack.enter_context(process.connect()) for _ in range(sis_sync.BODIES_IN_FLIGHT)]
            for connection in holders:
                connection.sendall(head_of(Content_Length=size, Expect="100-continue"))
                assert connection.recv(100).startswith(b"HTTP/1.1 100 ")        # it has its place
            waiting = stack.enter_context(process.connect())
            waiting.sendall(head_of(Transfer_Encoding="chunked") + chunked(body, 300))
            TestConfiguration.wait_until_read(process)
            process.ini.write_text(ini_of(limits=limits + "1"))
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("reloaded")
            # A body of unknown length takes as much as it may come to, as does one that is packed.
            unlucky = [stack.enter_context(process.connect()) for _ in range(3)]
            for connection, data in zip(unlucky, (
                    request_of(body), head_of(Transfer_Encoding="chunked") + chunked(b"{}", 1),
                    request_of(gzip.compress(body), Content_Encoding="gzip"))):
                connection.sendall(data)
            for connection in unlucky:
                answer = parse_answer(read_to_end(connection))
                assert (answer.status, answer.code) == (503, "busy")
                assert answer.headers["retry-after"] == str(answer.document["retry_after"]) == "1"
            assert process.exchange(head_of("GET", "/healthz")).status == 200
            assert process.exchange(head_of(secret="wrong", Content_Length=size)).status == 401
            holders[0].sendall(body)
            assert parse_answer(read_to_end(holders[0])).status == 200
            assert parse_answer(read_to_end(waiting)).status == 200
            holders[1].shutdown(socket.SHUT_WR)     # also one that is cut off gives its place back
            assert parse_answer(read_to_end(holders[1])).code == "malformed_request"
            for data in (request_of(body), request_of(gzip.compress(body), Content_Encoding="gzip")):
                assert process.exchange(data).status == 200

    def test_a_chunked_body_over_the_cap_is_too_large(self, server: Process) -> None:
        answer = server.exchange(head_of(Transfer_Encoding="chunked") + chunked(b" " * (9 << 20), 65536))
        assert (answer.status, answer.document["max_bytes"]) == (413, 8388608)

    def test_a_promised_chunk_is_not_waited_for_beyond_the_cap(self, server: Process) -> None:
        for sent in (b" " * (8 << 20) + b"xx", b""):
            data = head_of(Transfer_Encoding="chunked") + b"FFFFFFFFFF\r\n" + sent
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
        ("wrong", 15 << 20, 401), (SECRET, 15 << 20, 413), ("wrong", 2 << 20, 401), (SECRET, 9 << 20, 413)])
    def test_an_early_answer_reaches_a_client_that_is_busy_sending(
            self, server: Process, secret: str, length: int, status: int) -> None:
        for _ in range(5):
            with server.connect() as connection:
                connection.sendall(head_of(secret=secret, Content_Length=length) + b"x" * length)
                assert parse_answer(read_to_end(connection)).status == status

    def test_what_comes_after_an_early_answer_is_not_swallowed_for_ever(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits=FAST + "max_body_bytes = 65536\nrequest_timeout = 3600")) as process:
            for data, status in ((head_of(secret="wrong", Content_Length=1 << 40), 401), (b"x" * 9000, 414),
                                 (head_of(Content_Length=1 << 40), 413), (head_of("GET", "/healthz"), 200)):
                with process.connect() as connection:
                    connection.sendall(data)
                    sent, most = 0, 64 << 20        # the system's buffers on both sides are well below
                    with contextlib.suppress(ConnectionError):
                        while sent < most:
                            sent += connection.send(b"x" * 65536)
                    assert sent < most
                process.wait_for(f" {status} ")


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

    def test_who_had_the_whole_time_for_a_request_does_not_get_as_much_again(self, tmp_path: pathlib.Path) -> None:
        limits = FAST + "max_connections_per_client = 1\nrequest_timeout = "
        with running(tmp_path, ini_of(limits=limits + "1"),
                     command=patched("sis_sync.REFUSED_SECONDS = 0.1")) as process, process.connect() as connection:
            connection.sendall(b"G")
            process.exchange(head_of("GET", "/healthz"), source="127.0.0.2")    # so that one has been accepted
            process.ini.write_text(ini_of(limits=limits + "3600"))
            process.process.send_signal(signal.SIGHUP)
            assert parse_answer(read_to_end(connection)).code == "request_timeout"
            assert TestCrowds.served_again(process)     # though the client's half stays open


def threads_of(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.process.pid}/task"))


def memory_of(process: Process, key: str = "VmRSS") -> float:
    """In MB."""
    status = pathlib.Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


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

    def test_a_burst_past_all_connections_is_answered_and_waits_for_nobody(self, tmp_path: pathlib.Path) -> None:
        """Who waited for one of the places, or in the system's queue for one, would wait for ever."""
        limits = FAST + "max_connections = 8\nrequest_timeout = 3600"
        with running(tmp_path, ini_of(limits=limits)) as process, contextlib.ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(process.connect())
            answers = self.burst(lambda: process.exchange(head_of("GET", "/healthz")))
            assert {(answer.code, answer.headers["retry-after"]) for answer in answers} == {("busy", "1")}

    @staticmethod
    def burst(exchange: Any, number: int = 300) -> list[Answer]:
        gate = threading.Barrier(number)

        def one(_: int) -> Answer:
            gate.wait()
            answer: Answer = exchange()
            return answer

        with concurrent.futures.ThreadPoolExecutor(number) as pool:
            return list(pool.map(one, range(number)))

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
                        assert threads_of(process) <= threads + 33 + 100
                assert process.push(student()).status == 200
                assert memory_of(process) < memory + 30


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

    def test_http_on_a_tls_port_is_told_so(self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        with running(tmp_path, tls_ini(certificate)) as process:
            for data in (head_of("GET", "/healthz"), request_of(batch(student())), b"G", b"\0"):
                answer = process.exchange(data)
                assert (answer.status, answer.document["detail"]) == (400, "this port speaks https, not http")

    def test_past_the_connections_the_answer_is_busy_over_tls_too(
            self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        limits = FAST + "max_connections = 4\nrequest_timeout = 3600"
        with running(tmp_path, tls_ini(certificate, limits)) as process, contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(process.connect())
            answer = self.exchange(process, certificate, request_of(batch(student())))
            assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "busy", "1")
            answers = TestCrowds.burst(lambda: self.exchange(process, certificate, head_of("GET", "/healthz")), 100)
            assert {(answer.status, answer.code) for answer in answers} == {(503, "busy")}

    @pytest.mark.skipif(not hasattr(ssl, "OP_NO_RENEGOTIATION"), reason="this Python can't forbid it")
    def test_a_client_may_not_renegotiate(self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        context = configuration_of(tmp_path, f"[server]\ntls_certificate = {certificate}\n"
                                   f"tls_key = {certificate.with_suffix('.key')}\n").tls
        assert context and context.options & ssl.OP_NO_RENEGOTIATION

    @pytest.mark.parametrize("key, content, words", [
        ("tls_certificate", None, "(No such file or directory)"),
        ("tls_certificate", "text", "must be a certificate"), ("tls_certificate", "the key", "must be a certificate"),
        ("tls_key", None, "(No such file or directory)"),
        ("tls_key", "text", "must be the certificate's key"),
        ("tls_key", "the certificate", "must be the certificate's key")])
    def test_which_of_the_two_files_is_at_fault_is_named(
            self, tmp_path: pathlib.Path, certificate: pathlib.Path, key: str, content: str | None, words: str) -> None:
        files = {"tls_certificate": certificate, "tls_key": certificate.with_suffix(".key")}
        contents = {"text": "text", "the key": files["tls_key"].read_text(), "the certificate": certificate.read_text()}
        files[key] = tmp_path / "bad.pem"
        if content:
            files[key].write_text(contents[content])
        (fault,) = faults_of(tmp_path, "[server]\n" + "".join(f"{name} = {path}\n" for name, path in files.items()))
        assert fault.startswith(f"[server] {key}: {files[key]}: ")
        assert words in fault or sys.implementation.name == "pypy"      # which does not say why

    def test_a_certificate_without_its_key_is_refused(self, tmp_path: pathlib.Path,
                                                      certificate: pathlib.Path) -> None:
        (fault,) = faults_of(tmp_path, f"[server]\ntls_certificate = {certificate}\n")
        assert fault.startswith(f"[server] tls_key: {certificate}: must be the certificate's key")
        other = tmp_path / "other.key"
        subprocess.run(["openssl", "genrsa", "-out", other, "2048"], check=True, capture_output=True)
        (fault,) = faults_of(tmp_path, f"[server]\ntls_certificate = {certificate}\ntls_key = {other}\n")
        assert fault.startswith(f"[server] tls_key: {other}: must be the certificate's key")

    @posix
    def test_an_unfinished_request_over_tls_is_busy_when_the_server_stops(
            self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        with running(tmp_path, tls_ini(certificate), command=patched("sis_sync.SHUTDOWN_TIMEOUT = 3600")) as process, \
                context.wrap_socket(process.connect(), server_hostname="localhost") as connection:
            connection.sendall(request_of(batch(student()))[:50])
            for _ in range(5):
                assert self.exchange(process, certificate, head_of("GET", "/healthz")).status == 200
            process.process.send_signal(signal.SIGTERM)
            answer = parse_answer(read_to_end(connection))
            assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "busy", "1")
            assert process.process.wait(20) == 0

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
        assert fault.startswith(f"[server] tls_key: {key}: ") and "not encrypted" in fault

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
            with process.connect() as connection, process.connect() as idle:
                connection.sendall(data[:-5])
                TestConfiguration.wait_until_read(process)
                process.process.send_signal(number)
                assert read_to_end(idle) == b""     # by now it waits for the others alone
                connection.sendall(data[-5:])
                assert parse_answer(read_to_end(connection)).document["imported"] == 1
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
    def test_a_request_that_is_cut_off_by_the_stop_is_busy_and_delays_nothing(self, tmp_path: pathlib.Path) -> None:
        """malformed_request would be final to the client, and its push was healthy."""
        data = request_of(batch(student(1)))
        head = data.index(b"\r\n\r\n") + 4
        with running(tmp_path, ini_of(), command=patched("sis_sync.SHUTDOWN_TIMEOUT = 3600")) as process, \
                contextlib.ExitStack() as stack:
            cut = [stack.enter_context(process.connect()) for _ in (1, 10, 60, head - 2, head - 1)]
            for connection, length in zip(cut, (1, 10, 60, head - 2, head - 1)):
                connection.sendall(data[:length])
            TestConfiguration.wait_until_read(process)
            process.process.send_signal(signal.SIGTERM)
            for connection in cut:
                answer = parse_answer(read_to_end(connection))
                assert (answer.status, answer.code) == (503, "busy")
                assert answer.headers["retry-after"] == "1"
            assert process.process.wait(20) == 0

    @linux
    def test_a_server_that_accepts_no_more_ends_with_1(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(), command=patched(
                "sis_sync.Server.serve_forever = lambda self, *_: [][0]")) as process:
            assert process.process.wait(20) == 1
            process.wait_for("nothing is accepted any more")

    @linux
    def test_without_descriptors_it_waits_for_some_and_goes_on(self, tmp_path: pathlib.Path) -> None:
        import resource
        with running(tmp_path, ini_of()) as process:
            pid, limits = process.process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
            with process.connect() as connection:
                connection.sendall(head_of("GET", "/healthz"))
                process.wait_for("cannot accept: OSError.*Too many open files")
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
                assert parse_answer(read_to_end(connection)).status == 200

    @linux
    @cpython
    def test_memory_that_runs_out_costs_one_request_a_500(self, tmp_path: pathlib.Path) -> None:
        import resource
        with running(tmp_path, ini_of(limits=FAST + "max_students = 100000"),
                     environment={"MALLOC_ARENA_MAX": "1"}) as process:     # more of them reserve what they don't use
            assert process.push(student("first")).status == 200
            pid, limits = process.process.pid, resource.getrlimit(resource.RLIMIT_AS)
            room = int(memory_of(process, "VmSize") + 24) << 20
            resource.prlimit(pid, resource.RLIMIT_AS, (room, limits[1]))
            answer = process.push(*map(student, range(50_000)))
            assert (answer.status, answer.code) == (500, "server_error")
            process.wait_for(f"{answer.document['request_id']} server_error MemoryError")
            assert process.push(student("second")).status == 200
            resource.prlimit(pid, resource.RLIMIT_AS, limits)
            assert process.push(*map(student, range(50_000))).document["imported"] == 50_000

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

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO here")
    def test_a_second_signal_ends_it_also_while_it_reads_the_configuration(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process:
            os.mkfifo(tmp_path / "fifo")
            process.ini.write_text(ini_of() + f"[institution slow]\nsecrets = file:{tmp_path / 'fifo'}\n")
            process.process.send_signal(signal.SIGHUP)
            with open(tmp_path / "fifo", "wb"):         # it has opened the other end, and reads
                process.process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + 20
                while process.process.poll() is None and time.monotonic() < deadline:
                    process.process.send_signal(signal.SIGTERM)
                assert process.process.wait(1) == -signal.SIGTERM

    def test_a_reader_does_not_hold_up_the_stop_and_loses_nothing(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process:
            assert process.push(student(1)).status == 200
            with contextlib.closing(sqlite3.connect(process.database, isolation_level=None)) as reader:
                reader.execute("BEGIN")
                assert reader.execute("SELECT count(*) FROM entries").fetchone() == (1,)
                assert process.push(student(2)).status == 200
                process.process.send_signal(signal.SIGTERM)
                assert process.process.wait(20) == 0
            with contextlib.closing(sqlite3.connect(process.database)) as connection:
                assert connection.execute("SELECT count(*) FROM entries").fetchone() == (2,)

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
        assert connection.execute("PRAGMA user_version").fetchone() == (max(sis_sync.MIGRATIONS),) == (2,)
        assert connection.execute("PRAGMA temp_store").fetchone() == (2,)       # MEMORY
        assert connection.execute("PRAGMA journal_size_limit").fetchone() == (sis_sync.WAL_LIMIT,)

    def test_a_lock_held_by_another_process_is_busy_after_a_while_and_then_over(
            self, service: sis_sync.Service, monkeypatch: Any) -> None:
        assert sis_sync.BUSY_TIMEOUT == 5.0
        monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.2)
        service.roster.close()          # it is opened anew, with this
        with contextlib.closing(sqlite3.connect(service.roster.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = handle(service, batch(student()))
            assert (answer.status, answer.code) == (503, "busy")
            assert answer.headers["retry-after"] == "1"
            assert handle(service, method="GET", path="/healthz").status == 200
            other.execute("ROLLBACK")
        assert handle(service, batch(student())).status == 200

    def test_a_lock_of_another_thread_is_busy_after_a_while_too(
            self, service: sis_sync.Service, monkeypatch: Any) -> None:
        monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.2)
        with service.turn:
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
            process.wait_for(f"{answer.document['request_id']} server_error FileNotFoundError: .*sis_sync.db")
            answer = process.exchange(head_of("GET", "/healthz"))
            assert (answer.status, answer.code) == (503, "unhealthy")
            shutil.copy(backup, process.database)
            assert process.push(student(1), student(3)).document["details"] == {
                "imported": 1, "updated": 1, "unchanged": 1}
            assert process.exchange(head_of("GET", "/healthz")).status == 200
            process.log[:] = [line for line in process.log if "server_error" not in line]

    @posix
    @pytest.mark.parametrize("looked_at", [False, True])
    def test_a_log_deleted_under_the_server_is_a_500_and_never_a_200_that_is_lost(
            self, tmp_path: pathlib.Path, looked_at: bool) -> None:
        with running(tmp_path, ini_of()) as process:
            assert process.push(student("before")).status == 200
            pathlib.Path(f"{process.database}-wal").unlink()
            if looked_at:               # by whoever watches the server, who must not make it worse
                assert process.exchange(head_of("GET", "/healthz")).code == "unhealthy"
            answer = process.push(student("lost"))
            assert (answer.status, answer.code) == (500, "server_error")
            process.wait_for(f"{answer.document['request_id']} server_error FileNotFoundError: .*-wal")
            assert process.push(student("after")).status == 200
            assert process.exchange(head_of("GET", "/healthz")).document == {"status": "ok"}
            process.stop(signal.SIGKILL)
            assert {("Ubefore",), ("Uafter",)} <= set(process.rows("SELECT student_id_ext FROM entries"))
            assert process.rows("PRAGMA integrity_check") == [("ok",)]

    @posix
    def test_a_log_that_can_not_be_emptied_is_told_until_it_is(self, tmp_path: pathlib.Path) -> None:
        """By a reader that stays, for example; and when it has gone, the log becomes small again."""
        limit, name = 1_500_000, "x" * 255
        with running(tmp_path, ini_of(), command=patched(f"sis_sync.WAL_LIMIT = {limit}")) as process:
            process.push(student(0))
            wal = pathlib.Path(f"{process.database}-wal")
            with contextlib.closing(sqlite3.connect(process.database, isolation_level=None)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM syncs").fetchone()
                for page in range(3):
                    assert process.exchange(head_of("GET", "/healthz")).document == {"status": "ok"} or page > 1
                    assert process.push(*(student(f"{page}-{number}", first_name=name, last_name=name)
                                          for number in range(5000))).status == 200
                assert wal.stat().st_size > 4 * limit
                process.wait_for("the write-ahead log can't be emptied")
                health = process.exchange(head_of("GET", "/healthz"))
                assert (health.status, health.document["status"]) == (200, "ok")
                assert "write-ahead log" in health.document["warning"]
            for number in range(3):
                assert process.push(student(number)).status == 200
            assert process.exchange(head_of("GET", "/healthz")).document == {"status": "ok"}
            assert wal.stat().st_size <= limit
            process.log.clear()
            assert process.push(student()).status == 200
            assert not any("emptied" in line for line in process.log)

    @linux
    def test_a_full_temporary_folder_stops_nothing(self, tmp_path: pathlib.Path) -> None:
        mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=4k none "$SQLITE_TMPDIR" && exec "$@"', "sh"]
        (tmp_path / "full").mkdir()
        environment = {"SQLITE_TMPDIR": str(tmp_path / "full")}
        if not shutil.which("unshare") or subprocess.run(
                [*mount, "true"], env={**ENVIRONMENT, **environment}, capture_output=True, check=False).returncode:
            pytest.skip("needs unshare, and the right to mount")
        with running(tmp_path, ini_of(), environment=environment, command=(*mount, *COMMAND)) as process:
            students = [student(number) for number in range(20_000)]
            random.Random(1).shuffle(students)
            for start in range(0, len(students), 5000):
                assert process.push(*students[start:start + 5000]).status == 200
            random.Random(2).shuffle(students)
            changed = [{**values, "first_name": "A much longer name than before"} for values in students[:5000]]
            assert process.push(*changed).document["details"]["updated"] == 5000

    def test_history_keeps_the_latest_of_each_institution_whatever_the_clock_says(
            self, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(sis_sync, "HISTORY_SYNCS", 4)
        service = sis_sync.Service(configuration_of(
            tmp_path, "[institution a]\n[institution b]\nsecrets = env:B\n",
            {"SIS_SYNC_SECRET": SECRET, "B": OTHER_SECRET}))
        start, days = time.time(), [0, 1, 500, 501, 502, 2, 3]
        for day in days:
            monkeypatch.setattr(time, "time", lambda: start + day * 86400)  # noqa: B023
            for secret in (SECRET, OTHER_SECRET)[:2 if day < 2 else 1]:
                answer = handle(service, batch(student(), cohort_id=str(day)), authorization=f"Bearer {secret}")
                assert answer.status == 200
        with service.roster.transaction() as connection:
            kept = connection.execute("SELECT institution, cohort_id FROM syncs ORDER BY sync_id").fetchall()
            seen = connection.execute("SELECT count(*) FROM entries").fetchone()
        assert [day for name, day in kept if name == "a"] == ["501", "502", "2", "3"]
        assert [day for name, day in kept if name == "b"] == ["0", "1"]
        assert seen == (len(days) + 2,)
        service.roster.close()

    @posix
    def test_a_database_replaced_under_a_running_server_is_once_a_500_and_then_the_one_that_is_used(
            self, tmp_path: pathlib.Path) -> None:
        """The README says to stop first; who does not loses nothing that was answered 200 later."""
        with running(tmp_path, ini_of()) as process:
            process.push(*(student(number) for number in range(3000)))
            backup = tmp_path / "backup.db"
            assert run("--config", process.ini, "backup", backup).returncode == 0
            for page in range(4):
                process.push(*(student(f"{page}-{number}") for number in range(5000)))
            backup.chmod(0o644)
            os.replace(backup, process.database)
            process.exchange(head_of("GET", "/healthz"))    # must not touch what is wrong
            assert process.push(student("lost")).code == "server_error"
            answer = process.push(*(student(number) for number in range(3001))).document
            assert answer["details"] == {"imported": 1, "updated": 3000, "unchanged": 3000}
            assert process.exchange(head_of("GET", "/healthz")).status == 200
            process.stop(signal.SIGKILL)
            assert process.rows("PRAGMA integrity_check") == [("ok",)]
            assert process.rows("SELECT count(*) FROM entries") == [(3001,)]
            assert process.database.stat().st_mode & 0o777 == 0o600

    @posix
    def test_the_log_of_a_database_that_was_replaced_is_not_left_to_the_new_one(self, tmp_path: pathlib.Path) -> None:
        """SQLite finds it by its name at the next start, and would ruin the new database with it."""
        with running(tmp_path, ini_of()) as process:
            process.push(*(student(number) for number in range(3000)))
            backup = tmp_path / "backup.db"
            assert run("--config", process.ini, "backup", backup).returncode == 0
            process.push(*(student(f"more-{number}") for number in range(5000)))
            os.replace(backup, process.database)
            assert process.stop() == 0
            process.start()
            assert process.push(student(1)).document["details"]["unchanged"] == 1
            process.stop()
            assert process.rows("PRAGMA integrity_check") == [("ok",)]
            assert process.rows("SELECT count(*) FROM entries") == [(3000,)]

    @posix
    def test_a_database_that_is_moved_and_moved_back_has_all_that_was_answered(self, tmp_path: pathlib.Path) -> None:
        """SQLite does not empty the log of a file that is not where it was: the server must, and keep it."""
        with running(tmp_path, ini_of()) as process:
            assert process.push(*(student(number) for number in range(1000))).status == 200
            os.rename(process.database, tmp_path / "moved.db")
            assert process.push(student("meanwhile")).code == "server_error"
            os.rename(tmp_path / "moved.db", process.database)
            assert process.push(student("later")).document["details"]["imported"] == 1
            process.stop(signal.SIGKILL)
            assert process.rows("PRAGMA integrity_check") == [("ok",)]
            assert process.rows("SELECT count(*) FROM entries") == [(1002,)]

    @posix
    def test_a_log_that_is_deleted_while_another_reads_is_not_given_up(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process, contextlib.closing(sqlite3.connect(process.database)) as reader:
            reader.execute("SELECT count(*) FROM syncs").fetchall()
            assert process.push(*(student(number) for number in range(1000))).status == 200
            pathlib.Path(f"{process.database}-wal").unlink()
            assert process.push(student("meanwhile")).code == "server_error"
            process.stop(signal.SIGKILL)
            shutil.copy(process.database, tmp_path / "copy.db")
            with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
                assert connection.execute("SELECT count(*) FROM entries").fetchone()[0] >= 1000

    @posix
    def test_a_stop_brings_all_into_the_database_file_though_another_has_it_open(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of()) as process, contextlib.closing(sqlite3.connect(process.database)) as reader:
            reader.execute("SELECT count(*) FROM syncs").fetchall()
            process.push(*(student(number) for number in range(1000)))
            assert process.stop() == 0
            shutil.copy(process.database, tmp_path / "copy.db")
            with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
                assert connection.execute("SELECT count(*) FROM entries").fetchone() == (1000,)

    @posix
    def test_a_database_may_be_a_symbolic_link(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "sis_sync.db").symlink_to(tmp_path / "data" / "real.db")
        with running(tmp_path, ini_of()) as process:
            assert [process.push(student(number)).status for number in range(2)] == [200, 200]
        assert (tmp_path / "data" / "real.db").exists()

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
        newest = max(sis_sync.MIGRATIONS)
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


# The schema as the first edition made it.
FIRST_SCHEMA = """
CREATE TABLE rosters (
    roster_id INTEGER PRIMARY KEY,
    institution TEXT NOT NULL,
    cohort_id TEXT NOT NULL,
    UNIQUE (institution, cohort_id)
);
CREATE TABLE entries (
    roster_id INTEGER NOT NULL REFERENCES rosters (roster_id),
    student_id_ext TEXT NOT NULL, email TEXT NOT NULL, first_name TEXT, last_name TEXT, program_code TEXT,
    campus_name TEXT, first_in_family INTEGER,
    created_at INTEGER NOT NULL,
    changed_at INTEGER NOT NULL,
    seen_at INTEGER NOT NULL,
    PRIMARY KEY (roster_id, student_id_ext)
) WITHOUT ROWID;
CREATE TABLE syncs (
    sync_id INTEGER PRIMARY KEY,
    time INTEGER NOT NULL,
    institution TEXT NOT NULL,
    cohort_id TEXT NOT NULL,
    client TEXT NOT NULL,
    received INTEGER NOT NULL,
    new INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    unchanged INTEGER NOT NULL,
    rejected INTEGER NOT NULL,
    milliseconds INTEGER NOT NULL,
    errors TEXT NOT NULL
);
CREATE INDEX syncs_by_time ON syncs (time);
PRAGMA user_version = 1;
"""
FIRST_NAMES = ("student_id_ext", "email", "first_name", "last_name", "program_code", "campus_name", "first_in_family")
ODD_NAMES = ("O'Brien", "Nguyễn", "Zoë", "王", "👩\u200d🎓", 'a "b" \\', "%s;--", "Робъртс", None)


def first_edition(path: pathlib.Path, changes: str = "") -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """A database of the first edition; its roster, with institution and cohort, and its history."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.executescript(FIRST_SCHEMA + changes)
        entries, numbers = [], itertools.count()
        for roster_id, (institution, cohort) in enumerate(itertools.product(("a", "b-2"), ("2026", "É 1;2")), 7):
            connection.execute("INSERT INTO rosters VALUES (?, ?, ?)", (roster_id, institution, cohort))
            for name, number in zip(ODD_NAMES * 30, numbers):
                values = (f"{(number * 7919) % 1000:03}", "a@b", name, name, None, name, (None, 0, 1)[number % 3])
                times = (number, 1_700_000_000 + number, 1_800_000_000 + number)
                names = ", ".join(("roster_id", *FIRST_NAMES, "created_at", "changed_at", "seen_at"))
                connection.execute(f"INSERT INTO entries ({names}) VALUES ({', '.join('?' * 11)})",
                                   (roster_id, *values, *times))
                entries.append((institution, cohort, *values, *times))
        syncs = [(number, 1_700_000_000 + number, "a", "2026", "192.0.2.1", 1, 1, 0, 0, 0, 9, "[]")
                 for number in (3, 4, 9)]
        connection.executemany(f"INSERT INTO syncs VALUES ({', '.join('?' * 12)})", syncs)
        connection.commit()
    return sorted(entries), syncs


def everything_in(path: pathlib.Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [*connection.iterdump(), str(connection.execute("PRAGMA user_version").fetchone())]


def as_text(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class TestMigration:
    def test_a_database_of_the_first_edition_is_migrated_and_nothing_is_lost(self, tmp_path: pathlib.Path) -> None:
        entries, syncs = first_edition(tmp_path / "sis_sync.db")
        with running(tmp_path, ini_of(institutions="[institution a]\n")) as process:
            assert len([line for line in process.log if "igrat" in line]) == 1
            process.wait_for("database: migrated from version 1 to 2")
            columns = f"institution, cohort_id, {', '.join(FIRST_NAMES)}, created_at, changed_at, seen_at"
            assert sorted(process.rows(f"SELECT {columns} FROM entries JOIN rosters USING (roster_id)")) == entries
            assert process.rows("SELECT * FROM syncs ORDER BY sync_id") == syncs
            assert process.rows("PRAGMA user_version") == [(2,)]
            assert process.rows("PRAGMA integrity_check") == [("ok",)]
            assert process.rows("PRAGMA foreign_key_check") == []
            same, other, *_ = ({**dict(zip(FIRST_NAMES, row[2:])), "first_in_family": None}
                               for row in entries if row[:2] == ("a", "2026") and row[8] is None)
            answer = process.push(same, {**other, "email": "new@b"}, student("new"))
            assert answer.document["details"] == {"imported": 1, "updated": 2, "unchanged": 1}
            process.stop()
            process.start()
            assert not any("igrat" in line for line in process.log)
            assert process.rows("SELECT count(*) FROM entries") == [(len(entries) + 1,)]

    def test_a_migrated_database_is_as_one_that_was_just_made(self, tmp_path: pathlib.Path) -> None:
        first_edition(tmp_path / "old.db")
        schemas = []
        for name in ("old", "new"):
            sis_sync.Roster(str(tmp_path / f"{name}.db")).close()
            with contextlib.closing(sqlite3.connect(tmp_path / f"{name}.db")) as connection:
                schemas.append({(*row[:2], re.sub(r'[\s"]+', "", row[2] or "")) for row in connection.execute(
                    "SELECT type, name, sql FROM sqlite_master")})
        assert schemas[0] == schemas[1]

    def test_a_database_of_this_version_is_opened_as_it_is(self, tmp_path: pathlib.Path) -> None:
        """A schema that is written at each start has every reader prepare its statements anew."""
        versions = set()
        for _ in range(2):
            sis_sync.Roster(str(tmp_path / "a.db")).close()
            with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection:
                versions.add(connection.execute("PRAGMA schema_version").fetchone())
        assert len(versions) == 1

    def test_the_views_are_as_they_are_documented(self, tmp_path: pathlib.Path) -> None:
        entries, syncs = first_edition(tmp_path / "old.db")
        for name in ("old", "new"):
            sis_sync.Roster(str(tmp_path / f"{name}.db")).close()
            with contextlib.closing(sqlite3.connect(tmp_path / f"{name}.db")) as connection:
                roster = connection.execute("SELECT * FROM roster")
                assert [column[0] for column in roster.description] == [
                    "institution", "cohort_id", "student_id_ext", "email", "first_name", "last_name", "program_code",
                    "campus_name", "first_in_family", "created", "changed", "seen"]
                history = connection.execute("SELECT * FROM history ORDER BY sync_id")
                assert [column[0] for column in history.description] == [
                    "sync_id", "time", "institution", "cohort_id", "client", "received", "new", "updated", "unchanged",
                    "rejected", "milliseconds", "errors"]
                if name == "old":
                    assert sorted(roster.fetchall()) == [(*row[:-3], *map(as_text, row[-3:])) for row in entries]
                    assert history.fetchall() == [(row[0], as_text(row[1]), *row[2:]) for row in syncs]

    def test_a_column_that_is_no_field_any_more_is_kept(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "sis_sync.db"
        entries, _ = first_edition(path, "ALTER TABLE entries ADD COLUMN nickname TEXT;"
                                   "ALTER TABLE entries ADD COLUMN height INTEGER;")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("UPDATE entries SET nickname = 'Nick ' || student_id_ext, height = created_at")
            connection.commit()
        service = sis_sync.Service(configuration_of(tmp_path, "[institution a]\n"))
        with service.roster.transaction() as connection:
            kept = connection.execute("SELECT student_id_ext, nickname, created_at, height FROM entries").fetchall()
            (kind,) = (row[2] for row in connection.execute("PRAGMA table_info(entries)") if row[1] == "height")
        assert kind == "INTEGER"
        assert len(kept) == len(entries)
        assert all((nickname, height) == (f"Nick {key}", created) for key, nickname, created, height in kept)
        assert handle(service, batch(student())).document["imported"] == 1
        service.roster.close()

    def test_a_field_that_was_added_since_is_null_in_what_was_there(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "old.db"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(FIRST_SCHEMA.replace("    campus_name TEXT, first", "    first"))
            connection.execute("INSERT INTO rosters VALUES (1, 'a', '2026')")
            connection.execute("INSERT INTO entries VALUES (1, 'U1', 'a@b', 'Zoë', NULL, 'BUSI', 1, 5, 6, 7)")
            connection.commit()
        roster = sis_sync.Roster(str(path))
        with roster.transaction() as connection:
            columns = f"institution, cohort_id, {', '.join(FIRST_NAMES)}, created, changed, seen"
            assert connection.execute(f"SELECT {columns} FROM roster").fetchall() == [
                ("a", "2026", "U1", "a@b", "Zoë", None, "BUSI", None, 1, *map(as_text, (5, 6, 7)))]
        roster.close()

    def test_a_migration_that_fails_changes_nothing(self, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
        path = tmp_path / "old.db"
        first_edition(path)
        before, migrate = everything_in(path), sis_sync.MIGRATIONS[2]

        def fail(connection: sqlite3.Connection) -> None:
            migrate(connection)
            connection.execute("no SQL")

        monkeypatch.setitem(sis_sync.MIGRATIONS, 2, fail)
        with pytest.raises(sis_sync.CommandError) as caught:
            sis_sync.Roster(str(path))
        assert len(caught.value.args) == 1 and "syntax error" in caught.value.args[0]
        assert everything_in(path) == before
        monkeypatch.undo()
        sis_sync.Roster(str(path)).close()
        assert everything_in(path)[-1] == "(2,)"

    def test_a_migration_of_the_future_is_one_more_item(self, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
        first_edition(tmp_path / "first.db")
        sis_sync.Roster(str(tmp_path / "second.db")).close()
        monkeypatch.setitem(sis_sync.MIGRATIONS, 3, lambda connection: connection.execute("CREATE TABLE added (x)"))
        for name in ("first.db", "second.db", "made-new.db"):
            for _ in range(2):
                sis_sync.Roster(str(tmp_path / name)).close()
            dump = everything_in(tmp_path / name)
            assert dump[-1] == "(3,)" and any("TABLE added" in line for line in dump)

    def test_reading_commands_on_an_older_database_say_what_to_do(self, tmp_path: pathlib.Path) -> None:
        path, ini = tmp_path / "sis_sync.db", tmp_path / "sis_sync.ini"
        first_edition(path)
        ini.write_text(ini_of(institutions="[institution a]\n"))
        before = everything_in(path)
        for words in (("history",), ("history", "--stale", "1"), ("export", "--cohort", "2026")):
            result = run("--config", ini, *words)
            assert (result.returncode, result.stdout) == (2, b"")
            assert result.stderr.decode() == f"sis_sync: {path}: is of an older version: start the server once\n"
        assert run("--config", ini, "check").returncode == 0
        assert run("--config", ini, "backup", tmp_path / "backup.db").returncode == 0
        assert everything_in(path) == everything_in(tmp_path / "backup.db") == before


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
        for name, told, _ in sis_sync.COMMANDS[words[0]][1] if words else ():
            assert told.split()[0] in text and name in text

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
            result = subprocess.run(words, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20,
                                    check=False)
        assert (result.returncode, "No space left" in result.stderr) == (2, True)
        assert "Traceback" not in result.stderr and "Exception" not in result.stderr
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as closed:
            result = subprocess.run(words, env=ENVIRONMENT, stdout=closed, stderr=subprocess.PIPE, text=True,
                                    timeout=20, check=False)
        assert "Exception" not in result.stderr and "Traceback" not in result.stderr

    def test_check_says_all_that_is_wrong_and_changes_nothing(self, tmp_path: pathlib.Path) -> None:
        ini = tmp_path / "sis_sync.ini"
        ini.write_text(ini_of())
        result = run("--config", ini, "check")
        assert (result.returncode, result.stdout.decode()) == (0, f"{ini}: good\n")
        assert not (tmp_path / "sis_sync.db").exists()
        assert run("--config", ini, "check", environment={"SIS_SYNC_SECRET": ""}).returncode == 0
        ini.write_text("[server]\nport = x\n[limit]\n")
        result = run("--config", ini, "check")
        assert (result.returncode, len(result.stdout.splitlines())) == (1, 2)
        ini.write_text("[server]\ndatabase = no/such/folder/x.db\n")
        result = run("--config", ini, "check")
        assert (result.returncode, b"no/such/folder: must be there, readable and writable" in result.stdout) == (1, True)

    @pytest.mark.parametrize("ini, words", [
        ("[server]\nport = 8080 ; of the proxy\n",
         "[server] port: "),
        ("[institution a]\ncohorts = 2026 # this year\n", "[institution a] cohorts: "),
        ("[institution a]\nprograms = BUSI\n  NURS\t; from 2027\n", "[institution a] programs: "),
        ("[institution a]\nsecrets = env:SIS_SYNC_SECRET # ours\n", "[institution a] secrets: ")])
    def test_check_takes_no_comment_for_a_part_of_a_value(self, tmp_path: pathlib.Path, ini: str, words: str) -> None:
        (tmp_path / "test.ini").write_text(ini)
        result = run("--config", tmp_path / "test.ini", "check")
        assert (result.returncode, result.stdout.count(b"\n")) == (1, 1)
        assert words in result.stdout.decode()
        assert result.stdout.endswith(b": a comment stands on a line of its own\n")

    # What `secret > file` writes, a sentence, two lines, a control character, too long, a digest.
    @pytest.mark.parametrize("text, words", [
        ("{secret}\nsha256:{digest}\n", "a word"), ("correct horse battery", "a word"),
        ("sis_one\nsis_two", "a word"), ("sis_\0secret", "put the secret there alone"),
        ("x" * 1025, "at most 1024 bytes"), ("sha256:{digest}\n", "write that line itself after secrets ="),
        ("SHA256:{digest}", "write that line itself after secrets =")], ids=range(7))
    def test_a_secret_that_no_header_can_carry_is_refused_with_what_to_do(
            self, tmp_path: pathlib.Path, text: str, words: str) -> None:
        text = text.format(secret=SECRET, digest=hashlib.sha256(SECRET.encode()).hexdigest())
        (tmp_path / "secret.txt").write_text(text)
        (tmp_path / "roster.csv").write_text(csv_of([FULL]))
        (tmp_path / "test.ini").write_text("[institution a]\nsecrets = file:secret.txt\n")
        check = run("--config", tmp_path / "test.ini", "check")
        push = run("push", tmp_path / "roster.csv", "--url", "http://127.0.0.1:1", "--cohort", "1", "--secret-file",
                   tmp_path / "secret.txt")
        assert (check.returncode, push.returncode) == (1, 2)
        assert f"[institution a] secrets: {tmp_path / 'secret.txt'}: " in check.stdout.decode()
        assert f"sis_sync: {tmp_path / 'secret.txt'}: " in push.stderr.decode()
        for told in (check.stdout.decode(), push.stderr.decode()):
            assert words in told and "put the secret there alone" in told and "write that line itself" in told
            assert SECRET not in told
        if "\n" not in text.strip():        # of those, --hash reads the first line alone
            result = run("secret", "--hash", stdin=text)
            assert (result.returncode, words in result.stderr.decode()) == (2, True)

    def test_demo_shows_everything_and_ends(self) -> None:
        result = run_process("demo", "--once", SIS_SYNC_SECRET="")
        text = result.stdout.decode()
        assert result.returncode == 0, result.stderr
        assert "12,000 new, 0 updated, 0 unchanged" in text
        assert "0 new, 12,000 updated, 12,000 unchanged" in text
        for answer in ("200 {", '401 {"error": "unauthorized"',
                       '413 {"error": "batch_too_large"', '429 {"error": "rate_limited"', "curl http://"):
            assert answer in text
        folder = re.search(r"its database in (\S+)", text)
        assert folder and not os.path.exists(folder[1])

    @posix
    def test_demo_serves_until_ctrl_c(self) -> None:
        process = subprocess.Popen([*COMMAND, "demo"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        lines = iter(process.stdout)
        assert any("until you press Ctrl-C" in line for line in lines)
        url = next(match for line in lines if (match := re.search(r"curl http://127.0.0.1:(\d+)", line)))
        connection = http.client.HTTPConnection("127.0.0.1", int(url[1]), timeout=20)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 0

    @pytest.mark.parametrize("words", [
        ("serve", "--port", "0", "--host", "127.0.0.1"), ("--port", "0", "--host", "127.0.0.1"),
        ("--port", "0", "serve", "--host", "127.0.0.1")], ids=" ".join)
    def test_the_options_of_serve_override_the_file(self, tmp_path: pathlib.Path, words: Sequence[str]) -> None:
        with running(tmp_path, "[server]\nport = 1\nhost = 192.0.2.1\n", words=words) as process:
            assert process.exchange(head_of("GET", "/healthz")).status == 200

    @pytest.mark.parametrize("port", ["x", "99999", "-1", "8_0", ""])
    def test_a_port_that_is_none_names_the_option(self, port: str) -> None:
        result = run("serve", f"--port={port}")
        assert result.returncode == 2
        assert f"argument --port: found {port!r}; must be a whole number from 0 to 65535" in result.stderr.decode()

    def test_a_start_tells_where_it_listens_and_who_has_a_secret(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(institutions=(
                "[institution a]\n[institution b]\nsecrets = env:NOT_SET\n"))) as process:
            process.wait_for(r"database: ")
            log = "\n".join(process.log)
        assert "warning: [institution b] secrets: not set: env:NOT_SET: missing or empty" in log
        assert "institution a: secrets set: 1" in log
        assert f"database: {process.database}" in log
        assert f"configuration: {process.ini}" in log
        assert "institution b: secrets set: 0" in log


def csv_of(students: Sequence[Mapping[str, Any]], columns: Sequence[str] = sis_sync.NAMES,
           delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(students)
    return text.getvalue()


def rows_in(folder: pathlib.Path, data: str | bytes, mapping: Mapping[str, str] = {},
            name: str = "roster.csv", encoding: str = "") -> tuple[list[tuple[int, Any]], str]:
    """The rows, be they good or bad, and what is said of the file."""
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with contextlib.redirect_stderr(io.StringIO()) as notes:
        _, rows, faults = sis_sync.read_roster(str(path), mapping, encoding)
    return sorted([*rows, *faults], key=lambda row: row[0]), notes.getvalue()


ONEROSTER = ("sourcedId,status,givenName,familyName,email,identifier{}\n"
             "s1,active,Zoë,Ng,z@b,0012{}\ns2,tobedeleted,A,B,c@d,0013{}\ns3,,T,U,t@b,0014{}\n")


class TestRosterFiles:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_csv_is_read_as_it_is_found(self, tmp_path: pathlib.Path, encoding: str, delimiter: str) -> None:
        students = [{**FULL, "last_name": "Müller; Zoë", "first_name": 'The "x", y', "first_in_family": ""},
                    {**FULL, "student_id_ext": "00123", "first_in_family": "Yes"}]
        data = csv_of(students, delimiter=delimiter).encode(encoding)
        rows, notes = rows_in(tmp_path, data)
        assert [line for line, _ in rows] == [2, 3]
        assert rows[0][1] == {**{name: value or "" for name, value in students[0].items()}, "first_in_family": None}
        assert rows[1][1]["student_id_ext"] == "00123"
        assert ("Windows-1252" in notes) is (encoding == "cp1252")

    @pytest.mark.parametrize("text, value", [
        ("TRUE", True), ("Yes", True), ("1", True), ("y", True), (" t ", True), ("False", False), ("no", False),
        ("0", False), ("", None), (" ", None)])
    def test_a_boolean_is_known_in_its_usual_spellings(self, tmp_path: pathlib.Path, text: str, value: Any) -> None:
        rows, _ = rows_in(tmp_path, csv_of([{**FULL, "first_in_family": text}]))
        assert rows[0][1]["first_in_family"] == value

    def test_any_other_word_for_a_boolean_is_a_fault_that_names_those_allowed(self, tmp_path: pathlib.Path) -> None:
        rows, _ = rows_in(tmp_path, csv_of([{**FULL, "first_in_family": "maybe"}]))
        words = "first_in_family must be empty or one of true, yes, y, t, 1, false, no, n, f, 0"
        assert rows == [(2, f"invalid_field: {words}")]

    def test_headers_are_known_in_other_case_and_with_spaces(self, tmp_path: pathlib.Path) -> None:
        rows, notes = rows_in(tmp_path, "Student ID Ext, E-Mail ,FIRST_NAME,Other,Room \nU1,a@b,Zoë,x,y\n")
        assert rows == [(2, {"student_id_ext": "U1", "email": "a@b", "first_name": "Zoë"})]
        assert f"no column for {', '.join(name for name in sis_sync.NAMES if name not in rows[0][1])}" in notes
        assert "not used: 2 columns: 'Other', 'Room'" in notes

    def test_map_names_a_column(self, tmp_path: pathlib.Path) -> None:
        rows, _ = rows_in(tmp_path, "No,Mail\nU1,a@b\n", {"student_id_ext": "No", "email": "mail"})
        assert rows == [(2, {"student_id_ext": "U1", "email": "a@b"})]

    @pytest.mark.parametrize("data, line", [
        ("sep=;\nstudent_id_ext;email\nU1;a@b\n", 3), ("\n \nstudent_id_ext;email\nU1;a@b\n", 4),
        ("student_id_ext,email,,\n , \nU1,a@b,,\n", 3), ("student_id_ext,email\rU1,a@b\r", 2)])
    def test_what_surrounds_the_rows_is_seen_through(self, tmp_path: pathlib.Path, data: str, line: int) -> None:
        rows, _ = rows_in(tmp_path, data)
        assert rows == [(line, {"student_id_ext": "U1", "email": "a@b"})]

    def test_blank_lines_and_quoted_line_breaks_keep_the_line_numbers_right(self, tmp_path: pathlib.Path) -> None:
        rows, _ = rows_in(tmp_path, 'student_id_ext,email,first_name\r\n\r\nU1,a@b,"x\r\ny"\r\n,,\r\nU2,c@d,\r\n')
        assert [line for line, _ in rows] == [3, 6]

    def test_a_row_with_too_many_columns_is_a_fault(self, tmp_path: pathlib.Path) -> None:
        rows, _ = rows_in(tmp_path, "student_id_ext,email,first_name\nU2,a@b,c,d\nU3,a@b,c,,\n")
        assert [row for _, row in rows] == [
            "wrong_columns: more columns than the header has",
            {"student_id_ext": "U3", "email": "a@b", "first_name": "c"}]

    def test_a_short_row_is_padded_only_where_all_that_is_missing_is_optional(self, tmp_path: pathlib.Path) -> None:
        """Excel leaves the empty cells at the end of a row away."""
        rows, _ = rows_in(tmp_path, "first_name;student_id_ext;email;first_in_family;room\nx;U1;a@b\ny;U2;c@d;no\n"
                          "z;U3\nz\n")
        assert [row for _, row in rows] == [
            {"first_name": "x", "student_id_ext": "U1", "email": "a@b", "first_in_family": None},
            {"first_name": "y", "student_id_ext": "U2", "email": "c@d", "first_in_family": False},
            {"first_name": "z", "student_id_ext": "U3", "email": "", "first_in_family": None},
            {"first_name": "z", "student_id_ext": "", "email": "", "first_in_family": None}]
        result = run("push", tmp_path / "roster.csv", "--cohort", "1", "--dry-run")
        assert summary_of(result)["rejected"] == [(4, "missing_field", "email required"),
                                                  (5, "missing_field", "student_id_ext required")]

    @pytest.mark.parametrize("number", ["1.23457E+11", "1,23457E+11", "2E+15", "1.2e+07"])
    def test_an_id_that_excel_shortened_is_a_fault_that_says_so(self, tmp_path: pathlib.Path, number: str) -> None:
        rows, _ = rows_in(tmp_path, csv_of([{**FULL, "student_id_ext": number}]))
        [(line, fault)] = rows
        assert line == 2 and fault.startswith("scientific_notation: student_id_ext is")
        assert "format the column as text" in fault

    @pytest.mark.parametrize("data, words", [
        (b"", "is empty"), (b"\n \n", "is empty"), (b"a,b\n1,2\n", "its header has: a, b"),
        (b"email,email,student_id_ext\n", "must have one column 'email', and has 2"), ("student_id_ext,email\n".encode("utf-16"), "is UTF-16"),
        (b"PK\x03\x04junk", 'is an Excel workbook; save it as "CSV UTF-8"'),
        (b"\xd0\xcf\x11\xe0junk", 'is an Excel workbook; save it as "CSV UTF-8"'),
        (b"\x81\x8d\xff", "line 1 is not cp1252"),
        (b"student_id_ext,email\nU1,a\xe9\nU2,\x81\n", "line 3 is not cp1252"),
        (b'student_id_ext,email\n"' + b"x" * 140_000, "line 2: "), (b'{"students": 1}', "must be an array"),
        (b"[1, 2", "is not JSON")], ids=range(12))
    def test_a_file_that_can_t_be_understood_is_refused(self, tmp_path: pathlib.Path, data: bytes,
                                                        words: str) -> None:
        with pytest.raises(sis_sync.CommandError) as caught:
            rows_in(tmp_path, data)
        assert words in "\n".join(caught.value.args)
        assert all(str(tmp_path / "roster.csv") in line or "--map" in line for line in caught.value.args)

    def test_a_file_half_of_it_utf_8_is_refused_unless_its_encoding_is_said(self, tmp_path: pathlib.Path) -> None:
        data = ("student_id_ext,email,first_name\nU1,a@b,Ann\nU2,c@d,Zoë\n".encode()
                + "U3,e@f,Bob\nU4,g@h,Zoë\nU5,i@j,Zoë\n".encode("cp1252"))
        with pytest.raises(sis_sync.CommandError) as caught:
            rows_in(tmp_path, data)
        (line,) = caught.value.args
        assert line == (f"{tmp_path / 'roster.csv'}: line 5 is not UTF-8, but others are: mend it, or say which it is "
                        "with --encoding cp1252")
        rows, _ = rows_in(tmp_path, data, encoding="cp1252")
        assert [row["first_name"] for _, row in rows] == ["Ann", "ZoÃ«", "Bob", "Zoë", "Zoë"]
        with pytest.raises(sis_sync.CommandError, match="roster.csv: "):
            rows_in(tmp_path, data, encoding="utf-8-sig")

    # Where it opens, where it closes: a cell each, of the students 3 and 3, 6 or 900.
    @pytest.mark.parametrize("opens, closes", [
        ('"N3', "N900"), ('"N3', 'N900"'), ('"N3', '"N900"'), ('"N3"x', "N900"), ('"N"3"', "N900"), ('"', '"N900"')])
    @pytest.mark.parametrize("quoted", [False, True])
    def test_a_stray_quote_is_refused_with_its_line_and_nothing_is_sent(
            self, server: Process, tmp_path: pathlib.Path, opens: str, closes: str, quoted: bool) -> None:
        """1,500 students, of whom 1,499 once vanished into a cell."""
        names = ['"N{}"' if quoted else "N{}"] * 1500
        names[3], names[900] = opens, closes
        path = tmp_path / "roster.csv"
        path.write_text("student_id_ext,first_name,email\n" + "".join(
            f"U{number},{name.format(number)},u{number}@example.edu\n" for number, name in enumerate(names)))
        result = run("push", path, "--url", f"http://127.0.0.1:{server.port}", "--cohort", "stray")
        (line,) = result.stderr.decode().splitlines()
        assert (result.returncode, result.stdout) == (2, b"")
        assert line.startswith(f"sis_sync: {path}: line 5: ")
        assert line.endswith(": is there a quote too many, or one too few?")
        assert server.rows("SELECT * FROM rosters WHERE cohort_id = 'stray'") == []

    @pytest.mark.parametrize("cell, name", [('N"3', 'N"3'), ('N3"', 'N3"'), ('N"3"', 'N"3"'), ('"N""3"', 'N"3')])
    def test_a_quote_within_a_cell_swallows_nothing(self, tmp_path: pathlib.Path, cell: str, name: str) -> None:
        rows, _ = rows_in(tmp_path, "student_id_ext,first_name,email\n" + "".join(
            f"U{number},{cell if number == 3 else 'N'},u@example.edu\n" for number in range(1500)))
        assert [row["student_id_ext"] for _, row in rows] == [f"U{number}" for number in range(1500)]
        assert rows[3][1]["first_name"] == name

    def test_a_cell_may_have_a_few_lines_and_no_more(self, tmp_path: pathlib.Path) -> None:
        text = 'student_id_ext,email,address\nU1,a@b,"1 High Street{}"\nU2,c@d,x\n'
        rows, _ = rows_in(tmp_path, text.format("\r\nFlat 2\r\nHervey Bay"))
        assert [line for line, _ in rows] == [2, 5]
        with pytest.raises(sis_sync.CommandError, match="line 2: a cell of over 10 lines: is there a quote too many"):
            rows_in(tmp_path, text.format("\nx" * 25))

    @pytest.mark.parametrize("header", ["#", "№", "-"])
    def test_a_header_without_a_letter_can_be_mapped(self, tmp_path: pathlib.Path, header: str) -> None:
        rows, _ = rows_in(tmp_path, f"{header},,email\nU1,x,a@b\n", {"student_id_ext": header})
        assert rows == [(2, {"student_id_ext": "U1", "email": "a@b"})]
        with pytest.raises(sis_sync.CommandError, match="must have one column '!', and has 0"):
            rows_in(tmp_path, f"{header},,email\nU1,x,a@b\n", {"student_id_ext": header, "first_name": "!"})

    @pytest.mark.parametrize("document", [[student(1), "x"], {"cohort_id": "y", "students": [student(1), "x"]}])
    def test_json_is_an_array_or_a_request_body(self, tmp_path: pathlib.Path, document: Any) -> None:
        rows, _ = rows_in(tmp_path, "\ufeff \n" + json.dumps(document), name="roster.json")
        assert rows == [(1, student(1)), (2, "x")]

    def test_oneroster_1_1_is_known_and_only_its_students_are_taken(self, tmp_path: pathlib.Path) -> None:
        text = ONEROSTER.format(",role", ",student", ",student", ",teacher")
        rows, _ = rows_in(tmp_path, text)
        expected = {"student_id_ext": "s1", "email": "z@b", "first_name": "Zoë", "last_name": "Ng"}
        assert rows == [(2, expected)]
        rows, _ = rows_in(tmp_path, text, {"student_id_ext": "identifier"})
        assert rows == [(2, {**expected, "student_id_ext": "0012"})]

    def test_oneroster_1_2_takes_the_roles_from_roles_csv(self, tmp_path: pathlib.Path) -> None:
        text = ONEROSTER.format("", "", "", "")
        rows, notes = rows_in(tmp_path, text)
        assert [line for line, _ in rows] == [2, 4] and "put roles.csv beside it" in notes
        (tmp_path / "roles.csv").write_text("sourcedId,status,userSourcedId,roleType,role\n"
                                            "r1,active,s1,primary,student\nr2,active,s3,primary,teacher\n")
        rows, notes = rows_in(tmp_path, text)
        assert [line for line, _ in rows] == [2]
        (tmp_path / "roles.csv").write_bytes(b"userSourcedId,role\n\xff\x81,student\n")
        with pytest.raises(sis_sync.CommandError, match="roles.csv: "):
            rows_in(tmp_path, text)

    def test_who_is_left_out_of_oneroster_is_counted_and_named(self, tmp_path: pathlib.Path) -> None:
        text = ONEROSTER.format(",role", ",student", ",student", ",teacher") + "s4,active,U,V,u@v,15,Guardian\n"
        _, notes = rows_in(tmp_path, text)
        assert "left out: 1 rows that are to be deleted" in notes
        assert "left out: 2 rows that are no students" in notes
        assert "not used: " in notes and "'identifier'" in notes

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    @pytest.mark.parametrize("name", ["users.csv", "roles.csv"])
    def test_roles_csv_is_read_by_the_same_reader_as_users_csv(
            self, tmp_path: pathlib.Path, encoding: str, delimiter: str, name: str) -> None:
        """Also words in another case, and columns and rows that Excel added."""
        files = {"users.csv": ONEROSTER.format("", "", "", "").replace("tobedeleted", "ToBeDeleted"),
                 "roles.csv": "Sourced Id,Status,userSourcedId,Role,,\nr1,Active,s1,Student ,,\n,,,,,\n"
                 "r2,active,s2,student,,\nr3,TOBEDELETED,s3,student,,\nMüller,active,s9,teacher,,\n"}
        files[name] = files[name].replace("\n", "\r\n").replace(",", delimiter)
        for other, text in files.items():
            (tmp_path / other).write_bytes(text.encode(encoding if other == name else "utf-8"))
        rows, notes = rows_in(tmp_path, (tmp_path / "users.csv").read_bytes(), name="users.csv")
        assert [row["student_id_ext"] for _, row in rows] == ["s1"]
        assert {"left out: 1 rows that are to be deleted", "left out: 1 rows that are no students"} <= set(
            notes.splitlines())

    def test_a_stray_quote_in_roles_csv_is_refused_too(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "users.csv").write_text(ONEROSTER.format("", "", "", ""))
        roles = tmp_path / "roles.csv"
        roles.write_text('userSourcedId,role\ns1,student\ns3,"stud"ent\n')
        result = run_process("push", tmp_path / "users.csv", "--cohort", "1", "--dry-run")
        (line,) = result.stderr.decode().splitlines()
        assert (result.returncode, line.startswith(f"sis_sync: {roles}: line 3: ")) == (2, True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def summary_of(result: Result) -> dict[str, Any]:
    """What a push says in the end."""
    text = result.stdout.decode()
    counts = re.findall(r"\b(new|updated|unchanged) ([\d,]+)", text)
    rejected = re.findall(r"^  (?:line|item) (\d+): (\w+): (.*)$", text, re.MULTILINE)
    assert f"rejected {len(rejected):,}\n" in text and text.endswith(
        "To push the whole file again is safe, however often.\n")
    return {**{name: int(number.replace(",", "")) for name, number in counts},
            "rejected": [(int(line), code, message) for line, code, message in rejected]}


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
                         "00018\r\n00019;d@example.edu;\"a\nb\";0\r\n"
                         "00020;e@example.edu\r\n00020;f@example.edu;;\r\n".encode("cp1252"))
        result = self.push(server, path, cohort="messy")
        assert result.returncode == 1
        summary = summary_of(result)
        assert (summary["new"], summary["updated"], summary["unchanged"]) == (2, 0, 0)
        assert [row[:2] for row in summary["rejected"]] == [
            (4, "missing_field"), (5, "scientific_notation"), (6, "missing_field"),
            (7, "invalid_field"),
            (10, "duplicate_student")]
        text = self.push(server, path, cohort="messy").stdout.decode()
        assert "new 0, updated 2 (of these unchanged 2), rejected 5" in text
        assert "line 10: duplicate_student: the same student_id_ext stood higher up in the batch" in text
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
                [*COMMAND, "push", "-", "--url", f"http://127.0.0.1:{server.port}", "--cohort", "unseen", "--batch",
                 "2"],
                input=csv_of([student(number) for number in range(9)]).encode(), stderr=closed,
                stdout=subprocess.PIPE, env=ENVIRONMENT, timeout=20, check=False)
        assert result.returncode == 0
        assert b"new 9," in result.stdout

    def test_on_a_terminal_there_is_a_bar(self) -> None:
        stream = Terminal()
        push = sis_sync.Push(sis_sync.judge, "2026", [(1, {})] * 12_000, stream)
        push.done, push.started = 6000, time.monotonic() - 60
        push.show()
        assert stream.getvalue() == "\r\x1b[K[##########          ] 6,000 of 12,000 students, 100/s"

    def test_on_a_terminal_the_bar_is_a_line_of_its_own_whatever_follows(self, server: Process) -> None:
        stream = Terminal()
        push = sis_sync.Push(sis_sync.Client(f"http://127.0.0.1:{server.port}", "wrong").post, "2026",
                             [(2, student())], stream)
        push.show()
        with pytest.raises(sis_sync.CommandError, match="the server answered 401"):
            push.run(1)
        assert stream.getvalue().endswith("\n")

    def test_a_dry_run_judges_like_the_server_and_sends_nothing(self, tmp_path: pathlib.Path) -> None:
        values: tuple[Any, ...] = (
            None, "", " \u2003", "a@b", "O'Brien", "x" * 254, "x" * 255, "x" * 256, "a@b@c", "a b", 1, 1.5, True, False,
            [], {}, "a@\0b", "a@\nb", "a@\ud800b", "Zoë", "=1+1")
        students: list[Any] = [{**student(f"{number} of {field.name}"), field.name: value}
                               for field in sis_sync.FIELDS for number, value in enumerate(values)]
        students += [None, "x", student(1, firstName="x"), student(1)]
        path = tmp_path / "roster.json"
        path.write_text(json.dumps(students))
        result = run("push", path, "--cohort", "1", "--dry-run")
        assert result.returncode == 1
        service = sis_sync.Service(configuration_of(tmp_path, ini_of()))
        answer = handle(service, batch(*students)).document
        service.roster.close()
        assert len(answer["errors"]) > 5 * len(sis_sync.FIELDS)
        assert summary_of(result)["rejected"] == [
            (error["row"], error["error"], error["message"]) for error in answer["errors"]]
        text = result.stdout.decode()
        assert f"{len(students)} of {len(students)} students checked\n" in text
        assert f"ignored, as they are no fields: {', '.join(answer['ignored'])}\n" in text

    def test_a_dry_run_refuses_a_cohort_that_none_can_be_called(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "roster.csv").write_text(csv_of([FULL]))
        result = run("push", tmp_path / "roster.csv", "--cohort", "x" * 65, "--dry-run")
        assert (result.returncode, b"cohort_id must be at most 64 characters" in result.stderr) == (2, True)

    @pytest.mark.parametrize("name, data, words", [
        ("roster.csv", "student_id_ext,email\n\n,\n", ()), ("roster.json", "[]", ()),
        ("roster.json", '{"cohort_id": "x", "students": []}', ()),
        ("users.csv", ONEROSTER.format(",role", ",teacher", ",student", ",aide"), (
            "left out: 1 rows that are to be deleted", "left out: 2 rows that are no students"))], ids=range(4))
    def test_no_students_at_all_is_1_with_a_warning_and_nothing_is_sent(
            self, server: Process, tmp_path: pathlib.Path, name: str, data: str, words: Sequence[str]) -> None:
        (tmp_path / name).write_text(data)
        result = self.push(server, tmp_path / name, cohort="nobody")
        assert (result.returncode, result.stdout) == (1, b"")
        lines = result.stderr.decode().splitlines()
        assert lines[-1] == f"{tmp_path / name}: no students, so nothing is sent"
        assert set(words) <= set(lines)
        assert server.rows("SELECT * FROM rosters WHERE cohort_id = 'nobody'") == []

    def test_what_the_server_ignored_is_printed(self, server: Process, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "roster.json"
        path.write_text(json.dumps([student(1, firstName="Al"), student(2, lastName="\x1b[31m", firstName=1)]))
        result = self.push(server, path, "--batch", "1", cohort="ignored")
        assert result.returncode == 0
        assert "\n  ignored, as they are no fields: firstName, lastName\n" in result.stdout.decode()

    @pytest.mark.parametrize("name", ["roster.json", "roster.JSON", "-"])
    def test_of_json_the_item_is_named_not_the_line(self, server: Process, tmp_path: pathlib.Path, name: str) -> None:
        text = json.dumps([student(1), {"student_id_ext": "U2"}], indent=4)
        if name != "-":
            (tmp_path / name).write_text(text)
        result = self.push(server, "-" if name == "-" else tmp_path / name, cohort="items", stdin=text)
        assert "\n  item 2: missing_field: email required\n" in result.stdout.decode()

    def test_12000_students_go_through_a_rate_limit(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits="requests_per_minute = 60")) as process:
            for _ in range(59):
                process.push()
            path = tmp_path / "roster.csv"
            path.write_text(csv_of([*map(student, range(12_000))]), "utf-8")
            result = self.push(process, path)
            assert result.returncode == 0, result.stderr
            assert b"new 12,000, updated 0" in result.stdout
            assert b"rate_limited: again in 1 s\n" in result.stderr
            assert process.rows("SELECT count(*) FROM entries") == [(12_000,)]

    def test_a_page_that_is_too_large_is_halved_and_its_lines_stay_right(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits=FAST + "max_students = 150")) as process:
            students = [student(number) for number in range(1000)]
            for number in (0, 499, 998):
                students[number]["email"] = ""
            result = self.push(process, "-", stdin=csv_of(students))
            summary = summary_of(result)
            assert summary["new"] == 997 and b"1,000 of 1,000 students sent" in result.stdout
            assert [row[0] for row in summary["rejected"]] == [2, 501, 1000]
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
            client.stdin.write(csv_of([*map(student, range(number))]))
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
            assert any("rate_limited" in line for line in client.stderr)
            process.ini.write_text(ini_of(institutions="[institution example]\nsecrets = env:NEXT\n"))
            process.process.send_signal(signal.SIGHUP)
            rest, text = client.stderr.read(), client.stdout.read()
            assert client.wait(60) == 2
            assert "stopped: the server answered 401 unauthorized: " in rest
            (stored,) = process.rows("SELECT count(*) FROM entries")[0]
            assert 600 <= stored < 2000 and f"new {stored:,}," in text

    @posix
    def test_ctrl_c_ends_with_the_summary_so_far(self, tmp_path: pathlib.Path) -> None:
        with running(tmp_path, ini_of(limits="requests_per_minute = 20")) as process, \
                self.pushing(process, 2000, "--batch", "10") as client:
            assert any("rate_limited" in line for line in client.stderr)
            client.send_signal(signal.SIGINT)
            output, rest = client.stdout.read(), client.stderr.read()
            assert client.wait(20) == 130
            assert "Traceback" not in rest
            assert "200 of 2,000 students sent\n  new 200," in output
            assert process.rows("SELECT count(*) FROM entries") == [(200,)]

    def test_a_refusal_of_the_whole_batch_names_its_lines(self, server: Process) -> None:
        result = self.push(server, "-", stdin=csv_of([student(1), {"student_id_ext": "U2"}]),
                           environment={"SIS_SYNC_SECRET": "sis_the-strict-ones-secret"})
        assert result.returncode == 2
        assert summary_of(result)["rejected"] == [(3, "missing_field", "email required")]
        assert b"stopped: the server answered 400 invalid_rows: " in result.stderr

    def test_what_can_t_work_is_one_clear_line_and_2(self, server: Process, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "roster.csv"
        path.write_text(csv_of([FULL]))
        url = f"http://127.0.0.1:{server.port}"
        for words, environment, line in (
                ((path, "--url", url), {"SIS_SYNC_SECRET": "wrong"}, "the server answered 401"),
                ((path, "--url", url), {"SIS_SYNC_SECRET": ""}, "env:SIS_SYNC_SECRET: missing or empty"),
                ((path, "--url", url, "--secret-file", tmp_path / "no"), {}, str(tmp_path / "no")),
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

    def test_a_name_that_does_not_resolve_is_not_tried_again(
            self, server: Process, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_such_name(*_: Any, **__: Any) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
        result = run("push", "-", "--url", "https://sync.exmaple.edu", "--cohort", "1", stdin=csv_of([FULL]))
        assert result.returncode == 2
        assert result.stderr.decode().splitlines() == [
            "sis_sync: stopped: sync.exmaple.edu is a name that does not resolve; is it spelt right?"]

    def test_https_to_a_plain_port_is_not_tried_again(self, server: Process) -> None:
        result = run("push", "-", "--url", f"https://localhost:{server.port}", "--cohort", "1", stdin=csv_of([FULL]))
        (line,) = result.stderr.decode().splitlines()
        assert result.returncode == 2
        assert line.startswith("sis_sync: stopped: localhost does not speak https at this port; does it speak http?")

    def test_http_to_a_port_of_tls_is_not_tried_again(self, tmp_path: pathlib.Path, certificate: pathlib.Path) -> None:
        with running(tmp_path, tls_ini(certificate)) as process:
            result = run("push", "-", "--url", f"http://localhost:{process.port}", "--cohort", "1",
                         stdin=csv_of([FULL]))
        (line,) = result.stderr.decode().splitlines()
        assert result.returncode == 2
        assert line.startswith("sis_sync: stopped: the server answered 400 malformed_request: ") and "https" in line

    def test_a_certificate_for_another_name_stops_at_once_and_says_so(
            self, tmp_path: pathlib.Path, certificate: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        look_up = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: look_up("127.0.0.1", *more, **named))
        with running(tmp_path, tls_ini(certificate)) as process:
            result = run("push", "-", "--url", f"https://sync.example.edu:{process.port}", "--cohort", "1", "--ca-file",
                         certificate, stdin=csv_of([FULL]))
        (line,) = result.stderr.decode().splitlines()
        assert result.returncode == 2
        assert line.startswith("sis_sync: stopped: sync.example.edu has a certificate that does not hold: ")
        assert "not valid for 'sync.example.edu'" in line and "--ca-file" not in line

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
            assert b"stopped: localhost has a certificate that does not hold: " in result.stderr
            assert b"; --ca-file names one to trust\n" in result.stderr
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

    def push(self, *answers: bytes) -> tuple[sis_sync.Push, list[float], list[bytes]]:
        """Raises CommandError, and AssertionError if not all the answers were fetched."""
        url, requests, thread = a_server_that_answers(answers)
        push = sis_sync.Push(sis_sync.Client(url, SECRET).post, "1", [(2, student())], io.StringIO())
        waits: list[float] = []
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "sleep", waits.append)
                push.run(10)
        finally:
            thread.join(20)
            assert len(requests) == len(answers)
        return push, waits, requests

    def test_429_and_503_are_waited_for_as_retry_after_says(self) -> None:
        push, waits, requests = self.push(
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\n\r\n{}",
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\n\r\n<html>", self.GOOD)
        assert waits == [7, 2]
        assert (push.counts, push.done, push.rejected) == ({"imported": 1, "updated": 0, "unchanged": 0}, 1, [])
        assert len(set(requests)) == 1      # the very same page each time

    def growing(self, waits: Sequence[float]) -> bool:
        return all(0.75 * 2 ** number <= seconds <= 1.25 * 2 ** number for number, seconds in enumerate(waits))

    def test_without_a_number_to_wait_the_waits_grow(self) -> None:
        push, waits, _ = self.push(
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n",
            b"HTTP/1.1 429 Too Many Requests\r\n\r\n", b"HTTP/1.1 408 Timeout\r\n\r\n",
            b"HTTP/1.1 503 No\r\nRetry-After: -1\r\n\r\n", self.GOOD)
        assert len(waits) == 4 and self.growing(waits)
        assert push.counts["imported"] == 1

    def test_other_faults_are_tried_again_with_growing_waits(self) -> None:
        faults = [b"", b"HTTP/1.1 500 Oops\r\n\r\n{}", b"nonsense\r\n\r\n", b"HTTP/1.1 502 Bad\r\n\r\n<html>",
                  b'HTTP/1.1 503 No\r\n\r\n{"error": "busy"}']
        push, waits, _ = self.push(*faults, self.GOOD)
        assert push.counts["imported"] == 1
        assert len(waits) == 5 and self.growing(waits)
        with pytest.raises(sis_sync.CommandError, match="stopped: the server answered 500"):
            self.push(*[b"HTTP/1.1 500 Oops\r\n\r\n{}"] * 6)

    def test_a_server_that_asks_to_wait_again_and_again_is_given_up(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(sis_sync, "MAX_REQUESTS", 4)
        with pytest.raises(sis_sync.CommandError, match="stopped: the server answered 503"):
            self.push(*[b"HTTP/1.1 503 No\r\nRetry-After: 1\r\n\r\n{}"] * 4)

    @pytest.mark.parametrize("code", ["not_implemented", "http_version_not_supported", "not_configured"])
    def test_an_answer_of_5xx_that_stays_the_same_is_not_asked_for_again(self, code: str) -> None:
        error = next(error for error in sis_sync.ERRORS if error.code == code)
        body = json.dumps({"error": code, "detail": error.meaning})
        with pytest.raises(sis_sync.CommandError) as caught:
            self.push(f"HTTP/1.1 {error.status} No\r\n\r\n{body}".encode())
        assert caught.value.args == (f"stopped: the server answered {error.status} {code}: {error.meaning}",)

    def test_a_redirect_is_not_followed_and_its_target_is_named(self) -> None:
        with pytest.raises(sis_sync.CommandError) as caught:
            self.push(b"HTTP/1.1 301 Moved\r\nLocation: https://sync.example.edu/api/sis/sync\r\n\r\n<html>")
        (line,) = caught.value.args
        assert line == ("stopped: the server answered 301 redirect: it points to https://sync.example.edu/api/sis/sync: "
                        "push there")

    @pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad\r\n\r\n{}", b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n",
                                        b"HTTP/1.1 404 No\r\n\r\n<html>", b"HTTP/1.1 413 Large\r\n\r\n{}",
                                        b"HTTP/1.1 200 OK\r\n\r\n<html>", b'HTTP/1.1 200 OK\r\n\r\n{"details": 1}',
                                        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
                                        GOOD.replace(b"[]", b'[{"row": 2}]'), GOOD.replace(b"[]", b'["x"]'),
                                        GOOD.replace(b'"imported": 1, "updated"', b'"imported": "x", "updated"'),
                                        b'HTTP/1.1 400 Bad\r\n\r\n{"errors": null}',
                                        b'HTTP/1.1 422 Bad\r\n\r\n{"errors": {"email": ["x"]}}'], ids=range(12))
    def test_what_no_repetition_mends_stops_at_once(self, answer: bytes) -> None:
        with pytest.raises(sis_sync.CommandError, match="stopped: "):
            self.push(answer)


def narrow_view(database: pathlib.Path, name: str, condition: str) -> None:
    """Change a view so that it shows only some of its rows."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'view' AND name = ?",
                                    (name,)).fetchone()
        connection.executescript(f"DROP VIEW {name}; {sql} WHERE {condition};")


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
        header, full, odd, end = result.stdout.decode().split("\r\n")
        assert (header, end) == (",".join(sis_sync.NAMES), "")
        assert full == ",".join("" if value is None else "false" if value is False else value for value in FULL.values())
        assert re.fullmatch(r'U=1,u=1@example\.edu,=1\+1,-x,,"a,""b""",+', odd)

    def test_for_a_spreadsheet_it_has_a_bom_and_no_formula(self, filled: pathlib.Path) -> None:
        result = run("--config", filled, "export", "--institution", "a", "--cohort", "2026", "--excel")
        assert result.stdout.startswith(b"\xef\xbb\xbfstudent_id_ext,")
        assert b",'=1+1,'-x," in result.stdout

    @pytest.mark.parametrize("name", ["sis_sync.db", "there.csv", os.devnull])
    def test_no_file_is_overwritten(self, filled: pathlib.Path, name: str) -> None:
        filled.with_name("there.csv").write_text("precious")
        path = filled.parent / name
        before = path.read_bytes(), path.stat().st_mode
        result = run("--config", filled, "export", "--institution", "b", "--output", path)
        assert (result.returncode, result.stderr.decode()) == (2, f"sis_sync: {path}: File exists\n")
        assert (path.read_bytes(), path.stat().st_mode) == before

    def test_it_reads_the_public_view(self, filled: pathlib.Path) -> None:
        narrow_view(filled.with_name("sis_sync.db"), "roster", "student_id_ext LIKE 'U=%'")
        result = run("--config", filled, "export", "--institution", "a", "--cohort", "2026")
        assert [line.partition(b",")[0] for line in result.stdout.splitlines()] == [b"student_id_ext", b"U=1"]

    def test_several_rosters_are_named_and_none_is_guessed(self, filled: pathlib.Path) -> None:
        result = run("--config", filled, "export")
        assert (result.returncode, result.stdout) == (2, b"")
        assert "--institution a --cohort 2026\n" in result.stderr.decode()
        assert run("--config", filled, "export", "--institution", "b").returncode == 0
        result = run("--config", filled, "export", "--cohort", "x")
        assert b"choose a roster:\nsis_sync:   --institution a --cohort 2026" in result.stderr

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
        assert path.read_text().splitlines()[1].rstrip(",") == "U5,u5@example.edu"
        result = run("--config", filled, "export", "--institution", "b", "--output", tmp_path / "no" / "x")
        assert (result.returncode, b"No such file" in result.stderr) == (2, True)

    @pytest.mark.parametrize("words", [("export",), ("export", "--institution", "a"), ("export", "--cohort", "x")])
    def test_of_nothing_it_says_that_nothing_has_been_pushed_yet(self, tmp_path: pathlib.Path,
                                                                 words: Sequence[str]) -> None:
        (tmp_path / "test.ini").write_text("[server]\ndatabase = new.db\n")
        sis_sync.Roster(str(tmp_path / "new.db")).close()
        result = run("--config", tmp_path / "test.ini", *words)
        assert (result.returncode, result.stdout, result.stderr) == (2, b"", b"sis_sync: nothing has been pushed yet\n")

    @pytest.mark.parametrize("fault, words", [
        ("no database", "file is not a database"), ("newer", "newer than"), ("other", "a database of another program"),
        ("folder", "open database"), ("not ours", "open database")])
    def test_a_database_that_can_t_be_read_is_named_and_why(self, tmp_path: pathlib.Path, fault: str,
                                                            words: str) -> None:
        (tmp_path / "test.ini").write_text("[server]\ndatabase = odd.db\n")
        path = tmp_path / "odd.db"
        if fault == "folder":
            path.mkdir()
        elif fault == "no database":
            path.write_text("precious " * 1000)
        else:
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute("CREATE TABLE other (x)")
                connection.execute(f"PRAGMA user_version = {99 if fault == 'newer' else 0}")
        if fault == "not ours":
            path.chmod(0)
            if os.access(path, os.R_OK):
                pytest.skip("needs a user that a file can be closed to")
        for command in (("export",), ("history",), ("history", "--stale", "1"), ("backup", tmp_path / "copy.db")):
            result = run("--config", tmp_path / "test.ini", *command)
            (line,) = result.stderr.decode().splitlines()
            assert (result.returncode, result.stdout) == (2, b"")
            assert line.startswith(f"sis_sync: {path}: ") and words in line
        check = run("--config", tmp_path / "test.ini", "check")
        assert check.returncode == 1 and check.stdout.decode().startswith(f"{path}: ")
        assert not (tmp_path / "copy.db").exists()

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
                result = run("push", "-", "--cohort", cohort, "--url", f"http://127.0.0.1:{process.port}",
                             stdin=exported)
                assert b"new 0, updated 700 (of these unchanged 700), rejected 0\n" in result.stdout
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

    def test_it_is_an_aligned_table_the_latest_first_with_nothing_cut(self, ini: pathlib.Path) -> None:
        lines = run("--config", ini, "history").stdout.decode().splitlines()
        header, latest, first = (re.findall(r"\S+", line) for line in lines)
        assert header == ["time", "institution", "cohort_id", "client", "received", "new", "updated", "unchanged",
                          "rejected", "milliseconds"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", latest[0])
        assert latest[1:9] == ["a-very-long-name-of-an-institution", "2026", "192.0.2.1", "122", "1", "0", "0", "121"]
        assert first[1:9] == ["a-very-long-name-of-an-institution", "0e0f4a52-6d1f-4f8e-9a77-0d5d3b1c2a10",
                              "2001:db8:1234:5678:9abc:def0:1234:5678", "2", "2", "0", "0", "0"]
        starts = [[match.start() for match in re.finditer(r"\S+", line)] for line in lines]
        assert starts[0] == starts[1] == starts[2]

    def test_the_latest_is_the_last_to_arrive_whatever_the_clock_said(self, ini: pathlib.Path) -> None:
        with contextlib.closing(sqlite3.connect(ini.with_name("sis_sync.db"))) as connection:
            connection.execute("UPDATE syncs SET time = 2208988800 WHERE received = 2")       # in 2040
            connection.commit()
        lines = run("--config", ini, "history").stdout.decode().splitlines()
        assert lines[2].startswith("2040-01-01T00:00:00Z ")
        syncs = json.loads(run("--config", ini, "history", "--json").stdout)
        assert [sync["received"] for sync in syncs] == [122, 2]

    def test_it_reads_the_public_view(self, ini: pathlib.Path) -> None:
        narrow_view(ini.with_name("sis_sync.db"), "history", "rejected = 0")
        assert [sync["received"] for sync in json.loads(run("--config", ini, "history", "--json").stdout)] == [2]

    def test_errors_lists_the_rejected_rows(self, ini: pathlib.Path) -> None:
        lines = run("--config", ini, "history", "--errors").stdout.decode().splitlines()
        assert lines[2:4] == ["    row 2: missing_field: student_id_ext required",
                              "    row 3: not_an_object: a student must be an object"]
        assert len(lines) == 103        # of a sync the first 100 are kept; and there is another

    def test_json(self, ini: pathlib.Path) -> None:
        syncs = json.loads(run("--config", ini, "history", "--json").stdout)
        assert [(sync["received"], sync["new"], len(sync["errors"])) for sync in syncs] == [(122, 1, 100), (2, 2, 0)]
        assert list(syncs[0]) == ["time", "institution", "cohort_id", "client", "received", "new", "updated",
                                  "unchanged", "rejected", "milliseconds", "errors"]
        assert syncs[0]["errors"][0] == {"row": 2, "field": "student_id_ext", "error": "missing_field",
                                         "message": "student_id_ext required"}

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

    @pytest.mark.parametrize("hours", ["nan", "inf", "-1", "1e3", "", "99999999"])
    def test_stale_takes_a_number_of_hours(self, capsys: Any, hours: str) -> None:
        with pytest.raises(SystemExit) as caught:
            sis_sync.argument_parser().parse_args(["history", f"--stale={hours}"])
        assert (caught.value.code, "must be a number of hours" in capsys.readouterr().err) == (2, True)

    @pytest.mark.parametrize("first, last, status", [
        (0, 0, 0), (0, -7200, 1), (10**9, 0, 0), (10**9, -7200, 1), (-7200, 0, 0), (0, 7200, 1)])
    def test_stale_goes_by_the_last_to_arrive_and_a_clock_once_wrong_does_not_blind_it(
            self, ini: pathlib.Path, first: int, last: int, status: int) -> None:
        """Seconds from now that the two syncs say they were at."""
        ini.write_text(ini.read_text().replace("[institution other]\nsecrets = env:NO\n", ""))
        with contextlib.closing(sqlite3.connect(ini.with_name("sis_sync.db"))) as connection:
            for received, seconds in ((2, first), (122, last)):
                connection.execute("UPDATE syncs SET time = time + ? WHERE received = ?", (seconds, received))
            connection.commit()
        result = run("--config", ini, "history", "--stale", "1")
        assert (result.returncode, result.stdout.count(b"a-very-long-name-of-an-institution: last sync 2")) == (
            status, status)


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

    @pytest.mark.parametrize("table", ["entries", "syncs", "rosters"])
    def test_of_a_damaged_database_it_is_1_and_says_so(self, tmp_path: pathlib.Path, table: str) -> None:
        (tmp_path / "sis_sync.ini").write_text(ini_of())
        service = sis_sync.Service(configuration_of(tmp_path, ini_of()))
        handle(service, batch(*map(student, range(500))))
        service.roster.close()
        database, copy = tmp_path / "sis_sync.db", tmp_path / "copy.db"
        words = ("--config", tmp_path / "sis_sync.ini")
        assert run(*words, "check").returncode == 0
        with contextlib.closing(sqlite3.connect(database)) as connection:
            (size,) = connection.execute("PRAGMA page_size").fetchone()
            (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        data = bytearray(database.read_bytes())
        data[(page - 1) * size:page * size] = b"\xa5" * size
        database.write_bytes(data)
        result = run(*words, "backup", copy)
        lines = result.stderr.decode().splitlines()
        assert (result.returncode, result.stdout) == (1, b"")
        assert len(lines) > 1 and all(line.startswith(f"{copy}: ") for line in lines)
        assert lines[-1] == f"{copy}: a copy of a damaged database"
        check = run(*words, "check")
        assert check.returncode == 1 and str(database) in check.stdout.decode()

    def test_what_fails_leaves_no_half_a_copy(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "sis_sync.ini").write_text(ini_of())
        (tmp_path / "sis_sync.db").write_bytes(b"SQLite format 3\0" + b"x" * 8176)
        result = run("--config", tmp_path / "sis_sync.ini", "backup", tmp_path / "copy.db")
        assert (result.returncode, b"Traceback" in result.stderr) == (2, False)
        assert not (tmp_path / "copy.db").exists()


class TestModel:
    """Whatever is pushed, in any order, the database holds what plain dicts would."""

    @pytest.fixture(autouse=True)
    def start(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.folder, self.clock = tmp_path, 1_767_225_600
        self.secrets = {"a": SECRET, "b": OTHER_SECRET}
        self.environment = {name.upper(): secret for name, secret in self.secrets.items()}
        monkeypatch.setattr(time, "time", lambda: float(self.clock))
        # (institution, cohort) to id to a student with its times; and a line for each sync.
        self.rosters: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        self.syncs: list[tuple[Any, ...]] = []
        self.open()
        yield
        self.service.roster.close()

    def open(self) -> None:
        self.service = sis_sync.Service(configuration_of(
            self.folder, ini_of(institutions="[institution a]\nsecrets = env:A\n[institution b]\nsecrets = env:B\n"),
            self.environment))

    def push(self, institution: str, cohort: str, students: Sequence[Mapping[str, Any]]) -> None:
        """To the server and to the dicts: their counts are equal."""
        roster = self.rosters.setdefault((institution, cohort), {})
        counts = dict.fromkeys(("received", "new", "updated", "unchanged", "rejected"), 0)
        ids: set[str] = set()
        for sent in students:
            counts["received"] += 1
            values = {name: value.strip() or None if isinstance(value := sent.get(name), str) else value
                      for name in sis_sync.NAMES}
            key = str(values["student_id_ext"] or "")
            good = key and key not in ids and values["email"]
            ids.add(key)
            known = roster.get(key)
            if not good:
                counts["rejected"] += 1
            elif known is None:
                counts["new"] += 1
                roster[key] = {**values, "created": self.clock, "changed": self.clock, "seen": self.clock}
            else:
                same = values.items() <= known.items()
                counts["updated"] += 1
                counts["unchanged"] += same
                known.update(values, changed=known["changed"] if same else self.clock, seen=self.clock)
        self.syncs.append((self.clock, institution, cohort, *counts.values()))
        answer = handle(self.service, batch(*students, cohort_id=cohort),
                        authorization=f"Bearer {self.secrets[institution]}").document
        told = answer["details"]
        assert list(counts.values()) == [answer["received"], told["imported"], told["updated"], told["unchanged"],
                                         len(answer["errors"])]
        assert answer["imported"] == counts["new"] + counts["updated"]

    def compare(self) -> None:
        """Contents, times and counts, as the two public views show them."""
        def utc(seconds: int) -> str:
            return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

        entries = [(*roster, *(student[name] for name in sis_sync.NAMES),
                    *(utc(student[name]) for name in ("created", "changed", "seen")))
                   for roster, students in self.rosters.items() for student in students.values()]
        with contextlib.closing(sqlite3.connect(self.folder / "sis_sync.db")) as connection:
            stored = connection.execute(f"SELECT institution, cohort_id, {', '.join(sis_sync.NAMES)}, created, "
                                        "changed, seen FROM roster").fetchall()
            assert sorted(stored, key=str) == sorted(
                (tuple(int(value) if isinstance(value, bool) else value for value in entry) for entry in entries),
                key=str)
            assert connection.execute(
                "SELECT time, institution, cohort_id, received, new, updated, unchanged, rejected FROM history "
                "ORDER BY sync_id").fetchall() == [(utc(sync[0]), *sync[1:]) for sync in self.syncs]

    def export(self, institution: str, cohort: str) -> list[Any]:
        """What push reads in what export wrote."""
        path = self.folder / f"{len(self.syncs)}.csv"
        result = run("--config", self.folder / "test.ini", "export", "--institution", institution, "--cohort", cohort,
                     "--output", path, environment=self.environment)
        assert result.returncode == 0, result.stderr
        return [row for _, row in sis_sync.read_roster(str(path), {})[1]]

    @pytest.mark.parametrize("seed", range(3))
    def test_random_operations_leave_what_plain_dicts_hold(self, seed: int) -> None:
        pick = random.Random(seed)
        sent: list[tuple[str, str, list[dict[str, Any]]]] = []

        def a_student() -> dict[str, Any]:
            optional = {field.name: pick.choice((None, True, False) if field.kind is bool else
                                                (None, "", " Zoë\t", "O'Brien", "王"))
                        for field in sis_sync.FIELDS if not field.required and pick.random() < 0.5}
            return {"student_id_ext": pick.choice((f"U{pick.randrange(60)}", f" {pick.randrange(60):03} ", "")),
                    "email": pick.choice(("a@b", "a@b", "a@b", "c@d", None)), **optional}

        for _ in range(60):
            self.clock += pick.choice((0, 1, 86_400, 500 * 86_400, -86_400))
            operation = pick.choice(("push", "push", "push", "again", "restart", "export", "copy"))
            if operation == "push":
                sent.append((pick.choice("ab"), pick.choice(("2026", "2027", "Zoë")),
                             [a_student() for _ in range(pick.choice((0, 1, 3, 20, 300)))]))
                self.push(*sent[-1])
            elif operation == "restart":
                self.service.roster.close()
                self.open()
            elif operation == "again" and sent:
                self.push(*pick.choice(sent))
            elif operation in ("export", "copy") and self.rosters:
                institution, cohort = pick.choice(list(self.rosters))
                students = self.export(institution, cohort)
                pick.shuffle(students)
                if operation == "export":
                    self.push(institution, cohort, students)
                    assert self.syncs[-1][4:] == (0, len(students), len(students), 0)
                else:
                    self.push(pick.choice("ab"), "2028", students)
            self.compare()


# ---------------------------------------------------------------------------------------------
# All sections: what nobody thought of, and other servers with our application behind them
# ---------------------------------------------------------------------------------------------

def zipped(pick: random.Random, body: bytes) -> bytes:
    """gzip with a name in its header, further members or zeros after it, now and then."""
    data = gzip.compress(body, 1)
    if pick.random() < 0.3:
        data = data[:3] + b"\x08" + data[4:10] + b"n" * pick.choice((0, 1, 70_000)) + b"\0" + data[10:]
    return data + pick.choice((b"", b"", b"", gzip.compress(b""), data, b"\0" * 20))


def dressed(pick: random.Random, body: bytes) -> bytes:
    """A request around a body: plain or gzip, whole or in chunks of any size."""
    headers = {}
    if pick.random() < 0.4:
        body, headers = zipped(pick, body), {"Content_Encoding": "gzip"}
    if pick.random() < 0.5:
        return request_of(body, **headers)
    parts, extension = pick.choice((1, 1, 2, 20)), pick.choice((b"", b";a", b';a="b c"', b" ; " + b"a" * 300))
    return head_of(Transfer_Encoding="chunked", **headers) + chunked(
        body, len(body) // parts + 1 if len(body) > 2000 else pick.randrange(1, 40), extension, b"T: 1\r\n")


BODIES = [
    *(json.dumps(value).encode() for value in (
        batch(student(1, first_name="Zoë"), {}, None), batch(student(2)), batch(), {}, [{"a": [2.5e3, "\ud83d", True]}],
        batch({"studentIdExt": "1", "e-mail": ["a"]}, student(3, last_name=" \u3000x\0")))),
    b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'{"":' * 900, b"[" * 5000 + b"]" * 5000,
    *(b'{"cohort_id": "1", "students": [' + tree * 1000 + b"{}]}" for tree in (b"[[[[]]]],", b'{"":{}},'))]
HEADS = [
    head_of("GET", "/healthz"), head_of("HEAD", "/openapi.json"), request_of(batch(), secret="wrong"),
    b"GET http://example.edu/healthz?x=y HTTP/1.0\r\n\r\n", request_of(batch(student(3)), Expect="100-continue"),
    head_of(Content_Length=9 << 20)]
PARTICLES = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"-1", b"99999999999999999999", b"\xff", b"\x85",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n", b"HTTP/1.1", b"chunked", b"gzip", b'"',
    b"[", b"{", b"]", b"}", b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b"NaN", b"1e999", b"null", b"Bearer ", b"A" * 300,
    b"[" * 2000, b'{"a":' * 400, b"[[[[]]]]," * 100, b"\x1f\x8b\x08", b"\x1f\x8b\x08\x1c\0\0\0\0\0\xff", b"\r\n\r\n",
    b"1\r\n", b"0\r\n\r\n", b"fffffffff\r\n", b'1;a="\r\n', b"5 \r\n"]


def mutated(pick: random.Random) -> bytes:
    """A request with up to four accidents, anywhere in it."""
    data = bytearray(pick.choice(HEADS) if pick.random() < 0.3 else dressed(pick, pick.choice(BODIES)))
    for _ in range(pick.randrange(5)):
        at, to = sorted((pick.randrange(len(data) + 1), pick.randrange(len(data) + 1)))
        if len(data) > 2000 and pick.random() < 0.5:    # else hardly one would be in the head
            at, to = at % 300, to % 300 + 300
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
            data[at:to] = dressed(pick, pick.choice(BODIES))[at:to]
        else:
            del data[to:]
    return bytes(data)


def pieces_of(pick: random.Random, data: bytes) -> list[bytes]:
    """As it may come: mostly whole, or in pieces of any size, or byte by byte."""
    most = pick.choice((0, 0, 0, 0, 0, 0, 1, 10, 1000, 1000))
    if not most or len(data) > 1000 * most:
        return [data]
    pieces = []
    while data:
        size = pick.randint(1, most)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def fuzz_once(process: Process, pick: random.Random) -> int:
    """One mutated request: whatever it is, it gets an answer as promised, or it said nothing at all."""
    data = mutated(pick)
    # From many addresses, as one has too few ports for a thousand connections a second.
    source = f"127.0.0.{pick.randrange(1, 255)}" if sys.platform == "linux" else "127.0.0.1"
    with process.connect(source) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            for piece in pieces_of(pick, data):
                connection.sendall(piece)
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


def test_a_text_of_many_words_takes_memory_in_line_with_its_bytes() -> None:
    text = "a " * 200_000 + "a"
    peak = peak_during(lambda: sis_sync.check_rows([student(1, first_name=text)], sis_sync.ANYONE))
    assert peak < 10 * len(text)


def test_numbers_of_one_hash_take_work_in_line_with_their_number() -> None:
    compared = []

    class Number(int):
        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return self is other

        def __hash__(self) -> int:      # as that of multiples of 2**61 - 1
            return 0

    students = [student(number, last_name=Number(number)) for number in range(1000)]
    records, errors = sis_sync.check_rows(students, sis_sync.ANYONE)
    assert not records and len(errors) == 1000
    assert len(compared) < 20_000


def test_a_body_of_line_ends_is_refused_in_no_more_time_than_any_other(tmp_path: pathlib.Path) -> None:
    with running(tmp_path, ini_of()) as process:
        answer = process.exchange(request_of(b"{}" + b"\n" * 8_000_000 + b"x"))
        assert (answer.status, answer.code) == (400, "malformed_json")


def settled(process: Process, threads: int) -> bool:
    """Whether all connections have ended, once the server has had the time to notice."""
    deadline = time.monotonic() + 20
    while threads_of(process) > threads and time.monotonic() < deadline:
        process.exchange(head_of("GET", "/healthz"))
    return threads_of(process) <= threads


@linux
@cpython
def test_thousands_of_mutated_requests_do_no_harm(tmp_path: pathlib.Path) -> None:
    with running(tmp_path, ini_of(limits=FAST + "request_timeout = 5")) as process:
        pick = random.Random(2026)
        process.push(student(1))
        threads, memory = threads_of(process), memory_of(process)
        statuses = [fuzz_once(process, pick) for _ in range(2000)]
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

def readme_part(start: str) -> str:
    """The README from a heading, or from the bold words of a recipe, to the next one."""
    text = TestReadme.TEXT
    if start not in text:
        pytest.skip("no README")
    part = text[text.index(start):]
    end = re.compile("^#{2,3} |^\\*\\*" if start.startswith("**") else f"^#{{1,{start.index(' ')}}} ", re.MULTILINE)
    match = end.search(part, len(start))
    return part[:match.start() if match else len(part)]


def readme_blocks(start: str, language: str) -> list[str]:
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", readme_part(start), re.MULTILINE | re.DOTALL)
    assert blocks
    return [textwrap.dedent(text) for _, text in blocks]


def commands_of(block: str) -> list[tuple[str, str]]:
    """The commands of a transcript, each with what it printed."""
    found = []
    for piece in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = piece.splitlines(keepends=True)
        for number in range(1, len(lines) + 1):
            command = "".join(lines[:number])
            with contextlib.suppress(ValueError):       # a quotation that is still open
                if shlex.split(command) and not command.endswith("\\\n"):
                    break
        found.append((command, "".join(lines[number:])))
    return found


def alike(text: str) -> str:
    """A transcript without what is different each time."""
    for pattern, name in (
            (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"), (r"sis_[\w-]{43}", "SECRET"), ("[0-9a-f]{64}", "DIGEST"),
            (r"127\.0\.0\.1:\d+", "ADDRESS"), (r"/\S*sis_sync-\w+", "FOLDER"), (r"[\d,]+/s", "SPEED"),
            (r"\d+\.\d s", "SECONDS"), (r"wait \d s", "WAIT"), (r'"retry_after": \d', "WAIT"),
            (r"(?m)^(TIME .*) +\d+$", r"\1 MS"), (r"sis_sync \d+\.\d+\.\d+", "VERSION")):
        text = re.sub(pattern, name, text)
    return text


class TestReadme:
    TEXT = (HERE / "README.md").read_text("utf-8") if (HERE / "README.md").exists() else ""

    def test_it_lists_every_command(self) -> None:
        assert set(re.findall(r"^\| `([a-z]+)[ `]", readme_part("## The commands").partition("###")[0],
                              re.MULTILINE)) == set(sis_sync.COMMANDS)

    def test_every_command_line_in_it_is_understood(self) -> None:
        lines = re.findall(r"python3 sis_sync\.py ([a-z-][^`\n\[]*)", re.sub(r"\$\(.*?\)", "x", self.TEXT))
        assert len(lines) > 8
        for line in lines:
            words = shlex.split(line.partition(" 2>>")[0])
            assert sis_sync.argument_parser().parse_args(words).command, line

    def test_it_lists_every_error_with_its_status_and_what_it_carries(self) -> None:
        rows = {(int(status), code): words for status, code, words in re.findall(
            r"^\| (\d{3}) \| `(\w+)` \|(.*)", readme_part("## Errors"), re.MULTILINE)}
        assert set(rows) == {(error.status, error.code) for error in sis_sync.ERRORS}
        for error in sis_sync.ERRORS:
            for name in (*error.carries, *error.headers):
                assert f"`{name}`" in rows[error.status, error.code], (error.code, name)
        for code in sis_sync.ROW_ERRORS:
            assert f"`{code}`" in readme_part("## The endpoint")

    def test_it_lists_every_field(self) -> None:
        for field in (sis_sync.COHORT, *sis_sync.FIELDS):
            assert f"`{field.name}`" in readme_part("## The endpoint")

    def test_it_lists_the_columns_of_the_views(self, service: sis_sync.Service) -> None:
        with service.roster.transaction() as connection:
            for view, columns in re.findall(r"^\| `(\w+)` \| (.*) \|", readme_part("### Reading"), re.MULTILINE):
                told = columns.replace("the seven fields", ", ".join(sis_sync.NAMES)).split(", ")
                assert told == [row[1] for row in connection.execute(f"PRAGMA table_info({view})")]
                assert len(told) > 5

    def test_the_file_of_settings_to_which_it_points_has_words_on_each(self) -> None:
        lines = (HERE / "sis_sync.ini").read_text("utf-8").splitlines()
        for setting in SETTINGS:
            assert lines[lines.index(f"{setting.key} = {setting.default}".rstrip()) - 1].startswith("# "), setting.key

    def test_it_tells_the_size_of_the_module(self) -> None:
        server, tools = MODULE.read_text("utf-8").split("# The pushing side\n")
        told = re.search(r"The server is ([\d,]+) lines, the tools ([\d,]+)", self.TEXT)
        assert told
        for number, text in zip(told.groups(), (server, tools)):
            assert abs(int(number.replace(",", "")) - len(text.splitlines())) < 50, f"now {len(text.splitlines())}"

    @pytest.mark.parametrize("part", ["## Security", "## For readers", "### The way"])
    def test_whatever_it_names_is_in_the_module(self, part: str) -> None:
        text = readme_part(part).partition("### Exercises")[0]
        if part == "## Security":       # the right column of its table
            text = "".join(re.findall(r"^\|.*\|(.*)\|$", text, re.MULTILINE))
        names = re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", text)
        assert len(names) > 10
        for name in names:
            value: Any = sis_sync
            for word in name.split("."):
                assert hasattr(value, word), name
                value = getattr(value, word)

    def test_the_session_with_the_rules_goes_as_it_shows(self) -> None:
        [session] = readme_blocks("## The endpoint", "pycon")
        examples = doctest.DocTestParser().get_doctest(session, {}, "README.md", "README.md", 0)
        assert len(examples.examples) > 6
        assert doctest.DocTestRunner().run(examples).failed == 0

    @posix
    def test_the_demo_prints_what_it_shows(self) -> None:
        import pty  # Windows has none

        [block] = readme_blocks("## In a minute", "console")
        [(command, shown)] = commands_of(block)
        reader, terminal = pty.openpty()
        with subprocess.Popen([*COMMAND, *shlex.split(command)[2:], "--once"], stdout=terminal, stderr=terminal,
                              env=ENVIRONMENT) as process:
            os.close(terminal)
            printed = b""
            with contextlib.suppress(OSError):      # what Linux says at the end
                for piece in iter(lambda: os.read(reader, 65536), b""):
                    printed += piece
            os.close(reader)
        assert process.returncode == 0
        # What a terminal shows of a bar is its last state.
        lines = [line.rpartition("\x1b[K")[2] for line in printed.decode().split("\r\n")]
        expected, _, nothing = alike(shown).partition("...\n")
        assert not nothing and alike("\n".join(lines)).startswith(expected)

    @posix
    def test_the_five_steps_and_the_push_go_as_it_shows(self, tmp_path: pathlib.Path) -> None:
        if not shutil.which("curl"):
            pytest.skip("needs curl")
        folder = tmp_path.resolve()
        shutil.copy(MODULE, folder)
        ini = (HERE / "sis_sync.ini").read_text("utf-8")
        (folder / "roster.csv").write_bytes((
            "Student ID Ext;E-Mail;First Name;First in Family;Mobile\r\n"
            "U2025001;alex.connor@student.example.edu.au;Alex;yes;\r\nU2025002;zoe@student.example.edu.au;Zoë;no;\r\n"
            "1.2E+10;minh@student.example.edu.au;Minh;;\r\n").encode("cp1252"))
        environment = {**ENVIRONMENT, "SIS_SYNC_SECRET": "", "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""}
        url = secret = digest = ""
        server = None
        blocks = readme_blocks("## For real", "console") + readme_blocks("### Pushing", "console")
        try:
            for command, shown in itertools.chain.from_iterable(map(commands_of, blocks)):
                for old, new in (("python3", shlex.quote(sys.executable)), ("curl", "curl -sS"),
                                 ("http://127.0.0.1:8080", url), ("https://sync.example.edu", url)):
                    command = command.replace(old, new)
                if command.startswith("export "):
                    environment["SIS_SYNC_SECRET"] = secret
                    continue
                if "listens on" in shown:
                    server = subprocess.Popen([sys.executable, "sis_sync.py", "serve", "--port", "0"], cwd=folder,
                                              env=environment, stderr=subprocess.PIPE, text=True)
                    assert server.stderr
                    printed = "".join(server.stderr.readline() for _ in shown.splitlines())
                    url = re.findall(r"http://[\d.:]+", printed)[0]
                else:
                    printed = subprocess.run(command, shell=True, cwd=folder, env=environment, text=True, check=False,
                                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60).stdout
                assert alike(printed.replace(str(folder), "/srv/sis_sync")) == alike(shown)
                if not secret:                  # the first command; and now the second step
                    secret, digest = re.findall(r"^(?:sis_[\w-]{43}|sha256:\w+)$", printed, re.MULTILINE)
                    [step] = readme_blocks("## For real", "ini")
                    assert alike(step).endswith("]\nsecrets = sha256:DIGEST\n") and "[institution example]\n" in ini
                    assert ini.count("\nsecrets = env:SIS_SYNC_SECRET\n") == 1
                    (folder / "sis_sync.ini").write_text(ini.replace("env:SIS_SYNC_SECRET\n", digest + "\n"), "utf-8")
        finally:
            if server:
                server.terminate()
                server.communicate(timeout=20)


# What a reader writes for each exercise: what stands there, and what stands there afterwards.
SOLUTIONS = {
    1: [("\n)\nKEY = FIELDS[0]\n", """
    Field("date_of_birth", "date of birth, YYYY-MM-DD", pattern="[0-9]{4}-[0-9]{2}-[0-9]{2}"),
)
KEY = FIELDS[0]
""")],
    2: [('    ("institution", "secrets", ', """\
    ("limits", "history_syncs", "10000", whole_number(1, 1_000_000)),
    ("institution", "secrets", """),
        ("HISTORY_SYNCS = 10_000              # kept of each institution\n", ""),
        ("def sync(self, request: Request, batch: Batch) -> Counts:",
         "def sync(self, request: Request, batch: Batch, kept: int) -> Counts:"),
        ("request.institution, HISTORY_SYNCS)", "request.institution, kept)"),
        ("service.roster.sync(request, batch)", 'service.roster.sync(request, batch, limits["history_syncs"])')],
    3: [("\ndef health(service: Service, ", """
def version(service: Service, request: Request, configuration: Configuration) -> Document:
    return {"version": __version__}


def health(service: Service, """),
        ('    "/openapi.json": (', """\
    "/version": ("GET", version, "The version of the program"),
    "/openapi.json": (""")],
    4: [("\ndef command_backup(", '''
def command_rosters(arguments: Arguments) -> int:
    """List the rosters, with the number of their entries."""
    with read_only(configuration_for(arguments).settings["database"]) as connection:
        for row in connection.execute(
                "SELECT institution, cohort_id, (SELECT count(*) FROM entries WHERE "
                "entries.roster_id = rosters.roster_id) FROM rosters ORDER BY 1, 2"):
            print(*row)
    return 0


def command_backup('''),
        ('    "backup": (command_backup, ', """\
    "rosters": (command_rosters, ()),
    "backup": (command_backup, """)],
    5: [("\ndef make_tables(", """
def index_emails(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE INDEX entries_by_email ON entries (email)")


def make_tables("""),
        ("2: make_tables}", "2: make_tables, 3: index_emails}")],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: Any) -> list[dict[int, str]]:
    """What the exercises' own tests say of the module as it is, and as it is when all are solved."""
    tests = pathlib.Path(__file__).read_text("utf-8")
    if "\ndef test_exercise_" in tests:
        pytest.skip("somebody is at the exercises")
    # The tools, which stand in front of the first test.
    tools = re.split(r"^(?:@.*\n)*(?:def test_|class Test)", tests, maxsplit=1, flags=re.MULTILINE)[0]
    original = solved = MODULE.read_text("utf-8")
    for old, new in itertools.chain.from_iterable(SOLUTIONS.values()):
        assert solved.count(old) == 1, old
        solved = solved.replace(old, new)
    processes = []
    for module in (original, solved):
        folder = tmp_path_factory.mktemp("exercises")
        (folder / "sis_sync.py").write_text(module, "utf-8")
        (folder / "test_sis_sync.py").write_text(
            "\n\n".join([tools, *readme_blocks("### Exercises", "python")]), "utf-8")
        words = "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-k", "exercise_", "test_sis_sync.py"
        processes.append(subprocess.Popen([sys.executable, *words], cwd=folder, stdout=subprocess.PIPE, text=True,
                                          env={**os.environ, "PYTHONPATH": "", "PYTEST_ADDOPTS": ""}))
    outcome = re.compile(r"^(PASSED|FAILED|ERROR) test_sis_sync\.py::test_exercise_(\d)", re.MULTILINE)
    return [{int(number): word for word, number in outcome.findall(process.communicate(timeout=60)[0])}
            for process in processes]


class TestExercises:
    """What the README asks of readers can be done, and their tests tell whether it was."""

    @pytest.mark.parametrize("number", SOLUTIONS)
    def test_each_can_be_solved_and_is_not_solved_yet(self, outcomes: list[dict[int, str]], number: int) -> None:
        assert [outcome.get(number) for outcome in outcomes] == ["FAILED", "PASSED"]

    def test_there_are_as_many_as_there_are_solutions(self) -> None:
        assert len(readme_blocks("### Exercises", "python")) == len(SOLUTIONS) == 5


def tool(*names: str) -> str:
    """The path of an installed program."""
    for name in names:
        path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
        if path:
            return path
    pytest.skip(f"needs {names[0]}")


def accepted(*words: Any, **environment: str) -> str:
    """What a tool says that finds nothing wrong."""
    result = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            check=False, timeout=60, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout
    return result.stdout


@posix
class TestRecipes:
    """The blocks of the README's recipes, as the tools they are for see them; where those are installed."""

    @pytest.fixture
    def certificate(self, tmp_path: pathlib.Path) -> pathlib.Path:
        """The one that the README makes."""
        tool("openssl")
        [block] = readme_blocks("**With a certificate", "sh")
        subprocess.run(["sh", "-ec", block], cwd=tmp_path, check=True, capture_output=True)
        return tmp_path / "certificate.pem"

    def test_a_certificate_of_ones_own_making_will_do(self, certificate: pathlib.Path) -> None:
        configuration = configuration_of(
            certificate.parent, "[server]\ntls_certificate = certificate.pem\ntls_key = key.pem\n")
        context = configuration.tls
        assert context
        with contextlib.closing(socket.socket()) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            with socket.create_connection(listener.getsockname(), 20) as connection:
                answering = threading.Thread(target=lambda accepted: context.wrap_socket(accepted, True).recv(1),
                                             args=listener.accept()[:1])
                answering.start()
                # Which compares the name, too.
                with ssl.create_default_context(cafile=str(certificate)).wrap_socket(
                        connection, server_hostname="sync.example.edu") as secured:
                    secured.sendall(b"?")
                answering.join()

    def test_systemd_takes_the_units(self, tmp_path: pathlib.Path) -> None:
        systemd = tool("systemd-analyze")
        for start, name in (("**A service under systemd", "sis_sync.service"),
                            ("**Datasette**", "sis_sync_console.service")):
            [unit] = readme_blocks(start, "ini")
            unit, number = re.subn(r"ExecStart=/\S+", f"ExecStart={sys.executable}", unit)
            (tmp_path / name).write_text(unit)
            assert number == 1 and name not in accepted(systemd, "verify", tmp_path / name)

    def test_logrotate_takes_the_file(self, tmp_path: pathlib.Path) -> None:
        [block] = readme_blocks("**The log", "logrotate")
        (tmp_path / "sis_sync").write_text(block.replace("/var/log", str(tmp_path)))
        (tmp_path / "sis_sync").chmod(0o644)
        said = accepted(tool("logrotate"), "-d", "-s", tmp_path / "state", tmp_path / "sis_sync")
        assert "Handling 1 logs" in said and "error:" not in said

    def test_nginx_takes_the_block(self, tmp_path: pathlib.Path) -> None:
        [block] = readme_blocks("**Behind nginx", "nginx")
        paths = "".join(f"{name}_temp_path {tmp_path}/{name};\n" for name in (
            "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (tmp_path / "nginx.conf").write_text(
            f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}"
            f"server {{\nlisten 127.0.0.1:8080;\n{block}}}\n}}\n")
        assert "successful" in accepted(tool("nginx"), "-t", "-c", tmp_path / "nginx.conf", "-p", tmp_path)

    def test_caddy_takes_the_file(self, tmp_path: pathlib.Path) -> None:
        [block] = readme_blocks("**Behind Caddy", "caddyfile")
        (tmp_path / "Caddyfile").write_text(block)
        words = "--adapter", "caddyfile", "--config", tmp_path / "Caddyfile"
        home = {name: str(tmp_path) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
        assert "Valid configuration" in accepted(tool("caddy"), "validate", *words, **home)
        adapted = accepted(tool("caddy"), "adapt", *words, **home)
        assert '"127.0.0.1:8080"' in adapted and '"sync.example.edu"' in adapted and "not formatted" not in adapted

    def apache(self, folder: pathlib.Path, modules: str, block: str) -> None:
        program = tool("apache2", "httpd")
        found = [path for path in ("/usr/lib/apache2/modules", "/usr/lib64/httpd/modules", "/usr/libexec/apache2")
                 if os.path.isdir(path)]
        lines = []
        for name in ("mpm_event", "authn_core", "authz_core", "authz_user", "alias", "ssl", *modules.split()):
            file = pathlib.Path(*found[:1], f"mod_{name}.so")
            if not file.exists():
                pytest.skip(f"needs mod_{name}")
            lines.append(f"LoadModule {name}_module {file}\n")
        (folder / "apache.conf").write_text(
            "".join(lines) + f"ServerRoot {folder}\nServerName localhost\nPidFile {folder}/pid\nErrorLog {folder}/log\n"
            f"Listen 127.0.0.1:8443\n<VirtualHost *:8443>\nSSLEngine on\nSSLCertificateFile {folder}/certificate.pem\n"
            f"SSLCertificateKeyFile {folder}/key.pem\n{block}</VirtualHost>\n")
        assert "Syntax OK" in accepted(program, "-t", "-f", folder / "apache.conf")

    def test_apache_takes_the_lines_for_mod_wsgi(self, certificate: pathlib.Path) -> None:
        import grp
        import pwd

        [block] = readme_blocks("**Under Apache", "apache")
        user = next((user for user in pwd.getpwall() if user.pw_uid), pwd.getpwuid(os.getuid()))    # not root
        block = block.replace("/srv/sis_sync", str(certificate.parent)).replace(
            "user=sis_sync", f"user={user.pw_name}").replace(
            " group=sis_sync", f" group={grp.getgrgid(user.pw_gid).gr_name}")
        self.apache(certificate.parent, "wsgi", block)

    def test_apache_takes_the_lines_for_the_console(self, certificate: pathlib.Path) -> None:
        [block] = readme_blocks("**Apache**", "apache")
        folder = certificate.parent
        (folder / "console-passphrase").write_text("of the console\n")
        self.apache(folder, "proxy proxy_http headers auth_openidc",
                    block.replace("/etc/apache2", str(folder)).replace(
                        "/var/cache/apache2/mod_auth_openidc", str(folder)))

    def test_datasette_shows_the_views_and_nothing_else(self, tmp_path: pathlib.Path) -> None:
        program = tool("datasette")
        [metadata] = readme_blocks("**Datasette**", "json")
        (tmp_path / "metadata.json").write_text(metadata)
        [unit] = readme_blocks("**Datasette**", "ini")
        words = shlex.split(unit.partition("ExecStart=")[2].replace("\\\n", " ").partition("\n")[0])
        for place in ("/srv/sis_sync", "/srv/console", "/run/sis_sync_console"):
            words = [word.replace(place, str(tmp_path)) for word in words]

        def get(path: str) -> tuple[int, bytes]:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(tmp_path / "socket"))
                connection.sendall(f"GET /sis_sync{path} HTTP/1.0\r\n\r\n".encode())
                head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
            return int(head.split()[1]), body

        with running(tmp_path, ini_of()) as process:        # which has the database open
            process.push(student(1), {})
            with subprocess.Popen([program, *words[1:]], stderr=subprocess.PIPE, text=True) as datasette:
                try:
                    assert datasette.stderr and any("Uvicorn running" in line for line in datasette.stderr)
                    shown = json.loads(get(".json")[1])
                    assert sorted(view["name"] for view in shown["views"]) == ["history", "roster"]
                    assert shown["tables"] == []
                    process.push(student(2))
                    rows = json.loads(get("/roster.json?_shape=array")[1])
                    assert [row["student_id_ext"] for row in rows] == ["U1", "U2"]
                    rows = json.loads(get("/history.json?_shape=array")[1])
                    assert [(row["new"], row["rejected"]) for row in rows] == [(1, 0), (1, 1)]      # the latest first
                    for path in ("/entries.json", "/rosters.json", "/syncs.json", ".json?sql=select+1", ".db"):
                        assert get(path)[0] == 403, path
                finally:
                    datasette.terminate()

    def test_a_backup_is_restored_as_it_says(self, tmp_path: pathlib.Path) -> None:
        recipe = readme_part("**Backups")
        [removal] = re.findall(r"`(rm [^`]*)`", recipe)
        assert "stop the server first" in recipe
        with running(tmp_path, ini_of()) as process:
            process.push(student(1))
            assert run("--config", process.ini, "backup", tmp_path / "copy.db").returncode == 0
            process.push(student(2))
            process.stop(signal.SIGKILL)                    # so that its -wal is left
            subprocess.run(["sh", "-ec", removal], cwd=tmp_path, check=True)
            shutil.copyfile(tmp_path / "copy.db", process.database)
            process.start()
            assert process.push(student(3)).status == 200
            assert process.rows("SELECT student_id_ext FROM roster ORDER BY 1") == [("U1",), ("U3",)]


# ---------------------------------------------------------------------------------------------
# Section 8, by hand: speed (make bench), cost, and what only many trials show
# ---------------------------------------------------------------------------------------------

SIZE = 5000
FIRST = ("Alex", "Zoë", "Nguyễn Thị", "王", "María José", "Łukasz", "محمد", "Олена", "Siân", "अनिता", "D'Arcy", "Mia")
LAST = ("Connor", "O'Brien", "Müller", "Trần", "欧阳", "García Márquez", "Dvořák", "الأحمد", "Шевченко", "Li")
PROGRAMS = ("BUSI", "NURS", "ENGR", "ARTS", None)
CAMPUSES = ("Sunshine Coast", "Québec", None)
ORDERS = ("ids in no order", "ascending ids")
JOBS = ("import", "identical re-send", "10 % changed")

# The upsert as anybody would write it, a row a statement.
FLOOR = f"""
INSERT INTO entries (roster_id, {", ".join(sis_sync.NAMES)}, created_at, changed_at, seen_at)
VALUES ({", ".join("?" * (len(sis_sync.NAMES) + 4))}) ON CONFLICT (roster_id, {sis_sync.NAMES[0]}) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in sis_sync.NAMES[1:])}, seen_at = excluded.seen_at,
    changed_at = CASE WHEN ({", ".join(sis_sync.NAMES[1:])})
        IS NOT ({", ".join(f"excluded.{name}" for name in sis_sync.NAMES[1:])})
        THEN excluded.changed_at ELSE changed_at END"""


class Page(NamedTuple):
    """5,000 students of a roster as the body of a request, and the same with another program for a tenth of them."""

    cohort: str
    plain: bytes
    changed: bytes

    @classmethod
    def of(cls, pick: random.Random, cohort: str, students: list[dict[str, Any]]) -> Page:
        plain = body_of(cohort, students)
        for student in pick.sample(students, len(students) // 10):
            student["program_code"] = f"X{pick.getrandbits(30)}"
        return cls(cohort, plain, body_of(cohort, students))


def body_of(cohort: str, students: list[dict[str, Any]]) -> bytes:
    return json.dumps(batch(*students, cohort_id=cohort), ensure_ascii=False).encode()


def people(pick: random.Random, first: int = 0, number: int = SIZE) -> list[dict[str, Any]]:
    """Students from everywhere, their ids ascending from `first`, or in no order: from a wide range, each time anew."""
    ids = range(first, first + number) if first else [pick.getrandbits(44) for _ in range(number)]
    return [{"student_id_ext": f"U{id:014}", "email": f"u{id}@student.example.edu.au", "first_name": pick.choice(FIRST),
             "last_name": pick.choice(LAST), "program_code": pick.choice(PROGRAMS),
             "campus_name": pick.choice(CAMPUSES), "first_in_family": pick.choice((True, False, None))} for id in ids]


def store(connection: sqlite3.Connection, cohort: str, students: list[dict[str, Any]]) -> None:
    now = int(time.time())
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(
        "INSERT INTO rosters (institution, cohort_id) VALUES ('example', ?) ON CONFLICT DO NOTHING", (cohort,))
    (roster,) = connection.execute("SELECT roster_id FROM rosters WHERE cohort_id = ?", (cohort,)).fetchone()
    connection.executemany(FLOOR, ((roster, *map(student.get, sis_sync.NAMES), now, now, now) for student in students))
    connection.execute("COMMIT")


def new_database(folder: pathlib.Path) -> sqlite3.Connection:
    """One just like the server's."""
    folder.mkdir()
    sis_sync.Roster(str(folder / "sis_sync.db")).close()
    return sis_sync.open_database(str(folder / "sis_sync.db"))


class Stored:
    """A server with a database as years leave it: rosters of 10,000 to 50,000, and one of a million where there is
    room, their pages in random order."""

    SMALL, LARGE = "roster of up to 50,000", "roster of a million"
    JOBS = ("import", "identical re-send", "re-send of any 5,000", "10 % changed")

    def __init__(self, folder: pathlib.Path, stored: int) -> None:
        self.pick = random.Random(stored)
        sizes = [1_000_000] if stored >= 2_000_000 else []
        while sum(sizes) < stored:
            sizes.append(min(SIZE * self.pick.randint(2, 10), stored - sum(sizes)))
        order = [f"stored {number}" for number, size in enumerate(sizes) for _ in range(0, size, SIZE)]
        self.pick.shuffle(order)
        self.entries: dict[str, list[range]] = {}       # of each roster, page by page
        with contextlib.closing(new_database(folder)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA cache_size = -1000000")
            for number, cohort in enumerate(order):
                store(connection, cohort, people(self.pick))
                self.entries.setdefault(cohort, []).append(range(1 + number * SIZE, 1 + (number + 1) * SIZE))
                if number % 100 == 0 and sys.stderr.isatty():
                    print(f"\rfilling the database: {number * SIZE:,} of {stored:,}", end="", file=sys.stderr)
        self.process = Process(folder, ini_of())

    def pages(self, number: int) -> Iterator[tuple[str, str, Page]]:
        """What a round sends: roster, job, page. All pages are read before, so what is changed must come last."""
        for name, large in ((self.SMALL, False), (self.LARGE, True)):
            cohorts = [cohort for cohort, pages in self.entries.items() if (len(pages) > 10) is large]
            for place, job in enumerate(self.JOBS if cohorts else ()):
                cohort = cohorts[(4 * number + place) % len(cohorts)]
                pages = self.entries[cohort]
                entries = (self.pick.sample(list(itertools.chain(*pages)), SIZE) if "any" in job
                           else pages[(4 * number + place) % len(pages)])
                students = people(self.pick) if job == "import" else self.students(entries)
                yield name, job, Page.of(self.pick, cohort, students)

    def students(self, entries: Sequence[int]) -> list[dict[str, Any]]:
        """What is stored, as it would be sent again."""
        query = f"SELECT {', '.join(sis_sync.NAMES)} FROM entries WHERE entry_id = ?"
        with contextlib.closing(sis_sync.open_database(str(self.process.database), read_only=True)) as connection:
            rows = [connection.execute(query, (entry,)).fetchone() for entry in entries]
        return [{field.name: bool(value) if field.kind is bool and value is not None else value
                 for field, value in zip(sis_sync.FIELDS, row)} for row in rows]


class Core:
    """The server without its sockets, and with a hand on its write-ahead log."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir()
        self.service = sis_sync.Service(configuration_of(folder, ini_of()))
        self.wal = pathlib.Path(f"{self.service.roster.path}-wal")
        with self.service.roster.transaction() as connection:
            self.connection = connection
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.seconds, self.checkpoints = 0.0, 0.0

    def push(self, body: bytes) -> float:
        """How many KB it wrote. What SQLite does by itself after 1,000 pages is done, and timed, here."""
        before, start = self.wal.stat().st_size, time.perf_counter()
        assert handle(self.service, body).status == 200
        self.seconds += time.perf_counter() - start
        size = self.wal.stat().st_size
        if size > 1000 * 4096:
            start = time.perf_counter()
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self.checkpoints += time.perf_counter() - start
        return (size - before) / 1024


class Bench:
    """Rounds of everything in turn, so that a machine that slows down slows all of it. In milliseconds."""

    def __init__(self, folder: pathlib.Path, stored: int) -> None:
        self.stack = contextlib.ExitStack()
        self.times: dict[tuple[str, ...], list[float]] = {}
        self.kilobytes: dict[tuple[str, ...], list[float]] = {}
        self.pick = random.Random(2026)
        # For comparison, also a database that holds a handful of rosters.
        sizes = {"few": 200_000, "many": stored} if stored else {}
        self.stored = {name: Stored(folder / name, size) for name, size in sizes.items()}
        for database in self.stored.values():
            self.stack.callback(database.process.stop)
        self.floor = self.stack.enter_context(contextlib.closing(new_database(folder / "floor")))
        self.cores = {order: Core(folder / order) for order in ORDERS}
        (folder / "empty").mkdir()
        start = time.perf_counter()
        self.server = self.stack.enter_context(running(folder / "empty", ini_of()))
        self.start = 1000 * (time.perf_counter() - start)
        self.memory = {"at rest": memory_of(self.server)} if os.path.exists("/proc/self/status") else {}
        self.pages: list[dict[str, Page]] = []

    @contextlib.contextmanager
    def timed(self, *name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times.setdefault(name, []).append(1000 * (time.perf_counter() - start))

    def push(self, process: Process, data: bytes, job: str = "import") -> None:
        new, unchanged = {"import": (SIZE, 0), "10 % changed": (0, SIZE - SIZE // 10)}.get(job, (0, SIZE))
        with process.connect() as connection:
            connection.sendall(data)
            answer = read_to_end(connection)
        assert b'"imported": %d, "updated": %d, "unchanged": %d' % (new, SIZE - new, unchanged) in answer, answer

    def one_round(self) -> None:
        """A page is imported, sent again a round later, and changed in the round after that: at a later second, as
        a row that is written as it stands is no work."""
        number = len(self.pages)
        firsts = {ORDERS[0]: 0, ORDERS[1]: 1 + number * SIZE}
        self.pages.append({order: Page.of(self.pick, order, people(self.pick, first))
                           for order, first in firsts.items()})
        stored = [(name, database.process, page) for name, database in self.stored.items()
                  for page in database.pages(number)]
        stored.sort(key=lambda sent: Stored.JOBS.index(sent[2][1]))
        time.sleep(1 - time.time() % 1)
        for age, job in enumerate(JOBS[:number + 1]):
            for order in ORDERS:
                page = self.pages[number - age][order]
                body = page.changed if age == 2 else page.plain
                with self.timed("floor", job, order):
                    store(self.floor, order, json.loads(body)["students"])
                data = request_of(body)
                with self.timed("request", job, order):
                    self.push(self.server, data, job)
                self.kilobytes.setdefault((job, order), []).append(self.cores[order].push(body))
        for name, process, (roster, job, page) in stored:
            data = request_of(page.changed if job == JOBS[2] else page.plain)
            with self.timed(name, job, roster):
                self.push(process, data, job)

    def close(self) -> None:
        self.stack.close()
        for core in self.cores.values():
            core.service.roster.close()

    def remember_peak(self, name: str) -> None:
        if self.memory:
            self.memory[name] = memory_of(self.server, "VmHWM")

    def eight_and_one(self, number: int) -> None:
        """Eight clients send a page each at once, then one sends as many: rosters that are new, ids in no order."""
        datas = [request_of(Page.of(self.pick, f"{number}-{client}", people(self.pick)).plain) for client in range(16)]
        with concurrent.futures.ThreadPoolExecutor(8) as clients, self.timed("8 clients", "", ""):
            list(clients.map(lambda data: self.push(self.server, data), datas[:8]))
        with self.timed("1 client", "", ""):
            for data in datas[8:]:
                self.push(self.server, data)

    def small_requests(self, number: int) -> float:
        """401s a second, a connection each, one after the other."""
        start = time.perf_counter()
        for _ in range(number):
            assert self.server.exchange(head_of(secret="wrong", Content_Length=0)).status == 401
        return number / (time.perf_counter() - start)

    def results(self) -> dict[str, Any]:
        """A ratio is the median of the rounds' own: what slows a round slows both of its sides."""
        def row(key: tuple[str, ...], base: tuple[str, ...], **more: Any) -> dict[str, Any]:
            times, bases = self.times[key], self.times[base]
            return {**more, "median": statistics.median(times), "fastest": min(times),
                    "floor": statistics.median(bases), "fastest_floor": min(bases),
                    "ratio": statistics.median(map(float.__truediv__, times, bases)),
                    "students_per_second": 1000 * SIZE / statistics.median(times)}

        eight, one = ("8 clients", "", ""), ("1 client", "", "")
        return {
            "python": sys.version.split()[0], "sqlite": sqlite3.sqlite_version,
            "rounds": len(self.times["floor", JOBS[0], ORDERS[0]]),
            "requests": [row(("request", job, order), ("floor", job, order), name=f"{job}, {order}",
                             wal_kb=statistics.median(self.kilobytes[job, order])) for order in ORDERS for job in JOBS],
            "stored": [row(("many", job, roster), ("few", job, Stored.SMALL), name=f"{job}, {roster}")
                       for name, job, roster in self.times if name == "many"],
            "eight": {**row(one, eight), "students_per_second": [
                8000 * SIZE / statistics.median(self.times[name]) for name in (eight, one)]},
            "checkpoints": {order: core.checkpoints / (core.checkpoints + core.seconds)
                            for order, core in self.cores.items()},
            "start_ms": self.start, "memory_mb": self.memory}


def bench(arguments: argparse.Namespace) -> int:
    configuration = sis_sync.load_configuration(environment={**os.environ, "SIS_SYNC_SECRET": SECRET})
    database = pathlib.Path(configuration.settings["database"])
    with tempfile.TemporaryDirectory(prefix="sis_sync-bench-", dir=database.parent) as folder, \
            contextlib.closing(Bench(pathlib.Path(folder), arguments.stored)) as rounds:
        for number in range(arguments.rounds + 2):      # two to warm up, as a page lives for three rounds
            rounds.one_round()
            if number == 1:
                rounds.times.clear()
        for number in range(max(3, arguments.rounds // 3)):
            rounds.eight_and_one(number)
        rounds.remember_peak("after 8 clients at once")
        results = {**rounds.results(), "small_requests_per_second": rounds.small_requests(300)}
    print(json.dumps(results) if arguments.json else table_of(results))
    return 0


def table_of(results: Mapping[str, Any]) -> str:
    lines = ["CPython {python}, SQLite {sqlite}, {rounds} rounds of batches of 5,000; "
             "milliseconds, median (fastest)\n".format(**results)]
    for rows, base in (("requests", "floor"), ("stored", "few stored")):
        if results[rows]:
            lines += [f"{'':<49}{base:>15}{'request':>15}  ratio  students/s" + "        WAL" * (rows == "requests")]
        for row in results[rows]:
            wal = f"{row['wal_kb']:>8,.0f} KB" if "wal_kb" in row else ""
            lines += ["{name:<49}{floor:>7.1f} ({fastest_floor:>5.1f}){median:>7.1f} ({fastest:>5.1f})"
                      "{ratio:>7.2f}{students_per_second:>12,.0f}".format(**row) + wal]
    eight, one = results["eight"]["students_per_second"]
    checkpoints = ", ".join(f"{part:.0%} with {order}" for order, part in results["checkpoints"].items())
    memory = ", ".join(f"{value:.0f} MB {name}" for name, value in results["memory_mb"].items())
    return "\n".join(lines) + f"""
8 clients at once: {eight:,.0f} students/s, 1 client: {one:,.0f}; ratio {results["eight"]["ratio"]:.2f}
checkpoints: of the time {checkpoints}
401s a second, a connection each: {results["small_requests_per_second"]:,.0f}
start to listening: {results["start_ms"]:.0f} ms; memory: {memory}"""


MIB = 1 << 20
GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"


def filled(unit: bytes, size: int = 8 * MIB - 200) -> bytes:
    """As many of them as a body of this size takes, as a field that nobody knows; and a batch beside it."""
    count = (size - 60) // len(unit)
    return b'{"cohort_id": "1", "students": [], "x": [' + (unit * count).rstrip(b",") + b"]}"


def gzip_of(body: bytes, name: bytes = b"", tail: bytes = b"") -> bytes:
    data = gzip.compress(body, 9)
    return request_of(data[:3] + b"\x08" + data[4:10] + name + b"\0" + data[10:] + tail, Content_Encoding="gzip")


def in_chunks(size: int, extension: bytes = b"", length: int = 8 * MIB) -> bytes:
    return head_of(Transfer_Encoding="chunked") + chunked(b"[" + b" " * (length - 2) + b"]", size, extension)


def keys_of(number: int, form: str) -> bytes:
    keys = {format(index, form): 0 for index in range(number)}
    return request_of(json.dumps(batch(**keys), separators=(",", ":")).encode())


Cost = tuple[str, int, int, Callable[[], bytes]]

# What cost the most of all that was tried: name, how often, bytes in a piece (0: all at once), the request.
STRANGERS: list[Cost] = [
    ("a head byte by byte", 1, 1, lambda: head_of("GET", "/healthz", secret=None, X="x" * 15_000)),
    ("a head in pieces of 16 bytes", 1, 16, lambda: head_of("GET", "/healthz", secret=None, X="x" * 15_000)),
    ("64 MiB after a 401", 1, 0, lambda: head_of(secret="wrong", Content_Length=8 * MIB) + b" " * 64 * MIB),
    ("100 of 401", 100, 0, lambda: head_of(secret="wrong", Content_Length=0)),
    ("100 of /healthz", 100, 0, lambda: head_of("GET", "/healthz", secret=None)),
    ("100 of /openapi.json", 100, 0, lambda: head_of("GET", "/openapi.json", secret=None))]
CALLERS: list[Cost] = [
    ("5,000 good students", 1, 0, lambda: request_of(batch(*people(random.Random(1))))),
    ("5,000 bad rows", 1, 0, lambda: request_of(batch(*[{}] * SIZE))),
    ("1-byte chunks", 1, 0, lambda: in_chunks(1, length=MIB)),
    ("2-byte chunks", 1, 0, lambda: in_chunks(2, length=MIB)),
    ("16-byte chunks", 1, 0, lambda: in_chunks(16)),
    ("16-byte chunks, long extensions", 1, 0, lambda: in_chunks(16, b";" + b"x" * 230)),
    ("16-byte pieces", 1, 16, lambda: request_of(filled(b" "))),
    ("gzip, a name of 8 MiB", 1, 0, lambda: gzip_of(b"{}", b"x" * (8 * MIB - 100))),
    ("gzip, 8 MiB of zeros behind", 1, 0, lambda: gzip_of(b"{}", tail=bytes(8 * MIB - 100))),
    ("gzip, 400,000 empty members", 1, 0, lambda: gzip_of(b"", tail=gzip.compress(b"") * 400_000)),
    ("gzip, a bomb of 8 GiB", 1, 0, lambda: request_of(
        GZIP_HEAD + zlib.compress(b" " * MIB, 9)[2:-4] * 8000, Content_Encoding="gzip")),
    ("gzip, 8 MiB of empty blocks", 1, 0, lambda: request_of(
        GZIP_HEAD + b"\0\0\0\xff\xff" * (8 * MIB // 5 - 10), Content_Encoding="gzip")),
    ("8 MiB of [[[[]]]],", 1, 0, lambda: request_of(filled(b"[[[[]]]],"))),
    ('8 MiB of {"":{}},', 1, 0, lambda: request_of(filled(b'{"":{}},'))),
    ("as many {} as may be", 1, 0, lambda: request_of(filled(b"{},", 120_000))),
    ("2 MiB of short strings", 1, 0, lambda: request_of(filled(b'"ab",', 2 * MIB))),
    ("2 MiB of numbers", 1, 0, lambda: request_of(filled(b"300,", 2 * MIB))),
    ("8 MiB of numbers of 1,000 digits", 1, 0, lambda: request_of(filled(b"9" * 1000 + b","))),
    ("numbers of one hash for strings", 1, 0, lambda: request_of(batch(*(
        dict.fromkeys(sis_sync.NAMES, number * ((1 << 61) - 1)) for number in range(SIZE))))),
    ("180,000 keys", 1, 0, lambda: keys_of(180_000, "x")),
    ("300,000 long keys", 1, 0, lambda: keys_of(300_000, "020")),
    ("800,000 keys", 1, 0, lambda: keys_of(800_000, "x")),
    ("58 unknown keys a student", 1, 0, lambda: request_of(json.dumps(batch(*(
        {f"{number:02}": 0 for number in range(58)} for _ in range(SIZE))), separators=(",", ":")).encode())),
    ("8 MiB of spaces", 1, 0, lambda: request_of(b" " * 8 * MIB)),
    ("8 MiB of line ends", 1, 0, lambda: request_of(b"{}" + b"\n" * (8 * MIB - 3) + b"x")),
    ("8 MiB of wide characters", 1, 0, lambda: request_of(filled('"😀😀😀😀😀😀",'.encode()))),
    ("8 MiB and one wide character", 1, 0, lambda: request_of(
        filled(b'"' + b"x" * 24 + b'",')[:-2] + ',"😀"]}'.encode())),
    ("a name of 4 Mi words", 1, 0, lambda: request_of(batch(student(1, first_name="a " * (4 * MIB - 200) + "a")))),
    ("5,000 names of 1,400 characters", 1, 0, lambda: request_of(batch(*(
        student(number, first_name="a " * 700) for number in range(SIZE)))))]


def cpu_of(process: Process) -> float:
    """Seconds so far."""
    fields = pathlib.Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def send_in_pieces(process: Process, data: bytes, size: int) -> Answer:
    with process.connect(timeout=120) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(data), size or len(data)):
                connection.sendall(data[start:start + (size or len(data))])
        return parse_answer(read_to_end(connection).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"", 1))


def longest_wait(process: Process, data: bytes, size: int) -> float:
    """How long /healthz takes at most, in seconds, while 20 of these requests come at once."""
    waits = []
    with concurrent.futures.ThreadPoolExecutor(20) as clients:
        sent = [clients.submit(send_in_pieces, process, data, size) for _ in range(20)]
        while not all(future.done() for future in sent):
            start = time.perf_counter()
            process.exchange(head_of("GET", "/healthz"), source="127.0.0.2")
            waits.append(time.perf_counter() - start)
    return max(waits)


def cost(arguments: argparse.Namespace) -> int:
    """Each on a server of its own, so that a peak is its own."""
    print(f"{'':<46}{'for one':>20}{'20 at once: longest':>26}\n{'':<36}{'sent':>10}{'CPU':>9}{'memory':>9}"
          f"{'answer':>8}{'/healthz':>12}{'memory':>9}")
    for title, table in (("without a secret", STRANGERS), ("with a secret", CALLERS)):
        print(f"\n{title}")
        for name, times, size, make in table:
            if arguments.only not in name:
                continue
            data = make()
            with tempfile.TemporaryDirectory() as folder, running(pathlib.Path(folder), ini_of()) as process:
                process.push(student(1))
                threads, cpu, memory = threads_of(process), cpu_of(process), memory_of(process)
                for _ in range(times):
                    answer = send_in_pieces(process, data, size)
                settled(process, threads)
                cpu, growth = cpu_of(process) - cpu, memory_of(process, "VmHWM") - memory
                line = f"{name:<36}{len(data) * times / MIB:>7.2f} MB{cpu:>7.2f} s{growth:>6.0f} MB{answer.status:>8}"
                if cpu > 0.05:
                    wait = longest_wait(process, data, size)
                    line += f"{wait:>10.2f} s{memory_of(process, 'VmHWM') - memory:>6.0f} MB"
            print(line, flush=True)
    return 0


class Crowd:
    """Clients that push rosters of 500 without end, each again until it is well, as integrators are told to."""

    def __init__(self, process: Process, clients: int) -> None:
        self.process, self.ended = process, threading.Event()
        self.answered: set[str] = set()             # cohorts
        self.sent: set[str] = set()
        self.retries: collections.Counter[str] = collections.Counter()
        self.threads = [threading.Thread(target=self.push, args=(str(number),)) for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def push(self, name: str) -> None:
        pick = random.Random(name)
        for number in itertools.count():
            if self.ended.is_set():
                return
            cohort = f"{name}-{number}"
            self.sent.add(cohort)
            data = request_of(body_of(cohort, people(pick, number=500)))
            while cohort not in self.answered:
                raw, middle = b"", pick.choice((60, pick.randrange(len(data))))
                with contextlib.suppress(OSError), self.process.connect() as connection:
                    connection.sendall(data[:middle])
                    time.sleep(pick.choice((0, 0.01)))      # so that now and then it is half sent
                    connection.sendall(data[middle:])
                    raw = read_to_end(connection)
                answer = parse_answer(raw) if raw else None
                assert not answer or answer.status in (200, 503), answer
                if answer and answer.status == 200:
                    self.answered.add(cohort)
                else:
                    self.retries[answer.code if answer else "no answer"] += 1
                    time.sleep(0.02)

    def end(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()

    def check(self) -> None:
        """What was answered is stored, and nothing is half stored."""
        kept = dict(self.process.rows("SELECT cohort_id, count(*) FROM roster GROUP BY cohort_id"))
        history = {cohort for (cohort,) in self.process.rows("SELECT cohort_id FROM history")}
        assert self.answered <= set(kept) == history <= self.sent and set(kept.values()) <= {500}
        assert self.process.rows("PRAGMA integrity_check") == [("ok",)]


def trials(arguments: argparse.Namespace) -> int:
    """`crash` and `stops`: a server under load is killed, or stopped, at random moments and started again."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        with running(pathlib.Path(folder), ini_of(), words=("serve", "--port", str(port))) as process:
            crowd = Crowd(process, 4)
            for _ in range(arguments.times):
                time.sleep(random.uniform(0, 0.3))
                status = process.stop(arguments.signal)
                assert status == (0 if arguments.signal == signal.SIGTERM else -arguments.signal), process.log
                if arguments.signal != signal.SIGTERM:
                    crowd.check()
                process.start()
            crowd.end()
            process.stop()
            crowd.check()
            assert crowd.answered == crowd.sent
    print(f"{arguments.times} times: {len(crowd.answered):,} pushes are well and whole; retries: {dict(crowd.retries)}")
    return 0


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
    command.add_argument("--stored", type=int, default=0, metavar="N", help="also with N students stored already")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=bench)
    command = commands.add_parser("cost", help="the most expensive requests that were found")
    command.add_argument("--only", default="", metavar="WORDS", help="those with these words in their name")
    command.set_defaults(run=cost)
    command = commands.add_parser("fuzz", help="mutated requests, for so many seconds")
    command.add_argument("seconds", type=float)
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=fuzz)
    for name, number, what in (("crash", "SIGKILL", "killed"), ("stops", "SIGTERM", "stopped")):
        if hasattr(signal, number):
            command = commands.add_parser(name, help=f"a server under load is {what}, so many times")
            command.add_argument("times", type=int)
            command.set_defaults(run=trials, signal=getattr(signal, number))
    command = commands.add_parser("timing", help="what the time of a 401 tells")
    command.add_argument("--samples", type=int, default=5000)
    command.set_defaults(run=timing)
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())

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
import configparser
import contextlib
import csv
import gzip
import hashlib
import http.client
import importlib.util
import io
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
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import sis_sync

try:
    import pytest
except ImportError:                 # bench, fuzz and timing do without
    pytest = None  # type: ignore[assignment]

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / "sis_sync.py"
SECRET = "sis_a-secret-for-the-tests-only"
OTHER_SECRET = "sis_another-secret-for-the-tests"
SYNC = sis_sync.SYNC_PATH
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX") if pytest else lambda test: test
FAST = "requests_per_minute = 100000\n"


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
        return self.document.get("error", "")


def parse_answer(data: bytes, head_only: bool = False) -> Answer:
    """Every answer keeps the promises that hold for all of them, or this fails."""
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    match = re.fullmatch(r"HTTP/1\.[01] (\d{3}) [A-Za-z ]+", status_line)
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
        self.environment = {**os.environ, "SIS_SYNC_SECRET": SECRET, "SIS_SYNC_CONFIG": "",
                            **environment}
        self.words = (sys.executable, str(MODULE), *(("--config", str(self.ini)) if ini else ()),
                      *words)
        self.popen = popen
        self.log: list[str] = []
        self.changed = threading.Condition()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.words, env=self.environment, stderr=subprocess.PIPE,
                                        stdout=subprocess.PIPE, encoding="utf-8", **self.popen)
        self.reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self.reader.start()
        line = self.wait_for(r"listens on https?://.*:(\d+)/")
        self.port = int(line[1])
        # After a restart on the same port, only the newest line counts.
        self.log_start = len(self.log)

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


def run(*words: Any, stdin: str | bytes = b"", environment: Mapping[str, str] = {},
        **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command line, as a process."""
    return subprocess.run(
        [sys.executable, str(options.pop("module", MODULE)), *map(str, words)],
        input=stdin.encode() if isinstance(stdin, str) else stdin, capture_output=True, timeout=60,
        env={**os.environ, "SIS_SYNC_SECRET": SECRET, "SIS_SYNC_CONFIG": "", **environment}, **options)


if pytest:
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
    if sys.version_info >= (3, 10):
        assert {str(name).partition(".")[0] for name in names} <= sys.stdlib_module_names


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
        line, 'Field("study_mode", str, False, 1, 9, None, "", "how they study"),\n    ' + line), "utf-8")
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
    exported = run("--config", ini, "export", module=tmp_path / "grown.py").stdout.decode()
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


# ---------------------------------------------------------------------------------------------
# Section 2: the endpoint
# ---------------------------------------------------------------------------------------------

FULL = {"student_id_ext": "U2025001", "email": "alex.connor@student.example.edu.au",
        "first_name": "Alex", "last_name": "Connor", "program_code": "BUSI",
        "campus_name": "Sunshine Coast", "first_in_family": False}
ROW = ", ".join(sis_sync.NAMES)

TEXT = [name for name in sis_sync.NAMES if name != "first_in_family"]
# Field, value sent, value stored, or the error and its message.
GOOD = [
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
BAD = [
    *((name, value, "missing_field", f"{name} required") for name in ("student_id_ext", "email")
      for value in (None, "", " \u2003")),
    *((name, value, "invalid_field", f"{name} must be a string") for name in TEXT
      for value in (1, 1.5, True, [], {}, ["x"])),
    *((name, value, "invalid_field", "first_in_family must be true, false or null")
      for name in ("first_in_family",) for value in ("true", "", 1, 0, 0.0, [], {})),
    *((name, "a" * 251 + "@bcd", "invalid_field", f"{name} must be 3 to 254 characters") for name in ("email",)),
    *((name, "x" * 256, "invalid_field", f"{name} must be 1 to 255 characters")
      for name in TEXT if name != "email"),
    *(("email", value, "invalid_field",
       "email must be one e-mail address: something, one @, something, no white space")
      for value in ("abc", "@bc", "ab@", "a@b@c", "a b@c", "a@b\u00a0c", "a@b, c@d")),
    *((name, f"a@{character}b", "invalid_field",
       f"{name} holds U+{ord(character):04X}, a control character or half of a surrogate pair")
      for name in TEXT for character in ("\0", "\x1f", "\x7f", "\n", "\ud800", "\udfff")),
    *((name, f"\x1fa@b{name}", "invalid_field",
       f"{name} holds U+001F, a control character or half of a surrogate pair") for name in TEXT),
]


class TestFields:
    @pytest.mark.parametrize("name, value, stored", GOOD)
    def test_a_good_value_is_kept_as_it_was_sent(self, service: sis_sync.Service, name: str,
                                                value: Any, stored: Any) -> None:
        answer = handle(service, batch({**FULL, name: value}))
        assert (answer.status, answer.document["imported"]) == (200, 1)
        connection = service.roster._connection
        assert connection
        assert connection.execute(f"SELECT {name} FROM entries").fetchall() == [(stored,)]

    @pytest.mark.parametrize("name, value, error, message", BAD)
    def test_a_bad_value_is_reported_and_not_kept(self, service: sis_sync.Service, name: str,
                                                  value: Any, error: str, message: str) -> None:
        answer = handle(service, batch({**FULL, name: value}))
        assert answer.document == {
            "received": 1, "imported": 0, "details": {"imported": 0, "updated": 0, "unchanged": 0},
            "errors": [{"row": 1, "field": name, "error": error, "message": message}]}

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
        wrong = {name: 1 for name in FULL}
        for name in FULL:
            answer = handle(service, batch(wrong))
            assert [error["field"] for error in answer.document["errors"]] == [name]
            wrong[name] = FULL[name]    # type: ignore[assignment]

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
        for round_number in range(12):
            ended = threading.Event()

            def keep_pushing(name: str) -> None:
                number = 0
                while not ended.is_set():
                    cohort = f"{name}-{number}"
                    number += 1
                    done[cohort] = False
                    with contextlib.suppress(OSError, AssertionError):
                        done[cohort] = process.push(*map(student, range(200)), cohort_id=cohort).status == 200

            threads = [threading.Thread(target=keep_pushing, args=(f"{round_number}-{name}",))
                       for name in "ab"]
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
    ("latin-1", '{"x": "Zoë"}'.encode("latin-1"), "the body is not UTF-8 at byte 9"),
    ("UTF-16", '{"x": 1}'.encode("utf-16"), "the body is not UTF-8 at byte 0"),
    ("UTF-16 without a BOM", '{"x": 1}'.encode("utf-16-le"), "the body is not JSON"),
    ("UTF-32", '{"x": 1}'.encode("utf-32"), "the body is not UTF-8 at byte 0"),
    ("a surrogate in bytes", b'{"x": "\xed\xa0\x80"}', "the body is not UTF-8 at byte 7"),
    ("a bare control character", b'{"x": "\x01"}', "the body is not JSON"),
    ("gzip that is none", None, "broken or cut off gzip"),
]
BODY_FAULTS = [
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
        for length in (8 * 1024 * 1024 + 1, 10 ** 13, 10 ** 90):
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

    ORDER = ["malformed_request", "not_implemented", "not_found", "method_not_allowed",
             "unauthorized", "batch_too_large", "unsupported_media_type", "malformed_json",
             "missing_field", "invalid_field"]

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
    compared = []
    original = sis_sync.hmac.compare_digest
    monkeypatch.setattr(sis_sync.hmac, "compare_digest",
                        lambda one, other: compared.append(other) or original(one, other))
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
        assert faults_of(tmp_path, "[sever]\nport = 1\n[server]\nprot = 1\nport = x\n[limits]\n"
                         "max_student = 5\n[institution UPPER]\n[institution a]\nsecret = x\n"
                         "[DEFAULT]\nport = 1\n") == [
            "[server] prot: unknown key; did you mean port?",
            "[server] port: found 'x'; allowed: a whole number from 0 to 65535",
            "[limits] max_student: unknown key; did you mean max_students?",
            *(f"[{name}]: unknown section; allowed: [server], [limits], [institution NAME] "
              f"(NAME: a-z, 0-9, hyphens){hint}" for name, hint in (
                  ("sever", "; did you mean server?"), ("institution UPPER", "; did you mean institution?"))),
            "[institution a] secret: unknown key; did you mean secrets?",
            "[DEFAULT]: unknown section; allowed: [server], [limits], [institution NAME] "
            "(NAME: a-z, 0-9, hyphens)"]

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
        (tmp_path / "secret.txt").write_text(f"{OTHER_SECRET}\r\n")
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
            *(f"[institution a] secrets: {source} is missing or empty, so it is not set"
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
        result = run("--config", tmp_path / "bad.ini")
        assert result.returncode == 2 and not result.stdout
        assert len(result.stderr.decode().splitlines()) == 2

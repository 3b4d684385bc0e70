"""The tests of sis_sync, and what is run by hand. Each heading names a section of the contract.

    grep "^# Section" test_sis_sync.py   # the headings
    make test                            # all of them, in about a minute
    python3 -m pytest -q -k forget       # those that have this word in their name
    make bench                           # the speed of this machine
    python3 test_sis_sync.py fuzz 600    # ten minutes of mutated requests

Most tests talk to a real server process over a real socket, with a real database file. What is
pure is tested as the function it is.
"""

import argparse
import codecs
import collections
import concurrent.futures
import contextlib
import csv
import functools
import gzip
import hashlib
import hmac
import io
import itertools
import json
import logging
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
import threading
import time
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

import sis_sync

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / "sis_sync.py"
SYNC = sis_sync.SYNC_PATH
SECRET = "sis_a-secret-for-the-tests-only"
OTHER_SECRET = "sis_another-secret-for-the-tests"
FAST = "requests_per_minute = 100000\n"
FORBIDDEN = "no control character and no half of a surrogate pair may be in it"
FULL = {field.name: field.example for field in sis_sync.FIELDS}
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
cpython = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="measures what CPython does"
)

# Temporary files in memory where there is such a place: hundreds of little databases, each synced
# to its disk, would only measure that disk.
if os.access("/dev/shm", os.W_OK):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")
# In the background of a shell script SIGINT is ignored, and with nohup SIGHUP. The servers would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, lambda *_: None)
os.environ["SIS_SYNC_CONFIG"] = ""  # a file of the developer's own

# To build the parser takes a third of the time of a command in this process.
sis_sync.argument_parser = functools.lru_cache(None)(sis_sync.argument_parser)
# With -m, Python keeps the compiled module between the hundred-odd runs.
COMMAND = (sys.executable, "-m", "sis_sync")
ENVIRONMENT = {
    **os.environ,
    "SIS_SYNC_SECRET": SECRET,
    "PYTHONPATH": str(HERE),
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONUNBUFFERED": "",
}


# ---------------------------------------------------------------------------------------------
# The OpenAPI document as a judge: it must describe every answer that the server gives
# ---------------------------------------------------------------------------------------------

OPENAPI = sis_sync.openapi_document(5000)
# The headers that an answer has only if the document names them.
NAMED = {"allow", "accept", "accept-encoding", "retry-after", "www-authenticate", "x-request-id"}
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def is_of_type(value, name):
    if name == "integer":  # in JSON Schema 9.0 is one, and true is none
        return type(value) is int or (type(value) is float and value.is_integer())
    return isinstance(value, KINDS[name])


def faults_by(schema, value):
    """What the schema finds wrong with a value. An unknown keyword is a KeyError, so that none is
    believed unasked."""
    if "$ref" in schema:
        return faults_by(OPENAPI["components"]["schemas"][schema["$ref"].rpartition("/")[2]], value)
    types = schema.get("type", list(KINDS))
    if not any(is_of_type(value, name) for name in ([types] if isinstance(types, str) else types)):
        return [f"not a {types}"]
    checks = {
        "type": lambda _: True,
        "description": lambda _: True,
        "examples": lambda _: True,
        "enum": lambda allowed: value in allowed,
        "minimum": lambda least: value is None or value >= least,
        "maximum": lambda most: value is None or value <= most,
        # In JSON Schema $ is the very end, in Python a line end may follow.
        "pattern": lambda pattern: (
            not isinstance(value, str) or re.search(re.sub(r"\$$", r"\\Z", pattern), value)
        ),
        "maxLength": lambda most: not isinstance(value, str) or len(value) <= most,
        "maxItems": lambda most: len(value) <= most,
        "required": lambda names: set(names) <= set(value),
        "allOf": lambda schemas: not any(faults_by(part, value) for part in schemas),
        "items": lambda part: not any(faults_by(part, item) for item in value),
        "properties": lambda parts: (
            not any(faults_by(parts[name], value[name]) for name in set(parts) & set(value))
        ),
    }
    return [key for key, argument in schema.items() if not checks[key](argument)]


def assert_described(answer, path=None):
    """Every answer is one of those that the document names for this path (without one, for any)."""
    for known, operations in OPENAPI["paths"].items():
        for operation in operations.values():
            described = operation["responses"].get(str(answer.status))
            if path in (None, known) and described:
                if "content" not in described:
                    return  # a route that is new in ROUTES
                schema = described["content"]["application/json"]["schema"]
                names = {name.lower() for name in described["headers"]}
                members = set(schema.get("properties", answer.document))
                if (
                    not faults_by(schema, answer.document)
                    and set(answer.document) <= members
                    and NAMED & set(answer.headers) <= names
                ):
                    return
    raise AssertionError(f"not described for {path}: {answer}")


# ---------------------------------------------------------------------------------------------
# Tools: one way each to send bytes, to start a server, to read its log, to run a command
# ---------------------------------------------------------------------------------------------


class Answer(collections.namedtuple("Answer", "status headers document body")):
    """An answer that was read to the end of its connection."""

    @property
    def code(self):
        return self.document.get("error", "")


def parse_answer(data, path=None, head_only=False):
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
    answer = Answer(int(match[1]), headers, json.loads(body), body)
    assert_described(answer, path)
    return answer


def read_to_end(connection):
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        piece = connection.recv(65536)
        while piece:
            pieces.append(piece)
            piece = connection.recv(65536)
    return b"".join(pieces)


def head_of(method="POST", target=SYNC, version="HTTP/1.1", secret=SECRET, **headers):
    """The bytes of a request's head. A header that is None is left out."""
    fields = {
        "Host": "localhost",
        "Authorization": f"Bearer {secret}" if secret else None,
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"{method} {target} {version}", *lines, "", ""]).encode("latin-1")


def request_of(body, **headers):
    """The bytes of a push: a document, or a body as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = {"Content_Length": len(data), "Content_Type": "application/json"}
    return head_of(**{**length, **headers}) + data


def student(number=1, **values):
    return {"student_id_ext": f"U{number}", "email": f"u{number}@example.edu", **values}


def batch(*students, cohort_id="2026", **values):
    return {"cohort_id": cohort_id, "students": list(students), **values}


def ini_of(server="", limits=FAST, institutions="[institution example]\n"):
    return f"[server]\nport = 0\n{server}\n[limits]\n{limits}\n{institutions}"


class Process:
    """A server as an operator runs it: a process, an ini file, a log on stderr."""

    def __init__(self, folder, ini="", environment=None, words=(), command=COMMAND, **popen):
        self.folder = folder
        self.database = folder / "sis_sync.db"
        self.ini = folder / "sis_sync.ini"
        if ini:
            self.ini.write_text(ini, encoding="utf-8")
            words = ("--config", str(self.ini), *words)
        self.words = (*command, *words)
        self.popen = {"env": {**ENVIRONMENT, **(environment or {})}, **popen}
        self.log = []
        self.changed = threading.Condition()
        self.start()

    def start(self):
        self.log.clear()  # or the port of an earlier start would be found in it
        self.process = subprocess.Popen(
            self.words,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            **self.popen,
        )
        self.reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self.reader.start()
        self.port = int(self.wait_for(r"listens on https?://.*:(\d+)/")[1])

    def _read(self, process):
        for line in itertools.chain(process.stderr, ["(end)\n"]):
            with self.changed:
                self.log.append(line.rstrip("\n"))
                self.changed.notify_all()

    def wait_for(self, pattern, seconds=20):
        """The last line of the log that matches, as soon as there is one."""
        found = []

        def has_come():
            found[:] = filter(None, (re.search(pattern, line) for line in self.log))
            return found or self.log[-1:] == ["(end)"]

        with self.changed:
            assert self.changed.wait_for(has_come, seconds) and found, "\n".join(self.log)
        return found[-1]

    def connect(self, source="127.0.0.1", timeout=20):
        return socket.create_connection(("127.0.0.1", self.port), timeout, (source, 0))

    def exchange(self, data, size=1 << 30, source="127.0.0.1"):
        """Send bytes, in pieces of `size`. Read to the end, which the server must bring about."""
        with self.connect(source) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for start in range(0, len(data), size):
                    connection.sendall(data[start : start + size])
            path = SYNC if data.startswith(f"POST {SYNC} ".encode()) else None
            return parse_answer(read_to_end(connection), path, data.startswith(b"HEAD "))

    def push(self, *students, secret=SECRET, **values):
        data = request_of(batch(*students, **values), Authorization=f"Bearer {secret}")
        return self.exchange(data)

    def get(self, path):
        return self.exchange(head_of("GET", path))

    def rows(self, query, *values):
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(query, values).fetchall()

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.reader.join(20)  # first, as wait with a timeout looks only now and then
        status = self.process.wait(20)
        self.process.stderr.close()
        return status


@contextlib.contextmanager
def running(folder, ini="", **options):
    process = Process(folder, ini or ini_of(), **options)
    try:
        yield process
    finally:
        process.stop(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)


Result = collections.namedtuple("Result", "status out err")


def read_roster(path, encoding=None, **mapping):
    """What `push` reads of a file, for the cohort 2026."""
    pairs = [f"{name}={header}" for name, header in mapping.items()]
    return sis_sync.read_roster(
        argparse.Namespace(file=str(path), encoding=encoding, map=pairs, cohort="2026")
    )


def run(*words, stdin=b"", **environment):
    """The command line, in this process, ten times as fast. (`serve` needs a process of its own, as
    it leaves its signal handlers in place; and only there the warnings of `check` are shown.)"""
    before = sys.stdin, sys.stdout, sys.stderr, dict(os.environ)
    data = stdin.encode() if isinstance(stdin, str) else stdin
    streams = [io.TextIOWrapper(io.BytesIO(each), "utf-8") for each in (data, b"", b"")]
    sys.stdin, sys.stdout, sys.stderr = streams
    os.environ.update({**ENVIRONMENT, **environment})
    try:
        status = sis_sync.main([str(word) for word in words])
    except SystemExit as end:  # of argparse
        status = end.code
    finally:
        sys.stdin, sys.stdout, sys.stderr = before[:3]
        os.environ.clear()
        os.environ.update(before[3])
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])
    return Result(status, out, err)


def run_process(*words, command=COMMAND, **environment):
    """The command line, as a process."""
    result = subprocess.run(
        [*command, *map(str, words)],
        check=False,
        capture_output=True,
        timeout=60,
        env={**ENVIRONMENT, **environment},
    )
    return Result(result.returncode, result.stdout.decode(), result.stderr.decode())


@contextlib.contextmanager
def logged():
    """What the module logs meanwhile: a list of lines."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    sis_sync.log.addHandler(handler)
    try:
        yield lines
    finally:
        sis_sync.log.removeHandler(handler)


def configuration_of(folder, text="", **environment):
    """The configuration that a file with this text gives."""
    path = folder / "test.ini"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIS_SYNC_SECRET", SECRET)
        for name, value in environment.items():
            patch.setenv(name, value)
        return sis_sync.load_configuration(argparse.Namespace(config=str(path)))


def faults_of(folder, text):
    """What a start with this file says, without the file's path."""
    with pytest.raises(sis_sync.CommandError) as caught:
        configuration_of(folder, text)
    return [line.partition(".ini: ")[2] for line in caught.value.args]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all tests that leave it as it was. After them its log is looked through."""
    institutions = (
        "[institution example]\n"
        "[institution listed]\nsecrets = env:LISTED\ncohorts = 2026, 2027\n"
        "programs = BUSI\n  NURS\ncampuses = Sunshine Coast\n"
        "[institution strict]\nsecrets = env:STRICT\nbad_rows = reject\n"
    )
    secrets = {"LISTED": OTHER_SECRET, "STRICT": "sis_the-strict-ones-secret"}
    folder = tmp_path_factory.mktemp("server")
    with running(folder, ini_of(institutions=institutions), environment=secrets) as process:
        yield process
        assert process.get("/healthz").status == 200
        process.stop()
    log = "\n".join(process.log)
    for word in (
        "Traceback",
        "Warning",
        " 500 ",
        SECRET,
        *secrets.values(),
        "@example.edu",
        "O'Brien",
        "Zo",
    ):
        assert word not in log


@pytest.fixture
def service(tmp_path):
    """The server without its sockets."""
    service = sis_sync.Service(configuration_of(tmp_path, ini_of()))
    yield service
    service.database.try_to_close()


def handle(service, body=b"", method="POST", path=SYNC, peer="192.0.2.1", **headers):
    """Give the service one request. A header that is None is left out."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = sis_sync.Request(peer, service.config)
    request.method = method
    request.path = path
    request.body = [data]
    fields = {"authorization": f"Bearer {SECRET}", "content_length": str(len(data)), **headers}
    for name, value in fields.items():
        if value is not None:
            request.headers[name.replace("_", "-")] = value
    response = service.handle(request)
    headers = {name.lower(): value for name, value in response.headers.items()}
    answer = Answer(response.status, headers, json.loads(response.body or b"{}"), response.body)
    if response.body:
        assert_described(answer, path if path in OPENAPI["paths"] else None)
    return answer


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate. Its key is beside it, in server.key."""
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    make_certificate(path)
    return path


def make_certificate(path, *options):
    """A certificate as a user would make it, for localhost, for two years."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    words = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 730 "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    )
    files = ["-keyout", path.with_suffix(".key"), "-out", path]
    subprocess.run([*words.split(), *files, *options], check=True, capture_output=True)


def tls_ini(certificate, limits=FAST):
    key = certificate.with_suffix(".key")
    return ini_of(f"tls_certificate = {certificate}\ntls_key = {key}", limits)


# ---------------------------------------------------------------------------------------------
# Section 1: the shape
# ---------------------------------------------------------------------------------------------

SOURCE = MODULE.read_text("utf-8")
NEEDS = r"sis_sync: needs Python 3\.9, SQLite 3\.24, ssl and zlib: "
NO_CTYPES = "import sys; sys.modules['ctypes'] = None; import sis_sync; sis_sync.main()"


# -S: nothing but the standard library can be imported.
@pytest.mark.parametrize("words", [("-I", "sis_sync.py"), ("-c", NO_CTYPES)])
def test_the_module_alone_in_an_empty_folder_serves(tmp_path, words):
    shutil.copy(MODULE, tmp_path)
    command = (sys.executable, "-S", *words, "--port", "0")
    process = Process(tmp_path, command=command, cwd=tmp_path)
    try:
        assert process.push(student()).status == 200
        assert process.database.exists()
    finally:
        process.stop()


def test_the_sql_is_what_sqlite_3_24_understands():
    assert not re.search(r" RETURNING|STRICT|->>|unixepoch\(|iif\(| OVER |DROP COLUMN", SOURCE)


def test_the_top_level_holds_what_the_contract_names_and_nothing_else():
    if not (HERE / ".git").exists():
        pytest.skip("not a checkout")
    files = subprocess.check_output(("git", "ls-files"), cwd=HERE, text=True)
    top = "sis_sync.py test_sis_sync.py sis_sync.ini Makefile LICENSE README.md .ci/run .gitignore"
    assert set(files.split()) <= set(top.split())


@pytest.mark.parametrize(
    "version, status, words",
    [
        ("3.6", 1, r"(?s).*# sis_sync needs Python 3\.9.*"),  # the first line that it cannot read
        ("3.7", 2, NEEDS + r"this is 3\.7.*\s+"),
        ("3.8", 2, NEEDS + r"this is 3\.8.*\s+"),
    ],
)
def test_an_older_python_says_what_is_needed(version, status, words):
    python = shutil.which(f"python{version}")
    if not python or subprocess.call((python, "-c", ""), stderr=subprocess.DEVNULL):
        pytest.skip("not here")
    result = run_process("--version", command=(python, MODULE))
    assert result[:2] == (status, "")
    assert re.fullmatch(words, result.err)


@pytest.mark.parametrize(
    "lines, named",
    [
        ("sys.modules['_sqlite3'] = None", "_sqlite3"),
        ("sys.modules['_ssl'] = None", "_ssl"),
        ("sys.modules['zlib'] = None", "zlib"),
        ("sys.version_info = (3, 8)", "this is"),
        ("import sqlite3; sqlite3.sqlite_version_info = (3, 23, 1)", "this is"),
    ],
)
def test_a_python_that_lacks_a_part_gets_one_line_and_status_2(lines, named):
    result = run_process("-c", f"import sys; {lines}; import sis_sync", command=[sys.executable])
    assert result[:2] == (2, "")
    assert re.fullmatch(rf"{NEEDS}.*{named}.*\s+", result.err)


# Growth: what is likely to be asked for next is a row in a table.


def with_fields(folder, rows):
    """The command of a copy of the module that has more rows in FIELDS."""
    anchor = '    Field("first_in_family"'
    before, after = SOURCE.split(anchor)
    path = folder / "grown.py"
    path.write_text(f"{before}{rows}{anchor}{after}", "utf-8")
    return sys.executable, path


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A server with more fields, on a database from before they were there."""
    folder = tmp_path_factory.mktemp("grown")
    with running(folder) as process:
        process.push(student("old"), cohort_id="old")
    rows = """
    Field("gender", "F, M or X", pattern="F|M|X"),
    Field("nick", "without commas", pattern="[^,]*"),
    Field("sex", "f or m", pattern="(?i)f|m"),
    Field("group", "which group", longest=9),
    Field("boards", "lives here", kind=bool),
    Field("year", "the year level", kind=int),
"""
    with running(folder, command=with_fields(folder, rows)) as process:
        yield process


# Field, good values, bad values, and what is wrong with these.
NEW_FIELDS = [
    ("gender", ["F", "X", None], ["FX", "f"], "must be F, M or X"),
    ("nick", ["a b", "a\u2028b", None], ["a,b"], "must be without commas"),
    ("sex", ["F", "m", None], ["fm"], "must be f or m"),
    ("group", ["x" * 9, None], ["x" * 10], "must be at most 9 characters"),
    ("boards", [False, True, None], [1, "true"], "must be true, false or null"),
    (
        "year",
        [0, 1, 9.0, -(2**63), 2**63 - 1],
        [2**63, True, "9", 1.5],
        "must be a whole number of at most 64 bits",
    ),
]


@pytest.mark.parametrize("name, good, bad, words", NEW_FIELDS)
def test_a_new_field_is_one_row_and_is_held_exactly(grown, name, good, bad, words):
    students = [student(row, **{name: value}) for row, value in enumerate(good + bad)]
    document = grown.push(*students, cohort_id=name).document
    assert document["ignored"] == []
    messages = [error["message"] for error in document["errors"]]
    assert messages == [f"{name} {words}"] * len(bad)
    query = f"SELECT \"{name}\" FROM roster WHERE cohort_id IN ('old', '{name}') ORDER BY email"
    assert grown.rows(query) == [*((value,) for value in good), (None,)]
    schemas = grown.get("/openapi.json").document["components"]["schemas"]
    schema = schemas["Student"]["properties"][name]
    assert [value for value in good + bad if not faults_by(schema, value)] == good


def test_new_fields_come_back_through_export_and_push(grown, tmp_path):
    values = [{name: value} for name, good, *_ in NEW_FIELDS for value in good]
    grown.push(*(student(row, **value) for row, value in enumerate(values)), cohort_id="csv")
    file = tmp_path / "roster.csv"
    export = ("--config", grown.ini, "export", "--output", file)
    push = ("push", file, "--url", f"http://127.0.0.1:{grown.port}")
    for words in (export, push):
        run_process(*words, "--cohort", "csv", command=grown.words[:2])
    counts = grown.rows("SELECT updated, unchanged, rejected FROM syncs ORDER BY sync_id")
    assert counts[-1] == (len(values), len(values), 0)


def test_push_judges_the_cells_of_new_fields(grown, tmp_path):
    file = tmp_path / "roster.csv"
    file.write_text("student_id_ext,email,year,sex\nU1,a@b,9.0,F\nU2,a@b,x,\nU3,a@b,,fm\n")
    words = ("push", file, "--cohort", "csv", "--dry-run", "--quiet")
    assert run_process(*words, command=grown.words[:2]).out.splitlines() == [
        "  line 3: invalid_field: year must be empty or a whole number",
        "  line 4: invalid_field: sex must be f or m",
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"name": "locker", "listed": "lockers"},
        {"name": "locker", "kind": int, "pattern": "[1-9]"},
        {"name": "locker", "kind": bool, "longest": 1},
        {"name": "locker", "kind": float},
        {"name": "locker", "pattern": "("},
        {"name": "which locker"},
        {"name": "email"},
        {"name": "Email"},
        {"name": "seen_in", "kind": int},
        {"name": "cohort_id"},
        {"name": "institution"},
    ],
)
def test_a_field_that_cannot_work_is_refused(monkeypatch, row):
    monkeypatch.setattr(sis_sync, "FIELDS", (*sis_sync.FIELDS, sis_sync.Field(meaning="", **row)))
    with pytest.raises((ValueError, re.error)):
        sis_sync.check_fields()


def test_a_field_that_cannot_work_is_an_error_at_import(tmp_path):
    result = run_process("--version", command=with_fields(tmp_path, '    Field("email", ""),\n'))
    assert result[:2] == (1, "")
    assert "in check_fields" in result.err


def test_a_new_route_is_one_function_and_one_row(service, monkeypatch):
    def version(service, request):
        return {"version": 9}

    monkeypatch.setitem(sis_sync.ROUTES, "/version", ("GET, HEAD", version, "Which it is"))
    assert handle(service, method="GET", path="/version").document == {"version": 9}
    assert handle(service, method="HEAD", path="/version").status == 200
    assert handle(service, path="/version").headers["allow"] == "GET, HEAD"
    described = sis_sync.openapi_document(1)["paths"]["/version"]["get"]
    assert described["summary"] == "Which it is"
    assert {"200", "405", "503"} <= set(described["responses"])


def test_a_new_command_is_one_function_and_one_row(monkeypatch):
    def greet(arguments):
        """Say hello."""
        print("hello", arguments.whom)
        return 0

    monkeypatch.setattr(sis_sync, "argument_parser", sis_sync.argument_parser.__wrapped__)
    monkeypatch.setitem(sis_sync.COMMANDS, "greet", (greet, "whom NAME  who is greeted"))
    assert run("greet", "Zoë") == (0, "hello Zoë\n", "")
    assert "Say hello." in run("--help").out
    assert "who is greeted" in run("greet", "--help").out


# The WSGI callable


@pytest.fixture
def wsgi_ini(tmp_path, monkeypatch):
    """The settings of the callable, as a host finds it before the first request."""
    ini = tmp_path / "wsgi.ini"
    ini.write_text("[limits]\nmax_students = 7\n")
    monkeypatch.setenv("SIS_SYNC_CONFIG", str(ini))
    monkeypatch.setenv("SIS_SYNC_SECRET", SECRET)
    yield ini
    sis_sync.log.handlers.clear()
    if sis_sync.get_service.cache_info().currsize:
        sis_sync.get_service().database.try_to_close()
    sis_sync.get_service.cache_clear()


def wsgi(method="GET", path="/healthz", body=b"", **environ):
    """Call it as a web server does, under the checks of wsgiref.validate."""
    environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_AUTHORIZATION": f"Bearer {SECRET}",
        "wsgi.input": io.BytesIO(body),
        **environ,
    }
    setup_testing_defaults(environ)
    seen = []
    answer = validator(sis_sync.application)(environ, lambda status, headers: seen.append(status))
    with contextlib.closing(answer):
        data = b"".join(answer)
    return seen[0], json.loads(data or b"{}")


HEALTHY = ("200 OK", {"status": "ok"})


def test_wsgi_answers_as_the_server_does(wsgi_ini):
    assert wsgi() == wsgi(SCRIPT_NAME="/below") == HEALTHY
    assert wsgi("HEAD") == ("200 OK", {})


@pytest.mark.parametrize(
    "environ, status, words",
    [
        ({}, "200 OK", "'imported': 1"),
        ({"HTTP_AUTHORIZATION": ""}, "401 Unauthorized", "unauthorized"),
        ({"CONTENT_LENGTH": "999"}, "400 Bad Request", "the request ended before it was whole"),
        ({"CONTENT_LENGTH": ""}, "400 Bad Request", "the body is empty"),
        ({"CONTENT_LENGTH": "", "wsgi.input_terminated": True}, "200 OK", "'imported': 1"),
        (
            {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"},
            "400 Bad Request",
            "this host does not hand chunked bodies on: send a Content-Length",
        ),
    ],
)
def test_a_push_through_wsgi(wsgi_ini, environ, status, words):
    body = json.dumps(batch(student())).encode()
    answer = wsgi("POST", SYNC, body, **environ)
    assert answer[0] == status
    assert words in str(answer[1])


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_what_wsgi_logs_is_escaped(wsgi_ini, capfd):
    assert wsgi("G\x1b[31mT", "/x\n")[0] == "501 Not Implemented"
    assert r" G\x1b[31mT /x\x0a 501 " in capfd.readouterr().err


def test_the_first_wsgi_request_says_what_is_used_and_what_is_without_effect(wsgi_ini, capfd):
    wsgi_ini.write_text("[server]\nport = 81\n[limits]\nrequest_timeout = 5\n")
    wsgi()
    wsgi()
    lines = [line.partition(" ")[2] for line in capfd.readouterr().err.splitlines()]
    assert lines[:-2] == [
        "institution default: secrets set: 1",
        f"configuration: {wsgi_ini}",
        f"new database: {sis_sync.get_service().database.path}",
        "warning: the web server decides, so without effect: port, request_timeout",
    ]


def test_the_first_wsgi_requests_of_sixteen_threads_make_one_service(wsgi_ini, capfd):
    barrier = threading.Barrier(16)

    def ask(_):
        barrier.wait()
        return wsgi()

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [HEALTHY] * 16
    log = capfd.readouterr().err
    assert log.count("database: ") == 1
    assert "without effect" not in log


def test_a_faulty_configuration_is_a_500_and_a_line_in_the_log(wsgi_ini, capfd):
    wsgi_ini.write_text("[server]\nprot = 1\n")
    status, document = wsgi()
    assert (status, document["error"]) == ("500 Internal Server Error", "server_error")
    cause, line = capfd.readouterr().err.splitlines()[-2:]
    assert "did you mean port?" in cause
    assert "GET /healthz 500" in line


# ---------------------------------------------------------------------------------------------
# Section 2: the endpoint
# ---------------------------------------------------------------------------------------------

# Fields: what is kept, and what is refused.

STRINGS = [field for field in (sis_sync.COHORT, *sis_sync.FIELDS) if field.kind is str]
OPTIONAL = [field.name for field in STRINGS if not field.required]
REQUIRED = ["cohort_id", "student_id_ext", "email"]
# Unicode's White_Space
BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
WELCOME = [
    *("O'Brien", "Nguyễn", "Nguye\u0302\u0303n", "Zoë", "王", "क्\u200dष", "👩\u200d🎓", "=1+1"),
    *("0", "0012", "a\x80b", "a\x85b", "a \u3000b", "a\u2028b"),
    *("\u180ea\u180e", "\u200ba\u200b", "\u2060a\u2060", "\ufeffa\ufeff"),
]
AS_SENT = [
    ("cohort_id", [*WELCOME, "x" * 64]),
    ("student_id_ext", [*WELCOME, "x" * 255]),
    ("email", ["a@b", "a" * 252 + "@b", "o'brien+x@b.例え"]),
    ("first_in_family", [True, False, None]),
    *((name, [*WELCOME, "x" * 255, None]) for name in OPTIONAL),
]
# Field, value sent, value stored
GOOD = [
    *((name, value, value) for name, values in AS_SENT for value in values),
    *(("first_name", f"{blank}a{blank}", "a") for blank in BLANKS),
    *((name, value, None) for name in OPTIONAL for value in ("", " \u3000\r\n")),
    ("cohort_id", " 2026\n", "2026"),
    ("student_id_ext", "  U 1\t", "U 1"),
    ("email", "\u00a0a@b\n", "a@b"),
]
NO_TEXTS = [
    *((value, "must be a string") for value in (1, 1.5, True, [], {}, ["x"])),
    *(
        (f"{c}a@{c}b", f"holds U+{ord(c):04X}: {FORBIDDEN}")
        for c in "\0\t\n\x1c\x1f\x7f\ud800\udbff\udfff"
    ),
]
NO_EMAIL = "must be an e-mail address: something, one @, something, no white space"
NO_EMAILS = ["a", "@", "abc", "@bc", "ab@", "a@b@c", "a@b, c@d", *(f"a@b{c}c" for c in BLANKS[5:])]
NO_BOOLEAN = "must be true, false or null"
# Field, value sent, what is wrong with it
BAD = [
    *((field.name, value, words) for field in STRINGS for value, words in NO_TEXTS),
    *((f.name, "a@" + "b" * f.longest, f"must be at most {f.longest} characters") for f in STRINGS),
    *((name, value, "required") for name in REQUIRED for value in (None, "", " \u2003")),
    *(("email", value, NO_EMAIL) for value in NO_EMAILS),
    *(("first_in_family", value, NO_BOOLEAN) for value in ("true", "", 1, 0, 0.0, [], {})),
]


def push_value(server, name, value, escaped=True):
    """Push one student, with this value of a field or of cohort_id."""
    values = {**FULL, "cohort_id": "values", name: value}
    body = json.dumps(batch(values, cohort_id=values["cohort_id"]), ensure_ascii=escaped).encode()
    return server.exchange(request_of(body)).document


def test_the_fields_are_those_of_the_contract():
    """The one test that a new field breaks."""
    fields = (sis_sync.COHORT, *sis_sync.FIELDS)
    assert [f"{f.name} {f.required} {f.longest} {f.kind.__name__} {f.listed}" for f in fields] == [
        "cohort_id True 64 str cohorts",
        "student_id_ext True 255 str ",
        "email True 254 str ",
        "first_name False 255 str ",
        "last_name False 255 str ",
        "program_code False 255 str programs",
        "campus_name False 255 str campuses",
        "first_in_family False 255 bool ",
    ]


@pytest.mark.parametrize("name, value, stored", GOOD)
def test_a_good_value_is_kept(server, name, value, stored):
    last = "FROM entries JOIN rosters USING (roster_id) ORDER BY seen_in DESC LIMIT 1"
    for escaped in (True, False):
        assert push_value(server, name, value, escaped)["errors"] == []
        assert server.rows(f"SELECT {name} {last}") == [(stored,)]


@pytest.mark.parametrize("name, value, words", BAD)
def test_a_bad_value_is_reported_and_not_kept(server, name, value, words):
    document = push_value(server, name, value)
    (fault,) = document.get("errors", [document])  # a bad cohort_id refuses the whole batch
    message = fault.get("message") or fault["detail"].partition("; the body has")[0]
    code = "missing_field" if words == "required" else "invalid_field"
    assert (fault["field"], fault["error"], message) == (name, code, f"{name} {words}")
    assert not document.get("imported")


PATTERNS = ["", "F|M|X", "[^,]*", "(?i)f|m", ".*\n?", "a?", sis_sync.EMAIL]
PIECES = [*"FMXfmab@, \u200d\u2028\x80", "", "", "é", "\x00", "\x1c", "\n", "\ud800", "x" * 9]


@pytest.mark.parametrize("seed", range(20))
def test_the_short_cut_is_taken_where_the_loop_would_change_nothing(monkeypatch, seed):
    """Whatever the field, and nowhere else. There it says what the loop says."""
    pick = random.Random(seed)
    institution = sis_sync.Institution("", (), {"programs": {"F", "fa"}})
    loop = sis_sync.check_rows
    monkeypatch.setattr(sis_sync, "check_rows", lambda *_: "the loop decides")
    for _ in range(300):
        kind = pick.choice((str, bool, int))
        field = sis_sync.Field("new", "", None, kind, pick.random() < 0.5)
        if kind is str:
            listed = pick.choice(("", "programs"))
            field = field._replace(longest=9, pattern=pick.choice(PATTERNS), listed=listed)
        monkeypatch.setattr(sis_sync, "FIELDS", (sis_sync.KEY, field))
        students = []
        for _ in range(pick.randrange(4)):
            value = pick.choice([None, True, False, 0, 1, 9, 9.0, 2**63, []])
            if kind is str and pick.random() < 0.9:
                value = "".join(pick.choices(PIECES, k=pick.randrange(3)))
            students.append({"student_id_ext": f"U{pick.randrange(30)}", "new": value})
        expected = loop(students, institution)
        if expected != ([tuple(student.values()) for student in students], []):
            expected = "the loop decides"
        assert repr(sis_sync.check_quickly(students, institution)) == repr(expected)


# Rows: a bad one does not sink the batch.

NO_EMAIL_SENT = {"field": "email", "error": "missing_field", "message": "email required"}
NO_OBJECT = {"field": None, "error": "not_an_object", "message": "a student must be an object"}


def faults_in(answer):
    return ["{row} {field} {error}".format_map(error) for error in answer.document["errors"]]


def test_the_answer_is_that_of_the_contract(service):
    handle(service, batch(*map(student, range(20))))
    students = [*map(student, range(40)), {"student_id_ext": "U99"}, "no object"]
    students[:5] = [student(row, first_name="Changed") for row in range(5)]
    assert handle(service, batch(*students)).document == {
        "received": 42,
        "imported": 40,
        "details": {"imported": 20, "updated": 20, "unchanged": 15},
        "errors": [{"row": 41, **NO_EMAIL_SENT}, {"row": 42, **NO_OBJECT}],
        "ignored": [],
    }


def test_every_fault_of_a_row_has_its_error(server):
    answer = server.push(
        student(1, program_code="BUSI", campus_name="Sunshine Coast"),
        student(2, program_code="busi"),
        student(3, campus_name="Moon"),
        student(4, program_code=" NURS "),
        student(4),
        {},
        student(5, email=1),
        *(None, 1, "U1", [], [student()], True),
        secret=OTHER_SECRET,
    )
    assert answer.document["imported"] == 2
    assert faults_in(answer) == [
        "2 program_code unknown_program",
        "3 campus_name unknown_campus",
        "5 student_id_ext duplicate_student",
        "6 student_id_ext missing_field",
        "7 email invalid_field",
        *(f"{row} None not_an_object" for row in range(8, 14)),
    ]
    described = OPENAPI["components"]["schemas"]["RowError"]["properties"]["error"]["enum"]
    assert {error["error"] for error in answer.document["errors"]} == set(described)


def test_the_first_of_two_rows_with_one_id_counts(service):
    ids = ["U1", "U2", "U 1", " U1 ", "U2"]
    rows = [student(row, student_id_ext=each) for row, each in enumerate(ids)]
    rows[1]["email"] = "bad"
    assert faults_in(handle(service, batch(*rows))) == [
        "2 email invalid_field",
        "4 student_id_ext duplicate_student",
        "5 student_id_ext duplicate_student",
    ]
    query = "SELECT student_id_ext, email FROM entries ORDER BY entry_id"
    assert rows_of(service, query) == [("U1", "u0@example.edu"), ("U 1", "u2@example.edu")]


def test_a_row_is_reported_once_for_its_first_fault_in_the_order_of_the_table(service):
    row = {name: [] for name in FULL}
    for name, value in FULL.items():
        assert faults_in(handle(service, batch(row))) == [f"1 {name} invalid_field"]
        row[name] = value


def test_no_message_repeats_what_a_row_said(service):
    rows = [{**FULL, name: "private-\0"} for name in FULL]
    answer = handle(service, batch(*rows, {**FULL, "email": "private"}, {"last_name": "private"}))
    assert len(answer.document["errors"]) == len(FULL) + 2
    assert not re.search(b"private|Connor", answer.body)


def test_with_bad_rows_reject_one_bad_row_refuses_the_batch(server):
    secret = "sis_the-strict-ones-secret"
    count = "SELECT count(*) FROM syncs WHERE institution = 'strict'"
    answer = server.push(student(more=1), {"student_id_ext": "U2"}, secret=secret)
    assert (answer.status, answer.code) == (400, "invalid_rows")
    assert answer.document["errors"] == [{"row": 2, **NO_EMAIL_SENT}]
    assert "ignored" not in answer.document
    assert server.rows(count) == [(0,)]
    assert server.push(student(), secret=secret).status == 200
    assert server.rows(count) == [(1,)]


def test_an_empty_batch_is_a_sync(service):
    answer = handle(service, batch())
    assert (answer.status, answer.document["received"]) == (200, 0)
    assert rows_of(service, "SELECT received FROM syncs") == [(0,)]


def test_keys_that_are_no_field_are_ignored_at_both_levels_and_named(server):
    rows = [{"": 1, "students": {}}, {"firstName": [], "cohort_id": "x"}, {"email": 1, "Zoë": 1}]
    answer = server.push("no object", *(student(**row) for row in rows), extra={"deep": 1}, email=1)
    names = ["", "Zoë", "cohort_id", "email", "extra", "firstName", "students"]
    assert answer.document["ignored"] == names
    assert server.push(FULL).document["ignored"] == []


def test_of_the_ignored_keys_20_are_named_each_once_and_cut_at_64_characters(server):
    def ignored(*keys):
        return server.push(*(student(**{key: 1}) for key in keys)).document["ignored"]

    many = [f"{number:02}" + "ü" * 70 for number in range(30)]
    assert ignored(*reversed(many)) == [key[:64] for key in many[:20]]
    assert ignored("x" * 70, "x" * 71) == ["x" * 64]
    assert ignored("\ud800", "\0\n") == ["\0\n", "\ud800"]


# The roster: a row is the whole record, and a sync is all or nothing.


def rows_of(service, query):
    path = service.database.path
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(query).fetchall()


def test_a_field_left_out_is_null_as_a_row_is_the_whole_record(service):
    handle(service, batch(FULL))
    sparse = {"student_id_ext": FULL["student_id_ext"], "email": "new@b"}
    details = handle(service, batch(sparse)).document["details"]
    assert details == {"imported": 0, "updated": 1, "unchanged": 0}
    rows = rows_of(service, f"SELECT {', '.join(FULL)} FROM roster")
    assert rows == [(*sparse.values(), *[None] * 5)]


def test_an_entry_knows_when_it_was_created_changed_and_seen(service, monkeypatch):
    for now, *students in (
        (100, student(1), student(2)),
        (110, student(1), student(2, first_name="New")),
        (120, student(2, first_name="New")),
        (90, student(1, first_name="By a clock that is behind")),
    ):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        handle(service, batch(*students))
    query = "SELECT created_at, changed_at, seen_at FROM entries ORDER BY entry_id"
    assert rows_of(service, query) == [(100, 100, 90), (100, 110, 120)]


def test_two_cohorts_have_an_entry_each_and_never_disturb_each_other(service):
    for cohort_id in "ab":
        answer = handle(service, batch(student(first_name=cohort_id), cohort_id=cohort_id))
        assert answer.document["details"]["imported"] == 1
    query = "SELECT cohort_id, first_name FROM roster ORDER BY cohort_id"
    assert rows_of(service, query) == [("a", "a"), ("b", "b")]


def test_two_institutions_never_touch_each_other(server):
    for secret, new in ((SECRET, 1), (OTHER_SECRET, 1), (SECRET, 0)):
        answer = server.push(student("both", first_name=secret), secret=secret)
        details = {"imported": new, "updated": 1 - new, "unchanged": 1 - new}
        assert answer.document["details"] == details
    query = "SELECT institution, first_name FROM roster WHERE student_id_ext = 'Uboth'"
    assert set(server.rows(query)) == {("example", SECRET), ("listed", OTHER_SECRET)}


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_are_exact_whatever_is_pushed(service, seed):
    """Against a dict, over random batches of which some rows are known, changed, the same."""
    pick = random.Random(seed)
    known = {}
    for _ in range(12):
        cohort_id = pick.choice("ab")
        sent = {}
        for number in pick.sample(range(900), pick.choice((0, 1, 300, 700))):
            name, first = pick.choice((None, "A")), pick.choice((None, True, False))
            sent[cohort_id, number] = student(number, first_name=name, first_in_family=first)
        answer = handle(service, batch(*sent.values(), cohort_id=cohort_id))
        assert answer.document["details"] == {
            "imported": len(sent.keys() - known),
            "updated": len(sent.keys() & known),
            "unchanged": sum(known.get(key) == row for key, row in sent.items()),
        }
        known.update(sent)
    assert rows_of(service, "SELECT count(*) FROM entries") == [(len(known),)]


def test_a_sync_leaves_a_line_in_the_history_with_its_first_100_errors(service):
    handle(service, batch(student(), *[{}] * 150), peer="192.0.2.7")
    columns = "institution, cohort_id, client, received, new, updated, unchanged, rejected, errors"
    ((*line, errors),) = rows_of(service, f"SELECT {columns} FROM syncs")
    assert line == ["example", "2026", "192.0.2.7", 151, 1, 0, 0, 150]
    assert [error["row"] for error in json.loads(errors)] == list(range(2, 102))


# ---------------------------------------------------------------------------------------------
# Section 3: errors
# ---------------------------------------------------------------------------------------------

# What is not JSON, and the words for it.
NESTED = "the body is nested too deep"
GZIP = "; it looks like gzip: unpack it, or name it in the header Content-Encoding"
LONG = "a number of more than 1000 digits"
WIDE = "; it looks like UTF-16 or UTF-32: make it UTF-8"
LINES = "; it looks like a document in each line: make it one, with all in students"
NOT_JSON = {
    b"": "the body is empty",
    b"{'cohort_id': 1}": "the body is not JSON",
    b'{"cohort_id": "20': "the body is not JSON",
    b"{} {}": "the body is not JSON",
    b"{}" + b"\n" * 8_000_000 + b"x": "the body is not JSON",
    b'{"x": "\x01"}': "the body is not JSON",
    b'{"x": NaN}': "NaN is not JSON",
    b'{"x": Infinity}': "Infinity is not JSON",
    b'{"x": -Infinity}': "-Infinity is not JSON",
    b'{"x": "Zo\xeb"}': "the body is not UTF-8 at byte 9",
    b'{"x": "\xed\xa0\x80"}': "the body is not UTF-8 at byte 7",
    b"{\0}\0": WIDE,
    b"\0{\0}": WIDE,
    b"\xff\xfe{\0}\0": WIDE,
    b"\0\0\xfe\xff\0\0\0{\0\0\0}": WIDE,
    b'{"x": 1}\n{"x": 2}\n': LINES,
    b'{"x": 1}\r\n{"x": 2}': LINES,
    gzip.compress(b"{}"): GZIP,
    b'{"x": ' + b"9" * 1001 + b"}": LONG,
    b'{"x": 0.' + b"9" * 9000 + b"}": LONG,
    b'{"x": 1e' + b"9" * 9000 + b"}": LONG,
    b"[" * 8_388_608: NESTED,
    b"[" * 30_000 + b"]" * 30_000: NESTED,
    b'{"":' * 30_000: NESTED,
    b'[{"":' * 1_000_000: NESTED,
    b'{"cohort_id": "2026", "students": ' + b"[" * 40_000: NESTED,
}


@pytest.mark.parametrize("body, words", NOT_JSON.items(), ids=itertools.count())
def test_what_is_not_json_is_malformed_json(server, body, words):
    answer = server.exchange(request_of(body))
    assert (answer.status, answer.code) == (400, "malformed_json")
    assert words in answer.document["detail"]


@posix
def test_deep_nesting_does_not_outgrow_a_small_stack(tmp_path):
    # With -W error nothing of it makes Python warn the operator, either.
    words = ("sh", "-c", 'ulimit -s 1024; exec "$0" -W error "$@"', *COMMAND)
    with running(tmp_path, command=words) as process:
        for body in (b"[" * 9000, b"[" * 9000 + b"]" * 9000, b'{"":' * 9000):
            assert process.exchange(request_of(body)).status == 400
        assert process.push(student()).document["imported"] == 1


def test_a_byte_order_mark_is_no_fault(server):
    body = json.dumps(batch(cohort_id=" " + "ü" * 64 + " ")).encode()
    assert server.exchange(request_of(b"\xef\xbb\xbf" + body)).status == 200


def test_of_two_equal_keys_the_last_one_counts(server):
    body = b'{"cohort_id": 1, "cohort_id": "1", "students": []}'
    assert server.exchange(request_of(body)).status == 200


# Faults of the body.
NOT_AN_OBJECT = "invalid_field of body: the body must be an object"
NO_COHORT = "missing_field of cohort_id: cohort_id required; the body has: "
BAD_COHORT = "invalid_field of cohort_id: cohort_id "
NO_STUDENTS = "missing_field of students: students required; the body has: "
NO_ARRAY = "invalid_field of students: students must be an array, also for a single student"
BODY_FAULTS = {
    b"[]": NOT_AN_OBJECT,
    b'"x"': NOT_AN_OBJECT,
    b"null": NOT_AN_OBJECT,
    b"1": NOT_AN_OBJECT,
    b'{"students": [], "O\'Brien": 1}': NO_COHORT + "O'Brien, students",
    b'{"Cohort ID": "1", "data": {"cohort_id": "1"}}': NO_COHORT + "Cohort ID, data",
    b'{"cohort_id": null}': NO_COHORT + "cohort_id",
    b'{"cohort_id": " \\t"}': NO_COHORT + "cohort_id",
    b'{"cohort_id": 2026}': BAD_COHORT + "must be a string",
    b'{"cohort_id": "%065d"}' % 1: BAD_COHORT + "must be at most 64 characters",
    b'{"cohort_id": "a\\u0000b"}': f"{BAD_COHORT}holds U+0000: {FORBIDDEN}",
    b'{"cohort_id": "a\\ud83db"}': f"{BAD_COHORT}holds U+D83D: {FORBIDDEN}",
    b'{"cohort_id": "1"}': NO_STUDENTS + "cohort_id",
    b'{"cohort_id": "1", "students": null}': NO_STUDENTS + "cohort_id, students",
    b'{"cohort_id": "1", "students": {}}': NO_ARRAY,
    b'{"cohort_id": "1", "students": "x"}': NO_ARRAY,
}


@pytest.mark.parametrize("body, words", BODY_FAULTS.items())
def test_a_fault_of_the_body_names_its_field(server, body, words):
    answer = server.exchange(request_of(body))
    assert answer.status == 400
    assert "{error} of {field}: {detail}".format(**answer.document) == words


def test_the_keys_that_a_fault_names_are_few_and_short(server):
    numbers = [str(number) for number in range(100, 200)]
    detail = server.exchange(request_of(dict.fromkeys(numbers))).document["detail"]
    assert detail.endswith(f"; the body has: {', '.join(numbers[:20])}")
    detail = server.exchange(request_of({"z" * 99: 1})).document["detail"]
    assert detail.endswith(f"; the body has: {'z' * 64}")


def test_of_a_value_that_is_not_listed_it_says_that_capitals_count(server):
    answer = server.push(cohort_id="2O26", secret=OTHER_SECRET)
    words = "{} is not in the institution's list of {}; capitals count"
    assert (answer.status, answer.code) == (400, "unknown_cohort")
    assert answer.document["detail"] == words.format("cohort_id", "cohorts")
    rows = student(1, program_code="busi"), student(2, campus_name="SUNSHINE coast")
    errors = server.push(*rows, secret=OTHER_SECRET).document["errors"]
    assert [error["message"] for error in errors] == [
        words.format("program_code", "programs"),
        words.format("campus_name", "campuses"),
    ]


# Who is calling.
UNKNOWN = {
    None: "no Authorization header",
    "": "no Authorization header",
    f"Basic {SECRET}": "another scheme than Bearer",
    SECRET: "another scheme than Bearer",
    f"Bearer {SECRET[:-1]}": "no such secret",
    f"Bearer {SECRET}x": "no such secret",
    f"Bearer x{SECRET[1:]}": "no such secret",
    f"Bearer {SECRET} {SECRET}": "no such secret",
    f"Bearer {SECRET}, Bearer {SECRET}": "no such secret",
    "Bearer Zo\xeb": "no such secret",
    f"Bearer {'x' * 4000}": "no such secret",
    f"Bearer {hashlib.sha256(SECRET.encode()).hexdigest()}": "no such secret",
}


@pytest.mark.parametrize("authorization, reason", UNKNOWN.items())
def test_a_stranger_gets_one_answer_and_the_log_the_reason(server, authorization, reason):
    answer = server.exchange(head_of(Authorization=authorization, Content_Length=0))
    words = "no valid secret; send the header Authorization: Bearer <institution secret>"
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.document == {"error": "unauthorized", "detail": words}
    line = server.wait_for(answer.headers["x-request-id"]).string
    assert line.endswith(f"unauthorized ({reason})")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
def test_the_scheme_is_known_in_any_case(server, scheme):
    assert server.exchange(request_of(batch(), Authorization=f"{scheme} {SECRET}")).status == 200


def test_a_secret_beyond_ascii_works(service, tmp_path):
    secret = "ein-langes-Geheimnis-ß-王"
    service.config = configuration_of(tmp_path, SIS_SYNC_SECRET=secret)
    sent = secret.encode().decode("latin-1")
    assert handle(service, batch(), authorization=f"Bearer {sent}").status == 200


def test_a_secret_is_compared_with_every_digest_whatever_came_before(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    digests = [hashlib.sha256(word).digest() for word in (b"a", b"b", b"c")]
    institutions = [
        sis_sync.Institution("one", digests[:2], {}),
        sis_sync.Institution("other", digests[2:], {}),
    ]
    for header in ("Bearer a", "Bearer c", "Bearer wrong", "Basic a", ""):
        compared.clear()
        sis_sync.institution_of(header, institutions)
        assert compared == digests


# Paths and methods.
PATHS = ["/", "/api/sis/sync/", "/api/sis", "//api/sis/sync", "/API/SIS/SYNC", "/api/sis/sync%20"]


@pytest.mark.parametrize("path", PATHS)
def test_another_path_is_not_found(server, path):
    answer = server.exchange(head_of("POST", path))
    assert (answer.status, answer.code) == (404, "not_found")
    assert answer.document["detail"].endswith("; a push goes to /api/sis/sync")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_the_endpoint_allows_post_alone(server, method):
    answer = server.exchange(head_of(method))
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json"])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_the_other_paths_allow_get_and_head(server, method, path):
    answer = server.exchange(head_of(method, path))
    assert (answer.code, answer.headers["allow"]) == ("method_not_allowed", "GET, HEAD")


@pytest.mark.parametrize("method", ["post", "Get", "BREW", "PROPFIND"])
def test_of_an_unknown_method_it_says_that_they_are_in_capitals(server, method):
    answer = server.exchange(head_of(method))
    words = "unknown method (methods are in capitals), or unknown transfer coding"
    assert (answer.status, answer.code) == (501, "not_implemented")
    assert answer.document["detail"] == words


def test_a_refusal_of_the_headers_knows_the_request_line(server):
    assert server.exchange(b"HEAD / HTTP/1.1\r\nX: %017000d\r\n\r\n" % 1).status == 431  # no body
    server.exchange(b"GET /old HTTP/1.0\r\nX: y\r\n folded\r\n\r\n")
    server.wait_for("GET /old 400 .*malformed_request: a header must be")


# Media type and coding.
MEDIA_TYPES = {
    None: 200,
    "application/json": 200,
    "Application/JSON; charset=UTF-8": 200,
    "application/json;odata=verbose": 200,
    'application/json; Charset="utf-8"; v=1': 200,
    "application/json; charset=iso-8859-1": 415,
    "application/json;v=1;charset=utf-16": 415,
    "text/json": 415,
    "": 415,
    "application/x-www-form-urlencoded": 415,
    "application/json, text/plain": 415,
}


@pytest.mark.parametrize("media_type, status", MEDIA_TYPES.items())
def test_the_media_type_must_be_json(server, media_type, status):
    assert server.exchange(request_of(batch(), Content_Type=media_type)).status == status


CODINGS = {
    "": 200,
    "identity": 200,
    "gzip": 200,
    "GZIP": 200,
    "x-gzip": 200,
    "br": 415,
    "deflate": 415,
    "zstd": 415,
    "gzip, gzip": 415,
}


@pytest.mark.parametrize("coding, status", CODINGS.items())
def test_the_content_coding_must_be_gzip_or_none(server, coding, status):
    body = json.dumps(batch()).encode()
    body = gzip.compress(body) if "gzip" in coding.lower() else body
    assert server.exchange(request_of(body, Content_Encoding=coding)).status == status


def test_a_415_says_what_is_taken_and_the_log_what_came(server):
    answer = server.exchange(request_of(b"", Content_Type="text/\xeb", Content_Encoding="br"))
    words = "Content-Type must be application/json in UTF-8; Content-Encoding gzip or identity"
    assert answer.document == {"error": "unsupported_media_type", "detail": words}
    assert answer.headers["accept"] == "application/json"
    assert answer.headers["accept-encoding"] == "gzip, identity"
    server.wait_for(r"415 .*\(Content-Type text/\\xeb, Content-Encoding br\)")


# Gzip. Its header may hold the name of a file.
ZIPPED = gzip.compress(b"{}")
WITH_A_NAME = ZIPPED[:3] + b"\x08" + ZIPPED[4:10] + b"n" * (1 << 20)
GZIPS = [
    (ZIPPED, "missing_field"),
    (WITH_A_NAME + b"\0" + ZIPPED[10:], "missing_field"),
    (WITH_A_NAME, "malformed_json"),
    (WITH_A_NAME * 9, "batch_too_large"),
    (ZIPPED[:10] + b"\0\0\0\xff\xff" * (2 << 20), "batch_too_large"),
    (gzip.compress(b" " * (64 << 20)), "batch_too_large"),
    (b"no gzip", "malformed_json"),
    (ZIPPED[:-1], "malformed_json"),
    (ZIPPED[:-8] + b"12345678", "malformed_json"),
    (ZIPPED + b"\0", "malformed_json"),
    (ZIPPED + bytes(1 << 20), "malformed_json"),
    (ZIPPED * 2, "malformed_json"),
    (gzip.compress(b"") * 50_000, "malformed_json"),
]


@pytest.mark.parametrize("data, code", GZIPS, ids=itertools.count())
def test_gzip_is_one_member_and_no_longer_than_the_cap(service, data, code):
    # The length is wrong, as if there was none: only what arrives counts.
    assert handle(service, data, content_encoding="gzip", content_length="0").code == code


def test_gzip_that_comes_byte_by_byte_is_read_as_well(server):
    data = gzip.compress(json.dumps(batch(student())).encode())
    answer = server.exchange(request_of(data, Content_Encoding="gzip"), size=1)
    assert answer.document["imported"] == 1


# Too much.
def test_5000_students_are_taken_and_5001_are_too_many(server):
    students = [student(f"many{number}") for number in range(5001)]
    assert server.push(*students[1:]).document["imported"] == 5000
    answer = server.push(*students)
    words = "5001 students in one request; at most 5000"
    assert answer.status == 413
    assert answer.document == {"error": "batch_too_large", "detail": words, "max": 5000}


@pytest.mark.parametrize("length", [8_388_609, 10**13, 10**900])
def test_more_bytes_than_the_cap_are_refused_before_they_are_sent(server, length):
    answer = server.exchange(head_of(Content_Length=length))
    assert answer.status == 413
    assert answer.document == {
        "error": "batch_too_large",
        "detail": "too many bytes: send smaller batches",
        "max": 5000,
        "max_bytes": 8_388_608,
    }


def test_as_many_bytes_as_the_cap_are_read(server):
    assert server.exchange(request_of(b"{}".rjust(8_388_608))).code == "missing_field"


# What one request costs is in line with its bytes.
def peak_during(function):
    """The most bytes that Python had allocated meanwhile."""
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tree", [b"[],", b'{"":{}},', b"[[[[]]]],"])
def test_a_tree_is_refused_before_it_grows(service, tree):
    data = b'{"cohort_id": "1", "students": [' + tree * (8_388_000 // len(tree)) + b"1]}"
    answers = []
    peak = peak_during(lambda: answers.append(handle(service, data)))
    words = "far more objects and arrays than 5000 students have"
    assert answers[0].status == 413
    assert answers[0].document == {"error": "batch_too_large", "detail": words, "max": 5000}
    assert peak < 4 * len(data)  # as a document it would take 40 times as much


def test_a_gzip_bomb_is_not_unpacked(service):
    bomb = gzip.compress(bytes(64 << 20))
    assert peak_during(lambda: handle(service, bomb, content_encoding="gzip")) < 32 << 20


MORE = [
    {"first_name": "{first_name}", "last_name": "{{last}} [sic]"},
    {"address": {"lines": ["x", "y"]}, "phones": [{"home": "1"}, {"mobile": "2"}]},
]


@pytest.mark.parametrize("more", MORE)
def test_a_full_batch_with_a_few_brackets_in_each_row_is_no_tree(service, more):
    students = [student(number, **more) for number in range(5000)]
    assert handle(service, batch(*students)).document["imported"] == 5000


def test_a_text_of_many_words_takes_memory_in_line_with_its_bytes():
    students = [student(first_name="ab " * 200_000 + "ab")]
    assert peak_during(lambda: sis_sync.check_quickly(students, sis_sync.ANYONE)) < 4_000_000


def test_numbers_of_one_hash_take_work_in_line_with_their_number():
    compared = []

    class Number(int):  # as the multiples of 2**61 - 1
        __hash__ = lambda self: 0
        __eq__ = lambda self, other: compared.append(other) or self is other

    students = [student(number, last_name=Number(number)) for number in range(1000)]
    assert len(sis_sync.check_quickly(students, sis_sync.ANYONE)[1]) == 1000
    assert len(compared) < 20_000


# Faults of ours.
def test_what_nobody_foresaw_is_a_500_without_a_word_of_the_cause(service):
    with logged() as lines:
        answer = handle(service, batch(), content_encoding=7)  # has no method `lower`
    number = answer.headers["x-request-id"]
    words = "a fault of the server; its log says more"
    assert answer.status == 500
    assert answer.document == {"error": "server_error", "detail": words, "request_id": number}
    assert lines[0].startswith(f"{number} server_error AttributeError (content_encoding:")
    assert "lower" not in lines[0]


def test_who_waits_too_long_for_its_turn_is_told_that_the_server_is_busy(service, monkeypatch):
    monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.01)
    with service.turn:
        answer = handle(service, batch())
    assert (answer.status, answer.code) == (503, "busy")
    assert answer.headers["retry-after"] == str(answer.document["retry_after"]) == "1"
    assert handle(service, batch()).status == 200


# The order of the checks.
def test_without_any_secret_set_even_a_stranger_gets_503(service, tmp_path):
    service.config = configuration_of(tmp_path, SIS_SYNC_SECRET="")
    for authorization in (f"Bearer {SECRET}", None):
        answer = handle(service, authorization=authorization, content_length="9" * 10)
        assert (answer.status, answer.code) == (503, "not_configured")
    assert handle(service, method="GET").status == 405
    assert handle(service, method="GET", path="/healthz").status == 200


MENDS = {
    "malformed_request": {},
    "not_implemented": {"Transfer_Encoding": None},
    "not_found": {"method": "PUT"},
    "method_not_allowed": {"target": SYNC},
    "unauthorized": {"method": "POST"},
    "batch_too_large": {"secret": SECRET},
    "unsupported_media_type": {"Content_Length": 1000},
}


def test_the_first_fault_is_answered_and_no_body_is_waited_for(server):
    request = {
        "method": "BREW",
        "target": "/nowhere",
        "secret": "wrong",
        "Content_Length": 10**9,
        "Transfer_Encoding": "chunked",
        "Content_Type": "text/plain",
    }
    for code, mend in MENDS.items():
        request.update(mend)
        assert server.exchange(head_of(**request)).code == code


def test_json_comes_before_fields_and_these_before_the_count_and_the_rows(server):
    rows = [1] * 5001
    assert server.exchange(request_of(b'{"students": 1')).code == "malformed_json"
    assert server.push(*rows, cohort_id=1).code == "invalid_field"
    assert server.push(*rows).code == "batch_too_large"
    assert server.push(*rows[1:]).document["errors"][0]["error"] == "not_an_object"


# The rate limit.
@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets it."""
    clock = argparse.Namespace(now=12345.678)
    monkeypatch.setattr(sis_sync, "monotonic", lambda: clock.now)
    return clock


def test_a_burst_of_20_is_granted_and_then_one_every_3_seconds(service, tmp_path, clock):
    service.config = configuration_of(tmp_path)
    answers = [handle(service, batch()) for _ in range(23)]
    assert [answer.status for answer in answers] == [200] * 20 + [429] * 3
    for answer in answers[20:]:
        assert (answer.code, answer.document["retry_after"]) == ("rate_limited", 3)
        assert answer.headers["retry-after"] == "3"
    for seconds, wait in ((1.5, 2), (1.49, 1)):
        clock.now += seconds
        answer = handle(service, batch())
        assert answer.document["retry_after"] == int(answer.headers["retry-after"]) == wait
    clock.now += 0.01
    assert [handle(service, batch()).status for _ in range(2)] == [200, 429]
    assert handle(service, method="GET", path="/healthz").status == 200


@pytest.mark.parametrize("per_minute", [1, 3, 7, 20, 49, 60, 999])
@pytest.mark.parametrize("start", [0.1, 1 / 3, 1e5 + 1 / 3, 1e9 + 1 / 7])
def test_a_bucket_holds_a_minute_and_a_retry_after_the_seconds_told_succeeds(
    clock, start, per_minute
):
    clock.now = start
    limiter = sis_sync.RateLimiter()
    for _ in range(2):
        clock.now += 100
        waits = [limiter.take("a", per_minute) for _ in range(per_minute + 1)]
        assert waits == [0] * per_minute + [-(-60 // per_minute)]
    for _ in range(100):
        wait = limiter.take("a", per_minute)
        clock.now += wait
        assert wait == 0 or limiter.take("a", per_minute) == 0


def test_an_institution_and_the_strangers_of_an_address_have_a_bucket_each(service, clock):
    service.config.requests_per_minute = 2

    def statuses(**options):
        return [handle(service, batch(), **options).status for _ in range(3)]

    assert statuses(authorization="Bearer x") == [401, 401, 429]
    assert statuses() == [200, 200, 429]
    assert statuses(peer="192.0.2.2") == [429] * 3  # the institution, wherever it is
    assert statuses(peer="192.0.2.2", authorization=None) == [401, 401, 429]


PEERS = [
    ("192.0.2.1", "192.0.2.2", 401),
    ("2001:db8::1", "2001:db8::ffff:1", 429),
    ("2001:db8::1", "2001:db8:0:1::1", 401),
    ("::ffff:192.0.2.1", "192.0.2.1", 429),
    ("fe80::1%eth0", "fe80::2%eth1", 429),
]


@pytest.mark.parametrize("one, other, status", PEERS)
def test_an_ipv6_client_is_its_64(service, clock, one, other, status):
    service.config.requests_per_minute = 1
    assert handle(service, authorization=None, peer=one).status == 401
    assert handle(service, authorization=None, peer=other).status == status


def test_the_buckets_are_bounded_and_the_one_least_recently_used_goes_first(clock, monkeypatch):
    monkeypatch.setattr(sis_sync, "MAX_BUCKETS", 100)
    limiter = sis_sync.RateLimiter()
    empty = range(10, 100)
    for bucket in (*empty, *range(10), *list(empty) * 19, "one more"):
        limiter.take(bucket, 20)
    assert all(limiter.take(bucket, 20) for bucket in empty)
    for bucket in range(1000):
        limiter.take(bucket, 20)
        assert len(limiter._buckets) <= 100


# ---------------------------------------------------------------------------------------------
# Section 4: other routes
# ---------------------------------------------------------------------------------------------


def test_healthz_says_ok_without_a_secret(server):
    answer = server.exchange(head_of("GET", "/healthz?probe=1", secret=None))
    assert (answer.status, answer.document) == (200, {"status": "ok"})


def test_a_database_that_is_gone_is_unhealthy(service):
    os.rename(service.database.path, f"{service.database.path}.away")
    answer = handle(service, method="GET", path="/healthz")
    assert (answer.status, answer.code) == (503, "unhealthy")


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json"])
def test_head_is_get_without_the_body(server, path):
    answer = server.exchange(head_of("HEAD", path))
    assert answer.status == 200
    assert answer.headers["content-length"] == server.get(path).headers["content-length"]


# The OpenAPI document.
SCHEMAS = OPENAPI["components"]["schemas"]
PARTS = []  # every object in it
json.loads(json.dumps(OPENAPI), object_hook=lambda part: PARTS.append(part) or part)
OPERATIONS = {
    path: operation for path, methods in OPENAPI["paths"].items() for operation in methods.values()
}
ERROR_ANSWERS = [
    (path, status, answer)
    for path, operation in OPERATIONS.items()
    for status, answer in operation["responses"].items()
    if status != "200"
]


def test_the_document_needs_no_secret_and_has_the_configured_limit(server, service, tmp_path):
    answer = server.exchange(head_of("GET", "/openapi.json", secret=None))
    assert answer.document == OPENAPI
    service.config = configuration_of(tmp_path, ini_of(limits="max_students = 7"))
    document = handle(service, method="GET", path="/openapi.json").document
    assert document["components"]["schemas"]["Batch"]["properties"]["students"]["maxItems"] == 7


def test_it_says_what_it_is_and_where():
    assert OPENAPI["openapi"] == "3.1.0"
    assert OPENAPI["info"]["version"] == sis_sync.__version__
    assert OPENAPI["servers"] == [{"url": "/"}]
    for words in ("gzip", "chunked", "The whole record", "requests_per_minute", "were not stored"):
        assert words in json.dumps(OPENAPI)


def test_each_operation_has_a_name_and_says_whether_it_needs_the_secret():
    assert OPENAPI["components"]["securitySchemes"]["secret"]["scheme"] == "bearer"
    found = [(each["operationId"], each["security"]) for each in OPERATIONS.values()]
    assert found == [("sync", [{"secret": []}]), ("health", []), ("openapi", [])]


ON_ANY_PATH = {
    "400": "malformed_request",
    "404": "not_found",
    "405": "method_not_allowed",
    "408": "request_timeout",
    "414": "request_too_large",
    "431": "request_too_large",
    "500": "server_error",
    "501": "not_implemented",
    "503": "busy",
    "505": "http_version_not_supported",
}
ABOUT_JSON = "invalid_field invalid_rows malformed_json malformed_request missing_field"
ON_A_PATH = {
    SYNC: {
        "400": f"{ABOUT_JSON} unknown_cohort",
        "401": "unauthorized",
        "413": "batch_too_large",
        "415": "unsupported_media_type",
        "429": "rate_limited",
        "503": "busy not_configured",
    },
    "/healthz": {"503": "busy unhealthy"},
    "/openapi.json": {},
}


def test_every_status_and_code_that_a_path_can_answer_is_described():
    found = {path: {} for path in ON_A_PATH}
    for path, status, answer in ERROR_ANSWERS:
        schema = answer["content"]["application/json"]["schema"]
        codes = schema["properties"]["error"]["enum"]
        found[path][status] = " ".join(codes)
        assert {example["error"] for example in schema["examples"]} == set(codes)
    assert found == {path: {**ON_ANY_PATH, **codes} for path, codes in ON_A_PATH.items()}


def test_what_an_error_always_carries_is_required():
    required = {"413": {"max"}, "429": {"retry_after"}, "500": {"request_id"}}
    for path, status, answer in ERROR_ANSWERS:
        names = {"error", "detail"} | required.get(status, set())
        if status == "503" and path == "/openapi.json":  # where it is always busy
            names.add("retry_after")
        assert set(answer["content"]["application/json"]["schema"]["required"]) == names


HEADERS = {
    "401": {"WWW-Authenticate"},
    "405": {"Allow"},
    "415": {"Accept", "Accept-Encoding"},
    "429": {"Retry-After"},
    "503": {"Retry-After"},
}


def test_the_headers_of_each_answer_are_named():
    for _, status, answer in ERROR_ANSWERS:
        assert set(answer["headers"]) == {"X-Request-ID"} | HEADERS.get(status, set())
        if "Retry-After" in answer["headers"]:
            assert answer["headers"]["Retry-After"] == {"schema": {"type": "integer"}}


def test_the_examples_keep_to_their_schemas():
    assert SCHEMAS["Batch"]["examples"] == [batch(FULL)]
    for part in PARTS:
        for example in part.get("examples", []):
            assert not faults_by(part, example)
        if "example" in part:
            assert not faults_by(part["schema"], part["example"])


def test_the_example_of_the_answer_adds_up():
    example = OPERATIONS[SYNC]["responses"]["200"]["content"]["application/json"]["example"]
    details = example["details"]
    assert example["received"] == example["imported"] + len(example["errors"])
    assert example["imported"] == details["imported"] + details["updated"]
    assert details["unchanged"] <= details["updated"]
    for wrong in ({"received": "2"}, {"details": {}}, {"errors": [1]}, {"ignored": [1]}):
        assert faults_by(SCHEMAS["Result"], {**example, **wrong})


def test_every_reference_leads_somewhere_and_every_schema_is_referred_to():
    references = {part["$ref"] for part in PARTS if "$ref" in part}
    assert references == {f"#/components/schemas/{name}" for name in SCHEMAS}


PLAIN_PATTERNS = sorted({part["pattern"] for part in PARTS if "pattern" in part})


@pytest.mark.parametrize("pattern", PLAIN_PATTERNS)
def test_the_patterns_are_plain(pattern):
    """Classes, groups, repetition: Go, JavaScript and Rust mean by these what Python does."""
    letters = re.sub(r"\[(?:[^\]\\\ud800-\udfff\u2028\u2029]|\\x[0-9a-f]{2})+\]", "c", pattern)
    assert re.fullmatch(r"\^(?:c|@|\+|\*|\?|\(\?:|\))+\$", letters)


@pytest.mark.parametrize("pattern", PLAIN_PATTERNS)
@pytest.mark.parametrize("text", ["a " * 5000, "a" * 10_000, "a@" * 5000, "@" * 10_000])
def test_no_pattern_tries_a_text_in_more_than_one_way(pattern, text):
    assert not re.search(pattern, f"{text}\x01")  # or this would not come to an end


WRONG = [
    [],
    {},
    {"cohort_id": "1"},
    {"students": []},
    batch(1),
    batch({}),
    batch(cohort_id=""),
    batch(cohort_id="x" * 65),
    batch(cohort_id=1),
    batch(student(email="a@b@c")),
    batch(student(first_in_family=1)),
    batch(student(last_name=["x"])),
    batch(*[FULL] * 5001),
]


def test_the_judge_finds_what_is_wrong():
    assert not faults_by(SCHEMAS["Batch"], batch(student(first_name="", last_name=None)))
    for document in WRONG:
        assert faults_by(SCHEMAS["Batch"], document)
    fault = {"row": 1, "field": None, "error": "not_an_object", "message": ""}
    assert not faults_by(SCHEMAS["RowError"], fault)
    assert faults_by(SCHEMAS["RowError"], {**fault, "row": 0})
    assert faults_by(SCHEMAS["RowError"], {**fault, "error": "unheard_of"})


# White space of every kind, and what only some take for it; control characters; all planes.
CHARACTERS = (
    f"ab@@.{sis_sync.WHITE_SPACE}\0\x1b\x1c\x1f\x7f\x80\x9f\xad\u180e\u200b\u200d\u2060\ufeff"
    '\uffff\u0301é王\U0001f393\U0010ffff"\\{}[]^$|'
)
ODD = (None, True, False, 0, 1.0, 1.5, -1, 2**63, "", " ", "null", [], ["a@b"], {}, {"a": 1})


def some_text(pick, field):
    size = pick.choice((0, 1, 3, 64, 65, field.longest, field.longest + 1))
    text = "".join(pick.choices("abcdé王\U0001f393", k=size))
    for character in pick.choices(CHARACTERS, k=pick.choice((0, 0, 1, 3))):
        place = pick.choice((0, size // 2, len(text)))
        text = text[:place] + character + text[place:]
    if field.pattern and pick.random() < 0.8:
        text = f"{text[: size // 2]}@{text[size // 2 :]}"
    return text


def some_body(pick):
    """A good one, but for a value or two."""
    row = {field.name: field.example for field in sis_sync.FIELDS}
    body = batch(row)
    for field in pick.choices((sis_sync.COHORT, *sis_sync.FIELDS), k=pick.choice((1, 1, 2))):
        value = some_text(pick, field) if pick.random() < 0.6 else pick.choice(ODD)
        (body if field is sis_sync.COHORT else row)[field.name] = value
    row.pop(pick.choice((*row, *range(40))), None)
    return pick.choice([body] * 20 + [row, {**body, "students": row}, batch(1), batch(), [body]])


def kept_of(body):
    """The rows as the server stores them, or None if it refuses any."""
    document = sis_sync.parse_json(bytearray(json.dumps(body).encode()))
    try:
        checked = sis_sync.check_batch(document, sis_sync.ANYONE, 5000)
    except sis_sync.Refusal:
        return None
    names = [field.name for field in sis_sync.FIELDS]
    return None if checked.errors else [dict(zip(names, record)) for record in checked.records]


def test_what_the_document_accepts_is_accepted_and_what_is_kept_is_as_described(monkeypatch):
    # In JSON Schema 9.0 is an integer.
    year = sis_sync.Field("year_level", "the year", 9.0, kind=int, required=True)
    monkeypatch.setattr(sis_sync, "FIELDS", (*sis_sync.FIELDS, year))
    schema = sis_sync.openapi_document(5000)["components"]["schemas"]["Student"]
    monkeypatch.setitem(SCHEMAS, "Student", schema)
    pick = random.Random(11)
    verdicts = collections.Counter()
    for _ in range(5000):
        body = some_body(pick)
        kept = kept_of(body)
        described = not faults_by(SCHEMAS["Batch"], body)
        verdicts[described, kept is not None] += 1
        assert not described or kept is not None, body
        for row in kept or []:
            del row["first_in_family"]  # which is stored as a number
            assert not faults_by(schema, row), row
    # Some only the server accepts, because it strips them.
    assert min(verdicts[True, True], verdicts[False, True], verdicts[False, False]) > 100, verdicts


# ---------------------------------------------------------------------------------------------
# Section 5: configuration
# ---------------------------------------------------------------------------------------------

# Values: the key, a good text, its value, and bad texts with "|" between.
TEXTS = [
    ("host", "::1", "::1", "localhost||1.2.3|127.0.0.1%x"),
    ("port", "0", 0, "-1|65536|+5|8_0|٥|80 80||80.0"),
    ("database", "100%s a;b#c.db", "100%s a;b#c.db", "|a\nb|a\0b"),
    ("tls_certificate", "", "", "a\nb|a\0b"),
    ("tls_key", "", "", "a\nb|a\0b"),
    ("trusted_proxies", "", [], "10.0.0.1/8|proxy.example|10.0.0.0/99"),
    ("requests_per_minute", "1", 1, "0|-1|100001|many"),
    ("max_students", "100", 100, "0|100001|1e3"),
    ("max_body_bytes", "1024", 1024, "1023|1073741825|8 MiB"),
    ("max_connections", "1", 1, "0|10001"),
    ("max_connections_per_client", "1", 1, "0|10001"),
    ("request_timeout", "3600", 3600, "0|3601|0.5"),
    ("secrets", f"sha256:{0:064}", (bytes(32),), "hunter2|env:|env:A-B|env:A, env:B|file:a b"),
    ("cohorts", "1;2, 3#4\n5 6", {"1;2", "3#4", "5 6"}, "2026\nbad_rows = reject"),
    ("programs", "a,,b,", {"a", "b"}, "BUSI\n= NURS"),
    ("campuses", "", set(), "a = b"),
    ("bad_rows", "reject", "reject", "Reject|no|"),
]
SETTINGS = {
    key: (section.replace("institution", "institution a"), default, read.words)
    for section, keys in sis_sync.SETTINGS.items()
    for key, (default, read) in keys.items()
}


def setting(key, text):
    """A file with one setting, and how a fault of it begins."""
    section = SETTINGS[key][0]
    indented = text.replace("\n", "\n  ")
    return f"[{section}]\n{key} = {indented}\n", f"[{section}] {key}: "


def test_the_table_has_every_setting():
    assert [key for key, *_ in TEXTS] == list(SETTINGS)


@pytest.mark.parametrize("key, text, value, _", TEXTS)
def test_a_setting_is_read(tmp_path, key, text, value, _):
    configuration = configuration_of(tmp_path, setting(key, text)[0])
    (institution,) = configuration.institutions
    found = {**vars(configuration), **institution._asdict(), **institution.lists}
    found.update(host=str(configuration.host), secrets=institution.digests)
    found["database"] = pathlib.Path(configuration.database).name
    assert found[key] == value


@pytest.mark.parametrize("key, _, __, bad", TEXTS)
def test_a_bad_value_is_refused_with_what_was_found_and_what_is_allowed(tmp_path, key, _, __, bad):
    for text in bad.split("|"):
        ini, start = setting(key, text)
        found = "something else" if key == "secrets" else repr(text)
        assert faults_of(tmp_path, ini) == [f"{start}found {found}; must be {SETTINGS[key][2]}"]


@pytest.mark.parametrize("comment", [" ; comment", " # comment", "\t#", " ;"])
def test_a_comment_behind_a_value_is_refused(tmp_path, comment):
    for key, text, *_ in TEXTS:
        for value in ((text or "x") + comment, comment):
            ini, start = setting(key, value)
            assert f"{start}a comment must stand on a line of its own" in faults_of(tmp_path, ini)


def test_a_comment_on_a_line_of_its_own_is_no_part_of_a_value(tmp_path):
    text = "\ufeff# a\n[institution a]\n; b = c\ncohorts = 1,\n  # d\n  2\n# e\n"
    assert configuration_of(tmp_path, text).institutions[0].lists["cohorts"] == {"1", "2"}


def test_the_file_as_shipped_is_the_table_of_settings(tmp_path):
    text = (HERE / "sis_sync.ini").read_text("utf-8")
    explained = re.findall(r"^# \S.*\n(\w+) = ?(.*)", text, re.MULTILINE)
    assert explained == [(key, default) for key, (_, default, _) in SETTINGS.items()]
    with logged() as lines:
        shipped = configuration_of(tmp_path, text.replace("example", "default"))
    assert lines == ["institution default: secrets set: 1"]
    assert shipped == configuration_of(tmp_path)


def test_without_a_file_the_module_runs_with_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(sis_sync, "DEFAULT_FILE", tmp_path / "sis_sync.ini")
    monkeypatch.setenv("SIS_SYNC_SECRET", SECRET)
    configuration = sis_sync.load_configuration(argparse.Namespace(config=None))
    assert vars(configuration) == {**vars(configuration_of(tmp_path)), "file": ""}
    assert configuration.database == str(tmp_path / "sis_sync.db")


# Faults of the file: nothing is shown that may be a secret.

FAULTY = """
[sever]
[server]
prot = 1
port = x
[institution UPPER]
[institution a]
secret = x
c2VjcmV0LW9mLW1pbmU==
[limits]
[institution b] cohorts = 2026
[DEFAULT]
"""
FAULTS = """
[server] prot: unknown key; did you mean port?
[server] port: found 'x'; must be a whole number from 0 to 65535
[limits] what is before the =: unknown key
[sever]: unknown section; did you mean server? (NAME: a-z, 0-9, -)
[institution UPPER]: unknown section; did you mean institution NAME? (NAME: a-z, 0-9, -)
[institution a] secret: unknown key; did you mean secrets?
[institution a] what is before the =: unknown key
[DEFAULT]: unknown section (NAME: a-z, 0-9, -)
"""


def test_all_faults_are_told_at_once_each_with_the_nearest_name(tmp_path):
    faults = "\n".join(["", *faults_of(tmp_path, FAULTY), ""])
    assert re.sub(r"; allowed: [^;(\n]*\w", "", faults) == FAULTS


@pytest.mark.parametrize(
    "text, line",
    [
        ("port = 1\n", 1),
        ("[institution a] secrets = c2VjcmV0\n", 1),
        ("[server]\n[limits] max_students\n", 2),
        ("[institution a]\nc2VjcmV0\n", 2),
        ("[limits]\n[limits]\n", 2),
        ("[institution a]\nc2VjcmV0==\nc2VjcmV0==\n", 3),
    ],
)
def test_what_is_no_ini_file_is_refused_by_its_line(tmp_path, text, line):
    words = "must be [section], or key = value below one, and each of them once"
    assert faults_of(tmp_path, text) == [f"line {line}: {words}"]


SECTIONS = "allowed: server, limits, institution NAME (NAME: a-z, 0-9, -)"
KEYS = "allowed: secrets, cohorts, programs, campuses, bad_rows"
UTF_16 = "; it looks like UTF-16 or UTF-32: make it UTF-8"


@pytest.mark.parametrize(
    "data, words",
    [
        (None, "cannot be read: No such file or directory"),
        ("# Zoë".encode("latin-1"), "is not UTF-8"),
        ("[server]".encode("utf-16"), f"is not UTF-8{UTF_16}"),
        (b"[x]", f"[x]: unknown section; {SECTIONS}"),
        (b"[institution a]\nx = 1", f"[institution a] x: unknown key; {KEYS}"),
    ],
)
def test_a_fault_of_the_file_names_the_file(tmp_path, data, words):
    path = tmp_path / "test.ini"
    if data:
        path.write_bytes(data)
    result = Result(1, f"{path}: {words}\n", "")
    assert run("check", SIS_SYNC_CONFIG=str(path)) == result
    assert run("--config", path, "check", SIS_SYNC_CONFIG="other.ini") == result


# Secrets


def secrets_ini(secrets):
    return f"[institution a]\nsecrets = {secrets}\n"


@pytest.mark.parametrize("secret", ["x" * 1024, "Geheiß-und-länger", "!~" * 10])
def test_secrets_come_from_the_environment_files_and_digests(tmp_path, secret):
    (tmp_path / "secret.txt").write_bytes(f"\ufeff{secret}\r\n".encode())
    digests = [hashlib.sha256(each.encode()) for each in (SECRET, secret, "third")]
    text = f"env:SIS_SYNC_SECRET file:secret.txt\n  sha256:{digests[2].hexdigest().upper()}"
    (institution,) = configuration_of(tmp_path, secrets_ini(text)).institutions
    assert institution.digests == tuple(each.digest() for each in digests)


REFUSED = (
    "must be the secret alone, a word of at most 1024 bytes (a sha256: line goes into sis_sync.ini "
    "itself, after secrets =)"
)


@pytest.mark.parametrize(
    "secret",
    [
        "two words of a secret",
        "a-tab\tin-the-secret-here",
        "a-control\x7fcharacter-in-it",
        "line-one-of-the-secret\nline-two",
        "x" * 1025,
        f"SHA256:{0:064}",
    ],
)
def test_what_can_be_no_secret_is_refused_and_not_shown(tmp_path, monkeypatch, secret):
    path = tmp_path / "secret.txt"
    path.write_text(secret)
    monkeypatch.setenv("MINE", secret)
    faults = faults_of(tmp_path, secrets_ini("env:MINE file:secret.txt"))
    places = ("env:MINE", path)
    assert faults == [f"[institution a] secrets: {place}: {REFUSED}" for place in places]


def test_a_secret_in_utf_16_is_told_so(tmp_path):
    (tmp_path / "secret.txt").write_text(SECRET, "utf-16")
    (fault,) = faults_of(tmp_path, secrets_ini("file:secret.txt"))
    assert UTF_16 in fault


@pytest.mark.parametrize("secret, owner", [(SECRET, "institution a"), ("", "nobody: it is empty")])
def test_the_secret_of_two_institutions_or_of_nobody_is_refused(tmp_path, secret, owner):
    digest = hashlib.sha256(secret.encode()).hexdigest()
    text = f"[institution a]\n[institution b]\nsecrets = sha256:{digest}\n"
    words = f"[institution b] secrets: one of them is also that of {owner}"
    assert faults_of(tmp_path, text) == [words]


# Warnings


def warnings_of(folder, text, **environment):
    with logged() as lines:
        configuration_of(folder, text, **environment)
    return [line[9:] for line in lines if line.startswith("warning: ")]


SHORT = "env:SIS_SYNC_SECRET: shorter than 16 characters"
QUOTED = "env:SIS_SYNC_SECRET: the secret still has its quotes"


@pytest.mark.parametrize(
    "host, secret, warning",
    [
        ("127.0.0.1", "x" * 16, None),
        ("::1", "x" * 15, SHORT),
        ("::1", f"'{SECRET}'", QUOTED),
        ("::1", f'"{SECRET}"', QUOTED),
        ("::", SECRET, "[server] host: :: is open to others, without TLS"),
        ("192.0.2.1", SECRET, "[server] host: 192.0.2.1 is open to others, without TLS"),
    ],
)
def test_what_is_allowed_but_hardly_meant_is_a_warning(tmp_path, host, secret, warning):
    warnings = warnings_of(tmp_path, f"[server]\nhost = {host}\n", SIS_SYNC_SECRET=secret)
    assert warnings == [warning] * bool(warning)


def test_a_secret_that_is_not_set_is_a_warning(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    warnings = warnings_of(tmp_path, secrets_ini("env:NOT_SET file:missing.txt file:empty.txt"))
    for words in ("env:NOT_SET: missing or", "[Errno 2] No such file", f"{empty}: missing or"):
        assert warnings.pop(0).startswith(f"[institution a] secrets: not set: {words}")
    assert warnings == ["no institution has a secret set: every push will be answered 503"]


# Proxies


@pytest.mark.parametrize(
    "peer, forwarded, client",
    [
        ("192.0.2.1", "198.51.100.1", "192.0.2.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("::ffff:10.0.0.1", "2001:db8::1", "2001:db8::1"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.1, 10.1.0.2", "198.51.100.1"),
        ("10.0.0.1", "10.1.0.3,10.1.0.2", "10.1.0.3"),
        ("10.0.0.1", "1.1.1.1, junk", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.9:5123", "203.0.113.9"),
        ("10.0.0.1", "[2001:db8::1]:80", "2001:db8::1"),
        ("10.0.0.1", "[2001:db8::1]", "2001:db8::1"),
        ("", "1.1.1.1", "-"),
    ],
)
def test_a_trusted_proxy_is_believed_as_far_as_it_wrote(tmp_path, peer, forwarded, client):
    text = "[server]\ntrusted_proxies = ::ffff:10.0.0.1, 10.1.0.0/16\n"
    proxies = configuration_of(tmp_path, text).trusted_proxies
    assert sis_sync.client_of(peer, forwarded, proxies) == client


# Reload


def hang_up(process, ini, words="Z reloaded"):
    process.log.clear()
    process.ini.write_text(ini)
    process.process.send_signal(signal.SIGHUP)
    process.wait_for(words)


@posix
def test_sighup_reads_secrets_lists_limits_and_proxies_again(tmp_path):
    with running(tmp_path, environment={"NEXT": OTHER_SECRET}) as process:
        institution = "[institution a]\nsecrets = env:NEXT\ncohorts = 2026\n"
        hang_up(process, ini_of("trusted_proxies = 127.0.0.1", "max_students = 1", institution))
        assert process.push().status == 401
        assert process.push(student(), secret=OTHER_SECRET).status == 200
        assert process.push(cohort_id="2027", secret=OTHER_SECRET).code == "unknown_cohort"
        assert process.push({}, {}, secret=OTHER_SECRET).document["max"] == 1
        process.exchange(head_of("GET", "/healthz", X_Forwarded_For="198.51.100.1"))
        process.wait_for(" 198.51.100.1 - GET /healthz 200 ")


@posix
def test_no_file_however_odd_changes_a_running_server(tmp_path):
    odd = ["[limits]\nmax_students = none\n", "[limits]\n[limits]\n", "\0", "no ini"]
    odd += [secrets_ini("file:a\0b"), "[server]\ntls_key = a\0b\n"]
    with running(tmp_path) as process:
        for text in odd:
            hang_up(process, text, f"Z not reloaded: {process.ini}: ")
        assert process.push(student()).status == 200


def test_a_file_that_is_new_is_read_and_one_that_is_gone_changes_nothing(tmp_path, monkeypatch):
    file = tmp_path / "sis_sync.ini"
    monkeypatch.setattr(sis_sync, "DEFAULT_FILE", file)
    arguments = argparse.Namespace(config=None)
    service = sis_sync.Service(sis_sync.load_configuration(arguments))
    file.write_text("[limits]\nmax_students = 7\n")
    sis_sync.reload(service, arguments)
    file.unlink()
    with logged() as lines:
        sis_sync.reload(service, arguments)
    assert lines[-1] == f"not reloaded: {file} is not there any more"
    assert service.config.max_students == 7


@posix
def test_a_request_in_flight_finishes_under_the_old_configuration(tmp_path):
    data = request_of(batch(student(1), student(2)))
    with running(tmp_path) as process, process.connect() as connection:
        connection.sendall(data[:-20])
        process.get("/healthz")  # answered, so the connection before it has been accepted
        hang_up(process, ini_of(limits="max_students = 1"))
        connection.sendall(data[-20:])
        assert parse_answer(read_to_end(connection)).status == 200
        assert process.exchange(data).status == 413


@posix
@cpython  # PyPy does not see that it is ignored
def test_a_sighup_that_was_ignored_at_the_start_stays_ignored(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with running(tmp_path, preexec_fn=ignore) as process:
        process.process.send_signal(signal.SIGHUP)
        assert process.stop() == 0  # of two signals it heeds the first one first
        assert "reloaded" not in "\n".join(process.log)


@posix
def test_a_server_on_a_terminal_ends_when_the_terminal_closes(tmp_path):
    import fcntl
    import pty
    import termios

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = pty.openpty()
    options = {"stdin": theirs, "start_new_session": True, "preexec_fn": take_terminal}
    with running(tmp_path, **options) as process:
        os.close(theirs)
        hang_up(process, ini_of())  # a signal that somebody sent still reloads
        os.close(ours)
        assert process.process.wait(20) == 0


# Certificates


def test_certificates_and_keys_that_cannot_serve_are_refused(tmp_path):
    make_certificate(tmp_path / "server.pem")
    make_certificate(tmp_path / "issuer.pem")
    chain = [(tmp_path / name).read_text() for name in ("issuer.pem", "server.pem")]
    (tmp_path / "issuer-first.pem").write_text("".join(chain))
    (tmp_path / "text").write_text("text")
    words = "openssl pkey -aes128 -passout pass:x -in server.key -out encrypted.key"
    subprocess.run(words.split(), cwd=tmp_path, check=True, capture_output=True)
    for certificate, key in [
        ("server.pem", ""),
        ("server.pem", "missing.key"),
        ("server.pem", "text"),
        ("server.pem", "issuer.key"),
        ("server.pem", "encrypted.key"),
        ("server.pem", "server.pem"),
        ("issuer-first.pem", "server.key"),
        ("server.key", "server.key"),
        ("text", "server.key"),
        ("missing.pem", "server.key"),
    ]:
        ini = f"[server]\ntls_certificate = {certificate}\ntls_key = {key}\n"
        (fault,) = faults_of(tmp_path, ini)
        words = f"{tmp_path / certificate}: must be certificates in PEM, the server's own before"
        assert fault.startswith(f"[server] tls_certificate: {words}")


@pytest.mark.parametrize(
    "days, passed, warned",
    [
        ("730", 715, 0),
        ("730", 717, 1),
        ("730", 731, 1),
        ("10000", 715, 0),  # from 2050 on a date in a certificate is written in another way
        ("10000", 9987, 1),
    ],
)
def test_a_certificate_of_less_than_14_days_is_a_warning(
    tmp_path, monkeypatch, days, passed, warned
):
    make_certificate(tmp_path / "server.pem", "-days", days)
    now = time.time() + passed * 86400
    monkeypatch.setattr(time, "time", lambda: now)
    ini = tls_ini(tmp_path / "server.pem").replace("[server]", "[server]\nhost = ::")
    warnings = warnings_of(tmp_path, ini)
    words = "[server] tls_certificate: its last day is "
    assert [line[:-8] for line in warnings] == [words] * warned


# ---------------------------------------------------------------------------------------------
# Section 6: the server
# ---------------------------------------------------------------------------------------------

GET = head_of("GET", "/healthz")
CHUNKED = head_of(Transfer_Encoding="chunked")
ROWS = [*map(student, range(300)), *[{}] * 3000]
BODY = json.dumps(batch(*ROWS)).encode()
SMALL = json.dumps(batch(student())).encode()


def cut(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


def chunked(pieces, extension=b"", trailer=b""):
    chunks = [b"%X%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join([*chunks, b"0\r\n", trailer, b"\r\n"])


def settle(process):
    """What was sent before has been read and logged when this returns, as five later requests have
    been answered. Returns how long the log is."""
    for _ in range(5):
        answer = process.get("/healthz")
    process.wait_for(answer.headers["x-request-id"])
    return len(process.log)


def speak_tls(process, certificate, **options):
    """From now on, process.connect gives connections with TLS."""
    context = ssl.create_default_context(cafile=str(certificate))
    context.set_ciphers("ALL:@SECLEVEL=0")  # otherwise it would not speak old versions
    for name, value in options.items():
        setattr(context, name, value)
    process.connect = lambda *source: context.wrap_socket(
        Process.connect(process, *source), server_hostname="localhost"
    )


@contextlib.contextmanager
def running_tls(folder, certificate, limits=FAST):
    with running(folder, tls_ini(certificate, limits)) as process:
        speak_tls(process, certificate)
        yield process


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory, certificate):
    with running_tls(tmp_path_factory.mktemp("tls"), certificate) as process:
        yield process


@pytest.fixture(params=["server", "tls_server"])
def either(request):
    return request.getfixturevalue(request.param)


def in_shell(words):
    return ("sh", "-c", f'{words}; exec "$@"', "sh", *COMMAND)


# Strict HTTP: what is sent, by what the answer must be.

BAD_LENGTHS = ["+5", "-1", "5_000", "0x5", "5, 5", "", "5 5", "\xb2", "1e3", "9" * 4001]
BAD_CODINGS = ["gzip", "chunked, gzip", "xchunked", "chunked;a=b", "chunked,", "", "\xa0chunked"]
UNKNOWN_CODINGS = ["gzip, chunked", "chunked, chunked", "identity,\tCHUNKED", ", chunked"]
BAD_HOSTS = [
    "%zz",
    "%4",
    "a b",
    "[::::]",
    "[::1",
    "::1",
    "[1]",
    "[]",
    "[::1]x",
    "x:abc",
    "x:80:80",
    "u@x",
    "x/y",
    "a,b",
    "\xe9",
    '"x"',
]
BAD_TARGETS = [
    "healthz",
    "/healthz#x",
    "/\xe9",
    "*",
    "http://",
    "http:///x",
    "http://:80/",
    "http://u:p@x/",
    "http://x:abc/",
    "http://x:80:80/",
    "http://%zz/",
    "http://[::::]/",
    "http://[::1/",
    "ftp://x/",
]
BAD_CHUNKS = [
    b"x\r\n",
    b"\r\n",
    b"-1\r\n",
    b"+5\r\nabcde\r\n",
    b"0x5\r\nabcde\r\n",
    b"5_0\r\n",
    b" 5\r\nabcde\r\n",
    b"1" * 17 + b"\r\n",
    b"5\nabcde\r\n",
    b"5\r\nabcdef\r\n",
    b"5\r\nabcde0\r\n\r\n",
    b"5;" + b"x" * 300 + b"\r\nabcde\r\n",
    b"2\r\n{}\r\n0\r\nbad trailer\r\n\r\n",
    b"2\r\n{}\r\n0\r\n folded\r\n\r\n",
]
EXTENSIONS = [
    b";a",
    b";a=b",
    b" ; a = b",
    b";\ta",
    b';a="b c;d"',
    b';a="\\"\xe9"',
    b';a=""',
    b";a;b=c",
]
BAD_EXTENSIONS = (
    b'5 |5\t|5;|5; |5;;a|5;a=|5;a=;b|5;a=\xb7"b c"|5;a="b|5;a="b"c|5;a b|5;a="\x01"|5;a="\\"|5;\xe9'
    b"|5;a=\xe9|5 a|5;=b|5;a\x01"
).split(b"|")
HTTP = {
    "200 ": {
        "HTTP/1.0 without a Host": b"GET /healthz HTTP/1.0\r\n\r\n",
        "an empty line first": b"\r\n" + GET,
        "a name in any case, a port": b"GET /healthz HTTP/1.1\r\nhOsT:localhost:8080\r\n\r\n",
        "an IPv6 address": b"GET /healthz HTTP/1.1\r\nHost:\t[::1]:80 \r\n\r\n",
        "an empty Host": b"GET /healthz HTTP/1.1\r\nHost: \r\n\r\n",
        "an absolute target": b"GET http://example.edu/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        "an absolute target with a query": b"GET HTTPS://example.edu:1/healthz?a=b HTTP/1.1\r\nHost: x\r\n\r\n",
        "an empty value": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX:\r\n\r\n",
        "Latin-1 in a value": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: caf\xe9 \t \r\n\r\n",
        "another Expect": b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: something\r\n\r\n",
        **{f"chunk{text}": CHUNKED + chunked(cut(SMALL, 9), text) for text in EXTENSIONS},
    },
    "404 not_found": {
        "an absolute target without a path": b"GET http://example.edu HTTP/1.1\r\nHost: x\r\n\r\n"
    },
    "400 malformed_json": {"no body at all": head_of()},
    "400 malformed_request": {
        "no Host": b"GET / HTTP/1.1\r\n\r\n",
        "two Hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        "two different Hosts": b"GET / HTTP/1.1\r\nHost: x\r\nhost: y\r\n\r\n",
        "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n",
        "two spaces": b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
        "a tab for a space": b"GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "a trailing space": b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n",
        "a leading space": b" GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "NEL and NBSP for spaces": b"GET\x85/\xa0HTTP/1.1\r\nHost: x\r\n\r\n",
        "ESC in the request line": b"GET /\x1b[31m HTTP/1.1\r\nHost: x\r\n\r\n",
        "a method that is no token": b"G(T / HTTP/1.1\r\nHost: x\r\n\r\n",
        "one word": b"GET\r\n\r\n",
        "no version": b"GET /healthz\r\n\r\n",
        "HTTP/0.9, and then nothing": b"GET /healthz\r\n",
        "lower-case http": b"GET / http/1.1\r\nHost: x\r\n\r\n",
        "HTTP/1.10": b"GET / HTTP/1.10\r\nHost: x\r\n\r\n",
        "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        "CONNECT": b"CONNECT example.edu:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        "two empty lines first": b"\r\n\r\n" + GET,
        "LF alone": b"GET / HTTP/1.1\nHost: x\n\n",
        "LF alone in a header": b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n",
        "a bare CR": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\rContent-Length: 5\r\n\r\n",
        "two CRs": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\r\n\r\n",
        "NUL": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
        "DEL": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x7fb\r\n\r\n",
        "a folded header": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
        "folded by a tab": b"GET / HTTP/1.1\r\nHost: x\r\n\ty\r\n\r\n",
        "a space before the colon": b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\n",
        "no colon": b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization\r\n\r\n",
        "no name": b"GET / HTTP/1.1\r\nHost: x\r\n: x\r\n\r\n",
        "a name beyond ASCII": b"GET / HTTP/1.1\r\nHost: x\r\nX\xe9: x\r\n\r\n",
        "two lengths": head_of(Content_Length="5\r\nContent-Length: 5"),
        "length and coding": head_of(Content_Length=5, Transfer_Encoding="chunked"),
        "chunked in HTTP/1.0": head_of(version="HTTP/1.0", Transfer_Encoding="chunked"),
        **{f"length {text[:9]}": head_of(Content_Length=text) for text in BAD_LENGTHS},
        **{f"coding {text}": head_of(Transfer_Encoding=text) for text in BAD_CODINGS},
        **{f"host {text}": head_of(Host=text) for text in BAD_HOSTS},
        **{f"target {text}": head_of("GET", text) for text in BAD_TARGETS},
        **{f"chunk {data[:9]}": CHUNKED + data for data in BAD_CHUNKS},
        **{f"chunk {data}": CHUNKED + data + b"\r\n{}   \r\n0\r\n\r\n" for data in BAD_EXTENSIONS},
    },
    "413 batch_too_large": {
        "chunks over the cap": CHUNKED + chunked([b" " * 65536] * 144),
        "a chunk that only promises": CHUNKED + b"FFFFFFFFFF\r\n",
    },
    "414 request_too_large": {
        "a long request line": head_of("GET", "/" + "x" * 9000),
        "an endless request line": b"x" * 20000,
    },
    "431 request_too_large": {
        "long headers": head_of(X="x" * 17000),
        "many headers": head_of(X="\r\nX: x" * 101),
        "endless headers": b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 5000,
        "many trailers": CHUNKED + chunked([b"{}"], b"", b"X: x\r\n" * 101),
    },
    "501 not_implemented": {
        "two codings": head_of(Transfer_Encoding="chunked\r\nTransfer-Encoding: chunked"),
        **{f"coding {text}": head_of(Transfer_Encoding=text) for text in UNKNOWN_CODINGS},
    },
    "505 http_version_not_supported": {
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: x\r\n\r\n",
    },
}


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param(data, expected, id=name)
        for expected, rows in HTTP.items()
        for name, data in rows.items()
    ],
)
def test_http_is_read_strictly_and_the_same_in_pieces(server, data, expected):
    for size in (len(data), 1 + len(data) // 1000):
        answer = server.exchange(data, size)
        assert f"{answer.status} {answer.code}" == expected


def test_http_1_0_is_answered_as_such(server):
    with server.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.0 200 OK\r\n")


def test_nothing_that_follows_a_request_is_taken_for_another(server):
    for data in (
        GET,
        head_of(secret=None, Content_Length=5),
        head_of("GET", "/healthz", Content_Length=3),
        head_of(Content_Length=5, Transfer_Encoding="chunked") + b"0\r\n\r\n",
        request_of(batch()),
        CHUNKED + chunked([b"{}"]),
    ):
        server.exchange(data + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
    settle(server)
    assert not any("/smuggled" in line for line in server.log)


# Bodies


@pytest.mark.parametrize("coding", ["identity", "gzip"])
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_a_body_in_chunks_of_any_size_with_extensions_and_a_trailer_is_read(either, coding, size):
    body = gzip.compress(BODY) if coding == "gzip" else BODY
    data = chunked(cut(body, size), b';name="value"', b"X-Checksum: 1\r\n")
    answer = either.exchange(head_of(Transfer_Encoding="Chunked", Content_Encoding=coding) + data)
    assert (answer.document["imported"], len(answer.document["errors"])) == (300, 3000)


@pytest.mark.parametrize("more", [gzip.compress(b" "), b"\0" * 10, b"x"], ids=range(3))
def test_anything_behind_a_gzip_member_is_refused(server, more):
    answer = server.exchange(request_of(gzip.compress(BODY) + more, Content_Encoding="gzip"))
    assert answer.code == "malformed_json" and "something follows" in answer.document["detail"]


@pytest.mark.parametrize("coding, pack", [("identity", bytes), ("gzip", gzip.compress)])
def test_a_push_byte_by_byte_is_the_same_push(either, coding, pack):
    data = request_of(pack(SMALL), Content_Encoding=coding)
    assert either.exchange(data, 1).document["imported"] == 1


def test_json_that_is_sent_token_by_token_is_read(either):
    students = [{**FULL, "student_id_ext": f"U{number}"} for number in range(5000)]
    tokens = [token.encode() for token in json.JSONEncoder().iterencode(batch(*students))]
    assert len(tokens) > 150_000
    assert either.exchange(CHUNKED + chunked(tokens)).document["imported"] == 5000


def test_millions_of_chunks_are_refused_before_they_cost_much(tmp_path):
    before = os.times()
    with running(tmp_path) as process:
        with process.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(CHUNKED + b"1\r\n \r\n" * 4_000_000)
        process.wait_for(" 400 .* more than 510,000 chunks")
        process.stop()
    after = os.times()
    assert sum(after[2:4]) - sum(before[2:4]) < 6  # seconds of CPU, of the server


def test_the_pieces_of_a_body_take_no_more_memory_than_the_body(service):
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none
    request = sis_sync.Request("192.0.2.1", service.config)
    request.body = (b"  " for _ in range(1 << 16))
    tracemalloc.start()
    assert len(sis_sync.read_body(request)) == 2 << 16
    assert tracemalloc.get_traced_memory()[1] < 8 << 16
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        request_of(SMALL)[:-1],
        CHUNKED + b"2\r\n{}\r\n",
        CHUNKED + b"2\r\n{",
        CHUNKED,
        GET[:-2],
        b"G",
    ],
)
def test_a_request_that_ends_too_early_is_malformed_and_stores_nothing(server, data):
    syncs = server.rows("SELECT count(*) FROM syncs")
    with server.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert parse_answer(read_to_end(connection)).code == "malformed_request"
    assert server.rows("SELECT count(*) FROM syncs") == syncs


# Early answers


def begin(process):
    """A connection whose request is in flight: its body, SMALL, is still to come."""
    connection = process.connect()
    connection.sendall(head_of(Content_Length=len(SMALL), Expect="100-Continue"))
    assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return connection


def finish(connection):
    connection.sendall(SMALL)
    return parse_answer(read_to_end(connection))


def test_100_continue_is_sent_when_the_body_is_wanted(either):
    with begin(either) as connection:
        assert finish(connection).status == 200


@pytest.mark.parametrize("secret, length, status", [("wrong", 5, 401), (SECRET, 10**9, 413)])
def test_100_continue_is_not_sent_when_the_answer_is_known(server, secret, length, status):
    data = head_of(secret=secret, Content_Length=length, Expect="100-continue")
    assert server.exchange(data).status == status


@pytest.mark.parametrize(
    "secret, length, status",
    [("wrong", 15 << 20, 401), (SECRET, 15 << 20, 413), ("wrong", 2 << 20, 401)],
)
def test_an_early_answer_reaches_a_client_that_is_busy_sending(either, secret, length, status):
    for _ in range(3):
        data = head_of(secret=secret, Content_Length=length) + b"x" * length
        assert either.exchange(data).status == status


@pytest.mark.parametrize("timeout, piece, pause", [(3600, b"x" * 65536, 0), (1, b"x", 0.01)])
def test_what_comes_after_an_answer_is_not_swallowed_for_ever(tmp_path, timeout, piece, pause):
    limits = FAST + f"max_body_bytes = 65536\nrequest_timeout = {timeout}"
    too_long = {"Content_Length": 1 << 40}
    starts = [GET, head_of(secret=None, **too_long), head_of(**too_long), b"x" * 9000]

    def flood(start):
        with process.connect() as connection, pytest.raises(ConnectionError):
            connection.sendall(start)
            for _ in range(1000):
                connection.sendall(piece)
                time.sleep(pause)

    with running(tmp_path, ini_of(limits=limits)) as process:
        pool = concurrent.futures.ThreadPoolExecutor()
        assert list(pool.map(flood, starts)) == [None] * 4


# Clocks


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    limits = FAST + "request_timeout = 1\nmax_students = 100000"
    with running(tmp_path_factory.mktemp("hasty"), ini_of(limits=limits)) as process:
        yield process


def trickle(process, start, piece):
    """Send a start, then a piece now and then, until the server has had enough of it."""
    with Process.connect(process) as connection, concurrent.futures.ThreadPoolExecutor() as pool:
        connection.sendall(start)
        answer = pool.submit(read_to_end, connection)
        with contextlib.suppress(ConnectionError):
            while not answer.done():
                connection.sendall(piece)
                concurrent.futures.wait([answer], 0.05)
        return answer.result()


def test_a_request_that_does_not_arrive_in_time_is_a_408(hasty):
    starts = [b"G", GET[:-2], head_of(Content_Length=1000), CHUNKED + b"FF;"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        silent = pool.map(lambda start: trickle(hasty, start, b""), starts)
        trickling = pool.map(lambda start: trickle(hasty, start, b"x"), starts)
        for data in (*silent, *trickling):
            assert parse_answer(data).code == "request_timeout"


def test_a_client_that_reads_its_answer_too_slowly_is_let_go(hasty):
    with hasty.connect() as connection:
        # The answer, of 10 MB, is more than the system buffers on both sides.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sendall(request_of(batch(*[{}] * 100_000)))
        while not hasty.log[-1].endswith("client gone"):
            assert connection.recv(10_000)
            time.sleep(0.01)


# Crowds


@contextlib.contextmanager
def idle(process, number, *sources):
    """So many connections that say nothing, from each of these addresses."""
    with contextlib.ExitStack() as stack:
        for source in number * (sources or ("127.0.0.1",)):
            stack.enter_context(Process.connect(process, source))
        yield


def is_busy(answer):
    return (answer.status, answer.code, answer.headers.get("retry-after")) == (503, "busy", "1")


def is_served_again(process):
    """Once the server has noticed that the others are gone."""
    for _ in range(1000):
        with process.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(GET)
            if b" 200 OK" in read_to_end(connection):
                return True
    return False


def test_past_the_connections_of_one_address_only_this_gets_busy(tmp_path):
    with running(tmp_path, ini_of(limits=FAST + "max_connections_per_client = 3")) as process:
        with idle(process, 3):
            assert is_busy(process.exchange(b""))
            assert process.exchange(GET, source="127.0.0.2").status == 200
        assert is_served_again(process)


def test_past_all_connections_everybody_gets_busy(tmp_path):
    with running(tmp_path, ini_of(limits=FAST + "max_connections = 3")) as process:
        with idle(process, 3):
            started = time.monotonic()
            assert is_busy(process.exchange(b"", source="127.0.0.2"))  # before it says a word
            assert time.monotonic() - started < 1.5
            for size in (10, 8 << 20):  # or while it is sending
                assert is_busy(process.exchange(request_of(b"x" * size)))
        assert is_served_again(process)


def test_a_trusted_proxy_is_not_one_client(tmp_path):
    ini = ini_of("trusted_proxies = 127.0.0.1", FAST + "max_connections_per_client = 2")
    with running(tmp_path, ini) as process, idle(process, 5):
        process.exchange(head_of("GET", "/healthz", X_Forwarded_For="192.0.2.9"))
        process.wait_for(r" 192\.0\.2\.9 - GET /healthz 200")


def burst(process, number):
    """The answers to so many requests that come at the same moment."""
    gate = threading.Barrier(number)

    def one(_):
        gate.wait()
        return process.get("/healthz")

    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


def test_a_burst_past_all_connections_is_answered_and_waits_for_nobody(tmp_path):
    limits = FAST + "max_connections = 8\nrequest_timeout = 3600"
    with running(tmp_path, ini_of(limits=limits)) as process, idle(process, 8):
        assert all(map(is_busy, burst(process, 300)))


@linux
def test_a_thousand_slow_connections_of_one_address_leave_another_served(tmp_path):
    starts = [b"", GET[:-2], request_of(SMALL)[:-5], head_of("GET", "/openapi.json")]
    with running(tmp_path) as process, contextlib.ExitStack() as stack:
        for number in range(1000):
            connection = stack.enter_context(process.connect("127.0.0.2"))
            with contextlib.suppress(ConnectionError):
                connection.sendall(starts[number % 4])
            if number % 50 == 0:
                assert process.get("/healthz").status == 200
        assert process.push(student()).status == 200
        # 32 that are served, 100 that are refused.
        assert len(os.listdir(f"/proc/{process.process.pid}/task")) < 140


# TLS


@pytest.mark.parametrize("data", [GET, request_of(SMALL), b"G", b"\0"], ids=range(4))
def test_http_on_a_tls_port_is_told_so(tls_server, data):
    with Process.connect(tls_server) as connection:
        connection.sendall(data)
        answer = parse_answer(read_to_end(connection))
    assert (answer.status, answer.document["detail"]) == (400, "this port speaks https, not http")


def test_https_on_a_plain_port_is_told_so(server):
    hello = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    answer = server.exchange(hello.read())
    assert (answer.status, answer.document["detail"]) == (400, "this port speaks http, not https")


def test_past_all_connections_the_answer_is_busy_over_tls_too(tmp_path, certificate):
    limits = FAST + "max_connections = 4\nrequest_timeout = 3600"
    with running_tls(tmp_path, certificate, limits) as process, idle(process, 4):
        assert is_busy(process.exchange(request_of(BODY)))
        assert all(map(is_busy, burst(process, 100)))


@pytest.mark.skipif(not ssl.HAS_TLSv1_1, reason="this Python has no TLS 1.1")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_older_than_tls_1_2_is_refused(tmp_path, certificate):
    with running_tls(tmp_path, certificate) as process:
        versions = ssl.TLSVersion
        speak_tls(
            process, certificate, minimum_version=versions.TLSv1, maximum_version=versions.TLSv1_1
        )
        with pytest.raises((ssl.SSLError, ConnectionError)):
            process.get("/healthz")
        speak_tls(process, certificate, maximum_version=versions.TLSv1_2)
        assert process.get("/healthz").status == 200


@pytest.mark.skipif(not hasattr(ssl, "OP_NO_RENEGOTIATION"), reason="this Python can't forbid it")
def test_a_client_may_not_renegotiate(tmp_path, certificate):
    context = configuration_of(tmp_path, tls_ini(certificate)).tls
    assert context.options & ssl.OP_NO_RENEGOTIATION


def test_a_silent_or_trickling_handshake_ends_in_time_and_stops_nobody(tmp_path, certificate):
    with running_tls(tmp_path, certificate, FAST + "request_timeout = 1") as process:
        with idle(process, 5), concurrent.futures.ThreadPoolExecutor() as pool:
            assert process.get("/healthz").status == 200
            silent = pool.submit(trickle, process, b"", b"")
            trickling = pool.submit(trickle, process, b"\x16\x03\x01\x02\x00", b"\x01")
        assert trickling.result() == b""
        # It has not spoken http, and is not told that it has.
        assert not silent.result() or parse_answer(silent.result()).code == "request_timeout"
        process.wait_for("TLS handshake failed")


@posix
def test_a_new_certificate_is_taken_on_sighup(tmp_path, certificate):
    path = tmp_path / "server.pem"
    make_certificate(path)
    with running_tls(tmp_path, path) as process:
        make_certificate(path)
        process.process.send_signal(signal.SIGHUP)
        process.wait_for("reloaded")
        with pytest.raises(ssl.SSLCertVerificationError):
            process.get("/healthz")
        speak_tls(process, path)
        assert process.get("/healthz").status == 200
        path.write_text("no certificate")
        process.process.send_signal(signal.SIGHUP)
        process.wait_for("not reloaded: .*tls_certificate")
        assert process.get("/healthz").status == 200


@posix
def test_from_https_to_http_takes_a_restart(tmp_path, certificate):
    with running_tls(tmp_path, certificate) as process:
        process.ini.write_text(ini_of())
        process.process.send_signal(signal.SIGHUP)
        process.wait_for("reloaded; .*http or https need a restart")
        assert process.get("/healthz").status == 200


# Accepting


def wrapping_accept(statement):
    """The command, where accepting a connection from 127.0.0.2 does something else."""
    code = f"""
import socket, sys, sis_sync
accept = socket.socket.accept
def odd(listening):
    connection, address = accept(listening)
    if address[0] == "127.0.0.2":
        with connection:
            {statement}
    return connection, address
socket.socket.accept = odd
sys.exit(sis_sync.main())
"""
    return sys.executable, "-c", code


@pytest.mark.parametrize(
    "statement", ["return connection.dup(), None", "raise ConnectionAbortedError"]
)
def test_a_connection_that_arrives_broken_costs_nobody_anything(tmp_path, statement):
    with running(tmp_path, command=wrapping_accept(statement)) as process:
        before = settle(process)
        started = time.monotonic()
        for _ in range(20):
            with process.connect("127.0.0.2") as connection:
                assert read_to_end(connection) == b""
        assert settle(process) == before + 5
        assert time.monotonic() - started < 5


def test_memory_that_runs_out_while_accepting_is_a_pause(tmp_path):
    with running(tmp_path, command=wrapping_accept("raise MemoryError")) as process:
        with process.connect("127.0.0.2"):
            process.wait_for("cannot accept: MemoryError")
        assert process.get("/healthz").status == 200


def test_when_accepting_ends_the_process_ends_with_1(tmp_path):
    with running(tmp_path, command=wrapping_accept("raise ValueError")) as process:
        with process.connect("127.0.0.2"):
            process.wait_for("the thread that accepts connections has ended")
        assert process.process.wait(20) == 1


FEW_FILES = [("ulimit -Sn 256", 8), ("ulimit -n 256", 5), ("ulimit -n 100", 1)]


@linux
@pytest.mark.parametrize("limit, addresses", FEW_FILES)
def test_with_few_descriptors_the_next_after_many_idle_ones_is_answered(tmp_path, limit, addresses):
    with running(tmp_path, command=in_shell(limit)) as process:
        with idle(process, 32, *(f"127.0.0.{number + 2}" for number in range(addresses))):
            answer = process.get("/healthz")  # long before the idle ones have had their 30 s
            assert answer.status == 200 or is_busy(answer)
        assert is_served_again(process)


@linux
def test_without_descriptors_it_waits_for_some_and_goes_on(tmp_path):
    import resource

    with running(tmp_path) as process:
        pid, kind = process.process.pid, resource.RLIMIT_NOFILE
        soft, hard = resource.prlimit(pid, kind)
        resource.prlimit(pid, kind, (3, hard))
        with process.connect() as connection:
            connection.sendall(GET)
            process.wait_for("cannot accept: OSError.*Too many open files")
            resource.prlimit(pid, kind, (soft, hard))
            assert parse_answer(read_to_end(connection)).status == 200


@pytest.mark.parametrize("bytes_sent", [0, 1, 30, 120, 200, 10_000])
def test_a_reset_is_one_line_at_most_and_without_a_byte_none(either, bytes_sent):
    before = settle(either)
    with Process.connect(either) as connection:
        connection.sendall(request_of(BODY)[:bytes_sent])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert settle(either) - before - 5 <= min(bytes_sent, 1)


def test_a_connection_that_is_closed_without_a_byte_is_no_line(either):
    before = settle(either)
    with Process.connect(either) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b""
    assert settle(either) == before + 5


@linux
@cpython
def test_memory_that_runs_out_costs_one_request_a_500(tmp_path):
    import resource

    ini = ini_of(limits=FAST + "max_students = 100000")
    with running(tmp_path, ini, environment={"MALLOC_ARENA_MAX": "1"}) as process:
        assert process.push(student()).status == 200
        kind, pid = resource.RLIMIT_AS, process.process.pid
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        now = int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) << 10
        resource.prlimit(pid, kind, (now + (24 << 20), resource.RLIM_INFINITY))
        answer = process.push(*map(student, range(100_000)))
        assert answer.code == "server_error"
        process.wait_for(f"{answer.document['request_id']} server_error MemoryError")
        with idle(process, 30):  # also memory for the threads
            process.wait_for("connection: (RuntimeError|MemoryError)")
        assert is_served_again(process)
        assert process.push(student()).status == 200


@posix
def test_a_start_that_may_not_raise_the_limit_of_descriptors_goes_on(tmp_path):
    code = "import resource, sis_sync; resource.setrlimit = lambda *_: int('x'); sis_sync.main()"
    with running(tmp_path, command=(sys.executable, "-c", code)) as process:
        assert process.get("/healthz").status == 200


def test_starting_and_answering_look_no_name_up(tmp_path):
    code = "import socket, sys, sis_sync; socket.getfqdn = socket.gethostbyaddr = None; "
    with running(tmp_path, command=(sys.executable, "-c", code + "sis_sync.main()")) as process:
        assert process.get("/healthz").status == 200


# Leaving


def running_plain(folder, certificate):
    return running(folder)


@posix
@pytest.mark.parametrize(
    "number, start", [(signal.SIGTERM, running_plain), (signal.SIGINT, running_tls)]
)
def test_a_request_in_flight_finishes_and_the_status_is_0(tmp_path, certificate, number, start):
    with start(tmp_path, certificate) as process:
        with begin(process) as connection, Process.connect(process) as silent:
            process.process.send_signal(number)
            assert read_to_end(silent) == b""  # now the server waits only for the other
            assert finish(connection).document["imported"] == 1
        assert process.process.wait(8) == 0
        assert not pathlib.Path(f"{process.database}-wal").exists()
        with pytest.raises(ConnectionRefusedError):
            process.connect()


@posix
def test_a_client_that_stays_after_its_answer_is_not_waited_for(tmp_path):
    with running(tmp_path) as process, begin(process) as connection:
        with process.connect() as silent:
            process.process.send_signal(signal.SIGTERM)
            assert read_to_end(silent) == b""
        assert finish(connection).status == 200
        assert process.process.wait(8) == 0


@posix
def test_a_request_that_does_not_finish_is_not_waited_for(tmp_path):
    code = "import sys, sis_sync; sis_sync.SHUTDOWN_TIMEOUT = 0.5; sys.exit(sis_sync.main())"
    with running(tmp_path, command=(sys.executable, "-c", code)) as process, begin(process):
        assert process.stop() == 0


@posix
@pytest.mark.parametrize("start", [running_plain, running_tls])
def test_a_request_that_the_stop_cuts_off_is_busy_and_delays_nothing(tmp_path, certificate, start):
    """malformed_request would be final to the client, and its push was healthy."""
    data = head_of(Content_Length=len(SMALL))
    with start(tmp_path, certificate) as process, contextlib.ExitStack() as stack:
        cut_off = []
        for length in (1, 10, 60, len(data) - 2, len(data) - 1):
            cut_off.append(stack.enter_context(process.connect()))
            cut_off[-1].sendall(data[:length])
        settle(process)
        process.process.send_signal(signal.SIGTERM)
        for connection in cut_off:
            assert is_busy(parse_answer(read_to_end(connection)))
        assert process.process.wait(8) == 0


@posix
def test_a_head_that_is_read_while_the_stop_begins_is_busy(tmp_path):
    code = """
import sys, time, sis_sync
check = sis_sync.check_host
sis_sync.check_host = lambda text: (check(text), time.sleep(0.3))
sys.exit(sis_sync.main())
"""
    with (
        running(tmp_path, command=(sys.executable, "-c", code)) as process,
        process.connect() as connection,
        process.connect() as silent,
    ):
        connection.sendall(head_of(Content_Length=len(SMALL)))
        process.process.send_signal(signal.SIGTERM)
        assert read_to_end(silent) == b""
        # The body would come now, but the server reads no more.
        assert is_busy(parse_answer(read_to_end(connection)))


@posix
def test_of_requests_that_arrive_with_the_signal_what_is_stored_is_answered(tmp_path):
    with running(tmp_path) as process, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(process.connect()) for _ in range(10)]
        settle(process)
        process.process.send_signal(signal.SIGSTOP)
        for number, connection in enumerate(waiting):
            connection.sendall(request_of(batch(student(), cohort_id=str(number))))
        process.process.send_signal(signal.SIGTERM)
        process.process.send_signal(signal.SIGCONT)
        answers = [b" 200 OK" in read_to_end(connection) for connection in waiting]
        assert process.process.wait(20) == 0
        stored = {int(cohort) for (cohort,) in process.rows("SELECT cohort_id FROM syncs")}
        assert stored == {number for number in range(10) if answers[number]}


@posix
def test_a_second_signal_ends_it_at_once(tmp_path):
    with running(tmp_path) as process, begin(process):
        process.process.send_signal(signal.SIGTERM)
        process.wait_for("stopping")
        assert process.stop() == -signal.SIGTERM


@posix
def test_a_second_signal_ends_it_also_while_it_reads_the_configuration(tmp_path):
    with running(tmp_path) as process:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        process.ini.write_text(ini_of(institutions=f"[institution a]\nsecrets = file:{fifo}\n"))
        process.process.send_signal(signal.SIGHUP)
        with open(fifo, "wb"):  # the server has opened the other end, and reads
            for _ in range(1000):
                process.process.send_signal(signal.SIGTERM)
                if process.process.poll() is not None:
                    break
                time.sleep(0.01)
        assert process.stop() == -signal.SIGTERM


@posix
def test_a_reader_of_the_database_does_not_hold_up_the_stop_and_loses_nothing(tmp_path):
    with running(tmp_path) as process:
        process.push(student(1))
        with contextlib.closing(sqlite3.connect(process.database)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM entries").fetchone()
            process.push(student(2))
            assert process.stop() == 0
        assert process.rows("SELECT count(*) FROM entries") == [(2,)]


# The log


def line_of(process, answer):
    identifier = answer.headers["x-request-id"]
    process.wait_for(identifier)
    (line,) = [line for line in process.log if identifier in line]
    return line.replace(identifier, "ID")


def test_a_request_is_one_line(server):
    line = line_of(server, server.push(student(1), {}, student(2)))
    time_of_day = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    request = r"ID 127\.0\.0\.1 example POST /api/sis/sync 200 3/2/1 \d+ms"
    assert re.fullmatch(f"{time_of_day} {request}", line)
    line = line_of(server, server.push(secret="wrong"))
    assert re.search(r"Z ID 127\.0\.0\.1 - POST /api/sis/sync 401 - \d+ms unauthorized", line)


def test_what_the_client_wrote_is_escaped_and_its_query_left_out(server):
    line = line_of(server, server.get(f'/"\\%0a?secret={SECRET}'))
    assert ' GET /"\\x5c%0a 404 ' in line


def test_a_fault_of_the_server_is_a_500_without_its_cause(service, monkeypatch):
    # A KeyError whose words are the body.
    monkeypatch.setattr(sis_sync, "loads", lambda text, **_: {}[text])
    with logged() as lines:
        answer = handle(service, batch(student()))
    assert (answer.status, answer.code) == (500, "server_error")
    assert lines[0].startswith(f"{answer.document['request_id']} server_error KeyError (")
    assert answer.document["request_id"] == answer.headers["x-request-id"]
    assert "u1@" not in f"{lines} {answer}" and "KeyError" not in f"{answer}"


# ---------------------------------------------------------------------------------------------
# Section 6: the database
# ---------------------------------------------------------------------------------------------


def sql(path, *statements):
    """Execute statements in a database. The rows of the last one."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def new_database(path):
    sis_sync.Database(str(path)).try_to_close()
    return path


def shell(folder, command):
    subprocess.run(command, shell=True, check=True, cwd=folder)


# The files, and who may read them.


@posix
def test_the_files_are_their_owner_s_alone(tmp_path):
    files = [tmp_path / f"sis_sync.db{suffix}" for suffix in ("", "-wal", "-shm")]
    files[0].touch(0o644)
    with running(tmp_path) as process:
        process.push(student())
        assert {oct(path.stat().st_mode) for path in files} == {"0o100600"}
        process.stop(signal.SIGKILL)
        for path in files:
            path.chmod(0o644)
        with contextlib.closing(sqlite3.connect(files[0])) as reader:
            reader.execute("SELECT * FROM roster").fetchall()  # so the start cannot make them anew
            process.start()
            process.push(student())
            assert {oct(path.stat().st_mode) for path in files} == {"0o100600"}


@posix
@pytest.mark.parametrize("cause", [PermissionError("another user's file"), None])
def test_a_start_warns_where_others_may_read_and_modes_cannot_be_set(tmp_path, monkeypatch, cause):
    path = tmp_path / "sis_sync.db"
    path.touch()
    path.chmod(0o644)

    def chmod(path, mode):
        if cause:
            raise cause  # and a disk without modes may do nothing at all

    monkeypatch.setattr(os, "chmod", chmod)
    with logged() as lines:
        new_database(path)
    assert lines == [f"warning: other users of this machine may read {path}"]


@posix
def test_a_database_may_be_a_symbolic_link(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "sis_sync.db").symlink_to(tmp_path / "data" / "real.db")
    with running(tmp_path) as process:
        assert [process.push(student(number)).status for number in range(2)] == [200, 200]
        assert sql(tmp_path / "data" / "real.db", "SELECT count(*) FROM entries") == [(2,)]


def test_eight_processes_may_make_a_database_at_once(tmp_path):
    code = "import sis_sync; [sis_sync.Database(f'{number}.db').try_to_close() for number in range(50)]"
    command = (sys.executable, "-c", code)
    processes = [subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path) for _ in range(8)]
    assert [process.wait(60) for process in processes] == [0] * 8


# What is on disk, and when.


@pytest.mark.parametrize(
    "pragma, value",
    [
        ("journal_mode", "wal"),
        ("synchronous", 2),  # FULL: the log is synced at every commit
        ("fullfsync", 1),
        ("temp_store", 2),  # MEMORY
        ("secure_delete", 1),
        ("journal_size_limit", 16 << 20),
        ("user_version", 3),
    ],
)
def test_the_server_s_connection_is_set_up_so(service, pragma, value):
    with service.database.transaction() as connection:
        assert connection.execute(f"PRAGMA {pragma}").fetchone() == (value,)


@posix
def test_kill_9_loses_nothing_that_was_answered_and_leaves_nothing_half_done(tmp_path):
    answered = set()

    def push_until_it_is_gone(name):
        with contextlib.suppress(OSError, AssertionError):
            for number in itertools.count():
                cohort = f"{name}-{number}"
                assert process.push(*map(student, range(200)), cohort_id=cohort).status == 200
                answered.add(cohort)

    with running(tmp_path) as process:
        for number in range(3):
            with concurrent.futures.ThreadPoolExecutor(2) as clients:
                clients.map(push_until_it_is_gone, (f"a{number}", f"b{number}"))
                process.wait_for(f"{SYNC} 200 ")
                time.sleep(random.uniform(0, 0.2))  # the moment is what is random
                process.process.kill()
            process.stop()
            process.start()
        kept = dict(process.rows("SELECT cohort_id, count(*) FROM roster GROUP BY cohort_id"))
        assert kept == dict(process.rows("SELECT cohort_id, new FROM history"))
    assert answered and answered <= set(kept)
    assert set(kept.values()) == {200}
    assert sql(process.database, "PRAGMA integrity_check") == [("ok",)]


@posix
@pytest.mark.parametrize("accident, end", [("true", "SIGTERM"), ("rm sis_sync.db-wal", "SIGKILL")])
def test_the_file_alone_has_all_rows_though_a_reader_has_it_open(tmp_path, accident, end):
    with running(tmp_path) as process:
        reader = sqlite3.connect(process.database)
        reader.execute("SELECT * FROM history").fetchall()
        process.push(*map(student, range(1000)))
        shell(tmp_path, accident)
        process.push(student(1))
        process.stop(signal.Signals[end])
        shutil.copy(process.database, tmp_path / "copy.db")
        reader.close()
    assert sql(tmp_path / "copy.db", "SELECT count(*) FROM entries") == [(1000,)]


def test_the_log_that_a_reader_made_longer_is_cut_when_the_reader_has_gone(tmp_path):
    name = "x" * 255
    rows = [student(number, first_name=name, last_name=name) for number in range(5000)]
    with running(tmp_path) as process:
        wal = pathlib.Path(f"{process.database}-wal")
        reader = sqlite3.connect(process.database)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM history").fetchall()
        while wal.stat().st_size < 20 << 20:
            assert process.push(*rows, cohort_id=str(wal.stat().st_size)).status == 200
        reader.close()
        for number in range(2):
            process.push(student(number))
        assert wal.stat().st_size <= 16 << 20


# Somebody else holds a lock.


def test_a_lock_of_another_process_is_busy_after_a_while_and_then_over(service, monkeypatch):
    monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.2)
    other = sqlite3.connect(service.database.path)
    other.execute("BEGIN IMMEDIATE")
    answer = handle(service, batch(student()))
    assert (answer.status, answer.code) == (503, "busy")
    assert answer.headers["retry-after"] == "1"
    assert handle(service, method="GET", path="/healthz").status == 200
    other.close()
    assert handle(service, batch(student())).status == 200


def test_a_batch_of_another_thread_is_busy_after_a_while_and_then_over(service, monkeypatch):
    monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.2)
    with service.turn:
        assert handle(service, batch(student())).code == "busy"
    assert handle(service, batch(student())).status == 200


# The files under a running server: an accident, what somebody does about it, and the status of a
# push between them.
ACCIDENTS = [
    ("rm sis_sync.db", "cp backup.db sis_sync.db", 500),
    ("rm sis_sync.db*", "cp backup.db sis_sync.db", 500),
    ("rm sis_sync.db-wal", "true", 500),
    ("rm sis_sync.db-shm", "true", 200),
    ("mv sis_sync.db moved.db", "mv moved.db sis_sync.db", 500),
    ("mkdir moved && mv sis_sync.db* moved", "mv moved/* .", 500),
    ("cp backup.db new.db && mv new.db sis_sync.db", "true", 500),
]


@posix
def test_a_copy_that_never_had_a_log_is_used_when_it_is_put_in_place(tmp_path):
    with running(tmp_path) as process:
        process.push(student(1))
        sql(process.database, f"VACUUM INTO '{tmp_path / 'copy.db'}'")
        shell(tmp_path, "rm sis_sync.db* && mv copy.db sis_sync.db")
        process.push(student(2))  # finds out
        assert process.push(student(3)).status == 200
        assert process.rows("SELECT student_id_ext FROM roster") == [("U1",), ("U3",)]


@posix
@pytest.mark.parametrize("watcher", ["nobody", "/healthz", "a reader"])
@pytest.mark.parametrize("accident, remedy, status", ACCIDENTS)
def test_what_was_answered_outlives_an_accident(tmp_path, accident, remedy, status, watcher):
    with running(tmp_path) as process:
        reader = sqlite3.connect(process.database)
        if watcher == "a reader":
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM history").fetchall()
        answers = {"before": process.push(student("before"))}
        run("--config", process.ini, "backup", tmp_path / "backup.db")
        shell(tmp_path, accident)
        if watcher == "/healthz":  # which must not make it worse
            assert process.get("/healthz").status == {200: 200, 500: 503}[status]
        answer = answers["between"] = process.push(student("between"))
        assert answer.status == status
        if status == 500:
            process.wait_for(f"{answer.document['request_id']} server_error .*: .*sis_sync.db")
        shell(tmp_path, remedy)
        reader.rollback()
        answers["after"] = process.push(student("after"))  # may be the one that finds out
        answers["later"] = process.push(student("later"))
        assert process.get("/healthz").status == 200
        process.stop(signal.SIGKILL)
    answered = {(f"U{name}",) for name, answer in answers.items() if answer.status == 200}
    stored = set(sql(process.database, "SELECT student_id_ext FROM entries"))
    assert {("Ubefore",), ("Ulater",)} <= answered <= stored
    assert sql(process.database, "PRAGMA integrity_check") == [("ok",)]
    reader.close()


@posix
def test_a_database_that_is_cut_to_nothing_is_a_500_until_it_is_back(tmp_path):
    with running(tmp_path) as process:
        process.push(student(1))
        process.stop()  # so that all is in the database, and nothing in its log
        process.start()
        shell(tmp_path, "cp sis_sync.db backup.db && : > sis_sync.db")
        assert process.get("/healthz").code == "unhealthy"
        assert process.push(student(2)).code == "server_error"
        shell(tmp_path, "cp backup.db sis_sync.db")
        details = process.push(student(1), student(3)).document["details"]
        assert details == {"imported": 1, "updated": 1, "unchanged": 1}


@posix
def test_the_log_of_a_database_that_was_replaced_is_not_left_to_the_new_one(tmp_path):
    with running(tmp_path) as process:
        process.push(*map(student, range(3000)))
        run("--config", process.ini, "backup", tmp_path / "backup.db")
        process.push(*(student(f"more-{number}") for number in range(5000)))
        shell(tmp_path, "mv backup.db sis_sync.db")
        assert process.stop() == 0
        process.start()
        assert process.push(student(1)).document["details"]["unchanged"] == 1
    assert sql(process.database, "SELECT count(*) FROM entries") == [(3000,)]
    assert sql(process.database, "PRAGMA integrity_check") == [("ok",)]


@posix
def test_a_database_that_is_replaced_during_a_transaction_is_never_a_200(service):
    path = service.database.path
    with pytest.raises(OSError, match="replaced"), service.database.transaction():
        shutil.copy(path, f"{path}.copy")
        os.replace(f"{path}.copy", path)
    assert handle(service, batch(student())).status == 200


# Disks that are full, read-only, or of another kind.


@linux
def test_a_full_disk_is_a_500_that_stores_nothing_and_then_it_goes_on(tmp_path):
    resource = pytest.importorskip("resource")
    with running(tmp_path) as process:
        process.push(student("first"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        full = (60_000, limits[1])
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, full)
        for number in range(3):
            assert process.push(*map(student, range(2000))).code == "server_error"
        process.wait_for("server_error OperationalError: (disk I/O error|database or disk is full)")
        assert process.get("/healthz").status == 200
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, limits)
        assert process.push(student("last")).document["imported"] == 1
        assert process.rows("SELECT student_id_ext FROM roster") == [("Ufirst",), ("Ulast",)]
        assert process.rows("SELECT count(*) FROM history") == [(2,)]


@linux
def test_a_full_temporary_folder_stops_nothing(tmp_path):
    mount = 'mount -t tmpfs -o size=4k none "$SQLITE_TMPDIR" && exec "$@"'
    command = ("unshare", "-rm", "sh", "-c", mount, "sh")
    environment = {"SQLITE_TMPDIR": str(tmp_path / "full")}
    (tmp_path / "full").mkdir()
    if not shutil.which("unshare") or run_process("true", command=command, **environment).status:
        pytest.skip("needs unshare, and the right to mount")
    command += COMMAND
    with running(tmp_path, environment=environment, command=command) as process:
        numbers = random.Random(1).sample(range(20_000), 20_000)
        for start in range(0, 20_000, 5000):
            assert process.push(*map(student, numbers[start : start + 5000])).status == 200
        changed = [student(number, first_name="longer than before") for number in numbers[::4]]
        assert process.push(*changed).document["details"]["updated"] == 5000


@posix
@pytest.mark.parametrize("name, mode", [("sis_sync.db", 0o400), (".", 0o500)])
def test_a_read_only_database_is_refused_at_the_start(tmp_path, name, mode):
    command = COMMAND
    if os.geteuid() == 0:  # root may write everything, unless it is told not to
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv")
        command = ("setpriv", "--bounding-set", "-dac_override", *COMMAND)
    (tmp_path / "sis_sync.ini").write_text(ini_of())
    new_database(tmp_path / "sis_sync.db")
    (tmp_path / name).chmod(mode)
    result = run_process("--config", tmp_path / "sis_sync.ini", command=command)
    assert result.status == 2
    words = r"sis_sync: \S+sis_sync.db: (Permission denied|unable to open|attempt to write.*)"
    assert re.match(words, result.err.splitlines()[-1])


@posix
def test_a_disk_that_allows_no_log_is_refused_in_a_line(tmp_path, monkeypatch):
    connect = sqlite3.connect

    def connect_without_locks(path, **options):
        return connect(f"{path}&vfs=unix-none", **options)

    monkeypatch.setattr(sqlite3, "connect", connect_without_locks)
    with pytest.raises(sis_sync.CommandError, match="this disk does not allow a write-ahead log"):
        sis_sync.Database(str(tmp_path / "sis_sync.db"))


# Databases of others, and of other versions.

# As version 2 made them: three rosters, a history that has lost its beginning, and two syncs of
# one cohort in one second.
VERSION_2 = """
CREATE TABLE rosters (roster_id INTEGER PRIMARY KEY,
    institution TEXT NOT NULL, cohort_id TEXT NOT NULL, UNIQUE (institution, cohort_id));
CREATE TABLE entries (entry_id INTEGER PRIMARY KEY,
    roster_id INTEGER NOT NULL REFERENCES rosters (roster_id),
    student_id_ext TEXT, email TEXT, first_name TEXT, last_name TEXT, program_code TEXT,
    campus_name TEXT, first_in_family INTEGER, created_at INTEGER NOT NULL,
    changed_at INTEGER NOT NULL, seen_at INTEGER NOT NULL, UNIQUE (roster_id, student_id_ext));
CREATE TABLE syncs (sync_id INTEGER PRIMARY KEY, time INTEGER NOT NULL,
    institution TEXT NOT NULL, cohort_id TEXT NOT NULL, client TEXT NOT NULL,
    received INTEGER NOT NULL, new INTEGER NOT NULL, updated INTEGER NOT NULL,
    unchanged INTEGER NOT NULL, rejected INTEGER NOT NULL, milliseconds INTEGER NOT NULL,
    errors TEXT NOT NULL);
CREATE INDEX syncs_by_institution ON syncs (institution);
CREATE VIEW roster AS SELECT institution, cohort_id, student_id_ext, email, first_name, last_name,
    program_code, campus_name, first_in_family,
    strftime('%Y-%m-%dT%H:%M:%SZ', created_at, 'unixepoch') AS created,
    strftime('%Y-%m-%dT%H:%M:%SZ', changed_at, 'unixepoch') AS changed,
    strftime('%Y-%m-%dT%H:%M:%SZ', seen_at, 'unixepoch') AS seen
    FROM entries JOIN rosters USING (roster_id);
CREATE VIEW history AS SELECT sync_id, strftime('%Y-%m-%dT%H:%M:%SZ', time, 'unixepoch') AS time,
    institution, cohort_id, client, received, new, updated, unchanged, rejected, milliseconds,
    errors FROM syncs;
INSERT INTO rosters VALUES (4, 'example', '2026'), (5, 'example', 'É 1;2'), (6, 'b-2', '2026');
INSERT INTO syncs VALUES
    (5, 100, 'example', '2026', '192.0.2.1', 3, 2, 1, 0, 0, 9, '[]'),
    (6, 100, 'example', '2026', '::1', 1, 0, 1, 1, 0, 9, '[]'),
    (7, 100, 'b-2', '2026', '-', 2, 1, 0, 0, 1, 9, '[{"row": 2}]'),
    (8, 200, 'example', 'É 1;2', '-', 1, 1, 0, 0, 0, 9, '[]'),
    (9, 200, 'example', '2026', '-', 1, 0, 1, 0, 0, 9, '[]');
INSERT INTO entries (roster_id, student_id_ext, email, first_name, last_name, first_in_family,
    created_at, changed_at, seen_at) VALUES
    (4, '007', 'a@b', 'Zoë', 'O''Brien', 1, 10, 90, 100),
    (4, '7', 'a@b', '王', 'Nguyễn', 0, 100, 200, 200),
    (4, 'left', 'a@b', 'a "b" \\', '%s;--', NULL, 20, 20, 20),
    (5, '007', 'a@b', '👩‍🎓', NULL, NULL, 200, 200, 200),
    (6, '007', 'a@b', 'Робъртс', NULL, NULL, 100, 100, 100);
PRAGMA user_version = 2;
"""


def make(path, script):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


@pytest.fixture
def version_2(tmp_path):
    return make(tmp_path / "sis_sync.db", VERSION_2)


def everything_in(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [*connection.iterdump(), connection.execute("PRAGMA user_version").fetchone()]


def columns_of(path):
    """The columns of all tables, indexes and views."""
    query = "SELECT m.type, m.name, c.* FROM sqlite_master AS m, pragma_%s(m.name) AS c"
    return {*sql(path, query % "table_info"), *sql(path, query % "index_info")}


@pytest.mark.parametrize(
    "script, words",
    [
        ("", "file is not a database"),
        ("CREATE TABLE t (x)", "this is a database of another program"),
        ("CREATE TABLE syncs (x)", "this is a database of another program"),
        ("CREATE TABLE t (x); PRAGMA user_version = 2", "this is a database of another program"),
        ("PRAGMA user_version = 3", "this is a database of another program"),
        (
            f"{VERSION_2} PRAGMA user_version = 4",
            "the database is of version 4, and this program knows versions 2 to 3",
        ),
        (
            f"{VERSION_2} PRAGMA user_version = 1",
            "the database is of version 1, and this program knows versions 2 to 3",
        ),
    ],
)
def test_a_database_of_another_is_refused_in_a_line_and_left_untouched(tmp_path, script, words):
    path = make(tmp_path / "sis_sync.db", script)
    if not script:
        path.write_bytes(b"this is no database, but it is long enough" * 100)
    ini = tmp_path / "sis_sync.ini"
    ini.write_text(ini_of())
    path.chmod(0o644)
    before = {path.name: (path.read_bytes(), path.stat().st_mode) for path in tmp_path.iterdir()}
    with pytest.raises(sis_sync.CommandError) as caught:
        sis_sync.Database(str(path))
    assert caught.value.args == (f"{path}: {words}",)
    assert run("--config", ini, "check") == (1, f"{path}: {words}\n", "")
    after = {path.name: (path.read_bytes(), path.stat().st_mode) for path in tmp_path.iterdir()}
    assert after == before


def test_version_2_is_migrated_and_counts_go_on_exactly(tmp_path, version_2):
    entries = sql(version_2, "SELECT * FROM entries")
    syncs = sql(version_2, "SELECT * FROM syncs")
    with running(tmp_path) as process:
        # An entry was seen in its cohort's last sync of that second, if we still know that one.
        migrated = [(*entry, sync) for entry, sync in zip(entries, [6, 9, 0, 8, 7])]
        assert process.rows("SELECT * FROM entries") == migrated
        assert process.rows("SELECT * FROM syncs") == [(*sync, 0) for sync in syncs]
        row = student(first_name="Zoë", last_name="O'Brien", first_in_family=True)
        same, other = ({**row, "student_id_ext": key, "email": "a@b"} for key in ("007", "7"))
        answer = process.push(same, other, student("new"))
        assert answer.document["details"] == {"imported": 1, "updated": 2, "unchanged": 1}
        seen_in = process.rows("SELECT seen_in FROM entries")
        assert seen_in == [(10,), (10,), (0,), (8,), (7,), (10,)]
    assert sql(version_2, "PRAGMA user_version") == [(3,)]
    assert sql(version_2, "PRAGMA integrity_check") == [("ok",)]
    assert sql(version_2, "PRAGMA foreign_key_check") == []


def test_a_migrated_database_is_as_one_that_was_just_made(tmp_path, version_2):
    new = new_database(tmp_path / "new.db")
    assert columns_of(new_database(version_2)) == columns_of(new)


def test_a_large_database_is_migrated_within_seconds(version_2):
    numbers = "WITH RECURSIVE n (i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM n WHERE i < %s) "
    syncs = "INSERT INTO syncs SELECT i, i, 'example', '2026', '', 0, 0, 0, 0, 0, 0, '' FROM n"
    entries = "INSERT INTO entries SELECT i, 4, i, '', '', '', '', '', 0, 0, 0, i % 10000 FROM n"
    sql(version_2, numbers % 10_000 + syncs, numbers % 100_000 + entries)
    start = time.monotonic()
    new_database(version_2)
    assert time.monotonic() < start + 10  # without an index it would take minutes
    assert sql(version_2, "SELECT seen_in FROM entries WHERE entry_id = 98765") == [(8765,)]


def test_a_migration_that_fails_changes_nothing(version_2):
    sql(version_2, "ALTER TABLE syncs ADD COLUMN forgotten")  # so that the second step fails
    before = everything_in(version_2)
    with pytest.raises(sis_sync.CommandError, match="db: duplicate column name: forgotten$"):
        new_database(version_2)
    assert everything_in(version_2) == before


def test_a_database_of_this_version_is_opened_as_it_is(tmp_path):
    path = new_database(tmp_path / "sis_sync.db")
    before = path.read_bytes()
    assert new_database(path).read_bytes() == before


def test_commands_that_read_say_what_to_do_about_version_2(tmp_path, version_2):
    before = everything_in(version_2)
    ini = tmp_path / "sis_sync.ini"
    ini.write_text(ini_of())
    told = f"sis_sync: {version_2}: is of an older version: start the server once\n"
    for words in ("history", "history --stale 1", "export", "forget --institution example"):
        assert run("--config", ini, *words.split()) == (2, "", told)
    assert run("--config", ini, "check").status == 0
    assert run("--config", ini, "backup", tmp_path / "backup.db").status == 0
    assert everything_in(version_2) == everything_in(tmp_path / "backup.db") == before


def test_a_column_that_is_no_field_any_more_is_kept(tmp_path, version_2):
    add = "ALTER TABLE entries ADD COLUMN height INTEGER"
    sql(version_2, add, "UPDATE entries SET height = 180")
    with running(tmp_path) as process:
        process.push(student(), {"student_id_ext": "7", "email": "new@b"})
    query = "SELECT student_id_ext, height FROM entries WHERE roster_id = 4 ORDER BY entry_id"
    assert sql(version_2, query) == [("007", 180), ("7", 180), ("left", 180), ("U1", None)]


def test_a_field_that_is_new_is_null_in_what_was_there(tmp_path):
    before = VERSION_2.replace("campus_name TEXT,", "").replace(" campus_name,", "")
    path = new_database(make(tmp_path / "old.db", before))
    assert sql(path, "SELECT campus_name FROM roster") == [(None,)] * 5


# History and clock.


def test_history_keeps_the_latest_10_000_of_each_institution(service, monkeypatch):
    handle(service, batch())
    path = service.database.path
    more = """
        WITH RECURSIVE numbers (n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n < 10000)
        INSERT INTO syncs SELECT n + {}, time, '{}', cohort_id, client, 0, 0, 0, 0, 0, 0, '[]', 0
        FROM syncs, numbers WHERE sync_id = 1"""
    sql(path, more.format(0, "example"), more.format(10_000, "another"))
    sql(path, more.format(20_000, "another"))
    monkeypatch.setattr(time, "time", lambda: 86_400)  # a clock that lost its battery
    handle(service, batch())
    handle(service, batch())
    query = "SELECT institution, count(*), min(sync_id) FROM syncs GROUP BY institution"
    assert sql(path, query) == [("another", 19_998, 10_002), ("example", 10_000, 3)]


def test_a_clock_that_goes_back_is_one_warning_and_changed_is_never_before_created(
    service, monkeypatch
):
    with logged() as lines:
        for now, name in (2000, "Zoë"), (1000, "Mia"), (1001, "Ann"):
            monkeypatch.setattr(time, "time", lambda now=now: now)
            handle(service, batch(student(first_name=name)))
    times = sql(service.database.path, "SELECT created_at, changed_at, seen_at FROM entries")
    assert times == [(2000, 2000, 1001)]
    assert lines == ["warning: the clock is behind the time of the last sync"]


# ---------------------------------------------------------------------------------------------
# Section 9: reading what is kept
# ---------------------------------------------------------------------------------------------


ROSTER = (
    "institution cohort_id student_id_ext email first_name last_name program_code campus_name "
    "first_in_family created changed seen"
)
ENTRY = (
    "example 2026 007 a@b Zoë O'Brien None None 1 "
    "1970-01-01T00:00:10Z 1970-01-01T00:01:30Z 1970-01-01T00:01:40Z"
)
HISTORY = (
    "sync_id time institution cohort_id client received new updated unchanged rejected "
    "milliseconds errors"
)
LINE = """7 1970-01-01T00:01:40Z b-2 2026 - 2 1 0 0 1 9 [{"row": 2}]"""


@pytest.mark.parametrize(
    "query, names, values",
    [
        ("SELECT * FROM roster WHERE last_name = 'O''Brien'", ROSTER, ENTRY),
        ("SELECT * FROM history WHERE rejected", HISTORY, LINE),
    ],
)
def test_the_views_are_as_they_are_documented(version_2, query, names, values):
    new_database(version_2)
    with contextlib.closing(sqlite3.connect(version_2)) as connection:
        cursor = connection.execute(query)
        assert " ".join(column for column, *_ in cursor.description) == names
        assert [" ".join(map(str, row)) for row in cursor] == [values]


# ---------------------------------------------------------------------------------------------
# Section 7: the command line
# ---------------------------------------------------------------------------------------------


def test_version():
    assert run("--version") == Result(0, f"sis_sync {sis_sync.__version__}\n", "")


def test_help_lists_every_command():
    names = re.findall(r"^    (\w+) ", run("--help").out, re.MULTILINE)
    assert names == list(sis_sync.COMMANDS)


@pytest.mark.parametrize("name", sis_sync.COMMANDS)
def test_a_command_explains_its_options_its_defaults_and_its_exit_status(name):
    status, out, err = run(name, "--help")
    text = " ".join(out.split())
    for line in sis_sync.COMMANDS[name][1].strip().splitlines():
        option = " ".join(line.split()).replace("...", "")
        assert option.removeprefix("file ") in text
    assert text.endswith(" Exit status: 0 success, 1 problems found, 2 could not run.")
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    "line, words",
    [
        ("nonsense", "invalid choice: 'nonsense'"),
        ("--config", "expected one argument"),
        ("history --config x", "must be before the command"),
        ("push --cohort 1", "required: FILE"),
        ("backup", "required: FILE"),
        ("push f --cohort 1 --map x=y", "must be FIELD=HEADER, FIELD one of ('student_id_ext', "),
        ("export --not-seen-since x", "found 'x'; must be a date, YYYY-MM-DD"),
        ("serve --port=99999", "found '99999'; must be a whole number from 0 to 65535"),
        ("--port=8_0 serve", "found '8_0'; must be a whole number from 0 to 65535"),
        ("--port=", "argument --port: found ''; must be a whole number from 0 to 65535"),
        ("--host=localhost", "found 'localhost'; must be an IP address, as no name is looked up"),
    ],
)
def test_a_wrong_command_line_is_2_and_says_what_is_wrong(line, words):
    status, out, err = run(*line.split())
    assert (status, out, err[:7]) == (2, "", "usage: ")
    assert words in err


@posix
@pytest.mark.parametrize(
    "redirection, status, words",
    [
        ("<&-", 0, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| :", 0, ""),
        pytest.param(">/dev/full", 2, "sis_sync: No space left on device\n", marks=linux),
    ],
)
def test_a_stream_that_is_closed_or_full_is_no_traceback(redirection, status, words):
    shell = ("sh", "-c", f'"$@" {redirection}', "sh", *COMMAND)
    result = run_process("secret", command=shell, PYTHONUNBUFFERED="")
    assert result.status == status
    assert re.fullmatch(f"(line 1: .*\n)?{words}", result.err)


# serve


@pytest.mark.parametrize(
    "words",
    [
        "serve --port 0 --host 127.0.0.1",
        "--port 0 --host 127.0.0.1",
        "--port 0 serve --host 127.0.0.1",
    ],
)
def test_the_options_of_serve_override_the_file(tmp_path, words):
    ini = "[server]\nport = 1\nhost = 192.0.2.1\n"
    with running(tmp_path, ini, words=words.split()) as process:
        assert process.get("/healthz").status == 200


def test_a_start_tells_where_it_listens_what_it_uses_and_who_has_a_secret(tmp_path):
    institutions = "[institution a]\n[institution b]\nsecrets = env:NOT_SET\n"
    with running(tmp_path, ini_of(institutions=institutions)) as process:
        process.wait_for("database: ")
        assert [line.partition("Z ")[2] for line in process.log] == [
            "institution a: secrets set: 1",
            "warning: [institution b] secrets: not set: env:NOT_SET: missing or empty",
            "institution b: secrets set: 0",
            f"sis_sync {sis_sync.__version__} listens on http://127.0.0.1:{process.port}{SYNC}",
            f"configuration: {process.ini}",
            f"new database: {os.path.realpath(process.database)}",
        ]
        process.stop()
        process.start()
        process.wait_for("Z database: ")


# secret


def test_secret_prints_a_new_secret_and_its_digest():
    secret, digest = run("secret").out.splitlines()
    assert re.fullmatch(r"sis_[A-Za-z0-9_-]{43}", secret)
    assert digest == "sha256:" + hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in run("secret").out


@pytest.mark.parametrize("stdin", [SECRET, b"caf\xe9\n", b"\xef\xbb\xbfcaf\xe9\r\nsha256:"])
def test_secret_hash_makes_the_line_of_a_secret(stdin):
    secret = SECRET.encode() if stdin == SECRET else b"caf\xe9"
    digest = hashlib.sha256(secret).hexdigest()
    assert run("secret", "--hash", stdin=stdin) == Result(0, f"sha256:{digest}\n", "")


@pytest.mark.parametrize("stdin", ["", "\n", "two words", "sha256:0"])
def test_secret_hash_refuses_what_can_be_no_secret(stdin):
    status, out, err = run("secret", "--hash", stdin=stdin)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("sis_sync: standard input: ")


# check, the rehearsal of a start

OURS = """
PRAGMA journal_mode = WAL;
CREATE TABLE rosters (roster_id, institution, cohort_id);
CREATE TABLE entries (roster_id, seen_at);
CREATE TABLE syncs (sync_id, time, institution, cohort_id);
PRAGMA user_version = """


def set_up(folder, server, sql):
    """A file sis_sync.ini, and the database that these statements make."""
    ini = folder / "sis_sync.ini"
    ini.write_text(f"[server]\n{server}\n")
    if sql:
        with contextlib.closing(sqlite3.connect(folder / "sis_sync.db")) as connection:
            connection.executescript(sql)
    return ini


def files_in(folder):
    paths = folder.iterdir()
    return {path: (path.read_bytes(), path.stat()[:2], path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize(
    "settings, sql, words",
    [
        ("port = x\n[limit]", "", "port: found 'x'; .*\n.*: unknown section; "),
        ("tls_key = key.pem", "", "tls_key: stands without tls_certificate"),
        ("port = 0\nhost = 192.0.2.1", "", "cannot listen on 192.0.2.1 port 0: "),
        ("port = TAKEN", "", r"cannot listen on 127.0.0.1 port \d+: "),
        ("database = sis_sync.ini", "", "sis_sync.ini: file is not a database"),
        ("database = no/x.db", "", "x.db: No such file or directory"),
        ("database = .", "", "Is a directory|Permission denied"),
        ("database = sis_sync.ini/x.db", "", "x.db: (Not a directory|No such file)"),
        ("", "CREATE TABLE t (x)", "this is a database of another program"),
        ("", "PRAGMA user_version = 2", "this is a database of another program"),
        ("", OURS + "1", "version 1, and this program knows versions 2 to 3"),
        ("", OURS + "4", "version 4, and this program knows versions 2 to 3"),
    ],
)
def test_what_stops_a_start_check_says_in_the_same_words(tmp_path, server, settings, sql, words):
    ini = set_up(tmp_path, settings.replace("TAKEN", str(server.port)), sql)
    before = files_in(tmp_path)
    check = run("--config", ini, "check")
    assert files_in(tmp_path) == before
    start = run_process("--config", ini)
    assert (check.status, start.status) == (1, 2)
    told = "".join(f"sis_sync: {line}\n" for line in check.out.splitlines())
    assert start.err.endswith(told)
    assert re.search(words, told)


@pytest.mark.parametrize("sql", ["", OURS + "2"])
def test_check_changes_and_creates_nothing(tmp_path, sql):
    ini = set_up(tmp_path, "port = 0", sql)
    before = files_in(tmp_path)
    assert run("--config", ini, "check") == Result(0, f"{ini}: good\n", "")
    assert files_in(tmp_path) == before


def test_check_finds_what_is_damaged_within_the_database(service, tmp_path):
    handle(service, batch(*map(student, range(500))))
    service.database.try_to_close()
    database = tmp_path / "sis_sync.db"
    database.write_bytes(database.read_bytes()[:-8000] + bytes(8000))
    check = run("--config", tmp_path / "test.ini", "check")
    assert check.status == 1
    assert check.out.startswith(f"{database}: ")


def test_check_shows_warnings_on_stderr(tmp_path):
    ini = set_up(tmp_path, "port = 0", "")
    status, out, err = run_process("--config", ini, "check", SIS_SYNC_SECRET="")
    assert (status, out) == (0, f"{ini}: good\n")
    assert re.fullmatch("warning: .* not set: .*\nwarning: no institution has a secret .*\n", err)


# demo


def test_demo_shows_everything_and_leaves_nothing_behind(tmp_path):
    result = run_process("demo", "--once", TMPDIR=str(tmp_path), SIS_SYNC_SECRET="")
    assert (result.status, result.err, os.listdir(tmp_path)) == (0, "", [])
    for words in (
        "12,000 new, 0 updated, 0 unchanged",
        "0 new, 12,000 updated, 12,000 unchanged",
        '200 {"received": 2, "imported": 1, ',
        '401 {"error": "unauthorized"',
        '413 {"error": "batch_too_large"',
        '429 {"error": "rate_limited"',
    ):
        assert words in result.out


@posix
@pytest.mark.parametrize(
    "moment, number",
    [
        ("A throw-away server", signal.SIGINT),
        ("A throw-away server", signal.SIGTERM),
        ("  curl http", signal.SIGINT),
    ],
)
def test_demo_serves_until_a_signal_ends_it_quietly(tmp_path, moment, number):
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    words = [*COMMAND, "demo"]
    process = subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)
    line = next(line for line in process.stdout if moment in line)
    port = re.search(r"http://127.0.0.1:(\d+)", line)[1]
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(head_of("GET", "/healthz"))
        assert parse_answer(read_to_end(connection)).status == 200
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err, os.listdir(tmp_path)) == (0, "", [])


# ---------------------------------------------------------------------------------------------
# Section 7: push
# ---------------------------------------------------------------------------------------------


def roster_of(number):
    lines = [f"U{each},u{each}@example.edu\n" for each in range(1, number + 1)]
    return "".join(["student_id_ext,email\n", *lines])


ONE = roster_of(1)


def push(port, roster, *words, **environment):
    """Push a file, or a text as standard input. Of an option given twice the last one counts."""
    file, stdin = ("-", roster) if isinstance(roster, (str, bytes)) else (roster, b"")
    words = ("--url", f"http://127.0.0.1:{port}", "--cohort", "2026", *words)
    return run("push", file, *words, stdin=stdin, **environment)


# Before anything is sent

IMPOSSIBLE = [
    ("--cohort=", "push needs --cohort ID"),
    ("--url=", "push needs --url URL, or --dry-run"),
    ("--secret-file no.txt", "no.txt: No such file or directory"),
    ("--url https://h --ca-file no.pem", "--ca-file no.pem: "),
    ("--url http://127.0.0.1:{0}/\xe9", "stopped: not_found: "),
    ("--url https://localhost:{0}", "stopped: localhost:{0} does not speak https at this port; "),
    ("--cohort {0:065}", "stopped: invalid_field: cohort_id must be at most 64 characters"),
    ("--cohort {0:065} --dry-run", "cohort_id must be at most 64 characters"),
]
URLS = (
    "ftp://h http:// http://[::1 http://[::1%eth0] http://h:x http://h:65536 http://u@h http://h?q"
)
IMPOSSIBLE += [
    (f"--url {url}", f"--url {url}: must be http:// or https://") for url in URLS.split()
]


@pytest.mark.parametrize("words, line", IMPOSSIBLE)
def test_what_cannot_work_is_one_clear_line_and_2(server, words, line):
    words = words.format(server.port).split()
    status, _, err = push(server.port, ONE, "--quiet", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("sis_sync: " + line.format(server.port))


def test_a_file_that_cannot_be_read_is_named(server, tmp_path):
    for path in (tmp_path, tmp_path / "missing.csv"):
        status, out, err = push(server.port, path)
        assert (status, out, err.startswith(f"sis_sync: {path}: ")) == (2, "", True)


def test_the_secret_is_in_the_environment_or_in_a_file(server, tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text(f"\ufeff{SECRET}\n", "utf-8")
    assert push(server.port, ONE, "--secret-file", path, SIS_SYNC_SECRET="").status == 0
    assert "sis_sync: stopped: unauthorized: " in push(server.port, ONE, SIS_SYNC_SECRET="x").err
    missing = "sis_sync: env:SIS_SYNC_SECRET: missing or empty\n"
    assert push(server.port, ONE, "--quiet", SIS_SYNC_SECRET="") == (2, "", missing)


@pytest.mark.parametrize("text", ["student_id_ext,email\n\n,\n", "[]", '{"students": []}'])
def test_no_students_at_all_is_1_and_nothing_is_sent(server, text):
    status, out, err = push(server.port, text, "--cohort", "nobody")
    assert (status, out, err.splitlines()[-1]) == (1, "", "-: no students, so nothing is sent")
    assert not server.rows("SELECT * FROM syncs WHERE cohort_id = 'nobody'")


def test_the_command_line_says_how_to_read_a_csv(server):
    roster = "No,Mail,First Name\nU1,a@b,Zoë\n"
    words = "--map student_id_ext=No --map email=Mail --encoding cp1252 --cohort mapped"
    err = push(server.port, roster, *words.split()).err
    assert err.startswith("no column for last_name: it will be null for every student\n")
    query = "SELECT student_id_ext, email, first_name FROM roster WHERE cohort_id = 'mapped'"
    assert server.rows(query) == [("U1", "a@b", "ZoÃ«")]


def test_a_dry_run_judges_like_the_server(service):
    values = ["", " \u2003", "a@b", "O'Brien", "Zoë", "a@b@c", "a b", "a@\0b", "a@\ud800b"]
    values += [None, 1, 1.5, True, [], {}, *("x" * length for length in (254, 255, 256))]
    students = [student(firstName="x"), student(2), None, "x"]
    for field, (number, value) in itertools.product(sis_sync.NAMES, enumerate(values)):
        students.append({**student(f"{number} {field}"), field: value})
    errors = handle(service, batch(*students)).document["errors"]
    status, out, _ = run("push", "-", "--cohort", "1", "--dry-run", stdin=json.dumps(students))
    head, *lines = out.splitlines()
    assert (status, head) == (1, "cohort 1: 130 of 130 students checked")
    assert lines == [
        f"  rejected {len(errors)}",
        *("  item {row}: {error}: {message}".format(**error) for error in errors),
        "  ignored, as they are no fields: firstName",
        "Running the same push again is safe, however often.",
    ]


def test_json_of_any_depth_is_no_traceback(server):
    for depth in range(850, 1000):
        text = '[{"email": ' + "[" * depth + "]" * depth + "}]"
        assert push(server.port, text, "--quiet").status in (1, 2)


# The connection


@pytest.mark.parametrize("url", ["http://localhost:{}/", "HTTP://127.0.0.1:{}/api/sis/sync/"])
def test_the_url_may_have_a_path(server, url):
    assert push(server.port, ONE, "--quiet", "--url", url.format(server.port)) == (0, "", "")


def test_http_to_another_machine_is_a_warning():
    warning, stopped = push(0, ONE, "--quiet", "--url", "http://a..b").err.splitlines()
    assert warning == "warning: http:// to another machine sends secret and students in clear text"
    words = "a..b cannot be reached by this name and port; are they spelt right?"
    assert stopped == f"sis_sync: stopped: {words}"


def test_an_answer_counts_that_comes_before_all_is_sent(server):
    roster = json.dumps([{"x": "x" * 8_000_000}])
    err = push(server.port, roster, "--quiet", SIS_SYNC_SECRET="x").err
    assert err.startswith("sis_sync: stopped: unauthorized: ")


def looking_up(monkeypatch, *address):
    """As if every name had this address, or none."""
    look_up = socket.getaddrinfo

    def changed(host, *more, **options):
        if not address:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return look_up(*address, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", changed)


def test_a_name_that_does_not_exist_is_not_tried_again(monkeypatch):
    looking_up(monkeypatch)
    err = push(0, ONE, "--quiet", "--url", "https://sync.example.edu").err
    assert err.startswith("sis_sync: stopped: sync.example.edu cannot be reached by this name and")


UNTRUSTED = "sis_sync: stopped: .*:[0-9]+ has a certificate that does not hold: "
CERTIFICATES = [
    ("https://localhost", b"40", True, ""),
    (
        "https://localhost",
        b"40",
        False,
        "{}self.signed certificate; --ca-file names one to trust\n",
    ),
    ("https://localhost", b"20", True, "{}certificate has expired\n"),
    ("https://sync.example.edu", b"40", True, "{}.*not valid for 'sync.example.edu'.*\n"),
    ("http://localhost", b"40", True, "sis_sync: stopped: malformed_request: .*https, .*\n"),
]


@pytest.mark.parametrize("url, year, trusted, words", CERTIFICATES)
def test_a_certificate_must_hold(tmp_path, monkeypatch, url, year, trusted, words):
    path = tmp_path / "server.pem"
    make_certificate(path)
    # Its last year is changed. That breaks its signature, but nobody checks what signs itself.
    changed = re.sub(rb"(?<=Z\x17\r)..", year, ssl.PEM_cert_to_DER_cert(path.read_text()))
    path.write_text(ssl.DER_cert_to_PEM_cert(changed))
    looking_up(monkeypatch, "127.0.0.1")
    options = ("--ca-file", path) if trusted else ()
    with running(tmp_path, tls_ini(path)) as process:
        result = push(0, ONE, "--quiet", "--url", f"{url}:{process.port}", *options)
    assert re.fullmatch(words.format(UNTRUSTED), result.err)
    assert result.status == (2 if words else 0)


# While it goes on


def test_elsewhere_than_on_a_terminal_there_is_a_line_for_each_page(server):
    err = push(server.port, roster_of(5), "--batch", "2").err
    assert re.findall("(.) of 5 students\n", err) == ["2", "4", "5"]
    err = push(server.port, roster_of(5001)).err
    assert re.findall("(.*) of 5,001 students\n", err) == ["5,000", "5,001"]


def test_on_a_terminal_there_is_a_bar_and_its_line_ends_whatever_follows():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    answers = iter([sis_sync.check_locally(batch({})), sis_sync.Answer(401, {})])
    rows = [(2, {}), (3, {}), (4, {})]
    progress = sis_sync.Push(lambda page: next(answers), "2026", rows, terminal)
    with pytest.raises(sis_sync.CommandError, match="stopped: .*401"):
        progress.run(1)
    bar = r"\r\x1b\[K\[#{6} {14}\] 1 of 3 students\n"
    assert re.fullmatch(bar, terminal.getvalue())


@contextlib.contextmanager
def pushing(process):
    """A push of 2,000 students in pages of 10, going on as a process of its own."""
    url = f"http://127.0.0.1:{process.port}"
    words = (*COMMAND, "push", "-", "--batch", "10", "--url", url, "--cohort", "2026")
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen(words, env=ENVIRONMENT, encoding="utf-8", **pipes) as client:
        client.stdin.write(roster_of(2000))
        client.stdin.close()
        try:
            yield client
        finally:
            client.kill()


def test_it_goes_on_when_nobody_looks_any_more(server):
    with pushing(server) as client:
        client.stderr.close()
        assert "2,000 of 2,000 students sent" in client.stdout.read()


@posix
def test_ctrl_c_ends_with_the_report_so_far(tmp_path):
    ini = ini_of(limits="requests_per_minute = 1")
    with running(tmp_path, ini) as process, pushing(process) as client:
        assert any("rate_limited: again in 60 s" in line for line in client.stderr)
        client.send_signal(signal.SIGINT)
        assert "10 of 2,000 students sent\n  new 10, " in client.stdout.read()
        assert (client.wait(20), client.stderr.read()) == (130, "")


@posix
def test_a_secret_that_changes_midway_stops_it_with_the_report_so_far(tmp_path):
    options = {"environment": {"NEXT": OTHER_SECRET}}
    with running(tmp_path, **options) as process, pushing(process) as client:
        assert any("100 of" in line for line in client.stderr)
        client.send_signal(signal.SIGSTOP)
        process.ini.write_text(ini_of(institutions="[institution example]\nsecrets = env:NEXT\n"))
        process.process.send_signal(signal.SIGHUP)
        process.wait_for("reloaded")
        client.send_signal(signal.SIGCONT)
        report = client.stdout.read()
        assert client.wait(20) == 2
        assert "sis_sync: stopped: unauthorized: " in client.stderr.read()
        [(stored,)] = process.rows("SELECT count(*) FROM entries")
        assert f" {stored:,} of 2,000 students sent\n  new {stored:,}, " in report


@posix
def test_a_server_killed_and_restarted_midway_does_no_harm(tmp_path):
    with running(tmp_path) as process, pushing(process) as client:
        process.words += ("--port", str(process.port))
        assert any("100 of" in line for line in client.stderr)
        process.stop(signal.SIGKILL)
        assert any("no answer" in line for line in client.stderr)
        process.start()
        assert "2,000 of 2,000 students sent" in client.stdout.read()
        assert client.wait(20) == 0
        assert process.rows("SELECT count(*) FROM entries") == [(2000,)]


def test_more_pages_than_the_rate_limit_allows_go_through(tmp_path):
    with running(tmp_path, ini_of(limits="requests_per_minute = 60")) as process:
        status, out, _ = push(process.port, roster_of(61), "--batch", "1")
    assert (status, "new 61, " in out) == (0, True)


def test_a_page_that_is_too_large_is_halved_and_its_lines_stay_right(tmp_path):
    roster = re.sub("u(1|500|999)@example.edu", "", roster_of(1000))
    with running(tmp_path, ini_of(limits=FAST + "max_students = 150")) as process:
        out = push(process.port, roster).out
        process.stop()
    assert re.findall("line ([0-9]+): missing_field", out) == ["2", "501", "1000"]
    assert "new 997, updated 0 (of these unchanged 0), rejected 3\n" in out
    assert process.rows("SELECT received FROM syncs") == [(125,)] * 8
    assert sum(" 413 " in line for line in process.log) == 3  # it is learnt once


# Servers that fail: such a one gives these answers, one a connection

STORED = (
    b"HTTP/1.1 200 OK\r\n\r\n"
    b'{"details": {"imported": 1, "updated": 0, "unchanged": 0}, "errors": []}'
)


def push_to(*answers):
    """Push one student, without the waiting: the result, the waits, the different requests."""
    waits = []
    bodies = set()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)
    port = listener.getsockname()[1]

    def serve():
        with listener:
            for answer in answers:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as stream:
                    head = b"".join(iter(stream.readline, b"\r\n"))
                    bodies.add(stream.read(int(re.search(rb"Content-Length: (\d+)", head)[1])))
                    connection.sendall(answer)

    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor() as pool:
        patch.setattr(sis_sync, "sleep", waits.append)
        serving = pool.submit(serve)
        result = push(port, ONE)
        serving.result()
    return result, waits, bodies


def test_it_waits_as_retry_after_says():
    result, waits, bodies = push_to(
        b'HTTP/1.1 429 No\r\nRetry-After: 7\r\n\r\n{"error": "\\u001b"}',
        b"HTTP/1.1 503 No\r\nRetry-After: 3600\r\n\r\n<html>",
        STORED,
    )
    assert (result.status, waits, len(bodies)) == (0, [7, 3600], 1)
    assert "0 of 1 students, \\x1b: again in 7 s\n" in result.err


def test_a_server_that_asks_to_wait_again_and_again_is_given_up(monkeypatch):
    monkeypatch.setattr(sis_sync, "MAX_REQUESTS", 9)
    result, _, _ = push_to(*[b"HTTP/1.1 503 No\r\nRetry-After: 1\r\n\r\n{}"] * 9)
    assert re.search("stopped: .*503", result.err)


TRANSIENT = [
    b"",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 408 No\r\n\r\n",
    b"HTTP/1.1 429 No\r\n\r\n{}",
    b"HTTP/1.1 429 No\r\nRetry-After: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n",
    b"HTTP/1.1 500 No\r\nRetry-After: 7\r\n\r\n{}",
    b"HTTP/1.1 502 No\r\n\r\n<html>",
    b"HTTP/1.1 503 No\r\nRetry-After: -1\r\n\r\n",
    b"HTTP/1.1 503 No\r\nRetry-After: 0\r\n\r\n",
]


@pytest.mark.parametrize("answer", TRANSIENT)
def test_what_may_pass_is_tried_again_five_times_with_growing_waits(answer):
    result, waits, bodies = push_to(*[answer] * 5, STORED)
    assert (result.status, len(waits), len(bodies)) == (0, 5, 1)
    assert all(0.75 <= seconds / 2**number <= 1.25 for number, seconds in enumerate(waits))
    result, waits, _ = push_to(*[answer] * 6)
    assert (result.status, len(waits)) == (2, 5)
    assert "sis_sync: stopped: " in result.err


FINAL = [
    (b"HTTP/1.1 301 No\r\nLocation: https://h/\r\n\r\n", "it points to https://h/: push there"),
    (b"HTTP/1.1 400 No\r\n\r\n{}", "400"),
    (b'HTTP/1.1 400 No\r\n\r\n{"errors": null}', "400"),
    (b'HTTP/1.1 403 No\r\n\r\n{"error": "\\u001b[31m"}', "\\x1b[31m"),
    (b"HTTP/1.1 404 No\r\n\r\n<html>", "404"),
    (b"HTTP/1.1 413 No\r\n\r\n{}", "413"),
    (b'HTTP/1.1 422 No\r\n\r\n{"errors": {"email": ["x"]}}', "422"),
    (b"HTTP/1.1 429 No\r\nRetry-After: 3601\r\n\r\n", "it asks to wait 3601 s"),
    (b"HTTP/1.1 200 OK\r\n\r\n<html>", "200"),
    (b"HTTP/1.1 200 OK\r\n\r\n1", "200"),
    (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, "200"),
    (b'HTTP/1.1 200 OK\r\n\r\n{"details": 1}', "200"),
    (STORED.replace(b" 1", b' "x"'), "200"),
    (STORED.replace(b" 1", b" 1e999"), "200"),
    (STORED.replace(b"[]", b'["x"]'), "200"),
    (STORED.replace(b"[]", b'[{"row": 2}]'), "200"),
    (STORED.replace(b"[]", b'[], "ignored": 1'), "200"),
]


@pytest.mark.parametrize("answer, words", FINAL, ids=itertools.count())
def test_what_no_repetition_mends_stops_at_once(answer, words):
    result, waits, _ = push_to(answer)
    assert (result.status, waits) == (2, [])
    assert words in result.err.partition("sis_sync: stopped: ")[2]


# What it says in the end

MESSY = """\
Student_ID_Ext;E-mail;First Name;First In Family
00017;o'brien@example.edu;Zoë;Yes

;no-id@example.edu;A;
1,2E+10;x@example.edu;B;no
00018
00019;d@example.edu;"a
b";0
00020;e@example.edu
00020;f@example.edu;;
"""
REPORT = """\
cohort messy: 5 of 5 students sent
  new {}, updated {} (of these unchanged {}), rejected 5
  line 4: missing_field
  line 5: scientific_notation
  line 6: missing_field
  line 7: invalid_field
  line 10: duplicate_student
Running the same push again is safe, however often.
"""


def test_a_messy_csv_arrives_and_every_bad_line_is_told(server):
    for counts in ((2, 0, 0), (0, 2, 2)):
        status, out, _ = push(server.port, MESSY.encode("cp1252"), "--cohort", "messy")
        assert (status, re.sub(r"(line \d+: \w+): .*", r"\1", out)) == (1, REPORT.format(*counts))
    query = "SELECT student_id_ext, first_name, first_in_family FROM roster WHERE cohort_id = ?"
    assert server.rows(query, "messy") == [("00017", "Zoë", 1), ("00020", None, None)]


def test_of_json_the_item_is_named_and_what_was_ignored(server):
    students = [student(firstName=1), {"student_id_ext": "U2", "\x1b": 1}, student(3, lastName=1)]
    status, out, _ = push(server.port, json.dumps(students, indent=4), "--batch", "1")
    assert status == 1
    assert "\n  item 2: missing_field: email required\n" in out
    assert "\n  ignored, as they are no fields: \\x1b, firstName, lastName\n" in out


def test_of_a_batch_that_is_refused_the_lines_are_named(server):
    result = push(server.port, ONE + "U2\n", SIS_SYNC_SECRET="sis_the-strict-ones-secret")
    assert result.status == 2
    assert "\n  line 3: missing_field: email required\n" in result.out
    assert "stopped: invalid_rows: 1 of 2 rows are bad" in result.err


def test_a_quiet_push_prints_only_what_is_wrong(server):
    assert push(server.port, roster_of(9), "--quiet") == (0, "", "")
    fault = "  line 3: missing_field: email required\n"
    assert push(server.port, ONE + "U2\n", "--quiet") == (1, fault, "")
    fault = "  line 2: wrong_columns: more columns than the header has\n"
    assert push(server.port, "student_id_ext,email\nU1,a@b,c\n", "--quiet") == (1, fault, "")


# ---------------------------------------------------------------------------------------------
# Section 7: the files that push reads
# ---------------------------------------------------------------------------------------------


def read(folder, data, **options):
    """What push reads of a file, "NUMBER: VALUE, VALUE" or "NUMBER: FAULT", and its notes."""
    path = folder / "roster.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with logged() as notes:
        file = read_roster(path, **options)
    rows = [f"{number}: {fault}" for number, fault in file.faults.items()]
    rows += [f"{number}: {', '.join(map(str, row.values()))}" for number, row in file.rows]
    return sorted(rows), notes


def words_of(folder, data, **options):
    """The words with which it is refused, without the folder."""
    with pytest.raises(sis_sync.CommandError) as caught:
        read(folder, data, **options)
    return "\n".join(caught.value.args).replace(f"{folder}{os.sep}", "")


# CSV as it is found

WARNING = "warning: not UTF-8, so read as Windows-1252: see that names come out right"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("delimiter", ",;\t|")
def test_a_csv_has_one_of_four_delimiters_and_of_three_encodings(tmp_path, delimiter, encoding):
    text = 'student_id_ext?email?first_name\n007?a@b?Zoë\nU2?c@d?"O\'B ""x"",;\t|"\n'
    rows, notes = read(tmp_path, text.replace("?", delimiter).encode(encoding))
    assert rows == ["2: 007, a@b, Zoë", '3: U2, c@d, O\'B "x",;\t|']
    assert (WARNING in notes) is (encoding == "cp1252")


HEADER = "student_id_ext,email,first_name\n"
DUPLICATE = "duplicate_student: the same student_id_ext stood higher up"
AS_FOUND = [
    ("\ufeffsep=;\nstudent_id_ext;email\nU1;a@b\n", "3: U1, a@b"),
    ("sep=^\r\nstudent_id_ext^email\r\nU1^a@b", "3: U1, a@b"),
    ("#TYPE System.Object\nstudent_id_ext,email\nU1,a@b\n", "3: U1, a@b"),
    ("\n \nstudent_id_ext,email\nU1,a@b\n", "4: U1, a@b"),
    ("student_id_ext,email\rU1,a@b\r", "2: U1, a@b"),
    ("[student_id_ext],[email]\nU1,a@b\n", "2: U1, a@b"),
    ('"Student ID Ext", "E-Mail "\n"U1", "a@b"\n', "2: U1, a@b"),
    ("student_id_ext,email,,\n , \nU1,a@b,,\n", "3: U1, a@b"),
    (",student_id_ext,,email\n1,U1,x,a@b\n", "2: U1, a@b"),
    (HEADER + '\nU1,a@b,"x\r\ny"\n,,\nU2,c@d,\n', "3: U1, a@b, x\r\ny|6: U2, c@d, "),
    (HEADER + 'U1,a@b,"' + "x\n" * 9 + 'x"\n', "2: U1, a@b, " + "x\n" * 9 + "x"),
    (HEADER + 'U1,a@b,N"3\nU2,a@b,N3"', '2: U1, a@b, N"3|3: U2, a@b, N3"'),
    (HEADER + 'U1,a@b,N"3"\nU2,a@b,"N""3"', '2: U1, a@b, N"3"|3: U2, a@b, N"3'),
    (HEADER + "U1,a@b,N,x\n", "2: wrong_columns: more columns than the header has"),
    (HEADER + "U1,a@b\nU1,c@d\n", f"2: U1, a@b, |3: {DUPLICATE}"),
    (HEADER + "'U1','a@b','Ann'\n'U2','c@d','Zoë'", "2: U1, a@b, Ann|3: U2, c@d, Zoë"),
    (HEADER + "U1,a@b,'s-Gravenhage\nU2,a@b,NULL", "2: U1, a@b, 's-Gravenhage|3: U2, a@b, "),
    (HEADER + "U1,a@b,x\u200dy\n", "2: U1, a@b, x\u200dy"),
    # Excel leaves the empty cells at the end of a row away.
    ("first_name,student_id_ext,email,room\nA,U1\nB\n", "2: U1, , A|3: , , B"),
    # Control characters stay, to be refused as such.
    ("student_id_ext,email\nU\0,a@b\n\x1cU2,a@b\n", "2: U\0, a@b|3: \x1cU2, a@b"),
]


@pytest.mark.parametrize("text, rows", AS_FOUND)
def test_what_surrounds_the_values_is_seen_through(tmp_path, text, rows):
    assert read(tmp_path, text)[0] == rows.split("|")


def test_columns_that_are_missing_or_not_used_are_named(tmp_path):
    rows, notes = read(tmp_path, "Student ID Ext,E-Mail ,FIRST_NAME,Other,Room \nU1,a@b,Zoë,x,y\n")
    assert rows == ["2: U1, a@b, Zoë"]
    note = "no column for {}: it will be null for every student"
    missing = [note.format(name) for name in sis_sync.NAMES[3:]]
    assert notes == [*missing, "columns not used: 2: 'Other', 'Room'"]


@pytest.mark.parametrize("header", ["No", "#", "№", "-"])
def test_map_names_a_column(tmp_path, header):
    text = f"{header},,Mail\nU1,x,a@b\n"
    mapping = {"student_id_ext": header, "email": "mail"}
    assert read(tmp_path, text, **mapping)[0] == ["2: U1, a@b"]
    words = "roster.csv: must have one column '!', and has 0\n"
    assert words_of(tmp_path, text, **mapping, first_name="!").startswith(words)


NOT_BOOLEAN = "first_in_family must be empty or one of true, yes, y, t, 1, false, no, n, f, 0"
SHORTENED = (
    "scientific_notation: student_id_ext is a number as a spreadsheet shortens it: "
    "format the column as text, export again"
)
CELLS = [
    (",a@b,{}", "TRUE Yes 1 y t 1.0", ", a@b, True"),
    (",a@b,{}", "False no 0 N f 0.0", ", a@b, False"),
    (",a@b,{}", '"" NULL #N/A', ", a@b, None"),
    (",a@b,{}", "maybe 2 -1 NULLS", f"invalid_field: {NOT_BOOLEAN}"),
    ('"{}",a@b', "1.23457E+11 1,23457E+11 2E+15 1.2e+07 1.2E10", SHORTENED),
    ("U1,{}", "x" * 10_001, "invalid_field: email has 10,001 characters"),
]


@pytest.mark.parametrize("line, cells, row", CELLS, ids=itertools.count())
def test_a_cell_becomes_a_value_or_a_fault(tmp_path, line, cells, row):
    lines = [line.format(cell) for cell in cells.split()]
    rows, _ = read(tmp_path, "\n".join(["student_id_ext,email,first_in_family", *lines]))
    assert rows == [f"{number}: {row}" for number, _ in enumerate(lines, 2)]


# Files that are refused

ZIP = b"PK\3\4" + b"x" * 26
CELL = HEADER + 'U1,a@b,"{}"\n'
NO_ROSTERS = [
    ("", "is empty; it must begin with a header"),
    ("\n \n", "is empty; it must begin with a header"),
    ("a,b\n1,2\n", "the columns of its header: a | b"),
    ('"student_id_ext,email"\n"U1,a@b"\n', "if each line as a whole is in quotes, take them off"),
    (HEADER[:-1] + ",First Name\n", "must have one column 'first_name', and has 2"),
    (HEADER.encode("utf-16"), "it looks like UTF-16 or UTF-32: make it UTF-8"),
    ("[{}]".encode("utf-16-le"), "it looks like UTF-16 or UTF-32: make it UTF-8"),
    (ZIP + b"[Content_Types].xml", 'it looks like a workbook: save it as "CSV UTF-8"'),
    (b"\xd0\xcf\x11\xe0", 'it looks like a workbook: save it as "CSV UTF-8"'),
    (ZIP + b"users.csv", "it looks like a zip archive: unpack it"),
    (b"\x81", "line 1 is not cp1252"),
    (b"student_id_ext,email\nU1,a\xe9\nU2,\x81\n", "line 3 is not cp1252"),
    ('"\n', "line 1: unexpected end of data: is there a quote too many"),
    (HEADER + '"' + "x" * 140_000, "line 2: unexpected end of data: is there a quote too many"),
    (CELL.format("\n" * 10 + "x"), "line 2: a cell of over 10 lines: is there a quote too many"),
    ('{"students": 1}', "must be an array of students, or have one in students"),
    ('{"students": [', "is not JSON"),
    ("[{}]\n[{}]", "is not JSON"),
    ("{}\n{}", "it looks like a document in each line"),
]


@pytest.mark.parametrize("data, words", NO_ROSTERS, ids=itertools.count())
def test_a_file_that_cannot_be_understood_is_refused(tmp_path, data, words):
    text = words_of(tmp_path, data)
    assert text.startswith("roster.csv")
    assert words in text


def test_a_file_only_half_of_it_utf_8_is_refused_until_its_encoding_is_said(tmp_path):
    data = f"{HEADER}U1,a@b,Ann\nU2,c@d,Zoë\n".encode() + "U3,e@f,Zoë\n".encode("cp1252")
    mend = "mend it, or say what it is with --encoding"
    assert words_of(tmp_path, data) == f"roster.csv: line 4 is not UTF-8, but others are: {mend}"
    assert words_of(tmp_path, data, encoding="utf-8") == f"roster.csv: line 4 is not utf-8: {mend}"
    rows, _ = read(tmp_path, data, encoding="cp1252")
    assert rows == ["2: U1, a@b, Ann", "3: U2, c@d, ZoÃ«", "4: U3, e@f, Zoë"]


STRAY = ['"N N', '"N N"', '"N "N"', '"N"x N', '"N"3" N', '" "N"']  # of the students 3 and 800


@pytest.mark.parametrize("names", STRAY)
@pytest.mark.parametrize("other", ["N", '"N"'])
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_a_stray_quote_swallows_nobody(tmp_path, names, other, end):
    cells = [other] * 900
    cells[3], cells[800] = names.split()
    lines = [f"U{number},u@example.edu,{cell}" for number, cell in enumerate(cells)]
    line = "roster.csv: line 5: .*: is there a quote too many, or one too few[?]"
    assert re.fullmatch(line, words_of(tmp_path, HEADER + end.join(lines)))


# What a program has put around a value

WRAPPED = [
    ('="007" U2', "007 U2"),
    ("'007 'U2", "007 U2"),
    ("'007 U2", "wrapped_value U2"),
    ("'007' 'U2'", "007 U2"),
    ("'007' 'U2", "wrapped_value wrapped_value"),
    ('\ufeff"007" “U2”', "007 U2"),
    ("“007” U2", "wrapped_value U2"),
    ('\'="007" \'="U2"', "007 U2"),
    ("1.0 2.00", "1 2"),
    ("1.0 U2", "wrapped_value U2"),
    ("12.5 A.0 007", "12.5 A.0 007"),
    ("U1\ufeff \u200bU\xad2", "U1 U2"),
]


@pytest.mark.parametrize("cells, ids", WRAPPED)
def test_what_is_put_around_ids_goes_if_that_is_certain_and_is_a_fault_else(tmp_path, cells, ids):
    lines = [f"{cell},a@b" for cell in cells.split()]
    rows, _ = read(tmp_path, "\n".join(["student_id_ext,email", *lines]))
    assert [re.sub("[0-9]: |: .*|, a@b", "", row) for row in rows] == ids.split()


def test_an_id_from_a_column_that_is_too_narrow_is_none(tmp_path):
    rows, _ = read(tmp_path, "student_id_ext,email\n######,a@b\nU#2,a@b")
    assert rows == ["2: , a@b", "3: U#2, a@b"]


def test_the_fault_has_the_name_of_the_field_whatever_the_column_is_called(tmp_path):
    rows, _ = read(tmp_path, "Student no,email\n7.0,a@b\nU8,a@b", student_id_ext="Student no")
    assert rows[0] == "2: wrapped_value: student_id_ext has a trailing .0, but not in every line"


WAYS = {
    "an invisible character": "\u200b{}\xad",
    "NULL or #N/A": "NULL",
    "no value": "None",
    '="..."': '="{}"',
    '"..."': '"{}"',
    "'...'": "'{}'",
    "a leading apostrophe": "'{}",
    "a trailing .0": "{}.0",
}


@pytest.mark.parametrize("seed", range(200))
def test_whatever_is_wrapped_is_read_as_it_was_or_is_a_fault(tmp_path, seed):
    pick = random.Random(seed)
    ways = ["{}", *(WAYS[wrapping.words] for wrapping in sis_sync.WRAPPINGS)]
    # One may be within another one, but .0 stands behind a number only.
    pairs = itertools.permutations(ways, 2)
    ways += [outer.format(inner) for outer, inner in pairs if outer != "{}.0"]
    columns = [pick.choices(ways, k=pick.randint(1, 3)) for _ in range(2)]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(sis_sync.NAMES[:2])
    meant = []
    for number in range(2, 9):
        chosen = [pick.choice(column) for column in columns]
        table.writerow(way.format(f"00{number}") for way in chosen)
        values = [f"00{number}" if "{}" in way else "" for way in chosen]
        meant.append(f"{number}: {', '.join(values)}")
    rows, _ = read(tmp_path, text.getvalue())
    for row, as_it_was in itertools.zip_longest(rows, meant):
        assert row == as_it_was or row.startswith(as_it_was[:3] + "wrapped_value: ")
    assert rows == meant or max(map(len, columns)) > 1


# JSON

JSON = [
    "[{}]",
    "\ufeff \n[{}]",
    '{{"cohort_id": "2026", "students": [{}]}}',
    '{{"students": {{"value": [{}], "Count": 1}}}}',  # PowerShell writes this
]


@pytest.mark.parametrize("document", JSON)
def test_json_is_an_array_or_a_request_body(tmp_path, document):
    data = document.format(json.dumps(student()))
    assert read(tmp_path, data)[0] == ["1: U1, u1@example.edu"]
    assert words_of(tmp_path, data, email="x") == "roster.csv: is JSON, and --map is for CSV"


def test_json_for_another_cohort_is_refused(tmp_path):
    words = "roster.csv: its cohort_id is '2025', not that of --cohort"
    assert words_of(tmp_path, json.dumps(batch(student(), cohort_id="2025"))) == words


# OneRoster

USERS = "sourcedId,givenName,familyName,email,identifier,"
USER = "s{},Zoë,Ng,a@b,001{},"
TODAY = [  # status, enabledUser, role, beginDate, endDate, and why this is no student on 2026-02-28
    (",,student,,", ""),
    ("active,true,Student,2026-02-28T00:00:00Z,2026-02-28", ""),
    ("ToBeDeleted,,student,,", "status is tobedeleted"),
    ("inactive,,student,,", "status is inactive"),
    ('="left",,student,,', "status is left"),
    (",FALSE,student,,", "enabledUser is false"),
    (",?,student,,", "enabledUser is ?"),
    (",,teacher,,", "not a student"),
    (",,student,2026-03-01,", "not a student today"),
    (",,student,,2026-02-27T00:00:00Z", "not a student today"),
    (",,student,01/02/2026,", "a date is not YYYY-MM-DD"),
    (",,student,,28.2.2026", "a date is not YYYY-MM-DD"),
]


@pytest.mark.parametrize("values, reason", TODAY)
def test_of_oneroster_only_who_is_a_student_today_is_taken(tmp_path, monkeypatch, values, reason):
    monkeypatch.setattr(sis_sync, "strftime", lambda form: "2026-02-28")
    columns = "status,enabledUser,role,beginDate,endDate\n"
    user = USER.format(1, 2)
    for text in (USERS + columns + user + values, USERS + "role\n" + user):
        rows, notes = read(tmp_path, text)
        assert rows == ([] if reason else ["2: s1, a@b, Zoë, Ng"])
        said = "\n".join(notes)
        assert (f"left out: 1: {reason}" in said, "no roles" in said) == (bool(reason), False)
        (tmp_path / "roles.csv").write_text(f"userSourcedId,{columns}S1,{values}")


ROLES = """\
Role;User Sourced Id;Name;;
Student ;S1;Müller;;
;;;;
teacher;s2;;;
teacher;s3;;;
student;s3;;;
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("name", ["roles.csv", "Roles.CSV"])
def test_who_has_no_role_has_those_of_roles_csv_beside_it(tmp_path, name, encoding):
    users = [USER.format(number, number) for number in range(5)]
    text = "\n".join([USERS + "role", *users]) + "student"
    rows, notes = read(tmp_path, text)
    note = "no roles: everybody is taken for a student; put roles.csv beside it"
    assert (len(rows), note in notes) == (5, True)
    (tmp_path / name).write_bytes(ROLES.encode(encoding))
    rows, notes = read(tmp_path, text, student_id_ext="identifier")
    assert rows == ["3: 0011, a@b, Zoë, Ng", "5: 0013, a@b, Zoë, Ng", "6: 0014, a@b, Zoë, Ng"]
    left_out = ["1: no role in roles.csv", "1: not a student"]
    assert notes[-2:] == [f"rows left out: {line}" for line in left_out]


ODD_ROLES = [
    (b'userSourcedId,role\ns1,student\ns2,"stud"ent\n', "roles.csv: line 3: "),
    (b"userSourcedId,role\n\xff\x81,student\n", "roles.csv: line 2 is not cp1252: "),
]


@pytest.mark.parametrize("data, words", ODD_ROLES)
def test_roles_csv_is_read_as_strictly(tmp_path, data, words):
    (tmp_path / "roles.csv").write_bytes(data)
    assert words_of(tmp_path, USERS + "\n").startswith(words)


# ---------------------------------------------------------------------------------------------
# Section 7: export, history, backup, forget
# ---------------------------------------------------------------------------------------------

DAY = 24 * 60 * 60
NOW = 1_790_000_000  # 2026-09-21T14:13:20Z
FIRST_LINE = ",".join(sis_sync.NAMES)


class School:
    """A server without sockets, whose clock we set, and the commands on its database."""

    def __init__(self, folder):
        institutions = "[institution a]\n[institution another-school]\nsecrets = env:OTHER\n"
        config = configuration_of(folder, ini_of(institutions=institutions), OTHER=OTHER_SECRET)
        self.ini = folder / "test.ini"
        self.database = folder / "sis_sync.db"
        self.now = NOW
        self.service = sis_sync.Service(config)

    def push(self, *students, secret=SECRET, **values):
        body = batch(*students, **values)
        return handle(self.service, body, authorization=f"Bearer {secret}").document["details"]

    def ask(self, command):
        return run("--config", self.ini, *command.split(), OTHER=OTHER_SECRET)

    def stop(self):
        self.service.database.try_to_close()


@pytest.fixture
def school(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    school = School(tmp_path)
    monkeypatch.setattr(time, "time", lambda: school.now)
    yield school
    school.stop()


def execute(path, statement):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


def date(day):
    """A day as it is written behind an option. 0 is that of NOW."""
    return time.strftime("%Y-%m-%d", time.localtime(NOW + day * DAY))


# What holds for all of them.
FOREIGN = "this is a database of another program"
VERSION = "the database is of version {}, and this program knows versions 2 to 3"
CPYTHON = sys.implementation.name == "cpython"  # PyPy has words of its own
UNABLE = "unable to open database file" if CPYTHON else "Could not open database"
UNREADABLE = {
    "there is no database yet; a start makes it": os.remove,
    "file is not a database": lambda path: path.write_text("precious " * 1000),
    UNABLE: lambda path: (os.remove(path), os.mkdir(path)),
    FOREIGN: lambda path: execute(path, "DROP TABLE syncs"),
    VERSION.format(1): lambda path: execute(path, "PRAGMA user_version = 1"),
    VERSION.format(99): lambda path: execute(path, "PRAGMA user_version = 99"),
}


@pytest.mark.parametrize("words, spoil", UNREADABLE.items())
def test_a_database_that_cannot_be_read_is_named_and_why(school, words, spoil):
    school.stop()
    spoil(school.database)
    forget = "forget --institution a --yes"
    for command in ("export", "history", "history --stale 1", "backup copy.db", forget):
        result = school.ask(command)
        assert result == (2, "", f"sis_sync: {school.database}: {words}\n")
    assert not os.path.exists("copy.db")


NOT_YET = "nothing is erased yet: add --yes\n"
REACH = "not reached: backups, and the feed, whose next push brings them back\n"
HARMLESS = {
    "export": "",
    "history": "",
    "history --stale 1": "",
    "forget --institution a": NOT_YET + REACH,
    "export --output sis_sync.db": "sis_sync: sis_sync.db: File exists\n",
    "export --output test.ini": "sis_sync: test.ini: File exists\n",
    "export --output no/x": "sis_sync: no/x: No such file or directory\n",
    "backup sis_sync.db": "sis_sync: sis_sync.db: File exists\n",
    "backup test.ini": "sis_sync: test.ini: File exists\n",
    "backup no/x": "sis_sync: no/x: No such file or directory\n",
}


@pytest.mark.parametrize("command, words", HARMLESS.items())
def test_no_command_overwrites_a_file_or_leaves_one_behind(school, command, words):
    def files():
        paths = school.ini.parent.iterdir()
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    school.push(student())
    school.stop()
    before = files()
    assert school.ask(command).err == words
    assert files() == before


@posix
@pytest.mark.parametrize("command", ["export --output", "backup"])
def test_a_new_file_is_its_owners_alone(school, command):
    school.push(student())
    assert school.ask(f"{command} /dev/null").status == 2
    assert school.ask(f"{command} copy.db") == (0, "", "")
    assert os.stat("copy.db").st_mode & 0o777 == 0o600


HOURS = "must be a number of hours"
DATE = "must be a date, YYYY-MM-DD"
WRONG_VALUES = {
    "history --stale=nan": HOURS,
    "history --stale=inf": HOURS,
    "history --stale=-1": HOURS,
    "history --stale=1e3": HOURS,
    "history --stale=": HOURS,
    "history --stale=99999999": HOURS,
    "history --last=0": "must be a whole number from 1 to 1000000",
    "history --since=2026-02-30": DATE,
    "export --not-seen-since=1.2.2026": DATE,
}


@pytest.mark.parametrize("command, words", WRONG_VALUES.items())
def test_a_wrong_value_of_an_option_is_named(command, words):
    result = run(*command.split())
    assert result.status == 2
    assert f"; {words}\n" in result.err


# Export.
def test_an_export_is_csv_with_the_names_of_the_fields(school):
    school.push(FULL, student("=1", first_name="=1+1", last_name="-x", campus_name='a,"b"'))
    full = "U2025001,alex.connor@student.example.edu.au,Alex,Connor,BUSI,Sunshine Coast,false"
    odd = 'U=1,u=1@example.edu,=1+1,-x,,"a,""b""",'
    result = school.ask("export")
    assert result == (0, f"{FIRST_LINE}\r\n{full}\r\n{odd}\r\n", "")
    school.ask("export --output out.csv")
    with open("out.csv", encoding="utf-8", newline="") as file:
        assert file.read() == result.out


def test_for_a_spreadsheet_it_has_a_mark_and_no_formula(school):
    values = {"student_id_ext": "-1", "email": "=a@b", "first_name": "＝1", "last_name": "Zoë-x"}
    school.push({**values, "program_code": "+1", "campus_name": "@1", "first_in_family": True})
    row = "'-1,'=a@b,'＝1,Zoë-x,'+1,'@1,true"
    assert school.ask("export --excel").out == f"\ufeff{FIRST_LINE}\r\n{row}\r\n"


CHOICE = """\
sis_sync: choose one of these rosters (none: nothing has been pushed yet):
sis_sync:   --institution a --cohort 2026
sis_sync:   --institution a --cohort 2027
sis_sync:   --institution another-school --cohort 2026
"""


def test_an_export_guesses_no_roster(school):
    school.push()
    school.push(cohort_id="2027")
    school.push(student(), secret=OTHER_SECRET)
    for words in ("", "--institution a", "--cohort 2026", "--cohort x"):
        assert school.ask(f"export {words}") == (2, "", CHOICE)
    assert school.ask("export --cohort 2027") == (0, f"{FIRST_LINE}\r\n", "")
    assert "U1,u1@example.edu" in school.ask("export --institution another-school").out


def test_push_takes_an_export_back_unchanged_whatever_the_order_of_pages(server):
    pick = random.Random(1)
    letters = "aZ09 ,;\"'=+-@\\|\u00e9e\u0301王\u200d👩\x85\u2028\ufeff\xad"
    students = []
    for number in range(600):
        name, campus = ("".join(pick.choices(letters, k=pick.randrange(40))) for _ in "12")
        values = {"first_name": name, "campus_name": campus}
        family = pick.choice((None, True, False))
        students.append(student(f"={number}'", first_in_family=family, **values))
    pages = [students[:400], students[400:]]
    exports = []
    for cohort, order in (("one", pages), ("two", [*pages[::-1], pages[0]])):
        for page in order:
            assert server.push(*page, cohort_id=cohort).document["errors"] == []
        exports.append(run("--config", server.ini, "export", "--cohort", cohort).out)
        words = ("--cohort", cohort, "--url", f"http://127.0.0.1:{server.port}")
        result = run("push", "-", *words, stdin=exports[-1])
        assert "new 0, updated 600 (of these unchanged 600), rejected 0\n" in result.out
    assert exports[0] == exports[1]


# Who has left. On the first of these days U1, U2 and U3 are pushed, then U1 and U2, then only U1.
LEAVERS = [
    ((0, 1, 2), 0, ""),
    ((0, 1, 2), 1, "U3"),
    ((0, 1, 2), 2, "U2 U3"),
    ((0, 1, 2), 3, None),  # the feed has stopped
    ((0, 1, -20_000), 1, None),  # the clock says 1971
    ((0, 5000, 2), 2, "U3"),  # it said 2040, and that hides U2 for one night
    ((0, 5000, 2, 3), 3, "U2 U3"),
]


def listed(result):
    assert result.out.startswith(FIRST_LINE)
    return [line.partition(",")[0] for line in result.out.splitlines()[1:]]


@pytest.mark.parametrize("days, since, left", LEAVERS)
def test_who_has_left_is_listed_by_the_order_of_syncs(school, days, since, left):
    for day, size in zip(days, (3, 2, 1, 1)):
        school.now = NOW + day * DAY
        school.push(*map(student, range(1, size + 1)))
    result = school.ask(f"export --not-seen-since {date(since)}")
    if left is None:
        words = "nobody is listed: nothing has come for this cohort since"
        assert result == (1, "", f"{words} {sis_sync.utc(school.now)}\n")
    else:
        assert listed(result) == left.split()


@pytest.mark.parametrize("seed", range(8))
def test_whoever_is_listed_has_left_whatever_the_nights_were_like(school, seed):
    pick = random.Random(seed)
    people = list(range(12))  # when U3 was forgotten and comes back, they are person 15
    days, pages, latest = [], [], set()
    for night in range(12):
        numbers = pick.sample(range(12), pick.randrange(5, 10))
        size = pick.randrange(1, 6)
        tonight = set()
        for start in range(0, len(numbers), size):
            page = numbers[start : start + size]
            for _ in range(pick.choice((0, 1, 1, 1, 2))):  # it fails, comes, comes twice
                days.append(night + pick.choice((0, 0, 0, 0, 0, 3, -20_000, 5000)))
                pages.append({people[number] for number in page})
                tonight |= pages[-1]
                school.now = NOW + days[-1] * DAY
                school.push(*map(student, page))
                school.now = NOW + pick.randrange(12) * DAY
                school.push(*map(student, pick.sample(range(12), 3)), cohort_id="another")
        latest = tonight or latest
        if pick.random() < 0.2:
            chosen = f"--cohort 2026 --student U{numbers[0]}"
            school.ask(f"forget --institution a {chosen} --yes")
            people[numbers[0]] += 12
        # The judge. A sync is split if some of its students were named again, and some were not.
        since = pick.randrange(night + 2)
        last = {who: sync for sync, page in enumerate(pages) for who in page}
        split = [sync for sync, page in enumerate(pages) if {sync} < {last[who] for who in page}]
        before = [sync for sync, day in enumerate(days) if day < since]
        newest = min(max(split, default=-1), max(before, default=-1))
        left = {f"U{who % 12}" for who in people if last.get(who, len(days)) <= newest}
        assert left.isdisjoint(f"U{who % 12}" for who in latest)
        result = school.ask(f"export --cohort 2026 --not-seen-since {date(since)}")
        if days and days[-1] >= since:
            assert set(listed(result)) == left
        else:
            assert result.out == ""


def test_forgetting_one_leaver_does_not_hide_another(school):
    school.push(student(1))
    school.push(student(2), student(3))
    school.now += DAY
    school.push(student(3))
    command = f"export --not-seen-since {date(1)}"
    assert listed(school.ask(command)) == ["U1", "U2"]
    school.ask("forget --institution a --student U2 --yes")
    assert listed(school.ask(command)) == ["U1"]


# A database as the version before made it. U3 and U4 came at a time of which no sync is known.
OLD_DATABASE = """
CREATE TABLE rosters (
    roster_id INTEGER PRIMARY KEY, institution, cohort_id, UNIQUE (institution, cohort_id));
CREATE TABLE entries (
    entry_id INTEGER PRIMARY KEY, roster_id, student_id_ext, email, first_name, last_name,
    program_code, campus_name, first_in_family, created_at, changed_at, seen_at,
    UNIQUE (roster_id, student_id_ext));
CREATE TABLE syncs (
    sync_id INTEGER PRIMARY KEY, time, institution, cohort_id, client, received, new, updated,
    unchanged, rejected, milliseconds, errors);
INSERT INTO rosters VALUES (1, 'a', '2027'), (2, 'a', '2026');
INSERT INTO syncs VALUES
    (1, 1790000000, 'a', '2026', '', 3, 3, 0, 0, 0, 9, '[]'),
    (2, 1790086400, 'a', '2026', '', 2, 0, 2, 2, 0, 9, '[]'),
    (3, 1790000000, 'a', '2027', '', 0, 0, 0, 0, 0, 9, '[]');
INSERT INTO entries VALUES
    (1, 2, 'U1', 'u1@x', '', '', '', '', 1, 0, 0, 1790086400),
    (2, 2, 'U2', 'u2@x', '', '', '', '', 1, 0, 0, 1790086400),
    (3, 2, 'U3', 'u3@x', '', '', '', '', 1, 0, 0, 1790000000),
    (4, 2, 'U4', 'u4@x', '', '', '', '', 1, 0, 0, 1234567890);
PRAGMA user_version = 2"""


def test_who_has_left_is_known_of_a_database_of_version_2(school):
    school.stop()
    os.remove(school.database)
    for statement in OLD_DATABASE.split(";"):
        execute(school.database, statement)
    school.service = sis_sync.Service(school.service.config)
    result = school.ask(f"export --cohort 2026 --not-seen-since {date(1)}")
    assert listed(result) == ["U3", "U4"]
    assert school.push(student(3)) == {"imported": 0, "updated": 1, "unchanged": 0}


# History.
TABLE = """\
time        institution cohort   received   new updated unchanged rejected    ms
09-21 14:13 anoth…chool a\\x9bm          2     1       0         0        1     9
01-01 00:00 a           0e0…2a10        2     2       0         0        0     9
"""
SYNC_AS_JSON = (
    '[{"sync_id": 2, "time": "2026-09-21T14:13:20Z", "institution": "a", "cohort_id": "2026", '
    '"client": "192.0.2.1", "received": 2, "new": 0, "updated": 1, "unchanged": 1, '
    '"rejected": 1, "milliseconds": 9, "errors": [{"row": 2, "field": "student_id_ext", '
    '"error": "missing_field", "message": "student_id_ext required"}]}]\n'
)


def test_history_is_a_table_of_80_columns_the_last_to_arrive_first(school):
    school.now = 2_208_988_800  # in 2040
    school.push(student(1), student(2), cohort_id="0e0f4a52-6d1f-4f8e-9a77-0d5d3b1c2a10")
    school.now = NOW
    school.push(student(1), {}, cohort_id="a\x9bm", secret=OTHER_SECRET)
    text = school.ask("history").out
    assert re.sub(r"(?m) {1,5}\d{1,5}$", "     9", text) == TABLE


def test_history_has_the_first_rejected_rows_and_as_json_everything(school):
    school.push(student(1), *[None] * 120)
    school.push(student(1), {})
    text = school.ask("history --errors").out
    assert "\n    row 2: missing_field: student_id_ext required\n" in text
    assert text.count("\n    row ") == 1 + 100
    text = school.ask("history --json --last 1").out
    assert re.sub('(?<="milliseconds": )[0-9]+', "9", text) == SYNC_AS_JSON


CHOICES = [
    ("", range(5, 25)),
    ("--last 3", range(22, 25)),
    (f"--since {date(2)}", range(2, 25)),
    (f"--since {date(2)} --last 2", range(23, 25)),
    (f"--since {date(24)} --last 2", range(24, 25)),
    (f"--since {date(25)}", ()),
    pytest.param("--since 1970-01-01", range(25), marks=posix),
]


@pytest.mark.parametrize("words, days", CHOICES)
def test_history_shows_20_syncs_or_the_chosen_ones(school, words, days):
    for day in range(25):
        school.now = NOW + day * DAY
        school.push(cohort_id=str(day))
    syncs = json.loads(school.ask(f"history --json {words}").out)
    assert [int(sync["cohort_id"]) for sync in syncs] == [*reversed(days)]


@posix
@pytest.mark.parametrize("zone, syncs", [("UTC", 0), ("XXX-12", 1)])
def test_a_date_is_a_day_of_the_time_zone_of_the_machine(school, zone, syncs):
    school.push()
    words = ("--config", school.ini, "history", "--json", "--since", "2026-09-22")
    assert len(json.loads(run_process(*words, TZ=zone).out)) == syncs


# How many hours ago a school pushed first and last, and whether "--stale 1.5" names it.
STALE = [(0, 0, 0), (0, 2, 1), (2, 0, 0), (-90_000, 0, 0), (-90_000, 2, 1), (0, -2, 1)]


@pytest.mark.parametrize("first, last, status", STALE)
def test_stale_goes_by_the_last_sync_to_arrive(school, first, last, status):
    school.push(secret=OTHER_SECRET)
    for hours in (first, last):
        school.now = NOW - hours * 3600
        school.push()
    line = f"a: last sync {sis_sync.utc(school.now)}\n"
    school.now = NOW
    assert school.ask("history --stale 1.5") == (status, status * line, "")


def test_stale_names_who_never_pushed_but_nobody_who_is_not_configured(school):
    school.push()
    school.ini.write_text(ini_of(institutions="[institution new]\n"))
    school.now += DAY
    assert school.ask("history --stale 1") == (1, "new: last sync never\n", "")


# Backup.
def test_a_backup_is_the_database_at_one_moment_while_the_server_writes(tmp_path):
    copy = tmp_path / "copy.db"
    with running(tmp_path) as process, concurrent.futures.ThreadPoolExecutor() as pool:
        process.push(*map(student, range(50)))
        backup = pool.submit(run_process, "--config", process.ini, "backup", copy)
        cohorts = itertools.count()
        while not backup.done():
            process.push(*map(student, range(50)), cohort_id=str(next(cohorts)))
    assert backup.result() == (0, "", "")
    assert execute(copy, "PRAGMA integrity_check") == [("ok",)]
    sizes = execute(copy, "SELECT count(*) FROM entries GROUP BY roster_id")
    assert set(sizes) == {(50,)}
    assert execute(copy, "SELECT count(*) FROM syncs") == [(len(sizes),)]


@posix
def test_a_backup_says_that_it_is_good_only_to_a_terminal(school):
    reader, terminal = os.openpty()
    words = (*COMMAND, "--config", school.ini, "backup", "copy.db")
    pipe = subprocess.PIPE
    result = subprocess.run(words, stdout=terminal, stderr=pipe, env=ENVIRONMENT, check=True)
    os.close(terminal)
    os.close(reader)
    assert result.stderr.decode() == "copy.db: good\n"


@pytest.mark.parametrize("table", ["entries", "syncs", "rosters"])
def test_a_backup_of_a_damaged_database_is_no_success(school, table):
    school.push(*map(student, range(500)))
    school.stop()
    query = f"SELECT rootpage - 1 FROM sqlite_master WHERE name = '{table}'"
    [(page,)] = execute(school.database, query)
    with open(school.database, "r+b") as file:
        file.seek(4096 * page)
        file.write(b"\xa5" * 4096)
    result = school.ask("backup copy.db")
    assert result.status > 0
    assert "copy.db: " in result.err


@posix
@cpython  # in PyPy such a backup raises an AttributeError
def test_a_backup_that_fails_leaves_no_half_a_copy(school):
    school.push(*map(student, range(2000)))
    command = ("sh", "-c", 'ulimit -f 100; exec "$0" "$@"', *COMMAND)
    result = run_process("--config", school.ini, "backup", "copy.db", command=command)
    assert result.status == 2
    assert not os.path.exists("copy.db")


# Forget. On a's rosters are U1, U11 and U2 of 2026, and U1 of 2027. The other school has a U1, too.
FORGET = [
    ("--student U1", "cohort 2026: 1\ncohort 2027: 1\n", "2026U11 2026U2 2026U1"),
    ("--student U1 --student U2 --cohort 2026", "cohort 2026: 2\n", "2026U11 2027U1 2026U1"),
    ("--cohort 2026", "cohort 2026: 3\n", "2027U1 2026U1"),
    ("", "cohort 2026: 3\ncohort 2027: 1\n", "2026U1"),
    ("--student U2 --cohort 2027", "", "2026U1 2026U11 2026U2 2027U1 2026U1"),
    ("--student u1 --student U --student U111", "", "2026U1 2026U11 2026U2 2027U1 2026U1"),
]
EVERYBODY = """
SELECT group_concat(cohort_id || student_id_ext, ' ') FROM (
    SELECT * FROM roster ORDER BY institution, cohort_id, student_id_ext)"""


@pytest.mark.parametrize("words, counts, left", FORGET)
def test_forget_counts_and_with_yes_erases_just_those(school, words, counts, left):
    school.push(student(1), secret=OTHER_SECRET)
    school.push(student(1), student(2), student(11))
    school.push(student(1), cohort_id="2027")
    before = execute(school.database, EVERYBODY)
    command = f"forget --institution a {words}"
    for option, notes, after in (("", NOT_YET, before), (" --yes", "erased\n", [(left,)])):
        notes = notes + REACH if counts else "nobody found\n"
        assert school.ask(command + option) == (not counts, counts, notes)
        assert execute(school.database, EVERYBODY) == after


def test_forget_needs_an_institution(school):
    words = "sis_sync: forget needs --institution NAME\n"
    assert school.ask("forget --student U1 --yes") == (2, "", words)


def test_the_forgotten_are_not_taken_for_named_again(school):
    school.push(student(1), student(2))
    school.ask("forget --institution a --student U1 --yes")
    school.now += DAY
    school.push(student(3))
    assert listed(school.ask(f"export --not-seen-since {date(1)}")) == []


CROWD = [*map(student, range(400))]
TRACES = [b"U-victim", b"victim@old", b"old-name", b"victim@new", b"new-name"]


def push_a_victim(school):
    for name in ("old", "new"):
        victim = student("-victim", email=f"victim@{name}", first_name=f"{name}-name")
        school.push(*CROWD, victim)


def traces(school):
    """What the files of the database hold of the victim."""
    data = b"".join(path.read_bytes() for path in school.ini.parent.glob("sis_sync.db*"))
    return [trace for trace in TRACES if trace in data]


def test_the_bytes_of_the_forgotten_are_in_no_file(school):
    push_a_victim(school)
    assert traces(school) == TRACES
    history = school.ask("history --json")
    assert school.ask("forget --institution a --student U-victim --yes").status == 0
    assert traces(school) == []
    assert school.ask("history --json") == history
    details = school.push(*CROWD, student("-victim"))
    assert details == {"imported": 1, "updated": 400, "unchanged": 400}


def test_forget_says_that_a_reader_keeps_the_bytes_and_goes_on_when_run_again(school, monkeypatch):
    monkeypatch.setattr(sis_sync, "BUSY_TIMEOUT", 0.1)
    push_a_victim(school)
    command = "forget --institution a --student U-victim --yes"
    with contextlib.closing(sqlite3.connect(school.database)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM syncs").fetchall()
        result = school.ask(command)
    assert (result.status, result.out) == (2, "cohort 2026: 1\n")
    assert "sis_sync.db-wal still holds them, as somebody reads it: " in result.err
    assert school.ask(command) == (1, "", "nobody found\n")
    assert traces(school) == []


# ---------------------------------------------------------------------------------------------
# Section 9: the README
# ---------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text("utf-8")


def part(start):
    """The README from a heading on, to the next one."""
    return README.partition(start)[2].partition("\n## ")[0]


def block(language, start):
    """The first block in this language after these words."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", README.partition(start)[2], re.MULTILINE | re.DOTALL
    )[0]


def spans(text):
    """What stands between backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def test_it_lists_every_command():
    assert re.findall(r"^\| `([a-z]+)[ `]", part("## Commands"), re.MULTILINE) == list(
        sis_sync.COMMANDS
    )


def test_every_command_line_in_it_is_understood():
    lines = re.findall(r"python3 sis_sync\.py ([^`\n\[]*)", README)
    for span in spans(part("## Looking after it")):
        if re.match(f"({'|'.join(sis_sync.COMMANDS)}) ", span):
            lines.append(span)
    assert len(lines) > 12
    for line in lines:
        assert sis_sync.argument_parser().parse_args(shlex.split(line)).command


def test_every_option_in_it_is_one():
    known = {word for _, lines in sis_sync.COMMANDS.values() for word in lines.split()}
    for span in spans(part("## Commands") + part("## Looking after it")):
        assert set(re.findall("--[a-z-]+", span)) <= known | {"--config", "--help", "--since"}


def test_it_lists_every_error_with_its_status_and_what_it_carries():
    listed = set()
    for statuses, codes, words in re.findall(
        r"^\| ([\d, ]+) \| (`.*?`) \| (.*) \|", part("## The endpoint"), re.MULTILINE
    ):
        for name, error in sis_sync.ERRORS.items():
            code = error.code or name
            if str(error.status) in statuses and code in spans(codes):
                listed.add(name)
                assert {*error.carries} - {"retry_after"} <= {*spans(words)}
    assert listed == {*sis_sync.ERRORS}
    row_errors = OPENAPI["components"]["schemas"]["RowError"]["properties"]["error"]["enum"]
    assert {*row_errors} <= {*spans(part("## The endpoint"))}


def test_it_lists_every_field():
    rows = "".join(re.findall(r"^\| (`.*?) \|", part("## The endpoint"), re.MULTILINE))
    assert {sis_sync.COHORT.name, sis_sync.STUDENTS.name, *sis_sync.NAMES} <= {*spans(rows)}


def test_it_lists_the_columns_of_the_views(service):
    with service.database.transaction() as connection:
        views = re.findall(r"^\| `(\w+)` \| (.*) \|", part("## Reading"), re.MULTILINE)
        assert len(views) == 2
        for view, columns in views:
            found = connection.execute(f"PRAGMA table_info({view})").fetchall()
            assert columns.split(", ") == [row[1] for row in found]


def test_the_settings_file_has_words_on_each_setting():
    lines = (HERE / "sis_sync.ini").read_text("utf-8").splitlines()
    for settings in sis_sync.SETTINGS.values():
        for key, (default, _) in settings.items():
            assert lines[lines.index(f"{key} = {default}".rstrip()) - 1].startswith("# ")


def test_it_tells_the_size_of_the_module():
    told = re.search(r"server is ([\d,]+) lines.* tools are\s+([\d,]+)", README, re.DOTALL)
    halves = MODULE.read_text("utf-8").split("# The pushing side\n")
    for number, text in zip(told.groups(), halves):
        assert abs(int(number.replace(",", "")) - text.count("\n")) < 60


def test_what_it_names_for_readers_is_in_the_module():
    names = re.findall(r"\| (`\S+`(?:, `\S+`)*) \|$", part("## For readers"), re.MULTILINE)
    assert len(names) == 12
    for name in spans(" ".join(names)):
        owner, _, attribute = name.rpartition(".")
        assert hasattr(getattr(sis_sync, owner) if owner else sis_sync, attribute)


# Its transcripts


def alike(text):
    """A transcript without what is different each time."""
    for pattern, name in (
        (r"sis_[\w-]{43}", "SECRET"),
        ("[0-9a-f]{64}", "DIGEST"),
        (r"[\d,]+/s", "SPEED"),
        (r"(?m)^\d\d-\d\d \d\d:\d\d (.*) +\d+$", r"TIME \1"),
    ):
        text = re.sub(pattern, name, text)
    return text


def test_the_demo_prints_what_it_shows():
    shown = block("console", "# sis_sync").split("...\n")[1]
    assert shown.count("\n") == 6
    assert shown in run("demo", "--once").out


def commands_of(transcript):
    """Its commands, each with what it printed. A command goes on where a quotation is open."""
    for piece in re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]:
        command = ""
        lines = piece.splitlines(keepends=True)
        while command.endswith("\\\n") or command.count("'") % 2 or not command:
            command += lines.pop(0)
        yield command, "".join(lines)


@posix
def test_the_five_steps_and_the_push_go_as_it_shows(tmp_path):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    shutil.copy(MODULE, tmp_path)
    (tmp_path / "roster.csv").write_text(
        "Student ID Ext;E-Mail;First Name;Last Name;Program Code;First in Family;Mobile\n"
        "U2025001;alex.connor@student.example.edu.au;Alex;;;yes;\n"
        "U2025002;u2@example.edu;Zoë;;;no;\n1.2E+10;u3@example.edu;;;;;\n",
        "cp1252",
    )
    blocks = [block("console", start) for start in ("**2.", "**4.", "**5.", "## Commands")]
    environment = {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"}
    options = {"cwd": tmp_path, "env": environment, "text": True}
    options.update(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def check(transcript, url=""):
        for command, shown in commands_of(transcript):
            if command.startswith("export SIS_SYNC_SECRET"):
                continue
            command = command.replace("python3", shlex.quote(sys.executable))
            command = command.replace("curl", "curl -sS")
            command = re.sub(r"http://127.0.0.1:8080|https://sync.example.edu", url, command)
            printed = subprocess.run(command, shell=True, check=False, **options).stdout
            assert alike(printed) == alike(shown)
            return printed

    secret, digest = re.findall(r"^(?:sis_|sha256:).*", check(blocks[0]), re.MULTILINE)
    ini = re.sub("sha256:.*", digest, block("ini", "**2."))
    (tmp_path / "sis_sync.ini").write_text(ini)
    environment["SIS_SYNC_SECRET"] = secret
    with running(tmp_path, ini_of(limits="", institutions=ini)) as process:
        for transcript in blocks[1:]:
            for piece in re.split(r"^(?=\$ )", transcript, flags=re.MULTILINE):
                check(piece, f"http://127.0.0.1:{process.port}")


@posix
def test_a_backup_is_restored_as_it_says(tmp_path):
    (removal,) = re.findall("`(rm -f [^`]*)`", README)
    with running(tmp_path) as process:
        process.push(student(1))
        assert run("--config", process.ini, "backup", tmp_path / "copy.db").status == 0
        process.push(student(2))
        process.stop(signal.SIGKILL)  # so that its -wal is left
        subprocess.run(removal, shell=True, cwd=tmp_path, check=True)
        shutil.copyfile(tmp_path / "copy.db", process.database)
        process.start()
        assert process.push(student(3)).status == 200
        assert process.rows("SELECT student_id_ext FROM roster") == [("U1",), ("U3",)]


# Its recipes, as the programs see them that they are for, where these are installed


def tool(name):
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    return path or pytest.skip(f"needs {name}")


def said_by(name, *words, **environment):
    """What a tool says that finds nothing wrong."""
    result = run_process(*words, command=[tool(name)], **environment)
    assert result.status == 0, result
    return result.out + result.err


@posix
@pytest.mark.parametrize("name", ["gunicorn", "waitress-serve"])
def test_a_wsgi_host_serves_it(tmp_path, name):
    (line,) = re.findall(f"^{name} .*", README, re.MULTILINE)
    words = shlex.split(line.replace(":8081", ":0"))
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1", "SIS_SYNC_CONFIG": str(tmp_path / "ini")}
    (tmp_path / "ini").write_text(ini_of())
    words[0] = tool(name)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as host:
        try:
            while True:
                started = re.search(r"http://127\.0\.0\.1:(\d+)", host.stderr.readline())
                if started:
                    break
            with socket.create_connection(("127.0.0.1", int(started[1])), 20) as connection:
                connection.sendall(request_of(batch(student()), Connection="close"))
                assert b'"imported": 1' in read_to_end(connection)
        finally:
            host.terminate()


@posix
def test_systemd_takes_the_unit(tmp_path):
    unit = block("ini", "**3.").replace("/usr/bin/python3", sys.executable)
    (tmp_path / "sis_sync.service").write_text(unit)
    assert "sis_sync.service" not in said_by(
        "systemd-analyze", "verify", tmp_path / "sis_sync.service"
    )


@posix
def test_nginx_takes_the_block(tmp_path):
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{name}_temp_path {tmp_path}/{name};\n" for name in names)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}"
        f"server {{\nlisten 127.0.0.1:8080;\n{block('nginx', '## Running it')}}}\n}}\n"
    )
    assert "successful" in said_by("nginx", "-t", "-c", tmp_path / "nginx.conf", "-p", tmp_path)


@posix
def test_caddy_takes_the_file(tmp_path):
    (tmp_path / "Caddyfile").write_text(block("caddyfile", "## Running it"))
    words = ("adapt", "--adapter", "caddyfile", "--config", tmp_path / "Caddyfile", "--validate")
    said = said_by("caddy", *words, HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path))
    assert '"127.0.0.1:8080"' in said and "not formatted" not in said


@posix
@pytest.mark.parametrize(
    "start, modules",
    [
        ("```nginx", "proxy proxy_http"),
        ("```json", "proxy proxy_http headers auth_openidc"),
    ],
)
def test_apache_takes_the_lines(tmp_path, certificate, start, modules):
    (tmp_path / "console-passphrase").write_text("of the console\n")
    lines = block("apache", start).replace("/etc/apache2", str(tmp_path))
    folder = "/usr/lib/apache2/modules"
    loaded = ""
    for name in f"mpm_event authn_core authz_core authz_user alias ssl {modules}".split():
        if not os.path.exists(f"{folder}/mod_{name}.so"):
            pytest.skip(f"needs mod_{name}")
        loaded += f"LoadModule {name}_module {folder}/mod_{name}.so\n"
    (tmp_path / "apache.conf").write_text(
        f"{loaded}ServerRoot {tmp_path}\nServerName localhost\nPidFile {tmp_path}/pid\n"
        f"ErrorLog {tmp_path}/log\nListen 127.0.0.1:8443\n<VirtualHost *:8443>\nSSLEngine on\n"
        f"SSLCertificateFile {certificate}\nSSLCertificateKeyFile {certificate.with_suffix('.key')}\n"
        f"{lines}</VirtualHost>\n"
    )
    assert "Syntax OK" in said_by("apache2", "-t", "-f", tmp_path / "apache.conf")


@posix
def test_datasette_shows_the_views_and_nothing_else(tmp_path):
    (tmp_path / "metadata.json").write_text(block("json", "staff console"))
    line = block("sh", "staff console").replace("\\\n", "")
    for place in ("/var/lib/sis_sync", "/run/sis_sync_console"):
        line = line.replace(place, str(tmp_path))
    words = [tool("datasette"), *shlex.split(line)[1:]]

    def get(path):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(tmp_path / "socket"))
            connection.sendall(f"GET /sis_sync{path} HTTP/1.0\r\n\r\n".encode())
            head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    with running(tmp_path) as process:  # which has the database open
        process.push(student(1), {})
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as datasette:
            try:
                assert any("Uvicorn running" in line for line in datasette.stderr)
                shown = json.loads(get(".json")[1])
                assert sorted(view["name"] for view in shown["views"]) == ["history", "roster"]
                assert shown["tables"] == []
                process.push(student(2))
                rows = json.loads(get("/roster.json?_shape=array")[1])
                assert [row["student_id_ext"] for row in rows] == ["U1", "U2"]
                for path in ("/entries.json", "/rosters.json", "/syncs.json", ".db"):
                    assert get(path)[0] == 403
                assert get(".json?sql=select+1")[0] == 403
            finally:
                datasette.terminate()


def test_a_certificate_made_as_it_says_is_taken(tmp_path):
    lines = block("sh", "**A certificate of its own")
    tool("openssl")
    subprocess.run(["sh", "-ec", lines], cwd=tmp_path, check=True, capture_output=True)
    ini = "[server]\ntls_certificate = certificate.pem\ntls_key = key.pem\n"
    assert configuration_of(tmp_path, ini).tls
    context = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
    (names,) = [each["subjectAltName"] for each in context.get_ca_certs()]
    assert names == (("DNS", "sync.example.edu"),)


# Its exercises. A test of an exercise fails until somebody solves it, so it runs only when asked for:
# python3 -m pytest -k exercise_1 test_sis_sync.py

asked_for = pytest.mark.skipif(
    "exercise_" not in " ".join(sys.argv), reason="-k exercise_1 runs it"
)


@asked_for
def test_exercise_1(service):
    good = batch(student(1, date_of_birth="2007-02-28"))
    assert handle(service, good).document["imported"] == 1
    bad = batch(student(2, date_of_birth="28/02/2007"))
    (error,) = handle(service, bad).document["errors"]
    assert (error["field"], error["error"]) == ("date_of_birth", "invalid_field")


@asked_for
def test_exercise_2(tmp_path):
    service = sis_sync.Service(configuration_of(tmp_path, "[limits]\nhistory_syncs = 2\n"))
    for _ in range(3):
        handle(service, batch())
    with service.database.transaction() as connection:
        assert connection.execute("SELECT sync_id FROM syncs").fetchall() == [(2,), (3,)]
    service.database.try_to_close()


@asked_for
def test_exercise_3(service):
    answer = handle(service, method="GET", path="/version", authorization=None)
    assert answer.document == {"version": sis_sync.__version__}
    assert handle(service, path="/version").headers["allow"] == "GET, HEAD"
    assert "/version" in sis_sync.openapi_document(1)["paths"]


@asked_for
def test_exercise_4(tmp_path, service):
    handle(service, batch(student(1), student(2)))
    assert run("--config", tmp_path / "test.ini", "rosters").out.split() == ["example", "2026", "2"]


@asked_for
def test_exercise_5(tmp_path, monkeypatch):
    with monkeypatch.context() as past:
        past.setattr(sis_sync, "SCHEMA_VERSION", 3)
        past.setattr(sis_sync, "TABLES", [sql for sql in sis_sync.TABLES if "(email)" not in sql])
        past.setattr(sis_sync, "MIGRATIONS", {})
        sis_sync.Database(tmp_path / "old.db").try_to_close()
    for name in ("old.db", "new.db"):
        database = sis_sync.Database(tmp_path / name)
        with database.transaction() as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (4,)
            indexes = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'index'")
            assert any("(email)" in str(sql) for sql in indexes)
        database.try_to_close()


@asked_for
def test_exercise_6(tmp_path, service):
    answer = handle(service, batch(student(1, year_level=9), student(2, year_level="9")))
    assert [error["field"] for error in answer.document["errors"]] == ["year_level"]
    path = tmp_path / "roster.csv"
    path.write_text("student_id_ext,email,year_level\nU3,u3@example.edu,9\nU4,u4@example.edu,\n")
    rows = read_roster(path).rows
    assert [row["year_level"] for _, row in rows] == [9, None]


# Solutions, so that a search does not find them first: decode them with codecs.decode(..., "rot13").
# Each has its number, what stands there, and what stands there afterwards.
SOLUTIONS = """
1
    Svryq("svefg_va_snzvyl",
====
    Svryq("qngr_bs_ovegu", "n qngr, LLLL-ZZ-QQ", cnggrea="[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    Svryq("svefg_va_snzvyl",
----
2
        "erdhrfg_gvzrbhg": (
====
        "uvfgbel_flapf": ("10000", jubyr_ahzore(1, 1_000_000)),
        "erdhrfg_gvzrbhg": (
----
2
erdhrfg.vafgvghgvba, UVFGBEL_FLAPF)
====
erdhrfg.vafgvghgvba, erdhrfg.pbasvt.uvfgbel_flapf)
----
3

qrs bcrancv(freivpr, erdhrfg)
====

qrs irefvba(freivpr, erdhrfg):
    erghea {"irefvba": __irefvba__}


qrs bcrancv(freivpr, erdhrfg)
----
3
    "/bcrancv.wfba": (
====
    "/irefvba": ("TRG, URNQ", irefvba, "Gur irefvba bs gur cebtenz"),
    "/bcrancv.wfba": (
----
4

qrs pbzznaq_onpxhc(
====

qrs pbzznaq_ebfgref(nethzragf):
    "Yvfg gur ebfgref, jvgu gur ahzore bs gurve ragevrf."
    jvgu ernq_bayl(ybnq_pbasvthengvba(nethzragf).qngnonfr) nf pbaarpgvba:
        sbe ebj va pbaarpgvba.rkrphgr(
            "FRYRPG vafgvghgvba, pbubeg_vq, pbhag(*) SEBZ ragevrf WBVA ebfgref HFVAT (ebfgre_vq) "
            "TEBHC OL ebfgre_vq BEQRE OL vafgvghgvba, pbubeg_vq"
        ):
            cevag(*ebj)
    erghea 0


qrs pbzznaq_onpxhc(
----
4
    "onpxhc": (
====
    "ebfgref": (pbzznaq_ebfgref, ""),
    "onpxhc": (
----
5
FPURZN_IREFVBA = 3
====
FPURZN_IREFVBA = 4
----
5
    "PERNGR VAQRK VS ABG RKVFGF flapf_ol_vafgvghgvba BA flapf (vafgvghgvba)",
====
    "PERNGR VAQRK VS ABG RKVFGF flapf_ol_vafgvghgvba BA flapf (vafgvghgvba)",
    "PERNGR VAQRK VS ABG RKVFGF ragevrf_ol_rznvy BA ragevrf (rznvy)",
----
5
        "QEBC GNOYR ynfg_flapf",
    )
====
        "QEBC GNOYR ynfg_flapf",
    ),
    4: ("PERNGR VAQRK ragevrf_ol_rznvy BA ragevrf (rznvy)",),
----
6
    Svryq("svefg_anzr",
====
    Svryq("lrne_yriry", "lrne bs fpubby", 9, xvaq=vag),
    Svryq("svefg_anzr",
"""


def test_the_exercises_are_unsolved_and_can_be_solved(tmp_path):
    original = solved = MODULE.read_text("utf-8")
    numbers = set()
    for solution in codecs.decode(SOLUTIONS, "rot13").strip().split("\n----\n"):
        number, rest = solution.split("\n", 1)
        old, new = rest.split("\n====\n")
        assert solved.count(old) == 1
        solved = solved.replace(old, new)
        numbers.add(number)
    assert len(numbers) == len(re.findall(r"^\d\. \*\*", part("## For readers"), re.MULTILINE)) == 6
    processes = {}
    for verdict, text in (("FAILED", original), ("PASSED", solved)):
        folder = tmp_path / verdict
        shutil.copytree(HERE, folder, ignore=lambda *_: {".git", ".venv"})
        (folder / "sis_sync.py").write_text(text, "utf-8")
        words = (sys.executable, "-m", "pytest", "-q", "-rA", "-k", "exercise_", str(folder))
        environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
        processes[verdict] = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, text=True
        )
    for verdict, process in processes.items():
        said, _ = process.communicate(timeout=60)
        outcomes = re.findall(r"^(\w+) .*::test_exercise_(\d)", said, re.MULTILINE)
        assert sorted(outcomes) == [(verdict, number) for number in sorted(numbers)]


# ---------------------------------------------------------------------------------------------
# All sections: what nobody thought of
# ---------------------------------------------------------------------------------------------

# Whatever is pushed, in any order, the database holds what plain dicts would.

MODEL_SECRETS = {"A": SECRET, "B": OTHER_SECRET}
MODEL_INI = ini_of(
    institutions="[institution a]\nsecrets = env:A\n[institution b]\nsecrets = env:B\n"
)
MODEL_SYNCS = (
    "SELECT time, institution, cohort_id, received, new, updated, unchanged, rejected FROM history"
)


class Model:
    """The server without its sockets, and the same in plain dicts."""

    def __init__(self, folder):
        self.folder = folder
        self.now = 1_767_225_600
        self.rosters = {}  # by (institution, cohort): by id: the values and times of a student
        self.history = []
        self.start()

    def start(self):
        self.service = sis_sync.Service(configuration_of(self.folder, MODEL_INI, **MODEL_SECRETS))

    def command(self, name, roster, *words):
        options = ("--institution", roster[0], "--cohort", roster[1], *words)
        return run("--config", self.folder / "test.ini", name, *options, **MODEL_SECRETS).status

    def push(self, roster, students):
        """To the server and to the dicts: their counts are equal."""
        counts = self.expected(self.rosters.setdefault(roster, {}), students)
        self.history.append((sis_sync.utc(self.now), *roster, *counts))
        secret = MODEL_SECRETS[roster[0].upper()]
        document = batch(*students, cohort_id=roster[1])
        answer = handle(self.service, document, authorization=f"Bearer {secret}").document
        assert counts == [answer["received"], *answer["details"].values(), len(answer["errors"])]

    def expected(self, roster, students):
        """Store a batch in the dict of its roster. Its counts."""
        counts = collections.Counter(received=len(students))
        keys = set()
        for sent in students:
            values = [sent.get(name) for name in sis_sync.NAMES]
            values = [each.strip() or None if isinstance(each, str) else each for each in values]
            key, email, *_ = values
            if not key or key in keys or not email:
                counts["rejected"] += 1
            elif key in roster:
                known, created, changed, _ = roster[key]
                same = known == values
                counts["updated"] += 1
                counts["unchanged"] += same
                changed = changed if same else max(created, self.now)
                roster[key] = (values, created, changed, self.now)
            else:
                counts["new"] += 1
                roster[key] = (values, self.now, self.now, self.now)
            keys.add(key)
        return [counts[name] for name in sis_sync.Counts._fields]

    def export(self, roster):
        """What push reads in what export wrote."""
        path = self.folder / f"{len(self.history)}.csv"
        assert self.command("export", roster, "--output", path) == 0
        return [row for _, row in read_roster(path).rows]

    def compare(self):
        """Contents, times and counts, as the two public views show them."""
        entries = set()
        for roster, students in self.rosters.items():
            for values, *times in students.values():
                entries.add((*roster, *values, *map(sis_sync.utc, times)))
        with contextlib.closing(sqlite3.connect(self.folder / "sis_sync.db")) as connection:
            assert set(connection.execute("SELECT * FROM roster")) == entries
            assert list(connection.execute(MODEL_SYNCS)) == self.history


def some_student(pick):
    number = pick.randrange(60)
    values = {
        "student_id_ext": pick.choice((f"U{number}", f" {number:03} ", "")),
        "email": pick.choice(("a@b", "a@b", "c@d", None)),
        "first_name": pick.choice((None, "", " Zoë\t", "O'Brien", "王")),
        "first_in_family": pick.choice((None, True, False)),
    }
    return {name: value for name, value in values.items() if pick.random() < 0.9}


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_leave_what_plain_dicts_hold(tmp_path, monkeypatch, seed):
    pick = random.Random(seed)
    model = Model(tmp_path)
    monkeypatch.setattr(time, "time", lambda: model.now)
    sent = [(("a", "2026"), [])]
    model.push(*sent[0])
    for _ in range(60):
        model.now += pick.choice((0, 1, 86_400, 500 * 86_400, -86_400))
        operation = pick.choice(("push", "push", "push", "again", "start", "export", "forget"))
        roster = pick.choice(list(model.rosters))
        if operation == "push":
            roster = (pick.choice("ab"), pick.choice(("2026", "2027", "Zoë")))
            students = [some_student(pick) for _ in range(pick.choice((0, 1, 3, 20, 300)))]
            sent.append((roster, students))
            model.push(roster, students)
        elif operation == "again":
            model.push(*pick.choice(sent))
        elif operation == "start":
            model.service.database.try_to_close()
            model.start()
        elif operation == "export":
            model.push(pick.choice((roster, ("b", "2028"))), model.export(roster))
        else:
            key = pick.choice([*model.rosters[roster], "nobody"])
            found = model.rosters[roster].pop(key, None)
            status = model.command("forget", roster, "--student", key, "--yes")
            assert status == (0 if found else 1)
        model.compare()
    model.service.database.try_to_close()


# Requests with accidents in them.

FUZZ_DOCUMENTS = [
    batch(student(1, first_name="Zoë"), {}, None),
    batch({"studentIdExt": "1", "e-mail": ["a"]}, student(3, last_name=" \u3000x\0")),
    batch(),
    {},
    [{"a": [2.5e3, "\ud83d", True]}],
]
FUZZ_BODIES = [
    *(json.dumps(document).encode() for document in FUZZ_DOCUMENTS),
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    b'{"":' * 900,
    b"[" * 5000 + b"]" * 5000,
    b'{"cohort_id": "1", "students": [' + b"[[[[]]]]," * 1000 + b"{}]}",
]
FUZZ_HEADS = [
    head_of("GET", "/healthz"),
    head_of("HEAD", "/openapi.json"),
    head_of("GET", "http://example.edu/healthz?x=y", "HTTP/1.0", Host=None),
    head_of("PUT", "/x"),
    head_of(Content_Length=9 << 20),
    request_of(batch(), Authorization="Bearer wrong"),
    request_of(batch(student(3)), Expect="100-continue"),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]
FUZZ_PARTICLES = (
    b"\r\n|\n|\r|\0| |\t|:|;|,|0|-1|99999999999999999999|\xff|\x85|Content-Length: 3\r\n|HTTP/1.1|"
    b'Transfer-Encoding: chunked\r\n|Host: x\r\n|chunked|gzip|"|[|{|]|}|\\u0000|\\ud800|'
    b"\xed\xa0\x80|NaN|1e999|null|Bearer |\x1f\x8b\x08|\r\n\r\n|1\r\n|0\r\n\r\n|fffffffff\r\n|"
    b'1;a="\r\n|5 \r\n'
).split(b"|")


def some_request(pick):
    """A request: plain or gzip, whole or in chunks of any size."""
    if pick.random() < 0.3:
        return pick.choice(FUZZ_HEADS)
    body = pick.choice(FUZZ_BODIES)
    headers = {}
    if pick.random() < 0.4:
        body = gzip.compress(body, 1) + pick.choice((b"", b"", gzip.compress(b""), b"\0" * 20))
        headers = {"Content_Encoding": "gzip"}
    if pick.random() < 0.5:
        return request_of(body, **headers)
    size = pick.choice((3, 300, 5000))
    extension = pick.choice((b"", b";a", b';a="b c"', b" ; " + b"a" * 300))
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = [b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces]
    head = head_of(Transfer_Encoding="chunked", **headers)
    return b"".join([head, *chunks, b"0\r\nT: 1\r\n\r\n"])


def mutated(pick):
    """A request with up to four accidents, anywhere in it."""
    data = some_request(pick)
    for _ in range(pick.randrange(5)):
        start = pick.randrange(pick.choice((300, len(data) + 1)))  # or few would be in the head
        end = start + pick.choice((0, 0, 1, 20, 1000, 1 << 20))
        old = data[start:end]
        other = some_request(pick)[start:end]
        byte = bytes([pick.randrange(256)])
        new = pick.choice((b"", old * 2, other, byte, pick.choice(FUZZ_PARTICLES), b"A" * 300))
        data = data[:start] + new + data[end:]
    return data or b"\0"


def send(port, data, size=1 << 20, source="127.0.0.1"):
    """Send this in pieces, and nothing more. All that is answered."""
    with socket.create_connection(("127.0.0.1", port), 20, (source, 0)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            for start in range(0, len(data), size):
                connection.sendall(data[start : start + size])
            connection.shutdown(socket.SHUT_WR)
        return read_to_end(connection).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"", 1)


def fuzz_once(process, pick):
    """Whatever comes gets an answer as promised. Its status."""
    data = mutated(pick)
    size = pick.choice((10, 1000, 1 << 20)) if len(data) < 5000 else 1 << 20
    # From many addresses, as one has too few ports for a thousand connections a second.
    source = f"127.0.0.{pick.randrange(1, 255)}" if sys.platform == "linux" else "127.0.0.1"
    answer = send(process.port, data, size, source)
    try:
        is_head = data.lstrip().startswith(b"HEAD ") and answer.endswith(b"\r\n\r\n")
        status = parse_answer(answer, None, is_head).status
        assert status < 500 or status in (501, 505)
        return status
    except Exception:
        print(f"{data!r}\nwas answered\n{answer!r}")
        raise


def memory_of(process, key="VmRSS"):
    """In MB. Where there is no /proc it is 0."""
    path = pathlib.Path(f"/proc/{process.process.pid}/status")
    text = path.read_text() if path.exists() else ""
    return sum(map(int, re.findall(rf"{key}:\s+(\d+) kB", text))) / 1024


def fuzz(seed, rounds):
    """How many mutated requests got which status."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, running(pathlib.Path(name)) as process:
        process.push(student())
        memory = memory_of(process)
        statuses = collections.Counter(fuzz_once(process, pick) for _ in rounds)
        assert process.push(student()).status == 200
        assert memory_of(process) < memory + 50
        start = time.monotonic()
        process.stop()
        assert time.monotonic() < start + 5  # no thread is left that waits for something
    assert not re.search(f"Traceback|server_error|{SECRET}", "\n".join(process.log))
    return statuses


@cpython
def test_hundreds_of_mutated_requests_do_no_harm():
    statuses = fuzz(2026, range(600))
    assert {200, 400, 401, 404, 413, 415, 501} <= set(statuses)  # the mutations reach everything


def test_a_body_of_line_ends_is_refused_in_no_more_time_than_any_other(server):
    body = b"{}" + b"\n" * 8_000_000 + b"x"
    assert server.exchange(request_of(body)).code == "malformed_json"


# Other servers with our application behind them.

CODES = {error.code or name for name, error in sis_sync.ERRORS.items()}
HOST_BODY = json.dumps(batch(student(), {})).encode()
CLOSE = {"Connection": "close"}
PASSED_ON = [
    request_of(HOST_BODY, **CLOSE),  # the first time, its student may be a new one
    request_of(HOST_BODY, **CLOSE),
    request_of(gzip.compress(HOST_BODY), Content_Encoding="gzip", **CLOSE),
    head_of(Transfer_Encoding="chunked", **CLOSE)
    + b"%x\r\n%s\r\n0\r\n\r\n" % (len(HOST_BODY), HOST_BODY),
    head_of("GET", "/healthz", **CLOSE),
    head_of("PUT", **CLOSE),
    head_of("GET", "/x", **CLOSE),
    head_of(secret="wrong", **CLOSE),
    request_of(b"{", **CLOSE),
    request_of(HOST_BODY, Content_Type="text/plain", **CLOSE),
    head_of(Content_Length=9 << 20, **CLOSE) + b" " * (9 << 20),
]
WAITRESS = (
    "import waitress; waitress.serve(sis_sync.application, sockets=[socket.socket(fileno={})])"
)


def status_and_document(answer):
    """Of the first answer, as gunicorn may give two. What is not ours has no document."""
    body = answer.partition(b"\r\n\r\n")[2]
    document = json.loads(body.partition(b"\n")[0]) if body.startswith(b"{") else {}
    return answer[9:12], document


@posix
@pytest.mark.parametrize(
    "module, words",
    [
        ("gunicorn", "-m gunicorn --threads 4 --bind fd://{} sis_sync:application"),
        ("waitress", f"-c 'import socket, sis_sync; {WAITRESS}'"),
    ],
)
def test_behind_another_server_our_answers_are_the_same(tmp_path, server, module, words):
    pytest.importorskip(module)
    (tmp_path / "sis_sync.ini").write_text(ini_of())
    environment = {**ENVIRONMENT, "SIS_SYNC_CONFIG": str(tmp_path / "sis_sync.ini")}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        port = listener.getsockname()[1]
        command = [sys.executable, *shlex.split(words.format(number))]
        process = subprocess.Popen(
            command, env=environment, pass_fds=[number], stderr=subprocess.DEVNULL
        )
    try:
        theirs = [status_and_document(send(port, data)) for data in PASSED_ON]
        ours = [status_and_document(send(server.port, data)) for data in PASSED_ON]
        assert theirs[1:] == ours[1:]
        # What they refuse themselves, they answer in their own way.
        for data in FUZZ_HEADS:
            status, document = status_and_document(send(port, data))
            assert status < b"500" or status in (b"501", b"505")
            assert document.get("error", "not_found") in CODES
        healthz = send(port, head_of("GET", "/healthz"))
        assert status_and_document(healthz)[1] == {"status": "ok"}
    finally:
        process.terminate()
        process.wait(20)


# ---------------------------------------------------------------------------------------------
# By hand: speed (section 8 of the contract), and more mutated requests
# ---------------------------------------------------------------------------------------------

SIZE = 5000
ORDERS = ("ids in no order", "ascending ids")
JOBS = {  # and what the answer says of them
    "import": b'"imported": 5000, "updated": 0, "unchanged": 0',
    "identical re-send": b'"imported": 0, "updated": 5000, "unchanged": 5000',
    "10 % changed": b'"imported": 0, "updated": 5000, "unchanged": 4500',
}
FIRST = ("Zoë", "Nguyễn Thị", "王", "María José", "Alex")
LAST = ("O'Brien", "Trần", "欧阳", "García Márquez", "Connor")
NAMES = sis_sync.quoted(sis_sync.NAMES)
OLD = sis_sync.quoted(sis_sync.NAMES[1:])
NEW = sis_sync.quoted(sis_sync.NAMES[1:], "excluded.")
# The floor: the upsert as anybody would write it, a row a statement.
UPSERT = f"""
INSERT INTO entries ({NAMES}, roster_id, created_at, changed_at, seen_at, seen_in)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (roster_id, student_id_ext) DO UPDATE SET
    ({OLD}) = ({NEW}), seen_at = excluded.seen_at, seen_in = excluded.seen_in,
    changed_at = CASE WHEN ({OLD}) IS NOT ({NEW}) THEN excluded.changed_at ELSE changed_at END"""


def people(pick, first=0):
    """5,000 students from everywhere. Their ids ascend from `first`, or are in no order."""
    return [
        student(
            f"{number if first else pick.getrandbits(44):014}",
            first_name=pick.choice(FIRST),
            last_name=pick.choice(LAST),
            program_code=pick.choice(("BUSI", "NURS", "ENGR", None)),
            campus_name=pick.choice(("Sunshine Coast", "Québec", None)),
            first_in_family=pick.choice((True, False)),
        )
        for number in range(first, first + SIZE)
    ]


def bodies_of(pick, cohort_id, students):
    """A page as it is, and with another program for a tenth of its students."""
    plain = json.dumps(batch(*students, cohort_id=cohort_id), ensure_ascii=False)
    for one in pick.sample(students, SIZE // 10):
        one["program_code"] = f"X{pick.getrandbits(30)}"
    changed = json.dumps(batch(*students, cohort_id=cohort_id), ensure_ascii=False)
    return plain.encode(), changed.encode()


def store(connection, cohort_id, students, number):
    now = int(time.time())
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT OR IGNORE INTO rosters VALUES (NULL, 'example', ?)", [cohort_id])
    query = "SELECT roster_id FROM rosters WHERE cohort_id = ?"
    ((roster_id,),) = connection.execute(query, [cohort_id])
    common = (roster_id, now, now, now, number)
    rows = ((*map(one.get, sis_sync.NAMES), *common) for one in students)
    connection.executemany(UPSERT, rows)
    connection.execute("COMMIT")


def push_page(process, body, job="import"):
    with process.connect() as connection:
        connection.sendall(request_of(body))
        assert JOBS[job] in read_to_end(connection)


class Bench:
    """Rounds of everything in turn, as what slows the machine then slows all of it."""

    def __init__(self, server, filled, stored):
        self.server = server
        self.filled = filled  # a server with so many students stored
        self.pick = random.Random(2026)
        self.times = collections.defaultdict(list)  # in milliseconds
        self.pages = collections.defaultdict(list)
        self.floor = sis_sync.Database(str(server.folder / "floor.db")).open()
        count = stored // SIZE
        self.cohorts = [str(page % (count // 8 + 1)) for page in range(count)]
        self.pick.shuffle(self.cohorts)  # so the pages of a roster are far from each other
        with contextlib.closing(sis_sync.open_database(filled.database)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            for cohort in self.cohorts:
                store(connection, cohort, people(self.pick), 0)

    @contextlib.contextmanager
    def timed(self, *key):
        start = time.perf_counter()
        yield
        self.times[key].append(1000 * (time.perf_counter() - start))

    def round(self, number):
        """A page is imported, sent again a round later, and changed in the round after that."""
        for order in ORDERS:
            students = people(self.pick, order == "ascending ids" and 1 + number * SIZE)
            self.pages[order].append(bodies_of(self.pick, order, students))
        time.sleep(1 - time.time() % 1)  # a row sent again in the same second would be no work
        for age, job in enumerate(list(JOBS)[: number + 1]):
            for order in ORDERS:
                body = self.pages[order][number - age][age == 2]
                with self.timed("floor", job, order):
                    store(self.floor, order, json.loads(body)["students"], number)
                with self.timed("request", job, order):
                    push_page(self.server, body, job)
            if self.cohorts:
                body = self.stored_page(job)[age == 2]
                with self.timed("stored", job):
                    push_page(self.filled, body, job)

    def stored_page(self, job):
        """Any page of what is stored, or a new one for its roster."""
        page = self.pick.randrange(len(self.cohorts))
        students = people(self.pick)
        if job != "import":
            query = f"SELECT {NAMES} FROM entries WHERE entry_id > ? ORDER BY entry_id LIMIT 5000"
            rows = self.filled.rows(query, page * SIZE)
            students = [dict(zip(sis_sync.NAMES, (*row[:-1], bool(row[-1])))) for row in rows]
        return bodies_of(self.pick, self.cohorts[page], students)

    def eight_and_one(self, number):
        """Eight clients send a page each at once, and then one client sends as many."""
        cohorts = [f"{number}-{client}" for client in range(16)]
        bodies = [bodies_of(self.pick, cohort, people(self.pick))[0] for cohort in cohorts]
        with concurrent.futures.ThreadPoolExecutor(8) as clients, self.timed("8 clients"):
            list(clients.map(push_page, [self.server] * 8, bodies))
        with self.timed("1 client"):
            for body in bodies[8:]:
                push_page(self.server, body)

    def middle(self, *key):
        return statistics.median(self.times[key])

    def show(self, name, key, base):
        """Medians. The ratio is that of each round: what slows a round slows both of its sides."""
        ratio = statistics.median(map(float.__truediv__, self.times[key], self.times[base]))
        middle = self.middle(*key)
        print(f"{name:36}{self.middle(*base):9.1f}{middle:9.1f}{ratio:8.2f}{5e6 / middle:12,.0f}")


def bench(arguments):
    with tempfile.TemporaryDirectory(dir=HERE) as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        (folder / "filled").mkdir()
        filled = stack.enter_context(running(folder / "filled"))
        server = stack.enter_context(running(folder))
        bench = Bench(server, filled, arguments.stored)
        stack.callback(bench.floor.close)
        for _ in range(5):
            server.stop()
            with bench.timed("start"):
                server.start()
        memory = memory_of(server)
        for number in range(arguments.rounds + 2):
            bench.round(number)
        for number in range(arguments.rounds // 3 + 1):
            bench.eight_and_one(number)
        peak = memory_of(server, "VmHWM")
        with bench.timed("401"):
            for _ in range(300):
                server.exchange(head_of(secret="wrong"))
    print(f"{arguments.rounds} rounds; SQLite {sqlite3.sqlite_version}; Python {sys.version[:7]}")
    print(f"{'milliseconds for 5,000 students':36}    floor  request   ratio  students/s")
    for order, job in itertools.product(ORDERS, JOBS):
        bench.show(f"{job}, {order}", ("request", job, order), ("floor", job, order))
    if arguments.stored:
        print(f"{f'{arguments.stored:,} stored before':36}    empty   stored   ratio  students/s")
        for job in JOBS:
            bench.show(job, ("stored", job), ("request", job, "ids in no order"))
    eight, one = bench.middle("8 clients"), bench.middle("1 client")
    print(
        f"8 clients: {4e7 / eight:,.0f} students/s; 1 client: {4e7 / one:,.0f}; {one / eight:.2f}"
    )
    print(f"401s a second: {300_000 / bench.middle('401'):,.0f}")
    print(f"start: {bench.middle('start'):.0f} ms; {memory:.0f} MB, after 8 clients {peak:.0f} MB")


def fuzz_by_hand(arguments):
    end = time.monotonic() + arguments.seconds
    print(fuzz(arguments.seed, iter(lambda: time.monotonic() < end, False)))


def main():
    parser = argparse.ArgumentParser(description="What is run by hand.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("bench", help="the speed of this machine")
    command.add_argument("--rounds", type=int, default=21)
    command.add_argument("--stored", type=int, default=0, metavar="STUDENTS")
    command.set_defaults(run=bench)
    command = commands.add_parser("fuzz", help="mutated requests for so many seconds")
    command.add_argument("seconds", type=float)
    command.add_argument("seed", type=int, nargs="?", default=1)
    command.set_defaults(run=fuzz_by_hand)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

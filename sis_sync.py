#!/usr/bin/env python3
r"""sis_sync: a school's roster, pushed over HTTP and kept in SQLite. One file, only Python.

A student information system (SIS) pushes its students. The server checks who is calling, checks
every row, and keeps the good ones. The same push can be repeated at any time without harm.

    $ export SIS_SYNC_SECRET=$(python3 sis_sync.py secret | head -n 1)
    $ python3 sis_sync.py &
    $ curl http://127.0.0.1:8080/api/sis/sync -H "Authorization: Bearer $SIS_SYNC_SECRET" \
        -d '{"cohort_id": "2026", "students": [{"student_id_ext": "U1", "email": "a@b.edu"}]}' \
        -H "Content-Type: application/json"
    {"received": 1, "imported": 1, "details": {"imported": 1, "updated": 0, "unchanged": 0}, ...}

One request may hold 5,000 students and 8 MiB, and one school may send 20 requests a minute. What
the server promises to its clients, the contract, is in README.md ("The endpoint").

This is the way of one request through the file:

    accept -> Handler -> Service.handle -> route -> sync
      authenticate -> read_body -> parse_json -> check_batch -> Database.store_batch
    any step: raise Refusal -> one answer in JSON, one line in the log

Read it from top to bottom: what may be sent; the way of one request; what may go wrong; then each
step of that way; then what surrounds it: the built-in server, WSGI, the configuration, and the
OpenAPI document. The tools of the command line come last, below the banner "The pushing side".
Comments such as "noqa", "fmt" and "isort" are for other programs: readers can ignore them. A
parameter with the name of a class is of that class: `request` is a Request, for example.

A few words have one meaning in all of it:

    institution  a school that pushes; it shows its secret
    cohort       a group of students of one institution, known by its cohort_id
    roster       the list of the students of one cohort
    entry        one student on one roster, as it is kept in the database
    push         sending a roster to the server, in one request or in several ("pages")
    batch        the students of one request
    sync         what the server does with one request: it stores the batch
"""

from __future__ import annotations  # so that Python 3.9 reads types such as `Counts | None`

# For requests, rows and the log.
import hmac
import io
import ipaddress
import itertools
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from hashlib import sha256
from json import dumps, loads
from pathlib import Path
from re import fullmatch
from secrets import token_hex, token_urlsafe
from time import gmtime, monotonic, sleep, strftime
from typing import NamedTuple

# isort: split
# For the built-in server and its configuration.
import _thread
import argparse
import binascii
import configparser
import difflib
import errno
import http.server
import signal
import socket
import socketserver

# isort: split
# For the tools.
import csv
import http.client
import random
from urllib.parse import quote

# Python can be built without SQLite, OpenSSL or zlib. Then one of these raises ImportError, and so
# do we if a version is too old.
try:
    import sqlite3
    import ssl
    import zlib

    if sys.version_info < (3, 9) or sqlite3.sqlite_version_info < (3, 24):
        raise ImportError(f"this is {sys.version.split()[0]} with {sqlite3.sqlite_version}")
except ImportError as error:
    print(f"sis_sync: needs Python 3.9, SQLite 3.24, ssl and zlib: {error}", file=sys.stderr)
    sys.exit(2)

__version__ = "3.0.0"
log = logging.getLogger("sis_sync")
log.setLevel(logging.INFO)


# ---------------------------------------------------------------------------------------------
# What may be sent
# ---------------------------------------------------------------------------------------------

# A push is the roster of one cohort, or a page of it:
#
#     {"cohort_id": "2026",
#      "students": [{"student_id_ext": "U2025001", "email": "alex.connor@student.example.edu.au",
#                    "first_name": "Alex", "last_name": "Connor", "first_in_family": false}]}
#
# To add a field, add a row to FIELDS. All else is made from this table.


class Field(NamedTuple):
    """One field of a request, and its rules."""

    name: str
    meaning: str  # for people; if the pattern does not match, we say "NAME must be MEANING"
    example: object = None
    kind: type = str  # or bool or int (and list, for `students` below)
    required: bool = False
    longest: int = 255  # characters
    pattern: str = ""  # a regular expression that the whole string must match
    listed: str = ""  # the setting in which an institution can list the allowed values


# The white space that is not ASCII, to be put inside of [...] in a pattern. With the ASCII space,
# that is all white space that a string can hold, because tabs and line ends are refused as control
# characters. (The pattern \s would take ten times as long.)
WIDE_SPACE = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
EMAIL = f"[^@ {WIDE_SPACE}]+@[^@ {WIDE_SPACE}]+"
COHORT = Field("cohort_id", "the cohort", "2026", required=True, longest=64, listed="cohorts")
STUDENTS = Field("students", "the students on it", kind=list, required=True)
FIELDS = (
    Field("student_id_ext", "the student's number in the SIS", "U2025001", required=True),
    Field(
        "email",
        "an e-mail address: something, one @, something, no white space",
        "alex.connor@student.example.edu.au",
        required=True,
        longest=254,
        pattern=EMAIL,
    ),
    Field("first_name", "given name", "Alex"),
    Field("last_name", "family name", "Connor"),
    Field("program_code", "the program of study", "BUSI", listed="programs"),
    Field("campus_name", "the campus", "Sunshine Coast", listed="campuses"),
    Field("first_in_family", "first of the family to study", False, kind=bool),
)
KEY = FIELDS[0]  # an entry of a roster is known by this field
NAMES = tuple(field.name for field in FIELDS)


# ---------------------------------------------------------------------------------------------
# The way of one request
# ---------------------------------------------------------------------------------------------

# Service is the whole server without its sockets: a Request goes in, a Response comes out. The
# steps are in `Service.route` and in `sync`, and each step has a chapter below. A step that finds a
# fault raises a Refusal with a name, such as Refusal("not_found"). The refusal becomes the answer.
#
# `config` is what the operator has set in sis_sync.ini: config.max_students, for example.

SYNC_PATH = "/api/sis/sync"
BUSY_TIMEOUT = 5.0  # seconds that a thread waits, for another thread or for the database


class Request:
    """One request, and what we learn about it on its way to a line in the log."""

    method = "-"
    path = "-"
    institution = "-"  # the name, when `authenticate` knows it
    counts: Counts | None = None  # of its rows: how many were new, rejected, and so on
    note = ""  # what only the log may say

    def __init__(self, peer, config):
        self.config = config  # as it was when the client connected; a reload makes another one
        self.peer = peer  # the address at the other end of the connection
        self.client = peer or "-"  # if the peer is a proxy, `route` learns who is behind it
        self.headers = {}  # names in lower case
        self.body = ()  # later a generator, which reads while we loop over it
        self.id = token_hex(8)
        self.started = monotonic()

    def milliseconds(self):
        return round(1000 * (monotonic() - self.started))

    def content_length(self):
        return int(self.headers.get("content-length", "0"))  # check_framing saw: it is digits

    def content_encoding(self):
        return self.headers.get("content-encoding", "").lower() or "identity"


class Response:
    """The answer to one request. Every answer is JSON."""

    def __init__(self, request, document, status, headers):
        body = dumps(document).encode() + b"\n"
        self.status = status
        self.body = b"" if request.method == "HEAD" else body
        self.headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "X-Request-ID": request.id,
            **headers,
        }


class Service:
    """The server without its sockets. Many threads call `handle` at the same time."""

    def __init__(self, config, rehearsal=False):
        """A rehearsal only finds out whether a start would work, for the command `check`."""
        self.config = config
        self.limiter = RateLimiter()
        self.database = Database(config.database, rehearsal)
        self.turn = threading.Lock()  # who holds it may parse, check and store a batch

    def handle(self, request) -> Response:
        """Answer a request, whatever happens."""
        try:
            return Response(request, self.route(request), 200, {})
        except Exception as error:  # noqa: BLE001
            return answer_to(error, request)

    def route(self, request) -> dict:
        """Call the function for this path. It returns the document to answer with."""
        # Who is the client, if the peer is a proxy? (Step 1.) Where does the body end? (Step 2.)
        forwarded_for = request.headers.get("x-forwarded-for", "")
        request.client = client_of(request.peer, forwarded_for, request.config.trusted_proxies)
        check_framing(request.headers)
        if not fullmatch(KNOWN_METHODS, request.method):
            raise Refusal("not_implemented")
        if request.path not in ROUTES:
            raise Refusal("not_found")
        methods, answer, _ = ROUTES[request.path]  # `answer` is a function, such as `sync`
        if request.method not in methods.split(", "):
            refusal = Refusal("method_not_allowed")
            refusal.headers["Allow"] = methods
            raise refusal
        return answer(self, request)

    def authenticate(self, request) -> Institution:
        """Return the institution that is calling, or refuse the caller."""
        institutions = request.config.institutions
        if not any(institution.digests for institution in institutions):  # digests of secrets
            raise Refusal("not_configured")
        authorization = request.headers.get("authorization", "")
        institution = institution_of(authorization, institutions)
        # The rate limiter counts an institution by its name, and a stranger by its address. So a
        # stranger can neither guess quickly nor use up what an institution may send.
        bucket = client_key(request.client)
        if institution:
            request.institution = institution.name
            bucket = f"institution {institution.name}"
        seconds = self.limiter.take(bucket, request.config.requests_per_minute)
        if seconds:
            words = f"too many requests: wait {seconds} s"
            raise Refusal("rate_limited", words, retry_after=seconds)
        if not institution:
            request.note = why_unknown(authorization)
            raise Refusal("unauthorized")
        return institution


def sync(service, request) -> dict:
    """POST /api/sis/sync. The order matters: nobody without a secret makes us read a body."""
    institution = service.authenticate(request)
    check_length(request.content_length(), request.config)
    check_media_type(request)
    body = read_body(request)
    # One thread at a time parses, checks and stores a batch. A parsed batch takes ten times the
    # memory of its body, so we want only one. The others wait, but not for ever.
    if not service.turn.acquire(timeout=BUSY_TIMEOUT):
        raise Refusal("busy", retry_after=1)
    try:
        max_students = request.config.max_students
        check_brackets(body, max_students)  # refuses what would take too much memory when parsed
        batch = check_batch(parse_json(body), institution, max_students)
        if batch.errors and institution.bad_rows == "reject":
            request.counts = Counts(received=batch.received, rejected=len(batch.errors))
            words = f"{len(batch.errors)} of {batch.received} rows are bad; nothing was stored"
            raise Refusal("invalid_rows", words, errors=batch.errors)
        counts = service.database.store_batch(request, batch)
    finally:
        service.turn.release()
    request.counts = counts
    return {
        "received": counts.received,
        # The contract has "imported" twice: here it counts all good rows, and in the details only
        # the new ones. "updated" counts the known ones, changed or not.
        "imported": counts.new + counts.updated,
        "details": {
            "imported": counts.new,
            "updated": counts.updated,
            "unchanged": counts.unchanged,
        },
        "errors": batch.errors,
        "ignored": batch.ignored,
    }


def health(service, request) -> dict:
    """GET /healthz: whether the database is in its place and can be read."""
    try:
        service.database.check_files()
        with read_only(service.database.path) as connection:
            connection.execute("SELECT 1 FROM syncs LIMIT 1").fetchall()
    except (CommandError, OSError):  # read_only makes a CommandError of each sqlite3.Error
        raise Refusal("unhealthy") from None
    return {"status": "ok"}


def openapi(service, request) -> dict:
    """GET /openapi.json: a description for programs that generate clients."""
    return openapi_document(request.config.max_students)


# The methods of RFC 9110 and RFC 5789, as a pattern. To any other one the answer is 501, not 405.
KNOWN_METHODS = "GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH"
# For each path: its methods, the function that answers, and a summary for the OpenAPI document.
ROUTES = {
    SYNC_PATH: ("POST", sync, "Push students of one cohort's roster"),
    "/healthz": ("GET, HEAD", health, "Whether the database answers"),
    "/openapi.json": ("GET, HEAD", openapi, "This document"),
}


# ---------------------------------------------------------------------------------------------
# What may go wrong, and what is logged
# ---------------------------------------------------------------------------------------------

# These exceptions are ours. Each of them tells another person of a fault:
#
#     Refusal       The client. Its whole request is refused with a row of ERRORS.
#     BadValue      The client, too. One value breaks a rule. In a row it becomes one of "errors",
#                   and the other rows are kept. In cohort_id or students it becomes a Refusal.
#     BadSetting    The operator. A value in sis_sync.ini is wrong. It becomes a CommandError.
#     CommandError  Whoever sits at the command line. A start or a command cannot go on.
#
# The database raises sqlite3.Error, and the system OSError. Where nobody has foreseen them, and at
# a mistake of ours, the client gets a 500, and the log says what it was.


class ErrorCode(NamedTuple):
    """One way to refuse a request."""

    status: int
    meaning: str
    only_in: str = ""  # for OpenAPI: the only function of ROUTES that can refuse so; "": all can
    carries: tuple = ()  # what the answer holds besides "error" and "detail"
    headers: tuple = ()  # pairs: name, value; those of Allow and Retry-After are only examples
    code: str = ""  # what the client sees, if two of our names are one error to it


# fmt: off
ERRORS = {
    "malformed_request": ErrorCode(400, "the request is not HTTP as RFC 9112 defines it"),
    "malformed_json": ErrorCode(400, "the body is not JSON in UTF-8", "sync"),
    "missing_field": ErrorCode(
        400, "cohort_id or students is missing or blank", "sync", ("field",)),
    "invalid_field": ErrorCode(
        400, "the body, cohort_id or students is not valid", "sync", ("field",)),
    "unknown_cohort": ErrorCode(
        400, "cohort_id is not in the institution's list", "sync", ("field",)),
    "invalid_rows": ErrorCode(
        400, "some rows are bad, and bad_rows is reject", "sync", ("errors",)),
    "unauthorized": ErrorCode(
        401, "no valid secret; send the header Authorization: Bearer <institution secret>",
        "sync", headers=(("WWW-Authenticate", "Bearer"),)),
    "not_found": ErrorCode(404, f"there is nothing at this path; a push goes to {SYNC_PATH}"),
    "method_not_allowed": ErrorCode(
        405, "the path takes another method", headers=(("Allow", "POST"),)),
    "request_timeout": ErrorCode(408, "the request did not arrive in time"),
    "too_many_students": ErrorCode(
        413, "too many students: send smaller batches", "sync", ("max",),
        code="batch_too_large"),
    "too_many_bytes": ErrorCode(
        413, "too many bytes: send smaller batches", "sync",
        ("max", "max_bytes"), code="batch_too_large"),
    "line_too_long": ErrorCode(414, "the request line is too long", code="request_too_large"),
    "unsupported_media_type": ErrorCode(
        415, "Content-Type must be application/json in UTF-8; Content-Encoding gzip or identity",
        "sync", headers=(("Accept", "application/json"), ("Accept-Encoding", "gzip, identity"))),
    "rate_limited": ErrorCode(
        429, "too many requests", "sync", ("retry_after",), (("Retry-After", 3),)),
    "headers_too_long": ErrorCode(431, "the headers are too long", code="request_too_large"),
    "server_error": ErrorCode(
        500, "a fault of the server; its log says more", "", ("request_id",)),
    "not_implemented": ErrorCode(
        501, "unknown method (methods are in capitals), or unknown transfer coding"),
    "not_configured": ErrorCode(503, "no institution has a secret set", "sync"),
    "busy": ErrorCode(
        503, "the server is busy: try again", "", ("retry_after",), (("Retry-After", 1),)),
    "unhealthy": ErrorCode(503, "the database does not answer", "health"),
    "http_version_not_supported": ErrorCode(505, "only HTTP/1.0 and HTTP/1.1 are spoken"),
}
# fmt: on


class Refusal(Exception):
    """A request is refused with one of ERRORS. Any step may raise it; `answer_to` answers it."""

    def __init__(self, name, detail="", **carries):
        row = ERRORS[name]
        code = row.code or name
        self.status = row.status
        self.document = {"error": code, "detail": detail or row.meaning, **carries}
        self.headers = dict(row.headers)
        if "retry_after" in carries:
            self.headers["Retry-After"] = str(carries["retry_after"])
        self.logged = f"{code}: {detail}" if detail else code  # what the log says of it
        super().__init__(self.document["detail"])


class CommandError(Exception):
    """A command cannot go on. Each argument is one line for the person who gave it."""


def answer_to(error: Exception, request) -> Response:
    """The answer to a request that failed. If nobody foresaw the error, it is a 500: the log says
    what it was, and the client gets only the id to ask for."""
    if not isinstance(error, Refusal):
        log.error(f"{request.id} server_error {describe(error)}")
        error = Refusal("server_error", request_id=request.id)
    request.note = f"{error.logged} {request.note}"
    return Response(request, error.document, error.status, error.headers)


def describe(error: BaseException):
    """An unexpected error in one line for the log: its type, its words, and the functions in which
    it happened, the innermost first, each with a line of this file:

        OperationalError: disk I/O error (store_batch:1449 < sync:291 < route:248 < handle:229)

    A traceback of Python would say more, but its words may hold the data of a student. So we
    show words only if they come from the database, the system or ourselves."""
    words = type(error).__name__
    if isinstance(error, (sqlite3.Error, OSError, CommandError)):
        words += f": {error}"
    frames = traceback.walk_tb(error.__traceback__)
    places = [f"{frame.f_code.co_name}:{line}" for frame, line in frames]
    return f"{words} ({' < '.join(reversed(places))})"


def log_request(request, response):
    """Write one line for a request. The rows are counted as received/imported/rejected."""
    counts = request.counts
    rows = f"{counts.received}/{counts.new + counts.updated}/{counts.rejected}" if counts else "-"
    line = (
        f"{request.id} {request.client} {request.institution} "
        f"{escape(request.method)} {escape(request.path)} "
        f"{response.status} {rows} {request.milliseconds()}ms {request.note}"
    )
    log.info(line.rstrip())


def escape(text):
    """What a client wrote must not forge a line of the log, fill it, or control the terminal that
    shows it. A space becomes \\x20, for example."""
    # This matches the backslash and everything but the visible characters of ASCII, ! to ~.
    return re.sub(r"[^!-~]|\\", lambda match: f"\\x{ord(match[0]):02x}", text[:200])


# ---------------------------------------------------------------------------------------------
# Step 1: who is calling, and how often
# ---------------------------------------------------------------------------------------------

# An institution shows its secret: "Authorization: Bearer sis_...". Somebody who guesses secrets
# must fail slowly, so there is a rate limit: an institution has its own, and all others have one
# for each address. A proxy in front of us has one address for all clients, so we must know who is
# behind it.

MAX_SECRET = 1024  # bytes
MAX_BUCKETS = 100_000  # that the rate limiter remembers: about 20 MB


class Institution(NamedTuple):
    """Who may push. Of its secrets we know only the SHA-256 digests."""

    name: str
    digests: tuple
    # By "cohorts", "programs", "campuses": a set of the allowed values; an empty one means any.
    lists: dict
    bad_rows: str = "skip"  # or "reject": then one bad row refuses the batch


def institution_of(authorization, institutions) -> Institution | None:
    """Find whose secret is in this Authorization header: "Bearer <secret>" (RFC 6750).

    We compare with every digest, and compare_digest takes as long for a wrong one as for the right
    one. So the time of the answer tells nothing about the secrets."""
    scheme, _, secret = authorization.partition(" ")
    # Headers were decoded as Latin-1, so this gives the bytes that were sent.
    secret_bytes = secret.strip(" ").encode("latin-1", "replace")
    # We cut what is longer than any secret, so that nobody can make us hash more. We keep one byte
    # more than the longest secret has, so what was cut cannot be equal to a secret.
    digest = sha256(secret_bytes[: MAX_SECRET + 1]).digest()
    found = None
    for institution in institutions:
        for known in institution.digests:
            if hmac.compare_digest(digest, known):
                found = institution
    return found if scheme.lower() == "bearer" else None


def why_unknown(authorization: str):
    """For the log: why nobody was found. All clients get the same answer."""
    if not authorization:
        return "(no Authorization header)"
    if not fullmatch("(?i)bearer( .*)?", authorization):
        return "(another scheme than Bearer)"
    return "(no such secret)"


def parse_address(text):
    """An IPv4Address or IPv6Address, or None. An IPv4 address written as IPv6 becomes IPv4."""
    try:
        # A local address may name its network card: fe80::1%eth0.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if address.version == 6 and address.ipv4_mapped:  # ::ffff:192.0.2.1
        return address.ipv4_mapped
    return address


def client_of(peer, forwarded_for, proxies):
    """The address of the client: the peer, or if that is a trusted proxy, whom it names.

    Each proxy appends to X-Forwarded-For, at its right end, the address that it saw. So we go from
    right to left as long as we trust the one who wrote it. For example, if we trust 10.0.0.0/8:

        peer 10.0.0.1, X-Forwarded-For: 6.6.6.6, 192.0.2.7, 10.0.0.2

    We trust 10.0.0.1, and it saw 10.0.0.2. We trust that, too, and it saw 192.0.2.7. We do not
    trust that, so it is the client. It may have invented 6.6.6.6 itself."""
    address = parse_address(peer)
    hops = forwarded_for.split(",")  # without the header it is [""], and "" is no address
    while hops and is_trusted(address, proxies):
        claimed = parse_address(without_port(hops.pop().strip()))
        if not claimed:
            break
        address = claimed
    return str(address or "-")


def is_trusted(address, proxies):
    """Whether this address is one of trusted_proxies. None is no address, and not trusted."""
    return address is not None and any(address in network for network in proxies)


def without_port(hop):
    """The address alone. Some proxies write 192.0.2.1:5123 or [2001:db8::1]:5123."""
    # Group 1 is an IPv4 address before a port, and group 2 an IPv6 address in brackets.
    match = fullmatch(r"([0-9.]+):[0-9]+|\[(.+)\](:[0-9]+)?", hop)
    if match:
        return match[1] or match[2]
    return hop


def client_key(client):
    """What the limits count by: the address. For IPv6 it is the network of 64 bits, because one
    customer usually has all addresses of such a network."""
    address = parse_address(client)
    if not address or address.version == 4:
        return client
    network = ipaddress.ip_network(f"{address}/64", strict=False)  # clears the other 64 bits
    return str(network)


class RateLimiter:
    """A token bucket for each client. With 20 requests a minute, a bucket holds 20 tokens:

    Twenty requests at once take one token each. The 21st finds none, so it is told to wait 3 s,
    because a new token comes every 60 / 20 = 3 seconds. A refused request takes nothing. After a
    minute without requests the bucket is full again, and it never holds more than 20."""

    def __init__(self):
        # By name: (tokens, when we counted them). The bucket that was used last stands last.
        self._buckets = OrderedDict()
        self._lock = threading.Lock()

    def take(self, bucket, per_minute):
        """Take one token. Return 0, or if there is none the seconds until there will be one."""
        now = monotonic()  # time.time would jump when somebody sets the clock
        with self._lock:
            # An unknown bucket counts as full. We take the bucket out here and put it back below,
            # so that it moves to the end.
            tokens, since = self._buckets.pop(bucket, (per_minute, now))
            tokens += (now - since) * per_minute / 60
            tokens = min(tokens, per_minute)
            wait = 0
            if tokens > 1 - 1e-6:  # not >= 1, because sums of floats are not exact
                tokens -= 1
            else:
                wait = math.ceil((1 - tokens) * 60 / per_minute)
            self._buckets[bucket] = (tokens, now)
            if len(self._buckets) > MAX_BUCKETS:
                # We forget the bucket that was used least recently. It is probably full by now, and
                # a full one need not be remembered. Even if an attacker with very many addresses
                # pushes out one that is not full yet, its client only gains a few requests.
                self._buckets.popitem(last=False)
        return wait


# ---------------------------------------------------------------------------------------------
# Step 2: the body
# ---------------------------------------------------------------------------------------------

# A body comes with a Content-Length, or in chunks, and perhaps compressed. If the client states a
# size that is too large, we refuse it at once. But we do not believe a small one: we count what
# arrives, and stop at the limit. Only then we parse.

PIECE = 64 * 1024  # bytes that we read at once
MAX_DIGITS = 1000  # of a number
MAX_BRACKETS = 8  # "]" and "}" for each student; one is needed, and a text may have some: "Al [Bo]"
SPARE_STUDENTS = 100  # so many more in the limits of brackets and chunks, if max_students is small
# If a body is not JSON, or a file is not CSV, its first bytes may tell what it is instead. They are
# compared with these patterns in this order. With (?s), the dot matches a line end, too.
LOOKS_LIKE = {
    rb"\x1f\x8b": "gzip: unpack it, or name it in the header Content-Encoding",
    # Two byte order marks, or a NUL as the first or second byte.
    rb"(?s)\xff\xfe|\xfe\xff|.?\0": "UTF-16 or UTF-32: make it UTF-8",
    rb"\{.*\}\r?\n\{": "a document in each line: make it one, with all in students",
    # A zip archive whose first name, at byte 30, is one of Excel or LibreOffice; or an old Excel.
    rb"(?s)PK\x03\x04.{26}(\[Content|_rels|docProps|xl/|mimetype)|\xd0\xcf\x11\xe0": (
        'a workbook: save it as "CSV UTF-8"'
    ),
    rb"PK\x03\x04": "a zip archive: unpack it (if it is a OneRoster, then push its users.csv)",
}


def require(condition, words):
    """Unless the condition holds, refuse the request, because it is not HTTP."""
    if not condition:
        raise Refusal("malformed_request", words)


def check_framing(headers: dict):
    """Framing is how a request says where its body ends. There must not be two opinions about it.

    A proxy in front of us may be of the other opinion. Then it takes what follows the body for a
    second request, which we never see, or the other way round. Attackers use that to slip requests
    past a proxy ("request smuggling", RFC 9112 section 11.2). If a header was sent twice, its two
    values arrive here with a comma between them."""
    length = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    if length is not None:
        require(coding is None, "both Content-Length and Transfer-Encoding")
        # Not "+5" or "5_000", which int() would take. From 4,300 digits on int() raises ValueError.
        require(fullmatch("[0-9]{1,4000}", length), "Content-Length must be digits, once")
    if coding is not None:
        # If the last coding is not chunked, nobody can tell where the body ends.
        last = coding.rpartition(",")[2].strip(" \t").lower()
        require(last == "chunked", "the last transfer coding must be chunked")
        if "," in coding:
            raise Refusal("not_implemented", "the only transfer coding known is chunked, once")


def check_length(length, config):
    """Refuse a body that is too long: `length` bytes are announced, or have arrived so far."""
    if length > config.max_body_bytes:
        # In the contract, "max" is always a number of students.
        raise Refusal("too_many_bytes", max=config.max_students, max_bytes=config.max_body_bytes)


def check_media_type(request):
    """The body must be JSON in UTF-8, perhaps compressed. A missing Content-Type is accepted."""
    content_type = request.headers.get("content-type", "application/json")
    coding = request.content_encoding()
    is_json = re.match(r"(?i)application/json\s*(;|$)", content_type)
    # In another charset the same bytes are other characters, and names would be wrong.
    other_charset = re.search('(?i)charset=(?!"?utf-?8)', content_type)
    if not is_json or other_charset or coding not in ("identity", "gzip", "x-gzip"):
        request.note = f"(Content-Type {escape(content_type)}, Content-Encoding {escape(coding)})"
        raise Refusal("unsupported_media_type")


def read_body(request) -> bytearray:
    """Read the whole body. The limit counts it both as it is sent and as it is decompressed."""
    body = bytearray()  # a list of small pieces would take many times the memory
    for piece in request.body:
        body += piece
        check_length(len(body), request.config)
    if request.content_encoding() != "identity":
        return unzip(body, request.config)
    return body


def unzip(body: bytearray, config) -> bytearray:
    """Decompress gzip, but never more than the limit: a megabyte can become a gigabyte."""
    decoder = zlib.decompressobj(wbits=31)  # 31 stands for gzip
    try:
        # One byte more than the limit is enough to tell that it is too long.
        data = decoder.decompress(body, config.max_body_bytes + 1)
    except zlib.error:
        data = b""  # it is broken: decoder.eof stays false, and we refuse it below
    check_length(len(data), config)
    # eof: the gzip came to its end. unused_data: something stands behind it.
    if not decoder.eof or decoder.unused_data:
        raise Refusal("malformed_json", "the gzip is broken or cut off, or something follows it")
    return bytearray(data)  # parse_json can empty it; bytes cannot be changed


def check_brackets(body: bytearray, max_students):
    """Refuse a body that would become far too many objects, before it is parsed.

    As text, "[],[],[],..." of 8 MiB takes 8 MiB. Parsed, it takes 360 MB and some seconds, in
    which nobody else gets an answer. Brackets within strings are counted, too: MAX_BRACKETS leaves
    room for them."""
    # A body of only opening brackets fails soon, as it is nested too deep. So we need only count
    # the closing ones.
    brackets = body.count(b"}") + body.count(b"]")
    if brackets > MAX_BRACKETS * (max_students + SPARE_STUDENTS):
        words = f"far more objects and arrays than {max_students} students have"
        raise Refusal("too_many_students", words, max=max_students)


def parse_json(body: bytearray):
    """Make a document of a body in UTF-8. This empties the body, to save memory. If an object has
    two members of one name, the last one counts."""
    start = body[:1000]
    try:
        text = body.decode("utf-8-sig")  # "sig": PowerShell puts a byte order mark in front
        body.clear()
        return loads(
            text, parse_int=parse_number, parse_float=parse_number, parse_constant=refuse_constant
        )
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 at byte {error.start}"
    except RecursionError:
        reason = "is nested too deep"
    except ValueError as error:
        reason = f"is not JSON: {error}"
    raise not_json(start, reason)


def parse_number(text):
    """loads calls this for each number."""
    if len(text) > MAX_DIGITS:  # int() would take seconds for a million digits
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    if text.lstrip("-").isdigit():
        return int(text)
    number = float(text)
    return int(number) if number.is_integer() else number  # 9.0 is an integer in JSON Schema, too


def refuse_constant(text):
    """loads calls this for NaN, Infinity and -Infinity, which it would accept."""
    raise ValueError(f"{text} is not JSON")


def not_json(body: bytearray, reason: str) -> Refusal:
    """A refusal that says what the body may be instead."""
    if not body:
        reason = "is empty"
    return Refusal("malformed_json", f"the body {reason}{looks_like(body)}")


def looks_like(data):
    """Words for what these bytes may be instead, or "" if that is not clear."""
    for pattern, kind in LOOKS_LIKE.items():
        if re.match(pattern, data[:1000]):
            return f"; it looks like {kind}"
    return ""


# ---------------------------------------------------------------------------------------------
# Step 3: the rules of a batch and its rows
# ---------------------------------------------------------------------------------------------

# A bad row does not sink the batch. If somebody pushes these three students,
#
#     [{"student_id_ext": "U1", "email": "a@b.edu"}, {"student_id_ext": "U2"}, "Alex"]
#
# we keep the first, and the answer says what is wrong with the others:
#
#     {"received": 3, "imported": 1, ..., "errors": [
#       {"row": 2, "field": "email", "error": "missing_field", "message": "email required"},
#       {"row": 3, "field": null, "error": "not_an_object", "message": "a student must be ..."}]}
#
# Whatever passes these rules, the database must be able to hold. If one value could make it fail,
# that value would sink a whole school's push, every night.

MAX_IGNORED = 20  # unknown keys that an answer names
KINDS = {
    str: "a string",
    bool: "true, false or null",
    int: "a whole number of at most 64 bits",
    list: "an array, also for a single student",
}
# What `listed` of a field may name, and the error for a value that is not in the list.
LISTS = {"cohorts": "unknown_cohort", "programs": "unknown_program", "campuses": "unknown_campus"}
INTEGERS = range(-(2**63), 2**63)  # what SQLite can hold
AS_INTEGER = {True: 1, False: 0, None: None}  # SQLite has no booleans
# What we strip from both ends of a string: the characters of WIDE_SPACE, each by itself, and the
# white space of ASCII. Without an argument, str.strip would also take away U+001C to U+001F, which
# are control characters and refused.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
# Control characters, and halves of surrogate pairs. (A character such as an emoji is a pair in
# JSON: "\ud83d\ude00". One half alone passes as JSON, but it is no character, and SQLite refuses
# it.)
FORBIDDEN = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class BadValue(Exception):
    """A value breaks a rule. `fault` is what the answer says of it, as in the example above."""

    def __init__(self, field: str | None, words, code="invalid_field"):
        self.fault = {"field": field, "error": code, "message": words}
        super().__init__(words)


class Batch(NamedTuple):
    """What was sent, after all checks."""

    cohort_id: str
    received: int
    records: list  # the good rows: for each a tuple of its values, in the order of FIELDS
    errors: list  # for each bad row a dict, as in the example above
    ignored: list  # keys that are no fields


# Names that the database needs for itself.
TAKEN = "entry_id roster_id institution created_at changed_at seen_at seen_in created changed seen"


def check_fields():
    """Refuse a row of FIELDS that cannot work, when the program starts."""
    taken = TAKEN.split()
    for field in (COHORT, *FIELDS):
        name = field.name.lower()  # to SQL, capitals make no difference
        if field.kind is str:
            usable = field.listed in ("", *LISTS)
        else:  # only a string can have a length, a pattern and a list
            rules = (field.longest, field.pattern, field.listed)
            usable = field.kind in (bool, int) and rules == (255, "", "")  # the defaults of Field
        if not usable or not name.isidentifier() or name in taken:
            raise ValueError(f"a name in use, a wrong kind, list or rule: {field}")
        taken.append(name)
        re.compile(field.pattern)  # raises re.error


check_fields()


def check_batch(document, institution, max_students) -> Batch:
    """Check a whole body. Bad rows are reported in the batch; any other fault is a Refusal."""
    if not isinstance(document, dict):
        raise Refusal("invalid_field", "the body must be an object", field="body")
    cohort_id = check_member(document, COHORT, institution)
    students = check_member(document, STUDENTS, institution)
    if len(students) > max_students:
        words = f"{len(students)} students in one request; at most {max_students}"
        raise Refusal("too_many_students", words, max=max_students)
    # The same result as that of check_rows, but faster: see the end of this chapter.
    records, errors = check_quickly(students, institution)
    ignored = unknown_keys(document, students)
    return Batch(cohort_id, len(students), records, errors, ignored)


def check_member(document, field, institution):
    """The value of cohort_id or students. If it is bad, the whole batch is."""
    try:
        return check_value(field, document.get(field.name), institution)
    except BadValue as bad:
        code = bad.fault["error"]
        refusal = Refusal(code, bad.fault["message"], field=field.name)
        if code == "missing_field":
            # A key may be the name of a student, so it must not reach the log. That is why we add
            # the keys only here: the words for the log were made when the Refusal was created.
            refusal.document["detail"] += (
                f"; the body has: {', '.join(shortened(document)) or 'nothing'}"
            )
        raise refusal from None


def unknown_keys(document, students) -> list:
    """The keys that are no fields, in order of their names. "firstName" may be a mistake."""
    keys: set = set()
    for student in students:
        if isinstance(student, dict):
            keys.update(student)
    unknown = keys.difference(NAMES)
    unknown |= set(document) - {COHORT.name, STUDENTS.name}
    return shortened(unknown)


def shortened(keys) -> list:
    """Keys as an answer shows them: not too many, and none of them too long."""
    return sorted({key[:64] for key in keys})[:MAX_IGNORED]


def check_rows(students, institution) -> tuple:
    """Return the good rows as records, and for each bad row what is wrong with it."""
    records = []
    errors = []
    seen: set = set()
    for row, student in enumerate(students, 1):
        try:
            records.append(check_row(student, institution, seen))
        except BadValue as bad:
            errors.append({"row": row, **bad.fault})
    return records, errors


def check_row(student, institution, seen) -> tuple:
    """The record of one student. Raises BadValue for the first fault, in the order of FIELDS.

    `seen` holds the values of KEY in the rows higher up, whether these were good or not."""
    if not isinstance(student, dict):
        raise BadValue(None, "a student must be an object", "not_an_object")
    record = []
    for field in FIELDS:
        value = check_value(field, student.get(field.name), institution)
        if field is KEY:
            if value in seen:
                words = f"the same {KEY.name} stood higher up in the batch"
                raise BadValue(KEY.name, words, "duplicate_student")
            seen.add(value)
        record.append(value)
    return tuple(record)


def check_value(field, value, institution):
    """Return the value as it is kept: stripped, and None if it is empty. Raises BadValue."""
    name = field.name
    if field.kind is str and isinstance(value, str):
        value = value.strip(WHITE_SPACE) or None
    if value is None:
        if field.required:
            raise BadValue(name, f"{name} required", "missing_field")
        return None
    kind = type(value)  # isinstance would say that True is an int
    if kind is not field.kind or (kind is int and value not in INTEGERS):
        raise BadValue(name, f"{name} must be {KINDS[field.kind]}")
    if kind is str:
        check_text(field, value)
    allowed = institution.lists.get(field.listed)  # None if the field has no list
    if allowed and value not in allowed:
        words = f"{name} is not in the institution's list of {field.listed}; capitals count"
        raise BadValue(name, words, LISTS[field.listed])
    if kind is bool:
        return AS_INTEGER[value]
    return value


def check_text(field, text):
    """Raises BadValue if a string, already stripped, breaks a rule."""
    name = field.name
    forbidden = FORBIDDEN.search(text)
    if forbidden:
        words = "no control character and no half of a surrogate pair may be in it"
        raise BadValue(name, f"{name} holds U+{ord(forbidden[0]):04X}: {words}")
    if len(text) > field.longest:
        raise BadValue(name, f"{name} must be at most {field.longest} characters")
    if field.pattern and not fullmatch(field.pattern, text):
        raise BadValue(name, f"{name} must be {field.meaning}")


# A SHORT CUT, ONLY FOR SPEED. You can skip the rest of this chapter: `check_quickly` gives the same
# result as `check_rows`, in half the time. Nearly every batch is clean, which means that no row has
# a fault, and that no value needs a change. To find that out for a whole column takes a few calls
# of functions written in C, while `check_rows` makes five calls in Python for each student. A test
# compares the two with random columns.


def check_quickly(students, institution) -> tuple:
    """What check_rows returns."""
    if not set(map(type, students)) <= {dict}:  # a set of types, in which only dict may be
        return check_rows(students, institution)
    columns = []
    for field in FIELDS:
        column = [student.get(field.name) for student in students]
        if not is_clean(field, column, institution.lists.get(field.listed)):
            return check_rows(students, institution)
        if field.kind is bool:
            column = [AS_INTEGER[value] for value in column]
        columns.append(column)
    return list(zip(*columns)), []  # zip makes rows of columns


def is_clean(field, column, allowed):
    """Whether check_value would return each value of this column just as it is."""
    kinds = {field.kind} if field.required else {field.kind, type(None)}
    if not kinds.issuperset(map(type, column)):
        return False
    values = set(column) - {None}
    if field is KEY and len(values) < len(column):
        return False  # a duplicate
    if field.kind is str:
        return texts_are_clean(field, values) and (not allowed or values <= allowed)
    return field.kind is bool or all(value in INTEGERS for value in values)


def texts_are_clean(field, values):
    """Whether check_text finds no fault in any of these, and none of them needs stripping."""
    matches = re.compile(field.pattern).fullmatch
    return (
        "" not in values
        and max(map(len, values), default=0) <= field.longest
        and not FORBIDDEN.search("".join(values))
        # If the sets are equal, strip changed no value: a changed one would be new in the set, or
        # be equal to another one. (strip would also remove some control characters that are not
        # in WHITE_SPACE. But the line above has found none.)
        and set(map(str.strip, values)) == values
        and (not field.pattern or all(map(matches, values)))
    )


# ---------------------------------------------------------------------------------------------
# Step 4: the database
# ---------------------------------------------------------------------------------------------

# A sync inserts the rows that are new and updates those that are known. It deletes nobody: if a
# push is cut short, the others must not vanish. The times say when an entry was created, when it
# last changed, and when a sync last named it. For example, sync 2 at time 200 sends U1 unchanged,
# U2 with another address, and U4:
#
#     before     created changed seen  in      after        created changed seen  in
#     U1 a@b.edu     100     100  100   1      U1 a@b.edu       100     100  200   2
#     U2 c@d.edu     100     100  100   1      U2 new@d.edu     100     200  200   2
#     U3 e@f.edu     100     100  100   1      U3 e@f.edu       100     100  100   1
#                                              U4 g@h.edu       200     200  200   2
#
# The counts are then: received 3, new 1, updated 2, unchanged 1. In the words of the contract, a
# row is "updated" if its entry was known, and "unchanged" if the entry had just these values
# already. So the unchanged ones are a part of the updated ones.
#
# "in" is `seen_in`, the number of the sync that last named the entry. It tells who has left: see
# `leavers`, among the commands. The times cannot tell that, because the clock of a host without
# internet may be wrong.
#
# SQLite collects what is new in a second file, the write-ahead log, or WAL ("sis_sync.db-wal"), and
# brings it into the database now and then. That is a checkpoint. So readers and a writer do not
# wait for each other.

SCHEMA_VERSION = 3
OLDEST_VERSION = 2  # older databases cannot be brought to this version
HISTORY_SYNCS = 10_000  # kept of each institution
HISTORY_ERRORS = 100  # row errors kept of each sync


class Counts(NamedTuple):
    """What a sync did to the rows."""

    received: int = 0
    new: int = 0
    updated: int = 0  # the known ones
    unchanged: int = 0  # those of the updated that had the same values already
    rejected: int = 0


def quoted(names, before=""):
    """Column names in SQL: "email", "group". Quoted, a name can be any word, even one of SQL's.
    `before` stands in front of each name, such as "excluded." below."""
    return ", ".join(f'{before}"{name}"' for name in names)


# The column of each field: {"student_id_ext": "TEXT", ..., "first_in_family": "INTEGER"}
COLUMNS = {field.name: "TEXT" if field.kind is str else "INTEGER" for field in FIELDS}
COLUMN_LINES = "".join(f'\n    "{name}" {kind},' for name, kind in COLUMNS.items())
# Times are whole seconds since 1970, in UTC. One row of `entries`, as SQLite prints it:
#     1|1|U2025001|alex.connor@student.example.edu.au|Alex|Connor|BUSI||0|1790000000|1790000000|...
TABLES = (
    """
CREATE TABLE IF NOT EXISTS rosters (
    roster_id INTEGER PRIMARY KEY,
    institution TEXT NOT NULL,
    cohort_id TEXT NOT NULL,
    UNIQUE (institution, cohort_id)
)""",
    f"""
CREATE TABLE IF NOT EXISTS entries (
    entry_id INTEGER PRIMARY KEY,
    roster_id INTEGER NOT NULL REFERENCES rosters (roster_id),{COLUMN_LINES}
    created_at INTEGER NOT NULL,
    changed_at INTEGER NOT NULL,
    seen_at INTEGER NOT NULL,
    seen_in INTEGER NOT NULL DEFAULT 0,
    UNIQUE (roster_id, "{KEY.name}")
)""",
    """
CREATE TABLE IF NOT EXISTS syncs (
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
    errors TEXT NOT NULL,
    forgotten INTEGER NOT NULL DEFAULT 0  -- entries that the command `forget` erased later
)""",
    "CREATE INDEX IF NOT EXISTS syncs_by_institution ON syncs (institution)",
)
# For each version the statements that turn the version before into it. Version 2 knew when an entry
# was last named, but not by which sync. So we take the last sync that the cohort had at that time.
# (A table with an index holds these syncs. To search `syncs` for each entry would take minutes.)
MIGRATIONS = {
    3: (
        "ALTER TABLE entries ADD COLUMN seen_in INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE syncs ADD COLUMN forgotten INTEGER NOT NULL DEFAULT 0",
        """
CREATE TEMPORARY TABLE last_syncs AS
SELECT roster_id, time, max(sync_id) AS sync_id
FROM syncs JOIN rosters USING (institution, cohort_id) GROUP BY roster_id, time""",
        "CREATE UNIQUE INDEX temp.last_syncs_by_time ON last_syncs (roster_id, time)",
        """
UPDATE entries SET seen_in = coalesce((
    SELECT sync_id FROM last_syncs
    WHERE last_syncs.roster_id = entries.roster_id AND time = seen_at), 0)
-- 0 if the history does not have that sync any more""",
        "DROP TABLE last_syncs",
    )
}


# SQL that shows a time as 2026-02-03T04:05:06Z.
AS_TEXT = "strftime('%Y-%m-%dT%H:%M:%SZ', {0}, 'unixepoch') AS {1}"
# What other programs read. They rely on these names of columns, so none of them ever goes away.
# When the tables change, we make the views anew. (The table `rosters` has a row for each roster,
# and the view `roster` for each student.)
VIEWS = (
    "DROP VIEW IF EXISTS roster",
    f"""
CREATE VIEW roster AS SELECT institution, cohort_id, {quoted(NAMES)},
    {AS_TEXT.format("created_at", "created")},
    {AS_TEXT.format("changed_at", "changed")},
    {AS_TEXT.format("seen_at", "seen")}
FROM entries JOIN rosters USING (roster_id)""",
    "DROP VIEW IF EXISTS history",
    f"""
CREATE VIEW history AS SELECT
    sync_id, {AS_TEXT.format("time", "time")}, institution, cohort_id, client,
    received, new, updated, unchanged, rejected, milliseconds, errors
FROM syncs""",
)
# A PRAGMA sets an option of SQLite. By default, SQLite makes a checkpoint when the WAL has 1,000
# pages of 4 KB. A batch of 5,000 students writes 500, so every other push would wait for one: a
# fifth of all time went into that. With 4,096 pages, hardly any push waits.
PRAGMAS = """
PRAGMA synchronous = FULL;             -- COMMIT returns when everything is on disk
PRAGMA fullfsync = ON;                 -- on macOS, "on disk" needs this
PRAGMA temp_store = MEMORY;            -- a full folder for temporary files must not stop a push
PRAGMA secure_delete = ON;             -- overwrite what is deleted, for `forget`
PRAGMA wal_autocheckpoint = 4096;
PRAGMA journal_size_limit = 16777216;  -- bytes; a WAL that a slow reader made longer is cut again
"""


def open_database(path, for_reading=False) -> sqlite3.Connection:
    """Open a database that exists. Raises sqlite3.Error."""
    # mode=rw does not create a file for a mistyped path. A reader opens with rw, too, and
    # query_only forbids it to write. With mode=ro, a reader could create the WAL, but not remove
    # it. If that reader was root, a WAL of root would stay, and the server could not open it.
    uri = f"{Path(path).absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(
        uri,
        uri=True,
        timeout=BUSY_TIMEOUT,  # how long SQLite waits for the lock of another connection
        isolation_level=None,  # we begin transactions ourselves; the module would begin some, too
        check_same_thread=False,  # many threads use it, but only one at a time
    )
    connection.executescript(PRAGMAS)
    connection.execute(f"PRAGMA query_only = {int(for_reading)}")
    return connection


# A function with @contextmanager is made for `with`. It runs up to `yield` when the block below
# `with` begins, and goes on behind `yield` when the block has ended. If the block raises an
# exception, it comes out of the `yield`.
@contextmanager
def read_only(path, oldest=SCHEMA_VERSION):
    """A database for reading, whether a server runs on it or not. Raises CommandError if it is not
    there, or of a version before `oldest`."""
    if not os.path.exists(path):
        raise CommandError(f"{path}: there is no database yet; a start makes it")
    try:
        with closing(open_database(path, for_reading=True)) as connection:
            if schema_version(connection) < oldest:
                raise CommandError(f"{path}: is of an older version: start the server once")
            connection.row_factory = sqlite3.Row  # a row knows its columns by name
            yield connection
    except sqlite3.Error as error:
        raise CommandError(f"{path}: {error}") from error


def schema_version(connection):
    """The version of a database, or 0 if it is empty. Raises DatabaseError if it is not ours."""
    # One statement, because another process may be making the tables just now. sqlite_master is
    # SQLite's own table of all tables and views. user_version is a number in the file that SQLite
    # leaves to us; one can read it as a PRAGMA, or as a table.
    cursor = connection.execute(
        """
SELECT
    user_version,
    (SELECT count(*) FROM sqlite_master),
    (SELECT count(*) FROM sqlite_master WHERE name IN ('rosters', 'entries', 'syncs'))
FROM pragma_user_version"""
    )
    version, everything, ours = cursor.fetchone()
    # It is not empty, and it lacks one of our tables.
    if ours < 3 and (version or everything):
        raise sqlite3.DatabaseError("this is a database of another program")
    if ours == 3 and not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        words = f"this program knows versions {OLDEST_VERSION} to {SCHEMA_VERSION}"
        raise sqlite3.DatabaseError(f"the database is of version {version}, and {words}")
    return version


def prepare_database(path):
    """Make the file, its tables and its views if they are not there. Return whether it is new.
    Other processes may do the same at the same moment."""
    is_new = not os.path.exists(path)
    # If it is not there, this makes it, for its owner alone. SQLite would let others read it.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    with closing(open_database(path)) as connection:
        schema_version(connection)  # raises an error if it is not ours, before we change anything
        if os.name == "posix":  # Windows has no such modes
            protect(path)
        switch_to_wal(connection)
        bring_up_to_date(connection, "COMMIT")
    return is_new


def rehearse(path):
    """Find out whether prepare_database would work, and change nothing. We prepare a new database
    in a temporary folder, which stands beside ours, so that a full disk shows. Then, if ours
    exists, we make the same changes to it and roll them back."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        prepare_database(os.path.join(folder, "sis_sync.db"))
    if os.path.exists(path):
        os.close(os.open(path, os.O_RDWR))  # an error, if we may only read it
        with closing(open_database(path)) as connection:
            bring_up_to_date(connection, "ROLLBACK")


def bring_up_to_date(connection, end):
    """Execute what is missing, in one transaction that ends with COMMIT or ROLLBACK."""
    connection.execute("BEGIN IMMEDIATE")  # this takes the lock for writing at once
    for statement in missing_statements(connection):
        connection.execute(statement)
    connection.execute(end)


def missing_statements(connection) -> list:
    """What must be executed to bring a database to this version. For most it is nothing."""
    statements: list = []
    version = schema_version(connection)
    if version == 0:
        statements += TABLES
    for number, changes in MIGRATIONS.items():
        if 0 < version < number:
            statements += changes
    known = {row[1] for row in connection.execute("PRAGMA table_info(entries)")}
    for name, kind in COLUMNS.items():
        if known and name not in known:  # of a new database no column is known yet
            # A field that is new in FIELDS becomes a column. It is null in the entries there are.
            statements.append(f'ALTER TABLE entries ADD COLUMN "{name}" {kind}')
    if statements:
        statements += [*VIEWS, f"PRAGMA user_version = {SCHEMA_VERSION}"]
    return statements


def protect(path):
    """Let nobody but the owner read the database. New files of SQLite's have the same mode."""
    # It fails for a file of another user, and on disks without modes (exFAT, CIFS).
    for suffix in ("", "-wal", "-shm"):
        with suppress(OSError):
            os.chmod(f"{path}{suffix}", 0o600)
    if os.stat(path).st_mode & 0o077:
        log.warning(f"warning: other users of this machine may read {path}")


def switch_to_wal(connection):
    """Make SQLite keep a WAL. For this one statement it does not wait for the lock of another
    process, so we do."""
    deadline = monotonic() + BUSY_TIMEOUT
    mode = ""
    while not mode:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError:
            if monotonic() > deadline:
                raise
            sleep(0.05)
    if mode != "wal":
        raise sqlite3.DatabaseError("this disk does not allow a write-ahead log")


# SQLite before 3.32 takes at most 999 values in one statement. Five of them are for all rows.
ROWS_AT_ONCE = (999 - 5) // len(FIELDS)


def upsert(number_of_rows):
    """The statement that stores this many rows. For one row, and with two of the fields, it is:

        INSERT INTO entries
            (roster_id, seen_in, created_at, changed_at, seen_at, "student_id_ext", "email")
        SELECT ?, ?, ?, ?, ?, sent.* FROM (VALUES (?, ?)) AS sent WHERE true
        ON CONFLICT (roster_id, "student_id_ext") DO UPDATE SET  -- if the roster has this key:
            ("email") = (excluded."email"),  -- "excluded" is the row that was sent
            seen_in = excluded.seen_in,
            seen_at = excluded.seen_at,
            changed_at = CASE
                WHEN ("email") IS NOT (excluded."email")  -- differs; IS NOT knows NULL, too
                THEN changed(max(created_at, excluded.changed_at))
                ELSE changed_at END

    A name alone, such as "email", is the entry as it was before, and excluded.changed_at is the
    present time. But if the clock was set back, an entry shall not change before it was created:
    hence max(). changed() is a function of Database: it returns its argument, and adds one to a
    counter.

    One statement for many rows takes half the time of many statements. INSERT OR REPLACE would be
    wrong: it deletes the known row first, and with it the time when it was created. Without
    "WHERE true", SQLite would take the words ON CONFLICT for the ON of a join."""
    row = f"({', '.join('?' * len(FIELDS))})"
    values = ", ".join([row] * number_of_rows)
    stored = quoted(NAMES[1:])  # all but the key
    sent = quoted(NAMES[1:], "excluded.")
    return f"""
INSERT INTO entries (roster_id, seen_in, created_at, changed_at, seen_at, {quoted(NAMES)})
SELECT ?, ?, ?, ?, ?, sent.* FROM (VALUES {values}) AS sent WHERE true
ON CONFLICT (roster_id, "{KEY.name}") DO UPDATE SET
    ({stored}) = ({sent}),
    seen_in = excluded.seen_in,
    seen_at = excluded.seen_at,
    changed_at = CASE WHEN ({stored}) IS NOT ({sent})
        THEN changed(max(created_at, excluded.changed_at)) ELSE changed_at END"""


class Database:
    """The database as the server uses it: one connection, used by one thread at a time."""

    def __init__(self, path, rehearsal=False):
        self.path = os.path.realpath(path)
        self._connection = None  # or a sqlite3.Connection
        self._files = {}  # the database and its WAL: what os.stat said when we opened them
        self._changed = 0  # known rows that got other values in this sync
        try:
            prepare = rehearse if rehearsal else prepare_database
            self.is_new = prepare(self.path)
        except OSError as error:
            raise CommandError(f"{self.path}: {os.strerror(error.errno)}") from error
        except sqlite3.Error as error:
            raise CommandError(f"{self.path}: {error}") from error

    def open(self) -> sqlite3.Connection:
        """Open the database. From now on `check_files` compares with what is there now."""
        connection = open_database(self.path)
        connection.create_function("changed", 1, self._count_changed)
        # Another database may have been put in place of ours. These two see whether we may write
        # to it, and they make its WAL.
        switch_to_wal(connection)
        schema_version(connection)
        self._files = {path: os.stat(path) for path in (self.path, f"{self.path}-wal")}
        self._connection = connection
        return connection

    def _count_changed(self, moment):
        """SQLite calls this for each known row that gets other values: see `upsert`."""
        self._changed += 1
        return moment

    def check_files(self):
        """Raises OSError if somebody deleted or replaced our files. SQLite does not notice: it goes
        on writing to the deleted ones, and all of that is lost when they are closed. (If we have
        not opened any yet, there is nothing to compare.)"""
        for path, opened in self._files.items():
            if not os.path.samestat(os.stat(path), opened):
                raise OSError(f"{path} was replaced by another file")

    def try_to_close(self):
        """Make a checkpoint, and close. But keep the connection if the checkpoint is not possible.

        To close without a checkpoint would do harm in these cases:

        1. Another database was put in place of ours. Whoever opens it next finds our WAL beside it,
           and SQLite brings that into the wrong database. A checkpoint empties the WAL.
        2. Somebody reads, and the WAL was deleted. Then no checkpoint is possible, and only our
           connection still holds what was in the WAL. So we do not close it."""
        if not self._connection:
            return
        with suppress(sqlite3.Error):
            self._connection.rollback()
            self._connection.execute("PRAGMA busy_timeout = 0")  # do not wait for a reader
            busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._connection.execute(f"PRAGMA busy_timeout = {1000 * BUSY_TIMEOUT:.0f}")
            if not busy:
                self._connection.close()
                self._connection = None
                self._files = {}

    @contextmanager
    def transaction(self):
        """All or nothing. When this ends without an exception, everything is on disk."""
        try:
            connection = self._connection or self.open()
            # IMMEDIATE takes the lock for writing at once. Without it we begin as a reader, and
            # if another process then writes first, SQLite refuses us without any waiting.
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            # Nothing of the batch has been written before BEGIN succeeds. (In Python 3.9 an error
            # has no code. Its words tell that the database is locked.)
            if "locked" in str(error):
                raise Refusal("busy", "the database is locked: try again", retry_after=1) from error
            self.try_to_close()
            raise
        try:
            yield connection
            connection.execute("COMMIT")
            # Checked only after COMMIT, because the files may have been deleted since BEGIN. Then
            # all of this will be lost, and the client must not be told that it is on disk.
            self.check_files()
        except BaseException:
            # The next transaction opens the database again. If the file was deleted, that fails,
            # too (mode=rw makes no file), until somebody puts it back or restarts the server.
            self.try_to_close()
            raise

    def store_batch(self, request, batch) -> Counts:
        """Store the good rows of a batch and a line in the history: both, or nothing."""
        names = (request.institution, batch.cohort_id)
        with self.transaction() as connection:
            now = int(time.time())
            rows = connection.execute(
                "SELECT sync_id, time FROM syncs ORDER BY sync_id DESC LIMIT 1"
            )
            last_sync, last_time = rows.fetchone() or (0, 0)
            if now < last_time:
                log.warning("warning: the clock is behind the time of the last sync")
            connection.execute("INSERT OR IGNORE INTO rosters VALUES (NULL, ?, ?)", names)
            (roster_id,) = connection.execute(
                "SELECT roster_id FROM rosters WHERE institution = ? AND cohort_id = ?", names
            ).fetchone()
            # The row of this sync, inserted below, gets the next number. The others of these values
            # are created_at, changed_at and seen_at.
            new = self._store_rows(
                connection, batch.records, (roster_id, last_sync + 1, now, now, now)
            )
            updated = len(batch.records) - new
            unchanged = updated - self._changed
            counts = Counts(batch.received, new, updated, unchanged, len(batch.errors))
            errors = dumps(batch.errors[:HISTORY_ERRORS])
            connection.execute(
                "INSERT INTO syncs (time, institution, cohort_id, client, milliseconds, errors, "
                f"{quoted(Counts._fields)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (now, *names, request.client, request.milliseconds(), errors, *counts),
            )
            # Delete the 10,001st sync from the end, and all before it. (If there are fewer, the
            # inner SELECT is NULL, and nothing is smaller.) We keep a number of syncs, not a number
            # of days, because of wrong clocks. The newest sync stays, so no sync_id is used twice.
            connection.execute(
                "DELETE FROM syncs WHERE institution = ? AND sync_id <= (SELECT sync_id FROM syncs "
                "WHERE institution = ? ORDER BY sync_id DESC LIMIT 1 OFFSET ?)",
                (request.institution, request.institution, HISTORY_SYNCS),
            )
        return counts

    def _store_rows(self, connection, records, common):
        """Store the rows, and return how many are new. `common` are the values of all rows."""
        self._changed = 0
        # SQLite gives each new entry the number behind the largest one. We hold the lock, so nobody
        # else adds entries, and the largest number grows by one for each new entry.
        last_entry = "SELECT coalesce(max(entry_id), 0) FROM entries"
        (before,) = connection.execute(last_entry).fetchone()
        for start in range(0, len(records), ROWS_AT_ONCE):
            rows = records[start : start + ROWS_AT_ONCE]
            values = itertools.chain.from_iterable(rows)
            connection.execute(upsert(len(rows)), (*common, *values))
        (after,) = connection.execute(last_entry).fetchone()
        return after - before


# ---------------------------------------------------------------------------------------------
# The built-in server
# ---------------------------------------------------------------------------------------------

# One thread accepts connections, and each connection gets a thread of its own. It reads one
# request, calls Service.handle, writes one answer, and closes. Nothing that a client does may hold
# up the others: each has a deadline, and there is a limit to the connections, and for each client.
#
# So that two threads do not change the same thing at the same time, there are three locks. A thread
# holds the turn for a whole batch, and each of the others for a moment:
#
#     Service.turn            the database, and the memory that a parsed batch takes
#     RateLimiter._lock       the buckets
#     Server.streams_changed  the set of open connections
#
# This is the life of a connection. Its state says how far it is:
#
#     accepted ----> "head" ----> "request" ----> "answer" ----> closed
#         |          we read      we work         we write, and the client reads
#         `--------> "refused" ----------------------^
#                    there are too many connections, and we only say so
#
# Handler sets its state, in the thread of the connection; only "refused" is set by Server. When the
# server stops, it lets requests finish, and waits for nothing else.
#
# Three classes of the standard library do the common work. They call methods by fixed names, and we
# define these methods:
#
#     io.BufferedReader                   reads lines and pieces: calls readinto of Stream
#     http.server.BaseHTTPRequestHandler  one connection: calls setup, handle, finish of Handler
#     http.server.ThreadingHTTPServer     accepts: calls get_request, process_request,
#                                         shutdown_request, handle_error of Server
#
# But the head of a request we read ourselves, by these patterns of RFC 9112. The handler of the
# library would accept a bare CR as the end of a line, any white space of Unicode as a space, two
# Host headers, and HTTP/0.9; it would drop all headers behind a faulty one, and report errors in
# HTML. A proxy in front of us may read the same bytes in another way, and that is how attackers get
# past it. (When you read this for the first time, the examples above the patterns are enough.)

MAX_REQUEST_LINE = 8 * 1024  # bytes; RFC 9112 section 3 recommends at least 8,000
MAX_HEAD = 16 * 1024  # bytes of headers, as Node has it
MAX_HEADERS = 100  # lines, as Apache has it
MAX_CHUNK_LINE = 256  # bytes
MAX_CHUNKS = 100  # for each student; a client that sends each word of JSON in a chunk needs 30
MAX_REFUSED = 100  # connections that are being told "busy" at one time
REFUSED_SECONDS = 2.0  # the time that each of these has
SHUTDOWN_TIMEOUT = 10.0  # seconds that requests have to finish when the server stops
OPEN_FILES = 10_240  # that we ask the system for; each connection is one; macOS gives no more
SPARE_FILES = MAX_REFUSED + 50  # kept for other things: refused connections, the database

# CR LF ends each line. (str.split and str.strip would also accept the white space of Unicode, and
# int() would accept signs, underscores and Arabic digits.)
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# "POST /api/sis/sync HTTP/1.1"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) (HTTP/[0-9]\.[0-9])\r\n")
# "/api/sis/sync?x=1", or as it is sent to a proxy: "http://sync.example.edu/api/sis/sync"
TARGET = re.compile(r"(?:(?i:https?)://([^/?#]+))?(/[^?#]*)?(?:\?[^#]*)?")
# "Content-Type: application/json"
HEADER_LINE = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)\r\n")
# "sync.example.edu", "192.0.2.1:8080", "[2001:db8::1]:8080", "a%20b". (&-+ is the range &'()*+.)
PLAIN_NAME = r"(?:[!$&-+.0-9;=A-Z_a-z~-]|%[0-9A-Fa-f]{2})+"
HOST = re.compile(rf"(?:{PLAIN_NAME}|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::[0-9]*)?")
# "1f4", the size of a chunk, or with an extension, which RFC 9112 allows: '1f4;name="a value"'
QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
EXTENSION = rf"[ \t]*;[ \t]*{TOKEN}(?:[ \t]*=[ \t]*(?:{TOKEN}|{QUOTED}))?"
CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,15}})(?:{EXTENSION})*\r\n")


def check_host(text):
    """Refuse what is not HOST or HOST:PORT."""
    match = HOST.fullmatch(text)
    is_host = match and (not match["ipv6"] or parse_address(match["ipv6"]))
    require(is_host, "the host must be NAME:PORT or [ADDRESS]:PORT, once")


def read_exactly(size, read: Callable):
    """Yield this many bytes, in pieces as they arrive. Raises EOFError if they end too early.

    This is a generator: it runs only while somebody loops over it, from one `yield` to the next.
    So it reads nothing before `read_body` asks for the first piece. The built-in server gives it a
    function that reads from the network, and that raises a Refusal if the request ends too early.
    WSGI gives it another one."""
    while size:
        piece = read(min(size, PIECE))
        if not piece:
            raise EOFError
        size -= len(piece)
        yield piece


class Stream(io.RawIOBase):
    """A connection as a file with a deadline. Each read and write may wait only for the time that
    is left. (The timeout of a socket begins anew with each byte, so a client that sends one now
    and then could keep a thread for ever.) RawIOBase is what io.BufferedReader can read from."""

    state = "head"
    stopping = False  # whether the server stops

    def __init__(self, connection, peer, config):
        self.connection = connection
        self.client_key = client_key(peer)
        self.is_proxy = is_trusted(parse_address(peer), config.trusted_proxies)
        self.config = config
        self.deadline = monotonic() + config.request_timeout

    def readable(self):
        return True  # io.BufferedReader asks

    def in_time(self) -> socket.socket:
        """The connection, ready to wait until the deadline. Raises OSError after it."""
        seconds_left = self.deadline - monotonic()
        if seconds_left <= 0:
            raise OSError("timed out")
        # A little longer, so that after the wait `readinto` finds that the deadline has passed, and
        # does not believe that the client has gone.
        self.connection.settimeout(seconds_left + 0.1)
        return self.connection

    def readinto(self, buffer):
        """Put what has arrived into the buffer, and return its size. We are asked for bytes only
        while the request is not whole. So if nothing comes (size 0), the client has gone, or the
        time is over, or the server stops, and Server.leave has ended the reading."""
        size = 0
        with suppress(OSError):
            size = self.in_time().recv_into(buffer)
        if not size and self.stopping:
            raise Refusal("busy", "the server is stopping: try again", retry_after=1)
        if not size and monotonic() >= self.deadline:
            raise Refusal("request_timeout")
        require(size, "the request ended before it was whole")
        return size

    def write(self, data):
        """Send all of it, or raise OSError."""
        rest = memoryview(data)
        while rest:
            sent = self.in_time().send(rest)  # sendall would start the clock anew
            rest = rest[sent:]


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: one request, one answer. The base class calls setup, handle and finish, which
    are replaced here. Of its own methods we use those that write the head of an answer."""

    # These names of the base class mislead. It writes protocol_version into the answer, so we set
    # that to the version of the request. request_version must only not be HTTP/0.9.
    request_version = "HTTP/1.1"
    protocol_version = "HTTP/1.1"

    def setup(self):
        # What Server.get_request returned, a Stream, is named `request` by the base class.
        self.stream = self.request
        self.rfile = io.BufferedReader(self.stream)

    def handle(self):
        """Read a request, answer it, and write a line in the log."""
        config = self.stream.config
        request = Request(self.client_address[0], config)
        refused = self.stream.state == "refused"
        try:
            # Over plain HTTP we can refuse a client at once. In all other cases we wait for its
            # first byte, and leave it in its place (MSG_PEEK). If none comes, there are two cases.
            # Before the deadline, the client has gone or the server stops, and we say nothing.
            # After the deadline we go on, and read_head will say that the time is over.
            if config.tls or not refused:
                first_byte = b""
                with suppress(OSError):
                    first_byte = self.stream.in_time().recv(1, socket.MSG_PEEK)
                if first_byte:
                    self.choose_protocol(first_byte, config.tls)
                elif monotonic() < self.stream.deadline:
                    return
            if refused:
                raise Refusal("busy", "too many connections: try again", retry_after=1)
            self.read_head(request)
            response = self.server.service.handle(request)
        except OSError as error:
            # Only the handshake raises one. Stream turns its own into a Refusal, and Service.handle
            # answers whatever happens.
            log.info(f"{request.id} {request.client} TLS handshake failed: {error}")
            return
        except Exception as error:  # noqa: BLE001
            response = answer_to(error, request)
        try:
            self.send(response)
        except OSError:
            request.note += " client gone"
        log_request(request, response)

    def choose_protocol(self, first_byte: bytes, tls: ssl.SSLContext | None):
        """Start TLS. We do it in the thread of this connection, because in the accepting thread a
        client that says nothing would stop all others."""
        speaks_tls = first_byte == b"\x16"  # every TLS connection begins so (RFC 8446 section 5.1)
        if not tls:
            require(not speaks_tls, "this port speaks http, not https")
            return
        require(speaks_tls, "this port speaks https, not http")
        # wrap_socket takes the connection over, so `leave` must know the new one before the
        # handshake begins.
        self.stream.connection = tls.wrap_socket(
            self.stream.in_time(), server_side=True, do_handshake_on_connect=False
        )
        self.stream.connection.do_handshake()

    def read_head(self, request):
        """Read the request line and the headers. The body is read later, if at all."""
        self.read_request_line(request)
        headers = self.read_headers()
        host = headers.get("host")
        if self.protocol_version == "HTTP/1.1":
            require(host is not None, "HTTP/1.1 needs a Host header")
        else:
            require("transfer-encoding" not in headers, "HTTP/1.0 has no Transfer-Encoding")
        if host:  # RFC 9112 section 3.2 allows an empty one
            check_host(host)
        request.headers = headers
        request.body = self.body_pieces(request)
        self.stream.state = "request"

    def read_request_line(self, request):
        """Read the method, the path and the version."""
        line = self.read_line(MAX_REQUEST_LINE)
        if line == "\r\n":  # RFC 9112 section 2.2 says to ignore one of these
            line = self.read_line(MAX_REQUEST_LINE)
        if len(line) > MAX_REQUEST_LINE:
            raise Refusal("line_too_long")
        match = REQUEST_LINE.fullmatch(line)
        require(match, "a request must begin METHOD TARGET HTTP/1.1")
        request.method, target, version = match.groups()
        if version not in ("HTTP/1.0", "HTTP/1.1"):
            raise Refusal("http_version_not_supported")
        self.protocol_version = version
        match = TARGET.fullmatch(target)
        # (The pattern also matches an empty target.)
        require(match and (match[1] or match[2]), "the target must begin with / or http://HOST")
        host, path = match.groups()
        if host:
            check_host(host)
        request.path = path or "/"

    def read_line(self, longest):
        """The next line with its end. If it is longer than this, we return one character more, so
        that the caller can tell. As Latin-1, each byte becomes one character."""
        return self.rfile.readline(longest + 1).decode("latin-1")

    def read_headers(self):
        """The header lines up to the empty one. Two of one name become one with a comma."""
        headers = {}
        size = 0
        for _ in range(MAX_HEADERS + 1):
            line = self.read_line(MAX_HEAD - size)
            size += len(line)
            if size > MAX_HEAD:
                break
            if line == "\r\n":
                return headers
            match = HEADER_LINE.fullmatch(line)
            require(match, "a header must be NAME: VALUE and CRLF")
            name = match[1].lower()
            value = match[2].strip(" \t")
            if name in headers:
                value = f"{headers[name]}, {value}"
            headers[name] = value
        raise Refusal("headers_too_long")

    def body_pieces(self, request):
        """Yield the pieces of the body. This is a generator: nothing here runs before `read_body`
        asks for the first piece. A client that says "Expect: 100-continue", as curl does, waits for
        our "100 Continue" before it sends the body. If we refuse it before that, it need not."""
        expects = request.headers.get("expect", "").lower()
        if expects == "100-continue" and self.protocol_version == "HTTP/1.1":
            with suppress(OSError):  # if the client has gone, the next read finds that out
                self.stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "transfer-encoding" in request.headers:
            yield from self.chunks()  # yields whatever that generator yields
        else:
            # read1 returns what has arrived; read would wait for the whole size.
            yield from read_exactly(request.content_length(), self.rfile.read1)

    def chunks(self):
        """A chunked body (RFC 9112 section 7.1): each chunk has its size in front of it."""
        config = self.stream.config
        # A chunk costs us as much work as a packet, so 8 million chunks of a byte are refused.
        max_chunks = MAX_CHUNKS * (config.max_students + SPARE_STUDENTS)
        for _ in range(max_chunks):
            line = self.read_line(MAX_CHUNK_LINE)
            match = CHUNK_LINE.fullmatch(line)
            require(match, "a chunk must begin with its size in hexadecimal")
            size = int(match[1], 16)
            if size == 0:
                self.read_headers()  # more headers may stand here (trailers); nobody needs them
                return
            check_length(size, config)
            yield from read_exactly(size, self.rfile.read1)
            require(self.rfile.read(2) == b"\r\n", "a chunk is longer than it says")
        raise Refusal("malformed_request", f"more than {max_chunks:,} chunks: send larger ones")

    def send(self, response):
        """Write the answer, in one piece. Raises OSError if the client is gone or too slow."""
        seconds = self.stream.config.request_timeout
        if self.stream.state == "refused" or self.stream.stopping or response.status == 408:
            seconds = REFUSED_SECONDS  # its time is over (408), or it should have none
        else:
            self.stream.state = "answer"
        self.stream.deadline = monotonic() + seconds
        self.wfile = io.BytesIO()  # into this the base class writes the head
        self.send_response_only(response.status)
        self.send_header("Date", self.date_time_string())
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.stream.write(self.wfile.getvalue() + response.body)

    def finish(self):
        """Close so that the answer arrives (RFC 9112 section 9.6).

        If we closed the socket while the client is still sending, its system would throw away our
        answer. So we close only our direction, and then read and forget what still comes, until the
        client closes, too, or has sent twice what a body may have."""
        connection = self.stream.connection
        rest = 2 * self.stream.config.max_body_bytes
        with suppress(OSError):
            if isinstance(connection, ssl.SSLSocket):
                connection.settimeout(0)  # tell the client that TLS ends, and do not wait for it
                # ValueError: the client had gone before TLS began.
                with suppress(OSError, ValueError):
                    connection.unwrap()
            connection.shutdown(socket.SHUT_WR)
            while rest > 0:
                piece = self.stream.in_time().recv(PIECE)
                if not piece:
                    break
                rest -= len(piece)


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections and gives each a thread, and decides how many there may be."""

    request_queue_size = 1024  # connections that wait to be accepted
    allow_reuse_address = os.name != "nt"  # on Windows it lets two servers share a port
    allow_reuse_port = False  # so does this, on any system

    def __init__(self, service):
        """Listen. Raises CommandError if the address cannot be had."""
        self.service = service
        self.streams = set()  # all open connections
        # A lock, on which `leave` can also wait until somebody calls notify_all.
        self.streams_changed = threading.Condition()
        config = service.config
        self.possible_connections = max(1, raise_file_limit() - SPARE_FILES)
        host = str(config.host)
        if config.host.version == 6:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, config.port), Handler)
        except OSError as error:
            raise CommandError(
                f"cannot listen on {host} port {config.port}: {error.strerror}"
            ) from error
        scheme = "https" if config.tls else "http"
        host = f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{host}:{self.server_address[1]}"

    def server_bind(self):
        # HTTPServer's looks up the name of this machine: up to 35 seconds where there is no DNS.
        socketserver.TCPServer.server_bind(self)

    def start(self):
        """Accept connections, in a thread of its own."""
        threading.stack_size(2 << 20)  # bytes, of each thread from now on; enough for deep JSON
        # The threads of process_request (below) have no Thread object. To log the name of a thread,
        # logging would make one for each, and keep it.
        logging.logThreads = False
        # serve_forever, of the base class, looks ten times a second whether it shall stop.
        self.accepting = threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True)
        self.accepting.start()

    def get_request(self) -> tuple:
        """Accept a connection. Raises OSError if there is none: the base class goes on after it."""
        try:
            connection, address = super().get_request()
            if address:
                return Stream(connection, address[0], self.service.config), address
            connection.close()  # macOS gives no address if the client has gone already
        except (OSError, MemoryError) as error:
            number = getattr(error, "errno", errno.ENOMEM)  # a MemoryError has no number
            if number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # No more files, or no more memory: the next would fail, too. Any other error is
                # that of a client that has gone, and costs nobody anything.
                log.error(f"- cannot accept: {describe(error)}")
                sleep(0.5)
        raise OSError("no connection")

    def process_request(self, stream, address):
        """Give a new connection its thread. If there are too many, the thread only tells that to
        the client. If MAX_REFUSED threads are doing so already, we close it without a word."""
        with self.streams_changed:
            refused = [other for other in self.streams if other.state == "refused"]
            if not self.has_room_for(stream):
                stream.state = "refused"
                stream.deadline = monotonic() + REFUSED_SECONDS
            self.streams.add(stream)
        if stream.state == "refused" and len(refused) >= MAX_REFUSED:
            self.shutdown_request(stream)
            return
        running = threading.Event()

        def run():
            running.set()
            self.process_request_thread(stream, address)  # the base class's; it calls Handler

        # If a new thread has no memory to begin, Thread.start waits for ever, and with it the
        # server. So we use the function on which Thread.start is built, and wait for a while.
        _thread.start_new_thread(run, ())
        if not running.wait(BUSY_TIMEOUT):
            raise MemoryError  # the base class closes the connection

    def has_room_for(self, stream):
        """Whether we may serve one more connection, of this client. A proxy speaks for many."""
        config = stream.config
        served = [other.client_key for other in self.streams if other.state != "refused"]
        if len(served) >= min(config.max_connections, self.possible_connections):
            return False
        return (
            stream.is_proxy or served.count(stream.client_key) < config.max_connections_per_client
        )

    def shutdown_request(self, stream):
        """The base class calls this at the end of every connection, whatever happened in it."""
        with self.streams_changed:
            self.streams.discard(stream)
            self.streams_changed.notify_all()
        stream.connection.close()

    def handle_error(self, stream, address):
        """The base class calls this for an error that nobody caught."""
        _, error, _ = sys.exc_info()
        with suppress(MemoryError):  # this may run in the accepting thread, and would end it
            log.error(f"- connection: {describe(error)}")

    def leave(self):
        """Accept no more, let requests finish for a while, and close the database."""
        self.shutdown()  # ends serve_forever
        self.server_close()  # closes the socket that listens
        with self.streams_changed:
            for stream in self.streams:
                stream.stopping = True  # the read that is ended below will look at this
                if stream.state != "request":
                    with suppress(OSError):
                        # This ends a read that waits. SSLSocket has a shutdown of its own, which
                        # would also end TLS while another thread reads. So we name the class.
                        socket.socket.shutdown(stream.connection, socket.SHUT_RD)
            self.streams_changed.wait_for(lambda: not self.streams, SHUTDOWN_TIMEOUT)
        # If the turn is free, we take it for good, so nobody opens the database again. If a sync
        # still has it, its transaction ends with the process, as if it had never begun.
        if self.service.turn.acquire(blocking=False):
            self.service.database.try_to_close()


def raise_file_limit():
    """Ask for as many open files as possible, and return how many there may be. (On macOS a process
    begins with 256, and each connection is one.)"""
    most = OPEN_FILES
    # ImportError: Windows has no such limit. ValueError: the system may forbid us to raise it.
    with suppress(ImportError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard > 0:  # a negative number means no limit
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


# How the server starts, stops, and reads its configuration again.

Arguments = argparse.Namespace  # what was given at the command line
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


def command_serve(arguments):
    """Run the server until SIGTERM or Ctrl-C."""
    log_to_stderr()
    on_terminal = os.isatty(0)  # 0 is standard input
    signals = incoming_signals()
    server = set_up(arguments)
    service = server.service
    server.start()
    log.info(f"sis_sync {__version__} listens on {server.url}{SYNC_PATH}")
    announce(service)
    while server.accepting.is_alive():
        sleep(0.1)
        if not signals:
            continue
        # SIGHUP means "read the configuration again". But a terminal that is closed sends it, too,
        # to all programs that were started in it.
        terminal_closed = on_terminal and not os.isatty(0)
        number = signals.pop(0)
        if number == HANGUP and not terminal_closed:
            reload(service, arguments)
            continue
        log.info("stopping; a second signal stops at once")
        server.leave()
        log.info("stopped")
        return 0
    log.critical("the thread that accepts connections has ended: see above")
    return 1


def set_up(arguments, rehearsal=False) -> Server:
    """Do all that a start does before it accepts connections: read the configuration, open the
    database, and listen. The command `check` rehearses it. Raises CommandError."""
    return Server(Service(load_configuration(arguments), rehearsal))


def announce(service):
    """Say in the log what is used."""
    log.info(f"configuration: {service.config.file or 'defaults, as there is no file'}")
    log.info(f"{'new ' if service.database.is_new else ''}database: {service.database.path}")


def incoming_signals() -> list:
    """A list to which signals are added as they arrive. Python calls `remember` between any two
    steps of the main thread. Something may be half done there, so it does no more than this. After
    a first signal to stop, a second one has its usual effect: it ends the process."""
    signals: list = []

    def remember(number, _):
        if number != HANGUP:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, HANGUP):
        # Whoever started us with a signal ignored, as nohup does, wants us to survive it.
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, remember)
    return signals


def reload(service, arguments):
    """Read the file again. A faulty one changes nothing."""
    old = service.config
    try:
        new = load_configuration(arguments)
        if old.file and not new.file:
            raise CommandError(f"{old.file} is not there any more")
    except Exception as error:  # noqa: BLE001  # no file, however odd, stops a running server
        faults = error.args if isinstance(error, CommandError) else [describe(error)]
        log.error(f"not reloaded: {'; '.join(faults)}")
        return
    if bool(new.tls) != bool(old.tls):  # from http to https, or back
        new.tls = old.tls
    service.config = new
    log.info("reloaded; host, port, database, and http or https need a restart")


def log_to_stderr():
    """Each line begins with the time in UTC."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = gmtime
    handler.setFormatter(formatter)
    log.handlers[:] = [handler]
    log.propagate = False


# ---------------------------------------------------------------------------------------------
# The other way in: WSGI
# ---------------------------------------------------------------------------------------------

# WSGI (PEP 3333) is how a web server written in Python, such as gunicorn, waitress or Apache's
# mod_wsgi, calls a program. That web server reads the head of a request and writes the answer, and
# we do what is between. `gunicorn sis_sync:application` is all it takes.

# These settings have no effect there: the web server listens, and has limits of its own.
TAKEN_OVER = """host port tls_certificate tls_key
max_connections max_connections_per_client request_timeout"""
first_request = threading.Lock()


def application(environ, start_response) -> list:
    """Answer one request, as WSGI wants it: `environ` has the request; X-Request-ID, for example,
    is HTTP_X_REQUEST_ID there. We call start_response with the status and the headers, and return
    the body as a list of bytes."""
    request = Request(environ.get("REMOTE_ADDR", ""), None)  # its config comes below
    request.method = environ["REQUEST_METHOD"]
    request.path = environ.get("PATH_INFO") or "/"
    for name, value in environ.items():
        # CONTENT_TYPE and CONTENT_LENGTH have no HTTP_ in front of them. Some web servers set
        # them to "" if the client has not sent them.
        if name.startswith("HTTP_") or (name in ("CONTENT_TYPE", "CONTENT_LENGTH") and value):
            header = name.removeprefix("HTTP_").replace("_", "-").lower()
            request.headers[header] = value
    request.body = wsgi_pieces(environ, request)
    try:
        # Without the lock, several first requests at once would make several services, each with a
        # rate limiter of its own.
        with first_request:
            service = get_service()
        request.config = service.config
        response = service.handle(request)
    except CommandError as error:  # the configuration or the database is no good
        response = answer_to(error, request)
    log_request(request, response)
    phrase = http.HTTPStatus(response.status).phrase
    start_response(f"{response.status} {phrase}", list(response.headers.items()))
    return [response.body]


@lru_cache
def get_service() -> Service:
    """The service. The first call makes it, and @lru_cache keeps it for all later calls."""
    log_to_stderr()
    service = Service(load_configuration(Arguments(config=None)))
    announce(service)
    warn_of_taken_over(service.config)
    return service


def warn_of_taken_over(config):
    """Say which settings the operator changed in vain. (SETTINGS has the default first.)"""
    settings = {**SETTINGS["server"], **SETTINGS["limits"]}
    changed = [key for key in TAKEN_OVER.split() if str(getattr(config, key)) != settings[key][0]]
    if changed:
        log.warning(f"warning: the web server decides, so without effect: {', '.join(changed)}")


def wsgi_pieces(environ, request):
    """Yield the pieces of the body, up to Content-Length; or until there are no more, if the web
    server promises with wsgi.input_terminated that there is an end. This is a generator, too: a
    Refusal is raised while `read_body` loops over it."""
    read = environ["wsgi.input"].read
    has_end = environ.get("wsgi.input_terminated")
    require(
        has_end or "transfer-encoding" not in request.headers,
        "this host does not hand chunked bodies on: send a Content-Length",
    )
    try:
        if has_end and "content-length" not in request.headers:
            piece = read(PIECE)
            while piece:
                yield piece
                piece = read(PIECE)
        else:
            yield from read_exactly(request.content_length(), read)
    except Exception:  # noqa: BLE001  # PEP 3333 does not say what a broken connection raises
        raise Refusal("malformed_request", "the request ended before it was whole") from None


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

# sis_sync.ini has the sections [server], [limits], and [institution NAME] for each institution.
# A mistake in it must not go unnoticed: we refuse to start, and name all of them at once. For
# example, "prot = 80" below [server] gives
#
#     sis_sync.ini: [server] prot: unknown key; allowed: host, port, ...; did you mean port?

SHORT_SECRET = 16  # characters; a shorter one can perhaps be guessed
WARN_SECONDS = 14 * 24 * 60 * 60  # before the certificate runs out
DEFAULT_FILE = Path(__file__).resolve().with_suffix(".ini")


class Configuration(argparse.Namespace):
    """What the operator decides. Its attributes are all keys of [server] and [limits], and

    institutions  a list of Institution
    tls           an ssl.SSLContext, or None for plain HTTP
    file          the path of the file, or "" if there is none

    (A Namespace makes attributes of the names that it is called with.) Nobody changes it while it
    is in use: a reload makes another one."""


class BadSetting(argparse.ArgumentTypeError):
    """A value in the file, or an option of the command line, is not what it must be. (argparse
    reads the command line. It shows the words of an ArgumentTypeError to the user.)"""


class Format(NamedTuple):
    """What a text must look like, and how it becomes a value. This serves for the settings in the
    file and for the options of the command line. A Format is called like a function:
    whole_number(1, 10)("7") returns 7."""

    words: str  # what is allowed
    pattern: str = "(?s).*"  # (?s) lets the dot match line ends, too
    make: Callable = str  # makes the value of the text; may raise ValueError
    among: Iterable = ()  # all values that are allowed, if they can be listed
    shown: bool = True  # whether a wrong text may be shown; it may be a secret

    def __call__(self, text):
        """Return the value, or raise BadSetting."""
        with suppress(ValueError, OverflowError):
            if fullmatch(self.pattern, text):
                value = self.make(text)
                if not self.among or value in self.among:
                    return value
        found = repr(text[:60]) if self.shown else "something else"
        raise BadSetting(f"found {found}; must be {self.words}")


def whole_number(low, high) -> Format:
    # int alone would also take "+5", "5_000" and "٥".
    words = f"a whole number from {low} to {high}"
    return Format(words, "[0-9]{1,12}", int, range(low, high + 1))


def split_networks(text) -> list:
    words = text.replace(",", " ").split()
    # parse_address makes 10.0.0.1 of ::ffff:10.0.0.1; ip_network also takes 10.0.0.0/8.
    return [ipaddress.ip_network(parse_address(word) or word) for word in words]


def split_list(text) -> frozenset:
    words = {word.strip() for word in re.split("[,\n]", text)}
    return frozenset(words - {""})


ADDRESS = Format("an IP address, as no name is looked up", make=ipaddress.ip_address)
FILE = Format("the path of a file", r"[^\x00-\x1f\x7f]+")
NO_FILE = Format("the path of a file, or nothing", r"[^\x00-\x1f\x7f]*")
NETWORKS = Format("addresses, or networks without host bits, or nothing", make=split_networks)
# To configparser, an indented line belongs to the value above it. So if there is a "=" in a list, a
# key was probably indented by mistake.
LIST = Format("values with commas or line ends between; a key is not indented", "[^=]*", split_list)
SECRET_PLACE = r"(env:[A-Za-z_][A-Za-z0-9_]*|file:[^\s\x00-\x1f\x7f]+|sha256:[0-9A-Fa-f]{64})"
SECRET_PLACES = Format(
    "env:NAME, file:PATH or sha256:HEX (64 digits); several have white space between them, so a "
    "PATH can have none; never the secret itself",
    rf"({SECRET_PLACE}(\s+{SECRET_PLACE})*)?",
    str.split,
    shown=False,
)

# Each section with its keys: the default, and the format. sis_sync.ini explains each of them.
SETTINGS = {
    "server": {
        "host": ("127.0.0.1", ADDRESS),
        "port": ("8080", whole_number(0, 65535)),
        "database": ("sis_sync.db", FILE),
        "tls_certificate": ("", NO_FILE),
        "tls_key": ("", NO_FILE),
        "trusted_proxies": ("", NETWORKS),
    },
    "limits": {
        "requests_per_minute": ("20", whole_number(1, 100_000)),
        "max_students": ("5000", whole_number(1, 100_000)),
        "max_body_bytes": ("8388608", whole_number(1024, 1 << 30)),
        "max_connections": ("256", whole_number(1, 10_000)),
        "max_connections_per_client": ("32", whole_number(1, 10_000)),
        "request_timeout": ("30", whole_number(1, 3600)),
    },
    "institution": {
        "secrets": ("env:SIS_SYNC_SECRET", SECRET_PLACES),
        "cohorts": ("", LIST),
        "programs": ("", LIST),
        "campuses": ("", LIST),
        "bad_rows": ("skip", Format("skip or reject", among=("skip", "reject"))),
    },
}


def load_configuration(arguments) -> Configuration:
    """Read the configuration. Raises CommandError with all faults that it has.

    The file is what --config names, else what SIS_SYNC_CONFIG names, else sis_sync.ini beside this
    module. If nobody named a file and there is none, all settings have their defaults."""
    named = arguments.config or os.environ.get("SIS_SYNC_CONFIG")
    file = Path(named or DEFAULT_FILE).absolute()
    is_used = named or file.exists()  # a file that somebody named must be there
    sections = read_ini(file) if is_used else {}
    faults: list = []  # each of the functions below adds what it finds
    settings: dict = {}
    for section in ("server", "limits"):
        settings.update(read_section(section, sections.pop(section, {}), faults))
    for key in ("host", "port"):  # `serve` has them as options; if not given, they are missing
        settings[key] = getattr(arguments, key, settings[key])
    for key in ("database", "tls_certificate", "tls_key"):
        if settings[key]:
            settings[key] = str(file.parent / settings[key])
    # Without any [institution NAME] there is one called default. Its secret is SIS_SYNC_SECRET.
    institutions = read_institutions(sections or {"institution default": {}}, file.parent, faults)
    tls = read_tls(settings["tls_certificate"], settings["tls_key"], faults)
    if faults:
        raise CommandError(*(f"{file}: {fault}" for fault in faults))
    # What is allowed, but probably not meant.
    if not any(institution.digests for institution in institutions):
        log.warning("warning: no institution has a secret set: every push will be answered 503")
    if not tls and not settings["host"].is_loopback:
        log.warning(f"warning: [server] host: {settings['host']} is open to others, without TLS")
    path = str(file) if is_used else ""
    return Configuration(**settings, institutions=institutions, tls=tls, file=path)


def read_ini(file: Path) -> dict:
    """The sections and keys of the file, as text."""
    # No interpolation: it gives % a meaning. No default section: it would add to all others.
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    # How a section begins. The pattern of configparser would ignore what stands behind the "]".
    parser.SECTCRE = re.compile(r"\[(?P<header>[^]]+)\]$")
    try:
        data = file.read_bytes()
        parser.read_string(data.decode("utf-8-sig"))  # Notepad writes a byte order mark
        return {section: dict(parser[section]) for section in parser.sections()}
    except OSError as error:
        words = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        words = f"is not UTF-8{looks_like(data)}"
    except configparser.Error as error:
        # Its own words would show the line, which may hold a secret. Its attributes are `lineno`,
        # or if it is a ParsingError `errors`, a list of pairs (line number, line).
        line = vars(error).get("lineno") or vars(error)["errors"][0][0]
        words = f"line {line}: must be [section], or key = value below one, and each of them once"
    raise CommandError(f"{file}: {words}")


def read_section(section, texts, faults) -> dict:
    """The values of one section, by key. `texts` has what the file says; SETTINGS has the rest."""
    known = SETTINGS[section.partition(" ")[0]]
    for key in texts:
        if key not in known:
            # A strange key may be a secret with a "=" in it, on a line of its own: do not show it.
            shown = key if fullmatch("[A-Za-z_-]{1,30}", key) else "what is before the ="
            faults.append(f"[{section}] {shown}: {unknown('key', key, list(known))}")
    values = {}
    for key, (default, read) in known.items():
        text = texts.get(key, default)
        try:
            if re.search(r"(^|\s)[#;]", text):
                raise BadSetting("a comment must stand on a line of its own")
            values[key] = read(text)
        except BadSetting as error:
            faults.append(f"[{section}] {key}: {error}")
            values[key] = ""  # so that we can go on, and find more faults
    return values


def unknown(what, name, known):
    """Words for a name that we do not know, and the known name that is most like it."""
    words = f"unknown {what}; allowed: {', '.join(known)}"
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"{words}; did you mean {close[0]}?" if close else words


def read_institutions(sections, folder, faults) -> list:
    """The institutions. Each of these sections must be an [institution NAME]."""
    institutions = []
    # By digest: the section that has it. Nobody may have the digest of the empty secret.
    owners = {sha256(b"").digest(): "nobody: it is empty"}
    for section, texts in sections.items():
        if not fullmatch("institution [a-z0-9-]{1,64}", section):
            known = ["server", "limits", "institution NAME"]
            faults.append(f"[{section}]: {unknown('section', section, known)} (NAME: a-z, 0-9, -)")
            continue
        values = read_section(section, texts, faults)
        digests = []
        for source in values["secrets"]:
            try:
                digest = digest_of(source, folder)
                # If two institutions had one secret, one would be taken for the other.
                owner = owners.setdefault(digest, section)  # who had it first
                if owner != section:
                    raise CommandError(f"one of them is also that of {owner}")
                digests.append(digest)
            except OSError as error:  # only a warning, so that the others can push
                log.warning(f"warning: [{section}] secrets: not set: {error}")
            except CommandError as error:
                faults.append(f"[{section}] secrets: {error}")
        log.info(f"{section}: secrets set: {len(digests)}")
        name = section.partition(" ")[2]
        lists = {key: values[key] for key in LISTS}
        institutions.append(Institution(name, tuple(digests), lists, values["bad_rows"]))
    return institutions


def digest_of(source, folder) -> bytes:
    """The digest of the secret at env:NAME, file:PATH or sha256:HEX."""
    if source.startswith("sha256:"):
        return bytes.fromhex(source[7:])
    return sha256(read_secret(source, folder)).digest()


def read_secret(source, folder) -> bytes:
    """The secret at env:NAME or file:PATH. Raises OSError if there is none, CommandError if what is
    there cannot be one."""
    scheme, _, place = source.partition(":")
    if scheme == "env":
        return check_secret(source, os.fsencode(os.environ.get(place, "")))
    path = folder / place
    return check_secret(str(path), path.read_bytes())


def check_secret(source, text: bytes) -> bytes:
    """The secret in this text. Raises OSError if it is empty, CommandError if it is not usable."""
    secret = text.removeprefix(b"\xef\xbb\xbf").strip()  # Notepad writes a byte order mark
    if not secret:
        raise OSError(f"{source}: missing or empty")
    # `sis_sync.py secret > file` writes two lines, the secret and its digest. That is not one word,
    # so we refuse it.
    is_word = fullmatch(rb"[!-~\x80-\xff]{1,%d}" % MAX_SECRET, secret)
    if not is_word or secret.lower().startswith(b"sha256:"):
        raise CommandError(
            f"{source}: must be the secret alone, a word of at most {MAX_SECRET} bytes"
            f"{looks_like(text)} (a sha256: line goes into sis_sync.ini itself, after secrets =)"
        )
    if len(secret) < SHORT_SECRET:
        log.warning(f"warning: {source}: shorter than {SHORT_SECRET} characters")
    if secret[:1] in (b'"', b"'"):
        log.warning(f"warning: {source}: the secret still has its quotes")
    return secret


def read_tls(certificate, key, faults) -> ssl.SSLContext | None:
    """What is needed to speak https, or None for http."""
    if not certificate:
        if key:
            faults.append("[server] tls_key: stands without tls_certificate")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Some versions of Python do not know these two options. The first: a client must not make us
    # repeat the handshake, which costs us much more than the client. The second: if a client or
    # `leave` ends the connection without a word of TLS, we can still send the answer.
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    try:
        # Without a password, OpenSSL would ask for one on the terminal and wait.
        context.load_cert_chain(certificate, key or None, password="")
    except OSError as error:
        faults.append(
            f"[server] tls_certificate: {certificate}: must be certificates in PEM, the server's "
            f"own before those of its issuers, and tls_key its key, unencrypted ({error.strerror})"
        )
        return None
    last_day = last_day_of(certificate)
    if last_day < strftime("%Y%m%d", gmtime(time.time() + WARN_SECONDS)):
        log.warning(f"warning: [server] tls_certificate: its last day is {last_day}")
    return context


def last_day_of(certificate):
    """The last day of the first certificate in this file, as in "20271231".

    The standard library tells this only of other people's certificates. Within the bytes of ours,
    the first and the last second of its validity stand side by side (RFC 5280 section 4.1.2.5):

        17 0d 260101000000Z 17 0d 271231235959Z

    (From 2050 on, it is 18 0f and four digits of the year.) So between a Z and the next Z we find
    the last one."""
    text = Path(certificate).read_text("latin-1")
    base64 = re.findall("(?s)-----BEGIN .*?CERTIFICATE-----(.*?)-----END", text)[0]
    der = binascii.a2b_base64(base64)
    digits = re.findall(rb"Z(?:\x17\x0d|\x18\x0f)([0-9]+)Z", der)[0]
    day = digits[:-6].decode()
    return day if len(day) == 8 else f"20{day}"


# ---------------------------------------------------------------------------------------------
# The OpenAPI document
# ---------------------------------------------------------------------------------------------

# /openapi.json describes all of the above for programs that generate clients. No push passes
# through this chapter, so you can skip it. What is the same for ever stands here as text. What can
# change is filled in from the tables that the code checks with: FIELDS, ERRORS and ROUTES.

EXAMPLE = {"cohort_id": "2026", "students": [{field.name: field.example for field in FIELDS}]}
OPENAPI = """
{
  "openapi": "3.1.0",
  "servers": [{"url": "/"}],
  "info": {
    "title": "sis_sync",
    "license": {"name": "MIT", "identifier": "MIT"},
    "description": "An institution may send requests_per_minute, 20 by default; then it gets 429."
  },
  "paths": {
    "/api/sis/sync": {
      "security": [{"secret": []}],
      "requestBody": {
        "required": true,
        "description": "UTF-8, plain or Content-Encoding: gzip; or chunked.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Batch"}}}
      },
      "responses": {"200": {
        "description": "the rows are on disk; those in errors were not stored",
        "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
        "content": {"application/json": {
          "schema": {"$ref": "#/components/schemas/Result"},
          "example": {
            "received": 2, "imported": 1,
            "details": {"imported": 1, "updated": 0, "unchanged": 0},
            "errors": [{"row": 2, "field": "email", "error": "missing_field",
                        "message": "email required"}],
            "ignored": ["firstName"]
          }
        }}
      }}
    },
    "/healthz": {
      "security": [],
      "responses": {"200": {
        "description": "the database answers",
        "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
        "content": {"application/json": {
          "schema": {"type": "object", "required": ["status"],
                     "properties": {"status": {"type": "string"}}},
          "example": {"status": "ok"}
        }}
      }}
    },
    "/openapi.json": {
      "security": [],
      "responses": {"200": {
        "description": "this document",
        "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": {"type": "object"}}}
      }}
    }
  },
  "components": {
    "securitySchemes": {"secret": {"type": "http", "scheme": "bearer"}},
    "schemas": {
      "Batch": {
        "type": "object",
        "required": ["cohort_id", "students"],
        "properties": {
          "students": {
            "type": "array",
            "description": "each student_id_ext once",
            "items": {"$ref": "#/components/schemas/Student"}
          }
        }
      },
      "Student": {
        "type": "object",
        "description": "The whole record: what is left out is null. No half of a surrogate pair.",
        "required": [],
        "properties": {}
      },
      "Result": {
        "type": "object",
        "required": ["received", "imported", "details", "errors", "ignored"],
        "properties": {
          "received": {"type": "integer"},
          "imported": {"type": "integer"},
          "details": {
            "type": "object",
            "required": ["imported", "updated", "unchanged"],
            "properties": {
              "imported": {"type": "integer"},
              "updated": {"type": "integer"},
              "unchanged": {"type": "integer"}
            }
          },
          "errors": {"type": "array", "items": {"$ref": "#/components/schemas/RowError"}},
          "ignored": {"type": "array", "items": {"type": "string"}}
        }
      },
      "RowError": {
        "type": "object",
        "required": ["row", "field", "error", "message"],
        "properties": {
          "row": {"type": "integer", "minimum": 1},
          "field": {"type": ["string", "null"]},
          "error": {
            "type": "string",
            "enum": ["missing_field", "invalid_field", "duplicate_student", "not_an_object"]
          },
          "message": {"type": "string"}
        }
      }
    }
  }
}
"""
# The answer to an error, and what else it may carry.
ERROR_RESPONSE = """
{
  "description": "",
  "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
  "content": {"application/json": {"schema": {
    "type": "object",
    "required": [],
    "properties": {"error": {"type": "string"}, "detail": {"type": "string"}},
    "examples": []
  }}}
}
"""
CARRIED = loads("""
{
  "field": {"type": "string", "examples": ["cohort_id"]},
  "errors": {
    "type": "array",
    "items": {"$ref": "#/components/schemas/RowError"},
    "examples": [[
      {"row": 2, "field": "email", "error": "missing_field", "message": "email required"}
    ]]
  },
  "max": {"type": "integer", "examples": [5000]},
  "max_bytes": {"type": "integer", "examples": [8388608]},
  "retry_after": {"type": "integer", "minimum": 1, "examples": [3]},
  "request_id": {"type": "string", "examples": ["9c1185a5c5e9fc54"]}
}
""")
TYPES = {str: "string", bool: "boolean", int: "integer"}
# The rules of a string, as patterns that every language reads alike. Some generators write them
# into source code, where the characters U+0085, U+2028 and U+2029 would end the line. So the first
# is written as an escape, and the others are within a range. (The range also has a few that are no
# white space. A client that keeps to the pattern refuses them, which does no harm.)
CONTROL = r"\x00-\x1f\x7f"
SPACE = r" \x85" + "\xa0\u1680\u2000-\u200a\u2027-\u202f\u205f\u3000"
# Something that is no white space at both ends, and no control character anywhere.
TEXT_PATTERN = f"[^{CONTROL}{SPACE}]+(?:[{SPACE}]+[^{CONTROL}{SPACE}]+)*"


def schema_of(field) -> dict:
    """The JSON Schema of a field. What it accepts, check_value accepts."""
    schema: dict = {"type": TYPES[field.kind], "description": field.meaning}
    if field.kind is int:
        schema.update(minimum=INTEGERS[0], maximum=INTEGERS[-1])
    if field.kind is str:
        optional = "" if field.required else "?"
        schema["pattern"] = f"^(?:{TEXT_PATTERN}){optional}$"
        schema["maxLength"] = field.longest
    if field.pattern:
        # A field that you add may have "(?i)f|m": f or m, capital or small. Other languages want
        # that as "(?i:f|m)".
        pattern = re.sub(r"^\(\?([a-z]+)\)(.*)$", r"(?\1:\2)", field.pattern)
        pattern = pattern.replace(WIDE_SPACE, SPACE)
        schema["allOf"] = [{"pattern": f"^(?:{pattern})$"}]  # both patterns must match
    if not field.required:
        schema["type"] = [schema["type"], "null"]
    return schema


def add_error(responses: dict, code, error: ErrorCode):
    """Describe one more error among the responses of an operation."""
    response = responses.setdefault(str(error.status), loads(ERROR_RESPONSE))
    response["description"] += f"{code}: {error.meaning}. "
    schema = response["content"]["application/json"]["schema"]
    examples = schema["examples"]
    examples.append({"error": code, "detail": error.meaning})
    for name in error.carries:
        schema["properties"][name] = CARRIED[name]
        examples[-1][name] = CARRIED[name]["examples"][0]
    schema["properties"]["error"]["enum"] = sorted({example["error"] for example in examples})
    # set(example) is the set of its keys. What all examples have is required.
    schema["required"] = sorted(set.intersection(*map(set, examples)))
    for name, value in error.headers:
        response["headers"][name] = {"schema": {"type": TYPES[type(value)]}}


def openapi_document(max_students) -> dict:
    """OpenAPI 3.1 of the contract."""
    document = loads(OPENAPI)
    document["info"]["version"] = __version__
    schemas = document["components"]["schemas"]
    student = schemas["Student"]
    for field in FIELDS:
        student["properties"][field.name] = schema_of(field)
        if field.required:
            student["required"].append(field.name)
        if field.listed:
            schemas["RowError"]["properties"]["error"]["enum"].append(LISTS[field.listed])
    batch = schemas["Batch"]
    batch["examples"] = [EXAMPLE]
    batch["properties"]["cohort_id"] = schema_of(COHORT)
    batch["properties"]["students"]["maxItems"] = max_students
    for path, (methods, answer, summary) in ROUTES.items():
        # A route that is new in ROUTES is not in the text above.
        operation = document["paths"].get(path, {"responses": {"200": {"description": "done"}}})
        operation.update(operationId=answer.__name__, summary=summary)
        document["paths"][path] = {methods.partition(",")[0].lower(): operation}
        for name, error in ERRORS.items():
            if error.only_in in ("", answer.__name__):
                add_error(operation["responses"], error.code or name, error)
    return document


# ---------------------------------------------------------------------------------------------
# The pushing side
# ---------------------------------------------------------------------------------------------

# From here on it is the same contract from the other side: `push` sends a file to a server, page by
# page. To send a page twice does no harm, so whenever the answer is lost, we send it again.

RETRIES = 5  # after a fault of the connection or the server
MAX_REQUESTS = 100  # for one page, however often a server asks to wait
MAX_WAIT = 3600  # seconds; if a server asks for more, we stop and say so
ANSWER_TIMEOUT = 60.0  # seconds without a byte
MAX_ANSWER = 16 << 20  # bytes; http.client of Python 3.9 takes as much memory at once
DETAILS = ("imported", "updated", "unchanged")  # the contract's words; "imported" are the new ones
ANYONE = Institution("", (), {})  # an institution without lists


class Answer(NamedTuple):
    """What a server answered to a page."""

    status: int  # 0 if there was no answer
    document: dict
    retry_after: int = 0  # seconds, or 0 if it does not say

    def __str__(self):
        error = self.document.get("error", "an answer that is not of sis_sync")
        detail = self.document.get("detail", "")
        return f"{error}: {detail} (status {self.status})"


class Push:
    """A roster on its way, page by page. `post` is a function that takes a page and returns an
    Answer: the method of a Client, or for a dry run `check_locally`."""

    def __init__(self, post, cohort_id, rows, output):
        self.post = post
        self.cohort_id = cohort_id
        self.rows = rows  # pairs: the number in the file, the student
        self.output = output  # where the progress is shown
        self.done = 0  # rows of pages that were answered with 200
        self.counts = dict.fromkeys(DETAILS, 0)
        self.rejected = {}  # by the number in the file: what is wrong
        self.ignored = set()

    def run(self, page_size):
        """Send all rows. Raises CommandError if the server says no for good."""
        try:
            while self.done < len(self.rows):
                page = self.rows[self.done : self.done + page_size]
                answer = self.ask(page)
                if answer.status == 413 and len(page) > 1:  # from now on with half the size
                    page_size = len(page) // 2
                    continue
                self.count(page, answer)  # a refusal may name bad rows, too
                if answer.status != 200:
                    raise CommandError(f"stopped: {answer}")
                self.done += len(page)
                self.show()
        finally:
            if self.output.isatty():
                print(file=self.output)  # the line of the bar ends

    def ask(self, page):
        """Send a page, again and again if that may help."""
        students = [student for _, student in page]
        attempts = 0
        for _ in range(MAX_REQUESTS):
            answer = self.post({"cohort_id": self.cohort_id, "students": students})
            # If the server names a time, we wait for so long, as often as it says so. Otherwise we
            # try RETRIES times, and wait longer each time.
            if answer.status in (429, 503) and answer.retry_after:
                seconds = answer.retry_after
            elif attempts < RETRIES and (answer.status in (0, 408, 429) or answer.status >= 500):
                # Random, so that the clients of a server that comes back do not come all at once.
                seconds = 2**attempts * random.uniform(0.75, 1.25)
                attempts += 1
            else:
                break
            if seconds > MAX_WAIT:
                raise CommandError(f"stopped: {answer}; it asks to wait {seconds} s")
            self.show(f", {answer.document.get('error', answer.status)}: again in {seconds:.0f} s")
            sleep(seconds)
        return answer

    def count(self, page, answer):
        """Add up what an answer says. Raises CommandError if a 200 is not one of sis_sync."""
        document = answer.document
        try:
            for error in document.get("errors", []):
                number, _ = page[error["row"] - 1]
                self.rejected[number] = f"{error['error']}: {error['message']}"
            if answer.status == 200:
                for name in DETAILS:
                    self.counts[name] += int(document["details"][name])
                self.ignored.update(map(str, document.get("ignored", [])))
        except (LookupError, TypeError, ValueError, OverflowError):
            raise CommandError(f"stopped: {answer}") from None

    def show(self, more=""):
        """Show how far it is: a bar on a terminal, else a line for each page."""
        text = f"{self.done:,} of {len(self.rows):,} students{printable(more)}"
        end = "\n"
        if self.output.isatty():
            bar = "#" * (20 * self.done // len(self.rows))
            text = f"\r\x1b[K[{bar:<20}] {text}"  # back to the start of the line, and empty it
            end = ""
        with suppress(OSError):  # a push goes on when nobody looks any more
            print(text, end=end, file=self.output, flush=True)


class Client:
    """A server, as the pushing side sees it."""

    def __init__(self, url, secret, ca_file=None):
        self.headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        # For example: https, [2001:db8::1]:8443, [2001:db8::1], 8443, /path
        host = r"\[[0-9A-Fa-f:.]+\]|[^\[\]/?#@:%\s]+"
        match = fullmatch(rf"((?i:https?))://(({host})(?::([1-9][0-9]*))?)(/[^?#\s]*)?", url)
        if not match or int(match[4] or 0) > 65535:
            raise CommandError(
                f"--url {url}: must be http:// or https://, HOST[:PORT][/PATH]; no user, no %zone"
            )
        scheme, self.host, name, _, path = match.groups()
        self.path = quote((path or "").rstrip("/"), safe="/%") or SYNC_PATH
        kind = http.client.HTTPConnection
        options = {"timeout": ANSWER_TIMEOUT}
        if scheme.lower() == "https":
            kind = http.client.HTTPSConnection
            try:
                options["context"] = ssl.create_default_context(cafile=ca_file)
            except OSError as error:
                raise CommandError(f"--ca-file {ca_file}: {error.strerror or error}") from None
        elif name not in ("localhost", "127.0.0.1", "[::1]"):
            say("warning: http:// to another machine sends secret and students in clear text")
        self.connect = partial(kind, self.host, **options)

    def post(self, document):
        """Send one request. A redirect is not followed: it would take the secret elsewhere."""
        body = dumps(document).encode()
        try:
            with closing(self.connect()) as connection:
                connection.connect()
                # If the server refuses us while we still send, sending fails. But its answer is
                # there, and we can read it.
                with suppress(ConnectionError, ssl.SSLEOFError):
                    connection.request("POST", self.path, body, self.headers)
                response = connection.getresponse()
                text = response.read(MAX_ANSWER)
        except (OSError, ValueError, http.client.HTTPException) as error:
            stop_if_final(self.host, error)
            return Answer(0, {"error": f"no answer from {self.host}", "detail": str(error)})
        try:
            answer = dict(loads(text))  # dict raises an error if it is no object
        except (TypeError, ValueError, RecursionError):
            answer = {}
        target = response.headers.get("Location")
        if target:
            answer = {"error": "redirect", "detail": f"it points to {target}: push there"}
        seconds = response.headers.get("Retry-After", "")
        if not fullmatch("[0-9]{1,9}", seconds):
            seconds = "0"
        return Answer(response.status, answer, int(seconds))


def stop_if_final(host, error):
    """Raises CommandError for a fault of the connection that only a person can mend."""
    words = ""
    if isinstance(error, ssl.SSLCertVerificationError):
        words = f"has a certificate that does not hold: {error.verify_message}"
        # "self-signed", or "self signed" in older versions of OpenSSL.
        if re.search("self.signed|issuer", error.verify_message):
            words += "; --ca-file names one to trust"
    elif isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        words = f"does not speak https at this port; does it speak http? ({error.reason})"
    # A name with an empty part, such as a..b, is a UnicodeError.
    elif isinstance(error, UnicodeError) or getattr(error, "errno", 0) == socket.EAI_NONAME:
        words = "cannot be reached by this name and port; are they spelt right?"
    if words:
        raise CommandError(f"stopped: {host} {words}")


def check_locally(document):
    """For a dry run: answer as a server without lists would, with the same functions."""
    batch = check_batch(document, ANYONE, len(document["students"]))
    details = dict.fromkeys(DETAILS, 0)
    return Answer(200, {"details": details, "errors": batch.errors, "ignored": batch.ignored})


# ---------------------------------------------------------------------------------------------
# Roster files: CSV as it is found, OneRoster's users.csv, JSON
# ---------------------------------------------------------------------------------------------

# Files come from spreadsheets, databases and scripts, and these write a value in their own way. To
# keep the number 007, for example, a spreadsheet writes ="007" or '007, or it has made 7.0 of it. A
# database writes NULL for an empty value. Taken as it is, '007 would be another student than 007,
# and nobody would notice. So we take such a wrapping off if we can be sure, and refuse the line if
# not.

# The columns of OneRoster 1.1 and 1.2 (1EdTech), users.csv. sourcedId is always there;
# `--map student_id_ext=identifier` takes the number that people read.
ONEROSTER = {
    "student_id_ext": "sourcedId",
    "email": "email",
    "first_name": "givenName",
    "last_name": "familyName",
}
TRUE_WORDS = r"true|yes|y|t|1(\.0)?"
FALSE_WORDS = r"false|no|n|f|0(\.0)?"
MAX_CELL_LINES = 10  # a cell with more lines comes from a quote that somebody forgot to close
MAX_CELL = 10_000  # characters


class Wrapping(NamedTuple):
    """What a program has put around a value."""

    words: str
    pattern: str  # group 1 is what stays
    certain: bool = False  # one cell is enough to be sure; otherwise every cell must have it
    only_keys: bool = False  # only of ids and e-mails; a family name may begin so: 's-Gravenhage


# Characters that nobody sees (Unicode's Default_Ignorable_Code_Point).
INVISIBLE = (
    "\x80-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"
)
# The empty group () says that nothing stays. Excel writes #N/A (in German #NV), #REF! or
# #NAME?, and #### where a column is too narrow.
WRAPPINGS = (
    Wrapping("an invisible character", f"()[{INVISIBLE}]+", certain=True, only_keys=True),
    Wrapping(
        "NULL or #N/A", r"^()(?:NULL|\(null\)|\\N|#N/A|#NV|#[A-Z0/]+[!?]|###+)\Z", certain=True
    ),
    Wrapping("no value", r"(?i)^()(?:null|none|nan|n/a|<na>)\Z", certain=True, only_keys=True),
    Wrapping('="..."', r'(?s)^="(.*)"\Z', certain=True),
    Wrapping('"..."', r'(?s)^["“„](.*)["”“]\Z', only_keys=True),
    Wrapping("'...'", r"(?s)^'(.*)'\Z"),
    Wrapping("a leading apostrophe", r"(?s)^'(.*[^'])\Z", only_keys=True),
    Wrapping("a trailing .0", r"^([0-9]+)[.,]0+\Z", only_keys=True),
)


class RosterFile:
    """What a file holds."""

    unit = "line"  # what the numbers below count; in JSON it is "item"

    def __init__(self, path):
        self.path = path
        self.rows = []  # pairs: number, student
        self.faults = {}  # by number: what is wrong there


def read_roster(arguments):
    """Read the file of `push`; "-" is standard input. Raises OSError, CommandError."""
    path = arguments.file
    file = RosterFile(path)
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    # JSON begins with { or with [ and a value, perhaps behind a byte order mark. (The header of a
    # CSV may begin with a bracket, too: [student_id_ext],[email].)
    if re.match(rb'[\xef\xbb\xbf\s]*(\{|\[\s*([]{["0-9-]|null|true|false))', data):
        read_json(file, data, arguments)
    else:
        read_csv(file, data, arguments)
    # A server finds a duplicate in one page. We find it in the whole file.
    seen = set()
    for number, student in file.rows:
        key = student.get(KEY.name) if isinstance(student, dict) else None
        if key and isinstance(key, str):
            if key in seen:
                file.faults[number] = f"duplicate_student: the same {KEY.name} stood higher up"
            seen.add(key)
    file.rows = [row for row in file.rows if row[0] not in file.faults]
    return file


def read_json(file, data, arguments):
    """Read an array of students, or a request body."""
    if arguments.map:
        raise CommandError(f"{file.path}: is JSON, and --map is for CSV")
    try:
        document = parse_json(bytearray(data))
    except Refusal as refusal:
        raise CommandError(f"{file.path}: {refusal}") from None
    students = document
    if isinstance(document, dict):
        students = document.get("students")
        cohort = document.get("cohort_id", arguments.cohort)
        if cohort != arguments.cohort:
            raise CommandError(f"{file.path}: its cohort_id is {cohort!r}, not that of --cohort")
    if isinstance(students, dict):  # PowerShell writes {"value": [...], "Count": 2}
        students = students.get("value")
    if not isinstance(students, list):
        raise CommandError(f"{file.path}: must be an array of students, or have one in students")
    file.unit = "item"
    file.rows = list(enumerate(students, 1))


def read_csv(file, data, arguments):
    """Read a CSV, or a OneRoster users.csv, of which only the students are taken."""
    header, records = read_table(file, data, arguments.encoding)
    mapping = dict(pair.split("=", 1) for pair in arguments.map or ())
    is_oneroster = {"sourcedid", "givenname", "familyname"} <= set(map(folded, header))
    if is_oneroster:
        mapping = {**ONEROSTER, **mapping}
    columns = find_columns(file, header, mapping)
    keys = {columns[field.name]: field.name for field in FIELDS if field.required}
    unwrap(file, records, {**keys, "sourcedid": "sourcedId"})
    if is_oneroster:
        records = only_students(file, records)
    for line, record in records:
        if line in file.faults:
            continue  # `unwrap` has found one
        try:
            file.rows.append((line, student_of(record, columns)))
        except ValueError as fault:
            file.faults[line] = str(fault)


def read_table(file, data, encoding):
    """Read a CSV. Return its header, and its records as pairs: the line, and a dict of the cells.
    The dict has them by the folded name of their column. Cells beyond the header have the name "".

    We read strictly. Otherwise a stray quote would take everything up to the next quote into its
    cell, perhaps a whole roster, without a word."""
    # The csv module of Python 3.10 refuses the whole file if there is a NUL in it. We want a fault
    # of one row, so we put U+0001 in its place, and change it back below. Both are refused later.
    text = decoded(file, data, encoding).replace("\0", "\x01")
    lines = io.StringIO(text, newline="").readlines()
    candidates = ",;\t|"
    special = re.match(r'sep=([^"\s])\s|#TYPE ', text)  # what Excel and PowerShell write in front
    if special:
        candidates = special[1] or candidates
        lines[0] = "\n"
    # The delimiter is what stands most often in the first line with text, outside of quotes.
    first_line = next(filter(str.strip, lines), "")
    unquoted = re.sub(r'"[^"]*"', "", first_line)
    delimiter = max(candidates, key=unquoted.count)
    csv.field_size_limit(len(text) + 1)
    parser = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    table = []
    line = 1
    try:
        for cells in parser:
            if max((len(cell.splitlines()) for cell in cells), default=0) > MAX_CELL_LINES:
                raise csv.Error(f"a cell of over {MAX_CELL_LINES} lines")
            cells = [cell.strip(WHITE_SPACE).replace("\x01", "\0") for cell in cells]
            while cells and not cells[-1]:  # Excel adds empty cells, or leaves them out
                cells.pop()
            if cells:
                table.append((line, cells))
            line = parser.line_num + 1
    except csv.Error as error:
        words = f"line {line}: {error}: is there a quote too many, or one too few?"
        raise CommandError(f"{file.path}: {words}{looks_like(data)}") from None
    if not table:
        raise CommandError(f"{file.path}: is empty; it must begin with a header")
    _, header = table.pop(0)
    names = [folded(cell) or "no name" for cell in header]
    # Missing cells are empty. Cells too many have the name "", which `student_of` reports.
    records = [
        (line, dict(itertools.zip_longest(names, cells, fillvalue=""))) for line, cells in table
    ]
    return header, records


def decoded(file, data, stated):
    """The text of a file: in the stated encoding, else UTF-8, else Windows-1252 with a warning."""
    kind = looks_like(data)
    if kind:
        raise CommandError(f"{file.path}{kind}")
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("cp1252" if stated == "cp1252" else "utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    # If some characters beyond ASCII are right UTF-8, the file is not Windows-1252 as a whole.
    without_wrong_bytes = data.decode("utf-8", "ignore")
    if stated or not without_wrong_bytes.isascii():
        raise CommandError(
            f"{file.path}: line {line} is not {stated or 'UTF-8, but others are'}: "
            "mend it, or say what it is with --encoding"
        )
    log.warning("warning: not UTF-8, so read as Windows-1252: see that names come out right")
    return decoded(file, data, "cp1252")


def folded(name):
    """A name of a column without what may differ: "Student ID (ext)", "student-id-ext" and
    "StudentIdExt" become "studentidext"."""
    return re.sub(r"[\W_]+", "", name.casefold()) or name


def find_columns(file, header, mapping):
    """Find the folded header of each field that has a column. Raises CommandError."""
    names = list(map(folded, header))
    columns = {}
    faults = []
    for field in FIELDS:
        wanted = mapping.get(field.name, field.name)
        count = names.count(folded(wanted))
        if count == 1:
            columns[field.name] = folded(wanted)
        elif count or field.name in mapping or field.required:
            faults.append(f"{file.path}: must have one column {wanted!r}, and has {count}")
        else:
            log.info(f"no column for {field.name}: it will be null for every student")
    if faults:
        raise CommandError(
            *faults,
            f"{file.path}: the columns of its header: {' | '.join(header)}",
            "if a column has another name, say so with --map FIELD=HEADER",
            "if each line as a whole is in quotes, take them off",
        )
    unused = [repr(cell) for cell in header if folded(cell) not in columns.values()]
    if unused:
        log.info(f"columns not used: {len(unused)}: {', '.join(unused)}")
    return columns


def unwrap(file, records, keys):
    """Take the wrappings off, if that is certain. If it is not, a line with a wrapped key is at
    fault. `keys` are the columns of ids and e-mails, and the names to show for them."""
    columns = set(records[0][1]) - {""} if records else ()
    # For each column each wrapping, and all of them twice, as one may be within another: '="007"
    for name, wrapping in itertools.product(sorted(columns), WRAPPINGS * 2):
        if name in keys or not wrapping.only_keys:
            filled = [pair for pair in records if pair[1][name]]
            wrapped = [pair for pair in filled if re.search(wrapping.pattern, pair[1][name])]
            certain = wrapping.certain or len(wrapped) == len(filled)
            for line, record in wrapped:
                if certain:
                    text = re.sub(wrapping.pattern, r"\1", record[name])
                    record[name] = text.strip(WHITE_SPACE)
                elif name in keys:
                    words = f"{keys[name]} has {wrapping.words}, but not in every line"
                    file.faults[line] = f"wrapped_value: {words}"


def student_of(record, columns):
    """Make a student of a record. Raises ValueError for faults that only the file shows."""
    if "" in record:
        raise ValueError("wrong_columns: more columns than the header has")
    # What Excel (1.2E+10) and Java (1.2E10) make of a long number: its last digits are lost.
    scientific = r"[0-9]([.,][0-9]+)?[Ee]\+[0-9]{2,}|[0-9][.,][0-9]+[Ee][0-9]+"
    if fullmatch(scientific, record[columns[KEY.name]]):
        raise ValueError(
            f"scientific_notation: {KEY.name} is a number as a spreadsheet shortens "
            "it: format the column as text, export again"
        )
    student = {}
    for field in FIELDS:
        if field.name in columns:
            text = record[columns[field.name]]
            if len(text) > MAX_CELL:
                raise ValueError(f"invalid_field: {field.name} has {len(text):,} characters")
            student[field.name] = value_of(field, text)
    return student


def value_of(field, text):
    """The value that a text stands for. Raises ValueError."""
    word = text.casefold()
    if field.kind is str:
        return text
    if not text:
        return None
    if field.kind is int:
        if fullmatch(r"-?[0-9]{1,19}(\.0+)?", text):
            return int(text.partition(".")[0])
        raise ValueError(f"invalid_field: {field.name} must be empty or a whole number")
    if fullmatch(TRUE_WORDS, word):
        return True
    if fullmatch(FALSE_WORDS, word):
        return False
    words = "true, yes, y, t, 1, false, no, n, f, 0"
    raise ValueError(f"invalid_field: {field.name} must be empty or one of {words}")


def only_students(file, users):
    """The users of OneRoster who are students today. If users.csv has no role for a user, roles.csv
    in the same folder has it (OneRoster 1.2)."""
    reasons = None  # or from roles.csv, by sourcedId: why to leave out a user; "" for a student
    for path in Path(file.path).absolute().parent.iterdir():
        if path.name.lower() == "roles.csv":
            reasons = {}
            roles_file = RosterFile(str(path))
            _, roles = read_table(roles_file, path.read_bytes(), "")
            unwrap(roles_file, roles, {"usersourcedid": "userSourcedId"})
            for _, role in roles:
                user_id = role.get("usersourcedid", "").casefold()
                if reasons.get(user_id) != "":  # one role as a student is enough
                    reasons[user_id] = reason_to_leave_out(role)
    taken = []
    left_out = []
    for line, user in users:
        reason = reason_to_leave_out(user)
        if not user.get("role") and reasons is not None:
            reason = reason or reasons.get(user["sourcedid"].casefold(), "no role in roles.csv")
        if reason:
            left_out.append(reason)
            file.faults.pop(line, None)  # who is left out need not be reported
        else:
            taken.append((line, user))
    if reasons is None and not all(user.get("role") for _, user in users):
        log.info("no roles: everybody is taken for a student; put roles.csv beside it")
    for reason in sorted(set(left_out)):
        log.info(f"rows left out: {left_out.count(reason):,}: {reason}")
    return taken


def reason_to_leave_out(record):
    """Why this user or role of OneRoster is no student today, or "" for one who is."""
    names = ("status", "enableduser", "role", "begindate", "enddate")
    status, enabled, role, begin, end = [record.get(name, "").casefold() for name in names]
    if status not in ("", "active"):
        return f"status is {status}"
    if enabled and not fullmatch(TRUE_WORDS, enabled):
        return f"enabledUser is {enabled}"
    if role not in ("", "student"):
        return "not a student"
    today = strftime("%Y-%m-%d")
    for date in (begin or today, end or today):
        if not fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}.*", date):
            return "a date is not YYYY-MM-DD"
    if begin[:10] > today or today > (end or today):  # as texts, dates of this form are in order
        return "not a student today"
    return ""


# ---------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------


def printable(text):
    """Text from elsewhere, without what controls a terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def say(*lines):
    """Tell a person something. Standard output is for data."""
    with suppress(OSError):
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)


def command_secret(arguments):
    """Print a new secret and its line for sis_sync.ini, or with --hash the line alone."""
    if arguments.hash:
        secret = check_secret("standard input", sys.stdin.buffer.readline())
    else:
        secret = b"sis_" + token_urlsafe(32).encode()
        print(secret.decode())
        say("line 1: for whoever pushes; it is not saved. line 2: paste it into sis_sync.ini")
    print(f"sha256:{sha256(secret).hexdigest()}")
    return 0


def command_check(arguments):
    """Say all that is wrong, as a start would: this is a start that ends before it serves. (While
    the server runs, one thing is wrong: the port is in use.)"""
    log.handlers.clear()  # without a handler, Python shows warnings on stderr, and nothing else
    try:
        server = set_up(arguments, rehearsal=True)
        server.server_close()
        look_for_damage(server.service.database.path)
    except CommandError as error:
        print(*error.args, sep="\n")
        return 1
    print(f"{server.service.config.file or 'defaults'}: good")
    return 0


def look_for_damage(path):
    """Raises CommandError if SQLite finds something wrong within a database, if there is one."""
    if os.path.exists(path):
        with read_only(path, oldest=0) as connection:
            lines = [line for (line,) in connection.execute("PRAGMA quick_check")]
        if lines != ["ok"]:
            raise CommandError(*(f"{path}: damaged: {line}" for line in lines))


def command_push(arguments):
    """Send a file to a server, as the roster of one cohort."""
    if not arguments.cohort:
        raise CommandError("push needs --cohort ID")
    output = sys.stderr
    if arguments.quiet:
        output = io.StringIO()
    else:
        log.handlers[:] = [logging.StreamHandler()]  # what the steps below notice
    file = read_roster(arguments)
    if not file.rows and not file.faults:
        say(f"{file.path}: no students, so nothing is sent")
        return 1
    post = check_locally
    if not arguments.dry_run:
        if not arguments.url:
            raise CommandError("push needs --url URL, or --dry-run")
        source = f"file:{arguments.secret_file}" if arguments.secret_file else "env:SIS_SYNC_SECRET"
        secret = read_secret(source, Path()).decode("latin-1")
        post = Client(arguments.url, secret, arguments.ca_file).post
    push = Push(post, arguments.cohort, file.rows, output)
    push.rejected.update(file.faults)
    status = 0
    try:
        push.run(arguments.batch or 5000)
    except (CommandError, Refusal, RecursionError) as error:
        # A Refusal is of a bad --cohort in a dry run, a RecursionError of JSON nested very deep.
        say(f"sis_sync: {error}")
        status = 2
    except KeyboardInterrupt:
        status = 130
    report(push, file.unit, arguments)
    return status or (1 if push.rejected else 0)


def report(push, unit, arguments):
    """The end of a push: the counts, every rejected row with its line, and what to do next."""
    lines = [f"  {unit} {number}: {fault}" for number, fault in sorted(push.rejected.items())]
    if not arguments.quiet:
        new, updated, unchanged = push.counts.values()
        counts = f"new {new:,}, updated {updated:,} (of these unchanged {unchanged:,}), "
        verb = "sent"
        if arguments.dry_run:
            verb, counts = "checked", ""
        head = f"cohort {push.cohort_id}: {push.done:,} of {len(push.rows):,} students {verb}"
        lines = [head, f"  {counts}rejected {len(lines):,}", *lines]
        if push.ignored:
            lines.append(f"  ignored, as they are no fields: {', '.join(sorted(push.ignored))}")
        lines.append("Running the same push again is safe, however often.")
    for line in lines:
        print(printable(line))


def command_export(arguments):
    """Write the roster of one cohort as CSV, the way push takes it back."""
    with read_only(load_configuration(arguments).database) as connection:
        roster = choose_roster(connection, arguments)
        last_sync = INTEGERS[-1]  # larger than any
        since = arguments.not_seen_since
        if since is not None:
            last_time, last_sync = leavers(connection, roster, since)
            if last_time < since:
                say(f"nobody is listed: nothing has come for this cohort since {utc(last_time)}")
                return 1
        rows = connection.execute(
            f"SELECT {quoted(NAMES)} FROM entries WHERE roster_id = ? AND seen_in <= ? "
            f'ORDER BY "{KEY.name}"',
            (roster["roster_id"], last_sync),
        )
        if arguments.output:
            with new_file(arguments.output) as file:
                write_csv(file, rows, arguments.excel)
        else:
            write_csv(sys.stdout, rows, arguments.excel)
    return 0


def choose_roster(connection, arguments):
    """The only roster that fits the options. Raises CommandError with the choice. (An option that
    is not given is NULL. Then SQL compares a column with itself, which is true.)"""
    rosters = connection.execute(
        "SELECT * FROM rosters WHERE institution = coalesce(:institution, institution) "
        "AND cohort_id = coalesce(:cohort, cohort_id)",
        vars(arguments),
    ).fetchall()
    if len(rosters) == 1:
        return rosters[0]
    lines = ["choose one of these rosters (none: nothing has been pushed yet):"]
    for institution, cohort in connection.execute("SELECT institution, cohort_id FROM rosters"):
        lines.append(f"  --institution {institution} --cohort {cohort}")
    raise CommandError(*lines)


def leavers(connection, roster, since):
    """Find out who has left. Return the time of this cohort's last sync, and the number of a sync:
    who was last named by that one, or by an earlier one, has left. If nobody has, the number is
    None, and in SQL nothing is smaller than that.

    The roster is sent again and again, perhaps in pages. If somebody of a sync has been named
    again, a new round has come to that sync. Then whoever still has the number of that sync, or of
    an earlier one, was left out by the new round. For example, in two pages, and without U1 the
    second time:

        sync                        1         2         3         4
        it named                    U1 U2     U3 U4     U2 U3     U4
        last named by it are        U1        nobody    U2 U3     U4

    Of sync 1, U2 has been named again, and U1 has not. So U1 has left. Of syncs 3 and 4 nobody has
    been named again yet, so nobody of them is listed. Of the newest sync that is always so.

    If clocks were always right, the times would tell as much. But they are not, so the date that
    the user gives is only a second condition: the sync must also be from before that date."""
    return connection.execute(
        """
SELECT
    -- the time of the last sync
    coalesce((SELECT time FROM syncs
         WHERE institution = :institution AND cohort_id = :cohort_id
         ORDER BY sync_id DESC LIMIT 1), 0),
    min(  -- of two numbers; if one of them is NULL, this is NULL
        -- the last sync before the date
        (SELECT max(sync_id) FROM syncs
         WHERE institution = :institution AND cohort_id = :cohort_id AND time < :since),
        -- The newest sync of which some, but not all, were named again. It named new + updated.
        -- Of these, still + forgotten were not named again: somebody (1 or more), but not all.
        (SELECT max(sync_id) FROM syncs LEFT JOIN (
             SELECT seen_in AS sync_id, count(*) AS still FROM entries
             WHERE roster_id = :roster_id GROUP BY seen_in) USING (sync_id)
         WHERE institution = :institution AND cohort_id = :cohort_id
             AND ifnull(still, 0) + forgotten BETWEEN 1 AND new + updated - 1))""",
        {**dict(roster), "since": since},
    ).fetchone()


# A spreadsheet runs a cell that begins with one of these (CWE-1236).
FORMULA = tuple("=+-@＝＋－＠")


def write_csv(file, rows, for_excel):
    writer = csv.writer(file)
    if for_excel:
        file.write("\ufeff")  # without this mark, Excel does not know that the file is UTF-8
    writer.writerow(NAMES)
    for row in rows:
        cells = []
        for field, value in zip(FIELDS, row):
            if field.kind is bool:
                value = {1: "true", 0: "false"}.get(value)
            elif for_excel and field.kind is str and str(value).startswith(FORMULA):
                value = f"'{value}"
            cells.append(value)
        writer.writerow(cells)  # None as an empty cell


def new_file(path):
    """A new file that only its owner can read. It must not exist."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    return open(path, "w", encoding="utf-8", newline="")


def utc(seconds):
    return strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(seconds))


def command_history(arguments):
    """List the latest syncs, or with --stale the institutions that have gone quiet."""
    config = load_configuration(arguments)
    with read_only(config.database) as connection:
        if arguments.stale is not None:
            return stale(connection, config.institutions, arguments.stale)
        limit = 20 if arguments.since is None else -1  # -1 means no limit
        rows = connection.execute(
            "SELECT * FROM history WHERE time >= ? ORDER BY sync_id DESC LIMIT ?",
            (utc(arguments.since or 0), arguments.last or limit),
        ).fetchall()
    syncs = [{**dict(row), "errors": loads(row["errors"])} for row in rows]
    if arguments.json:
        print(dumps(syncs))
    else:
        print_history(syncs, arguments.errors)
    return 0


def print_history(syncs, with_errors):
    """A table of 80 columns. (Its times have no year; --json has all there is.)"""
    print("time        institution cohort   received   new updated unchanged rejected    ms")
    for sync in syncs:
        print(
            f"{sync['time'][5:16].replace('T', ' ')} {fitted(sync['institution'], 11)} "
            f"{fitted(sync['cohort_id'], 8)} {sync['received']:>8} {sync['new']:>5} "
            f"{sync['updated']:>7} {sync['unchanged']:>9} {sync['rejected']:>8} "
            f"{sync['milliseconds']:>5}"
        )
        if with_errors:
            for error in sync["errors"]:
                print(printable(f"    row {error['row']}: {error['error']}: {error['message']}"))


def fitted(text, width):
    """The text in just this width. If it is longer, its middle is cut out."""
    text = printable(text)
    if len(text) > width:
        half = width // 2
        text = f"{text[: width - half - 1]}…{text[-half:]}"
    return text.ljust(width)


def stale(connection, institutions, hours):
    """Print the institutions whose last sync is older than so many hours. Return 1 if there are."""
    # In order of arrival, so that a clock that was wrong once hides nobody. The dict keeps the last
    # time of each institution. A time in the future is as suspicious as an old one, so we use abs.
    last = dict(connection.execute("SELECT institution, time FROM syncs ORDER BY sync_id"))
    now = time.time()
    status = 0
    for institution in institutions:
        moment = last.get(institution.name)
        if moment is None or abs(now - moment) > 3600 * hours:
            print(f"{institution.name}: last sync {utc(moment) if moment else 'never'}")
            status = 1
    return status


def command_backup(arguments):
    """Copy the database as it is at one moment, while the server goes on."""
    with read_only(load_configuration(arguments).database, oldest=0) as source:
        new_file(arguments.file).close()
        try:
            with closing(sqlite3.connect(arguments.file)) as target:
                source.backup(target)
        except BaseException:
            os.remove(arguments.file)  # half a copy must not pass for one
            raise
    look_for_damage(arguments.file)
    if sys.stdout.isatty():  # cron mails whatever is printed
        say(f"{arguments.file}: good")
    return 0


# The entries that the options of `forget` choose. :keys is one text with a line end around each
# key, which no key can hold. So we can look whether that text contains the key of an entry.
CHOSEN = f"""
FROM entries JOIN rosters USING (roster_id)
WHERE institution = :institution AND cohort_id = coalesce(:cohort, cohort_id)
AND (:keys IS NULL OR instr(:keys, char(10) || "{KEY.name}" || char(10)))"""


def command_forget(arguments):
    """Erase students from the database: all of an institution, or of a cohort, or some."""
    if not arguments.institution:
        raise CommandError("forget needs --institution NAME")
    keys = "\n".join(["", *arguments.student, ""]) if arguments.student else None
    values = {**vars(arguments), "keys": keys}
    database = load_configuration(arguments).database
    with read_only(database) as connection:
        cohorts = connection.execute(
            f"SELECT cohort_id, count(*) {CHOSEN} GROUP BY cohort_id", values
        ).fetchall()
    for cohort, number in cohorts:
        print(printable(f"cohort {cohort}: {number:,}"))
    if arguments.yes:
        # Also if nobody is found: it empties the WAL, if that failed before.
        erase(database, values)
    if not cohorts:
        say("nobody found")
        return 1
    say("erased" if arguments.yes else "nothing is erased yet: add --yes")
    say("not reached: backups, and the feed, whose next push brings them back")
    return 0


def erase(database, values):
    """Delete entries, so that no file of the database holds their bytes any more."""
    with closing(open_database(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        # If a sync has fewer entries than it named, `leavers` believes that the others were named
        # again. Erased ones were not, so we write down how many they are.
        lost = connection.execute(f"SELECT count(*), seen_in {CHOSEN} GROUP BY seen_in", values)
        connection.executemany(
            "UPDATE syncs SET forgotten = forgotten + ? WHERE sync_id = ?", lost.fetchall()
        )
        connection.execute(
            f"DELETE FROM entries WHERE entry_id IN (SELECT entry_id {CHOSEN})", values
        )
        connection.execute("COMMIT")
        # This writes the file anew. Without it, old values could still be there from a time before
        # this program set secure_delete.
        connection.execute("VACUUM")
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise CommandError(
            f"{database}-wal still holds them, as somebody reads it: "
            "repeat this until nobody is found"
        )


def command_demo(arguments):
    """Show the whole of it on made-up data: a throw-away server, pushes, and what goes wrong."""
    # SIGTERM shall raise KeyboardInterrupt, as Ctrl-C does, so that nothing is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    secret = f"sis_{token_urlsafe(32)}"
    os.environ["SIS_SYNC_SECRET"] = secret  # the configuration below looks for it there
    with tempfile.TemporaryDirectory(prefix="sis_sync-") as folder:
        ini = Path(folder, "sis_sync.ini")
        ini.write_text("[server]\nport = 0\n")
        server = Server(Service(load_configuration(Arguments(config=str(ini)))))
        server.start()
        try:
            print(f"A throw-away server at {server.url}, its database in {folder} till the end\n")
            demo_steps(server.url, secret)
            if not arguments.once:
                print(
                    "\nTo try it while the server runs, until you press Ctrl-C:\n"
                    f"  curl {server.url}{SYNC_PATH} -H 'Authorization: Bearer {secret}' \\\n"
                    f"    -H 'Content-Type: application/json' -d '{dumps(EXAMPLE)}'",
                    flush=True,
                )
                while True:
                    sleep(1)
        except KeyboardInterrupt:
            pass
        finally:
            server.leave()
    return 0


def demo_steps(url, secret):
    """Each step, and in the end all of them in a table."""
    example = EXAMPLE["students"][0]
    students = []
    for index in range(12_000):
        key = f"U{index * 7919 % 1_000_003}"  # all different, and in no order, as in real files
        students.append({**example, KEY.name: key, "email": f"student{index}@example.edu.au"})
    table = []
    for title in ("12,000 students in pages of 5,000", "The same again"):
        print(f"{title}:")
        push = Push(Client(url, secret).post, "2026", list(enumerate(students, 1)), sys.stdout)
        push.run(5000)
        new, updated, unchanged = push.counts.values()
        table.append((title, 200, f"{new:,} new, {updated:,} updated, {unchanged:,} unchanged"))
    # Of the last twenty some are refused, because the pushes before took tokens from the same
    # bucket. Only the last answer is shown.
    for title, token, rows, times in (
        ("A bad row, and a good one", secret, [example, {}], 1),
        ("A wrong secret", "wrong", [], 1),
        ("5,001 students at once", secret, students[:5001], 1),
        ("More than 20 requests in a minute", secret, [], 20),
    ):
        for _ in range(times):
            status, document, _ = Client(url, token).post({"cohort_id": "2026", "students": rows})
        print(f"{title}:\n  {status} {dumps(document)}")
        words = f"{document.get('imported')} imported, {len(document.get('errors', ()))} rejected"
        table.append((title, status, document.get("error", words)))
    print()
    for title, status, words in table:
        print(f"  {title:<33} {status}  {words}")


def midnight(text):
    """The beginning of a day, as the clock of this machine shows it, in seconds since 1970."""
    return time.mktime(time.strptime(text, "%Y-%m-%d"))


# What may stand behind an option, if not just any text.
FORMATS = {
    "ADDRESS": ADDRESS,
    "PORT": whole_number(0, 65535),
    "N": whole_number(1, 1_000_000),
    "DATE": Format("a date, YYYY-MM-DD", make=midnight),
    "HOURS": Format("a number of hours", r"[0-9]{1,6}(\.[0-9]{1,6})?", float),
    "FIELD=HEADER": Format(f"FIELD=HEADER, FIELD one of {NAMES}", rf"({'|'.join(NAMES)})=.+"),
    "ENCODING": Format("utf-8 or cp1252", among=("utf-8", "cp1252")),
}
# For each command its function and its options, written as --help shows them. A line has the
# option, perhaps a value (its format is in FORMATS), and after two spaces or more what it means. An
# option whose value ends in "..." can be given several times.
# fmt: off
COMMANDS = {
    "serve": (command_serve, """
        --host ADDRESS           instead of the configured one
        --port PORT              instead of the configured one; 0: any free port
    """),
    "demo": (command_demo, """
        --once                   end when all is shown
    """),
    "secret": (command_secret, """
        --hash                   make the line of a secret on standard input
    """),
    "check": (command_check, ""),
    "push": (command_push, """
        file FILE                CSV, OneRoster users.csv or JSON; -: standard input
        --url URL                of the server, such as https://sync.example.edu
        --cohort ID              the cohort_id of the roster; always needed
        --secret-file FILE       where the secret is (default: in SIS_SYNC_SECRET)
        --map FIELD=HEADER...    the column of a field
        --encoding ENCODING      of a CSV: utf-8 or cp1252 (default: found out)
        --dry-run                check every row, if not against the server's lists; send nothing
        --batch N                students in a page (default: 5000)
        --ca-file FILE           certificates to trust, in PEM
        --quiet                  print only faults and rejected rows
    """),
    "export": (command_export, """
        --institution NAME       needed if there are several
        --cohort ID              needed if there are several
        --output FILE            a new file (default: standard output)
        --not-seen-since DATE    only who has left: named by no sync since YYYY-MM-DD
        --excel                  with a mark for Excel, and no cell that a spreadsheet would run
    """),
    "history": (command_history, """
        --last N                 how many syncs (default: 20, or with --since all)
        --since DATE             only those since YYYY-MM-DD
        --errors                 with the rejected rows of each
        --json                   as JSON, with all there is
        --stale HOURS            exit 1, naming each institution that sent nothing for so long
    """),
    "backup": (command_backup, """
        file FILE                the copy; it must not exist
    """),
    "forget": (command_forget, """
        --institution NAME       always needed
        --cohort ID              only of this cohort (default: of all)
        --student ID...          only this student_id_ext (default: all)
        --yes                    erase them (default: say how many there are)
    """),
}
# fmt: on


def argument_parser():
    parser = argparse.ArgumentParser(
        description="A school's roster, pushed over HTTP, kept in SQLite. No command: serve.",
        epilog="Exit status: 0 success, 1 problems found, 2 could not run.",
    )
    parser.add_argument("--version", action="version", version=f"sis_sync {__version__}")
    words = "default: SIS_SYNC_CONFIG, or sis_sync.ini beside this file"
    parser.add_argument("--config", metavar="FILE", help=words)
    parser.set_defaults(command=command_serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    # `--port 8000 serve` and `serve --port 8000` mean the same, so both parsers know the options of
    # `serve`. argparse stores None for an option that is not given. So the second parser would
    # overwrite what the first has read. SUPPRESS means: store nothing.
    absent = argparse.SUPPRESS
    for name, (function, options) in COMMANDS.items():
        words = function.__doc__ or ""
        command = commands.add_parser(name, help=words, description=words, epilog=parser.epilog)
        command.set_defaults(command=function)
        # The pattern (?!) matches nothing. So any value is refused, with "must be before the
        # command".
        too_late = Format("before the command", "(?!)")
        command.add_argument("--config", type=too_late, default=absent, help=argparse.SUPPRESS)
        add_options(command, options, absent if name == "serve" else None)
    add_options(parser, COMMANDS["serve"][1], absent)  # as `serve` may be left out
    return parser


def add_options(parser, lines, default):
    for line in lines.strip().splitlines():
        option, words = re.split("  +", line.strip())
        name, _, value = option.partition(" ")
        how = {"help": words, "action": "store_true", "default": default}
        if value:
            metavar = value.rstrip(".")
            how.update(metavar=metavar, type=FORMATS.get(metavar, str))
            how["action"] = "store" if metavar == value else "append"
        parser.add_argument(name, **how)


def main(words=None):
    """The command line. Returns the exit status."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if not stream:  # whoever started us has closed it
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        elif name != "stdin":
            # UTF-8 on Windows, too; and line ends as the csv module writes them.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="")
    log.handlers[:] = [logging.NullHandler()]  # a command that needs a log says where
    try:
        arguments = argument_parser().parse_args(words)
        status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except (CommandError, sqlite3.Error) as error:
        say(*(f"sis_sync: {line}" for line in error.args))
    except UnicodeError as error:  # in an argument, bytes that are not UTF-8
        say(f"sis_sync: {error}")
    except OSError as error:
        # If whoever read our output has gone (`| head`), Python would fail once more when it ends
        # and writes what is left. So it shall write that to nowhere.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A closed pipe is EPIPE, or on Windows EINVAL, and the error then names no file.
        if error.filename or error.errno not in (errno.EPIPE, errno.EINVAL):
            file = f"{error.filename}: " if error.filename else ""
            say(f"sis_sync: {file}{error.strerror or error}")
    return 2


if __name__ == "__main__":
    sys.exit(main())

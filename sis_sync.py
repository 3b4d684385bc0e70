#!/usr/bin/env python3
"""sis_sync: a school's roster, pushed over HTTP and kept in SQLite. One file, only Python.

A student information system (SIS) pushes its students; the server proves who is calling, checks
every row and keeps the good ones, so that the same push can be repeated for ever without harm.

    $ export SIS_SYNC_SECRET=$(python3 sis_sync.py secret | head -n 1)
    $ python3 sis_sync.py &
    $ curl http://127.0.0.1:8080/api/sis/sync -H "Authorization: Bearer $SIS_SYNC_SECRET" \\
        -d '{"cohort_id": "2026", "students": [{"student_id_ext": "U1", "email": "a@b.edu"}]}' \\
        -H "Content-Type: application/json"
    {"received": 1, "imported": 1, "details": {"imported": 1, "updated": 0, "unchanged": 0}, ...}

Limits, each a setting: 5,000 students and 8 MiB a request, 20 requests a minute, 256 connections.
The server comes first, in the order of its work; its tools begin at the banner "The pushing side".
"""

from __future__ import annotations  # sis_sync needs Python 3.9 or newer

import argparse
import collections
import configparser
import contextlib
import csv
import ctypes
import difflib
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pathlib
import queue
import random
import re
import secrets
import signal
import socket
import socketserver
import sqlite3
import ssl
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

if sys.version_info < (3, 9) or sqlite3.sqlite_version_info < (3, 24):  # 3.7 comes to here
    print("sis_sync: needs Python 3.9 or newer and SQLite 3.24 or newer; this is",
          sys.version.split()[0], "with", sqlite3.sqlite_version, file=sys.stderr)
    sys.exit(2)

__version__ = "2.0.0"
log = logging.getLogger("sis_sync")
log.setLevel(logging.INFO)
Headers = tuple[tuple[str, str], ...]
Document = Mapping[str, object]


# ---------------------------------------------------------------------------------------------
# The contract as data: fields, errors, settings. Everything below follows from these tables.
# ---------------------------------------------------------------------------------------------

# Unicode's White_Space beyond ASCII, within a character class (every language has its own \s); and
# what is stripped: str.strip() would also take U+001C to U+001F, which are control characters.
WIDE_SPACE = r"\x85\xa0" "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
WHITE_SPACE = "".join(filter(str.isspace, map(chr, (*range(9, 14), *range(32, 0x3001)))))
# Half of a surrogate pair passes JSON, and then SQLite can't store it: the batch would sink.
SURROGATES = "\ud800-\udfff"
FORBIDDEN = rf"[\x00-\x1f\x7f{SURROGATES}]"
VISIBLE = rf"[^\x00-\x20\x7f{WIDE_SPACE}{SURROGATES}]"
# The whole rule of a string but its length, after stripping: letters, and white space between.
TEXT = f"{VISIBLE}+(?:[ {WIDE_SPACE}]+{VISIBLE}+)*"
# RFC 5322 allows far more than a school uses; this is one address, and can't be taken for two.
EMAIL = "{0}+@{0}+".format(VISIBLE.replace("^", "^@"))


class Field(NamedTuple):
    """A field of the request: its rule, its column, its schema and its CSV header in one line."""

    name: str
    meaning: str
    example: object = None
    kind: type[Any] = str           # or bool, or list
    required: bool = False
    longest: int = 255              # characters, after stripping; RFC 5321 has 254 of an address
    pattern: str = TEXT
    listed: str = ""                # in LISTS, if a value must be in that list of the institution


COHORT = Field("cohort_id", "the roster", "2026", required=True, longest=64, listed="cohorts")
STUDENTS = Field("students", "the students on it", kind=list, required=True)
# The first field is the one that an entry is known by: it is unique in a batch.
FIELDS = (
    Field("student_id_ext", "the student's number in the SIS", "U2025001", required=True),
    Field("email", "an e-mail address: something, one @, something, no white space",
          "alex.connor@student.example.edu.au", required=True, longest=254, pattern=EMAIL),
    Field("first_name", "given name", "Alex"),
    Field("last_name", "family name", "Connor"),
    Field("program_code", "the program of study", "BUSI", listed="programs"),
    Field("campus_name", "the campus", "Sunshine Coast", listed="campuses"),
    Field("first_in_family", "first of the family to study", False, kind=bool),
)
KEY = FIELDS[0]
NAMES = tuple(field.name for field in FIELDS)
LISTS = {"cohorts": "unknown_cohort", "programs": "unknown_program", "campuses": "unknown_campus"}
ROW_ERRORS = ("missing_field", "invalid_field", "duplicate_student", "not_an_object",
              "unknown_program", "unknown_campus")


class Error(NamedTuple):
    """An error of a whole request, as its answer and the OpenAPI document tell it."""

    status: int
    code: str                       # stable: what a client switches on
    only: str                       # the one route, by its function, that answers it; "": all
    meaning: str
    carries: tuple[str, ...] = ()   # what the answer holds besides error and detail
    headers: tuple[str, ...] = ()   # what it has besides those of every answer


ERRORS = (                          # in order of status, as the OpenAPI document groups them
    Error(400, "malformed_request", "", "the request is not HTTP as RFC 9112 has it"),
    Error(400, "malformed_json", "sync", "the body is not JSON in UTF-8"),
    Error(400, "missing_field", "sync", "cohort_id or students is absent or blank", ("field",)),
    Error(400, "invalid_field", "sync", "body, cohort_id or students break a rule", ("field",)),
    Error(400, "unknown_cohort", "sync", "cohort_id is not in the institution's list", ("field",)),
    Error(400, "invalid_rows", "sync", "rows have faults and bad_rows is reject", ("errors",)),
    Error(401, "unauthorized", "sync", "no valid secret; send the header Authorization: Bearer "
          "<institution secret>", (), ("WWW-Authenticate",)),
    Error(404, "not_found", "", "there is nothing at this path"),
    Error(405, "method_not_allowed", "", "the path takes another method", (), ("Allow",)),
    Error(408, "request_timeout", "", "the request did not arrive in time"),
    Error(413, "batch_too_large", "sync", "too many students: send smaller batches", ("max",)),
    Error(413, "batch_too_large", "sync", "too many bytes", ("max", "max_bytes")),  # for OpenAPI
    Error(414, "request_too_large", "", "the request line is too long"),
    Error(415, "unsupported_media_type", "sync", "Content-Type must be application/json, in utf-8; "
          "Content-Encoding gzip or identity", (), ("Accept", "Accept-Encoding")),
    Error(429, "rate_limited", "sync", "too many requests", ("retry_after",), ("Retry-After",)),
    Error(431, "request_too_large", "", "the headers are too long"),
    Error(500, "server_error", "", "a fault of the server, told in its log", ("request_id",)),
    Error(501, "not_implemented", "", "the method or the transfer coding is unknown"),
    Error(503, "not_configured", "sync", "no institution has a secret set"),
    Error(503, "busy", "", "the server is busy: try again", ("retry_after",), ("Retry-After",)),
    Error(503, "unhealthy", "health", "the database does not answer"),
    Error(505, "http_version_not_supported", "", "only HTTP/1.0 and HTTP/1.1 are spoken"),
)


def reader(allowed: str, convert: Callable[[str], Any] = str, pattern: str = "(?s).*",
           shown: bool = True) -> Callable[[str], Any]:
    """A function that reads such a text, or raises argparse.ArgumentTypeError and says why."""
    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):       # of convert
            if re.fullmatch(pattern, text):
                return convert(text)
        found = repr(text[:60]) if shown else "something else"
        raise argparse.ArgumentTypeError(f"found {found}; must be {allowed}")
    return read


def whole_number(low: int, high: int) -> Callable[[str], Any]:
    # int() alone would take '+5', '5_000' and Arabic digits; index() refuses what is not within.
    return reader(f"a whole number from {low} to {high}",
                  lambda text: low + range(low, high + 1).index(int(text)), "[0-9]{1,12}")


ADDRESS = reader("an IP address, as no name is looked up",
                 lambda text: str(ipaddress.ip_address(text)))
FILE_OR_NONE = reader("the path of a file, or nothing", str, r"[^\x00-\x1f\x7f]*")
NETWORKS = reader("addresses, or networks without host bits set, such as 10.0.0.0/8, or nothing",
                  lambda text: tuple(map(ipaddress.ip_network, text.replace(",", " ").split())))
# configparser takes an indented line, and so an indented key, for more of the value above it.
VALUES = reader("values with commas or line ends between, or nothing for any",
                lambda text: frozenset(filter(None, map(str.strip, re.split("[,\n]", text)))),
                r"(?s)(?!(.*[,\n])?\s*[a-z_]+[ \t]*=).*")
SOURCE = r"(env:[A-Za-z_][A-Za-z0-9_]*|file:[^\s\0]+|sha256:[0-9A-Fa-f]{64})"
SECRETS = reader("env:NAME, file:PATH and sha256: with 64 hex digits, white space between them, "
                 "never the secret itself", str.split, rf"({SOURCE}(\s+{SOURCE})*)?", shown=False)

# Section, key, default, and how it is read. sis_sync.ini has the words on each.
SETTINGS = (
    ("server", "host", "127.0.0.1", ADDRESS),
    ("server", "port", "8080", whole_number(0, 65535)),
    ("server", "database", "sis_sync.db", reader("the path of a file", str, r"[^\x00-\x1f\x7f]+")),
    ("server", "tls_certificate", "", FILE_OR_NONE),
    ("server", "tls_key", "", FILE_OR_NONE),
    ("server", "trusted_proxies", "", NETWORKS),
    ("limits", "requests_per_minute", "20", whole_number(1, 100_000)),
    ("limits", "max_students", "5000", whole_number(1, 100_000)),
    ("limits", "max_body_bytes", "8388608", whole_number(1024, 1 << 30)),
    ("limits", "max_connections", "256", whole_number(1, 10_000)),
    ("limits", "max_connections_per_client", "32", whole_number(1, 10_000)),
    ("limits", "request_timeout", "30", whole_number(1, 3600)),
    ("institution", "secrets", "env:SIS_SYNC_SECRET", SECRETS),
    *(("institution", key, "", VALUES) for key in LISTS),
    ("institution", "bad_rows", "skip", reader("skip or reject", str, "skip|reject")),
)

MAX_REQUEST_LINE = 8 * 1024         # bytes; RFC 9112 section 3 recommends at least 8,000
MAX_HEAD = 16 * 1024                # bytes of headers, as Node has it
MAX_HEADERS = 100                   # lines, as Apache has it
MAX_CHUNK_LINE = 256                # bytes, extensions included
MAX_SMALL_PIECES = 1000             # reads of a request that may be smaller than MEAN_PIECE
MAX_SMALL_CHUNKS = 65_536           # chunks of a body that may be
MEAN_PIECE = 16                     # bytes, the least average beyond these; a packet has 500
MAX_NUMBER = 1000                   # digits
MAX_OBJECTS = 8                     # objects and arrays in a body, for each student it may have
MAX_VALUES = 64                     # values in a body, likewise
MAX_IGNORED = 20                    # unknown keys that an answer names
MAX_SECRET = 1024                   # bytes; a stranger can't have us hash more
MAX_BUCKETS = 100_000               # clients that the rate limiter remembers: about 15 MB
BODIES_IN_FLIGHT = 6                # times max_body_bytes, all together: so 128 MB are enough
PIECE = 64 * 1024                   # bytes read at once, at most; never what a length promises
BUSY_TIMEOUT = 5.0                  # seconds to wait for one's turn, and for the database's lock
MAX_REFUSED = 100                   # connections told busy that are still being listened to
REFUSED_SECONDS = 2.0               # how long they are, so that the answer gets through
SHUTDOWN_TIMEOUT = 10.0             # seconds that requests in flight have to finish
SHORT_SECRET = 16                   # characters; below, a guess is thinkable
HISTORY_SYNCS = 10_000              # kept of each institution
HISTORY_ERRORS = 100                # row errors kept of each sync
WAL_LIMIT = 16 << 20                # bytes, where SQLite begins to empty it


class Refusal(Exception):
    """A request turned down with one of ERRORS. detail: words for a person; never a secret or a
    student's data. status: where a code has two. headers, carries: what the error's row says."""

    def __init__(self, code: str, detail: str = "", status: int = 0, headers: Headers = (),
                 **carries: Any) -> None:
        self.error = next(row for row in ERRORS if row.code == code and status in (0, row.status))
        self.detail = detail or self.error.meaning
        self.headers, self.carries = headers, carries
        super().__init__(self.detail)


def demand(found: Any, words: str) -> Any:
    """What was found. If it is nothing, or false, raises Refusal malformed_request."""
    if not found:
        raise Refusal("malformed_request", words)
    return found


class RowError(NamedTuple):
    """What is wrong with a row, from the check to the history and the answer."""

    row: int                        # from 1; 0 as long as only the value is known
    field: str | None
    error: str                      # a code of ROW_ERRORS
    message: str                    # words for a person; never the value, which is personal


class CommandError(Exception):
    """What stops a command: each argument is one plain line for stderr. Exit status 2."""


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

class Institution(NamedTuple):
    """Who may push: its secrets as SHA-256 digests, and what it may send."""

    name: str
    digests: tuple[bytes, ...]
    lists: Mapping[str, frozenset[str]]     # by the keys of LISTS; empty means any
    bad_rows: str = "skip"


class Configuration(NamedTuple):
    """Everything that the operator decides, read once and never changed: a reload makes another."""

    settings: Mapping[str, Any]             # the keys of [server] and [limits]
    institutions: tuple[Institution, ...]
    tls: ssl.SSLContext | None
    source: str                             # the file, or "" for none


DEFAULT_FILE = pathlib.Path(__file__).resolve().with_suffix(".ini")
SECTION = re.compile("server|limits|institution [a-z0-9-]{1,64}")
# configparser's own words show the line, which may hold a secret.
INI_FAULTS = {configparser.MissingSectionHeaderError: "is before or behind a [section]",
              configparser.DuplicateSectionError: "this [section] stands twice",
              configparser.DuplicateOptionError: "this key stands twice in its section",
              configparser.ParsingError: "is neither [section] nor key = value"}


def load_configuration(path: str | None = None, environment: Mapping[str, str] = os.environ,
                       overrides: Mapping[str, Any] = {}) -> Configuration:
    """Read the file, else SIS_SYNC_CONFIG, else sis_sync.ini beside the module, else the defaults.
    overrides: settings of [server]. Raises CommandError with every fault that the file has."""
    named = path or environment.get("SIS_SYNC_CONFIG")
    file = pathlib.Path(named or DEFAULT_FILE).absolute()
    source = str(file) if named or file.exists() else ""
    sections = {"server": {}, "limits": {}, **(read_ini(file) if source else {})}
    if not any(section.startswith("institution ") for section in sections):
        sections["institution default"] = {}
    reading = Reading(file.parent, environment)
    values = {section: reading.section(section, found) for section, found in sections.items()}
    settings = {**values.pop("server"), **values.pop("limits"), **overrides}
    institutions = [reading.institution(section, keys) for section, keys in values.items() if keys]
    for key in ("database", "tls_certificate", "tls_key"):
        settings[key] = settings[key] and str(file.parent / settings[key])
    tls = reading.tls(settings["tls_certificate"], settings["tls_key"])
    if reading.faults:
        raise CommandError(*(f"{file}: {fault}" for fault in reading.faults))
    for institution in institutions:
        log.info("institution %s: secrets set: %d", institution.name, len(institution.digests))
    if not tls and not ipaddress.ip_address(settings["host"]).is_loopback:
        log.warning("warning: [server] host: %s is open to others, without TLS", settings["host"])
    if not any(institution.digests for institution in institutions):
        log.warning("warning: no institution has a secret set: every push will be answered 503")
    return Configuration(settings, tuple(institutions), tls, source)


def read_ini(file: pathlib.Path) -> dict[str, dict[str, str]]:
    """The sections and keys of the file, as text. Raises CommandError."""
    # No '%' interpolation: it breaks secrets. No [DEFAULT]: it leaks into every section.
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",),
                                       default_section="\0", empty_lines_in_values=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # a key is spelt one way
    parser.SECTCRE = re.compile(r"\[(?P<header>[^]]+)\]$")  # what stood behind was passed over
    try:
        # Notepad writes a BOM, and the locale's encoding is not UTF-8 everywhere.
        parser.read_string(file.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{file}: cannot be read: {getattr(error, 'strerror', error)}") from None
    except configparser.Error as error:
        lines = [line for line, _ in getattr(error, "errors", ())] or [getattr(error, "lineno", 0)]
        raise CommandError(*(f"{file}: line {line}: {INI_FAULTS.get(type(error), 'cannot be read')}"
                             for line in lines)) from None
    return {section: dict(parser[section]) for section in parser.sections()}


class Reading:
    """One reading of a configuration. Its faults gather here, to be told at once."""

    def __init__(self, folder: pathlib.Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.faults: list[str] = []
        # By digest: nobody must be taken for another, or let in with nothing.
        self.owners = {hashlib.sha256(b"").digest(): "no secret at all"}

    def section(self, section: str, found: Mapping[str, str]) -> dict[str, Any]:
        """The values of one section as SETTINGS says, defaults filled in; {} for an unknown one."""
        if not SECTION.fullmatch(section):
            words = unknown("section", section, ("server", "limits", "institution NAME"))
            self.faults.append(f"[{section}]: {words} (NAME: a-z, 0-9, hyphens)")
            return {}
        known = {key: (default, read) for table, key, default, read in SETTINGS
                 if table == section.partition(" ")[0]}
        for key in [key for key in found if key not in known]:
            # What looks like no key may be a secret, on a line of its own and with an = in it.
            plain = re.fullmatch(r"(\[[^]]*\] *)?[A-Za-z_-]{0,30}", key)
            self.faults.append(f"[{section}] {key if plain else 'what is before the ='}: "
                               + unknown("key", key, [*known]))
        values: dict[str, Any] = dict.fromkeys(known, "")   # with faults, nothing is made of it
        for key, (default, read) in known.items():
            text = found.get(key, default)
            try:
                if re.search(r"\s[#;]", text):
                    raise argparse.ArgumentTypeError("a comment stands on a line of its own")
                values[key] = read(text)
            except argparse.ArgumentTypeError as error:
                self.faults.append(f"[{section}] {key}: {error}")
        return values

    def institution(self, owner: str, values: Mapping[str, Any]) -> Institution:
        """Make an institution, with digests. A secret that is not set is a warning, no fault."""
        digests = []
        for source in values["secrets"]:
            scheme, _, place = source.partition(":")
            try:
                if scheme == "sha256":
                    digest = bytes.fromhex(place)
                else:
                    secret = read_secret(str(self.folder / place) if scheme == "file" else None,
                                         place, self.environment)
                    if len(secret) < SHORT_SECRET:
                        log.warning("warning: [%s] secrets: %s: shorter than %d characters", owner,
                                    source, SHORT_SECRET)
                    digest = hashlib.sha256(secret).digest()
                if self.owners.setdefault(digest, owner) != owner:
                    raise CommandError(f"one of them is also that of {self.owners[digest]}")
                digests.append(digest)
            except OSError as error:
                log.warning("warning: [%s] secrets: not set: %s", owner, error)
            except CommandError as error:
                self.faults.append(f"[{owner}] secrets: {error}")
        return Institution(owner.partition(" ")[2], tuple(digests),
                           {key: values[key] for key in LISTS}, values["bad_rows"])

    def tls(self, certificate: str, key: str) -> ssl.SSLContext | None:
        if not certificate:
            if key:
                self.faults.append("[server] tls_key: stands without tls_certificate")
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # In TLS 1.2 a client may ask for one handshake after the other, at next to no cost to it.
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)       # PyPy 3.9 does not name it
        # An end without a good-bye, which stopping makes, must not keep the answer from being sent.
        context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)      # from Python 3.10
        fault = f"tls_certificate: {certificate}: must be a certificate in PEM"
        try:
            # OpenSSL does not say which file is at fault: if not this one by itself, then the key.
            ssl.create_default_context(cafile=certificate)
            fault = f"tls_key: {key or certificate}: must be the certificate's key, not encrypted"
            # Without a password to try, OpenSSL would ask the terminal for one and wait.
            context.load_cert_chain(certificate, key or None, password="")
        except OSError as error:        # ssl.SSLError is one
            self.faults.append(f"[server] {fault} ({error.strerror})")
        return context


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"unknown {what}; allowed: {', '.join(known)}" + (
        f"; did you mean {close[0]}?" if close else "")


def read_secret(file: str | None, variable: str = "SIS_SYNC_SECRET",
                environment: Mapping[str, str] = os.environ) -> bytes:
    """Of a file or the environment, never an argument: those anyone on the machine can list."""
    return check_secret(file or f"env:{variable}", pathlib.Path(file).read_bytes() if file else
                        os.fsencode(environment.get(variable, "")))


def check_secret(source: str, text: bytes) -> bytes:
    """The secret in this text. Raises OSError if it is empty, CommandError if it can be none."""
    secret = text.removeprefix(b"\xef\xbb\xbf").strip()     # Notepad writes a BOM
    if not secret:
        raise OSError(f"{source}: missing or empty")
    # `sis_sync.py secret > file`, for one, writes two lines: the secret and its digest.
    if not re.fullmatch(rb"(?i:(?!sha256:))[!-~\x80-\xff]{1,%d}" % MAX_SECRET, secret):
        raise CommandError(f"{source}: put the secret there alone, a word of at most {MAX_SECRET} "
                           "bytes; a sha256: line: write that line itself after secrets =")
    return secret


# ---------------------------------------------------------------------------------------------
# The request: who is calling, and what was sent
# ---------------------------------------------------------------------------------------------

# SQLite has no booleans, and given some the sqlite3 module takes a quarter longer to store a row.
STORED = {None: None, False: 0, True: 1}
# Windows PowerShell unwraps an array of one when it pipes it to ConvertTo-Json.
KINDS = {str: "a string", bool: "true, false or null", list: "an array, also for a single student"}
# Kept, as 5,000 bad rows may ask for that of a list of thousands.
casefolded = functools.lru_cache(64)(lambda listed: frozenset(map(str.casefold, listed)))


def institution_of(authorization: str, institutions: Iterable[Institution]) -> Institution | None:
    """Whose secret this Authorization header holds (RFC 6750 section 2.1). All are compared, so
    that the time tells nothing; as bytes, as a str beyond ASCII has compare_digest raise."""
    scheme, _, secret = authorization.partition(" ")
    sent = secret.strip(" ").encode("latin-1", "replace")[:MAX_SECRET + 1]
    digest = hashlib.sha256(sent).digest()
    found = [institution for institution in institutions for known in institution.digests
             if hmac.compare_digest(digest, known)]
    return found[0] if found and scheme.lower() == "bearer" else None


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address, as IPv4 if it stands in IPv6 clothes (::ffff:a.b.c.d); None if it is none."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address
    return None


def client_of(peer: str, forwarded_for: str = "", trusted: Sequence[Any] = ()) -> str:
    """Who sent the request: the peer, or the one for whom a trusted proxy says it was."""
    address = parse_address(peer)
    for hop in reversed(forwarded_for.split(",")):      # what others wrote is a mere claim
        # Some proxies write 192.0.2.1:5123, or [2001:db8::1]:5123.
        claimed = parse_address(re.sub(r"^\[([^]]*)\].*|^([^:]*):[^:]*$", r"\1\2", hop.strip()))
        if not (address and claimed and any(address in network for network in trusted)):
            break
        address = claimed
    return str(address or "-")


def client_key(client: str) -> str:
    """What limits count by: an address, in IPv6 its /64, as whoever has one has all 2**64."""
    address = parse_address(client)
    return client if not address or address.version == 4 else str(
        ipaddress.ip_network((address, 64), strict=False))


class RateLimiter:
    """A token bucket for each client: 20 tokens, say, and one more every 3 seconds. All of it is
    one number, when it is full again: with 5 tokens gone, in 15 seconds. Taking one adds 3, and is
    refused where that comes to more than a minute (ITU-T I.371, "generic cell rate algorithm").
    A full bucket needs no number; and whoever is forgotten for want of room has a full one."""

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}    # in order of use: `take` puts a client at the end
        self._lock = threading.Lock()

    def take(self, client: str, per_minute: int, now: float | None = None) -> int:
        """Take a token: 0, or the whole seconds until there will be one. A refusal is free."""
        now = time.monotonic() if now is None else now      # the wall clock would jump
        interval = 60.0 / per_minute
        with self._lock:
            full_at = max(self._full_at.pop(client, now), now)
            wait = full_at + interval - (now + 60.0)
            granted = wait < 1e-6       # sums of floats: the twentieth of a burst must not fail
            self._full_at[client] = full_at + interval if granted else full_at
            if len(self._full_at) > MAX_BUCKETS:
                # A tenth more than needed, or a crowd of strangers would pay for this each time.
                used = [item for item in self._full_at.items() if item[1] > now]
                self._full_at = dict(used[-MAX_BUCKETS * 9 // 10:])
        return 0 if granted else math.ceil(wait)


class Request:
    """A request, and what becomes known of it on the way to its line in the log. headers: names in
    lower case, all in latin-1. body: in pieces, as they come."""

    def __init__(self, peer: str = "", method: str = "-", path: str = "-",
                 headers: Mapping[str, str] = {}, body: Iterable[bytes] = ()) -> None:
        self.peer, self.method, self.path = peer, method, path      # peer: an address
        self.headers, self.body = headers, body
        self.id, self.started = secrets.token_hex(8), time.monotonic()
        self.client, self.institution = client_of(peer), "-"
        self.counts: Counts | None = None

    @property
    def milliseconds(self) -> int:
        return round((time.monotonic() - self.started) * 1000)

    @property
    def coding(self) -> str:
        return self.headers.get("content-encoding", "").strip().lower() or "identity"


def check_framing(headers: Mapping[str, str]) -> None:
    """Where a body ends must be beyond doubt, or its tail is taken for a request ("smuggling": RFC
    9112 section 6). Two lengths come as one, joined by a comma, and are none. Raises Refusal."""
    demand("content-length" not in headers or "transfer-encoding" not in headers,
           "both Content-Length and Transfer-Encoding")
    length, coding = headers.get("content-length", "0"), headers.get("transfer-encoding", "chunked")
    # The bound is below the one at which int() refuses by itself.
    demand(re.fullmatch("[0-9]{1,4000}", length), "Content-Length must be digits, once")
    demand(coding.rpartition(",")[2].strip(" \t").lower() == "chunked",
           "the last transfer coding must be chunked")
    if "," in coding:
        raise Refusal("not_implemented", "the only transfer coding known is chunked, once")


def check_length(length: int, limits: Mapping[str, Any]) -> None:
    """Raises Refusal batch_too_large past max_body_bytes."""
    if length > limits["max_body_bytes"]:
        raise Refusal("batch_too_large", "too many bytes: send smaller batches",
                      max=limits["max_students"], max_bytes=limits["max_body_bytes"])


def check_media_type(request: Request) -> None:
    """Raises Refusal unsupported_media_type. No Content-Type at all is let pass."""
    kind, _, parameters = request.headers.get("content-type", "application/json").partition(";")
    charsets = re.findall(r"(?:^|;)\s*charset\s*=\s*\"?([^\";\s]*)", parameters.lower())
    if (kind.strip().lower() != "application/json" or not set(charsets) <= {"utf-8", "utf8"}
            or request.coding not in ("identity", "gzip", "x-gzip")):
        raise Refusal("unsupported_media_type", headers=(
            ("Accept", "application/json"), ("Accept-Encoding", "gzip, identity")))


def exactly(size: int, read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Just `size` bytes, in pieces as they come. Raises EOFError if they end before."""
    while size:
        piece = read(min(size, PIECE))
        if not piece:
            raise EOFError
        size -= len(piece)
        yield piece


def unzipped(pieces: Iterable[bytes], limits: Mapping[str, Any]) -> Iterator[bytes]:
    """What one gzip member holds, never more than PIECE at a time. (The gzip module scans a long
    header byte by byte, and takes any number of empty members: seconds of work in one request.)"""
    unzip, size, piece = zlib.decompressobj(wbits=31), 0, b""   # piece: in the end, what is left
    with contextlib.suppress(zlib.error):
        for piece in pieces:
            size += len(piece)
            check_length(size, limits)      # a header, or empty blocks, may go on for ever
            while piece and not unzip.eof:
                yield unzip.decompress(piece, PIECE)
                piece = unzip.unconsumed_tail or unzip.unused_data
            if piece:
                break
    if piece or not unzip.eof:
        raise Refusal("malformed_json", "broken or cut off gzip, or more than one member")


def read_body(request: Request, limits: Mapping[str, Any]) -> bytearray:
    """The whole body, decompressed; the cap counts what it becomes, too: a bomb is small before."""
    body = bytearray()          # one buffer: 8 MiB in a list of small pieces would take 600 MB
    for piece in request.body if request.coding == "identity" else unzipped(request.body, limits):
        body += piece
        check_length(len(body), limits)
    return body


def numeral(text: str) -> int:
    """0 for every number, as no field is one. Raises ValueError for what is no number of JSON."""
    if text in ("NaN", "Infinity", "-Infinity"):
        raise ValueError(f"{text} is not JSON")
    if len(text) > MAX_NUMBER:
        raise ValueError(f"a number of more than {MAX_NUMBER} digits")
    return 0


def parse_json(body: bytearray) -> object:
    """Empties the body. Raises Refusal malformed_json, with why, and what it looks like instead."""
    start = bytes(body[:PIECE])
    try:
        # json.loads(bytes) takes UTF-16 and half surrogates, too. "sig" takes PowerShell's BOM off.
        text = body.decode("utf-8-sig")
        body.clear()                # text and tree are enough to have in memory
        return json.loads(text, parse_int=numeral, parse_float=numeral, parse_constant=numeral)
    except UnicodeDecodeError as error:
        reason = f"the body is not UTF-8 at byte {error.start}: send it as UTF-8"
    except RecursionError:
        reason = "the body is nested too deep"
    except ValueError as error:     # json.JSONDecodeError is one
        reason = f"the body is not JSON: {error}" if start else "the body is empty"
    if start.startswith(b"\x1f\x8b"):
        reason += "; it is gzip: say so with Content-Encoding: gzip"
    elif b"\0" in start[:4]:
        reason += "; it looks like UTF-16 or UTF-32"
    elif re.match(rb"\{[^\n]*\}\r?\n\{", start):
        reason += "; it looks like a document in each line: send one, with all in students"
    raise Refusal("malformed_json", reason)


def check_shape(body: bytearray, most: int) -> None:
    """Refuse what can't be a batch of so many students before it becomes a tree of objects, which
    may take 50 times the memory of its text. Raises Refusal batch_too_large, malformed_json."""
    # For 5,000 at least, as names hold such marks, too, and a batch. In 2 MiB is no large tree.
    students = max(most, 5000) + 1
    if (body.count(b"{") + body.count(b"[") > MAX_OBJECTS * students
            or (len(body) > 2 << 20 and body.count(b",") > MAX_VALUES * students)):
        if re.match(rb"(?:[^\[\]{}]*[\[{]){200}", body):       # none of them closed
            raise Refusal("malformed_json", "the body is nested too deep")
        raise Refusal("batch_too_large", f"far more values than {most} students have", max=most)


def check_value(field: Field, value: Any, listed: frozenset[str] | None,
                beside: Mapping[str, object] = {}) -> Any:
    """The value, stripped; or, as a batch may have many, a RowError. beside: its neighbours."""
    if isinstance(value, str) and field.kind is str:
        value = value.strip(WHITE_SPACE) or None
    if (value is None and not field.required) or (
            field.kind is not str and isinstance(value, field.kind)):
        return value
    error = "invalid_field"
    if value is None:
        error, words = "missing_field", f"required{misplaced(field, beside)}"
    elif not isinstance(value, field.kind):
        words = f"must be {KINDS[field.kind]}"
    elif re.search(FORBIDDEN, value):
        code = ord(next(re.finditer(FORBIDDEN, value))[0])
        kind = "half of a surrogate pair" if code > 0x7f else "a control character"
        words = f"holds U+{code:04X}, {kind}"
    elif len(value) > field.longest:
        words = f"must be at most {field.longest} characters"
    elif not re.fullmatch(field.pattern, value):
        words = f"must be {field.meaning}"
    elif listed and value not in listed:
        error, words = LISTS[field.listed], f"is not in the institution's list of {field.listed}"
        if value.casefold() in casefolded(listed):
            words += "; one that is differs in case alone"
    else:
        return value
    return RowError(0, field.name, error, f"{field.name} {words}")


def misplaced(field: Field, beside: Mapping[str, object]) -> str:
    """Where a field that is missing may be, among the first keys of what should have it."""
    for key, value in itertools.islice(beside.items(), MAX_IGNORED):
        if key != field.name and folded(key) == folded(field.name):
            return f", spelt like this, not {printable(key[:64])}"
        if isinstance(value, dict) and field.name in value:
            return ", not one level down" if field in FIELDS else ", at the top level"
    return ""


def folded(name: str) -> str:
    """"Student ID (ext)", "student-id-ext" and "StudentIdExt" are one."""
    return re.sub(r"[\W_]+", "", name.casefold()) or name


def is_clean(field: Field, column: list[Any], listed: frozenset[str] | None) -> bool:
    """Whether check_value would keep each value as it is; no pattern admits white space around one.
    The distinct ones are asked at once, joined by line ends: 3 ms for 5,000 students, not 16."""
    # The types first: lists and objects can't be in a set.
    fit = set(map(type, column)) <= {field.kind, field.kind if field.required else type(None)}
    if not fit or field.kind is bool:
        return fit
    distinct = set(column) - {None}
    text = "\n".join([*distinct, ""])
    # The lengths before the pattern, which takes 90 times the memory of a long text.
    return (max(map(len, distinct), default=0) <= field.longest
            and re.fullmatch(rf"(?:{field.pattern}\n)*", text) is not None
            and text.count("\n") == len(distinct)       # none of them holds a line end itself
            and (field is not KEY or len(distinct) == len(column))
            and (not listed or listed.issuperset(distinct)))


def check_column(field: Field, rows: Sequence[dict[str, Any]], listed: frozenset[str] | None,
                 errors: dict[int, RowError]) -> list[Any]:
    """The values of one field as they are kept. What is wrong goes to errors, by row: the first."""
    column = list(map(dict.get, rows, itertools.repeat(field.name)))    # 5 % faster than row by row
    seen: set[object] = set()
    suspects = [] if is_clean(field, column, listed) else rows
    for index, row in enumerate(suspects):
        value = column[index] = check_value(field, column[index], listed, row)
        if field is KEY and value in seen:
            value = RowError(0, field.name, "duplicate_student",
                             f"the same {field.name} stood higher up in the batch")
        if isinstance(value, RowError):
            errors.setdefault(index + 1, value._replace(row=index + 1))
        else:
            seen.add(value)
    return column if field.kind is str else list(map(STORED.get, column))


def check_rows(students: list[Any], institution: Institution) -> tuple[list[Any], list[RowError]]:
    """The good rows as records, and the first fault of each bad one."""
    errors = {row: RowError(row, None, "not_an_object", "a student must be an object")
              for row, student in enumerate(students, 1) if not isinstance(student, dict)}
    if errors:
        students = [student if isinstance(student, dict) else {} for student in students]
    records = list(zip(*(check_column(field, students, institution.lists.get(field.listed), errors)
                         for field in FIELDS)))
    if errors:
        records = [record for row, record in enumerate(records, 1) if row not in errors]
    return records, sorted(errors.values())


class Batch(NamedTuple):
    """A body that keeps the rules of a batch; its rows may not."""

    cohort_id: str
    received: int
    records: list[Any]              # the values of the good rows, each in the order of FIELDS
    errors: list[RowError]          # of the bad ones, in order of their rows
    ignored: list[str]              # unknown keys


def check_batch(parsed: object, institution: Institution, most: int) -> Batch:
    """What was sent, checked. Raises Refusal with the first fault of the batch itself."""
    if not isinstance(parsed, dict):
        raise Refusal("invalid_field", "the body must be an object", field="body")
    found = [check_value(field, parsed.get(field.name), institution.lists.get(field.listed), parsed)
             for field in (COHORT, STUDENTS)]
    for error in found:
        if isinstance(error, RowError):
            raise Refusal(error.error, error.message, field=error.field)
    cohort_id, students = found
    if len(students) > most:
        raise Refusal("batch_too_large", f"{len(students)} students in one request; at most {most}",
                      max=most)
    keys = set().union(*(student for student in students if isinstance(student, dict)))
    ignored = (keys - set(NAMES)) | (set(parsed) - {COHORT.name, STUDENTS.name})
    records, errors = check_rows(students, institution)
    return Batch(cohort_id, len(students), records, errors,
                 sorted({key[:64] for key in ignored})[:MAX_IGNORED])


# ---------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------

class Counts(NamedTuple):
    """What a sync did. updated: rows already known; unchanged: those of them that held the same."""

    received: int
    new: int
    updated: int
    unchanged: int
    rejected: int


HISTORY = ("time", "institution", "cohort_id", "client", *Counts._fields, "milliseconds", "errors")
# No column is declared NOT NULL: a field that is added later is null in the entries there are.
COLUMNS = {field.name: "TEXT" if field.kind is str else "INTEGER" for field in FIELDS}

# Times are UTC in whole seconds since 1970. The entries have a rowid, and with it the order in
# which they arrived: a page of new students is one run of the file, whatever the order of their
# ids. (In version 1 they stood in order of their key, and such a page touched half of the file.)
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS rosters (roster_id INTEGER PRIMARY KEY,
    institution TEXT NOT NULL, cohort_id TEXT NOT NULL, UNIQUE (institution, cohort_id));
CREATE TABLE entries (entry_id INTEGER PRIMARY KEY,
    roster_id INTEGER NOT NULL REFERENCES rosters (roster_id),
    {", ".join(map(" ".join, COLUMNS.items()))}, created_at INTEGER NOT NULL,
    changed_at INTEGER NOT NULL, seen_at INTEGER NOT NULL, UNIQUE (roster_id, {KEY.name}));
CREATE TABLE IF NOT EXISTS syncs (sync_id INTEGER PRIMARY KEY, time INTEGER NOT NULL,
    institution TEXT NOT NULL, cohort_id TEXT NOT NULL, client TEXT NOT NULL,
    {" INTEGER NOT NULL, ".join((*Counts._fields, "milliseconds"))} INTEGER NOT NULL,
    errors TEXT NOT NULL);
DROP INDEX IF EXISTS syncs_by_time;
CREATE INDEX syncs_by_institution ON syncs (institution)"""

# The public way to read: these stay what they are, whatever becomes of the tables.
UTC = "strftime('%Y-%m-%dT%H:%M:%SZ', {}, 'unixepoch')".format
VIEWS = f"""
DROP VIEW IF EXISTS roster;
CREATE VIEW roster AS SELECT institution, cohort_id, {", ".join(NAMES)},
    {UTC("created_at")} AS created, {UTC("changed_at")} AS changed, {UTC("seen_at")} AS seen
    FROM entries JOIN rosters USING (roster_id);
DROP VIEW IF EXISTS history;
CREATE VIEW history AS SELECT sync_id, {UTC("time")} AS time, {", ".join(HISTORY[1:])} FROM syncs"""


def make_tables(connection: sqlite3.Connection) -> None:
    """In an empty database, or in one of version 1, which kept entries in order of their key."""
    old = dict(row[1:3] for row in connection.execute("PRAGMA table_info(entries)"))
    if old:
        connection.execute("PRAGMA legacy_alter_table = ON")        # views of the operator's stay
        connection.execute("ALTER TABLE entries RENAME TO entries_1")
    for statement in SCHEMA.split(";"):     # executescript would commit first
        connection.execute(statement)
    if old:
        add_columns(connection, old)        # also what is no field any more is kept
        names = ", ".join(f'"{name}"' for name in old)
        connection.execute(f"INSERT INTO entries ({names}) SELECT {names} FROM entries_1")
        connection.execute("DROP TABLE entries_1")


# What brings a database to each version (PRAGMA user_version) from the one before: a change of the
# schema is one more item here, and none of SCHEMA. A new field needs nothing.
MIGRATIONS = {2: make_tables}


def add_columns(connection: sqlite3.Connection, columns: Mapping[str, str]) -> bool:
    """Whether the entries lacked any of these columns; they have them now."""
    there = {row[1] for row in connection.execute("PRAGMA table_info(entries)")}
    lacking = [name for name in columns if name not in there]
    for name in lacking:
        connection.execute(f'ALTER TABLE entries ADD COLUMN "{name}" {columns[name]}')
    return bool(lacking)


def schema_version(connection: sqlite3.Connection) -> int:
    """Raises sqlite3.DatabaseError for a database that is not for this program."""
    version, newest = int(connection.execute("PRAGMA user_version").fetchone()[0]), max(MIGRATIONS)
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    if version > newest:
        raise sqlite3.DatabaseError(f"the database is of version {version}, newer than {newest}: "
                                    "use a newer sis_sync.py")
    if tables and not version or version and not tables >= {"rosters", "entries", "syncs"}:
        raise sqlite3.DatabaseError("this is a database of another program")
    return version


def open_database(path: str, read_only: bool = False) -> sqlite3.Connection:
    """Never creates a file, as a mistyped path would. Raises sqlite3.Error, OSError."""
    # Also a reader opens for writing, and then forgoes it: the last one to close a database takes
    # its -wal and -shm away, which SQLite's mode=ro would leave behind, owned by whoever read.
    connection = sqlite3.connect(f"{pathlib.Path(path).absolute().as_uri()}?mode=rw", uri=True,
                                 timeout=BUSY_TIMEOUT, isolation_level=None,
                                 check_same_thread=False)
    try:
        connection.executescript(f"""
PRAGMA query_only = {read_only};
PRAGMA synchronous = FULL;      -- the log is on disk before a transaction counts as done
PRAGMA temp_store = MEMORY;     -- a temporary folder that is full stops no import
-- In pages of the file. A batch of scattered ids writes 2 MB: the default, 4 MB, has every other
-- one wait for a checkpoint, which took a fifth of the time.
PRAGMA wal_autocheckpoint = {WAL_LIMIT // 4096};
PRAGMA journal_size_limit = {WAL_LIMIT};    -- else it stays as long as a reader once made it""")
        if not read_only:
            prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def prepare(connection: sqlite3.Connection, path: str) -> None:
    """Make the database ours, and of this version; what is refused is left as it was."""
    schema_version(connection)
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.chmod(path + suffix, 0o600)
    if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise sqlite3.DatabaseError("this disk does not allow a write-ahead log")
    connection.execute("BEGIN IMMEDIATE")
    before = schema_version(connection)     # once more, as two may start at the same time
    for version, migrate in MIGRATIONS.items():
        if before < version:
            migrate(connection)
            connection.execute(f"PRAGMA user_version = {version}")
    if add_columns(connection, COLUMNS) or before < max(MIGRATIONS):
        for statement in VIEWS.split(";"):
            connection.execute(statement)
    connection.execute("COMMIT")
    if 0 < before < max(MIGRATIONS):
        log.info("database: migrated from version %d to %d", before, max(MIGRATIONS))


ROWS_AT_ONCE = (999 - 4) // len(FIELDS)     # SQLite before 3.32 takes 999 variables


@functools.lru_cache(maxsize=4)
def upsert(rows: int) -> str:
    """The statement that stores so many rows: roster_id, three times the time, all their values.
    (A statement for each row takes twice as long, in the sqlite3 module's work around it.)
    `changed` is a list's append, called where values differ: all of SET sees the row as it was.
    Never INSERT OR REPLACE: that would delete the entry first, and created_at with it."""
    row = f"({', '.join('?' * len(FIELDS))})"
    values = ", ".join(NAMES[1:])
    sent = ", ".join(f"excluded.{name}" for name in NAMES[1:])
    # Without WHERE true, ON CONFLICT would be taken for the ON of a join (lang_upsert.html).
    return f"""
INSERT INTO entries (roster_id, created_at, changed_at, seen_at, {", ".join(NAMES)})
SELECT ?, ?, ?, ?, sent.* FROM (VALUES {", ".join([row] * rows)}) AS sent WHERE true
ON CONFLICT (roster_id, {KEY.name}) DO UPDATE SET
    ({values}) = ({sent}), seen_at = excluded.seen_at,
    changed_at = CASE WHEN ({values}) IS NOT ({sent})
        THEN coalesce(changed({KEY.name}), excluded.changed_at) ELSE changed_at END"""


class Roster:
    """The database: rosters, entries, syncs. One connection; whoever uses it holds Service.turn.
    Reading commands open a connection of their own; WAL lets them read while this one writes."""

    def __init__(self, path: str) -> None:
        """Open, create or migrate. Raises CommandError for a file that can't be used."""
        self.path = os.path.realpath(path)      # beside which SQLite has -wal and -shm
        self._connection: sqlite3.Connection | None = None
        self._files: list[os.stat_result] = []  # the database and its -wal, as they were opened
        self._changed: list[str] = []           # keys, by the calls of `changed` in `upsert`
        try:
            # Made before SQLite would, and readable by its owner alone.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            with self.transaction():
                pass
        except (Refusal, OSError, sqlite3.Error) as error:
            raise CommandError(f"{self.path}: {getattr(error, 'strerror', 0) or error}") from error

    def files(self) -> list[os.stat_result]:
        return [os.stat(path) for path in (self.path, f"{self.path}-wal")]

    def warning(self) -> str:
        """What an operator should know of the files, if anything. Raises OSError if they are gone:
        what SQLite has open lives on until it is closed, and ends with the process."""
        files = self.files() if self._connection else self._files       # closed, it loses nothing
        if not all(map(os.path.samestat, files, self._files)):
            raise OSError("the database or its -wal was replaced by another")
        # SQLite says nothing when it can't empty the log into the database: but the log grows.
        return "" if files[1].st_size <= 4 * WAL_LIMIT else \
            "the write-ahead log can't be emptied: a reader holds it, or the disk is full or fails"

    def close(self) -> None:
        """Empty the log into the database, and close. SQLite would not do so if the file has moved:
        then ours is the only hold of it, and kept as long as a reader or a fault is in the way."""
        with contextlib.suppress(sqlite3.Error):
            if self._connection:
                self._connection.rollback()
                self._connection.execute("PRAGMA busy_timeout = 0")     # for no reader's end
                busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
                if not busy:
                    self._connection.close()
                    self._connection = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything or nothing; on disk when it is left without an exception. Raises Refusal busy,
        or sqlite3.Error or OSError; then the database is opened anew, if `close` could close it."""
        try:
            if not self._connection:
                connection = open_database(self.path)
                connection.create_function("changed", 1, self._changed.append)
                self._connection, self._files = connection, self.files()
            connection = self._connection
            # IMMEDIATE: a transaction that begins as a reader is refused at once, with no
            # waiting, if another process writes before it does.
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
            warning = self.warning()        # raises OSError, lest a crash take the 200 back
            if warning:
                log.warning("database: %s", warning)
        except BaseException as error:
            # Only to begin takes waiting for a lock, so nothing is half done.
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise Refusal("busy", "the database is locked: try again", retry_after=1) from error
            self.close()
            raise

    def sync(self, request: Request, batch: Batch) -> Counts:
        """Store a batch and its line in the history. Nothing is ever deleted, and the lock is ours:
        so the last entry_id grows by one for each new entry, and for no other: they were known."""
        with self.transaction() as connection:
            now = int(time.time())      # not before the lock is ours: times follow the order
            key = (request.institution, batch.cohort_id)
            last = "SELECT coalesce(max(entry_id), 0) FROM entries"
            connection.execute("INSERT OR IGNORE INTO rosters VALUES (NULL, ?, ?)", key)
            roster_id, before = connection.execute(
                f"SELECT roster_id, ({last}) FROM rosters WHERE institution = ? AND cohort_id = ?",
                key).fetchone()
            self._changed.clear()
            for start in range(0, len(batch.records), ROWS_AT_ONCE):
                some = batch.records[start:start + ROWS_AT_ONCE]
                connection.execute(upsert(len(some)), [roster_id, now, now, now,
                                                       *itertools.chain.from_iterable(some)])
            new = connection.execute(last).fetchone()[0] - before
            known, changed = len(batch.records) - new, len(self._changed)
            counts = Counts(batch.received, new, known, known - changed, len(batch.errors))
            errors = json.dumps([error._asdict() for error in batch.errors[:HISTORY_ERRORS]])
            values = (now, *key, request.client, *counts, request.milliseconds, errors)
            connection.execute(f"INSERT INTO syncs VALUES (NULL{', ?' * len(values)})", values)
            # By count and in order of arrival: a clock that was wrong once deletes nothing.
            connection.execute(
                "DELETE FROM syncs WHERE institution = ? AND sync_id <= (SELECT sync_id FROM syncs "
                "WHERE institution = ? ORDER BY sync_id DESC LIMIT 1 OFFSET ?)",
                (request.institution, request.institution, HISTORY_SYNCS))
        return counts


# ---------------------------------------------------------------------------------------------
# The service: the order of the checks, and the answer
# ---------------------------------------------------------------------------------------------

SYNC_PATH = "/api/sis/sync"
# RFC 9110 section 9 and RFC 5789: any other method is unknown, not merely out of place.
METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}


class Response(NamedTuple):
    """An answer: always JSON."""

    status: int
    headers: Headers
    body: bytes
    error: str = ""                 # the code, and the detail if it tells more, for the log

    @classmethod
    def of(cls, request: Request, document: Document, status: int = 200) -> Response:
        body = json.dumps(document).encode() + b"\n"
        headers = (("Content-Type", "application/json"), ("Content-Length", str(len(body))),
                   ("X-Request-ID", request.id))
        return cls(status, headers, b"" if request.method == "HEAD" else body)

    @classmethod
    def of_refusal(cls, request: Request, refusal: Refusal) -> Response:
        """The one place where an error becomes an answer."""
        error, detail, carries = refusal.error, refusal.detail, refusal.carries
        response = cls.of(request, {"error": error.code, "detail": detail, **carries}, error.status)
        headers = response.headers + refusal.headers
        if "retry_after" in carries:
            headers += (("Retry-After", str(carries["retry_after"])),)
        words = error.code if detail == error.meaning else f"{error.code}: {detail}"
        return response._replace(headers=headers, error=words)


class Service:
    """The server without its sockets: a request in, an answer out."""

    def __init__(self, configuration: Configuration) -> None:
        """Raises CommandError if the database can't be used."""
        self.configuration = configuration
        self.limiter = RateLimiter()
        self.roster = Roster(configuration.settings["database"])
        # One batch at a time is parsed, checked and stored: one tree of objects in memory, and none
        # that waits at each statement for another thread's 5 ms of Python to be over.
        self.turn = threading.Lock()
        self._bodies = 0                # bytes that bodies in flight take, or may take
        self._room = threading.Condition()

    def handle(self, request: Request, receive: Callable[[Request], None] = lambda request: None,
               send: Callable[[Response], None] = lambda response: None) -> Response:
        """One request, from its arrival to its line in the log. Nothing escapes from here. receive
        fills in the request, and may raise Refusal; send may raise OSError; WSGI needs neither."""
        try:
            receive(request)
            response = Response.of(request, self.route(request))
        except Exception as error:  # noqa: BLE001  whatever it is, the client gets an answer
            if not isinstance(error, Refusal):
                log.error("%s server_error %s", request.id, describe(error))
                error = Refusal("server_error", request_id=request.id)
            response = Response.of_refusal(request, error)
        try:
            send(response)
        except OSError:
            response = response._replace(error=f"{response.error} client gone".lstrip())
        log_request(request, response)
        return response

    def route(self, request: Request) -> Document:
        """What a 200 says. Raises Refusal, in the order of the contract: HTTP, path, method."""
        # One configuration from here to the end, whatever SIGHUP does meanwhile.
        configuration = self.configuration
        request.client = client_of(request.peer, request.headers.get("x-forwarded-for", ""),
                                   configuration.settings["trusted_proxies"])
        check_framing(request.headers)
        if request.method not in METHODS:
            known = request.method.upper() in METHODS
            raise Refusal("not_implemented", "methods are in capitals" if known else "")
        if request.path not in ROUTES:
            raise Refusal("not_found", f"there is nothing at this path; a push goes to {SYNC_PATH}")
        method, answer, _ = ROUTES[request.path]
        allow = "GET, HEAD" if method == "GET" else method
        if request.method not in allow.split(", "):
            raise Refusal("method_not_allowed", f"allowed here: {allow}",
                          headers=(("Allow", allow),))
        return answer(self, request, configuration)

    def authenticate(self, request: Request, configuration: Configuration) -> Institution:
        """The institution that calls. Raises Refusal not_configured, rate_limited, unauthorized."""
        if not any(institution.digests for institution in configuration.institutions):
            raise Refusal("not_configured")
        institution = institution_of(request.headers.get("authorization", ""),
                                     configuration.institutions)
        request.institution = institution.name if institution else "-"
        # A verified institution has a bucket of its own; a guess spends its address's.
        bucket = f"institution {institution.name}" if institution else client_key(request.client)
        wait = self.limiter.take(bucket, configuration.settings["requests_per_minute"])
        if wait:
            raise Refusal("rate_limited", f"too many requests: wait {wait} s", retry_after=wait)
        if not institution:
            raise Refusal("unauthorized", headers=(("WWW-Authenticate", "Bearer"),))
        return institution

    @contextlib.contextmanager
    def room(self, request: Request, limits: Mapping[str, Any]) -> Iterator[None]:
        """Memory for a body, of the share that all bodies in flight have together. It is taken as a
        whole before a byte is read: if bodies took it piece by piece, all of them could stand
        half-read and wait for each other. Raises Refusal busy."""
        cap, length = limits["max_body_bytes"], request.headers.get("content-length")
        size = int(length) if length and request.coding == "identity" else cap
        left = request.started + limits["request_timeout"] - time.monotonic()
        with self._room:
            if not self._room.wait_for(lambda: self._bodies + size <= BODIES_IN_FLIGHT * cap, left):
                raise Refusal("busy", "too many bodies at once: try again", retry_after=1)
            self._bodies += size
        try:
            yield
        finally:
            with self._room:
                self._bodies -= size
                self._room.notify_all()


def sync(service: Service, request: Request, configuration: Configuration) -> Document:
    """POST /api/sis/sync. Nobody without a secret makes it read a body."""
    limits = configuration.settings
    institution = service.authenticate(request, configuration)
    check_length(int(request.headers.get("content-length", "0")), limits)
    check_media_type(request)
    with service.room(request, limits):
        body = read_body(request, limits)
        if not service.turn.acquire(timeout=BUSY_TIMEOUT):
            raise Refusal("busy", retry_after=1)
        try:
            check_shape(body, limits["max_students"])
            batch = check_batch(parse_json(body), institution, limits["max_students"])
            errors = [error._asdict() for error in batch.errors]
            if errors and institution.bad_rows == "reject":
                request.counts = Counts(batch.received, 0, 0, 0, len(errors))
                raise Refusal("invalid_rows", f"{len(errors)} of {batch.received} rows have faults;"
                              " nothing was stored", errors=errors)
            counts = request.counts = service.roster.sync(request, batch)
        finally:
            service.turn.release()
    details = {"imported": counts.new, "updated": counts.updated, "unchanged": counts.unchanged}
    return {"received": counts.received, "imported": counts.new + counts.updated,
            "details": details, "errors": errors, "ignored": batch.ignored}


def health(service: Service, request: Request, configuration: Configuration) -> Document:
    try:
        # Before it is opened: that would apply the log of one database to another in its place.
        warning = service.roster.warning()
        with contextlib.closing(open_database(service.roster.path, read_only=True)) as connection:
            connection.execute("SELECT 1 FROM syncs LIMIT 1").fetchall()
    except (sqlite3.Error, OSError):
        raise Refusal("unhealthy") from None
    return {"status": "ok", **({"warning": warning} if warning else {})}


def openapi(service: Service, request: Request, configuration: Configuration) -> Document:
    return openapi_document(configuration.settings["max_students"])


# What answers at a path, and its summary; a HEAD is answered where a GET is.
ROUTES = {
    SYNC_PATH: ("POST", sync, "Push students of one cohort's roster"),
    "/healthz": ("GET", health, "Whether the database answers"),
    "/openapi.json": ("GET", openapi, "This document"),
}


def describe(error: BaseException) -> str:
    """A fault in one line, without what a message could hold of a student: only the messages of the
    database and the system are known to hold nothing of that kind."""
    # Not extract_tb, which imports a module and reads files: there may be no descriptors left.
    frames = [*traceback.walk_tb(error.__traceback__)]
    where = " < ".join(f"{frame.f_code.co_name}:{line}" for frame, line in reversed(frames))
    words = f": {error}" if isinstance(error, (sqlite3.Error, OSError)) else ""
    return f"{type(error).__name__}{words} ({where})"


def log_request(request: Request, response: Response) -> None:
    """One line, behind its time; its rows are received/imported/rejected."""
    # What a client wrote must not forge a line of the log, or steer the terminal that shows it.
    method, path = (re.sub(r"[^!-\[\]-~]", lambda match: f"\\x{ord(match[0]):02x}", text[:200])
                    for text in (request.method, request.path))
    counts = request.counts
    rows = f"{counts.received}/{counts.new + counts.updated}/{counts.rejected}" if counts else "-"
    log.info("%s %s %s %s %s %d %s %dms%s", request.id, request.client, request.institution,
             method, path, response.status, rows, request.milliseconds,
             f" {response.error}" if response.error else "")


# ---------------------------------------------------------------------------------------------
# The wire
# ---------------------------------------------------------------------------------------------

# Grammar of RFC 9110 and RFC 9112, with the line's end: what str.split() and str.strip() call white
# space is far more than HTTP does, and a pattern that ends in $ lets a line end through.
#   chunk-ext = *( BWS ";" BWS chunk-ext-name [ BWS "=" BWS ( token / quoted-string ) ] )
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) (HTTP/[0-9]\.[0-9])\r\n")
FIELD_LINE = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)\r\n")
CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,15}})(?:[ \t]*;[ \t]*{TOKEN}"
                        rf"(?:[ \t]*=[ \t]*(?:{TOKEN}|{QUOTED}))?)*\r\n")
HOST = re.compile(r"(?:(?:[!$&-+.0-9;=A-Z_a-z~-]|%[0-9A-Fa-f]{2})+|\[([^]%]+)\])(?::[0-9]*)?")
TARGET = re.compile(r"(?:(?i:https?)://([^/?#]+))?(/[^?#]*)?(?:\?[^#]*)?")


class Stream(io.RawIOBase):
    """A connection as a file under one clock: nothing is read or written past the deadline, however
    the bytes trickle, as each wait is given only what is left of it."""

    refused = False             # there is no place for it: it is only told so
    engaged = False             # a whole head has come, and no answer is given yet
    stopping = False            # the server is

    def __init__(self, connection: socket.socket, client: str, service: Service) -> None:
        self.connection = connection
        self.client = client            # as limits count it
        self.settings = service.configuration.settings
        self.deadline = time.monotonic() + self.settings["request_timeout"]
        self.credit = MAX_SMALL_PIECES * MEAN_PIECE     # bytes that its pieces may be short of

    def readable(self) -> bool:
        return True

    def in_time(self) -> socket.socket:
        """The connection, its timeout what is left of the deadline. Raises OSError past it."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")  # noqa: UP041  a TimeoutError only since Python 3.10
        self.connection.settimeout(left)
        return self.connection

    def readinto(self, buffer: Any) -> int:
        """What has come. Nobody waits for more than a request has, so an end always is too early.
        Raises Refusal request_timeout, malformed_request, and busy if it was us who cut it off."""
        try:
            size = self.in_time().recv_into(buffer)
        except socket.timeout:  # noqa: UP041  an OSError, which is why it is caught first
            raise Refusal("request_timeout") from None
        except OSError:
            size = 0
        if not size and self.stopping:
            raise Refusal("busy", "the server is stopping: try again", retry_after=1)
        demand(size, "the request ended before it was whole")
        # Each costs a system call and a few lines of Python, a hundred times as much as a byte.
        self.credit += size - MEAN_PIECE
        demand(self.credit >= 0, "the request comes in too many small pieces")
        return size

    def write(self, data: Any) -> None:
        """All of it. (sendall would give each piece the whole time anew.) Raises OSError."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.in_time().send(rest):]


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: setup, handle and finish are called; one request, one answer, one line in the
    log. Of the base class it uses how an answer is written, not how a request is read: that splits
    lines at any white space of Unicode, takes a bare CR for a line end, two Hosts for one, HTTP/0.9
    for a request, drops the headers behind a faulty one, and answers errors in HTML."""

    request_version = "HTTP/1.1"    # by default it is 0.9, to which no status line is written
    protocol_version = "HTTP/1.1"   # of the answer, until the request says 1.0
    wrong_scheme = ""               # what the port speaks, where the client speaks the other
    server: Server

    def setup(self) -> None:
        self.stream: Stream = self.request      # socketserver's word for what get_request returns
        self.rfile = io.BufferedReader(self.stream)

    def handle(self) -> None:
        tls, stream = self.server.service.configuration.tls, self.stream
        request = Request(self.client_address[0])
        first = b"?"                    # until we look: as if there was one
        try:
            if tls or not stream.refused:       # who is refused in http need not say a word first
                first = stream.in_time().recv(1, socket.MSG_PEEK)
            handshake = first == b"\x16"
            if tls and handshake:
                # Here, and not where it is accepted: there a silent client would stop all others.
                stream.connection = tls.wrap_socket(stream.in_time(), server_side=True,
                                                    do_handshake_on_connect=False)
                stream.connection.do_handshake()
            elif tls or handshake:
                self.wrong_scheme = "https, not http" if tls else "http, not https"
        except OSError as error:
            if tls:                     # else receive() meets it again, and says what it is
                log.info("%s %s TLS handshake failed: %s", request.id, request.client, error)
                return
        if first:                       # else it came and went without a word
            self.server.service.handle(request, self.receive, self.send)

    def receive(self, request: Request) -> None:
        """Fill in the request: its line, its headers, and its body as a stream. Raises Refusal."""
        demand(not self.wrong_scheme, f"this port speaks {self.wrong_scheme}")
        if self.stream.refused:
            raise Refusal("busy", "too many connections: try again", retry_after=1)
        line = self.line(MAX_REQUEST_LINE)
        if line == "\r\n":              # RFC 9112 section 2.2 has one of these be ignored
            line = self.line(MAX_REQUEST_LINE)
        self.protocol_version = parse_request_line(line, request)
        modern = self.protocol_version == "HTTP/1.1"
        request.headers = headers = self.fields(Refusal("request_too_large", status=431))
        # It may be empty. Two of them arrive joined by a comma, which no host has in it.
        host = headers.get("host", "," if modern else "")
        demand(not host or is_host(host), "HTTP/1.1 takes one Host header")
        demand(modern or "transfer-encoding" not in headers, "HTTP/1.0 has no Transfer-Encoding")
        self.stream.engaged = True
        request.body = self.body(headers, modern)

    def line(self, most: int) -> str:
        """The next line with its end; longer than `most`, and cut there, if it is too long."""
        return self.rfile.readline(most + 1).decode("latin-1")

    def fields(self, too_many: Refusal) -> dict[str, str]:
        """Lines up to the empty one, by lower-case name; values of one name joined by a comma."""
        fields: dict[str, str] = {}
        room, lines = MAX_HEAD, MAX_HEADERS
        line = self.line(room)
        while line != "\r\n":
            room, lines = room - len(line), lines - 1
            if room < 0 or lines < 0:
                raise too_many
            match = demand(FIELD_LINE.fullmatch(line), "a header must be NAME: VALUE and CRLF")
            name, value = match[1].lower(), match[2].strip(" \t")
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
            line = self.line(room)
        return fields

    def body(self, headers: Mapping[str, str], modern: bool) -> Iterator[bytes]:
        """The pieces of the body. Nothing is read before the first is asked for."""
        if modern and headers.get("expect", "").lower() == "100-continue":
            # Only now: who is refused by the headers alone need not send the body.
            with contextlib.suppress(OSError):
                self.stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "transfer-encoding" in headers:
            yield from self.chunks()
        else:
            yield from exactly(int(headers.get("content-length", "0")), self.rfile.read1)

    def chunks(self) -> Iterator[bytes]:
        """The data of a chunked body (RFC 9112 section 7.1), without extensions and trailers."""
        credit = MAX_SMALL_CHUNKS * MEAN_PIECE
        while True:
            line = CHUNK_LINE.fullmatch(self.line(MAX_CHUNK_LINE))
            size = int(demand(line, "a chunk must begin with its size in hexadecimal")[1], 16)
            if not size:
                break
            check_length(size, self.stream.settings)        # before all that is promised has come
            credit += size - MEAN_PIECE
            demand(credit >= 0, "the body comes in too many small chunks")
            yield from exactly(size, self.rfile.read1)
            demand(self.rfile.read(2) == b"\r\n", "a chunk is longer than it says")
        self.fields(Refusal("malformed_request", "too many trailers"))

    def send(self, response: Response) -> None:
        """Raises OSError when the client is gone, or has not read all of it in time."""
        self.wfile = answer = io.BytesIO()      # so that it leaves in one piece
        self.stream.engaged = False
        # Who had the whole time for a request, or was never let in, does not get as much again.
        short = response.status == 408 or self.stream.refused or self.stream.stopping
        seconds = REFUSED_SECONDS if short else self.stream.settings["request_timeout"]
        self.stream.deadline = time.monotonic() + seconds
        self.send_response_only(response.status)        # send_response would tell Python's version
        self.send_header("Date", self.date_time_string())
        for name, value in (*response.headers, ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()
        self.stream.write(answer.getvalue() + response.body)

    def finish(self) -> None:
        """Close so that the answer gets through (RFC 9112 section 9.6). Closing a socket with
        unread bytes resets the connection, and a reset takes from the client what it has not read
        yet: so only this side is closed, and what still comes is thrown away, within bounds."""
        most, connection = 2 * self.stream.settings["max_body_bytes"], self.stream.connection
        with contextlib.suppress(OSError):
            if isinstance(connection, ssl.SSLSocket):
                connection.settimeout(0)
                with contextlib.suppress(OSError, ValueError):
                    connection.unwrap()         # close_notify is sent, and not waited for
            connection.shutdown(socket.SHUT_WR)
            piece = b"?"
            while piece and most > 0:
                piece = self.stream.in_time().recv(PIECE)       # of TLS or not: nobody reads it
                most -= len(piece)


def parse_request_line(line: str, request: Request) -> str:
    """Its version. Fills in method and path, of a target in any form of RFC 9112 section 3.2."""
    if len(line) > MAX_REQUEST_LINE:
        raise Refusal("request_too_large", status=414)
    match = demand(REQUEST_LINE.fullmatch(line), "a request must begin METHOD TARGET HTTP/1.1")
    request.method, target, version = match.groups()
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise Refusal("http_version_not_supported")
    parts = TARGET.fullmatch(target)
    if parts and (is_host(parts[1]) if parts[1] else parts[2]):
        request.path = parts[2] or "/"
    elif target == "*" and request.method == "OPTIONS" or request.method == "CONNECT":
        request.path = target.partition("?")[0]
    else:
        raise Refusal("malformed_request", "the request target must begin with / or http://HOST")
    return str(version)


def is_host(text: str) -> bool:
    match = HOST.fullmatch(text)
    return match is not None and (not match[1] or parse_address(match[1]) is not None)


class Server(http.server.ThreadingHTTPServer):
    """A thread for each connection; how many there may be is decided here. get_request and
    process_request run in the accepting thread, where nothing may wait; leave in the main one."""

    request_queue_size = 1024       # in a full one a client waits a second until it is asked for
    allow_reuse_address = os.name != "nt"   # there it lets two servers share a port (cpython#85307)
    # HTTPServer's looks up the host's name: 5 to 35 s where there is no resolver (bpo-35164).
    server_bind = socketserver.TCPServer.server_bind

    def __init__(self, service: Service) -> None:
        """Bind, listen, and accept in a thread of its own. Raises CommandError."""
        self.service = service
        self.streams: set[Stream] = set()       # of all connections
        self.condition = threading.Condition()  # of these
        host, port = (service.configuration.settings[key] for key in ("host", "port"))
        if ":" in host:
            self.address_family = socket.AF_INET6
        threading.stack_size(2 << 20)   # musl gives 128 KiB; 3.13.0 takes 1.5 MiB for deep JSON
        # Else glibc keeps, for each thread, what a large body took. (-3 is its M_MMAP_THRESHOLD.)
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).mallopt(-3, 4 << 20)
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise CommandError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        name = f"[{host}]" if ":" in host else host
        scheme = "https" if service.configuration.tls else "http"
        self.url = f"{scheme}://{name}:{self.server_address[1]}"
        self.accepting = threading.Thread(target=self.serve_forever, daemon=True,
                                          kwargs={"poll_interval": 0.1})    # s until it sees a stop
        self.accepting.start()

    def get_request(self) -> Any:
        try:
            connection, address = super().get_request()
            return Stream(connection, client_key(address[0]), self.service), address
        except (OSError, MemoryError) as error:
            # Out of descriptors, say: it stays in the queue, and the loop is back for it at once.
            log.error("- cannot accept: %s", describe(error))
            time.sleep(0.5)
            raise OSError from error        # which the loop survives

    def process_request(self, request: Any, client_address: Any) -> None:
        stream: Stream = request        # socketserver's word for what get_request returns
        settings, peer = stream.settings, parse_address(client_address[0])
        trusted = any(peer in network for network in settings["trusted_proxies"])
        with self.condition:
            served = [other.client for other in self.streams if not other.refused]
            if len(served) >= settings["max_connections"] or (not trusted and served.count(
                    stream.client) >= settings["max_connections_per_client"]):
                stream.refused = True
                stream.deadline = time.monotonic() + REFUSED_SECONDS
                if len(self.streams) - len(served) >= MAX_REFUSED:
                    self.shutdown_request(request)      # takes the lock again: it is reentrant
                    return
            self.streams.add(stream)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # Called in the end whatever happened, unlike Handler.finish: here the place is given back.
        with self.condition:
            self.streams.discard(request)
            self.condition.notify_all()
        request.connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("- connection: %s", describe(sys.exc_info()[1] or Exception()))

    def leave(self) -> None:
        """Accept no more, let requests in flight finish in SHUTDOWN_TIMEOUT, close the database."""
        self.shutdown()
        self.server_close()         # waits for no thread: they are daemons, and end when we do
        with self.condition:
            for stream in self.streams:
                stream.stopping = True
                if not stream.engaged:      # wait for no more bytes; what has come is still read
                    with contextlib.suppress(OSError):
                        # Not SSLSocket's, which pulls TLS away under the thread that reads.
                        socket.socket.shutdown(stream.connection, socket.SHUT_RD)
            self.condition.wait_for(lambda: not self.streams, SHUTDOWN_TIMEOUT)
        if self.service.turn.acquire(blocking=False):       # else a batch outlasts its time
            self.service.roster.close()


# ---------------------------------------------------------------------------------------------
# The other way in: WSGI
# ---------------------------------------------------------------------------------------------

wsgi_lock = threading.Lock()        # of the one service that `application` makes


def wsgi_body(environ: Mapping[str, Any], headers: Mapping[str, str]) -> Iterator[bytes]:
    """The body as a WSGI server hands it on: up to Content-Length, or to its end if it has one."""
    read, terminated = environ["wsgi.input"].read, environ.get("wsgi.input_terminated")
    demand(terminated or "transfer-encoding" not in headers,
             "this host does not hand chunked bodies on: send a Content-Length")
    try:
        if "content-length" in headers or not terminated:
            yield from exactly(int(headers.get("content-length", "0")), read)
        else:
            yield from iter(lambda: read(PIECE), b"")
    except Exception:  # noqa: BLE001  PEP 3333 does not say what a broken connection raises
        raise Refusal("malformed_request", "the request ended before it was whole") from None


@functools.cache
def wsgi_service() -> Service:
    log_to_stderr()
    return Service(load_configuration())


def application(environ: Mapping[str, Any],
                start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The WSGI callable (PEP 3333). It reads its configuration at the first request."""
    headers = {name.removeprefix("HTTP_").replace("_", "-").lower(): str(value)
               for name, value in environ.items()
               if name.startswith("HTTP_") or name in ("CONTENT_TYPE", "CONTENT_LENGTH") and value}
    request = Request(environ.get("REMOTE_ADDR", ""), environ["REQUEST_METHOD"],
                      environ.get("PATH_INFO") or "/", headers, wsgi_body(environ, headers))
    try:
        with wsgi_lock:
            service = wsgi_service()
        response = service.handle(request)
    except CommandError as error:
        response = Response.of_refusal(request, Refusal("server_error", request_id=request.id))
        log_request(request, response._replace(error="; ".join(error.args)))
    status = f"{response.status} {http.HTTPStatus(response.status).phrase}"
    start_response(status, list(response.headers))
    return [response.body]


# ---------------------------------------------------------------------------------------------
# The pushing side
# ---------------------------------------------------------------------------------------------

ATTEMPTS = 5                        # further ones after a fault of the connection or the server
MAX_REQUESTS = 100                  # for one page, however often a server asks to wait
ANSWER_TIMEOUT = 60.0               # seconds without a byte
FINAL = ("not_implemented", "http_version_not_supported", "not_configured")   # though 5xx
ANYONE = Institution("", (), {})    # who has no lists
Row = tuple[int, object]            # its line in the file, in JSON its number; and the student


class Answer(NamedTuple):
    """What a server answered to a page."""

    status: int                     # 0: it did not
    document: Mapping[str, Any]
    retry_after: int = 0            # seconds; 0: it does not say

    def __str__(self) -> str:
        words = ": ".join(str(self.document[key]) for key in ("error", "detail")
                          if key in self.document) or "in words that are not of sis_sync"
        return f"the server answered {self.status} {words}" if self.status else words


class Push:
    """A roster on its way: pages, patience, and no page lost or sent for nothing. post: gives a
    page to a server, or to whoever judges it in its place."""

    def __init__(self, post: Callable[[Mapping[str, object]], Answer], cohort_id: str,
                 rows: Sequence[Row], stream: TextIO) -> None:
        self.post, self.cohort_id, self.rows, self.stream = post, cohort_id, rows, stream
        self.done = 0                           # rows of pages that were answered with 200
        self.counts = dict.fromkeys(("imported", "updated", "unchanged"), 0)    # as answers say
        self.rejected: list[tuple[int, str]] = []       # as rows, with what is wrong with each
        self.ignored: set[str] = set()
        self.started = time.monotonic()

    def run(self, page_size: int) -> None:
        """Send all rows, page by page. Raises CommandError where the server says no for good."""
        try:
            while self.done < len(self.rows):
                page = self.rows[self.done:self.done + page_size]
                answer = self.ask(page)
                if answer.status == 413 and len(page) > 1:
                    page_size = len(page) // 2      # of the pages to come, too
                    continue
                if not self.count(page, answer.document) or answer.status != 200:
                    raise CommandError(f"stopped: {answer}")
                self.done += len(page)
                self.show()
        finally:
            if self.stream.isatty():
                print(file=self.stream)             # what follows is not for the bar's line

    def ask(self, page: Sequence[Row]) -> Answer:
        """Send a page, again and again if that may help; the same one twice does no harm."""
        document = {COHORT.name: self.cohort_id, "students": [student for _, student in page]}
        # Jitter, so that the clients of a server that comes back don't come all at once.
        waits = [2 ** number * random.uniform(0.75, 1.25) for number in range(ATTEMPTS)]
        for _ in range(MAX_REQUESTS):
            answer = self.post(document)
            passing = answer.status in (0, 408, 429) or answer.status >= 500
            if answer.status in (429, 503) and answer.retry_after:
                seconds = float(answer.retry_after)
            elif passing and waits and answer.document.get("error") not in FINAL:
                seconds = waits.pop(0)
            else:
                break
            self.show(f", {answer.document.get('error', answer.status)}: again in {seconds:.0f} s")
            time.sleep(seconds)
        return answer

    def count(self, page: Sequence[Row], document: Mapping[str, Any]) -> bool:
        """Count an answer in. False if it has no counts; a refused batch has errors alone."""
        with contextlib.suppress(LookupError, TypeError, ValueError, OverflowError):
            self.rejected += [(page[error["row"] - 1][0], f"{error['error']}: {error['message']}")
                              for error in document["errors"]]
            for name in self.counts:
                self.counts[name] += int(document["details"][name])
            self.ignored.update(map(str, document.get("ignored", ())))
            return True
        return False

    def show(self, more: str = "") -> None:
        """How far it is: a bar on a terminal, elsewhere a line for each page."""
        speed = self.done / (time.monotonic() - self.started + 0.001)   # a clock may stand still
        text = f"{self.done:,} of {len(self.rows):,} students, {speed:,.0f}/s{printable(more)}"
        bar = "#" * (20 * self.done // len(self.rows))
        line = f"\r\x1b[K[{bar:<20}] {text}" if self.stream.isatty() else f"{text}\n"
        with contextlib.suppress(OSError):      # a push goes on when nobody looks any more
            print(line, end="", file=self.stream, flush=True)


class Client:
    """A server, as the pushing side sees it."""

    def __init__(self, url: str, secret: str, ca_file: str | None = None) -> None:
        """Raises CommandError for a URL that is none, or certificates that can't be read."""
        self.headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        try:
            parts = urllib.parse.urlsplit(url)
            self.host = str(parts.hostname or "").encode("idna").decode("ascii")
            if parts.scheme not in ("http", "https") or not self.host or parts.port == 0:
                raise ValueError
        except ValueError:
            raise CommandError(f"--url {url}: must be http:// or https://, HOST[:PORT]") from None
        self.path = urllib.parse.quote(parts.path.rstrip("/"), safe="/%") or SYNC_PATH
        kind: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=ca_file)
            except OSError as error:        # ssl.SSLError is one
                raise CommandError(f"--ca-file {ca_file}: {error.strerror or error}") from None
            kind = functools.partial(http.client.HTTPSConnection, context=context)
        elif self.host not in ("localhost", "127.0.0.1", "::1"):
            say("warning: http:// to another machine sends secret and students in clear text")
        self.connect = functools.partial(kind, parts.netloc.rpartition("@")[2],
                                         timeout=ANSWER_TIMEOUT)

    def post(self, document: Mapping[str, object]) -> Answer:
        """One request, no redirect followed. Raises CommandError if no later one would help."""
        body = json.dumps(document).encode()
        try:
            with contextlib.closing(self.connect()) as connection:
                connection.connect()
                # Who refuses it early closes while it is being sent: the answer is there to read.
                with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
                    connection.request("POST", self.path, body, self.headers)
                response = connection.getresponse()
                text = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.explain(error)
            return Answer(0, {"error": f"no answer from {self.host}", "detail": str(error)})
        answer: dict[str, Any] = {}
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            answer = dict(json.loads(text))
        target = response.headers.get("Location")
        if target:
            answer = {"error": "redirect", "detail": f"it points to {target}: push there"}
        seconds = re.fullmatch("[0-9]{1,6}", response.headers.get("Retry-After", ""))
        return Answer(response.status, answer, int(seconds[0]) if seconds else 0)

    def explain(self, error: Exception) -> None:
        """Raises CommandError for a fault of the connection that only a person can mend."""
        words = ""
        if isinstance(error, ssl.SSLCertVerificationError):
            words = f"has a certificate that does not hold: {error.verify_message}"
            if "match" not in error.verify_message:
                words += "; --ca-file names one to trust"
        elif isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            words = f"does not speak https at this port; does it speak http? ({error.reason})"
        elif isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
            words = "is a name that does not resolve; is it spelt right?"
        if words:
            raise CommandError(f"stopped: {self.host} {words}")


def judge(document: Mapping[str, Any]) -> Answer:
    """The answer of a server without lists, by the same functions; nothing is sent or stored."""
    batch = check_batch(document, ANYONE, len(document["students"]))
    return Answer(200, {"details": dict.fromkeys(("imported", "updated", "unchanged"), 0),
                        "errors": [error._asdict() for error in batch.errors],
                        "ignored": batch.ignored})


# ---------------------------------------------------------------------------------------------
# The OpenAPI document, for those who have their client generated
# ---------------------------------------------------------------------------------------------

EXAMPLE: dict[str, Any] = {COHORT.name: COHORT.example,
                           "students": [{field.name: field.example for field in FIELDS}]}
BAD_ROW = {"row": 2, "field": "email", "error": "missing_field", "message": "email required"}
# What errors carry, and what each route's 200 says and holds: as examples, whose schemas follow.
CARRIED = {"field": "cohort_id", "errors": [BAD_ROW], "max": 5000, "max_bytes": 8388608,
           "retry_after": 3, "request_id": "9c1185a5c5e9fc54"}
RESULTS: dict[str, tuple[str, list[Any]]] = {
    "sync": ("the rows are on disk; those in errors were not stored", [
        {"received": 2, "imported": 1, "details": {"imported": 1, "updated": 0, "unchanged": 0},
         "errors": [BAD_ROW], "ignored": ["firstName"]}]),
    "health": ("the database answers; a warning is for its operator", [
        {"status": "ok"}, {"status": "ok", "warning": "the disk is full"}]),
}


def schema_of(field: Field) -> dict[str, Any]:
    kind = "boolean" if field.kind is bool else "string"
    # Generators write patterns into source code, where U+2028 or U+2029 would end the line.
    rule = field.pattern.replace(SURROGATES, "").replace("\u2028\u2029\u202f", "\u2027-\u202f")
    text = {"minLength": int(field.required), "maxLength": field.longest,
            "pattern": f"^{rule}$" if field.required else f"^(?:{rule})?$"}
    return {"type": kind if field.required else [kind, "null"], "description": field.meaning,
            **(text if field.kind is str else {})}


def like(*examples: Any) -> dict[str, Any]:
    """The schema of values such as these; of objects, what all of them have is required."""
    first = examples[0]
    if first == BAD_ROW:
        return {"$ref": "#/components/schemas/RowError"}
    if isinstance(first, list):
        return {"type": "array", "items": like(first[0])}
    if not isinstance(first, dict):
        return {"type": "integer" if isinstance(first, int) else "string"}
    parts = {name: like(example[name]) for example in examples for name in example}
    if "error" in parts:
        parts["error"]["enum"] = list(dict.fromkeys(example["error"] for example in examples))
    return {"type": "object", "properties": parts, "examples": list(examples),
            "required": [name for name in parts if all(name in each for each in examples)]}


def responses(route: str) -> dict[str, Any]:
    """The answers of a route by status: 200, and each error that it can meet."""
    answers: list[Any] = [(200, *RESULTS.get(route, ("done", [{}])), [])]
    met = [error for error in ERRORS if error.only in ("", route)]
    for status, group in itertools.groupby(met, lambda error: error.status):
        errors = list(group)
        answers.append((
            status, "; ".join(f"{error.code}: {error.meaning}" for error in errors),
            [{"error": error.code, "detail": error.meaning,
              **{name: CARRIED[name] for name in error.carries}} for error in errors],
            [name for error in errors for name in error.headers]))
    return {str(status): {
        "description": words,
        "content": {"application/json": {"schema": like(*examples)}},
        "headers": {name: {"schema": {"type": "integer" if name == "Retry-After" else "string"}}
                    for name in ("X-Request-ID", *headers)}}
        for status, words, examples, headers in answers}


def openapi_document(max_students: int) -> dict[str, Any]:
    """OpenAPI 3.1 of the contract, out of the tables that the code checks with. What it accepts the
    server accepts, but for half surrogates; patterns are plain, as Go and generators need them."""
    student = {"type": "object", "properties": {field.name: schema_of(field) for field in FIELDS},
               "required": [field.name for field in FIELDS if field.required],
               "description": "The whole record: a field left out, or blank, becomes null. White "
               "space around a string is stripped first; half of a surrogate pair is refused."}
    batch = {"type": "object", "required": list(EXAMPLE), "examples": [EXAMPLE], "properties": {
        COHORT.name: schema_of(COHORT),
        "students": {"type": "array", "items": {"$ref": "#/components/schemas/Student"},
                     "maxItems": max_students, "description": f"each {KEY.name} once"}}}
    row_error = {"type": "object", "required": list(BAD_ROW), "properties": {
        "row": {"type": "integer", "minimum": 1}, "field": {"type": ["string", "null"]},
        "error": {"type": "string", "enum": list(ROW_ERRORS)}, "message": {"type": "string"}}}
    posted = {"security": [{"secret": []}], "requestBody": {
        "required": True, "description": "UTF-8, plain or Content-Encoding: gzip; or chunked.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Batch"}}}}}
    return {
        "openapi": "3.1.0", "servers": [{"url": "/"}],
        "info": {"title": "sis_sync", "version": __version__,
                 "license": {"name": "MIT", "identifier": "MIT"}, "description":
                 "An institution may send requests_per_minute, 20 by default; then it gets 429."},
        "paths": {path: {method.lower(): {
            "operationId": answer.__name__, "summary": summary,
            "responses": responses(answer.__name__),
            **(posted if method == "POST" else {"security": []})}}
            for path, (method, answer, summary) in ROUTES.items()},
        "components": {"securitySchemes": {"secret": {"type": "http", "scheme": "bearer"}},
                       "schemas": {"Student": student, "Batch": batch, "RowError": row_error}},
    }


# ---------------------------------------------------------------------------------------------
# Roster files: CSV as it is found, OneRoster's users.csv, JSON
# ---------------------------------------------------------------------------------------------

# OneRoster 1.1 and 1.2 (1EdTech), users.csv: which column becomes which field. sourcedId is the one
# that is always there; `--map student_id_ext=identifier` takes the number that people read.
ONEROSTER = {"student_id_ext": "sourcedId", "email": "email", "first_name": "givenName",
             "last_name": "familyName"}
BOOLEANS = {"": None, "true": True, "yes": True, "y": True, "t": True, "1": True,
            "false": False, "no": False, "n": False, "f": False, "0": False}
MAX_CELL_LINES = 10                 # more is a quote that was not meant to open a cell
NO_CSV = {rb"\xff\xfe|\xfe\xff|.?\0": "UTF-16",     # with its mark or without
          rb"PK\x03\x04|\xd0\xcf\x11\xe0": "an Excel workbook"}


def read_roster(path: str, mapping: Mapping[str, str],
                encoding: str = "") -> tuple[str, list[Row], list[tuple[int, str]]]:
    """Read a file, or standard input for "-": what its numbers count, the rows, each with its
    number, and those that are no students, with what is wrong. Raises OSError, CommandError."""
    data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
    for pattern, kind in NO_CSV.items():
        if re.match(pattern, data, re.DOTALL):
            raise CommandError(f"{path}: is {kind}; save it as \"CSV UTF-8\"")
    if not re.match(rb"[\xef\xbb\xbf\s]*[\[{]", data):
        return read_csv(path, data, mapping, encoding)
    try:                                            # an array of students, or a request body
        document = parse_json(bytearray(data))
    except Refusal as refusal:
        raise CommandError(f"{path}: {refusal.detail.partition(': send')[0]}") from None
    students = document.get("students") if isinstance(document, dict) else document
    if not isinstance(students, list):
        raise CommandError(f"{path}: must be an array of students, or have one in students")
    return "item", list(enumerate(students, 1)), []


def read_csv(path: str, data: bytes, mapping: Mapping[str, str],
             encoding: str) -> tuple[str, list[Row], list[tuple[int, str]]]:
    """Read a CSV, or a OneRoster users.csv: students only. Raises CommandError."""
    header, records = read_table(path, data, encoding)
    names = set(map(folded, header))
    oneroster = {"sourcedid", "givenname", "familyname"} <= names
    students = read_roles(path) if oneroster and "role" not in names else None
    columns = find_columns(path, header, {**(ONEROSTER if oneroster else {}), **mapping})
    rows: list[Row] = []
    faults = []
    left_out: collections.Counter[str] = collections.Counter()
    for line, record in records:
        if students is not None:
            record["role"] = "student" if record["sourcedid"] in students else "another"
        reason = why_left_out(record) if oneroster else ""
        if reason:
            left_out[reason] += 1
            continue
        student = student_of(record, columns)
        if isinstance(student, str):
            faults.append((line, student))
        else:
            rows.append((line, student))
    say(*(f"left out: {number:,} rows that are {reason}" for reason, number in left_out.items()))
    return "line", rows, faults


def read_table(path: str, data: bytes, encoding: str,
               ) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """The header of a CSV, and its records by folded header, each with the line it begins on; under
    "" is what stands beyond the header. Strict: else a stray quote takes all up to the next one
    into its cell, a whole roster perhaps, without a word. Raises CommandError."""
    lines = io.StringIO(decoded(path, data, encoding), newline="").readlines()
    lines[:1] = [re.sub(r"\Asep=.\s*\Z", "\n", line) for line in lines[:1]]       # Excel's
    # The delimiter is the one that stands most often in the header, outside quotes.
    first = re.sub(r'"[^"]*"', "", next(filter(str.strip, lines), ""))
    parser = csv.reader(lines, delimiter=max(",;\t", key=first.count), strict=True,
                        skipinitialspace=True)
    records, line = [], 1
    try:
        for cells in parser:
            if parser.line_num - line > MAX_CELL_LINES and any(
                    len(cell.splitlines()) > MAX_CELL_LINES for cell in cells):
                raise csv.Error(f"a cell of over {MAX_CELL_LINES} lines")
            cells = [cell.strip(WHITE_SPACE) for cell in cells]
            while cells and not cells[-1]:          # Excel adds some, or leaves them away
                cells.pop()
            if cells:
                records.append((line, cells))
            line = parser.line_num + 1
    except csv.Error as error:
        raise CommandError(f"{path}: line {line}: {error}: is there a quote too many, or one too "
                           "few?") from None
    if not records:
        raise CommandError(f"{path}: is empty; it must begin with a header")
    _, header = records.pop(0)
    names = [folded(cell) or "nameless" for cell in header]
    return header, ((line, dict(itertools.zip_longest(names, cells, fillvalue="")))
                    for line, cells in records)


def decoded(path: str, data: bytes, stated: str) -> str:
    """Raises CommandError for a file that is in no encoding, in two, or not in the stated one."""
    try:
        return data.decode("cp1252" if stated == "cp1252" else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
    if stated:
        raise CommandError(f"{path}: line {line} is not {stated}")
    if not data.decode("utf-8", "ignore").isascii():
        raise CommandError(f"{path}: line {line} is not UTF-8, but others are: mend it, or say "
                           "which it is with --encoding cp1252")
    say(f"warning: {path} is not UTF-8, so read as Windows-1252: see that names come out right")
    return decoded(path, data, "cp1252")


def find_columns(path: str, header: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """The folded header of each field that has a column. Raises CommandError with all faults."""
    names = [folded(cell) for cell in header]
    wanted = {**dict(zip(NAMES, NAMES)), **mapping}
    needed = {*mapping, *(field.name for field in FIELDS if field.required)}
    found = {name: names.count(folded(cell)) for name, cell in wanted.items()}
    faults = [f"{path}: must have one column {wanted[name]!r}, and has {found[name]}"
              for name in NAMES if found[name] > 1 or not found[name] and name in needed]
    if faults:
        raise CommandError(*faults, f"{path}: its header has: {', '.join(header)}",
                           "where a column has another name: --map FIELD=HEADER")
    columns = {name: folded(cell) for name, cell in wanted.items() if found[name]}
    missing = [name for name in NAMES if name not in columns]
    unused = [repr(cell) for cell in header if folded(cell) not in columns.values()]
    if missing:
        say(f"no column for {', '.join(missing)}: it will be null for every student")
    if unused:
        say(f"not used: {len(unused)} columns: {', '.join(unused)}")
    return columns


def student_of(record: Mapping[str, str], columns: Mapping[str, str]) -> Document | str:
    """A record as a student, or what is wrong with it that only the file shows."""
    student: dict[str, Any] = {name: record[column] for name, column in columns.items()}
    if "" in record:
        return "wrong_columns: more columns than the header has"
    # What Excel makes of a long number: its last digits are lost for good.
    if re.fullmatch(r"[0-9]([.,][0-9]+)?[Ee]\+[0-9]{2,}", student[KEY.name]):
        return f"scientific_notation: {KEY.name} is a number as a spreadsheet shortens it: " \
               "format the column as text, export again"
    for name in [field.name for field in FIELDS if field.kind is bool and field.name in columns]:
        word = student[name].casefold()
        if word not in BOOLEANS:
            words = ", ".join(filter(None, BOOLEANS))
            return f"invalid_field: {name} must be empty or one of {words}"
        student[name] = BOOLEANS[word]
    return student


def read_roles(path: str) -> set[str] | None:
    """Who is a student by the roles.csv of OneRoster 1.2, if there is one beside users.csv."""
    roles = pathlib.Path(path).with_name("roles.csv")
    if path == "-" or not roles.exists():
        say("no roles: everybody is taken for a student; put roles.csv beside it if some are not")
        return None
    _, records = read_table(str(roles), roles.read_bytes(), "")
    return {record.get("usersourcedid", "") for _, record in records if not why_left_out(record)}


def why_left_out(record: Mapping[str, str]) -> str:
    """Of OneRoster's users, or roles; "" for a student."""
    if record.get("status", "").lower() == "tobedeleted":
        return "to be deleted"
    return "" if record.get("role", "student").lower() == "student" else "no students"


# ---------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------

Arguments = argparse.Namespace
HANGUP = getattr(signal, "SIGHUP", None)    # Windows has none


def printable(text: str) -> str:
    """Words from elsewhere, without what steers a terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def say(*lines: str) -> None:
    """What a person reads; stdout is for data. Nobody reading it is no reason to stop."""
    with contextlib.suppress(OSError):
        for line in lines:
            print(printable(line), file=sys.stderr, flush=True)


def configuration_for(arguments: Arguments) -> Configuration:
    return load_configuration(arguments.config, overrides={
        key: value for key, value in vars(arguments).items() if key in ("host", "port")})


def log_to_stderr() -> None:
    """Each line begins with the time, in UTC, as ISO 8601 has it."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.handlers[:] = [handler]
    log.propagate = False


def command_serve(arguments: Arguments) -> int:
    """Run the server until SIGTERM or Ctrl-C."""
    log_to_stderr()
    service = Service(configuration_for(arguments))
    on_terminal, signals, server = os.isatty(0), incoming_signals(), Server(service)
    log.info("sis_sync %s listens on %s%s", __version__, server.url, SYNC_PATH)
    log.info("configuration: %s", service.configuration.source or "defaults, as there is no file")
    log.info("database: %s", service.roster.path)
    while server.accepting.is_alive():
        with contextlib.suppress(queue.Empty):
            number = signals.get(timeout=1)     # without, Ctrl-C would not end it on Windows
            # A terminal that closes sends SIGHUP, too, and is no terminal any more.
            if number != HANGUP or on_terminal and not os.isatty(0):
                break
            reload(service, arguments)
    else:
        log.critical("nothing is accepted any more: the end")
        return 1
    log.info("stopping; a second signal stops at once")
    server.leave()
    log.info("stopped")
    return 0


def incoming_signals() -> queue.SimpleQueue[int]:
    """As they come. Nothing more is done where one strikes: that may be in the middle of anything.
    But the second one to stop has its usual effect: the end."""
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def receive(number: int, frame: object) -> None:
        for stop in (signal.SIGTERM, signal.SIGINT) if number != HANGUP else ():
            signal.signal(stop, signal.SIG_DFL)
        signals.put(number)

    for number in filter(None, (signal.SIGTERM, signal.SIGINT, HANGUP)):
        signal.signal(number, receive)
    return signals


def reload(service: Service, arguments: Arguments) -> None:
    """Read the file again. A faulty one changes nothing."""
    old = service.configuration
    try:
        new = configuration_for(arguments)
        if old.source and not new.source:
            raise CommandError(f"{old.source} is not there any more")
    except Exception as error:  # noqa: BLE001  no file, however odd, stops a running server
        for fault in error.args if isinstance(error, CommandError) else [describe(error)]:
            log.error("not reloaded: %s", fault)
        return
    service.configuration = new if bool(new.tls) == bool(old.tls) else new._replace(tls=old.tls)
    log.info("reloaded; another host, port, database, from http to https or back takes a restart")


def command_secret(arguments: Arguments) -> int:
    """Print a new secret and its line for sis_sync.ini, or with --hash the line alone."""
    if arguments.hash:
        secret = check_secret("standard input", sys.stdin.buffer.readline())
    else:
        secret = b"sis_" + secrets.token_urlsafe(32).encode()
        print(secret.decode())
        say("above: the secret, which is kept nowhere; below: for secrets = in sis_sync.ini")
    print("sha256:" + hashlib.sha256(secret).hexdigest())
    return 0


def command_check(arguments: Arguments) -> int:
    """Say all that is wrong with the configuration and the database, as a start would."""
    log.handlers.clear()                # then warnings, and no more, go to stderr
    try:
        configuration = configuration_for(arguments)
        faults = check_database(configuration.settings["database"])
    except CommandError as error:
        faults = [*error.args]
    print(*faults or [f"{configuration.source or 'defaults'}: good"], sep="\n")
    return bool(faults)


def check_database(path: str) -> list[str]:
    """What would keep a start from using this database; nothing is changed, or created."""
    place = path if os.path.exists(path) else os.path.dirname(path)
    usable = os.access(place, os.R_OK | os.W_OK)
    if place != path or not usable:
        return [] if usable else [f"{place}: must be there, readable and writable"]
    try:
        with read_only(path) as connection:
            found = [row[0] for row in connection.execute("PRAGMA quick_check")]
    except CommandError as error:
        return list(error.args)
    return [f"{path}: {line}" for line in found if line != "ok"]


@contextlib.contextmanager
def read_only(path: str, migrated: bool = False) -> Iterator[sqlite3.Connection]:
    """A database, read-only, whether a server runs on it or not. Raises CommandError."""
    try:
        with contextlib.closing(open_database(path, read_only=True)) as connection:
            if schema_version(connection) < max(MIGRATIONS) and migrated:
                raise CommandError(f"{path}: is of an older version: start the server once")
            yield connection
    except sqlite3.Error as error:
        words = error if os.path.exists(path) else "there is no database yet; a start makes it"
        raise CommandError(f"{path}: {words}") from error


def command_push(arguments: Arguments) -> int:
    """Send a file to a server, as the roster of one cohort."""
    unit, rows, faults = read_roster(arguments.file, dict(arguments.map), arguments.encoding)
    if not rows and not faults:
        say(f"{arguments.file}: no students, so nothing is sent")
        return 1
    post = judge
    if not arguments.dry_run:
        if not arguments.url:
            raise CommandError("push takes --url URL, or --dry-run")
        secret = read_secret(arguments.secret_file).decode("latin-1")
        post = Client(arguments.url, secret, arguments.ca_file).post
    push = Push(post, arguments.cohort, rows, sys.stderr)
    push.rejected += faults
    status = 0
    try:
        push.run(arguments.batch)
    except (CommandError, Refusal, RecursionError) as error:
        say(f"sis_sync: {error}")
        status = 2
    except KeyboardInterrupt:
        status = 130
    report(push, unit, arguments.dry_run)
    return status or bool(push.rejected)


def report(push: Push, unit: str, dry_run: bool) -> None:
    """The end of a push: the counts, every rejected row with its line, and what to do next."""
    counts = "" if dry_run else ("new {imported:,}, updated {updated:,} (of these unchanged "
                                 "{unchanged:,}), ").format_map(push.counts)
    told = [f"cohort {push.cohort_id}: {push.done:,} of {len(push.rows):,} students "
            + ("checked" if dry_run else "sent"), f"  {counts}rejected {len(push.rejected):,}"]
    if push.ignored:
        told.append(f"  ignored, as they are no fields: {', '.join(sorted(push.ignored))}")
    told += [f"  {unit} {number}: {fault}" for number, fault in sorted(push.rejected)]
    print(*map(printable, told), "To push the whole file again is safe, however often.", sep="\n")


def command_export(arguments: Arguments) -> int:
    """Write the roster of one cohort as CSV, the way push takes it back."""
    with read_only(configuration_for(arguments).settings["database"], migrated=True) as connection:
        rosters = connection.execute("SELECT institution, cohort_id FROM rosters").fetchall()
        meant = [(name, cohort) for name, cohort in rosters
                 if arguments.institution in (None, name) and arguments.cohort in (None, cohort)]
        if len(meant) != 1:
            raise CommandError("choose a roster:" if rosters else "nothing has been pushed yet", *(
                f"  --institution {name} --cohort {cohort}" for name, cohort in sorted(rosters)))
        rows = connection.execute(
            f"SELECT {', '.join(NAMES)} FROM roster WHERE institution = ? AND cohort_id = ? "
            f"AND seen < ? ORDER BY {KEY.name}", (*meant[0], arguments.not_seen_since or "9999"))
        with new_file(arguments.output) if arguments.output else \
                contextlib.nullcontext(sys.stdout) as file:
            if arguments.excel:
                file.write("\ufeff")           # without it, Excel takes UTF-8 for something else
            writer = csv.writer(file)
            writer.writerow(NAMES)
            for row in rows:
                cells = [{None: "", 0: "false", 1: "true"}.get(value, value) for value in row]
                if arguments.excel:     # it runs as a formula what begins so (CWE-1236)
                    cells = [f"'{cell}" if cell[:1] in tuple("=+-@") else cell for cell in cells]
                writer.writerow(cells)
    return 0


def new_file(path: str) -> TextIO:
    """A new file, for its owner alone; line ends are left to csv. Raises OSError."""
    return open(path, "x", encoding="utf-8", newline="",
                opener=functools.partial(os.open, mode=0o600))


def command_history(arguments: Arguments) -> int:
    """List the latest syncs, or with --stale the institutions that have gone quiet."""
    configuration = configuration_for(arguments)
    with read_only(configuration.settings["database"], migrated=True) as connection:
        if arguments.stale is not None:
            names = [institution.name for institution in configuration.institutions]
            return stale(connection, names, arguments.stale)
        rows = connection.execute(f"SELECT {', '.join(HISTORY)} FROM history "
                                  "ORDER BY sync_id DESC LIMIT 20").fetchall()
    if arguments.json:
        print(json.dumps([{**dict(zip(HISTORY, row)), "errors": json.loads(row[-1])}
                          for row in rows]))
        return 0
    table = [[printable(str(cell)) for cell in row[:-1]] for row in (HISTORY, *rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells, errors in zip(table, ["[]", *(row[-1] for row in rows)]):
        print(" ".join(map(str.ljust, cells, widths)).rstrip())
        for error in json.loads(errors) if arguments.errors else ():
            print(printable(f"    row {error['row']}: {error['error']}: {error['message']}"))
    return 0


def stale(connection: sqlite3.Connection, names: Iterable[str], hours: float) -> int:
    """1, and a line each, if a last sync is older than that, or as far in the future; else 0."""
    # By arrival, so that a clock that was wrong once hides nobody: the last of each stays.
    last = dict(connection.execute("SELECT institution, time FROM history ORDER BY sync_id"))
    since, until = (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
                    for seconds in (-hours * 3600, hours * 3600))
    quiet = [name for name in names if not since <= (last.get(name) or "") <= until]
    for name in quiet:
        print(f"{name}: last sync {last.get(name, 'never')}")
    return 1 if quiet else 0


def command_backup(arguments: Arguments) -> int:
    """Copy the database as it is at one moment, while the server goes on."""
    with read_only(configuration_for(arguments).settings["database"]) as source:
        new_file(arguments.file).close()
        try:
            with contextlib.closing(sqlite3.connect(arguments.file)) as target:
                source.backup(target)
        except BaseException:
            os.remove(arguments.file)       # half a copy must not pass for one
            raise
    faults = check_database(arguments.file)
    say(*faults, f"{arguments.file}: " + ("a copy of a damaged database" if faults else "good"))
    return 1 if faults else 0


def command_demo(arguments: Arguments) -> int:
    """Show the whole of it on made-up data: a throw-away server, pushes, and what goes wrong."""
    secret = "sis_" + secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="sis_sync-") as folder:
        ini = pathlib.Path(folder, "sis_sync.ini")
        ini.write_text("[server]\nport = 0\n")
        service = Service(load_configuration(str(ini), {"SIS_SYNC_SECRET": secret}))
        server = Server(service)
        print(f"A throw-away server at {server.url}, its database in {folder} till the end\n")
        demo_steps(server.url, secret)
        print("\nTo try it while the server runs, until you press Ctrl-C:\n"
              f"  curl {server.url}{SYNC_PATH} -H 'Authorization: Bearer {secret}' \\\n"
              f"    -H 'Content-Type: application/json' -d '{json.dumps(EXAMPLE)}'", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while not arguments.once:
                time.sleep(3600)
        server.leave()
    return 0


def demo_steps(url: str, secret: str) -> None:
    """Each step, and in the end all of them in a table."""
    table = []
    students = [{**EXAMPLE["students"][0], KEY.name: f"U{index * 7919 % 1_000_003}",  # in no order
                 "email": f"student{index}@example.edu.au"} for index in range(12_000)]
    for title in ("12,000 students in pages of 5,000", "The same again"):
        print(f"{title}:")
        push = Push(Client(url, secret).post, "2026", list(enumerate(students, 1)), sys.stdout)
        push.run(5000)
        table.append((title, 200, "{imported:,} new, {updated:,} updated, {unchanged:,} unchanged"
                      .format_map(push.counts)))
    for title, token, rows, times in (
            ("A bad row is reported, the good one kept", secret, [EXAMPLE["students"][0], {}], 1),
            ("A wrong secret", "not the secret", [], 1),
            ("5,001 students at once", secret, students[:5001], 1),
            ("More than 20 requests in a minute", secret, [], 20)):     # there were some before
        for _ in range(times):
            answer = Client(url, token).post({"cohort_id": "2026", "students": rows})
        print(f"{title}:\n  {answer.status} {json.dumps(answer.document)}")
        rejected = f"{len(answer.document.get('errors', ()))} rejected"
        table.append((title, answer.status, answer.document.get("error", rejected)))
    print("", *("  {:<42} {}  {}".format(*line) for line in table), sep="\n")


DATE = reader("a date, YYYY-MM-DD", str, "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])")
HOURS = reader("a number of hours", float, r"[0-9]{1,6}(\.[0-9]{1,6})?")
MAPPING = reader("FIELD=HEADER, FIELD being one of " + ", ".join(NAMES),
                 lambda text: text.split("=", 1), f"(?s)({'|'.join(NAMES)})=.+")
FLAG = {"action": "store_true"}
NO_DEFAULT = {"default": argparse.SUPPRESS}     # so that it may stand before `serve`, or without it
# A function, and its options: name, help, and what else argparse is to know.
COMMANDS: dict[str, tuple[Callable[[Arguments], int], Any]] = {
    "serve": (command_serve, (
        ("--host", "instead of the configured one", {"type": ADDRESS, **NO_DEFAULT}),
        ("--port", "likewise; 0: any free port", {"type": whole_number(0, 65535), **NO_DEFAULT}))),
    "demo": (command_demo, (("--once", "end when all is shown", FLAG),)),
    "secret": (command_secret, (("--hash", "make the line of a secret on standard input", FLAG),)),
    "check": (command_check, ()),
    "push": (command_push, (
        ("file", "CSV, OneRoster users.csv or JSON; -: standard input", {}),
        ("--url", "of the server, such as https://sync.example.edu", {}),
        ("--cohort", "the cohort_id of the roster", {"required": True}),
        ("--secret-file", "where the secret is; else in the environment's SIS_SYNC_SECRET", {}),
        ("--map", "FIELD=HEADER; repeatable", {"type": MAPPING, "action": "append", "default": []}),
        ("--encoding", "of a CSV", {"choices": ("utf-8", "cp1252"), "default": ""}),
        ("--dry-run", "check every row, if not against the server's lists, and send nothing", FLAG),
        ("--batch", "students in a page", {"type": whole_number(1, 5000), "default": 5000}),
        ("--ca-file", "certificates to trust, in PEM", {}))),
    "export": (command_export, (
        ("--institution", "whose; needed if there are several", {}),
        ("--cohort", "which; needed if there are several", {}),
        ("--output", "a new file, instead of standard output", {}),
        ("--not-seen-since", "only who has been in no sync since YYYY-MM-DD (UTC)", {"type": DATE}),
        ("--excel", "with a BOM, and no cell that a spreadsheet would run", FLAG))),
    "history": (command_history, (
        ("--errors", "with the rejected rows of each", FLAG),
        ("--json", "as JSON", FLAG),
        ("--stale", "exit 1, naming those who sent nothing for so many hours", {"type": HOURS}))),
    "backup": (command_backup, (("file", "the copy; it must not exist", {}),)),
}


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sis_sync.py", description="A school's roster, pushed "
                                     "over HTTP and kept in SQLite. Without a command: serve.")
    parser.add_argument("--version", action="version", version=f"sis_sync {__version__}")
    parser.add_argument("--config", help="the file; else SIS_SYNC_CONFIG says, else sis_sync.ini")
    parser.set_defaults(command=command_serve)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (function, options) in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(command=function)
        for takes in (command, parser) if name == "serve" else (command,):
            for option, words, keywords in options:
                takes.add_argument(option, help=words, **keywords)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """The command line. The exit status: 0 well, 1 the work found faults, 2 it can't be done."""
    for name in ("stdin", "stdout", "stderr"):
        # Whoever started us may have closed it; and a Windows console may not know every letter.
        stream = getattr(sys, name) or open(os.devnull, "r+", encoding="utf-8")  # noqa: SIM115
        if name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="")
        setattr(sys, name, stream)
    log.handlers[:] = [logging.NullHandler()]       # a command that needs a log says where
    try:
        arguments = argument_parser().parse_args(words)
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except (CommandError, sqlite3.Error) as error:
        say(*(f"sis_sync: {line}" for line in error.args))
    except OSError as error:
        # Of stdout, say: the interpreter must not complain about it once more at exit.
        with contextlib.suppress(OSError):      # a stdout may be none of the system's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            say(f"sis_sync: {error.filename}: {error.strerror}" if error.filename else
                f"sis_sync: {error}")
    return 2


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""sis_sync: a school's roster, pushed over HTTP and kept in SQLite. One file, only Python.

A student information system (SIS) pushes its students; the server proves who is calling, checks
every row and keeps the good ones, so that the same push can be repeated for ever without harm.

    $ export SIS_SYNC_SECRET=$(python3 sis_sync.py secret | head -n 1)
    $ python3 sis_sync.py &

    $ curl http://127.0.0.1:8080/api/sis/sync -H "Authorization: Bearer $SIS_SYNC_SECRET" \\
        -H "Content-Type: application/json" \\
        -d '{"cohort_id": "2026", "students": [{"student_id_ext": "U1", "email": "a@b.edu"}]}'
    {"received": 1, "imported": 1, "details": {"imported": 1, "updated": 0, "unchanged": 0}, ...}

Limits, each of them a setting: 5,000 students and 8 MiB a request, 20 requests a minute for each
client, 256 connections at once, 30 seconds for a request to arrive. One process, one writer, one
database on a local disk. It stores what it is sent and deletes nothing.

It reads from top to bottom: the contract as tables, the configuration, who is calling, what was
sent, what is kept, the answer, the wire, the pushing side, the commands.
"""

from __future__ import annotations

import argparse
import calendar
import codecs
import configparser
import contextlib
import csv
import difflib
import email.utils
import functools
import gzip
import hashlib
import hmac
import http
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default_of
from re import Pattern
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, TextIO

if TYPE_CHECKING:                   # where X | Y may stand outside annotations before Python 3.10
    Address = ipaddress.IPv4Address | ipaddress.IPv6Address
    Network = ipaddress.IPv4Network | ipaddress.IPv6Network
    Value = str | int | None        # a boolean as 0 or 1
    Record = tuple[Value, ...]      # a row that keeps the rules: its values in the order of FIELDS
    Student = Mapping[str, object]
    Headers = tuple[tuple[str, str], ...]

__version__ = "1.0.0"


# ---------------------------------------------------------------------------------------------
# The contract as data: fields, errors, settings. Everything below follows from these tables.
# ---------------------------------------------------------------------------------------------

class Field(NamedTuple):
    """A field of the request: its rule, its column, its schema and its CSV header in one line."""

    name: str
    kind: type                      # str or bool
    required: bool
    shortest: int                   # characters, counted after stripping
    longest: int
    spaces: bool                    # whether white space may stand inside
    pattern: Pattern[str] | None
    listed: str                     # the institution's list that a value must be in, if any
    meaning: str


# RFC 5322 allows far more than a school uses; what matters here is that there is one address, and
# that it can't be mistaken for two. RFC 5321 section 4.5.3.1.3 is where 254 comes from.
EMAIL = re.compile(r"[^@]+@[^@]+")

COHORT = Field("cohort_id", str, True, 1, 64, True, None, "cohorts", "the roster that is pushed")

# The first field is the one that an entry is known by: it is unique in a batch.
FIELDS = (
    Field("student_id_ext", str, True, 1, 255, True, None, "", "the student's number in the SIS"),
    Field("email", str, True, 3, 254, False, EMAIL, "",
          "an e-mail address: something, one @, something, no white space"),
    Field("first_name", str, False, 1, 255, True, None, "", "given name"),
    Field("last_name", str, False, 1, 255, True, None, "", "family name"),
    Field("program_code", str, False, 1, 255, True, None, "programs", "the program of study"),
    Field("campus_name", str, False, 1, 255, True, None, "campuses", "the campus"),
    Field("first_in_family", bool, False, 0, 0, True, None, "", "first of the family to study"),
)
KEY = FIELDS[0]
NAMES = tuple(field.name for field in FIELDS)

# A list of an institution, and the error of a value that is not in it.
LISTS = {"cohorts": "unknown_cohort", "programs": "unknown_program", "campuses": "unknown_campus"}

ROW_ERRORS = {
    "missing_field": "a required field is absent, null or blank",
    "invalid_field": "a value breaks its field's rule",
    "duplicate_student": "the same student_id_ext stood higher up in the batch",
    "not_an_object": "an item of students is not an object",
    "unknown_program": "program_code is not in the institution's list",
    "unknown_campus": "campus_name is not in the institution's list",
}


class Problem(NamedTuple):
    """An error of a whole request, as its answer tells it."""

    code: str                       # stable: what a client switches on
    status: int
    meaning: str
    carries: tuple[str, ...] = ()   # what the answer holds besides error and detail


ERRORS = (
    Problem("malformed_request", 400, "the request is not HTTP as RFC 9112 has it"),
    Problem("malformed_json", 400, "the body is not JSON in UTF-8"),
    Problem("missing_field", 400, "cohort_id or students is absent, null or blank", ("field",)),
    Problem("invalid_field", 400, "the body, cohort_id or students breaks its rule", ("field",)),
    Problem("unknown_cohort", 400, "cohort_id is not in the institution's list"),
    Problem("invalid_rows", 400, "rows have faults and bad_rows is reject", ("errors",)),
    Problem("unauthorized", 401, "the Authorization header holds no valid secret"),
    Problem("not_found", 404, "there is nothing at this path"),
    Problem("method_not_allowed", 405, "the path does not take this method"),
    Problem("request_timeout", 408, "the request did not arrive in time"),
    Problem("batch_too_large", 413, "too large: send smaller batches", ("max", "max_bytes")),
    Problem("request_too_large", 414, "the request line is too long"),
    Problem("unsupported_media_type", 415, "the body must be application/json, plain or gzip"),
    Problem("rate_limited", 429, "too many requests: wait", ("retry_after",)),
    Problem("request_too_large", 431, "the headers are too long"),
    Problem("server_error", 500, "a fault of the server, told in its log", ("request_id",)),
    Problem("not_implemented", 501, "the method or the transfer coding is unknown"),
    Problem("not_configured", 503, "no institution has a secret set"),
    Problem("busy", 503, "the server is busy: try again", ("retry_after",)),
    Problem("unhealthy", 503, "the database does not answer"),
    Problem("http_version_not_supported", 505, "only HTTP/1.0 and HTTP/1.1 are spoken"),
)


class Kind(NamedTuple):
    """How the text of a setting is read. `read` raises ValueError for what is not allowed."""

    allowed: str
    read: Callable[[str], Any]


def whole_number(low: int, high: int) -> Kind:
    """A number in ASCII digits: int() alone would take '+5', '5_000' and Arabic digits."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return Kind(f"a whole number from {low} to {high}", read)


def read_choice(text: str) -> str:
    if text not in ("skip", "reject"):
        raise ValueError
    return text


def read_path(text: str) -> str:
    # configparser takes an indented line for more of the value above it.
    if FORBIDDEN.search(text):
        raise ValueError
    return text


def read_needed_path(text: str) -> str:
    if not text:
        raise ValueError
    return read_path(text)


def read_list(text: str) -> frozenset[str]:
    items = [item.strip() for item in re.split(r"[,\n]", text)]
    if any(re.match(r"[a-z_]+\s*=", item) for item in items):      # an indented key, see read_path
        raise ValueError
    return frozenset(filter(None, items))


def read_networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(item) for item in re.split(r"[,\s]+", text) if item)


def read_secrets(text: str) -> tuple[str, ...]:
    if not all(map(SECRET_SOURCE.fullmatch, text.split())):
        raise ValueError
    return tuple(text.split())


SECRET_SOURCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|file:[^\s\0]+|sha256:[0-9A-Fa-f]{64}")

ADDRESS = Kind("an IP address, such as 127.0.0.1 or 0.0.0.0; names are not looked up",
               lambda text: str(ipaddress.ip_address(text)))
FILE = Kind("the path of a file", read_needed_path)
FILE_OR_NONE = Kind("the path of a file, or nothing", read_path)
NETWORKS = Kind("addresses or networks, such as 10.0.0.0/8, or nothing", read_networks)
NAMES_LIST = Kind("values with commas or line ends between, or nothing for any", read_list)
CHOICE = Kind("skip or reject", read_choice)
SECRETS = Kind("env:NAME, file:PATH and sha256: with 64 hex digits, white space between them, "
               "never the secret itself", read_secrets)


class Setting(NamedTuple):
    """A key of sis_sync.ini."""

    section: str
    key: str
    default: str
    kind: Kind
    meaning: str


SETTINGS = (
    Setting("server", "host", "127.0.0.1", ADDRESS,
            "The address to listen on. 127.0.0.1: this machine only. 0.0.0.0 or :: for all."),
    Setting("server", "port", "8080", whole_number(0, 65535),
            "The port to listen on. 0: any free one."),
    Setting("server", "database", "sis_sync.db", FILE,
            "The database, on a local disk: SQLite's locks are not safe on a network share."),
    Setting("server", "tls_certificate", "", FILE_OR_NONE,
            "The certificate chain in PEM. Set, the server speaks https and nothing else."),
    Setting("server", "tls_key", "", FILE_OR_NONE,
            "The certificate's private key in PEM, where it is not in the same file."),
    Setting("server", "trusted_proxies", "", NETWORKS,
            "Proxies whose X-Forwarded-For is believed, as addresses or networks."),
    Setting("limits", "requests_per_minute", "20", whole_number(1, 100_000),
            "Of one client; also how many it may send in one burst."),
    Setting("limits", "max_students", "5000", whole_number(1, 100_000),
            "Students in one request."),
    Setting("limits", "max_body_bytes", "8388608", whole_number(1024, 1 << 30),
            "Bytes in one body, after decompression."),
    Setting("limits", "max_connections", "256", whole_number(1, 10_000),
            "Connections at once. Each has a thread."),
    Setting("limits", "max_connections_per_client", "32", whole_number(1, 10_000),
            "Connections at once from one address (IPv6: one /64), trusted proxies excepted."),
    Setting("limits", "request_timeout", "30", whole_number(1, 3600),
            "Seconds for a whole request to arrive, and again for its answer to be read."),
    Setting("institution", "secrets", "env:SIS_SYNC_SECRET", SECRETS,
            "Its secrets: env:NAME, file:PATH or sha256:HEX; several with white space between."),
    Setting("institution", "cohorts", "", NAMES_LIST,
            "The cohort_id values it may push. Empty: any."),
    Setting("institution", "programs", "", NAMES_LIST,
            "The program_code values it may send. Empty: any."),
    Setting("institution", "campuses", "", NAMES_LIST,
            "The campus_name values it may send. Empty: any."),
    Setting("institution", "bad_rows", "skip", CHOICE,
            "skip: import the good rows of a batch. reject: one bad row refuses the whole batch."),
)

# RFC 9112 section 3 recommends at least 8,000 bytes for a request line. Headers: Node takes 16 KiB
# in all, Apache 100 lines.
MAX_REQUEST_LINE = 8 * 1024         # bytes
MAX_HEAD = 16 * 1024                # bytes, request line and headers
MAX_HEADERS = 100                   # lines
MAX_CHUNK_LINE = 256                # bytes, extensions included
MAX_NUMBER = 1000                   # digits; int() takes time in the square of them
MAX_BUCKETS = 100_000               # clients that the rate limiter remembers: about 15 MB
PIECE = 256 * 1024                  # bytes read at once, at most; never what a length promises
BUSY_TIMEOUT = 5.0                  # seconds to wait for the database's lock
MAX_REFUSED = 100                   # connections told busy that are still being listened to
REFUSED_SECONDS = 2.0               # how long they are, so that the answer gets through
BUSY_RETRY_AFTER = 5                # seconds that a client is asked to wait for it
SHUTDOWN_TIMEOUT = 10.0             # seconds that requests in flight have to finish
SHORT_SECRET = 16                   # characters; below, a guess is thinkable
HISTORY_DAYS = 400                  # a school year and a margin
HISTORY_ERRORS = 100                # row errors kept of each sync


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

class Refusal(Exception):
    """A request turned down with one of ERRORS; Response.of_refusal makes the answer.

    detail: words for a person, the table's if left out; never a secret or a student's data.
    status: where a code has two. headers: of the answer. carries: what its row says.
    """

    def __init__(self, code: str, detail: str = "", status: int = 0,
                 headers: Headers = (), **carries: Any) -> None:
        super().__init__(code)
        self.problem = next(problem for problem in ERRORS
                            if problem.code == code and status in (0, problem.status))
        self.detail = detail or self.problem.meaning
        self.headers = headers
        self.carries = carries


class Fault(NamedTuple):
    """What is wrong with a value: a code of ROW_ERRORS (or of ERRORS, for cohort_id)."""

    field: str | None
    error: str
    message: str                    # words for a person; never the value, which is personal


class CommandError(Exception):
    """What stops a command: each argument is one plain line for stderr. Exit status 2."""


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

DEFAULT_FILE = pathlib.Path(__file__).resolve().with_suffix(".ini")
INSTITUTION = re.compile(r"institution ([a-z0-9-]{1,64})")


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
    warnings: tuple[str, ...]
    source: str                             # the file, or "" for none

    @property
    def configured(self) -> bool:
        return any(institution.digests for institution in self.institutions)


def load_configuration(path: str | None = None,
                       environment: Mapping[str, str] = os.environ,
                       overrides: Mapping[str, str] = {}) -> Configuration:
    """Read the ini file, else SIS_SYNC_CONFIG, else sis_sync.ini beside the module, else defaults.

    overrides: keys of [server] that the command line sets.
    Raises CommandError with every fault that the file has, each on its own line.
    """
    named = path or environment.get("SIS_SYNC_CONFIG")
    file = pathlib.Path(named).absolute() if named else DEFAULT_FILE
    there = bool(named) or file.exists()
    faults: list[str] = []
    warnings: list[str] = []
    sections = read_ini(file, faults) if there else {}
    sections.setdefault("server", {}).update(overrides)
    settings: dict[str, Any] = {}
    for section in ("server", "limits"):
        settings.update(read_section(section, section, sections.pop(section, {}), faults))
    for key in ("database", "tls_certificate", "tls_key"):
        settings[key] = settings.get(key) and str(file.parent / settings[key])
    institutions = tuple(read_institutions(sections, file.parent, environment, faults, warnings))
    faults += shared_secrets(institutions)
    tls = load_tls(settings, faults)
    if faults:
        raise CommandError(*(f"{file}: {fault}" for fault in faults))
    if not tls and not ipaddress.ip_address(settings["host"]).is_loopback:
        warnings.append(f"[server] host: {settings['host']} is not this machine alone and there is "
                        "no TLS: set tls_certificate, or put a proxy that has it in front")
    configuration = Configuration(settings, institutions, tls, (), str(file) if there else "")
    if not configuration.configured:
        warnings.append("no institution has a secret set: every push will be answered 503")
    return configuration._replace(warnings=tuple(warnings))


def read_institutions(sections: Mapping[str, Mapping[str, str]], folder: pathlib.Path,
                      environment: Mapping[str, str], faults: list[str],
                      warnings: list[str]) -> Iterator[Institution]:
    """The institutions of the sections that are left; `default` if there is none."""
    if not any(map(INSTITUTION.fullmatch, sections)):
        sections = {**sections, "institution default": {}}
    for section, keys in sections.items():
        match = INSTITUTION.fullmatch(section)
        if not match:
            faults.append(f"[{section}]: unknown section; allowed: [server], [limits], "
                          "[institution NAME] (NAME: a-z, 0-9, hyphens)"
                          + nearest(section, ["server", "limits", "institution"]))
            continue
        values = read_section(section, "institution", keys, faults)
        digests = read_digests(section, values.get("secrets", ()), folder, environment, warnings)
        lists = {key: values.get(key, frozenset()) for key in LISTS}
        yield Institution(match[1], digests, lists, values.get("bad_rows", "skip"))


def read_ini(file: pathlib.Path, faults: list[str]) -> dict[str, dict[str, str]]:
    """The sections and keys of an ini file, as text. What can't be read becomes a fault."""
    # No '%' interpolation: it breaks secrets and says nothing. No [DEFAULT]: it leaks everywhere.
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="\0",
                                       empty_lines_in_values=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # a key is spelt one way
    try:
        # Notepad writes a BOM, and the locale's encoding is not UTF-8 everywhere.
        parser.read_string(file.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}")
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        key = getattr(error, "option", "")
        faults.append(f"[{error.section}] {key}: stands twice (line {error.lineno})")
    except configparser.MissingSectionHeaderError as error:
        faults.append(f"line {error.lineno}: stands before the first [section]")
    except configparser.ParsingError as error:
        # The lines themselves are not shown: one of them may hold a secret.
        faults += [f"line {number}: is neither [section] nor key = value"
                   for number, _ in error.errors]
    else:
        return {section: dict(parser[section]) for section in parser.sections()}
    return {}


def read_section(section: str, table: str, found: Mapping[str, str],
                 faults: list[str]) -> dict[str, Any]:
    """The values of one section as SETTINGS says, defaults filled in; faults are added."""
    known = {setting.key: setting for setting in SETTINGS if setting.section == table}
    faults += [f"[{section}] {key}: unknown key; allowed: {', '.join(known)}" + nearest(key, known)
               for key in found if key not in known]
    values: dict[str, Any] = {}
    for key, setting in known.items():
        text = found.get(key, setting.default)
        try:
            values[key] = setting.kind.read(text)
        except ValueError:
            # A secret written where its source belongs must not travel on into a log.
            shown = "something else" if setting.kind is SECRETS else repr(text[:60])
            faults.append(f"[{section}] {key}: found {shown}; allowed: {setting.kind.allowed}")
    return values


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def read_digests(section: str, sources: Iterable[str], folder: pathlib.Path,
                 environment: Mapping[str, str], warnings: list[str]) -> tuple[bytes, ...]:
    """The digests of an institution's secrets; of one that is not set, a warning instead."""
    digests = []
    for source in sources:
        scheme, _, name = source.partition(":")
        if scheme == "sha256":
            digests.append(bytes.fromhex(name))
            continue
        try:
            secret = bare_secret(os.fsencode(environment.get(name, "")) if scheme == "env"
                                 else (folder / name).read_bytes())
        except OSError:
            secret = b""
        if not secret:
            warnings.append(f"[{section}] secrets: {source} is missing, empty or not readable: "
                            "it is not set")
            continue
        if len(secret) < SHORT_SECRET:
            warnings.append(f"[{section}] secrets: {source} is shorter than {SHORT_SECRET} "
                            "characters; make one with: python3 sis_sync.py secret")
        digests.append(hashlib.sha256(secret).digest())
    return tuple(digests)


def bare_secret(text: bytes) -> bytes:
    """Without the line end of a file, or the BOM that Notepad writes."""
    return text.removeprefix(codecs.BOM_UTF8).strip()


def shared_secrets(institutions: Iterable[Institution]) -> Iterator[str]:
    """A fault for each institution that could be taken for another."""
    owners: dict[bytes, str] = {hashlib.sha256(b"").digest(): ""}
    for institution in institutions:
        for digest in institution.digests:
            owner = owners.setdefault(digest, institution.name)
            if not owner:
                yield f"[institution {institution.name}] secrets: the sha256 of no secret at all"
            elif owner != institution.name:
                yield f"[institution {institution.name}] secrets: one of them is also {owner}'s"


def load_tls(settings: Mapping[str, Any], faults: list[str]) -> ssl.SSLContext | None:
    certificate, key = settings.get("tls_certificate"), settings.get("tls_key")
    if not certificate:
        if key:
            faults.append("[server] tls_key: stands without tls_certificate")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password to try, OpenSSL would ask the terminal for one and wait.
        context.load_cert_chain(certificate, key or None, password=lambda: b"")
    except OSError as error:        # ssl.SSLError is one
        faults.append(f"[server] tls_certificate, tls_key: cannot be loaded: "
                      f"{error.strerror or error} (both must be PEM, the key not encrypted)")
    return context


# ---------------------------------------------------------------------------------------------
# Who is calling
# ---------------------------------------------------------------------------------------------

def institution_of(authorization: str,
                   institutions: Iterable[Institution]) -> Institution | None:
    """The institution whose secret this Authorization header holds (RFC 6750 section 2.1).

    Every configured digest is compared, whatever came before, so that the time it takes tells
    nothing. What is compared are digests of bytes: compare_digest raises TypeError for a str that
    is not ASCII, which any stranger could send.
    """
    scheme, _, secret = authorization.partition(" ")
    digest = hashlib.sha256(secret.strip(" ").encode("latin-1", "replace")).digest()
    found = None
    for institution in institutions:
        for known in institution.digests:
            if hmac.compare_digest(digest, known):
                found = institution
    return found if scheme.lower() == "bearer" else None


def parse_address(text: str) -> Address | None:
    """The address, as IPv4 if it stands in IPv6 clothes (::ffff:a.b.c.d); None if it is none."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def client_address(peer: str, forwarded_for: str, trusted: Sequence[Network]) -> str:
    """Who sent the request: the peer, or whom a trusted proxy names.

    X-Forwarded-For is read from the right, as only there a trusted proxy wrote; what stands
    further left is the client's own claim.
    """
    address = parse_address(peer)
    hops = forwarded_for.split(",")
    while hops and address and any(address in network for network in trusted):
        hop = parse_address(without_port(hops.pop().strip()))
        if not hop:
            break
        address = hop
    return str(address or "-")


def without_port(host: str) -> str:
    """Some proxies write 192.0.2.1:5123, or [2001:db8::1]:5123."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def client_key(client: str) -> str:
    """What limits count by: an address, in IPv6 its /64, as whoever has one has all 2**64."""
    address = parse_address(client)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return client


class RateLimiter:
    """A token bucket for each client, as one number: when it will be full again.

    This is the "generic cell rate algorithm" (ITU-T I.371). A bucket that is full needs no number,
    which is what bounds the memory; past MAX_BUCKETS the one least recently used goes.
    """

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def take(self, client: str, per_minute: int, now: float | None = None) -> int:
        """Take a token: 0, or the whole seconds after which there will be one. A refusal is free.

        now: seconds of a monotonic clock; the wall clock would jump.
        """
        now = time.monotonic() if now is None else now
        interval = 60.0 / per_minute
        with self._lock:
            full_at = max(self._full_at.pop(client, now), now)
            wait = full_at + interval - (now + 60.0)
            granted = wait < 1e-6       # sums of floats: the twentieth of a burst must not fail
            self._full_at[client] = full_at + interval if granted else full_at
            if len(self._full_at) > MAX_BUCKETS:
                self._forget(now)
        return 0 if granted else math.ceil(wait)

    def _forget(self, now: float) -> None:
        self._full_at = {client: full_at for client, full_at in self._full_at.items()
                         if full_at > now}
        # A tenth more than needed, so that a crowd of strangers does not pay for this each time.
        too_many = max(0, len(self._full_at) - MAX_BUCKETS * 9 // 10)
        for client in list(self._full_at)[:too_many]:
            del self._full_at[client]


# ---------------------------------------------------------------------------------------------
# What was sent
# ---------------------------------------------------------------------------------------------

# Unicode's White_Space. str.strip() alone would also take U+001C to U+001F for white space, which
# are control characters and must be refused.
WHITE_SPACE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
               "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000")

# Control characters hide in logs and cut strings short in C; half of a surrogate pair passes JSON,
# and then SQLite can't store it and the whole batch would sink.
FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
CONTROL_CHARACTERS = bytes((*range(0x20), 0x7F))

# SQLite has no booleans. A bool given to the sqlite3 module goes by way of its adapters, which
# makes storing a row a quarter slower.
STORED = {None: None, False: 0, True: 1}

# RFC 9110 section 8.6: 1*DIGIT. The bound is below the one at which int() refuses by itself.
CONTENT_LENGTH = re.compile(r"[0-9]{1,4000}")


class Readable(Protocol):
    """A body: read(size) gives at least one byte and at most size, or b"" at its end."""

    def read(self, size: int) -> bytes: ...


@dataclass
class Request:
    """A request, and what becomes known of it on the way to its line in the log."""

    peer: str = ""                                  # address of whoever is at the other end
    method: str = "-"
    path: str = "-"                                 # without its query
    version: str = "1.1"                            # of HTTP
    headers: Mapping[str, str] = default_of(default_factory=dict)   # lower-case names; latin-1
    body: Readable = default_of(default_factory=io.BytesIO)
    id: str = default_of(default_factory=lambda: secrets.token_hex(8))
    started: float = default_of(default_factory=time.perf_counter)
    client: str = "-"
    institution: str = "-"
    counts: Counts | None = None

    @property
    def milliseconds(self) -> int:
        return round((time.perf_counter() - self.started) * 1000)


class Capped:
    """A body that ends in 413 once it has given more than it may."""

    def __init__(self, body: Readable, configuration: Configuration) -> None:
        self._body, self._configuration, self._size = body, configuration, 0

    def read(self, size: int) -> bytes:
        piece = self._body.read(size)
        self._size += len(piece)
        check_length(self._size, self._configuration)
        return piece


class Whole:
    """A body that gives all that is asked for, unless it ends. The gzip module takes a header that
    comes in two pieces for a broken one."""

    def __init__(self, body: Readable) -> None:
        self._body = body

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._body.read(size - len(data))
            if not piece:
                break
            data += piece
        return bytes(data)


def check_framing(headers: Mapping[str, str]) -> None:
    """Where a body ends must be beyond doubt, or its tail is taken for a request (RFC 9112
    sections 6.1 to 6.3, "request smuggling"). Raises Refusal malformed_request, not_implemented.

    Two lines of one name arrive joined by a comma, so that two lengths are no length.
    """
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if length is not None and coding is not None:
        raise Refusal("malformed_request", "both Content-Length and Transfer-Encoding")
    if length is not None and not CONTENT_LENGTH.fullmatch(length):
        raise Refusal("malformed_request", "Content-Length must be digits, once")
    if coding is not None and coding.lower() != "chunked":
        raise Refusal("not_implemented", "the only transfer coding known is chunked, once")


def check_length(length: int, configuration: Configuration) -> None:
    """Raises Refusal batch_too_large past max_body_bytes."""
    limits = configuration.settings
    if length > limits["max_body_bytes"]:
        raise Refusal("batch_too_large", f"the body is over {limits['max_body_bytes']} bytes: "
                      "send smaller batches", max=limits["max_students"],
                      max_bytes=limits["max_body_bytes"])


def check_media_type(headers: Mapping[str, str]) -> None:
    """Raises Refusal unsupported_media_type. No Content-Type at all is let pass."""
    media_type, _, parameters = headers.get("content-type", "application/json").partition(";")
    if media_type.strip().lower() != "application/json":
        raise Refusal("unsupported_media_type", "Content-Type must be application/json")
    charset = re.search(r"charset\s*=\s*\"?([^\";\s]*)", parameters, re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8"):
        raise Refusal("unsupported_media_type", "the charset must be utf-8")
    if content_coding(headers) not in ("", "identity", "gzip", "x-gzip"):
        raise Refusal("unsupported_media_type", "Content-Encoding must be gzip or identity")


def content_coding(headers: Mapping[str, str]) -> str:
    return headers.get("content-encoding", "").strip().lower()


def read_body(request: Request, configuration: Configuration) -> bytes:
    """The whole body, decompressed. The cap holds before and after: a bomb is small on the wire."""
    body: Readable = Capped(request.body, configuration)
    if content_coding(request.headers).endswith("gzip"):
        unzipped = gzip.GzipFile(fileobj=Whole(body))  # type: ignore[call-overload]
        body = Capped(unzipped, configuration)
    try:
        return b"".join(iter(lambda: body.read(PIECE), b""))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise Refusal("malformed_json", "the body is not what Content-Encoding says: "
                      "broken or cut off gzip") from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_number(digits: str) -> str:
    if len(digits) > MAX_NUMBER:
        raise ValueError(f"a number of more than {MAX_NUMBER} digits")
    return digits


DECODER = json.JSONDecoder(parse_constant=refuse_constant,
                           parse_int=lambda digits: int(check_number(digits)),
                           parse_float=lambda digits: float(check_number(digits)))


def parse_json(body: bytes) -> object:
    """Raises Refusal malformed_json, with where and why."""
    try:
        # json.loads(bytes) would guess UTF-16 and let half surrogates through. PowerShell and .NET
        # put a BOM in front, which "sig" takes off.
        return DECODER.decode(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        reason = (f"the body is not UTF-8 at byte {error.start}: send it as UTF-8, with "
                  "Content-Type: application/json; charset=utf-8")
    except RecursionError:
        reason = "the body is nested too deep"
    except ValueError as error:     # json.JSONDecodeError is one
        reason = f"the body is not JSON: {error}" if body else "the body is empty"
    raise Refusal("malformed_json", reason)


def check_value(field: Field, value: object, listed: frozenset[str]) -> Value | Fault:
    """The value as it will be kept, or its fault. listed: the only values allowed; empty: all."""
    if field.kind is str and isinstance(value, str):
        value = value.strip(WHITE_SPACE) or None
    if value is None:
        return Fault(field.name, "missing_field", f"{field.name} required") \
            if field.required else None
    if not isinstance(value, field.kind):
        allowed = "a string" if field.kind is str else "true, false or null"
        return Fault(field.name, "invalid_field", f"{field.name} must be {allowed}")
    return check_string(field, value, listed) if isinstance(value, str) else STORED[bool(value)]


def check_string(field: Field, value: str, listed: frozenset[str]) -> str | Fault:
    forbidden = FORBIDDEN.search(value)
    if forbidden:
        message = (f"{field.name} holds U+{ord(forbidden[0]):04X}, a control character or half of "
                   "a surrogate pair")
    elif not field.shortest <= len(value) <= field.longest:
        message = f"{field.name} must be {field.shortest} to {field.longest} characters"
    elif not (field.spaces or value.split() == [value]) or (
            field.pattern and not field.pattern.fullmatch(value)):
        message = f"{field.name} must be {field.meaning}"
    elif listed and value not in listed:
        return Fault(field.name, LISTS[field.listed],
                     f"{field.name} is not in the institution's list of {field.listed}")
    else:
        return value
    return Fault(field.name, "invalid_field", message)


def check_batch(parsed: object, institution: Institution, most: int) -> tuple[str, list[object]]:
    """The cohort_id and the students of a parsed body. Raises Refusal with its first fault."""
    if not isinstance(parsed, dict):
        raise Refusal("invalid_field", "the body must be an object", field="body")
    listed = institution.lists.get(COHORT.listed, frozenset())
    cohort_id = check_value(COHORT, parsed.get(COHORT.name), listed)
    if isinstance(cohort_id, Fault):
        refusal = Refusal(cohort_id.error, cohort_id.message)
        if "field" in refusal.problem.carries:
            refusal.carries["field"] = cohort_id.field
        raise refusal
    students = parsed.get("students")
    if students is None:
        raise Refusal("missing_field", "students required", field="students")
    if not isinstance(students, list):
        # Windows PowerShell unwraps an array of one when it pipes it to ConvertTo-Json.
        raise Refusal("invalid_field", "students must be an array, also for a single student",
                      field="students")
    if len(students) > most:
        raise Refusal("batch_too_large", f"{len(students)} students in one request; at most {most}",
                      max=most)
    return str(cohort_id), students


def check_rows(students: Sequence[object],
               institution: Institution) -> tuple[list[Record], dict[int, Fault]]:
    """The good rows as records, and the first fault of each bad one by its index."""
    faults: dict[int, Fault] = {}
    rows: Sequence[Any] = students
    if not set(map(type, students)) <= {dict}:
        faults = {index: Fault(None, "not_an_object", "a student must be an object")
                  for index, student in enumerate(students) if not isinstance(student, dict)}
        rows = [{} if index in faults else student for index, student in enumerate(students)]
    columns = []
    for field in FIELDS:
        name, listed = field.name, institution.lists.get(field.listed, frozenset())
        column, found = check_column(field, [row.get(name) for row in rows], listed)
        columns.append(column)
        if found:
            faults = {**found, **faults}
    records: Iterable[Record] = zip(*columns)
    if faults:
        records = (record for index, record in enumerate(records) if index not in faults)
    return list(records), faults


def row_errors(faults: Mapping[int, Fault]) -> list[dict[str, object]]:
    """The faults as the answer and the history show them. Rows count from 1."""
    return [{"row": index + 1, **fault._asdict()} for index, fault in sorted(faults.items())]


def check_column(field: Field, column: list[Any],
                 listed: frozenset[str]) -> tuple[Sequence[Value], dict[int, Fault]]:
    """check_value for one field of all rows: the values, and the faults by index."""
    values = clean_column(field, column, listed)
    if values is not None:
        return values, {}
    checked = [check_value(field, value, listed) for value in column]
    if field is KEY:
        mark_duplicates(checked)
    faults = {index: value for index, value in enumerate(checked) if isinstance(value, Fault)}
    return [None if isinstance(value, Fault) else value for value in checked], faults


def mark_duplicates(checked: list[Value | Fault]) -> None:
    seen: set[Value] = set()
    for index, value in enumerate(checked):
        if isinstance(value, Fault):
            continue
        if value in seen:
            checked[index] = Fault(KEY.name, "duplicate_student",
                                   f"the same {KEY.name} stood higher up in the batch")
        seen.add(value)


def clean_column(field: Field, column: list[Any],
                 listed: frozenset[str]) -> Sequence[Value] | None:
    """What check_value would make of each value, if none has a fault; None if one may have.

    Asked of the distinct values of a column, in C, the questions cost a quarter of what they
    cost value by value: 4 ms and 16 ms for 5,000 rows, where SQLite takes 8 ms to store them.
    """
    if field.kind is bool:
        known = set(map(type, column)) <= {bool, type(None)}
        return list(map(STORED.get, column)) if known else None
    try:
        distinct = set(column)
    except TypeError:                   # an array or an object is among them
        return None
    if field.required and None in distinct:
        return None
    distinct.discard(None)
    if not set(map(type, distinct)) <= {str} or forbidden_in("".join(distinct)):
        return None
    if "" in distinct or list(map(str.strip, distinct)) != list(distinct):
        stripped = [value.strip() or None if value else None for value in column]
        return clean_column(field, stripped, listed)
    lengths = set(map(len, distinct)) or {field.shortest}
    if (field.shortest <= min(lengths) <= max(lengths) <= field.longest
            and not (field is KEY and len(distinct) < len(column))
            and (field.spaces or len("".join(distinct).split(None, 1)) < 2)
            and not (field.pattern and not all(map(field.pattern.fullmatch, distinct)))
            and not (listed and not listed.issuperset(distinct))):
        return column
    return None


def forbidden_in(text: str) -> bool:
    """FORBIDDEN.search, five times as fast: bytes.translate drops what is in a table of bytes."""
    try:
        data = text.encode()
    except UnicodeEncodeError:          # half of a surrogate pair
        return True
    return len(data.translate(None, CONTROL_CHARACTERS)) < len(data)


# ---------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------

# Times are UTC in whole seconds since 1970. An entry is kept in the order of its key and without a
# rowid: a page of a roster is one run of the file, however many other students there are.
CREATE_SYNCS = """
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
)"""
CREATE_ROSTERS = """
CREATE TABLE rosters (
    roster_id INTEGER PRIMARY KEY,
    institution TEXT NOT NULL,
    cohort_id TEXT NOT NULL,
    UNIQUE (institution, cohort_id)
)"""


def column_of(field: Field) -> str:
    return f"{field.name} {'TEXT' if field.kind is str else 'INTEGER'}"


CREATE_ENTRIES = f"""
CREATE TABLE entries (
    roster_id INTEGER NOT NULL REFERENCES rosters (roster_id),
    {", ".join(column_of(field) + " NOT NULL" * field.required for field in FIELDS)},
    created_at INTEGER NOT NULL,
    changed_at INTEGER NOT NULL,
    seen_at INTEGER NOT NULL,
    PRIMARY KEY (roster_id, {KEY.name})
) WITHOUT ROWID"""

# What brings a database from each version (PRAGMA user_version) to the next. A change of the
# schema is one more item; a new field needs none, as new_fields finds it.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (CREATE_ROSTERS, CREATE_ENTRIES, CREATE_SYNCS, "CREATE INDEX syncs_by_time ON syncs (time)"),
)

VALUES = NAMES[1:]
ROWS_AT_ONCE = (999 - 4) // len(FIELDS)     # SQLite before 3.32 takes 999 variables
KEYS_AT_ONCE = 250      # a tenth faster than 500, where SQLite's statement journal leaves memory


@functools.lru_cache(maxsize=4)
def upsert(rows: int) -> str:
    """The statement that stores so many rows; of those known already only what has changed.

    Its variables: roster_id, three times the time, the values of each row. A hundred rows in one
    statement take little more than half the time of a hundred statements: what is saved is the
    sqlite3 module's work around each, and binding what is the same in all of them.

    Never INSERT OR REPLACE: that would delete the entry first, and created_at with it.
    """
    row = f"({', '.join('?' * len(FIELDS))})"
    return f"""
INSERT INTO entries (roster_id, created_at, changed_at, seen_at, {", ".join(NAMES)})
SELECT ?, ?, ?, ?, sent.* FROM (VALUES {", ".join([row] * rows)}) AS sent WHERE true
ON CONFLICT (roster_id, {KEY.name}) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in VALUES)}, changed_at = excluded.changed_at
WHERE ({", ".join(VALUES)}) IS NOT ({", ".join(f"excluded.{name}" for name in VALUES)})"""


class Counts(NamedTuple):
    """What a sync did. updated are the rows already known; unchanged, those of them that held
    just these values."""

    received: int
    new: int
    updated: int
    unchanged: int
    rejected: int

    @property
    def imported(self) -> int:
        return self.new + self.updated


class Roster:
    """The database: rosters, entries, syncs. One connection and one lock: one writer at a time.

    Reading commands open a connection of their own; WAL lets them read while this one writes.
    """

    def __init__(self, path: str) -> None:
        """Open, create or migrate. Raises CommandError for a file that can't be used."""
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] = (0, 0)
        try:
            # Made before SQLite would, and readable by its owner alone.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with self._lock:
                self._connected()
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror}; whoever runs this must be able to write "
                               "to it and to its folder") from error
        except sqlite3.Error as error:
            raise CommandError(f"{path}: {error}") from error

    def _connected(self) -> sqlite3.Connection:
        """The connection, opened anew after a fault, or when the file is not the same any more:
        a database deleted or restored under a running server must not swallow what comes in."""
        if not self._connection or self._replaced():
            self._disconnect()
            identity = file_identity(self.path)
            connection = open_database(self.path)
            try:
                prepare(connection, self.path)
            except BaseException:
                connection.close()
                raise
            self._connection, self._identity = connection, identity
        return self._connection

    def _replaced(self) -> bool:
        return file_identity(self.path) != self._identity

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            with contextlib.suppress(sqlite3.Error):
                # The -wal is found by its name: a file put in the database's place inherits it.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything or nothing. On leaving it without an exception, it is on disk.

        Raises Refusal busy when the lock can't be had in BUSY_TIMEOUT, be it from another thread
        or another process; sqlite3.Error or OSError for any other fault of the database.
        """
        deadline = time.monotonic() + BUSY_TIMEOUT
        with self._locked(), self._cleaning_up():
            connection = self._connected()
            left = max(0.0, deadline - time.monotonic())
            connection.execute(f"PRAGMA busy_timeout = {round(left * 1000)}")
            # IMMEDIATE: a transaction that begins as a reader is refused at once, with no
            # waiting, if another process writes before it does.
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
            if self._replaced():
                raise OSError("the database was replaced during a transaction")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread at a time. Raises Refusal busy."""
        if not self._lock.acquire(timeout=BUSY_TIMEOUT):
            raise database_busy()
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """After a fault nothing is half done, and the next transaction finds a connection."""
        try:
            yield
        except BaseException as error:
            if self._connection:
                roll_back(self._connection)
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise database_busy() from error
            if isinstance(error, (sqlite3.Error, OSError)):
                self._disconnect()
            raise

    def sync(self, request: Request, cohort_id: str, records: list[Record],
             errors: Sequence[Mapping[str, object]]) -> Counts:
        """Store a batch and its line in the history. Raises what `transaction` raises.

        New, updated and unchanged are told apart by two counts: how many keys were known, and how
        many rows the upsert then had to write.
        """
        # In key order, neighbours in the file are written together.
        records.sort(key=operator.itemgetter(0))
        with self.transaction() as connection:
            now = int(time.time())      # not before the lock is ours: times follow the order
            roster_id = roster_of(connection, request.institution, cohort_id)
            known = mark_seen(connection, roster_id, [record[0] for record in records], now)
            before = connection.total_changes
            for start in range(0, len(records), ROWS_AT_ONCE):
                some = records[start:start + ROWS_AT_ONCE]
                connection.execute(upsert(len(some)), [roster_id, now, now, now,
                                                       *itertools.chain.from_iterable(some)])
            written = connection.total_changes - before
            new = len(records) - known
            counts = Counts(len(records) + len(errors), new, known, known - (written - new),
                            len(errors))
            connection.execute(
                "INSERT INTO syncs (time, institution, cohort_id, client, received, new, updated, "
                "unchanged, rejected, milliseconds, errors) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                (now, request.institution, cohort_id, request.client, *counts,
                 request.milliseconds, json.dumps(errors[:HISTORY_ERRORS])))
            connection.execute("DELETE FROM syncs WHERE time < ?", (now - HISTORY_DAYS * 86400,))
        return counts

    def answers(self) -> bool:
        """Whether the database can be read."""
        try:
            if self._replaced():
                with contextlib.suppress(Refusal), self._locked():
                    self._connected()
            with contextlib.closing(open_database(self.path, read_only=True)) as connection:
                connection.execute("SELECT 1 FROM syncs LIMIT 1").fetchall()
                return True
        except (sqlite3.Error, OSError):
            return False

    def close(self) -> None:
        """Bring everything from the WAL into the database file, and close."""
        with contextlib.suppress(Refusal), self._locked():
            self._disconnect()


def file_identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def database_busy() -> Refusal:
    return Refusal("busy", "the database is locked: try again", retry_after=BUSY_RETRY_AFTER)


def open_database(path: str, read_only: bool = False) -> sqlite3.Connection:
    """Never creates a file, as a mistyped path would. Raises sqlite3.Error."""
    # Also a reader opens for writing, and then forgoes it: the last one to close a database takes
    # its -wal and -shm away, which SQLite's mode=ro would leave behind, owned by whoever read.
    connection = sqlite3.connect(f"{pathlib.Path(path).absolute().as_uri()}?mode=rw", uri=True,
                                 timeout=BUSY_TIMEOUT, isolation_level=None,
                                 check_same_thread=False)
    if read_only:
        connection.execute("PRAGMA query_only = ON")
    # FULL: the WAL is on the disk before a transaction counts as done, power cut or not.
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def prepare(connection: sqlite3.Connection, path: str) -> None:
    """Make the database ours: nobody else's to read, with a write-ahead log, of this version.

    Raises sqlite3.DatabaseError, OSError; what is refused is left as it was.
    """
    schema_version(connection)
    for file in (path, f"{path}-wal", f"{path}-shm"):
        if os.path.exists(file) and os.stat(file).st_mode & 0o777 != 0o600:
            os.chmod(file, 0o600)
    if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise sqlite3.DatabaseError("this disk does not allow a write-ahead log")
    if schema_version(connection) < len(MIGRATIONS) or new_fields(connection):
        migrate(connection)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema to this program's version, or leave it as it was."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in itertools.chain(*MIGRATIONS[schema_version(connection):]):
            connection.execute(statement)
        # Null in the entries that are there already.
        for field in new_fields(connection):
            connection.execute(f"ALTER TABLE entries ADD COLUMN {column_of(field)}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        roll_back(connection)
        raise


def roll_back(connection: sqlite3.Connection) -> None:
    """SQLite has rolled back by itself after some faults, a full disk for one."""
    with contextlib.suppress(sqlite3.Error):
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def schema_version(connection: sqlite3.Connection) -> int:
    """Raises sqlite3.DatabaseError for a database that is not for this program."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    if version > len(MIGRATIONS):
        raise sqlite3.DatabaseError(f"the database is of version {version}, newer than "
                                    f"{len(MIGRATIONS)}: use a newer sis_sync.py")
    if tables if version == 0 else not tables >= {"rosters", "entries", "syncs"}:
        raise sqlite3.DatabaseError("this is a database of another program")
    return version


def new_fields(connection: sqlite3.Connection) -> list[Field]:
    """The fields that FIELDS got since the database was made."""
    existing = {row[1] for row in connection.execute("PRAGMA table_info(entries)")}
    return [field for field in FIELDS if field.name not in existing]


def roster_of(connection: sqlite3.Connection, institution: str, cohort_id: str) -> int:
    key = (institution, cohort_id)
    connection.execute("INSERT INTO rosters (institution, cohort_id) VALUES (?, ?) "
                       "ON CONFLICT DO NOTHING", key)
    row = connection.execute("SELECT roster_id FROM rosters WHERE institution = ? "
                             "AND cohort_id = ?", key).fetchone()
    return int(row[0])


def mark_seen(connection: sqlite3.Connection, roster_id: int, keys: list[Value], now: int) -> int:
    """Note that a sync named these entries, their keys in order. How many of them there are."""
    between = f"WHERE roster_id = ? AND {KEY.name} BETWEEN ? AND ?"
    if not keys or not connection.execute(f"SELECT 1 FROM entries {between} LIMIT 1",
                                          (roster_id, keys[0], keys[-1])).fetchone():
        return 0            # a page of new students, a twentieth faster for this one look
    known = 0
    for start in range(0, len(keys), KEYS_AT_ONCE):
        some = keys[start:start + KEYS_AT_ONCE]
        known += connection.execute(
            f"UPDATE entries SET seen_at = ? WHERE roster_id = ? AND {KEY.name} IN "
            f"({', '.join('?' * len(some))})", (now, roster_id, *some)).rowcount
    return known


# ---------------------------------------------------------------------------------------------
# The answer
# ---------------------------------------------------------------------------------------------

log = logging.getLogger("sis_sync")
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
    def of(cls, document: object, status: int = 200, headers: Headers = (),
           error: str = "") -> Response:
        body = json.dumps(document).encode() + b"\n"
        return cls(status, (("Content-Type", "application/json"),
                            ("Content-Length", str(len(body))), *headers), body, error)

    @classmethod
    def of_refusal(cls, refusal: Refusal) -> Response:
        """The one place where an error becomes an answer."""
        code, status = refusal.problem.code, refusal.problem.status
        headers = refusal.headers
        if "retry_after" in refusal.carries:
            headers += (("Retry-After", str(refusal.carries["retry_after"])),)
        known = refusal.detail == refusal.problem.meaning
        return cls.of({"error": code, "detail": refusal.detail, **refusal.carries}, status,
                      headers, code if known else f"{code}: {refusal.detail}")


class Service:
    """The server without its sockets: a request in, an answer out."""

    def __init__(self, configuration: Configuration) -> None:
        """Raises CommandError if the database can't be used."""
        self.configuration = configuration
        self.limiter = RateLimiter()
        # One batch at a time is a tree of objects, ten times the size of its text; more at a time
        # would not be faster, as Python runs one thread at a time.
        self.parsing = threading.Lock()
        self.roster = Roster(configuration.settings["database"])

    def handle(self, request: Request,
               receive: Callable[[Request], None] = lambda request: None) -> Response:
        """The answer to a request. receive: what fills it in first, and may raise Refusal."""
        # One configuration from start to end, whatever SIGHUP does meanwhile.
        configuration = self.configuration

        def work() -> Response:
            receive(request)
            return self.route(request, configuration)

        return answer_to(request, work)

    def route(self, request: Request, configuration: Configuration) -> Response:
        """Raises Refusal, in the order of the contract: HTTP itself, path, method."""
        request.client = client_address(request.peer, request.headers.get("x-forwarded-for", ""),
                                        configuration.settings["trusted_proxies"])
        check_framing(request.headers)
        if request.method not in METHODS:
            raise Refusal("not_implemented", "the method is unknown")
        routes: dict[str, tuple[str, Callable[[Request, Configuration], Response]]] = {
            SYNC_PATH: ("POST", self.sync),
            "/healthz": ("GET", self.health),
            "/openapi.json": ("GET", self.openapi),
        }
        if request.path not in routes:
            raise Refusal("not_found", f"there is nothing at this path; a push goes to {SYNC_PATH}")
        method, serve = routes[request.path]
        allowed = ("GET", "HEAD") if method == "GET" else (method,)
        if request.method not in allowed:
            allow = ", ".join(allowed)
            raise Refusal("method_not_allowed", f"allowed here: {allow}",
                          headers=(("Allow", allow),))
        return serve(request, configuration)

    def sync(self, request: Request, configuration: Configuration) -> Response:
        """POST /api/sis/sync. Nobody without a secret makes it read a body."""
        institution = self.authenticate(request, configuration)
        limits = configuration.settings
        check_length(int(request.headers.get("content-length", "0")), configuration)
        check_media_type(request.headers)
        body = read_body(request, configuration)
        with self.parsing:
            cohort_id, students = check_batch(parse_json(body), institution, limits["max_students"])
            del body
            records, faults = check_rows(students, institution)
            received = len(students)
            del students
        errors = row_errors(faults)
        if errors and institution.bad_rows == "reject":
            request.counts = Counts(received, 0, 0, 0, len(errors))
            raise Refusal("invalid_rows", f"{len(errors)} of {received} rows have faults; "
                          "nothing was stored", errors=errors)
        counts = request.counts = self.roster.sync(request, cohort_id, records, errors)
        return Response.of({"received": counts.received, "imported": counts.imported,
                            "details": {"imported": counts.new, "updated": counts.updated,
                                        "unchanged": counts.unchanged}, "errors": errors})

    def authenticate(self, request: Request, configuration: Configuration) -> Institution:
        """The institution that calls. Raises Refusal not_configured, rate_limited, unauthorized."""
        if not configuration.configured:
            raise Refusal("not_configured")
        institution = institution_of(request.headers.get("authorization", ""),
                                     configuration.institutions)
        # A verified institution has a bucket of its own; a guess spends its address's.
        client = f"institution {institution.name}" if institution else client_key(request.client)
        wait = self.limiter.take(client, configuration.settings["requests_per_minute"])
        if institution:
            request.institution = institution.name
        if wait:
            raise Refusal("rate_limited", f"too many requests: wait {wait} s", retry_after=wait)
        if not institution:
            raise Refusal("unauthorized", headers=(("WWW-Authenticate", "Bearer"),))
        return institution

    def health(self, request: Request, configuration: Configuration) -> Response:
        if not self.roster.answers():
            raise Refusal("unhealthy")
        return Response.of({"status": "ok"})

    def openapi(self, request: Request, configuration: Configuration) -> Response:
        return Response.of(openapi(configuration.settings["max_students"]))


def answer_to(request: Request, work: Callable[[], Response]) -> Response:
    """What `work` answers, or the answer to what it raised: nothing escapes from here."""
    try:
        response = work()
    except Refusal as refusal:
        response = Response.of_refusal(refusal)
    except Exception as error:  # noqa: BLE001  whatever it is, the client gets an answer
        log.error("%s server_error %s", request.id, describe(error))
        response = Response.of_refusal(Refusal("server_error", request_id=request.id))
    return response._replace(headers=(*response.headers, ("X-Request-ID", request.id)),
                             body=b"" if request.method == "HEAD" else response.body)


def refuse_to(request: Request, refusal: Refusal) -> Response:
    """The answer to a request that gets no further."""
    return answer_to(request, lambda: Response.of_refusal(refusal))


def describe(error: BaseException) -> str:
    """A fault in one line, without what a message could hold of a student: only the messages of
    the database and the system are known to hold nothing of that kind."""
    where = " < ".join(f"{frame.name}:{frame.lineno}"
                       for frame in reversed(traceback.extract_tb(error.__traceback__)))
    words = f": {error}" if isinstance(error, (sqlite3.Error, OSError)) else ""
    return f"{type(error).__name__}{words} ({where})"


# What the answer of a Problem carries, as JSON Schema.
CARRIED: dict[str, dict[str, object]] = {
    "field": {"type": "string"},
    "errors": {"type": "array", "items": {"$ref": "#/components/schemas/RowError"}},
    "max": {"type": "integer", "description": "students in one request"},
    "max_bytes": {"type": "integer", "description": "bytes in one body, where that was the cause"},
    "retry_after": {"type": "integer", "minimum": 1, "description": "seconds"},
    "request_id": {"type": "string", "description": "the same as in the log"},
}


def openapi(max_students: int) -> dict[str, object]:
    """OpenAPI 3.1 of the contract, out of the tables that the code checks with."""
    counts = {"type": "integer", "minimum": 0}
    row_error = object_schema(
        row={"type": "integer", "minimum": 1}, field={"type": ["string", "null"]},
        error=one_of(ROW_ERRORS), message={"type": "string"})
    result = object_schema(
        received=counts, imported=counts,
        details=object_schema(imported=counts, updated=counts, unchanged=counts),
        errors=CARRIED["errors"])
    student = object_schema(**{field.name: schema_of(field) for field in FIELDS})
    student["required"] = [field.name for field in FIELDS if field.required]
    batch = object_schema(cohort_id=schema_of(COHORT), students={
        "type": "array", "maxItems": max_students,
        "items": {"$ref": "#/components/schemas/Student"}})
    status = object_schema(status={"const": "ok"})
    pushed = [problem for problem in ERRORS if problem.code != "unhealthy"]
    unhealthy = [problem for problem in ERRORS if problem.code == "unhealthy"]
    body = {"required": True, "content": json_content({"$ref": "#/components/schemas/Batch"})}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sis_sync", "version": __version__,
                 "description": "A school's roster, pushed over HTTP. Lengths of strings count "
                                "without surrounding white space, which is stripped."},
        "paths": {
            SYNC_PATH: {"post": {
                "operationId": "sync", "summary": "Push students of one cohort's roster",
                "security": [{"secret": []}], "requestBody": body,
                "responses": responses({"$ref": "#/components/schemas/Result"}, pushed)}},
            "/healthz": {"get": {
                "operationId": "health", "summary": "Whether the database answers",
                "security": [], "responses": responses(status, unhealthy)}},
            "/openapi.json": {"get": {
                "operationId": "openapi", "summary": "This document",
                "security": [], "responses": responses({"type": "object"}, [])}},
        },
        "components": {
            "securitySchemes": {"secret": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Student": student, "Batch": batch, "Result": result,
                        "RowError": row_error},
        },
    }


def object_schema(**properties: Mapping[str, object]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def one_of(meanings: Mapping[str, str]) -> dict[str, object]:
    return {"oneOf": [{"const": code, "description": meaning}
                      for code, meaning in meanings.items()]}


def schema_of(field: Field) -> dict[str, object]:
    kind = "string" if field.kind is str else "boolean"
    schema: dict[str, object] = {"type": kind if field.required else [kind, "null"],
                                 "description": field.meaning}
    if field.kind is str:
        schema["maxLength"] = field.longest
    if field.required:
        schema["minLength"] = field.shortest
    if field.pattern:
        no_spaces = "" if field.spaces else r"(?!\s*\S+\s+\S)"
        schema["pattern"] = rf"^{no_spaces}\s*{field.pattern.pattern}\s*$"
    return schema


def json_content(schema: Mapping[str, object]) -> dict[str, object]:
    return {"application/json": {"schema": schema}}


def responses(schema: Mapping[str, object], problems: Sequence[Problem]) -> dict[str, object]:
    """The answers of an operation by status: 200, and each problem it can meet."""
    answers: dict[str, object] = {"200": {"description": "done", "content": json_content(schema)}}
    for status in sorted({problem.status for problem in problems}):
        here = [problem for problem in problems if problem.status == status]
        carries = {name: CARRIED[name] for problem in here for name in problem.carries}
        error = object_schema(error=one_of({problem.code: problem.meaning for problem in here}),
                              detail={"type": "string"})
        error["properties"].update(carries)
        answers[str(status)] = {"description": "; ".join(problem.meaning for problem in here),
                                "content": json_content(error)}
    return answers


# ---------------------------------------------------------------------------------------------
# The wire
# ---------------------------------------------------------------------------------------------

# Grammar of RFC 9110 and RFC 9112, on bytes: what str.split() and str.strip() call white space is
# far more than HTTP does. http.server splits that way, takes a bare CR for a line end, drops the
# headers behind a faulty one, and hides the raw lines from its hooks; so the head is read here.
#   token = 1*tchar;  request-line = method SP request-target SP HTTP-version
#   field-line = field-name ":" OWS field-value OWS;  field-vchar = VCHAR / obs-text
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])")
ORIGIN_FORM = re.compile(r"(/[^?#]*)(\?[^#]*)?")
ABSOLUTE_FORM = re.compile(r"https?://[^/?#]+(/[^?#]*)?(\?[^#]*)?", re.IGNORECASE)
FIELD_LINE = re.compile(rb"(" + TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
#   Host = uri-host [ ":" port ]; no comma, as that is how two Host lines arrive
HOST = re.compile(r"([A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")
#   chunk-size [ chunk-ext ];  chunk-size = 1*HEXDIG
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
# What can be in no head, found as soon as it arrives: a client that ends its lines with LF alone,
# or speaks TLS, gets its answer at once and not after the timeout.
NEVER_IN_HEAD = re.compile(rb"[^\t\r\n\x20-\x7e\x80-\xff]|(?<!\r)\n|\r(?=[^\n])")


class Wire:
    """A connection under clocks: nothing is read or written past a deadline, however the bytes
    trickle, as each wait is given only what is left of it."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.socket = connection
        self.buffer = b""
        self.engaged = False               # a request is arriving or being answered
        self.ended = False              # the client sends no more
        self.hurry = False              # the server is stopping
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def _wait_at_most(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout  # noqa: UP041  a TimeoutError only since Python 3.10
        self.socket.settimeout(left)

    def secure(self, context: ssl.SSLContext) -> None:
        """The TLS handshake; in the connection's own thread, as a silent client would otherwise
        keep all others waiting. Raises OSError."""
        self._wait_at_most()
        self.socket = context.wrap_socket(self.socket, server_side=True,
                                          do_handshake_on_connect=False)
        self.socket.do_handshake()

    def receive(self, size: int) -> bytes:
        """What has come, so much at most; b"" at the end, which a reset is too.

        Raises Refusal request_timeout.
        """
        try:
            self._wait_at_most()
            piece = self.socket.recv(size)
        except socket.timeout:  # noqa: UP041  an OSError, which is why it is caught first
            raise Refusal("request_timeout") from None
        except OSError:
            piece = b""
        self.ended = not piece
        return piece

    def more(self) -> bool:
        """Add to the buffer what comes next. False at the end."""
        piece = self.receive(MAX_HEAD)
        self.buffer += piece
        return bool(piece)

    def line(self, limit: int) -> bytes:
        """The next line, its CRLF taken off. Raises Refusal malformed_request."""
        while b"\n" not in self.buffer and len(self.buffer) <= limit:
            if not self.more():
                raise cut_off()
        line, _, rest = self.buffer.partition(b"\n")
        if len(line) > limit or not line.endswith(b"\r"):
            raise Refusal("malformed_request", "a line of the body's framing is too long, or ends "
                          "without CRLF")
        self.buffer = rest
        return line[:-1]

    def pieces(self, size: int) -> Iterator[bytes]:
        """Just `size` bytes. Raises Refusal malformed_request when there are fewer."""
        while size:
            # No further than its end: what a buffer holds is copied for every small chunk in it.
            piece = self.buffer or self.receive(min(size, PIECE))
            if not piece:
                raise cut_off()
            self.buffer = piece[size:]
            piece = piece[:size]
            size -= len(piece)
            yield piece

    def send(self, data: bytes) -> None:
        """Raises OSError when the client is gone, or has not read all of it in time."""
        rest = memoryview(data)
        while rest:
            self._wait_at_most()
            rest = rest[self.socket.send(rest):]

    def leave(self) -> None:
        """Close so that the answer gets through.

        Closing a socket with unread bytes resets the connection, and a reset throws away what the
        client has not read yet: so only this side is closed, and what still comes is read for
        as long as the answer's clock allows (RFC 9112 section 9.6).
        """
        if self.hurry:
            self.deadline = min(self.deadline, time.monotonic() + 1)
        with contextlib.suppress(OSError):
            if isinstance(self.socket, ssl.SSLSocket):
                self.socket.settimeout(0)
                with contextlib.suppress(OSError):
                    self.socket.unwrap()            # close_notify is sent, and not waited for
            self.socket.shutdown(socket.SHUT_WR)
            piece = b"more"
            while piece:
                self._wait_at_most()
                piece = self.socket.recv(PIECE)


def cut_off() -> Refusal:
    return Refusal("malformed_request", "the request ended before it was whole")


def read_head(wire: Wire, request: Request) -> list[bytes]:
    """The header lines as they came; the request line goes into the request when it is whole.

    Raises Refusal malformed_request, request_too_large, request_timeout,
    http_version_not_supported.
    """
    while not wire.buffer or wire.buffer == b"\r":
        more_or_cut_off(wire)
    if wire.buffer.startswith(b"\r\n"):       # RFC 9112 section 2.2 has one of these be ignored
        wire.buffer = wire.buffer[2:]
    while True:
        head, end, rest = wire.buffer.partition(b"\r\n\r\n")
        check_arriving(head + end[:2], request)
        if end:
            wire.buffer = rest
            return head.split(b"\r\n")[1:]
        more_or_cut_off(wire)


def more_or_cut_off(wire: Wire) -> None:
    if not wire.more():
        raise cut_off()
    wire.engaged = True


def check_arriving(head: bytes, request: Request) -> None:
    """Raises Refusal for what can't become a head any more, whatever may follow."""
    if head.startswith(b"\x16\x03"):
        raise Refusal("malformed_request", "this port speaks plain http, not https")
    if NEVER_IN_HEAD.search(head):
        raise Refusal("malformed_request", "a control character, or a line that ends without CRLF")
    request_line, end, _ = head.partition(b"\r\n")
    if len(request_line) > MAX_REQUEST_LINE:
        raise Refusal("request_too_large", status=414)
    if end and request.method == "-":
        parse_request_line(request_line, request)
    if len(head) > MAX_HEAD or head.count(b"\r\n") > MAX_HEADERS + 1:
        raise Refusal("request_too_large", status=431)


def parse_request_line(line: bytes, request: Request) -> None:
    """Fill in the request's method, version and path.

    Raises Refusal malformed_request, http_version_not_supported.
    """
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal("malformed_request", "the request line must be: method, space, target, "
                      "space, HTTP/1.1")
    request.method, target, version = (part.decode("ascii") for part in match.groups())
    if version not in ("1.0", "1.1"):
        raise Refusal("http_version_not_supported")
    request.version, request.path = version, path_of(target, request.method)


def parse_headers(lines: Iterable[bytes], request: Request) -> None:
    """Fill in the request's headers. Raises Refusal malformed_request."""
    request.headers = headers = parse_fields(lines)
    # Of two Host lines, which arrive joined, the comma is what no host has in it.
    if not HOST.fullmatch(headers.get("host", "," if request.version == "1.1" else "")):
        raise Refusal("malformed_request", "HTTP/1.1 takes one Host header")
    if request.version == "1.0" and "transfer-encoding" in headers:
        raise Refusal("malformed_request", "HTTP/1.0 has no Transfer-Encoding")


def path_of(target: str, method: str) -> str:
    """The path of a request target in any of its four forms (RFC 9112 section 3.2)."""
    match = ORIGIN_FORM.fullmatch(target) or ABSOLUTE_FORM.fullmatch(target)
    if match:
        return match[1] or "/"
    if target == "*" and method == "OPTIONS" or method == "CONNECT":
        return target.partition("?")[0]
    raise Refusal("malformed_request", "the request target must begin with / or http://")


def parse_fields(lines: Iterable[bytes]) -> dict[str, str]:
    """Header lines as a dict of lower-case names; the values of one name joined by a comma."""
    fields: dict[str, str] = {}
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise Refusal("malformed_request", "a header must be: name, colon, value, on one line")
        name = match[1].decode("ascii").lower()
        value = match[2].strip(b" \t").decode("latin-1")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


class Body:
    """The body of a request as it comes, a Readable."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int) -> bytes:
        rest = self._rest or next(self._pieces, b"")
        self._rest = rest[size:]
        return rest[:size]


def body_of(wire: Wire, request: Request) -> Iterator[bytes]:
    """The pieces of the body. Nothing is read before the first is asked for."""
    headers = request.headers
    if request.version == "1.1" and headers.get("expect", "").lower() == "100-continue":
        # Only now: who is refused by the headers alone need not send the body.
        with contextlib.suppress(OSError):
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    if "transfer-encoding" in headers:
        yield from chunks(wire)
    else:
        yield from wire.pieces(int(headers.get("content-length", "0")))


def chunks(wire: Wire) -> Iterator[bytes]:
    """The data of a chunked body (RFC 9112 section 7.1); extensions and trailers are dropped."""
    while True:
        match = CHUNK_LINE.fullmatch(wire.line(MAX_CHUNK_LINE))
        if not match:
            raise Refusal("malformed_request", "a chunk must begin with its size in hexadecimal")
        size = int(match[1], 16)
        if not size:
            break
        yield from wire.pieces(size)
        if wire.line(MAX_CHUNK_LINE):
            raise Refusal("malformed_request", "a chunk is longer than it says")
    trailers = list(itertools.islice(iter(lambda: wire.line(MAX_HEAD), b""), MAX_HEADERS + 1))
    if len(trailers) > MAX_HEADERS:
        raise Refusal("malformed_request", "too many trailers")
    parse_fields(trailers)


def render(response: Response, version: str = "1.1") -> bytes:
    """The answer as bytes, in one piece so that it leaves in one write."""
    phrase = http.HTTPStatus(response.status).phrase
    lines = [f"HTTP/{version} {response.status} {phrase}",
             f"Date: {email.utils.formatdate(usegmt=True)}",
             *(f"{name}: {value}" for name, value in response.headers), "Connection: close"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + response.body


# What a client wrote must not forge a line of the log, or steer the terminal that shows it.
UNPRINTABLE = re.compile(r"[^!-\[\]-~]")


def log_request(request: Request, response: Response, note: str = "") -> None:
    """One line: id, client, institution, method, path, status, rows received/imported/rejected,
    milliseconds, and the error. The time stands in front of it."""
    method, path = (UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]):02x}", text[:200])
                    for text in (request.method, request.path))
    counts = request.counts
    rows = f"{counts.received}/{counts.imported}/{counts.rejected}" if counts else "-"
    log.info("%s %s %s %s %s %d %s %dms%s", request.id, request.client, request.institution,
             method, path, response.status, rows, request.milliseconds,
             "".join(f" {word}" for word in (response.error, note) if word))


class Server(socketserver.ThreadingTCPServer):
    """A thread for each connection, one request each; how many there may be is decided here.

    socketserver is the layer under http.server. It takes a connection and starts a thread; all of
    HTTP is `converse`.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128        # connections that wait to be accepted
    # On Windows the option lets two servers share a port (cpython#85307).
    allow_reuse_address = os.name != "nt"

    def __init__(self, service: Service) -> None:
        """Bind and listen. Raises OSError."""
        settings = service.configuration.settings
        self.service = service
        self.wires: dict[socket.socket, Wire] = {}      # of the connections that are being served
        self.crowd: dict[str, int] = {}                 # how many of them each client has
        self.refused: list[tuple[float, socket.socket]] = []    # told busy, and until when to stay
        self.lock = threading.Condition()               # of the first two
        if ":" in settings["host"]:
            self.address_family = socket.AF_INET6
        super().__init__((settings["host"], settings["port"]), socketserver.BaseRequestHandler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        scheme = "https" if self.service.configuration.tls else "http"
        name = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"{scheme}://{name}:{port}"

    def server_bind(self) -> None:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer.server_bind: that looks up the host's name, 5 to 35 s where there is no
        # resolver (bpo-35164).
        super().server_bind()

    # In the accepting thread, where nothing may wait.

    def process_request(self, request: Any, client_address: Any) -> None:
        connection, peer = request, client_address[0]       # request is socketserver's word for it
        key = self.enter(connection, peer)
        if key is None:
            self.refuse(connection, peer)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:        # the system has no thread left
            self.exit(connection, key)
            self.refuse(connection, peer)

    def enter(self, connection: socket.socket, peer: str) -> str | None:
        """Count the connection in, and say under which key; None if there is no place for it."""
        settings = self.service.configuration.settings
        address, key = parse_address(peer), client_key(peer)
        if any(address in network for network in settings["trusted_proxies"]):
            most = settings["max_connections"]
        else:
            most = settings["max_connections_per_client"]
        with self.lock:
            if len(self.wires) >= settings["max_connections"] or self.crowd.get(key, 0) >= most:
                return None
            self.crowd[key] = self.crowd.get(key, 0) + 1
            self.wires[connection] = Wire(connection, settings["request_timeout"])
        return key

    def exit(self, connection: socket.socket, key: str) -> None:
        with self.lock:
            self.wires.pop(connection, None)
            self.crowd[key] -= 1
            if not self.crowd[key]:
                del self.crowd[key]
            self.lock.notify_all()

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError as error:
            # Out of file descriptors, say: the connection stays in the queue, and the loop would
            # come back for it at once, for ever.
            log.error("- cannot accept: %s", error)
            time.sleep(0.5)
            raise

    def refuse(self, connection: socket.socket, peer: str) -> None:
        """503 without a thread: what fits in the socket's buffer, at once or not at all."""
        request = Request(peer, client=client_address(peer, "", ()))
        response = refuse_to(request, Refusal("busy", "too many connections: try again",
                                              retry_after=1))
        log_request(request, response)
        connection.settimeout(0)
        with contextlib.suppress(OSError):
            if not self.service.configuration.tls:      # a handshake would have to wait
                connection.send(render(response))
            connection.shutdown(socket.SHUT_WR)
        self.refused.append((time.monotonic() + REFUSED_SECONDS, connection))

    def service_actions(self) -> None:
        """Close the refused when they have read it, when their time is up, or when they are many;
        see Wire.leave for what is read from them meanwhile."""
        first = len(self.refused) - MAX_REFUSED
        keep = []
        for index, (until, connection) in enumerate(self.refused):
            if index >= first and time.monotonic() < until and swallow(connection):
                keep.append((until, connection))
            else:
                connection.close()
        self.refused = keep

    # In the connection's thread.

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            converse(self.service, self.wires[request], client_address[0])
        finally:
            self.wires[request].socket.close()      # with TLS it is another than `request`
            self.exit(request, client_key(client_address[0]))

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)     # Wire.leave has said good-bye

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error:
            log.error("- connection %s", describe(error))

    # In the main thread.

    def leave(self, seconds: float) -> None:
        """Accept no more, let requests in flight finish for as long as this, close the rest."""
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        with self.lock:
            for wire in self.wires.values():
                wire.hurry = True
                if not wire.engaged:
                    with contextlib.suppress(OSError):
                        # Not SSLSocket's, which pulls TLS away under the thread that reads.
                        # What has come already is still read, and answered.
                        socket.socket.shutdown(wire.socket, socket.SHUT_RD)
            self.lock.wait_for(lambda: not self.wires, deadline - time.monotonic())


def swallow(connection: socket.socket) -> bool:
    """Read away what has come, without waiting for more. False if no more will come."""
    try:
        for _ in range(16):         # others want to be accepted meanwhile
            if not connection.recv(PIECE):
                return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def converse(service: Service, wire: Wire, peer: str) -> None:
    """One connection, from its first byte to its last: one request, one answer."""
    request = Request(peer, client=client_address(peer, "", ()))
    tls = service.configuration.tls
    if tls:
        try:
            wire.secure(tls)
        except OSError as error:
            log.info("%s %s TLS handshake failed: %s", request.id, request.client, error)
            return

    def receive(request: Request) -> None:
        parse_headers(read_head(wire, request), request)
        request.body = Body(body_of(wire, request))

    response = service.handle(request, receive)
    if wire.ended and not wire.engaged:
        return                          # it came and went without a word
    wire.deadline = time.monotonic() + wire.seconds
    note = ""
    try:
        wire.send(render(response, request.version))
    except OSError:
        note = "client gone"
    log_request(request, response, note)
    wire.engaged = False
    wire.leave()


def log_to(handler: logging.Handler) -> None:
    """Each line begins with the time, in UTC, as ISO 8601 has it."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


class WSGIBody:
    """The body as a WSGI server hands it on (PEP 3333): no further than Content-Length, or to its
    end where the server says that there is one. A Readable."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._input: BinaryIO = environ["wsgi.input"]
        self._open_end = not environ.get("CONTENT_LENGTH") and \
            bool(environ.get("wsgi.input_terminated"))
        self._lost = not self._open_end and "HTTP_TRANSFER_ENCODING" in environ
        length = environ.get("CONTENT_LENGTH") or "0"
        self._left = int(length) if CONTENT_LENGTH.fullmatch(length) else 0

    def read(self, size: int) -> bytes:
        if self._lost:
            raise Refusal("malformed_request", "this host does not hand chunked bodies on: send "
                          "a Content-Length")
        if not self._open_end:
            size = min(size, self._left)
        try:
            piece = self._input.read(size)
        except Exception:  # noqa: BLE001  PEP 3333 does not say what a broken connection raises
            raise cut_off() from None
        if not self._open_end:
            if size and not piece:
                raise cut_off()
            self._left -= len(piece)
        return piece


def wsgi_request(environ: Mapping[str, Any]) -> Request:
    headers = {key[5:].replace("_", "-").lower(): str(value) for key, value in environ.items()
               if key.startswith("HTTP_")}
    for key in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(key):
            headers[key.replace("_", "-").lower()] = environ[key]
    return Request(environ.get("REMOTE_ADDR", ""), environ["REQUEST_METHOD"],
                   environ.get("PATH_INFO") or "/", headers=headers, body=WSGIBody(environ))


wsgi_lock = threading.Lock()


@functools.cache
def wsgi_service() -> Service:
    log_to(logging.StreamHandler(sys.stderr))
    configuration = load_configuration()
    for warning in configuration.warnings:
        log.warning("%s", warning)
    return Service(configuration)


def application(environ: Mapping[str, Any],
                start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The WSGI callable (PEP 3333). It reads its configuration at the first request."""
    request = wsgi_request(environ)
    try:
        with wsgi_lock:
            service = wsgi_service()
        response = service.handle(request)
    except CommandError as error:
        for fault in error.args:
            log.error("%s", fault)
        response = refuse_to(request, Refusal("server_error", request_id=request.id))
    log_request(request, response)
    status = f"{response.status} {http.HTTPStatus(response.status).phrase}"
    start_response(status, list(response.headers))
    return [response.body]


# ---------------------------------------------------------------------------------------------
# The pushing side
# ---------------------------------------------------------------------------------------------

ATTEMPTS = 5                        # further ones after a fault of the connection or the server
MAX_WAITS = 100                     # of 429 and 503 in a row, before a page is given up
ANSWER_TIMEOUT = 60.0               # seconds without a byte
NO_ANSWER = 599                     # the status we give to a connection that failed


class Row(NamedTuple):
    """A row of a file, or what is wrong with it."""

    line: int                       # in the file, from 1; in JSON the number of the item
    student: Student | Fault


class Rejected(NamedTuple):
    """A row that was not imported."""

    line: int
    field: str | None
    error: str
    message: str


class Answer(NamedTuple):
    """What a server answered to a page."""

    status: int
    retry_after: int | None      # seconds
    document: Mapping[str, Any]

    def __str__(self) -> str:
        words = ": ".join(str(self.document[key]) for key in ("error", "detail")
                          if key in self.document)
        return words if self.status == NO_ANSWER else f"the server answered {self.status} {words}"


@dataclass
class Summary:
    """What a push has come to so far."""

    stopped: str = ""               # why it ended before its end
    sent: int = 0
    set_aside: int = 0              # rejected before they were sent
    new: int = 0
    updated: int = 0
    unchanged: int = 0
    rejected: list[Rejected] = default_of(default_factory=list)
    started: float = default_of(default_factory=time.monotonic)

    def add(self, page: Sequence[Row], document: Mapping[str, Any]) -> None:
        """Count an answer in; its row numbers become lines of the file."""
        try:
            new, updated, unchanged = (int(document["details"][key])
                                       for key in ("imported", "updated", "unchanged"))
            self.reject(page, document["errors"])
        except (LookupError, TypeError, ValueError, OverflowError):
            raise CommandError("stopped: the server answered 200, but not as sis_sync "
                               "does") from None
        self.sent += len(page)
        self.new += new
        self.updated += updated
        self.unchanged += unchanged

    def set_aside_faults(self, page: Sequence[Row]) -> list[Row]:
        """Take note of the rows that the file itself spoilt; the others are left to be sent."""
        self.rejected += [Rejected(row.line, *row.student) for row in page
                          if isinstance(row.student, Fault)]
        good = [row for row in page if not isinstance(row.student, Fault)]
        self.set_aside += len(page) - len(good)
        return good

    def reject(self, page: Sequence[Row], errors: Iterable[Mapping[str, Any]]) -> None:
        """Raises LookupError, TypeError or ValueError for what are no errors of this page."""
        lines = dict(enumerate((row.line for row in page), 1))
        self.rejected += [Rejected(lines[error["row"]], error["field"], str(error["error"]),
                                   str(error["message"])) for error in errors]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Progress:
    """How far a push is: a bar on a terminal, elsewhere a line for each page."""

    def __init__(self, stream: TextIO, total: int | None, indent: str = "") -> None:
        self.stream, self.total, self.indent = stream, total, indent
        self.bar = stream.isatty()

    def show(self, summary: Summary, waiting: str = "") -> None:
        total = f" of {self.total:,}" if self.total is not None else ""
        done = summary.sent + summary.set_aside
        rate = done / max(summary.seconds, 0.001)
        text = f"{done:,}{total} students"
        if done:
            text += f", {rate:,.0f}/s"
        if self.total and done:
            left = math.ceil(max(0, self.total - done) / rate)
            text += f", {left // 60}:{left % 60:02} left"
        if waiting:
            text += f", {waiting}"
        if self.bar:
            share = min(20, 20 * done // self.total) if self.total else 0
            text = f"\r\x1b[K{self.indent}[{'#' * share:<20}] {text}"
        else:
            text = f"{self.indent}{text}\n"
        self._write(text)

    def end(self) -> None:
        if self.bar:
            self._write("\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):      # a push goes on when nobody looks any more
            self.stream.write(text)
            self.stream.flush()


class Client:
    """The pushing side of the contract: pages, patience, and no page lost or sent for nothing."""

    def __init__(self, url: str, secret: str, cohort_id: str, progress: Progress,
                 ca_file: str | None = None) -> None:
        """Raises CommandError for a URL that is none, or certificates that can't be read."""
        self.secret, self.cohort_id, self.progress = secret, cohort_id, progress
        self.summary = Summary()
        self.stopping = threading.Event()       # set by Ctrl-C: stop where a page ends
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = str(parts.hostname or "").encode("idna").decode("ascii"), parts.port
        except ValueError:
            host = ""
        if not host or parts.scheme not in ("http", "https"):
            raise CommandError(f"--url {url}: must be http:// or https://, and a host")
        self.path = urllib.parse.quote(parts.path.rstrip("/"), safe="/%") or SYNC_PATH
        here = ("localhost", "127.0.0.1", "::1")
        self.in_clear_text = parts.scheme == "http" and host not in here
        connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=ca_file)
            except OSError as error:        # ssl.SSLError is one
                raise CommandError(f"--ca-file {ca_file}: {error.strerror or error}") from None
            connect = functools.partial(http.client.HTTPSConnection, context=context)
        self.connect = functools.partial(connect, host, port, timeout=ANSWER_TIMEOUT)

    def push(self, rows: Iterable[Row], page_size: int) -> Summary:
        """Send all rows, page by page. Raises CommandError where the server says no for good,
        KeyboardInterrupt after Ctrl-C; `summary` then tells how far it came."""
        self.page_size = page_size
        rows = iter(rows)
        try:
            while page := list(itertools.islice(rows, self.page_size)):
                good = self.summary.set_aside_faults(page)
                if good:
                    self.send(good)
                self.progress.show(self.summary)
                if self.stopping.is_set():
                    raise KeyboardInterrupt
        finally:
            self.progress.end()
        return self.summary

    def send(self, page: Sequence[Row]) -> None:
        """Send one page, again and again if that may help; the same page twice does no harm."""
        failures = waits = 0
        while True:
            answer = self.post({"cohort_id": self.cohort_id,
                                "students": [row.student for row in page]})
            if answer.status == 200:
                self.summary.add(page, answer.document)
                return
            if answer.status == 413 and len(page) > 1:
                self.page_size = len(page) // 2     # of the pages to come, too
                while page:
                    some, page = page[:self.page_size], page[self.page_size:]
                    self.send(some)
                return
            if answer.status in (429, 503) and answer.retry_after and waits < MAX_WAITS:
                waits += 1
                self.wait(answer.retry_after,
                          "rate limited" if answer.status == 429 else "server busy")
            elif (answer.status in (408, 429) or answer.status >= 500) and failures < ATTEMPTS:
                failures += 1
                # Jitter, so that the clients of a server that comes back don't come all at once.
                self.wait(2 ** (failures - 1) * random.uniform(0.75, 1.25), str(answer))
            else:
                with contextlib.suppress(LookupError, TypeError, ValueError):
                    self.summary.reject(page, answer.document.get("errors", ()))
                raise CommandError(f"stopped: {answer}")

    def wait(self, seconds: float, why: str) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            left = until - time.monotonic()
            self.progress.show(self.summary, f"{why}: {math.ceil(left)} s")
            # On a terminal the seconds are counted down.
            if self.stopping.wait(min(left, 1) if self.progress.bar else left):
                raise KeyboardInterrupt

    def post(self, document: Mapping[str, object]) -> Answer:
        """One request. A connection that fails counts as a fault of the server, NO_ANSWER.

        Raises CommandError for a certificate that does not verify: no later attempt would.
        """
        headers = {"Authorization": f"Bearer {self.secret}", "Content-Type": "application/json",
                   "User-Agent": f"sis_sync/{__version__}"}
        try:
            body = json.dumps(document, allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise CommandError("stopped: a row can't be written as JSON") from None
        connection = self.connect()
        try:
            connection.connect()
            # A server that refuses a request early closes while it is being sent; its answer is
            # there to be read all the same.
            with contextlib.suppress(ConnectionError):
                connection.request("POST", self.path, body, headers)
            response = connection.getresponse()
            text = response.read()
        except ssl.SSLCertVerificationError as error:
            raise CommandError("stopped: the server's certificate is not trusted: "
                               f"{error.verify_message}; --ca-file names one to trust") from None
        except (OSError, http.client.HTTPException) as error:
            hint = "" if isinstance(connection, http.client.HTTPSConnection) or isinstance(
                error, ConnectionRefusedError) else "; does it speak https?"
            return Answer(NO_ANSWER, None, {"error": "no answer", "detail": f"{error}{hint}"})
        finally:
            connection.close()
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        return Answer(response.status, seconds_of(response.headers.get("Retry-After", "")),
                      answer if isinstance(answer, dict) else {})


def seconds_of(retry_after: str) -> int | None:
    """Retry-After is a number of seconds or a date (RFC 9110 section 10.2.3)."""
    if re.fullmatch(r"[0-9]{1,6}", retry_after):
        return max(1, int(retry_after))
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
        return max(1, math.ceil(date.timestamp() - time.time()))
    except (TypeError, ValueError, OverflowError):
        return None


# ---------------------------------------------------------------------------------------------
# Roster files: CSV as it is found, OneRoster's users.csv, JSON
# ---------------------------------------------------------------------------------------------

# OneRoster 1.1 and 1.2 (1EdTech), users.csv: which column becomes which field. sourcedId is the one
# that is always there; `--map student_id_ext=identifier` takes the number that people read.
ONEROSTER = {"student_id_ext": "sourcedId", "email": "email", "first_name": "givenName",
             "last_name": "familyName"}
BOOLEANS = {"true": True, "yes": True, "y": True, "t": True, "1": True,
            "false": False, "no": False, "n": False, "f": False, "0": False}
# What Excel makes of a long number: its last digits are lost for good.
SCIENTIFIC = re.compile(r"[0-9]([.,][0-9]+)?E\+[0-9]{2,}", re.IGNORECASE)
ANYONE = Institution("", (), {})


class RosterFile(NamedTuple):
    """A file to push: its rows as a stream, how many there will be, what a person should know."""

    rows: Iterator[Row]
    total: int
    notes: tuple[str, ...]


def open_roster_file(path: str, mapping: Mapping[str, str]) -> RosterFile:
    """Read a file, or standard input for "-". mapping: field to header, from --map.

    Raises CommandError for a file that can't be understood. Rows with a fault are Faults.
    """
    try:
        file: BinaryIO = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
        if not file.seekable() or path == "-":
            pipe, file = file, tempfile.TemporaryFile()  # noqa: SIM115  it is read more than once
            shutil.copyfileobj(pipe, file)
        file.seek(0)
        start = file.read(4096)
        file.seek(0)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from error
    for signature, what in ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
                            (b"PK\x03\x04", "an Excel workbook")):
        if start.startswith(signature):
            raise CommandError(f"{path}: is {what}; save it as \"CSV UTF-8\"")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{"):
        return read_json_file(path, file)
    return read_csv_file(path, file, mapping)


def read_json_file(path: str, file: BinaryIO) -> RosterFile:
    """An array of students, or a request body. It is read whole."""
    try:
        document = parse_json(file.read())
    except Refusal as refusal:
        raise CommandError(f"{path}: {refusal.detail.partition(': send')[0]}") from None
    students = document.get("students") if isinstance(document, dict) else document
    if not isinstance(students, list):
        raise CommandError(f"{path}: must be an array of students, or an object that has them in "
                           "students")
    return RosterFile((Row(index, student) for index, student in enumerate(students, 1)),
                      len(students), ())


def read_csv_file(path: str, file: BinaryIO, mapping: Mapping[str, str]) -> RosterFile:
    """CSV with a header: UTF-8, else Windows-1252; comma, semicolon or tab.

    It is read once for its encoding and once for its length before its first row is sent, a line
    at a time: a file of any size takes the same memory.
    """
    text, notes = decode(path, file)
    delimiter = find_delimiter(text)
    leave_out: Callable[[list[str]], bool] = lambda cells: False

    def records() -> Iterator[tuple[int, list[str]]]:
        lines = numbered_cells(text, delimiter)
        next(lines)
        return ((line, cells) for line, cells in lines if not leave_out(cells))

    try:
        _, header = next(numbered_cells(text, delimiter), (0, []))
        if not header:
            raise CommandError(f"{path}: is empty; it must begin with a header")
        while not header[-1].strip():
            header.pop()
        names = [header_key(cell) for cell in header]
        wanted = {name: name for name in NAMES}
        if {"sourcedid", "givenname", "familyname"} <= set(names):
            wanted.update(ONEROSTER)
            leave_out, note = oneroster_filter(path, names)
            notes.append(note)
        columns = find_columns(path, header, {**wanted, **mapping}, mapping)
        notes += describe_columns(header, columns)
        total = sum(1 for _ in records())
    except csv.Error as error:
        raise CommandError(f"{path}: is no CSV: {error}") from None
    rows = (Row(line, student_of(cells, len(header), columns)) for line, cells in records())
    return RosterFile(rows, total, tuple(notes))


def decode(path: str, file: BinaryIO) -> tuple[io.TextIOWrapper, list[str]]:
    """The file as text, and a warning where that is a guess. Raises CommandError."""
    notes: list[str] = []
    for encoding in ("utf-8-sig", "cp1252"):
        file.seek(0)
        text = io.TextIOWrapper(file, encoding, newline="")
        try:
            while text.read(PIECE):
                pass
        except UnicodeDecodeError:
            text.detach()
            notes = ["warning: not UTF-8, so read as Windows-1252: see that names come out right"]
        else:
            text.seek(0)
            return text, notes
    raise CommandError(f"{path}: is neither UTF-8 nor Windows-1252")


def find_delimiter(text: io.TextIOWrapper) -> str:
    """What stands most often in the header, outside quotes; Excel may say it on a line before."""
    header = next((line for line in text if line.strip()), "")
    stated = re.fullmatch(r"sep=(.)\s*", header)
    unquoted = re.sub(r'"[^"]*"', "", header)
    return stated[1] if stated else max(",;\t", key=unquoted.count)


def numbered_cells(text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV with the number of the line each begins on; blank ones are left out."""
    text.seek(0)
    reader = csv.reader(text, delimiter=delimiter)
    line = 1
    for cells in reader:
        if "".join(cells).strip() and not (line == 1 and cells[0] == "sep="):
            yield line, cells
        line = reader.line_num + 1


def header_key(header: str) -> str:
    """"Student ID (ext)", "student-id-ext" and "StudentIdExt" are one."""
    return re.sub(r"[\W_]+", "", header.casefold())


def find_columns(path: str, header: Sequence[str], wanted: Mapping[str, str],
                 mapping: Mapping[str, str]) -> dict[str, int]:
    """The column of each field that has one. Raises CommandError with all that is wrong."""
    names = [header_key(cell) for cell in header]
    columns = {name: names.index(header_key(wanted[name])) for name in NAMES
               if name in wanted and header_key(wanted[name]) in names}
    faults = [f"{path}: no column {wanted.get(field.name, field.name)!r} for {field.name}"
              for field in FIELDS
              if field.name not in columns and (field.required or field.name in mapping)]
    faults += [f"{path}: two columns are called {wanted[name]!r}: rename one" for name in columns
               if names.count(header_key(wanted[name])) > 1]
    if faults:
        raise CommandError(*faults, f"{path}: its header has: {', '.join(header)}",
                           "where a column has another name: --map FIELD=HEADER")
    return columns


def describe_columns(header: Sequence[str], columns: Mapping[str, int]) -> Iterator[str]:
    yield "columns: " + ", ".join(f"{name} from {header[index].strip()!r}"
                                  for name, index in columns.items())
    missing = [name for name in NAMES if name not in columns]
    if missing:
        yield f"no column for {', '.join(missing)}: it will be null for every student"


def student_of(cells: Sequence[str], width: int,
               columns: Mapping[str, int]) -> Student | Fault:
    """A line's cells as a student, or the fault that only the file shows."""
    if len(cells) < width or any(cells[width:]):
        return Fault(None, "wrong_columns", f"{len(cells)} columns where the header has {width}")
    student: dict[str, object] = {name: cells[index] for name, index in columns.items()}
    if SCIENTIFIC.fullmatch(str(student[KEY.name]).strip()):
        return Fault(KEY.name, "scientific_notation", f"{KEY.name} is a number as a spreadsheet "
                     "shortens it, its last digits lost: format the column as text, export again")
    for field in FIELDS:
        if field.kind is bool and field.name in student:
            cell = str(student[field.name]).strip()
            student[field.name] = BOOLEANS.get(cell.casefold(), cell or None)
    return student


def oneroster_filter(path: str, names: Sequence[str]) -> tuple[Callable[[list[str]], bool], str]:
    """Whom to leave out of a OneRoster users.csv: the deleted, and who is no student."""
    status, role, key = (names.index(name) if name in names else None
                         for name in ("status", "role", "sourcedid"))
    students = None if role is not None else oneroster_students(pathlib.Path(path))

    def leave_out(cells: list[str]) -> bool:
        def cell(index: int | None) -> str:
            return cells[index].strip() if index is not None and index < len(cells) else ""
        return (cell(status).lower() == "tobedeleted"
                or role is not None and cell(role).lower() != "student"
                or students is not None and cell(key) not in students)

    if role is None and students is None:
        return leave_out, ("OneRoster users.csv without roles: everybody in it is taken for a "
                           "student; put roles.csv beside it if it has others")
    return leave_out, "OneRoster users.csv: students only, without those to be deleted"


def oneroster_students(users: pathlib.Path) -> set[str] | None:
    """OneRoster 1.2 keeps the roles in roles.csv: who is a student there; None if there is none."""
    roles = users.with_name("roles.csv")
    if str(users) == "-" or not roles.exists():
        return None
    try:
        with open(roles, encoding="utf-8-sig", newline="") as file:
            return {line.get("userSourcedId") or "" for line in csv.DictReader(file)
                    if line.get("role") == "student" and line.get("status") != "tobedeleted"}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"{roles}: {error}") from None


# ---------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------

Arguments = argparse.Namespace


def say(text: str) -> None:
    """What a person reads; stdout is for data. Nobody reading it is no reason to stop."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Words from elsewhere, without what steers a terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def configuration_for(arguments: Arguments) -> Configuration:
    overrides = {key: str(getattr(arguments, key)) for key in ("host", "port")
                 if getattr(arguments, key, None) is not None}
    return load_configuration(getattr(arguments, "config", None), overrides=overrides)


def command_serve(arguments: Arguments) -> int:
    """Run the server until SIGTERM or Ctrl-C."""
    log_to(logging.StreamHandler(sys.stderr))
    configuration = configuration_for(arguments)
    service = Service(configuration)
    signals = incoming_signals()
    with listening(service) as server:
        for line in describe_service(service, server.url):
            log.info("%s", line)
        while next_signal(signals) == getattr(signal, "SIGHUP", None):
            reload(service, arguments)
        log.info("stopping; a second signal stops at once")
        server.leave(SHUTDOWN_TIMEOUT)
    service.roster.close()
    log.info("stopped")
    return 0


def incoming_signals() -> queue.SimpleQueue[int]:
    """SIGTERM, SIGINT and SIGHUP as they come. A second one to stop has its usual effect: the end.

    Nothing else is done where a signal strikes, as that may be in the middle of anything.
    """
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def receive(number: int, frame: object) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signals.put(number)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):           # Windows has no SIGHUP
            signal.signal(getattr(signal, name), receive)
    return signals


def next_signal(signals: queue.SimpleQueue[int]) -> int:
    while True:
        with contextlib.suppress(queue.Empty):
            # On Windows, Ctrl-C does not end a wait that has no end of its own.
            return signals.get(timeout=1)


@contextlib.contextmanager
def listening(service: Service) -> Iterator[Server]:
    """A server that accepts in a thread of its own. Raises CommandError if it can't listen."""
    settings = service.configuration.settings
    try:
        server = Server(service)
    except OSError as error:
        raise CommandError(f"cannot listen on {settings['host']} port {settings['port']}: "
                           f"{error.strerror}") from error
    # Ten times a second, for the sake of the refused: see Server.service_actions.
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    yield server


def describe_service(service: Service, url: str) -> Iterator[str]:
    configuration = service.configuration
    yield f"sis_sync {__version__} listens on {url}{SYNC_PATH}"
    yield f"configuration: {configuration.source or 'defaults, as there is no file'}"
    yield f"database: {os.path.abspath(service.roster.path)}"
    yield from describe_institutions(configuration)


def describe_institutions(configuration: Configuration) -> Iterator[str]:
    for institution in configuration.institutions:
        number = len(institution.digests)
        yield f"institution {institution.name}: " + (
            f"{number} secret{'s' * (number > 1)} set" if number else "no secret set")
    for warning in configuration.warnings:
        yield f"warning: {warning}"


def reload(service: Service, arguments: Arguments) -> None:
    """Read the file again. A faulty one changes nothing."""
    try:
        configuration = configuration_for(arguments)
    except CommandError as error:
        for fault in error.args:
            log.error("not reloaded: %s", fault)
        return
    except Exception as error:  # noqa: BLE001  no file, however odd, stops a running server
        log.error("not reloaded: %s", describe(error))
        return
    old = service.configuration
    if old.source and not configuration.source:
        log.error("not reloaded: %s is not there any more", old.source)
        return
    for key in ("host", "port", "database"):
        if configuration.settings[key] != old.settings[key]:
            log.warning("[server] %s: a change takes a restart", key)
    if bool(configuration.tls) != bool(old.tls):
        log.warning("[server] tls_certificate: from http to https or back takes a restart")
        configuration = configuration._replace(tls=old.tls)
    service.configuration = configuration
    log.info("reloaded: %s", configuration.source or "defaults")
    for line in describe_institutions(configuration):
        log.info("%s", line)


def command_secret(arguments: Arguments) -> int:
    """Print a new secret and its line for sis_sync.ini, or with --hash the line alone."""
    if arguments.hash:
        secret = bare_secret(sys.stdin.buffer.readline())
        if not secret:
            raise CommandError("no secret on standard input")
    else:
        secret = b"sis_" + secrets.token_urlsafe(32).encode()
        print(secret.decode())
        say("above: the secret, for whoever pushes; it is not kept anywhere. "
            "below: for secrets = in sis_sync.ini")
    print("sha256:" + hashlib.sha256(secret).hexdigest())
    return 0


def command_check(arguments: Arguments) -> int:
    """Say all that is wrong with the configuration and the database, as a start would."""
    try:
        configuration = configuration_for(arguments)
        path = configuration.settings["database"]
        faults = check_database(path)
    except CommandError as error:
        for fault in error.args:
            print(fault)
        return 1
    for line in (*faults, *(f"warning: {warning}" for warning in configuration.warnings)):
        print(line)
    if faults:
        return 1
    print(f"{configuration.source or 'defaults'}: good" + (
        ", with warnings" if configuration.warnings else ""))
    return 0


def check_database(path: str) -> list[str]:
    """What would keep a start from using this database; nothing is changed, or created."""
    if not os.path.exists(path):
        folder = os.path.dirname(path)
        return [] if os.access(folder, os.W_OK) else [f"{folder}: no database can be made here"]
    if not os.access(path, os.R_OK | os.W_OK):
        return [f"{path}: must be readable and writable"]
    try:
        with contextlib.closing(open_database(path, read_only=True)) as connection:
            schema_version(connection)
            found = [row[0] for row in connection.execute("PRAGMA quick_check")]
    except sqlite3.Error as error:
        return [f"{path}: {error}"]
    return [] if found == ["ok"] else [f"{path}: {line}" for line in found]


def command_push(arguments: Arguments) -> int:
    """Send a file to a server, as the roster of one cohort."""
    file = open_roster_file(arguments.file, dict(arguments.map))
    for note in file.notes:
        say(note)
    if arguments.dry_run:
        summary = dry_run(file.rows, arguments.cohort, arguments.batch)
        report(summary, arguments)
        return 1 if summary.rejected else 0
    if not arguments.url:
        raise CommandError("push takes --url URL, or --dry-run")
    client = Client(arguments.url, push_secret(arguments.secret_file), arguments.cohort,
                    Progress(sys.stderr, file.total), arguments.ca_file)
    if client.in_clear_text:
        say("warning: http:// to another machine sends the secret and the students in clear text")
    status = 0
    with stopped_by_ctrl_c(client.stopping):
        try:
            client.push(file.rows, arguments.batch)
        except CommandError as error:
            client.summary.stopped = str(error)
            status = complain(error)
        except KeyboardInterrupt:
            client.summary.stopped = "Ctrl-C"
            status = 130
    report(client.summary, arguments)
    return status or (1 if client.summary.rejected else 0)


def push_secret(file: str | None) -> str:
    """From a file or the environment, never an argument: those anyone on the machine can list."""
    try:
        secret = bare_secret(pathlib.Path(file).read_bytes() if file else os.fsencode(
            os.environ.get("SIS_SYNC_SECRET", ""))).decode("latin-1")
    except OSError as error:
        raise CommandError(f"--secret-file {file}: cannot be read: {error}") from None
    if not re.fullmatch(r"[!-~]+", secret):
        raise CommandError("the secret must be in SIS_SYNC_SECRET or in the file that "
                           "--secret-file names, in printable ASCII")
    return secret


@contextlib.contextmanager
def stopped_by_ctrl_c(stopping: threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets the event, the second is a KeyboardInterrupt."""
    def stop(number: int, frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def dry_run(rows: Iterator[Row], cohort_id: str, page_size: int) -> Summary:
    """What a server without lists would say to each row, by the same functions. Raises Refusal."""
    check_batch({COHORT.name: cohort_id, "students": []}, ANYONE, page_size)
    summary = Summary()
    while page := list(itertools.islice(rows, page_size)):
        good = summary.set_aside_faults(page)
        _, faults = check_rows([row.student for row in good], ANYONE)
        summary.sent += len(good)
        summary.reject(good, row_errors(faults))
    return summary


def report(summary: Summary, arguments: Arguments) -> None:
    """The end of a push: the counts, every rejected row with its line, and what to do next."""
    summary.rejected.sort(key=lambda rejected: rejected.line)
    count = {"checked" if arguments.dry_run else "sent": summary.sent}
    document = {"cohort_id": arguments.cohort, "stopped": summary.stopped or None, **count,
                "new": summary.new, "updated": summary.updated, "unchanged": summary.unchanged,
                "rejected": [rejected._asdict() for rejected in summary.rejected],
                "seconds": round(summary.seconds, 3)}
    if arguments.json:
        print(json.dumps(document))
        return
    (done, number), = count.items()
    print(printable(f"cohort {arguments.cohort}: {'stopped after ' * bool(summary.stopped)}"
                    f"{number:,} students {done} in {summary.seconds:.1f} s"))
    counts = "" if arguments.dry_run else (
        f"new {summary.new:,}, updated {summary.updated:,} (of these unchanged "
        f"{summary.unchanged:,}), ")
    print(f"  {counts}rejected {len(summary.rejected):,}")
    for rejected in summary.rejected:
        print(printable(f"  line {rejected.line}: {rejected.error}: {rejected.message}"))
    if summary.stopped:
        print("What is sent is stored. Push the whole file again when the cause is mended; that is "
              "safe.")
    elif summary.rejected:
        print("Mend these lines and push the whole file again; it is safe, however often.")
    elif not arguments.dry_run:
        print("To push the same file again is safe, however often.")


def command_export(arguments: Arguments) -> int:
    """Write the roster of one cohort as CSV, the way push takes it back."""
    with reading(arguments) as (connection, configuration):
        if arguments.output and os.path.exists(arguments.output) and os.path.samefile(
                arguments.output, configuration.settings["database"]):
            raise CommandError(f"{arguments.output}: is the database itself")
        before = arguments.not_seen_since
        roster_id = find_roster(connection, arguments)
        rows = connection.execute(
            f"SELECT {', '.join(NAMES)} FROM entries WHERE roster_id = ? AND (? IS NULL OR "
            f"seen_at < ?) ORDER BY {KEY.name}", (roster_id, before, before))
        with writing(arguments.output) as file:
            if arguments.excel:
                file.write("\ufeff")
            writer = csv.writer(file)
            writer.writerow(NAMES)
            safe = harmless if arguments.excel else str
            writer.writerows([safe(text_of(field, value)) for field, value in zip(FIELDS, row)]
                             for row in rows)
    return 0


def text_of(field: Field, value: Any) -> str:
    if value is None:
        return ""
    return str(bool(value)).lower() if field.kind is bool else str(value)


def harmless(cell: str) -> str:
    """A cell that no spreadsheet runs as a formula (CWE-1236)."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


@contextlib.contextmanager
def reading(arguments: Arguments) -> Iterator[tuple[sqlite3.Connection, Configuration]]:
    """The configured database, read-only, whether a server runs on it or not."""
    configuration = configuration_for(arguments)
    path = configuration.settings["database"]
    if not os.path.exists(path):
        raise CommandError(f"{path}: there is no database yet; the server makes it at its start")
    with contextlib.closing(open_database(path, read_only=True)) as connection:
        schema_version(connection)
        yield connection, configuration


@contextlib.contextmanager
def writing(path: str | None) -> Iterator[TextIO]:
    """A new file that only its owner can read, or stdout; line ends are left to csv."""
    if path is None:
        file = io.TextIOWrapper(sys.stdout.buffer, "utf-8", newline="")
        yield file
        file.detach()               # with what is left in it written, and stdout not closed
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    # The file may have been there. (Windows has no modes; and /dev/null is everybody's.)
    if hasattr(os, "fchmod") and stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fchmod(descriptor, 0o600)
    with open(descriptor, "w", encoding="utf-8", newline="") as output:
        yield output


def find_roster(connection: sqlite3.Connection, arguments: Arguments) -> int:
    """The one roster that --institution and --cohort leave. Raises CommandError, naming them."""
    rosters = connection.execute("SELECT roster_id, institution, cohort_id FROM rosters "
                                 "ORDER BY institution, cohort_id").fetchall()
    meant = [row for row in rosters if arguments.institution in (None, row[1])
             and arguments.cohort in (None, row[2])]
    if len(meant) != 1:
        raise CommandError("choose one roster:" if meant else "no such roster; there are:",
                           *(f"  --institution {name} --cohort {cohort}"
                             for _, name, cohort in meant or rosters))
    return int(meant[0][0])


def date_argument(text: str) -> int:
    """YYYY-MM-DD in UTC, as seconds since 1970."""
    try:
        return calendar.timegm(time.strptime(text, "%Y-%m-%d"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a date, YYYY-MM-DD") from None


def hours_argument(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of hours")
    return float(text)


def number_argument(high: int) -> Callable[[str], int]:
    kind = whole_number(1, high)

    def read(text: str) -> int:
        try:
            return int(kind.read(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: must be {kind.allowed}") from None

    return read


HISTORY_COLUMNS = ("time", "institution", "cohort_id", "client", "received", "new", "updated",
                   "unchanged", "rejected", "milliseconds")


def command_history(arguments: Arguments) -> int:
    """List the latest syncs, or with --stale the institutions that have gone quiet."""
    if arguments.stale is not None:
        return stale(arguments)
    with reading(arguments) as (connection, _):
        rows = connection.execute(
            f"SELECT {', '.join(HISTORY_COLUMNS)}, errors FROM syncs ORDER BY sync_id DESC LIMIT ?",
            (arguments.limit,)).fetchall()
    syncs = [{**dict(zip(HISTORY_COLUMNS, row)), "time": iso_time(row[0]),
              "errors": json.loads(row[-1])} for row in rows]
    if arguments.json:
        print(json.dumps(syncs))
        return 0
    lines = table([[printable(str(sync[name])) for name in HISTORY_COLUMNS] for sync in syncs])
    print(next(lines))
    for sync, line in zip(syncs, lines):
        print(line)
        if arguments.errors:
            for error in sync["errors"]:
                print(f"    row {error['row']}: {error['error']}: {error['message']}")
            if sync["rejected"] > len(sync["errors"]):
                print(f"    and {sync['rejected'] - len(sync['errors'])} more")
    return 0


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """An aligned table with a header, at most 100 columns wide: long words are cut."""
    header = [{"cohort_id": "cohort", "milliseconds": "ms"}.get(name, name)
              for name in HISTORY_COLUMNS]
    words = range(1, 4)             # institution, cohort, client
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    while sum(widths) + len(widths) - 1 > 100:
        widest = max(words, key=lambda index: widths[index])
        widths[widest] -= 1
    for row in (header, *rows):
        yield " ".join(
            shortened(cell, width).ljust(width) if index <= words[-1] else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths)))


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + "~"


def iso_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def stale(arguments: Arguments) -> int:
    """Exit status 1, and a line each, if an institution has not pushed for that many hours."""
    with reading(arguments) as (connection, configuration):
        last = dict(connection.execute("SELECT institution, max(time) FROM syncs GROUP BY 1"))
    limit = time.time() - arguments.stale * 3600
    quiet = [institution.name for institution in configuration.institutions
             if last.get(institution.name, 0) < limit]
    for name in quiet:
        print(f"{name}: last sync {iso_time(last[name]) if name in last else 'never'}")
    return 1 if quiet else 0


def command_backup(arguments: Arguments) -> int:
    """Copy the database as it is at one moment, while the server goes on."""
    with reading(arguments) as (source, _):
        try:
            os.close(os.open(arguments.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            raise CommandError(f"{arguments.file}: {error.strerror}") from None
        try:
            with contextlib.closing(open_database(arguments.file)) as target:
                source.backup(target)
        except BaseException:
            os.remove(arguments.file)
            raise
    say(f"{arguments.file}: {os.path.getsize(arguments.file):,} bytes")
    return 0


def made_up_students(number: int) -> list[dict[str, object]]:
    """Students for the demo, the same ones each time."""
    first = ("Alex", "Zoë", "Thị Minh", "Siobhán", "José", "李", "Noor", "Kwame")
    last = ("Connor", "O'Brien", "Nguyễn", "Müller", "王", "Þórsdóttir", "Singh", "da Cruz")
    programs, campuses = ("BUSI", "NURS", "ENGI", None), ("Sunshine Coast", "Fraser Coast", None)
    return [{"student_id_ext": f"U{2025000000 + index}",
             "email": f"student{index}@student.example.edu.au",
             "first_name": first[index % 8], "last_name": last[index // 8 % 8],
             "program_code": programs[index % 4], "campus_name": campuses[index % 3],
             "first_in_family": (True, False, None)[index % 3]} for index in range(number)]


def command_demo(arguments: Arguments) -> int:
    """Show the whole of it on made-up data: a throw-away server, pushes, and what goes wrong."""
    with tempfile.TemporaryDirectory(prefix="sis_sync-") as folder:
        ini = pathlib.Path(folder, "demo.ini")
        ini.write_text("[server]\nport = 0\ndatabase = demo.db\n")
        secret = "sis_" + secrets.token_urlsafe(32)
        service = Service(load_configuration(str(ini), {"SIS_SYNC_SECRET": secret}))
        log_to(logging.FileHandler(ini.with_name("demo.log"), encoding="utf-8"))
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))    # cleaning up first
        with listening(service) as server:
            print(f"A throw-away server at {server.url}, its database and log in {folder} till the "
                  "end\n")
            demo_steps(server.url, secret)
            print(f"\nTo try it while the server runs:\n  curl {server.url}{SYNC_PATH} \\\n"
                  f"    -H 'Authorization: Bearer {secret}' -H 'Content-Type: application/json' "
                  '\\\n    -d \'{"cohort_id": "2026", "students": [{"student_id_ext": "U1", '
                  '"email": "a@example.edu"}]}\'')
            with contextlib.suppress(KeyboardInterrupt):
                if not arguments.once:
                    print("\nThe server runs until you press Ctrl-C.", flush=True)
                while not arguments.once:
                    time.sleep(3600)
            server.leave(SHUTDOWN_TIMEOUT)
        service.roster.close()
        for handler in log.handlers:
            handler.close()
    return 0


def demo_steps(url: str, secret: str) -> None:
    """Each step, and in the end all of them in a table."""
    students = made_up_students(12_000)
    done: list[tuple[str, ...]] = []

    def push(title: str) -> None:
        print(f"{title}:")
        progress = Progress(sys.stdout, len(students), "  ")
        client = Client(url, secret, "2026", progress)
        summary = client.push((Row(index, student) for index, student in enumerate(students, 1)),
                              5000)
        counts = (f"{summary.new:,} new, {summary.updated:,} updated, "
                  f"{summary.unchanged:,} unchanged, {summary.seconds:.1f} s")
        done.append((title, "200", counts))

    def send(title: str, document: Mapping[str, object], secret: str = secret) -> None:
        answer = Client(url, secret, "2026", Progress(sys.stdout, None)).post(document)
        print(f"{title}:\n  {answer.status} {json.dumps(answer.document)}")
        rejected = f"{len(answer.document.get('errors', ()))} rejected"
        done.append((title, str(answer.status), answer.document.get("error", rejected)))

    push("12,000 students in pages of 5,000")
    push("The same again")
    send("A bad row is reported, the good one kept", {
        "cohort_id": "2026", "students": [students[0], {"student_id_ext": "U7"}]})
    send("A request without a cohort", {"students": students[:1]})
    send("A wrong secret", {}, secret="not the secret")
    send("5,001 students at once", {"cohort_id": "2026", "students": students[:5001]})
    small = {"cohort_id": "2026", "students": students[:1]}
    client = Client(url, secret, "2026", Progress(sys.stdout, None))
    while client.post(small).status == 200:
        pass
    send("More than 20 requests in a minute", small)
    print()
    for title, status, what in done:
        print(f"  {title:<42} {status}  {what}")


class Option(NamedTuple):
    """An argument of a command, as argparse takes it."""

    names: tuple[str, ...]
    settings: dict[str, Any]


def option(*names: str, **settings: Any) -> Option:
    return Option(names, settings)


def map_argument(text: str) -> tuple[str, str]:
    field, _, header = text.partition("=")
    if field not in NAMES or not header:
        raise argparse.ArgumentTypeError(f"{text!r}: must be FIELD=HEADER, FIELD being one of "
                                         + ", ".join(NAMES))
    return field, header


COMMANDS: dict[str, tuple[Callable[[Arguments], int], tuple[Option, ...]]] = {
    "serve": (command_serve, (
        option("--host", default=argparse.SUPPRESS, help="instead of the configured one"),
        option("--port", default=argparse.SUPPRESS,
               help="instead of the configured one; 0: any free port"))),
    "demo": (command_demo, (
        option("--once", action="store_true", help="end when all is shown"),)),
    "secret": (command_secret, (
        option("--hash", action="store_true",
               help="read a secret from standard input and print its sha256: line"),)),
    "check": (command_check, ()),
    "push": (command_push, (
        option("file", metavar="FILE", help="CSV, OneRoster users.csv or JSON; -: standard input"),
        option("--url", help="of the server, such as https://sync.example.edu"),
        option("--cohort", metavar="ID", required=True, help="the cohort_id of the roster"),
        option("--secret-file", metavar="PATH",
               help="where the secret is; else the environment's SIS_SYNC_SECRET"),
        option("--map", metavar="FIELD=HEADER", action="append", default=[], type=map_argument,
               help="which column a field is in; may be repeated"),
        option("--dry-run", action="store_true",
               help="check every row, though not against the server's lists, and send nothing"),
        option("--batch", metavar="N", type=number_argument(5000),
               default=5000, help="students in a page (default, and most: 5000)"),
        option("--ca-file", metavar="PATH", help="certificates to trust, in PEM"),
        option("--json", action="store_true", help="print the summary as JSON"))),
    "export": (command_export, (
        option("--institution", metavar="NAME", help="whose; needed if there are several"),
        option("--cohort", metavar="ID", help="which; needed if there are several"),
        option("--output", metavar="FILE", help="instead of standard output"),
        option("--not-seen-since", metavar="DATE", type=date_argument,
               help="only who has been in no sync since YYYY-MM-DD (UTC)"),
        option("--excel", action="store_true",
               help="with a BOM, and no cell that a spreadsheet would run"))),
    "history": (command_history, (
        option("--limit", metavar="N", type=number_argument(10**9), default=20,
               help="how many (default 20)"),
        option("--errors", action="store_true", help="with the rejected rows of each"),
        option("--json", action="store_true", help="as JSON"),
        option("--stale", metavar="HOURS", type=hours_argument,
               help="name the institutions with no sync for so long; exit 1 if there are any"))),
    "backup": (command_backup, (
        option("file", metavar="FILE", help="the copy; it must not exist"),)),
}


def argument_parser() -> argparse.ArgumentParser:
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS,
                        help="the configuration; else SIS_SYNC_CONFIG, else sis_sync.ini beside "
                        "the module")
    parser = argparse.ArgumentParser(
        prog="sis_sync.py", parents=[config],
        description="A school's roster, pushed over HTTP and kept in SQLite. "
        "Without a command: serve.")
    parser.add_argument("--version", action="version", version=f"sis_sync {__version__}")
    for names, settings in COMMANDS["serve"][1]:
        parser.add_argument(*names, **settings)
    parser.set_defaults(command=command_serve)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (function, options) in COMMANDS.items():
        words = str(function.__doc__)
        command = commands.add_parser(name, parents=[config], help=words, description=words)
        command.set_defaults(command=function)
        for names, settings in options:
            command.add_argument(*names, **settings)
    return parser


def complain(error: CommandError) -> int:
    for line in error.args:
        say(f"sis_sync: {line}")
    return 2


def main(words: Sequence[str] | None = None) -> int:
    """The command line. The exit status: 0 well, 1 the work found faults, 2 it can't be done."""
    if sqlite3.sqlite_version_info < (3, 24):
        return complain(CommandError(f"this Python has SQLite {sqlite3.sqlite_version}; "
                                     "3.24 or newer is needed"))
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:                  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):    # a Windows console may not know every letter
            stream.reconfigure(errors="backslashreplace")
    status = 2
    try:
        arguments = argument_parser().parse_args(words)
        if arguments.command in (command_export, command_history):
            status = 0                  # if whoever reads it has enough before the end
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except CommandError as error:
        return complain(error)
    except Refusal as refusal:
        return complain(CommandError(refusal.detail))
    except sqlite3.Error as error:
        return complain(CommandError(f"the database: {error}"))
    except OSError as error:
        # Of stdout, say: the interpreter must not complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status if isinstance(error, BrokenPipeError) else complain(CommandError(str(error)))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

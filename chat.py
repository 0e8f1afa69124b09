"""Any chat completion over HTTP, from any number of threads: retries, limits, redaction, a cache.

    with Chat("http://localhost:8000/v1", "qwen3", timeout=60) as client:
        text, (tokens_in, tokens_out) = client.ask([{"role": "user", "content": "Name a fox."}])

What a failure is decides what follows, also for an error inside a 200:
    busy        429, 498, 503, 529: all threads wait as long as the server says, wherever it says
                it, up to `patience` seconds a call
    transient   lost connection, 408, 409, 425, other 5xx: `retries` more tries, backing off
    timeout     asked once more; the connection is closed, so that the server can stop
    unusable    HTML, cut off, over 4 MiB, refused by `parse`: asked once more
    text        moderation, content filter, context length: final for this text
    final       other 4xx, redirects, a prompt that the server cut
    ChatStop    key, credit, model, parameters, a spent quota; 12 failed calls in a row; 16 attempts
                in a row, over at least 5 s, without any HTTP answer. Every call ends with it.
A key comes from the environment, travels in one header, and is cut out of whatever comes back.
"""

import argparse
import contextlib
import dataclasses
import email.utils
import hashlib
import ipaddress
import json
import math
import os
import queue
import random
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

MAX_BODY = 4 << 20  # bytes of an answer; a verdict takes a few thousand
CONNECT_TIMEOUT = 10.0  # seconds, as all that follow
BACKOFF = 1.0  # before the first retry, then doubled up to 30, times a random 0.5 to 1
BREAKER_FAILURES = 16
BREAKER_SECONDS = 5.0
FAILURES_IN_A_ROW = 12  # calls
BUSY = (429, 498, 503, 529)

T = TypeVar("T")
Usage = tuple[int, int]  # tokens in, tokens out


def say(line: str) -> None:
    print(line, flush=True)


class ChatStop(RuntimeError):
    """No call can succeed: the server refuses the key or the model, or cannot be reached."""


class Unusable(ValueError):
    """What a caller's parser raises for an answer that it cannot use."""


@dataclass(frozen=True)
class Answer:
    """What came of a request. `value` is None without a usable answer; `error` says why."""

    value: Any = None  # what the caller's parser made of it
    error: str = ""
    kind: str = ""  # of the error, as above
    raw: str = ""  # the answer as it came
    model: str = ""  # that answered, in the server's words; "" from the cache
    cached: bool = False
    seconds: float = 0.0  # with all retries
    usage: Usage = (0, 0)  # paid, those of failed tries too


@dataclass(eq=False)
class CallFailed(RuntimeError):
    """A call without a usable answer."""

    kind: str  # as above
    reason: str
    wait: float = 0.0  # seconds that the server asks for
    usage: Usage = (0, 0)  # paid all the same
    raw: str = ""  # the last answer

    def __str__(self) -> str:
        return self.reason


# ----------------------------------------------------------------------------------------- options


def check_url(url: str) -> None:
    """ValueError for what is no base URL."""
    with contextlib.suppress(ValueError):  # from urlsplit
        form = r"https?://[\w.:\[\]-]+(/[^?#@\s]*)?"
        if re.fullmatch(form, url) and urlsplit(url).hostname and urlsplit(url).port != 0:
            return
    raise ValueError(
        "url: write http(s)://host[:port]/path, without user, key or query (not shown)"
    )


def is_local(url: str) -> bool:
    """Whether a URL is on this machine or in a private network."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal"))


def api_key(env_name: str, base_url: str) -> str | None:
    """The key in that environment variable; None for a local server that needs none."""
    key = os.environ.get(env_name, "").strip()
    if key or is_local(base_url):
        return key or None
    ask = f"run `export {env_name}=...` first, or name another variable with --…-key-env"
    raise ChatStop(f"no API key for {base_url}: {ask}")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ChatOptions:
    """Where a model is served and how it is asked: the options --judge-… and --llm-…"""

    url: str = _option("", "OpenAI-style base URL, e.g. http://localhost:8000/v1")
    model: str = _option("", "name of the model at that server")
    key_env: str = _option("", "environment variable that holds the API key")
    extra: str = _option("{}", "JSON object added to every request; null leaves a field out")
    concurrency: int = _option(16, "requests in flight")
    rpm: int = _option(0, "requests per minute; 0: no limit")
    timeout: float = _option(0.0, "seconds per request, to the last byte; 0: 600, flex tier 1200")
    retries: int = _option(4, "tries after the first, for lost connections and server errors")
    patience: float = _option(900.0, "seconds a call waits in all for a busy server")
    price_in: float = _option(0.0, "dollars per million prompt tokens")
    price_out: float = _option(0.0, "dollars per million answer tokens")

    @property
    def extra_body(self) -> dict[str, Any]:
        """`extra` as fields of a request; ValueError where it is no JSON object."""
        with contextlib.suppress(ValueError):
            if isinstance(extra := json.loads(self.extra), dict):
                return extra
        example = """a JSON object such as '{"temperature": 0.2}'"""
        raise ValueError(f"extra {self.extra!r}: write {example}")

    def check(self, prefix: str) -> None:
        """ValueError, with the option's name, for what cannot be used."""
        try:
            _ = self.extra_body
            check_url(self.url or "http://none")
            # A key in place of its name must be neither shown nor recorded.
            usual = re.fullmatch(r"[A-Z_]{,40}\d{,2}[A-Z_]{,40}", self.key_env)
            if self.key_env not in os.environ and not usual:
                raise ValueError("key-env: write the name of a variable that is set (not shown)")
        except ValueError as error:
            raise ValueError(f"--{prefix}-{error}") from None

    def open(self, client: Callable[..., T], **more: Any) -> T:
        """A client (Chat, Judge) with these options and its key from the environment."""
        names = "concurrency rpm timeout retries patience price_in price_out".split()
        more |= {name: getattr(self, name) for name in names} | {"extra_body": self.extra_body}
        return client(self.url, self.model, api_key(self.key_env, self.url), **more)


def add_options(parser: argparse.ArgumentParser, prefix: str, default: ChatOptions) -> None:
    """A group of options, --PREFIX-NAME for each field of ChatOptions."""
    group = parser.add_argument_group(f"{prefix}: any server of OpenAI's chat completions")
    for f in fields(ChatOptions):
        value = getattr(default, f.name)
        about = f.metadata["help"] + (f" [{value}]" if value != "" else "")
        how = {"type": type(value), "default": value, "metavar": f.name.upper()}
        group.add_argument(f"--{prefix}-{f.name.replace('_', '-')}", help=about, **how)


def options_from(values: Mapping[str, Any], prefix: str) -> ChatOptions:
    """ChatOptions out of parsed values that carry the prefix, e.g. vars(args)."""
    options = ChatOptions(**{f.name: values[f"{prefix}_{f.name}"] for f in fields(ChatOptions)})
    options.check(prefix)
    return options


# ------------------------------------------------------------------------------------------- client


def _settle(future: Future[T], work: Callable[..., T], *arguments: Any) -> None:
    """Give the future what work(*arguments) returns or raises, unless it was settled meanwhile."""
    with contextlib.suppress(InvalidStateError):
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)


_KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
for _name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):  # seconds; not on all systems
    if hasattr(socket, _name):
        _KEEP_ALIVE.append((socket.IPPROTO_TCP, getattr(socket, _name), 60))


class _Adapter(HTTPAdapter):
    """Has TCP kept alive, and can cut its connection from another thread."""

    connection: Any = None

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        kind = type(pool).ConnectionCls

        def connect(**how: Any) -> Any:
            how["socket_options"] = [*kind.default_socket_options, *_KEEP_ALIVE]
            self.connection = kind(**how)
            return self.connection

        pool.ConnectionCls = connect
        return pool

    def cut(self) -> None:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # there is none
            socket.socket.shutdown(self.connection.sock, socket.SHUT_RDWR)


class Chat:
    """A client of one model at one server.

    base_url: the URL before /chat/completions.  extra_body: fields of every request, None leaves
    one out.  cache: an SQLite file of answers that processes may share.  prefix: of the options
    that messages name.  limits: concurrency, rpm, timeout, …, as in ChatOptions.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        extra_body: dict[str, Any] | None = None,
        cache: str | Path | None = None,
        prefix: str = "…",
        **limits: Any,
    ) -> None:
        check_url(base_url)
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError("the API key holds white space or other odd characters (not shown)")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model = model
        self.prefix = prefix
        self._key = api_key
        self._secrets = _secrets(api_key)
        self._limits = ChatOptions(base_url, model, **limits)
        body = {"model": model, **(extra_body or {})}
        self._body = {name: value for name, value in body.items() if value is not None}
        flex = self._body.get("service_tier") == "flex"
        self._timeout = self._limits.timeout or (1200.0 if flex else 600.0)
        self._local = threading.local()  # an HTTP session per thread
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._pending: set[Future] = set()
        self._stopped = threading.Event()
        self._stop_reason = ""
        self._lock = threading.Lock()
        self._next_slot = 0.0  # when the next request may go, by the limit or the server
        self._unanswered: list[float] = []  # begin of each attempt in a row without HTTP answer
        self._in_a_row: list[str] = []  # kinds of the failed calls since the last success
        self._success = -math.inf  # when it was
        self._say: Callable[[str], Any] = lambda line: None
        counters = "calls requests cached retries failures tokens_in tokens_out seconds".split()
        self._stats: dict[str, float] = dict.fromkeys(counters, 0)
        self._cache = cache
        columns = "key TEXT PRIMARY KEY, raw TEXT, tokens_in INT, tokens_out INT"
        self._sql(f"CREATE TABLE IF NOT EXISTS verdicts ({columns})")

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def stats(self) -> dict[str, float]:
        """calls (not cached), requests, cached, retries, failures, tokens, seconds, dollars.

        A request that timed out counts a token for four characters of its prompt.
        """
        with self._lock:
            stats = dict(self._stats)
        cost_in = stats["tokens_in"] * self._limits.price_in
        cost_out = stats["tokens_out"] * self._limits.price_out
        return {**stats, "dollars": (cost_in + cost_out) / 1e6}

    def count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._stats[name] += amount

    def request(
        self,
        messages: list[dict],
        parse: Callable[[str], Any] = str,
        *,
        repeat: int = 0,
        key: list[dict] | None = None,
        into: Callable[[Answer], Any] = lambda answer: answer,
    ) -> Future:
        """Ask in the background, unless the cache knows -> Future of into(Answer).

        A failed call gives an Answer without value, which is not cached; result() raises ChatStop.
        repeat: number of this request for the same messages; each is paid for and kept apart.
        key: what stands for the messages in the cache, where they hold something random.
        """
        call = [self._body, key or messages, *([repeat] if repeat else [])]
        name = hashlib.sha256(json.dumps(call, sort_keys=True).encode()).hexdigest()

        def work() -> Any:
            begin = time.monotonic()
            try:
                answer = self._reply(messages, parse)
                row = (name, answer.raw, *answer.usage)
                self._sql("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", *row)
            except CallFailed as fault:
                answer = Answer(None, str(fault), fault.kind, fault.raw, usage=fault.usage)
            return into(dataclasses.replace(answer, seconds=time.monotonic() - begin))

        row = self._sql("SELECT raw, tokens_in, tokens_out FROM verdicts WHERE key = ?", name)
        if not row or None in row:
            return self.start(work)
        try:
            value = parse(without_thinking(row[0]))
        except Unusable:  # stored by an older parser
            return self.start(work)
        self.count(cached=1)
        future: Future = Future()
        _settle(future, into, Answer(value, raw=row[0], cached=True, usage=row[1:]))
        return future

    def _sql(self, statement: str, *values: Any) -> Any:
        """The first row of the cache's answer; opened anew, so that any thread may ask."""
        if not self._cache:
            return None
        try:  # SQLite's own journal, not WAL: safe for many processes, on network file systems too
            with contextlib.closing(sqlite3.connect(self._cache, timeout=60)) as cache, cache:
                return cache.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            mend = "free its disk, move or delete it"
            raise ChatStop(f"cache {self._cache} cannot be used ({error}): {mend}") from error

    def probe(
        self, messages: list[dict], parse: Callable = str, say: Callable[[str], Any] = say
    ) -> Answer:
        """Ask before much depends on it: hardly any retries, a line for each wait; or ChatStop."""
        say(f"asking {self.model} at {self.url}, for up to {self._timeout:.0f} s")
        self._say = say
        try:
            return self._reply(messages, parse, retries=1, timeouts=0)
        except CallFailed as fault:
            raise ChatStop(f"{self.model} at {self.url} gives no usable answer: {fault}") from None
        finally:
            self._say = lambda line: None

    def ask(self, messages: list[dict], parse: Callable[[str], Any] = str) -> tuple[Any, Usage]:
        """One chat completion, with retries, on the caller's thread -> (parse(answer), tokens).

        An Unusable of `parse` makes the answer an unusable one. Raises CallFailed, or ChatStop.
        """
        answer = self._reply(messages, parse)
        return answer.value, answer.usage

    def _reply(
        self, messages: list[dict], parse: Callable, retries: int = 99, timeouts: int = 1
    ) -> Answer:
        retries = min(retries, self._limits.retries)
        once = min(1, retries)
        left = {"transient": retries, "unusable": once, "timeout": min(once, timeouts)}
        begin = time.monotonic()
        busy_since = math.inf
        backoff = BACKOFF
        raw, tokens_in, tokens_out = "", 0, 0
        while True:
            fault = None
            try:
                answer = self._attempt(messages, parse)
                usage = answer.usage
            except CallFailed as error:
                fault, usage, raw = error, error.usage, error.raw or raw
            tokens_in += usage[0]
            tokens_out += usage[1]
            if not fault:
                break
            now = time.monotonic()
            more = min(backoff, max(BACKOFF, fault.wait)) if fault.wait else backoff
            wait = fault.wait + more * random.uniform(0.5, 1)
            if fault.kind == "busy":  # no call gives up while others are served
                busy_since = max(min(busy_since, now), self._success)
                if now + fault.wait - busy_since >= self._limits.patience:
                    fault.reason += (
                        f"; --{self.prefix}-rpm and --{self.prefix}-concurrency ask less"
                    )
                    break
                with self._lock:  # all wait
                    self._next_slot = max(self._next_slot, now + wait)
            elif not left.get(fault.kind):
                break
            else:
                left[fault.kind] -= 1
            self.count(retries=1)
            self._say(f"{fault}; again in {wait:.0f} s")
            self._pause(wait)
            backoff = min(30.0, 2 * backoff)
        seconds = time.monotonic() - begin
        self.count(calls=1, tokens_in=tokens_in, tokens_out=tokens_out, seconds=seconds)
        if not fault:
            self._in_a_row.clear()
            self._success = time.monotonic()
            return dataclasses.replace(answer, usage=(tokens_in, tokens_out))
        self.count(failures=1)
        if not self._unanswered:  # else the circuit breaker counts
            self._in_a_row.append(fault.kind)
        n = len(self._in_a_row)
        texts = self._in_a_row.count("text")
        if n - texts >= FAILURES_IN_A_ROW or texts >= 4 * FAILURES_IN_A_ROW:
            self.stop(f"{n} calls in a row got no usable answer; the last reason: {fault}")
        raise dataclasses.replace(fault, usage=(tokens_in, tokens_out), raw=raw)

    def start(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """work(*arguments) on one of `concurrency` daemon threads."""
        future: Future[T] = Future()
        future.add_done_callback(self._pending.discard)
        with self._lock:
            if self._stopped.is_set():
                future.set_exception(ChatStop(self._stop_reason))
                return future
            self._pending.add(future)
            if len(self._threads) < self._limits.concurrency:
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        self._tasks.put((future, work, *arguments))
        return future

    def _work(self) -> None:
        while task := self._tasks.get():
            _settle(*task)

    def stop(self, reason: str) -> None:
        """End every pending and later call with a ChatStop."""
        with self._lock:
            if self._stopped.is_set():
                return
            self._stop_reason = reason
            self._stopped.set()
        for future in list(self._pending):
            _settle(future, self._pause)  # raises the ChatStop

    def close(self) -> None:
        """Stop, and end the threads; one that waits for a silent server is left behind."""
        self.stop("the client was closed")
        deadline = time.monotonic() + 1.0
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:  # or closing their sessions while Python exits crashes
            thread.join(max(0.0, deadline - time.monotonic()))

    def _pause(self, seconds: float = 0.0) -> None:
        if self._stopped.wait(max(0.0, seconds)):
            raise ChatStop(self._stop_reason)

    def _turn(self) -> None:
        """Wait for a request's turn: the limit per minute, and what a busy server asks of all."""
        interval = 60 / self._limits.rpm if self._limits.rpm else 0.0
        wait = 0.0
        while True:
            self._pause(wait)
            with self._lock:
                now = time.monotonic()
                wait = self._next_slot - now
                if wait <= 0:
                    self._next_slot = now + interval
                    return

    def _attempt(self, messages: list[dict], parse: Callable[[str], Any]) -> Answer:
        """One request; CallFailed or ChatStop."""
        text = "".join(str(message.get("content")) for message in messages)
        size = len(_RUN.sub(r"\1", text))  # a run of blanks or dashes may be one token
        self._turn()
        self.count(requests=1)
        begin = time.monotonic()
        try:
            body = json.dumps({**self._body, "messages": messages}).encode()
            status, headers, data = self._post(body)
        except (requests.RequestException, HTTPError, OSError) as error:
            raise self._no_answer(error, begin, size) from None
        with self._lock:
            self._unanswered.clear()
        text = self._redact(data.decode("utf-8-sig", "replace"))
        if status != 200:
            raise self._refusal(status, headers, text)
        if len(data) > MAX_BODY:
            raise CallFailed("unusable", f"an answer of more than {MAX_BODY >> 20} MiB")
        content, usage, model = self._content(text, headers.get("Content-Type", ""))
        if 0 < usage[0] < size / 8:
            cut = f"the server read {usage[0]} tokens of {size} characters: it cut the prompt"
            raise CallFailed("final", f"{cut}; raise its context length", usage=usage, raw=content)
        try:
            value = parse(without_thinking(content))
        except Unusable as problem:
            raise CallFailed("unusable", str(problem), usage=usage, raw=content) from None
        return Answer(value, raw=content, model=model, usage=usage)

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytearray]:
        """-> status, headers, body up to just over MAX_BODY; TimeoutError, whatever hangs.

        The time-outs of `requests` start anew with every byte, and looking up a name has none. So
        the request runs on a daemon thread, whose connection is cut when time is up.
        """
        session = self._session()
        how: dict[str, Any] = {"timeout": (CONNECT_TIMEOUT, self._timeout), "stream": True}

        def request() -> tuple[int, Mapping[str, str], bytearray]:
            with session.post(self.url, data=body, allow_redirects=False, **how) as response:
                data = bytearray()
                for chunk in response.iter_content(1 << 16):
                    data += chunk
                    if len(data) > MAX_BODY:
                        break
                return response.status_code, response.headers, data

        future: Future = Future()
        threading.Thread(target=_settle, args=(future, request), daemon=True).start()
        try:
            return future.result(self._timeout)
        except FutureTimeout:
            session.get_adapter(self.url).cut()  # type: ignore[attr-defined]
            del self._local.session
            raise TimeoutError from None

    def _session(self) -> requests.Session:
        """The HTTP session of this thread."""
        if not hasattr(self._local, "session"):
            session = self._local.session = requests.Session()
            session.mount(self.url, _Adapter())
            if is_local(self.url):  # no proxy, but certificates of one's own
                session.trust_env = False
                bundles = map(os.environ.get, ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
                session.verify = next(filter(None, bundles), True)
            session.auth = lambda request: request  # else ~/.netrc is asked for a key
            session.headers["Content-Type"] = "application/json"
            session.headers["Accept-Encoding"] = "identity"  # a few bytes could unpack to gigabytes
            if self._key:
                session.headers["Authorization"] = f"Bearer {self._key}"
        return self._local.session

    def _no_answer(self, error: BaseException, begin: float, size: int) -> CallFailed:
        """What an attempt without any HTTP answer is; the circuit breaker counts it."""
        now = time.monotonic()
        sent = not isinstance(error, requests.ConnectTimeout)
        late = sent and isinstance(error, TimeoutError | requests.Timeout)
        while error.__context__:  # the system's own words are at the bottom
            error = error.__context__
        reason = f"no answer within {now - begin:.1f} s"
        if not late:
            reason = f"no connection: {self._said(str(error))}"
        with self._lock:
            self._unanswered.append(begin if late else now)
            attempts = len(self._unanswered)
            dark = now - min(self._unanswered)
        if attempts >= BREAKER_FAILURES and dark >= BREAKER_SECONDS:
            streak = f"{attempts} attempts in a row failed, over {dark:.0f} s"
            last = f"the last with: {reason}. Bring it back, then resume"
            self.stop(f"{self.model} at {self.url} is down: {streak}, {last}")
        paid = (size // 4, 0) if late else (0, 0)
        return CallFailed("timeout" if late else "transient", reason, usage=paid)

    def _refusal(self, status: int, headers: Mapping[str, str], text: str) -> Exception:
        """What an answer other than 200 means: CallFailed, or ChatStop where none can succeed."""
        reason = f"HTTP {status}: {self._said(text)}"
        cause = refused_because(status, text, [name for name in self._body if name != "model"])
        if cause == "text":
            return CallFailed("text", f"{reason} (this text is refused)")
        if status in BUSY and not cause:
            spoken = "\n".join(f"{name}: {value}" for name, value in headers.items())
            return CallFailed("busy", reason, stated_delay(f"{spoken}\n{text}"))
        if status in (408, 409, 425) or status >= 500:
            return CallFailed("transient", reason)
        if 300 <= status < 400:
            place = self._said(headers.get("Location", "?"))
            reason = f"HTTP {status}: redirect to {place}; use that address as URL"
        elif cause not in ("", "extra"):
            reason += f"; see --{self.prefix}-{cause}"
        if status in (400, 422):
            reason += f"""; --{self.prefix}-extra '{{"FIELD": null}}' leaves a field out"""
        if not cause or (status in (400, 422) and self._success > 0):  # others were accepted
            return CallFailed("final", reason)
        self.stop(f"{self.model} at {self.url} refuses: {reason}")
        return ChatStop(self._stop_reason)

    def _content(self, text: str, content_type: str) -> tuple[str, Usage, str]:
        """Answer, cost and model in the body of a 200; CallFailed or ChatStop without one."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            what = f"{content_type or 'no content type'}: {self._said(text)[:100]}"
            reason = f"HTTP 200 without JSON ({what}); is the URL right?"
            raise CallFailed("unusable", reason) from None
        body = _at(body, 0) or body
        usage = _usage(body)
        choice = _at(body, "choices", 0)
        if error := _at(body, "error") or _at(choice, "error"):
            text = json.dumps({"error": error})
            if status := _status(error):
                raise self._refusal(status, {}, text)
            raise CallFailed("unusable", f"an error in a 200: {self._said(text)}", usage=usage)
        content = _at(choice, "message", "content")
        if isinstance(content, list):
            content = "".join(_at(p, "text") or "" for p in content if _at(p, "type") == "text")
        native = _at(choice, "native_finish_reason") or _at(body, "promptFeedback", "blockReason")
        ending = " ".join(str(x) for x in (_at(choice, "finish_reason"), native) if x)
        refusal = _at(choice, "message", "refusal")
        empty = not isinstance(content, str) or not content.strip()
        if _TEXT.search(ending) or (empty and refusal):
            why = f"{ending} {self._said(str(refusal or ''))}"
            raise CallFailed("text", f"this text is refused: {why}", usage=usage)
        if ending.startswith("error"):
            raise CallFailed("transient", "the provider broke off", usage=usage)
        if not _at(choice, "message"):
            why = f"HTTP 200 without an answer: {ending} {self._said(text)}"
            raise CallFailed("unusable", why, usage=usage)
        if empty or re.match("length|max_tokens", ending, re.I):
            raise CallFailed("unusable", f"an empty or unfinished answer ({ending})", usage=usage)
        return self._redact(clean(content)), usage, clean(str(_at(body, "model") or ""))

    def _redact(self, text: str) -> str:
        return self._secrets.sub("***", text) if self._secrets else text

    def _said(self, text: str) -> str:
        """What an error says, in one short line without secrets."""
        said = self._redact(_message(text))  # before it is cut: half a key is one, too
        return re.sub(r"(?<=://)\S*@", "***@", said)[:300]


# ------------------------------------------------------------------------------------------ answers


def clean(text: str) -> str:
    """Lone surrogates, which JSON can spell and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode()


_RUN = re.compile(r"(.)\1{2,}", re.S)
_THINKING = re.compile(r"\s*[<\[](think|thinking|reasoning)[>\]].*?([<\[]/\1[>\]]|\Z)", re.S | re.I)


def without_thinking(text: str) -> str:
    """The answer after a leading <think>…</think>; nothing, where that does not end."""
    if thinking := _THINKING.match(text):
        return text[thinking.end() :].strip()
    head, _, rest = text.partition("</think>")  # its beginning may be the template's
    return rest.strip() if rest and not re.match(r"\s*[\[{`]", head) else text


def _secrets(key: str | None) -> re.Pattern[str] | None:
    """Key and proxies' passwords in any escaping; fewer than 8 characters are no secret."""
    proxies = re.findall(r"//[^:/]*:(\S+)@", " ".join(getproxies().values()))
    form = r"(?:{0}|\\{0}|\\u00{1:02x}|%{1:02x}|&#{1};|&#x{1:x};)"
    secrets = [secret for secret in (key, *proxies) if secret and len(secret) >= 8]
    spelt = ["".join(form.format(re.escape(c), ord(c)) for c in secret) for secret in secrets]
    return re.compile("|".join(spelt), re.I) if spelt else None


def _at(value: Any, *path: str | int) -> Any:
    """value[path[0]][path[1]]…; None where there is no such thing."""
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value


def _usage(body: Any) -> Usage:
    """Tokens in and out; thinking that only the total holds is counted as out."""
    counts = [_at(body, "usage", f"{name}_tokens") for name in ("prompt", "completion", "total")]
    read, wrote, total = (n if type(n) is int and 0 <= n < 1 << 40 else 0 for n in counts)
    return read, max(wrote, total - read) if read else wrote


def _message(text: str) -> str:
    """What an error body says: error.message of the JSON, else the text, in one line."""
    with contextlib.suppress(ValueError, RecursionError):  # an HTML page, for instance
        body = json.loads(text)
        error = _at(body, 0, "error") or _at(body, "error")
        said = _at(error, "message") or error or text
        behind = _at(error, "metadata", "raw")  # of a provider behind a router
        text = f"{said}: {behind}" if behind else said
    return " ".join(clean(str(text)).split()) or "(empty)"


def _status(error: Any) -> int:
    """The HTTP status that an error inside a 200 stands for; 0 if it does not say."""
    code = str(_at(error, "code") or _at(error, "status") or "")
    if re.fullmatch("[45][0-9][0-9]", code):
        return int(code)
    words = json.dumps(error)
    if re.search(r"rate.?limit|resource.?exhausted|too many requests|quota", words, re.I):
        return 429
    return 400 if _TEXT.search(words) else 503 if re.search("overload", words, re.I) else 0


_DURATION = r"(?:\d+(?:\.\d+)? ?(?:ms|mil\w*|s(?:ec\w*)?|m(?:in\w*)?|h(?:ours?)?)?(?![a-z]) ?)+"
_DELAY = re.compile(
    r"(?:(?:retry|try again|wait)[-_ ]?(?:after|delay|in|for)?|(?:available(?: again)?|resets?) in)"
    rf"(?:[-_ ]?(ms)|_?sec\w*)?[\"'\s:={{]+(?:seconds\W+|about )?({_DURATION})",
    re.I,
)


def stated_delay(text: str) -> float:
    """The longest delay, in seconds, that headers or body of an answer ask for in any spelling."""
    delays = [0.0]
    for in_ms, duration in _DELAY.findall(text):
        units = {"": 1e-3 if in_ms else 1, "ms": 1e-3, "mil": 1e-3, "m": 60, "h": 3600}
        parts = re.findall(r"(\d+(?:\.\d+)?) ?(ms|mil|[hm])?", duration.lower())
        delays.append(sum(float(n) * units[unit] for n, unit in parts))
    for date in re.findall(r"(?im)^retry-after: (\w+, .*)$", text):
        with contextlib.suppress(TypeError, ValueError):
            delays.append(email.utils.parsedate_to_datetime(date).timestamp() - time.time())
    return max(delays)


_TEXT = re.compile(
    r"flagged|moderat|content.?(filter|polic|manag)|safety|recitation|prohibited|blocklist|spii"
    r"|refusal|responsible.?ai|inappropriate|sensitive (content|info|word|data|topic)|inspection"
    r"|usage polic|invalid_prompt"
    r"|context.{0,9}(length|window|size|long)|too long|too many (input |prompt )?tokens"
    r"|(input|prompt).{0,40}(too large|exceed|must be)|string_above_max|reduce the length",
    re.I,
)
_ACCOUNT = re.compile(
    r"(your|this|the) (account|organi[sz]ation|project|user|ip) (is|has|was|does)|\b(billing|credit"
    r"|balance|api.?key|permission|suspended|deactivated|region|country|location)",
    re.I,
)
_SPENT = re.compile(
    r"per.?day|daily|monthly|insufficient.?(quota|bal|cred|fund)|billing_hard", re.I
)
_FIELD = re.compile(
    r"(un|not |n't )(support|known|recogni[sz]ed|allowed|permitted)|parameter|\bfields?\b|must be"
    r"|invalid (value|argument|json|schema|type)|extra inputs",
    re.I,
)
_MODEL = re.compile(r"\bmodel\b.*(not|n't|invalid|unknown)|(invalid|unknown|no such) model", re.I)


def refused_because(status: int, text: str, fields: list[str]) -> str:
    """ "text" where the judged text is refused; else the option behind it; "" if unknown.

    fields: names of what the request held. Codes and keys of the error decide before its words.
    """
    words = _message(text)
    codes, param = "", ""
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(text)
        error = _at(body, 0, "error") or _at(body, "error") or body
        param = str(_at(error, "param"))
        codes = re.sub(r'"(message|flagged_input)": "(?:[^"\\]|\\.)*"', r'"\1"', json.dumps(error))
    both = words + codes
    if status == 429:
        return "key-env" if _SPENT.search(both) and not re.search("per.?min", both, re.I) else ""
    if status not in (400, 403, 413, 422):
        return {401: "key-env", 402: "key-env", 404: "model"}.get(status, "")
    if status == 413 or _TEXT.search(codes):
        return "text"
    if param in fields:
        return "extra"
    if _ACCOUNT.search(both):
        return "key-env"
    if _TEXT.search(words):
        return "text"
    if status == 403:
        return "key-env"
    if any(re.search(rf"\b{re.escape(name)}\b", words) for name in fields):
        return "extra"
    return "model" if _MODEL.search(words) else "extra" if _FIELD.search(words) else ""

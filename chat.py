"""Any chat completion over HTTP, from any number of threads: retries, limits, redaction.

    client = Chat("http://localhost:8000/v1", "qwen3", timeout=60)
    text, (tokens_in, tokens_out) = client.ask([{"role": "user", "content": "Name a fox."}])

What happens when something fails:
    retried, backing off   time-out, lost connection, 408, 409, 429, 5xx; Retry-After is obeyed
    retried once           an unusable answer: HTML, cut off, over 4 MiB, refused by `parse`
    not retried            other 4xx; redirects, as a redirected POST loses its body
    ChatStop               401, 402, 403, 404; circuit breaker: 16 attempts in a row, over at
                           least 5 s, without any HTTP answer. Every call ends with it.
So a dead server stops the run in seconds, a hanging one after one time-out. A key comes from the
environment, travels in one header, and is cut out of whatever a provider sends back.
"""

import argparse
import contextlib
import dataclasses
import email.utils
import hashlib
import ipaddress
import json
import os
import queue
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

MAX_BODY = 4 << 20  # bytes of an answer; a verdict takes a few thousand
CONNECT_TIMEOUT = 10.0  # seconds, as all that follow
BACKOFF = 1.0  # before the first retry, then doubled up to 30, times a random 0.5 to 1
RETRY_AFTER_MAX = 120.0
BREAKER_FAILURES = 16
BREAKER_SECONDS = 5.0

T = TypeVar("T")
Usage = tuple[int, int]  # tokens in, tokens out


class ChatStop(RuntimeError):
    """No call can succeed: the server refuses the key or the model, or cannot be reached."""


class Unusable(ValueError):
    """What a caller's parser raises for an answer that it cannot use."""


@dataclass(frozen=True)
class Answer:
    """What came of a request. `value` is None without a usable answer; `error` says why."""

    value: Any = None  # what the caller's parser made of it
    error: str = ""
    kind: str = ""  # of the error, as in CallFailed
    raw: str = ""  # the answer as it came
    model: str = ""  # that answered, in the server's words; "" from the cache
    cached: bool = False
    seconds: float = 0.0  # with all retries
    usage: Usage = (0, 0)  # paid, those of failed tries too


@dataclass(eq=False)
class CallFailed(RuntimeError):
    """A call without a usable answer."""

    kind: str  # transient, unusable or final
    reason: str
    wait: float = 0.0  # seconds that the server asks for
    usage: Usage = (0, 0)  # paid all the same
    raw: str = ""  # the last answer

    def __str__(self) -> str:
        return self.reason


# ----------------------------------------------------------------------------------------- options


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
    timeout: float = _option(600.0, "seconds per request, from first to last byte")
    retries: int = _option(4, "tries after the first")
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

    def open(self, client: Callable[..., T], **more: Any) -> T:
        """A client (Chat, Judge) with these options and its key from the environment."""
        names = "concurrency rpm timeout retries price_in price_out".split()
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
    try:
        _ = options.extra_body
    except ValueError as error:
        raise ValueError(f"--{prefix}-{error}") from None
    return options


# ------------------------------------------------------------------------------------------- client


def _settle(future: Future[T], work: Callable[..., T], *arguments: Any) -> None:
    """Give the future what work(*arguments) returns or raises, unless it was settled meanwhile."""
    with contextlib.suppress(InvalidStateError):
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)


class Chat:
    """A client of one model at one server.

    base_url: the URL before /chat/completions.  extra_body: fields of every request, None leaves
    one out.  cache: an SQLite file of answers that processes may share.  limits: concurrency, rpm,
    timeout, retries, price_in, price_out, as in ChatOptions.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        extra_body: dict[str, Any] | None = None,
        cache: str | Path | None = None,
        **limits: Any,
    ) -> None:
        if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[^?#@\s]*)?", base_url):
            form = "http(s)://host[:port]/path, without user, key or query"
            raise ValueError(f"base URL: write {form} (it is not shown)")
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError("the API key holds white space or other odd characters (not shown)")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model = model
        self._key = api_key
        self._limits = ChatOptions(base_url, model, **limits)
        body = {"model": model, **(extra_body or {})}
        self._body = {name: value for name, value in body.items() if value is not None}
        self._local = threading.local()  # an HTTP session per thread
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._pending: set[Future] = set()
        self._stopped = threading.Event()
        self._stop_reason = ""
        self._lock = threading.Lock()
        self._next_slot = 0.0  # when the limit per minute allows the next request
        self._unanswered: list[float] = []  # begin of each attempt in a row without HTTP answer
        counters = "calls cached retries failures tokens_in tokens_out seconds".split()
        self._stats: dict[str, float] = dict.fromkeys(counters, 0)
        self._cache = cache
        columns = "key TEXT PRIMARY KEY, raw TEXT, tokens_in INT, tokens_out INT"
        self._sql(f"CREATE TABLE IF NOT EXISTS verdicts ({columns})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def stats(self) -> dict[str, float]:
        """calls (not cached), cached, retries, failures, tokens in and out, seconds, dollars."""
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
        stored = self._stored(name, parse)
        if stored is None:
            return self.start(lambda: into(self._ask_and_store(name, messages, parse)))
        self.count(cached=1)
        future: Future = Future()
        _settle(future, into, stored)
        return future

    def _ask_and_store(self, name: str, messages: list[dict], parse: Callable) -> Answer:
        begin = time.monotonic()
        try:
            answer = self._reply(messages, parse)
            row = (name, answer.raw, *answer.usage)
            self._sql("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", *row)
        except CallFailed as fault:
            answer = Answer(None, str(fault), fault.kind, fault.raw, usage=fault.usage)
        return dataclasses.replace(answer, seconds=time.monotonic() - begin)

    def _stored(self, name: str, parse: Callable[[str], Any]) -> Answer | None:
        """The answer that was paid for earlier, if there is one."""
        query = "SELECT raw, tokens_in, tokens_out FROM verdicts WHERE key = ?"
        row = self._sql(query, name)
        if not row or None in row:  # by another program
            return None
        with contextlib.suppress(Unusable):  # stored by an older parser
            return Answer(parse(row[0]), raw=row[0], cached=True, usage=row[1:])
        return None

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

    def ask(self, messages: list[dict], parse: Callable[[str], Any] = str) -> tuple[Any, Usage]:
        """One chat completion, with retries, on the caller's thread -> (parse(answer), tokens).

        An Unusable of `parse` makes the answer an unusable one. Raises CallFailed, or ChatStop.
        """
        answer = self._reply(messages, parse)
        return answer.value, answer.usage

    def _reply(self, messages: list[dict], parse: Callable[[str], Any]) -> Answer:
        body = json.dumps({**self._body, "messages": messages}).encode()
        retries = self._limits.retries
        left = {"transient": retries, "unusable": min(1, retries), "final": 0}
        begin = time.monotonic()
        backoff = BACKOFF
        raw, tokens_in, tokens_out = "", 0, 0
        while True:
            fault = None
            try:
                answer = self._attempt(body, parse)
                usage = answer.usage
            except CallFailed as error:
                fault, usage, raw = error, error.usage, error.raw or raw
            tokens_in += usage[0]
            tokens_out += usage[1]
            if not fault or not left[fault.kind]:
                break
            left[fault.kind] -= 1
            self.count(retries=1)
            self._pause(fault.wait + backoff * random.uniform(0.5, 1))
            backoff = min(30.0, 2 * backoff)
        seconds = time.monotonic() - begin
        self.count(calls=1, tokens_in=tokens_in, tokens_out=tokens_out, seconds=seconds)
        if not fault:
            return dataclasses.replace(answer, usage=(tokens_in, tokens_out))
        self.count(failures=1)
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

    def _attempt(self, body: bytes, parse: Callable[[str], Any]) -> Answer:
        """One request; CallFailed or ChatStop."""
        with self._lock:  # rate limit: reserve the next slot
            interval = 60 / self._limits.rpm if self._limits.rpm else 0.0
            slot = self._next_slot = max(time.monotonic(), self._next_slot + interval)
        self._pause(slot - time.monotonic())
        begin = time.monotonic()
        try:
            status, headers, data = self._post(body)
        except (requests.RequestException, HTTPError, OSError) as error:
            raise self._no_answer(error, begin) from None
        with self._lock:
            self._unanswered.clear()
        text = self._redact(data.decode("utf-8-sig", "replace"))
        if status != 200:
            raise self._refusal(status, headers, text)
        if len(data) > MAX_BODY:
            raise CallFailed("unusable", f"an answer of more than {MAX_BODY >> 20} MiB")
        content, model, usage = _content(text, headers.get("Content-Type", ""))
        content = self._redact(content)
        try:
            return Answer(parse(content), raw=content, model=model, usage=usage)
        except Unusable as error:
            raise CallFailed("unusable", str(error), usage=usage, raw=content) from None

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytearray]:
        """-> status, headers, body up to just over MAX_BODY; TimeoutError, whatever hangs.

        The time-outs of `requests` start anew with every byte, and looking up a name has none. So
        the request runs on a daemon thread, which is left behind when time is up.
        """
        post = self._session().post
        timeout = self._limits.timeout
        how: dict[str, Any] = {"timeout": (CONNECT_TIMEOUT, timeout), "allow_redirects": False}

        def request() -> tuple[int, Mapping[str, str], bytearray]:
            with post(self.url, data=body, stream=True, **how) as response:
                data = bytearray()
                for chunk in response.iter_content(1 << 16):
                    data += chunk
                    if len(data) > MAX_BODY:
                        break
                return response.status_code, response.headers, data

        future: Future = Future()
        threading.Thread(target=_settle, args=(future, request), daemon=True).start()
        try:
            return future.result(timeout)
        except FutureTimeout:
            raise TimeoutError from None

    def _session(self) -> requests.Session:
        """The HTTP session of this thread."""
        if not hasattr(self._local, "session"):
            session = self._local.session = requests.Session()
            session.trust_env = not is_local(self.url)  # no proxy for a local server
            session.auth = lambda request: request  # else ~/.netrc is asked for a key
            session.headers["Content-Type"] = "application/json"
            session.headers["Accept-Encoding"] = "identity"  # a few bytes could unpack to gigabytes
            if self._key:
                session.headers["Authorization"] = f"Bearer {self._key}"
        return self._local.session

    def _no_answer(self, error: BaseException, begin: float) -> CallFailed:
        """What an attempt without any HTTP answer is; the circuit breaker counts it."""
        now = time.monotonic()
        late = isinstance(error, TimeoutError | requests.Timeout)
        while error.__context__:  # the system's own words are at the bottom
            error = error.__context__
        reason = f"no answer within {now - begin:.1f} s"
        if not late:
            reason = f"no connection: {self._redact(str(error))}"
        with self._lock:
            self._unanswered.append(begin if late else now)
            attempts = len(self._unanswered)
            dark = now - min(self._unanswered)
        if attempts >= BREAKER_FAILURES and dark >= BREAKER_SECONDS:
            streak = f"{attempts} attempts in a row failed, over {dark:.0f} s"
            last = f"the last with: {reason}. Bring it back, then resume"
            self.stop(f"{self.model} at {self.url} is down: {streak}, {last}")
        return CallFailed("transient", reason)

    def _refusal(self, status: int, headers: Mapping[str, str], text: str) -> Exception:
        """What an answer other than 200 means: CallFailed, or ChatStop where none can succeed."""
        reason = f"HTTP {status}: {self._redact(_provider_message(text))}"
        if status in (401, 402, 403, 404):
            self.stop(f"{self.model} at {self.url} refuses: {reason}")
            return ChatStop(self._stop_reason)
        if status in (408, 409, 429) or status >= 500:
            return CallFailed("transient", reason, _retry_after(headers.get("Retry-After", "")))
        if 300 <= status < 400:
            place = self._redact(headers.get("Location", "?"))
            reason = f"HTTP {status}: redirect to {place}; use that address as URL"
        return CallFailed("final", reason)

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _pause(self, seconds: float = 0.0) -> None:
        if self._stopped.wait(max(0.0, seconds)):
            raise ChatStop(self._stop_reason)


# ------------------------------------------------------------------------------------------ answers


def clean(text: str) -> str:
    """Lone surrogates, which JSON can spell and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode()


def _retry_after(value: str) -> float:
    """Seconds that the header asks for, as a number or an HTTP date; 0 where it makes no sense."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return max(0.0, min(RETRY_AFTER_MAX, seconds))


def _provider_message(text: str) -> str:
    """What an error body says: error.message of the JSON, else the beginning of the text."""
    try:
        body = json.loads(text)
        error = (body[0] if isinstance(body, list) else body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, RecursionError, LookupError, TypeError):
        pass  # an HTML page, for instance
    return " ".join(clean(str(text)).split())[:300] or "(empty)"


def _content(text: str, content_type: str) -> tuple[str, str, Usage]:
    """Answer and model in the body of a 200, and what it cost; CallFailed if there is none."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        what = f"{content_type or 'no content type'}: {_provider_message(text)[:100]}"
        raise CallFailed("unusable", f"HTTP 200 without JSON ({what}); is the URL right?") from None
    usage = _tokens(body, "prompt_tokens"), _tokens(body, "completion_tokens")
    try:
        choice = body["choices"][0]
        content = choice["message"]["content"]
        ending = choice.get("finish_reason")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
    except (LookupError, TypeError, AttributeError):
        reason = f"HTTP 200 without an answer: {_provider_message(text)}"
        raise CallFailed("unusable", reason, usage=usage) from None
    why = f" ({ending})" if ending in ("length", "content_filter") else ""
    if why or not isinstance(content, str) or not content.strip():
        raise CallFailed("unusable", f"an empty or unfinished answer{why}", usage=usage)
    return clean(content), clean(str(body.get("model", ""))), usage


def _tokens(body: Any, name: str) -> int:
    """A count in the answer's usage; 0 for what is no count."""
    try:
        n = body["usage"][name]
    except (LookupError, TypeError):
        return 0
    return n if type(n) is int and 0 <= n < 1 << 40 else 0

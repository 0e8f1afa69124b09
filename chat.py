"""Any chat completion over HTTP: retries, limits, redaction.

What the client does when something fails:
    retried, backing off   time-out, connection lost or refused, 408, 409, 429, 5xx; Retry-After is obeyed, up to 120 s
    retried once           an answer that cannot be used: HTML, cut-off, over 4 MiB, or refused by the caller's parser
    not retried            other 4xx; redirects, as a redirected POST loses its body
    ChatStop               401, 402, 403, 404; or the circuit opens: 16 attempts in a row, over 5 s, that got no HTTP
                           answer at all (connection, time-out). Every pending and later call ends with it.
So a dead server costs seconds, a silent one a time-out, and 30% random faults put 16 in a row once in 10^8. A key comes
from the environment, travels in one header, and is cut out of whatever a provider sends back.
"""

import argparse
import email.utils
import ipaddress
import json
import os
import queue
import random
import re
import threading
import time
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

MAX_BODY = 4 << 20  # bytes of one answer; a verdict takes a few thousand
BACKOFF = 1.0  # seconds before the first retry, doubled for each further one up to 30, times a random 0.5 to 1
RETRY_AFTER_MAX = 120.0  # seconds
BREAKER_FAILURES, BREAKER_SECONDS = 16, 5.0


class ChatStop(RuntimeError):
    """The run must stop: the judge refuses the key or the model, or cannot be reached any more."""


class Unusable(ValueError):
    """What a caller's parser raises for an answer that is none; the message says why."""


class CallFailed(RuntimeError):
    """A call without a usable answer; the message says why.

    kind: transient, unusable or final.  wait: seconds that the server asks for.  usage: (tokens in, tokens out), paid
    all the same.  raw: the last answer, "" if there was none.
    """

    def __init__(self, kind, reason, wait=None, usage=(0, 0)):
        super().__init__(reason)
        self.kind, self.wait, self.usage, self.raw = kind, wait, usage, ""


def is_local(url):
    """Whether a URL is on this machine or in a private network."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal"))


def api_key(env_name, base_url):
    """The key in that environment variable, or None for a local judge that needs none. ChatStop if it is missing."""
    key = os.environ.get(env_name, "").strip()
    if not key and not is_local(base_url):
        ask = f"run `export {env_name}=...` first, or name another variable with --judge-key-env"
        raise ChatStop(f"no API key for the judge at {base_url}: {ask}")
    return key or None


def option(default, text: str):
    """A field with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ChatOptions:
    """Where a model is served and how it is asked: the fields of all --judge-… and --llm-… options."""

    url: str = option("", "OpenAI-style base URL, e.g. http://localhost:8000/v1")
    model: str = option("", "name of the model at that server")
    key_env: str = option("", "environment variable that holds the API key")
    extra: str = option(
        "{}", "JSON object added to every request; a field that is null is left out"
    )
    concurrency: int = option(16, "requests in flight")
    rpm: int = option(0, "requests per minute; 0: no limit")
    timeout: float = option(600.0, "seconds per request, from first to last byte")
    retries: int = option(4, "tries after the first")
    price_in: float = option(0.0, "dollars per million prompt tokens")
    price_out: float = option(0.0, "dollars per million answer tokens")

    @property
    def settings(self) -> dict:
        """Keyword arguments of `Chat`. ValueError where `extra` is no JSON object."""
        try:
            extra = json.loads(self.extra)
        except ValueError as error:
            raise ValueError(f"extra is no JSON ({error})") from None
        if not isinstance(extra, dict):
            raise ValueError("extra is no JSON object")
        names = ("rpm", "timeout", "retries", "price_in", "price_out")
        return {name: getattr(self, name) for name in names} | {"extra_body": extra}


def add_options(parser: argparse.ArgumentParser, prefix: str, default: ChatOptions) -> None:
    """One group with an option --PREFIX-NAME for each field of ChatOptions."""
    group = parser.add_argument_group(f"{prefix}: any server that speaks OpenAI's chat completions")
    for f in fields(ChatOptions):
        value = getattr(default, f.name)
        flag = f"--{prefix}-{f.name.replace('_', '-')}"
        group.add_argument(
            flag, type=type(value), default=value, help=f"{f.metadata['help']} [{value!r}]"
        )


def options_from(values: dict, prefix: str) -> ChatOptions:
    """ChatOptions out of parsed values that carry the prefix, e.g. vars(args)."""
    return ChatOptions(**{f.name: values[f"{prefix}_{f.name}"] for f in fields(ChatOptions)})


class Chat:
    """A client of one model at one server, for any number of threads.

    base_url: up to, not with, "/chat/completions".  rpm: requests a minute, 0 for no limit.  timeout: seconds for one
    attempt, from first to last byte.  retries: attempts after the first.  extra_body: fields for every request; None
    takes a field out.  price_in, price_out: $ per million tokens.
    """

    def __init__(
        self, base_url, model, api_key=None, *, rpm=0, timeout=600.0, connect_timeout=10.0, retries=4,
        extra_body=None, price_in=0.0, price_out=0.0,
    ):  # fmt: skip
        if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[^?#@\s]*)?", base_url):
            raise ValueError(
                "judge URL: write http(s)://host[:port]/path, without user, key or query (it is not shown)"
            )
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError(
                "the judge's API key holds characters that no key has, such as white space (it is not shown)"
            )
        self.url, self.model = base_url.rstrip("/") + "/chat/completions", model
        self._key, self._timeout, self._connect_timeout, self._retries = (
            api_key,
            timeout,
            connect_timeout,
            retries,
        )
        self._interval, self._prices = 60 / rpm if rpm else 0.0, (price_in, price_out)
        body = {"model": model, **(extra_body or {})}
        self._body = {name: value for name, value in body.items() if value is not None}
        self._lock = threading.Lock()
        self._stopped, self._stop_reason = threading.Event(), ""
        self._next_slot, self._failing, self._failing_since = 0.0, 0, 0.0
        self._stats = dict.fromkeys(
            "calls cached retries failures tokens_in tokens_out seconds".split(), 0
        )

    def stats(self):
        """Counters so far: calls (not cached), cached, retries, failures, tokens_in, tokens_out, seconds, dollars."""
        with self._lock:
            stats = dict(self._stats)
        dollars = (
            stats["tokens_in"] * self._prices[0] + stats["tokens_out"] * self._prices[1]
        ) / 1e6
        return {**stats, "dollars": dollars}

    def ask(self, messages, parse=str, session=None):
        """Any chat completion, retries included, on the caller's thread -> (parse(answer), (tokens in, tokens out)).

        An Unusable of `parse` makes the answer an unusable one. Raises CallFailed, or ChatStop.
        """
        body, session = (
            json.dumps({**self._body, "messages": messages}).encode(),
            session or self._session(),
        )
        left = {"transient": self._retries, "unusable": min(1, self._retries), "final": 0}
        begin, backoff, text, tokens = time.monotonic(), BACKOFF, "", (0, 0)
        while True:
            value = fault = None
            try:
                text, usage = self._attempt(session, body)
                value = parse(text)
            except CallFailed as error:
                fault, usage = error, error.usage
            except Unusable as error:
                fault = CallFailed("unusable", f"no verdict: {error}")
            tokens = tokens[0] + usage[0], tokens[1] + usage[1]
            if not fault or not left[fault.kind]:
                break
            left[fault.kind] -= 1
            self._count(retries=1)
            self._pause((fault.wait or 0.0) + backoff * random.uniform(0.5, 1))
            backoff = min(30.0, 2 * backoff)
        seconds = time.monotonic() - begin
        self._count(
            calls=1,
            failures=bool(fault),
            tokens_in=tokens[0],
            tokens_out=tokens[1],
            seconds=seconds,
        )
        if fault:
            fault.raw, fault.usage = text, tokens
            raise fault
        return value, tokens

    def _attempt(self, session, body):
        """One request -> (text of the answer, (tokens in, tokens out)); CallFailed or ChatStop."""
        with self._lock:  # take the next free place in the minute
            slot = self._next_slot = max(time.monotonic(), self._next_slot + self._interval)
        self._pause(slot - time.monotonic())
        begin = time.monotonic()
        try:
            status, headers, data = self._post(session, body)
        except (requests.RequestException, HTTPError, OSError) as error:
            reason = f"no answer within {time.monotonic() - begin:.1f} s"
            late = isinstance(error, (TimeoutError, requests.Timeout))
            while error.__context__:  # the system's own words are at the bottom
                error = error.__context__
            reason = reason if late else f"no connection: {self._redact(str(error))}"
            self._no_sign_of_life(begin if late else time.monotonic(), reason)
            raise CallFailed("transient", reason) from None
        text = self._redact(data.decode("utf-8-sig", "replace"))
        reason = f"HTTP {status}: {self._redact(_provider_message(text))}" if status != 200 else ""
        with self._lock:
            self._failing = 0
        if status in (401, 402, 403, 404):
            self._halt(f"the judge {self.model} at {self.url} refuses: {reason}")
            raise ChatStop(self._stop_reason)
        if status >= 500 or status in (408, 409, 429):
            raise CallFailed("transient", reason, _retry_after(headers.get("Retry-After")))
        if 300 <= status < 400:
            reason = f"HTTP {status}: redirect to {self._redact(headers.get('Location', '?'))}; use that address as URL"
        if status != 200:
            raise CallFailed("final", reason)
        if len(data) > MAX_BODY:
            raise CallFailed("unusable", f"an answer of more than {MAX_BODY >> 20} MiB")
        content, usage = _content(text, headers.get("Content-Type", ""))
        return self._redact(content), usage

    def _post(self, session, body):
        """-> (status, headers, body up to just over MAX_BODY); TimeoutError after `timeout` seconds, whatever hangs.

        The time-outs of `requests` start anew with every byte, and looking up a name has none. So the request runs on a
        thread of its own, which is left behind (it is a daemon) when the time is up.
        """
        outcome = queue.SimpleQueue()
        # Nothing compressed: a few bytes could unpack to gigabytes.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        limits = {
            "timeout": (self._connect_timeout, self._timeout),
            "allow_redirects": False,
            "stream": True,
        }

        def request():
            try:
                with session.post(self.url, data=body, headers=headers, **limits) as response:
                    data = bytearray()
                    for chunk in response.iter_content(1 << 16):
                        data += chunk
                        if len(data) > MAX_BODY:
                            break
                    outcome.put((response.status_code, response.headers, data))
            except Exception as error:  # raised again below
                outcome.put(error)

        threading.Thread(target=request, daemon=True).start()
        try:
            result = outcome.get(timeout=self._timeout)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(result, Exception):
            raise result
        return result

    def _session(self):
        def authorise(request):
            if self._key:
                request.headers["Authorization"] = f"Bearer {self._key}"
            return request

        session = requests.Session()
        session.trust_env = not is_local(self.url)  # no proxy for a local judge
        session.auth = authorise  # even without a key: else `requests` would take one from ~/.netrc
        return session

    def _redact(self, text):
        return text.replace(self._key, "***") if self._key else text

    def _count(self, **amounts):
        with self._lock:
            for name, amount in amounts.items():
                self._stats[name] += amount

    def _pause(self, seconds):
        if self._stopped.wait(max(0.0, seconds)):
            raise ChatStop(self._stop_reason)

    def _no_sign_of_life(self, since, reason):
        """Count an attempt without any HTTP answer; open the circuit when nothing else has come for long enough."""
        with self._lock:
            self._failing_since = min(self._failing_since, since) if self._failing else since
            self._failing += 1
            dark = time.monotonic() - self._failing_since
            dead = self._failing >= BREAKER_FAILURES and dark >= BREAKER_SECONDS
        if dead:
            self._halt(
                f"the judge {self.model} at {self.url} is down: {self._failing} attempts in a row failed, over "
                f"{dark:.0f} s, the last with: {reason}. Bring it back, then resume; cached verdicts are not paid again"
            )

    def _halt(self, reason):
        """Fail every later call; True the first time."""
        with self._lock:
            if self._stopped.is_set():
                return False
            self._stop_reason = reason
            self._stopped.set()
            return True


def _retry_after(value):
    """Seconds that a Retry-After header asks for, as a number or an HTTP date, capped; None if it says nothing."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, min(RETRY_AFTER_MAX, seconds))


def _provider_message(text):
    """What a provider says in an error body: error.message of the JSON, else the beginning of the text."""
    try:
        body = json.loads(text)
        error = (body[0] if isinstance(body, list) else body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, RecursionError, LookupError, TypeError):
        pass  # an HTML page, for instance
    return " ".join(clean(str(text)).split())[:300] or "(empty)"


def _content(text, content_type):
    """The body of a 200 -> (text of the answer, (tokens in, tokens out)); CallFailed if it holds no answer."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        what = f"{content_type or 'no content type'}: {_provider_message(text)[:100]}"
        raise CallFailed("unusable", f"HTTP 200 without JSON ({what}); is the URL right?") from None
    usage = body.get("usage") if isinstance(body, dict) else None
    counts = [
        usage.get(name) if isinstance(usage, dict) else 0
        for name in ("prompt_tokens", "completion_tokens")
    ]
    usage = tuple(n if type(n) is int and 0 <= n < 1 << 40 else 0 for n in counts)
    try:
        choice = body["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
    except (LookupError, TypeError, AttributeError):
        raise CallFailed(
            "unusable", f"HTTP 200 without an answer: {_provider_message(text)}", usage=usage
        ) from None
    if (
        not isinstance(content, str)
        or not content.strip()
        or reason in ("length", "content_filter")
    ):
        why = f" ({reason})" if reason in ("length", "content_filter") else ""
        raise CallFailed("unusable", f"an empty or unfinished answer{why}", usage=usage)
    return clean(content), usage


def clean(text):
    """Lone surrogates, which JSON can spell and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode()

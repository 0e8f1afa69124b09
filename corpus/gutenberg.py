"""Books from Project Gutenberg, one request at a time; none is fetched twice."""

import argparse
import time
from pathlib import Path

import requests
from tqdm import tqdm

import rundir
from data import DataError

SHELVES = {"anthologies": "gutenberg.tsv", "fables": "fables.tsv"}


def catalog(shelf: str) -> dict[str, str]:
    """Number -> "title, author" of a bundled list of public-domain books."""
    lines = Path(__file__).with_name(SHELVES[shelf]).read_text("utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {number: f"{title}, {author}" for number, title, author in rows}


def download(args: argparse.Namespace) -> None:
    """`data.py gutenberg`: fetch books into a folder. DataError names what failed."""
    titles = catalog(args.shelf)
    if args.list:
        print("\n".join(f"{book:>6}  {title}" for book, title in titles.items()))
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    session = requests.Session()
    session.headers["User-Agent"] = "polaris-data/1.0 (one request at a time)"
    failed = []
    bar = tqdm(args.ids or list(titles), desc="books", unit="book")
    for book in bar:
        path = out / f"{book}.txt"
        if path.exists():
            continue
        bar.set_postfix_str(titles.get(book, book)[:40])
        url = f"{args.mirror.rstrip('/')}/cache/epub/{book}/pg{book}.txt"
        try:
            rundir.write(path, fetch(session, url, args.pause))
        except DataError as error:
            failed.append(f"{book}: {error}")
    if failed:
        again = "run the same command again for these; the others are there"
        raise DataError("\n".join([*failed, again]))
    count = len(list(out.glob("*.txt")))
    print(f"{out}: {count} books; next: python data.py build {out}/*.txt --out train.jsonl")


def fetch(session: requests.Session, url: str, pause: float) -> str:
    """One text, in up to three tries. DataError says what went wrong."""
    problem = ""
    for attempt in range(3):
        time.sleep(pause * 2**attempt)
        try:
            reply = session.get(url, timeout=(10, 60))
        except requests.RequestException as error:
            why = type(error).__name__
            problem = f"cannot be reached ({why}); check the network, or give another --mirror"
            continue
        if reply.status_code == 200:
            text = reply.content.decode("utf-8", "replace")
            if "project gutenberg" not in text[:5000].lower() or "<html" in text[:500].lower():
                raise DataError(f"{url} is no Gutenberg text; give another --mirror")
            return text.replace("\r\n", "\n")
        problem = f"answers {reply.status_code}"
        if reply.status_code < 500 and reply.status_code != 429:
            raise DataError(f"{url} {problem}; check the number, or give another --mirror")
        wait = reply.headers.get("Retry-After", "")
        if wait.isdigit():
            time.sleep(min(int(wait), 120))
    raise DataError(f"{url} {problem}")

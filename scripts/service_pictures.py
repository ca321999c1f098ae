"""Pictures of the service's web page for the docs: a service on this machine, its pages in headless Chromium.

python scripts/service_pictures.py docs/images
"""

from __future__ import annotations

import gzip
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import orjson
import uvicorn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "service"))

from chromium import Chromium  # noqa: E402

from assay.models import load_model, load_tokenizer_for_generation  # noqa: E402
from assay.service.app import create_app  # noqa: E402
from assay.service.auth import create_api_key  # noqa: E402
from assay.service.settings import Settings  # noqa: E402
from assay.service.worker import work  # noqa: E402
from assay.watermark import for_transformers  # noqa: E402
from assay.watermark.gumbel import GumbelConfig  # noqa: E402
from assay.watermark.keys import SecretKey  # noqa: E402


def main(folder: Path) -> None:
    """Write service-*.png into a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        app = create_app(Settings(data=Path(scratch, "data")))
        state = app.state.assay
        _, token = create_api_key(state.sessions, "press", ["admin"])
        # A fixed secret, so that the pictures show the same text each time.
        key = SecretKey(bytes(range(32)), id="newsroom-2026", config=GumbelConfig())
        with state.sessions.begin() as session:
            session.add(state.keys._sealed("press", key))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        book = gzip.decompress((ROOT / "data" / "corpus" / "the-time-machine.txt.gz").read_bytes()).decode()
        book = " ".join(book.split())
        passage = generated(key, "The old house stood by the sea, and")
        try:
            with httpx.Client(base_url=address, headers={"authorization": f"Bearer {token}"}) as client:
                submit(
                    client, [passage, book[30_000:31_000], generated(key, "She opened the door"), book[60_000:62_000]]
                )
                work(state, once=True)
                submit(client, [book[i : i + 900] for i in range(0, 90_000, 900)])
            text = f"{sentences(book, 20_310, 740)} {passage} {sentences(book, 40_010, 690)}"
            with Chromium(Path(scratch, "profile"), scripts=False) as browser:
                take(browser, address, token, text, folder)
        finally:
            server.should_exit = True
            thread.join()


def generated(key: SecretKey, prompt: str) -> str:
    """A passage of the bundled model under a key."""
    model, tokenizer = load_model(), load_tokenizer_for_generation()
    inputs = tokenizer(prompt, return_tensors="pt")
    mark = for_transformers(key, seed=1)
    length = {"min_new_tokens": 150, "max_new_tokens": 150}
    ids = model.generate(**inputs, do_sample=True, temperature=0.9, top_k=0, watermarking_config=mark, **length)
    return str(tokenizer.decode(ids[0]))


def sentences(book: str, start: int, length: int) -> str:
    """Whole sentences of the book."""
    first = book.index(". ", start) + 2
    return book[first : book.index(". ", first + length) + 1]


def submit(client: httpx.Client, texts: list[str]) -> None:
    """A job over these texts."""
    client.post("/v1/jobs", content=b"\n".join(orjson.dumps({"text": text}) for text in texts)).raise_for_status()


def take(browser: Chromium, address: str, token: str, text: str, folder: Path) -> None:
    """The pages, one after the other."""
    browser.open(f"{address}/")
    browser.picture(folder / "service-login.png")
    browser.tab_to("input api_key")
    browser.type(token)
    browser.press("Enter")
    browser.wait("Test a text")
    browser.tab_to("textarea text")
    browser.type(text)
    browser.picture(folder / "service-test.png")
    browser.tab_to("button Test")
    browser.press("Enter")
    browser.wait("evidence of a mark")
    browser.picture(folder / "service-verdict.png")
    browser.picture(folder / "service-verdict-dark.png", dark=True)
    browser.picture(folder / "service-verdict-phone.png", width=390)
    browser.open(f"{address}/jobs")
    browser.tab_to("button Make a report")
    browser.press("Enter")
    browser.wait("Watermark audit")
    browser.open(f"{address}/jobs")
    browser.picture(folder / "service-jobs.png")
    browser.open(f"{address}/reports")
    browser.picture(folder / "service-reports.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""/v1/completions with OpenAI's own client: marked text that /v1/detect finds, streaming, refusals, the queue."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from assay.detection.text import load_tokenizer
from assay.models import load_tokenizer_for_generation
from assay.service import audit
from assay.service.app import create_app
from assay.service.auth import create_api_key
from assay.service.generation import BusyError, Generator, Sampling, UnavailableError, _Written
from assay.service.settings import Settings
from assay.service.state import State
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import SecretKey
from assay.watermark.signing import Ed25519Config

PROMPT = "The old house stood by the sea, and"


class Served:
    """A service on a real socket, and clients of its tenants."""

    def __init__(self, address: str, app: FastAPI) -> None:
        self.app = app
        state: State = app.state.assay
        self.address = address
        self.state = state
        self.tokens = {
            name: create_api_key(state.sessions, tenant, scopes)[1]
            for name, tenant, scopes in (
                ("press", "press", ["admin"]),
                ("writer", "press", ["embed"]),
                ("reader", "press", ["detect"]),
                ("bare", "bare", ["admin"]),
                ("other", "other", ["admin"]),
            )
        }
        # Fixed secrets: every run of these tests sees the same texts.
        for day, id in enumerate(("older", "newest"), 1):
            secret = hashlib.sha256(id.encode()).digest()
            key = SecretKey(secret, id=id, config=GumbelConfig(), created=datetime(2026, 1, day, tzinfo=UTC))
            with state.sessions.begin() as session:
                session.add(state.keys._sealed("press", key))
        state.keys.create("press", Ed25519Config(), "signer")
        state.keys.create("other", GumbelConfig(), "others")

    def client(self, name: str = "writer") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=self.tokens[name], max_retries=0)

    def pvalue(self, text: str, key: str) -> float:
        headers = {"authorization": f"Bearer {self.tokens['press']}"}
        answer = httpx.post(f"{self.address}/v1/detect", json={"text": text, "keys": [key]}, headers=headers)
        return float(answer.json()["pvalue"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    app = create_app(Settings(data=tmp_path_factory.mktemp("service")))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield Served(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app)
    server.should_exit = True
    thread.join()
    app.state.generator.close()


def test_models(served: Served) -> None:
    with served.client() as client:
        (model,) = client.models.list().data
        assert (model.id, model.owned_by) == ("default", "assay")
        assert client.models.retrieve("default") == model
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-4", prompt="x")


def test_a_completion_is_marked_with_the_newest_key(served: Served) -> None:
    with served.client() as client:
        made = client.completions.create(model="default", prompt=PROMPT, max_tokens=150, temperature=0.9, seed=1)
    (choice,) = made.choices
    assert choice.finish_reason in ("length", "stop")
    assert made.assay_key == "newest"
    n_prompt = len(load_tokenizer_for_generation()(PROMPT)["input_ids"])
    assert made.usage.prompt_tokens == n_prompt
    assert 40 < made.usage.completion_tokens <= 150
    assert made.usage.total_tokens == n_prompt + made.usage.completion_tokens
    assert served.pvalue(choice.text, "newest") < 1e-9
    # The near-miss: the same text under the other key is nothing out of the ordinary.
    assert served.pvalue(choice.text, "older") > 1e-4
    events = audit.events(served.state.sessions, "press", limit=1000)
    used = [event for event in events if event.action == "completions"]
    assert used[-1].subject == "newest"
    assert used[-1].detail == {"max_tokens": 150}
    assert PROMPT not in str([event.detail for event in events])


def test_streamed_and_whole_texts_are_the_same(served: Served) -> None:
    asked = {
        "model": "default",
        "prompt": load_tokenizer("default").encode(PROMPT).tolist(),
        "max_tokens": 80,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 7,
        "extra_body": {"assay_key": "older"},
    }
    with served.client() as client:
        whole = client.completions.create(**asked)
        with client.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
            pieces = list(stream)
    assert len(pieces) > 40
    assert "".join(one.choices[0].text for one in pieces if one.choices) == whole.choices[0].text
    assert {one.assay_key for one in pieces} == {whole.assay_key} == {"older"}
    assert [one.choices[0].finish_reason for one in pieces if one.choices][-2:] == [
        None,
        whole.choices[0].finish_reason,
    ]
    assert pieces[-1].usage == whole.usage
    assert served.pvalue(whole.choices[0].text, "older") < 1e-4


def test_stop_texts_end_the_text_and_are_not_in_it(served: Served) -> None:
    asked = {"model": "default", "prompt": PROMPT, "max_tokens": 120, "seed": 3}
    with served.client() as client:
        whole = client.completions.create(**asked).choices[0].text
        stop = whole[40:46]
        for given in (stop, ["never in it", stop]):
            made = client.completions.create(**asked, stop=given)
            assert made.choices[0].text == whole[: whole.index(stop)]
            assert made.choices[0].finish_reason == "stop"
            assert made.usage.completion_tokens < 120
            with client.completions.create(**asked, stop=given, stream=True) as stream:
                assert "".join(one.choices[0].text for one in stream) == made.choices[0].text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0}, "temperature must be above 0"),
        ({"extra_body": {"num_beams": 4}}, "beam search"),
        ({"extra_body": {"use_beam_search": True}}, "beam search"),
        ({"best_of": 3}, "best_of must be 1"),
        ({"n": 2}, "n must be 1"),
        ({"echo": True}, "echo must be False"),
        ({"logprobs": 5}, "logprobs"),
        ({"presence_penalty": 1.0}, "penalties"),
        ({"logit_bias": {"5": -100}}, "biases"),
        ({"max_tokens": 5000}, "at most 256 tokens together"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ["two", "texts"]}, "prompt"),
        ({"prompt": [1, 2, 99_999_999]}, "token ids from 0 to"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"extra_body": {"assay_key": "signer"}}, "marks nothing"),
        ({"extra_body": {"assay_payload": 3}}, "payload"),
        ({"extra_body": {"surprise": 3}}, "surprise"),
    ],
)
def test_what_would_lose_the_mark_is_refused(served: Served, changes: dict[str, object], words: str) -> None:
    with served.client() as client, pytest.raises(openai.UnprocessableEntityError) as caught:
        client.completions.create(**{"model": "default", "prompt": PROMPT, **changes})
    assert words in str(caught.value)


def test_values_that_openai_sends_by_default_are_accepted(served: Served) -> None:
    with served.client() as client:
        neutral = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me"}
        made = client.completions.create(model="default", prompt="", max_tokens=3, logit_bias={}, **neutral)
        assert made.usage.completion_tokens <= 3
        assert made.usage.prompt_tokens == 1
        assert client.completions.create(model="default", prompt=PROMPT).usage.completion_tokens <= 16


def test_scopes_and_tenants(served: Served) -> None:
    asked = {"model": "default", "prompt": PROMPT, "max_tokens": 2}
    with served.client("reader") as client, pytest.raises(openai.PermissionDeniedError):
        client.completions.create(**asked)
    with served.client("bare") as client, pytest.raises(openai.NotFoundError, match="no active key"):
        client.completions.create(**asked)
    with served.client("other") as client:
        assert client.completions.create(**asked).assay_key == "others"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**asked, extra_body={"assay_key": "older"})
    retired = served.state.keys.create("other", GumbelConfig(), "retired").id
    served.state.keys.rotate("other", retired)
    with served.client("other") as client, pytest.raises(openai.ConflictError, match="may not embed"):
        client.completions.create(**asked, extra_body={"assay_key": retired})


def test_a_client_that_leaves_ends_its_generation(served: Served) -> None:
    generator = served.app.state.generator
    asked = {"model": "default", "prompt": PROMPT, "max_tokens": 240}
    with served.client() as client, client.completions.create(**asked, stream=True) as stream:
        next(iter(stream))
    # Far sooner than 240 tokens take, the worker is free again.
    until = time.monotonic() + 20
    while generator._pending and time.monotonic() < until:
        time.sleep(0.02)
    assert generator._pending == 0


def test_a_full_queue_refuses(make_key) -> None:
    generator = Generator("default", most_waiting=2)
    key, sampling = make_key(3), Sampling(max_tokens=100)
    running, waiting = (generator.begin(PROMPT, key, sampling) for _ in range(2))
    with pytest.raises(BusyError):
        generator.begin(PROMPT, key, sampling)
    waiting.cancel()
    running.cancel()
    assert list(waiting) == []
    list(running)
    assert running.completion_tokens < 100
    generator.close()


def test_without_a_model_there_is_none(make_key, tmp_path) -> None:
    assert Generator(None).name is None
    with pytest.raises(UnavailableError, match="--model"):
        Generator(None).begin(PROMPT, make_key(3), Sampling(max_tokens=1))
    (tmp_path / "secret" / "my-model").mkdir(parents=True)
    broken = Generator(str(tmp_path / "secret" / "my-model"))
    assert broken.name == "my-model"
    with pytest.raises(UnavailableError, match="could not be loaded") as caught:
        broken.begin(PROMPT, make_key(3), Sampling(max_tokens=1))
    assert "secret" not in str(caught.value)


def test_nothing_is_said_about_settings(make_key, caplog: pytest.LogCaptureFixture, capfd) -> None:
    """transformers warns of settings that it ignores or will drop; its logger writes to stderr by itself."""
    generator = Generator("default")
    assert "".join(generator.begin(PROMPT, make_key(3), Sampling(max_tokens=3, top_p=0.9, seed=1)))
    generator.close()
    assert caplog.text == ""
    assert "transformers" not in capfd.readouterr().err


def test_pieces_never_take_back_what_was_told() -> None:
    tokenizer = load_tokenizer_for_generation()
    text = "Café 日本 👩 END of it"
    ids = tokenizer(text)["input_ids"]
    for stop, expected in (((), text), (("END of",), "Café 日本 👩 "), (("ENDS",), text), (("本",), "Café 日")):
        written = _Written(0, tokenizer, frozenset())
        told = ""
        for count in range(1, len(ids) + 1):
            piece, stopped = written.add(Row(ids[:count]), stop)
            assert "\ufffd" not in piece
            told += piece
            if stopped:
                break
        assert told + written.rest() == expected
        assert written.ended == (expected != text)


class Row(list):
    """Token ids, as a tensor gives them."""

    def __getitem__(self, index):
        return Row(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def tolist(self) -> list[int]:
        return list(self)

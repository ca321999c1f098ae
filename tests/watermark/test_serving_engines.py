"""The serving adapters inside the real engines, where these are installed, and the fakes of the other tests."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_vllm
import numpy as np
import numpy.typing as npt
import pytest
import torch
import vllm_texts
from gguf_file import write_gguf

from assay._errors import GenerationError
from assay.detection.detect import detect
from assay.kernels.race import winners_reference
from assay.models import DEFAULT, load_model, load_tokenizer_for_generation
from assay.watermark.adapters import vllm as adapter
from assay.watermark.adapters.llama_cpp import LlamaCppMark, for_llama_cpp, truncated
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keyring import Keyring
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.profiles.vllm_gumbel import VllmGumbelConfig, official_scores

KEY = SecretKey(bytes(range(32)), id="k", config=GumbelConfig())
V = 2048
PROMPT = "Once upon a time"

Law = npt.NDArray[np.float64]


def assert_drawn(ids: list[int], start: int, laws: list[Law]) -> None:
    """Every marked token from `start` on is the winner of the race that plain numpy runs on the engine's own scores.

    `laws`: log-weights of each of these tokens after temperature and truncation, shape (V,).
    """
    seen: set[tuple[int, ...]] = set()
    marked = 0
    for place in range(4, len(ids)):
        context = tuple(ids[place - 4 : place])
        if place >= start and context not in seen:
            law = laws[place - start]
            winner = int(winners_reference(use_key(KEY), np.array([context], dtype=np.uint32), law[None])[0])
            assert winner == ids[place], f"token {place}"
            marked += 1
        seen.add(context)
    assert marked > 0.9 * (len(ids) - start)


def kept(law: Law, stay: npt.NDArray[np.bool_]) -> Law:
    return np.where(stay, law, -np.inf)


def softmax(law: Law) -> Law:
    weights = np.exp(law - law.max())
    out: Law = weights / weights.sum()
    return out


# ---------------------------------------------------------------- vLLM

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="needs vLLM: see 'Try it on a real engine' in docs/how-to/serving.md",
)


def vllm_law(logits: npt.ArrayLike, params: Any) -> Law:
    """vLLM's order: temperature, min-p, top-k, top-p on the rest."""
    law = np.asarray(logits, dtype=np.float64) / params.temperature
    if params.min_p:
        p = softmax(law)
        law = kept(law, p >= params.min_p * p.max())
    if params.top_k > 0:
        law = kept(law, law >= np.sort(law)[-params.top_k])
    if params.top_p < 1:
        order = np.argsort(-law, kind="stable")
        before = np.cumsum(softmax(law)[order]) - softmax(law)[order]
        law = kept(law, np.isin(np.arange(len(law)), order[before < params.top_p]))
    return law


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring.create(tmp_path / "keyring.json", passphrase="open sesame", scrypt_n=2**10)
    keyring.add(KEY)
    monkeypatch.setenv("ASSAY_KEYRING", str(tmp_path / "keyring.json"))
    monkeypatch.setenv("ASSAY_KEY_ID", "k")
    monkeypatch.setenv("ASSAY_PASSPHRASE", "open sesame")
    # In this process, so that an engine is gone with its test.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@needs_vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_vllms_interface_is_the_fakes() -> None:
    from vllm import SamplingParams
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.sample import logits_processor as real

    assert issubclass(adapter.WatermarkLogitsProcessor, real.LogitsProcessor)
    assert not inspect.isabstract(adapter.WatermarkLogitsProcessor)
    for name in ("validate_params", "__init__", "apply", "is_argmax_invariant", "update_state"):
        ours = list(inspect.signature(getattr(adapter.WatermarkLogitsProcessor, name)).parameters)
        for module in (real, fake_vllm):
            theirs = getattr(module.LogitsProcessor, name)
            assert list(inspect.signature(theirs).parameters) == ours, (name, module)
    for name in ("BatchUpdate", "MoveDirectionality"):
        one, other = getattr(real, name), getattr(fake_vllm, name)
        members = (lambda c: [f.name for f in dataclasses.fields(c)]) if name == "BatchUpdate" else list
        assert [str(m) for m in members(one)] == [str(m) for m in members(other)]
    for field in dataclasses.fields(fake_vllm.SamplingParams):
        assert getattr(SamplingParams(), field.name) == field.default, field.name
    over_http = {"model": "m", "prompt": "x", "vllm_xargs": {"assay_watermark": False, "assay_top_k": 40}}
    params = CompletionRequest.model_validate_json(json.dumps(over_http)).to_sampling_params(16, {})
    assert adapter.decoding_of(params) is None


@needs_vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_vllms_other_runner_refuses_the_class() -> None:
    loader = pytest.importorskip(
        "vllm.v1.worker.gpu.sample.logits_processor.loader", reason="this vLLM has one model runner only"
    )
    with pytest.raises(ValueError, match="WatermarkLogitsProcessor is not a subclass"):
        loader.build_custom_logits_processors_params_validator(
            ("assay.watermark.adapters.vllm:WatermarkLogitsProcessor",)
        )


@needs_vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_vllms_batches_of_requests_that_come_and_go(environment: None, asynchronous: bool) -> None:
    """vLLM's own batch (`InputBatch`) and sampler: rows are removed, added, condensed and swapped under our processor.

    Asynchronous scheduling: a token is a placeholder of -1 until the batch fills it in, just before the next draw.
    """
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import LogitsProcessors, MinPLogitsProcessor
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

    rng = np.random.default_rng(0)
    cpu, rows = torch.device("cpu"), 6

    class Config:  # what vLLM's own min-p reads
        class scheduler_config:
            max_num_seqs = rows

    batch = InputBatch(
        max_num_reqs=rows,
        max_model_len=128,
        max_num_batched_tokens=128,
        device=cpu,
        vocab_size=V,
        block_sizes=[16],
        max_num_blocks_per_req=[8],
        logitsprocs=LogitsProcessors(
            [MinPLogitsProcessor(Config, cpu, False), adapter.WatermarkLogitsProcessor(None, cpu, False)]
        ),
        logitsprocs_need_output_token_ids=True,
    )
    logits = {}  # of each request, by step of its own
    requests: dict[str, Any] = {}
    texts: dict[str, list[int]] = {}
    sampler, moves = Sampler(), 0
    for _ in range(120):
        for name in [name for name in batch.req_ids if rng.random() < 0.06]:
            batch.remove_request(name)
        while batch.num_reqs < rows and rng.random() < 0.5:
            name = f"request {len(requests)}"
            params = SamplingParams(
                temperature=float(rng.choice([0.5, 1.0, 1.3])),
                top_k=int(rng.choice([0, 20])),
                top_p=float(rng.choice([1.0, 0.9])),
                min_p=float(rng.choice([0.0, 0.05])),
                extra_args={"assay_watermark": False} if rng.random() < 0.2 else None,
            )
            prompt = rng.integers(0, V, int(rng.integers(1, 9))).tolist()
            requests[name] = CachedRequestState(name, prompt, [], params, None, ([0],), 0, [])
            texts[name] = []
            batch.add_request(requests[name])
            logits[name] = torch.from_numpy(rng.normal(0, 2.5, (120, V)).astype(np.float32))
        batch.condense()
        if batch.num_reqs > 2 and rng.random() < 0.3:
            batch.swap_states(*rng.choice(batch.num_reqs, 2, replace=False).tolist())
            moves += 1
        batch.refresh_metadata()
        if not batch.num_reqs:
            continue
        batch.update_async_output_token_ids()
        now = torch.stack([logits[name][len(requests[name].output_token_ids)] for name in batch.req_ids])
        drawn = sampler(now, batch.sampling_metadata).sampled_token_ids
        for name, token in zip(batch.req_ids, drawn[:, 0].tolist(), strict=True):
            requests[name].output_token_ids.append(-1 if asynchronous else token)
            texts[name].append(token)
            batch.num_tokens_no_spec[batch.req_id_to_index[name]] += 1
        if asynchronous:
            batch.set_async_sampled_token_ids(drawn, torch.Event("cpu"))
            batch.prev_req_id_to_index = dict(batch.req_id_to_index)

    assert len(requests) > 20
    assert moves > 10
    unmarked = 0
    for name, request in requests.items():
        prompt, output, params = request.prompt_token_ids, texts[name], request.sampling_params
        laws = [vllm_law(logits[name][step], params) for step in range(len(output))]
        if len(output) < 8:
            continue
        if params.extra_args:
            unmarked += 1
            with pytest.raises(AssertionError):
                assert_drawn(prompt + output, len(prompt), laws)
        else:
            start = max(len(prompt), 4)
            assert_drawn(prompt + output, start, laws[start - len(prompt) :])
    assert unmarked


@needs_vllm
@pytest.mark.slow
def test_vllm_itself(environment: None, tmp_path: Path) -> None:
    out = tmp_path / "texts.json"
    script = Path(__file__).with_name("vllm_texts.py")
    subprocess.run([sys.executable, script, DEFAULT, out], check=True, timeout=600)
    found = json.loads(out.read_text())
    assert found["refused"].keys() == {"top_k", "min_p", "greedy"}
    assert "top_k must be above 1 for a watermark, got 1" in found["refused"]["top_k"]
    for one, rule in zip(found["texts"], vllm_texts.RULES, strict=True):
        ids, start = one["prompt"] + one["text"], len(one["prompt"])
        laws = [vllm_law(logits, fake_vllm.SamplingParams(**rule)) for logits in one["logits"]]
        assert len(laws[0]) == V
        if "extra_args" in rule:
            assert detect(ids, KEY).pvalue > 1e-4
        else:
            assert_drawn(ids, start, laws)
            assert detect(ids, KEY).pvalue < 1e-6


# ---------------------------------------------------------------- llama.cpp

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None,
    reason="needs llama-cpp-python and gguf: see 'Try it on a real engine' in docs/how-to/serving.md",
)


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "default.gguf"
    write_gguf(DEFAULT, path)
    return path


@pytest.fixture(scope="module")
def make_llama(gguf_path: Path) -> Callable[..., Any]:
    """The bundled model in llama.cpp with a cache that does not round, and every position's scores kept."""
    import llama_cpp

    def make(**settings: Any) -> Any:
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "n_threads": 1}
        return llama_cpp.Llama(str(gguf_path), n_ctx=256, logits_all=True, verbose=False, **exact, **settings)

    return make


@pytest.fixture(scope="module")
def llama(make_llama: Callable[..., Any]) -> Any:
    return make_llama()


def completed(llama: Any, mark: LlamaCppMark, prompt: list[int] | str = PROMPT, n: int = 60, **settings: Any) -> Any:
    from llama_cpp import LogitsProcessorList, StoppingCriteriaList

    return llama.create_completion(
        prompt,
        max_tokens=n,
        logits_processor=LogitsProcessorList([mark]),
        stopping_criteria=StoppingCriteriaList([mark.check]),
        **settings,
    )


def llama_law(logits: npt.ArrayLike, temperature: float, top_k: int, top_p: float, min_p: float) -> Law:
    """llama.cpp's order: top-k, top-p, min-p, temperature."""
    law = np.asarray(logits, dtype=np.float64)
    order = np.argsort(-law, kind="stable")[: top_k if top_k > 0 else None]
    p = softmax(law[order])
    stay = order[(np.cumsum(p) - p < top_p) & (p >= min_p * p[0])]
    return kept(law, np.isin(np.arange(len(law)), stay)) / temperature


@needs_llama_cpp
def test_the_gguf_file_is_the_model(llama: Any, human_text: str) -> None:
    model, tokenizer = load_model(), load_tokenizer_for_generation()
    for start in range(0, 100_000, 5_000):
        text = human_text[start : start + 400]
        assert llama.tokenize(text.encode()) == tokenizer(text)["input_ids"]
    ids = llama.tokenize(human_text[2000:2600].encode())[:200]
    llama.reset()
    llama.eval(ids)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(llama.scores[: len(ids)], expected, atol=1e-4)  # of scores up to 18


@needs_llama_cpp
@pytest.mark.parametrize(
    "rule",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 0, "top_p": 0.9, "min_p": 0.0},
    ],
)
def test_llama_cpp_draws_what_the_race_says(llama: Any, rule: dict[str, Any]) -> None:
    # The call's own settings, greedy ones included, change nothing: one token is left.
    mark = for_llama_cpp(KEY, seed=1, **rule)
    text = completed(llama, mark, n=80, temperature=0.0, repeat_penalty=1.5)["choices"][0]["text"]
    ids = llama.input_ids[: llama.n_tokens].tolist()  # all tokens but the last, which was not read any more
    start = len(llama.tokenize(PROMPT.encode()))
    assert len(ids) == start + 79
    assert text.startswith(llama.detokenize(ids[start:]).decode(errors="ignore"))
    assert_drawn(ids, start, [llama_law(llama.scores[place - 1], **rule) for place in range(start, len(ids))])
    assert detect(ids, KEY).pvalue < 1e-6
    # The same text again, and by a sampler without the mark another one.
    completed(llama, for_llama_cpp(KEY, seed=1, **rule), n=80)
    assert llama.input_ids[: llama.n_tokens].tolist() == ids
    llama.create_completion(PROMPT, max_tokens=80, seed=1, **rule)
    assert detect(llama.input_ids[: llama.n_tokens], KEY).pvalue > 1e-4


@needs_llama_cpp
def test_llama_cpp_reads_the_completion_alone(llama: Any) -> None:
    key = SecretKey(bytes(range(32)), id="k", config=VllmGumbelConfig())
    ids = llama.tokenize(PROMPT.encode(), special=True)
    completed(llama, for_llama_cpp(key, temperature=1.0, prompt_length=len(ids)), ids, n=80)
    text = llama.input_ids[len(ids) : llama.n_tokens]
    n, score = official_scores(text.astype(np.uint32), use_key(key), key.config)
    assert n > 70
    assert score > 2 * n  # mean 1 without the mark: 8 standard deviations


@needs_llama_cpp
def test_llama_cpps_truncation_is_ours() -> None:
    """The sampler chain of the library itself, on scores without ties."""
    import ctypes

    import llama_cpp

    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.normal(0, 2, 300).astype(np.float32)
        rule = {
            "top_k": int(rng.choice([0, 2, 40])),
            "top_p": float(rng.choice([1.0, rng.uniform(0.1, 1)])),
            "min_p": float(rng.choice([0.0, rng.uniform(0, 0.5)])),
        }
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for name in ("top_k", "top_p", "min_p"):
            rest = () if name == "top_k" else (1,)
            sampler = getattr(llama_cpp, f"llama_sampler_init_{name}")(rule[name], *rest)
            llama_cpp.llama_sampler_chain_add(chain, sampler)
        data = (llama_cpp.llama_token_data * 300)(*((v, scores[v], 0.0) for v in range(300)))
        array = llama_cpp.llama_token_data_array(data, 300, -1, False)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        left = sorted(array.data[i].id for i in range(array.size))
        llama_cpp.llama_sampler_free(chain)
        assert np.flatnonzero(truncated(scores, **rule) > -np.inf).tolist() == left, rule


@needs_llama_cpp
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_llama_cpp_loses_errors_and_the_check_finds_them(llama: Any, make_llama: Callable[..., Any]) -> None:
    from llama_cpp import LlamaGrammar, LogitsProcessorList

    class Draft:
        def __call__(self, input_ids: Any, /, **_: Any) -> Any:
            return np.array([1, 2, 3], dtype=np.intc)

    with pytest.raises(GenerationError, match="grammar must be None for a watermark"):
        completed(llama, for_llama_cpp(KEY), grammar=LlamaGrammar.from_string('root ::= "yes"', verbose=False))
    with pytest.raises(GenerationError, match="draft_model must be None for a watermark"):
        completed(make_llama(draft_model=Draft()), for_llama_cpp(KEY))
    with pytest.raises(GenerationError, match=r"drew a token without the watermark.*logit_bias"):
        completed(llama, for_llama_cpp(KEY), logit_bias={5: 1.0})
    nothing = LogitsProcessorList([lambda ids, scores: np.full_like(scores, -np.inf), mark := for_llama_cpp(KEY)])
    llama.create_completion(PROMPT, max_tokens=2, logits_processor=nothing)  # no criterion: the error is lost
    with pytest.raises(ValueError, match="no id is left to draw"):
        mark.check()
    with pytest.raises(GenerationError, match="drew a token without the watermark"):
        for_llama_cpp(KEY).check()
    completed(llama, mark := for_llama_cpp(KEY), n=3)
    assert mark.check() is False

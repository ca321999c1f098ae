"""Texts from vLLM with the adapter, and the engine's own scores, for `test_serving_engines.py`; a process of its own.

Usage: python vllm_texts.py MODEL OUT.json, with the key in the environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RULES = [
    {},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"extra_args": {"assay_watermark": False}},
]


def main(model: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        async_scheduling=False,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        logits_processors=["assay.watermark.adapters.vllm:WatermarkLogitsProcessor"],
    )
    rules = [SamplingParams(max_tokens=80, seed=1, ignore_eos=True, logprobs=-1, **rule) for rule in RULES]
    texts = [
        {
            "prompt": list(done.prompt_token_ids),
            "text": list(done.outputs[0].token_ids),
            "logits": [[step[v].logprob for v in sorted(step)] for step in done.outputs[0].logprobs],
        }
        for done in engine.generate(["Once upon a time"] * len(rules), rules)
    ]
    refused = {}
    for name, rule in {"top_k": {"top_k": 1}, "min_p": {"min_p": 1.0}, "greedy": {"temperature": 0.0}}.items():
        try:
            engine.generate(["Once"], SamplingParams(max_tokens=1, **rule))
        except Exception as error:  # of what kind depends on the version
            refused[name] = str(error)
    Path(out).write_text(json.dumps({"texts": texts, "refused": refused}))


if __name__ == "__main__":
    main(*sys.argv[1:])

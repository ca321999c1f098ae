"""Train the bundled language model and its tokenizer from the public-domain books in data/corpus.

The run is fixed by its seeds and its number of steps, never by time (deterministic algorithms, one thread); another
processor or torch build changes the last bits. About 70 CPU-minutes.

    python scripts/train_default_model.py --out assay/models/default
    python scripts/train_default_model.py --out /tmp/smoke --steps 20 --eval-every 10
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "data" / "corpus"
TRAIN_BOOKS = (
    "alice-s-adventures-in-wonderland",
    "frankenstein",
    "great-expectations",
    "pride-and-prejudice",
    "the-adventures-of-sherlock-holmes",
    "the-voyage-of-the-beagle",
    "the-war-of-the-worlds",
    "walden-and-on-the-duty-of-civil-disobedience",
)
VALIDATION_BOOK = "the-time-machine"
END = "<|endoftext|>"
VOCABULARY = 2048
PASSAGE_CHARS = 2500
SEED = 20261121

# Typographic quotes and dashes differ from book to book; one spelling keeps the small vocabulary for words.
ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\ufeff": "",
        "\r": "",
    }
)


def paragraphs(book: str) -> list[str]:
    """Unwrapped paragraphs of one book: one per line, underscores of emphasis removed, headings and lists dropped."""
    raw = gzip.decompress((CORPUS / f"{book}.txt.gz").read_bytes()).decode("utf-8").translate(ASCII)
    found = []
    for block in re.split(r"\n\s*\n", raw):
        text = re.sub(r"\s+", " ", block.replace("_", "")).strip()
        text = re.sub(r"\[\d+\]|\[Illustration[^\]]*\]", "", text).strip()
        # A line without a sentence end is a heading, a table of contents entry or a verse number.
        if len(text) >= 30 and re.search(r"[.!?;:,\"')-]$", text) and not text.isupper():
            found.append(text)
    return found


def passages(book: str) -> Iterator[str]:
    """Groups of whole paragraphs of about PASSAGE_CHARS characters; each becomes one document that ends in END."""
    group: list[str] = []
    size = 0
    for paragraph in paragraphs(book):
        group.append(paragraph)
        size += len(paragraph) + 1
        if size >= PASSAGE_CHARS:
            yield "\n".join(group)
            group, size = [], 0
    if group:
        yield "\n".join(group)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with VOCABULARY entries; END has id 0. Deterministic for given texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """END, text, END, text, ..., END as one int64 vector."""
    end = tokenizer.token_to_id(END)
    ids = [end]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)


def build_model(layers: int, width: int, ffn: int, context: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attention_dropout=0.0,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Residual dropout while training: the corpus is read many times over, and Llama's own layers have none."""

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


@torch.no_grad()
def bits_per_token(model: LlamaForCausalLM, ids: torch.Tensor, context: int, windows: int | None = None) -> float:
    """Mean bits over tokens 1..N-1, each scored once with at least half a window of context (stride context / 2)."""
    model.eval()
    stride = context // 2
    total, count = 0.0, 0
    starts = range(0, max(1, len(ids) - 1 - stride), stride)
    for k, start in enumerate(starts):
        if windows is not None and k >= windows:
            break
        piece = ids[start : start + context + 1]
        logits = model(piece[None, :-1], use_cache=False).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none")
        fresh = losses if start == 0 else losses[stride:]
        total += float(fresh.double().sum())
        count += len(fresh)
    model.train()
    return total / count / math.log(2)


def characters_per_token(texts: list[str], ids: torch.Tensor) -> float:
    """Document ends are scored as tokens but are no characters, which can only raise the bits per character."""
    return sum(map(len, texts)) / (len(ids) - 1)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def learning_rate_factor(step: int, steps: int) -> float:
    """30 steps of warm-up, constant, then linear to zero over the last 60 %."""
    return min((step + 1) / 30, 1.0, max(0.0, (steps - step) / (0.6 * steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=256, help="training window in tokens")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--ffn", type=int, default=432)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=6e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--skip-full-validation", action="store_true", help="for smoke tests: 40 windows only")
    parser.add_argument("--no-compile", action="store_true", help="eager torch: slower, needs no C++ compiler")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    train_texts = [text for book in TRAIN_BOOKS for text in passages(book)]
    validation_texts = list(passages(VALIDATION_BOOK))
    tokenizer = train_tokenizer(train_texts)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    validation = encode(tokenizer, validation_texts)
    chars_per_token = characters_per_token(validation_texts, validation)

    model = build_model(arguments.layers, arguments.width, arguments.ffn, arguments.context)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=arguments.muon_lr, weight_decay=arguments.weight_decay, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=arguments.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    add_dropout(model, arguments.dropout)
    step_model = model if arguments.no_compile else torch.compile(model)
    base = [(group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups]

    order = np.random.default_rng(arguments.seed)
    log: list[dict[str, float]] = []
    cursor = 0
    windows = torch.empty(0, 0, dtype=torch.int64)
    began = time.process_time()
    running = 0.0
    for step in range(arguments.steps):
        if cursor + arguments.batch > len(windows):
            # A new epoch: passages in a new order, cut at a new offset, so no window is seen twice.
            shuffled = [train_texts[i] for i in order.permutation(len(train_texts))]
            stream = encode(tokenizer, shuffled)[int(order.integers(arguments.context)) :]
            whole = (len(stream) - 1) // arguments.context
            chosen = torch.from_numpy(order.permutation(whole))
            windows = stream[: whole * arguments.context + 1].unfold(0, arguments.context + 1, arguments.context)[
                chosen
            ]
            cursor = 0
        batch = windows[cursor : cursor + arguments.batch]
        cursor += arguments.batch
        factor = learning_rate_factor(step, arguments.steps)
        for group, rate in base:
            group["lr"] = rate * factor
        logits = step_model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % arguments.eval_every == 0 or step + 1 == arguments.steps:
            bits = bits_per_token(model, validation, arguments.context, windows=40)
            row = {
                "step": step + 1,
                "tokens": (step + 1) * arguments.batch * arguments.context,
                "train_bits_per_token": round(running / math.log(2), 4),
                "validation_bits_per_token": round(bits, 4),
                "validation_bits_per_char": round(bits / chars_per_token, 4),
            }
            log.append(row)
            print(json.dumps(row | {"cpu_seconds": round(time.process_time() - began)}), flush=True)

    model = model.half()
    model.generation_config.eos_token_id = 0
    model.generation_config.bos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(out)
    reloaded = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    first_windows = bits_per_token(reloaded, validation, arguments.context, windows=40)
    bits = first_windows
    if not arguments.skip_full_validation:
        bits = bits_per_token(reloaded, validation, arguments.context)
    books = (*TRAIN_BOOKS, VALIDATION_BOOK)
    card = {
        "parameters": sum(p.numel() for p in reloaded.parameters()),
        "steps": arguments.steps,
        "tokens": arguments.steps * arguments.batch * arguments.context,
        "settings": {k: v for k, v in vars(arguments).items() if k != "out"},
        "validation_book": VALIDATION_BOOK,
        "validation_bits_per_token": round(bits, 4),
        "validation_bits_per_token_40_windows": round(first_windows, 4),
        "validation_chars_per_token": round(chars_per_token, 4),
        "validation_bits_per_char": round(bits / chars_per_token, 4),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "corpus_sha256": {book: sha256(CORPUS / f"{book}.txt.gz") for book in books},
        "tokenizer_sha256": sha256(out / "tokenizer.json"),
        "weights_sha256": sha256(out / "model.safetensors"),
        "log": log,
    }
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in card.items() if k != "log"}, indent=1))


if __name__ == "__main__":
    main()

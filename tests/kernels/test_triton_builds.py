"""The Triton kernels compile for sm_80 and sm_90 without a GPU: no spills, and few enough instructions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="the package triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402 - after the skips
from triton.compiler import ASTSource  # noqa: E402

from assay.kernels import triton_chacha, triton_sampling  # noqa: E402

TOOLS = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(triton_sampling.INTERPRETED, reason="the interpreter replaces the compiler"),
    pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this build of triton carries no nvdisasm"),
]
# Both cards on the longer run; one in the fast suite, because a build takes up to ten seconds.
CARDS = [pytest.param(80, marks=pytest.mark.slow), 90]


def build(kernel, signature, constants, card, warps, tmp_path, monkeypatch):
    """Instructions and resource report of one kernel, from a fresh build."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # today's default, named so that triton does not warn
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    listing = tool("nvdisasm", "-c", binary)
    lines = [line for line in listing.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)]
    instructions = [line for line in lines if not re.search(r"\bNOP\b", line)]
    return instructions, tool("cuobjdump", "-res-usage", binary)


def tool(name, *arguments):
    command = [str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def assert_no_spills(instructions, usage):
    assert re.search(r"STACK:0\b", usage), usage
    assert re.search(r"LOCAL:0\b", usage), usage
    assert not [line for line in instructions if re.search(r"\b(LDL|STL)\b", line)]


SAMPLER = {
    "keys": "*i32",
    "logits": "*fp32",
    "best_score": "*fp32",
    "best_id": "*i32",
    "words": "*i32",
    "listed": "*i32",
    "counts": "*i32",
    "vocabulary": "i32",
    "tiles": "i32",
    "stride": "i32",
}
COMMON = {"BLOCKS": triton_sampling._BLOCKS, "FAST": True, "WORDS": False}
WHOLE = {**COMMON, "TRUNCATED": False}
SURVIVORS = {**COMMON, "LANES": triton_sampling._LANES, "PROGRAMS": triton_sampling._PROGRAMS}


@pytest.mark.parametrize("card", CARDS)
def test_sampler(card, tmp_path, monkeypatch):
    instructions, usage = build(triton_sampling.sampling_kernel, SAMPLER, WHOLE, card, 4, tmp_path, monkeypatch)
    assert_no_spills(instructions, usage)
    # No loop: each of the 128 threads runs the listing once for its sixteen candidates.
    backward = [line for line in instructions if re.search(r"\bBRA\b", line)]
    assert len(backward) <= 2  # the closing self-branch of every kernel, and at most one more
    assert len(instructions) / 16 <= 110
    # The hardware's logarithm is what makes it so: two per candidate.
    assert sum("MUFU.LG2" in line for line in instructions) == 32


@pytest.mark.slow
def test_the_count_would_notice_the_slow_logarithm(tmp_path, monkeypatch):
    constants = {**WHOLE, "FAST": False}
    instructions, _ = build(triton_sampling.sampling_kernel, SAMPLER, constants, 90, 4, tmp_path, monkeypatch)
    assert len(instructions) / 16 > 110


@pytest.mark.slow
@pytest.mark.parametrize("card", [80, 90])
def test_sampler_of_truncated_rows(card, tmp_path, monkeypatch):
    constants = {**WHOLE, "TRUNCATED": True}
    instructions, usage = build(triton_sampling.sampling_kernel, SAMPLER, constants, card, 4, tmp_path, monkeypatch)
    assert_no_spills(instructions, usage)
    # The race and the listing of survivors stand one after the other; a thread runs one of them.
    assert sum("MUFU.LG2" in line for line in instructions) == 32
    assert len(instructions) / 16 <= 155


@pytest.mark.parametrize("card", CARDS)
def test_survivors(card, tmp_path, monkeypatch):
    instructions, usage = build(triton_sampling.survivors_kernel, SAMPLER, SURVIVORS, card, 1, tmp_path, monkeypatch)
    assert_no_spills(instructions, usage)
    # One survivor per thread and pass. It may cost what sixteen candidates of a whole tile may: then listing at most a
    # sixteenth of a tile never loses.
    assert sum("MUFU.LG2" in line for line in instructions) == 2
    assert len(instructions) <= 16 * 110


@pytest.mark.slow
def test_the_count_would_notice_two_survivors_per_thread(tmp_path, monkeypatch):
    constants = {**SURVIVORS, "LANES": 64}
    instructions, _ = build(triton_sampling.survivors_kernel, SAMPLER, constants, 90, 1, tmp_path, monkeypatch)
    assert len(instructions) > 16 * 110


@pytest.mark.slow
@pytest.mark.parametrize("card", [80, 90])
def test_subkeys(card, tmp_path, monkeypatch):
    signature = {"use_key": "*i32", "groups": "*i32", "out": "*i32", "rows": "i32", "depth": "i32"}
    kernel = triton_chacha.subkeys_kernel
    assert_no_spills(*build(kernel, signature, {"BLOCK": 32}, card, 1, tmp_path, monkeypatch))


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("crossed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["*fp32", pytest.param("*bf16", marks=pytest.mark.slow)])
def test_statistics(card, crossed, dtype, tmp_path, monkeypatch):
    from assay.kernels.scoring import triton_statistics

    signature = {
        "logits": dtype,
        "stride": "i64",
        "targets": "*i64",
        "out": "*fp32",
        "vocabulary": "i32",
        "temperature": "fp32",
        "other": dtype,
        "other_stride": "i64",
    }
    constants = {"BLOCK": triton_statistics._BLOCK, "CROSSED": crossed}
    kernel = triton_statistics.statistics_kernel
    warps = triton_statistics._WARPS
    instructions, usage = build(kernel, signature, constants, card, warps, tmp_path, monkeypatch)
    assert_no_spills(instructions, usage)
    # One exponential per logit in the loop, two more where the maximum rises; the tilted sums cost products only.
    assert not [line for line in instructions if re.search(r"\bATOM|\bRED\.", line)]


@pytest.mark.slow
@pytest.mark.parametrize("card", [80, 90])
def test_tilted_sums(card, tmp_path, monkeypatch):
    from assay.kernels.scoring import triton_statistics

    signature = {
        "logits": "*fp32",
        "stride": "i64",
        "tops": "*fp32",
        "powers": "*fp32",
        "out": "*fp32",
        "vocabulary": "i32",
        "temperature": "fp32",
        "count": "i32",
    }
    kernel = triton_statistics.tilted_kernel
    assert_no_spills(*build(kernel, signature, {"BLOCK": 2048}, card, 16, tmp_path, monkeypatch))

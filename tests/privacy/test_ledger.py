"""The ledger: exact limits, refusals, and what is left of it when it is killed at any byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from assay.privacy import _chain
from assay.privacy.accounting import Cost
from assay.privacy.budget import Budget
from assay.privacy.errors import BudgetError, LedgerError, SeededNoiseError
from assay.privacy.ledger import Ledger
from assay.privacy.noise import ExactNoise, SeededNoise

TERMS = {"adjacency": "add-remove", "unit": "document"}
NOISE = ExactNoise()


def tenth() -> Cost:
    return Cost.pure(Fraction(1, 10), **TERMS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budget.ledger"


def test_spends_add_up_exactly_and_stop_at_the_limit(path: Path) -> None:
    with Ledger.create(path, Budget.pure(1, **TERMS)) as ledger:
        for number in range(1, 11):
            receipt = ledger.spend(tenth(), noise=NOISE, note=f"table {number}")
            assert (receipt.number, receipt.hash) == (number, ledger.head)
        assert ledger.spent == 1  # ten tenths in doubles are 0.9999999999999999: room for one spend too many
        assert ledger.remaining == 0
        with pytest.raises(BudgetError, match=r"costs 1e-300 \(pure\), 0 of 1 is left \(1 spent\)"):
            ledger.spend(Cost.pure(1e-300, **TERMS), noise=NOISE)
        with pytest.raises(BudgetError):
            ledger.spend(Cost.pure(5e-324, **TERMS), noise=NOISE)  # a subnormal is still a spend
    with Ledger.open(path) as again:
        assert (again.spent, len(again.costs)) == (1, 10)
        with pytest.raises(BudgetError):
            again.spend(tenth(), noise=NOISE)


def test_a_batch_is_priced_without_being_spent_and_entered_whole_or_not(path: Path) -> None:
    with Ledger.create(path, Budget.approximate(1, 1e-6, **TERMS)) as ledger:
        before = path.read_bytes()
        cost = Cost.gaussian(Fraction(50), **TERMS)
        quote = ledger.price([cost, cost.times(2)])
        assert quote.cost == Fraction(3, 100)
        assert not quote.affordable
        assert quote.remaining < 0
        assert ledger.price(cost).affordable
        after = ledger.price(cost).epsilon_after
        assert after is not None
        assert 0.5 < after < 0.7534  # the plain bound
        assert "fits" in str(ledger.price(cost))
        with pytest.raises(BudgetError):
            ledger.spend([cost, cost.times(2)], noise=NOISE)
        assert path.read_bytes() == before
        assert ledger.spent == 0


def test_other_adjacency_and_unit_are_refused(path: Path) -> None:
    with Ledger.create(path, Budget.pure(1, **TERMS)) as ledger:
        for other in (
            Cost.pure(Fraction(1, 10), adjacency="replace", unit="document"),
            Cost.pure(Fraction(1, 10), adjacency="add-remove", unit="event"),
        ):
            with pytest.raises(ValueError, match="cost must be for add-remove of one document"):
                ledger.spend(other, noise=NOISE)
        with pytest.raises(ValueError, match="pure account"):
            ledger.spend(Cost.zcdp(1, **TERMS), noise=NOISE)
        with pytest.raises(SeededNoiseError):
            ledger.spend(tenth(), noise=SeededNoise(1))
        for bad in ([], "x", [1]):
            with pytest.raises(TypeError, match="costs must be"):
                ledger.spend(bad, noise=NOISE)  # type: ignore[arg-type]
        assert ledger.spent == 0


def test_pld_budget(path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="optional")
    cost = Cost.gaussian(Fraction(200), **TERMS)
    with Ledger.create(path, Budget.pld(1, 1e-6, **TERMS)) as ledger:
        count = 0
        while ledger.price(cost).affordable:
            ledger.spend(cost, noise=NOISE)
            count += 1
    # zCDP would stop at rho 0.01747 / 0.0025 = 6 spends; the exact law has room for more.
    assert 8 <= count <= 12
    with Ledger.open(path) as again:
        assert len(again.costs) == count


def test_a_pld_account_that_proves_nothing_is_a_refusal(path: Path) -> None:
    """Loss distributions cut off some mass: at a delta below it their epsilon is infinite, which is no Fraction."""
    pytest.importorskip("dp_accounting")
    many = Cost.gaussian(Fraction(400), **TERMS).times(50)
    with Ledger.create(path, Budget.pld(1, 1e-30, **TERMS)) as ledger:
        with pytest.raises(BudgetError, match="no finite epsilon is proved"):
            ledger.price(many)
        with pytest.raises(BudgetError, match="Nothing was spent"):
            ledger.spend(many, noise=NOISE)
        assert ledger.spent == 0


def test_one_process_at_a_time(path: Path) -> None:
    with Ledger.create(path, Budget.pure(1, **TERMS)) as ledger:
        code = (
            "import sys; from assay.privacy.ledger import Ledger\n"
            "from assay.privacy.errors import LedgerError\n"
            "try: Ledger.open(sys.argv[1])\n"
            "except LedgerError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert "open in another process" in done.stdout
        with pytest.raises(LedgerError, match="open in another process"):
            Ledger.open(path, wait=0.05)
        ledger.spend(tenth(), noise=NOISE)
        child = os.fork()
        if child == 0:  # a forked copy must not spend on its parent's lock
            code_of_child = 1
            try:
                ledger.spend(tenth(), noise=NOISE)
            except LedgerError:
                code_of_child = 0
            os._exit(code_of_child)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(LedgerError, match="is closed"):
        ledger.spend(tenth(), noise=NOISE)
    with Ledger.open(path) as again:
        assert again.spent == Fraction(1, 10)


def test_truncation_at_every_byte(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever prefix is on disk, what was acknowledged within it counts, and spending goes on from there."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the cuts below stand for what a crash leaves
    with Ledger.create(path, Budget.pure(1, **TERMS)) as ledger:
        ends = [path.stat().st_size]
        for _ in range(3):
            ledger.spend(tenth(), noise=NOISE)
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        if cut < ends[0] - 1:
            with pytest.raises(LedgerError, match="first line is incomplete"):
                Ledger.open(path)
            continue
        # A line that lacks only its newline is whole.
        lines = sum(end - 1 <= cut for end in ends[1:])
        with Ledger.open(path) as torn:
            assert torn.spent == Fraction(lines, 10), cut
            torn.spend(tenth(), noise=NOISE)
        with Ledger.open(path) as again:
            assert again.spent == Fraction(lines + 1, 10), cut


def test_any_changed_byte_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    with Ledger.create(path, Budget.pure(1, **TERMS)) as ledger:
        for _ in range(2):
            ledger.spend(tenth(), noise=NOISE)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):  # every third byte: each field of each line is hit many times
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        if place == len(whole) - 1:
            continue  # the last newline became another byte: a torn line, as above
        with pytest.raises(LedgerError):
            Ledger.open(path)


def test_lines_cannot_be_left_out_swapped_or_rolled_back_unnoticed(path: Path) -> None:
    with Ledger.create(path, Budget.pure(1, **TERMS)) as ledger:
        for _ in range(3):
            ledger.spend(tenth(), noise=NOISE)
        head = ledger.head
    lines = path.read_bytes().splitlines(keepends=True)
    for forged in ([0, 2, 3], [0, 1, 3, 2], [0, 1, 1, 2, 3], [1, 2, 3]):
        path.write_bytes(b"".join(lines[i] for i in forged))
        with pytest.raises(LedgerError):
            Ledger.open(path)
    path.write_bytes(b"".join(lines[:3]))
    Ledger.open(path).close()  # the chain alone cannot see a lost end ...
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger.open(path, expect_head=head)  # ... a noted head can
    path.write_bytes(b"".join(lines))
    Ledger.open(path, expect_head=head).close()


def test_new_schema_and_unknown_costs_are_refused(path: Path) -> None:
    path.write_bytes(_chain.first_line({"schema": "assay.privacy-ledger/9"}))
    with pytest.raises(LedgerError, match="schema"):
        Ledger.open(path)
    path.unlink()
    with Ledger.create(path, Budget.pure(1, **TERMS)) as ledger:
        head = ledger.head
    with path.open("ab") as file:
        file.write(_chain.line_of(1, head, {"costs": [{"kind": "rdp", "amount": "1"}], "note": ""})[0])
    with pytest.raises(LedgerError, match="cannot read"):
        Ledger.open(path)


def test_files_are_private_and_never_replaced(path: Path) -> None:
    Ledger.create(path, Budget.pure(1, **TERMS)).close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(LedgerError, match="must be free"):
        Ledger.create(path, Budget.pure(2, **TERMS))
    assert Ledger.open(path).budget.limit == 1
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger.open(path.with_name("other"))


def test_a_failed_write_closes_the_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.create(path, Budget.pure(1, **TERMS))

    def full(fd: int, content: bytes) -> None:
        os.write(fd, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_chain, "write_all", full)
    with pytest.raises(LedgerError, match="could not be written"):
        ledger.spend(tenth(), noise=NOISE)
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="is closed"):
        ledger.spend(tenth(), noise=NOISE)
    with Ledger.open(path) as again:
        assert again.spent == 0


def test_a_spend_is_on_disk_before_it_is_acknowledged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    write, sync = _chain.write_all, os.fsync
    monkeypatch.setattr(_chain, "write_all", lambda fd, line: (events.append("write"), write(fd, line)))
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), sync(fd)))
    with Ledger.create(path, Budget.pure(1, **TERMS)) as ledger:
        events.clear()
        ledger.spend(tenth(), noise=NOISE)
        events.append("acknowledged")
    assert events == ["write", "sync", "acknowledged"]


SPENDER = """
import sys
from fractions import Fraction
from assay.privacy.accounting import Cost
from assay.privacy.ledger import Ledger
from assay.privacy.noise import ExactNoise
cost = Cost.pure(Fraction(1, 1000), adjacency="add-remove", unit="document")
with Ledger.open(sys.argv[1], wait=5) as ledger:
    print("ready", flush=True)
    while True:
        print(ledger.spend(cost, noise=ExactNoise()).number, flush=True)
"""


def test_kill_9_loses_no_spend_that_was_acknowledged(path: Path) -> None:
    Ledger.create(path, Budget.pure(1000, **TERMS)).close()
    chance = random.Random(5)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", SPENDER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
            numbers = [int(line) for line in process.stdout.read().splitlines()]
        with Ledger.open(path, wait=5) as ledger:
            assert len(ledger.costs) >= max(numbers, default=0)  # released implies entered
            assert ledger.spent == Fraction(len(ledger.costs), 1000)
    assert len(json.loads(path.read_bytes().splitlines()[0])["hash"]) == 64


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget.pure(0, **TERMS),
        lambda: Budget.pld(1, 0.0, **TERMS),
        lambda: Budget.approximate(1, 1.0, **TERMS),
        lambda: Budget(accountant="pure", limit=Fraction(1), delta=0.1, **TERMS),
        lambda: Budget(accountant="rdp", limit=Fraction(1), **TERMS),
    ],
)
def test_bad_budgets_are_refused(make) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()

"""Shards on a Ray cluster, behind the interface of `pool.work`: the driver cuts and records, the cluster tests.

Guarantee: that of the ledger, which alone decides what is done; Ray only carries shards, and its retries are off.
Every slot of the cluster runs a worker process of `pool`, so a document that kills its process is told from a machine
that was taken away, and ends in the rejects exactly as in a local run.

The keys reach a slot sealed for it alone by HPKE (RFC 9180): what Ray stores, spills or sends holds no secret.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from assay import __version__
from assay._errors import MissingDependencyError, RunError
from assay.detection.corpus.dispatch import Answer, Lost, Queue, answers
from assay.detection.corpus.ledger import ShardRecord
from assay.detection.corpus.pool import Pool
from assay.detection.corpus.shards import Shard
from assay.detection.corpus.subject import Setup

_STARTS = 3  # slots in a row, beyond all that a lost machine may take at once, that may fail before the run gives up
_LOSSES = 4  # slots that a shard may lose with their machines; more than the 2 worker processes that it may kill itself
_PATIENCE_S = 10
_HPKE_INFO = b"assay corpus worker setup v1"


class Slot:
    """One CPU of the cluster, and one GPU where a model needs it: an actor that feeds a worker process beside it."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self._pool: Pool | None = None

    def introduce(self) -> tuple[str, bytes]:
        """The version of Assay here, and the public key to seal the setup for."""
        return __version__, self._private.public_key().public_bytes_raw()

    def start(self, sealed: bytes, sign: str) -> None:
        """Take the setup; refuse a folder that is not the driver's, in which the file `sign` lies."""
        setup = _suite().decrypt(sealed, self._private, _HPKE_INFO)
        if not Path(sign).exists():
            raise RunError(
                f"out: {str(Path(sign).parent)!r} is not the same folder on every machine of the cluster. "
                "Choose an --out that all of them share."
            )
        self._pool = Pool(setup, 1)

    def test(self, shard: Shard) -> ShardRecord | str:
        """The record of a shard whose files are on the disk, or how its second worker process died."""
        assert self._pool is not None  # noqa: S101  # the driver starts a slot before it hands it a shard
        (answer,) = self._pool.answers(iter([shard]))
        return answer.ending if isinstance(answer, Lost) else answer


def seal(setup: bytes, public: bytes) -> bytes:
    """A pickled setup that only the slot with this public key can read."""
    return bytes(_suite().encrypt(setup, X25519PublicKey.from_public_bytes(public), _HPKE_INFO))


def _suite() -> Any:
    try:
        from cryptography.hazmat.primitives import hpke
    except ImportError as error:
        raise MissingDependencyError(
            "engine='ray' needs cryptography 47 or later: pip install 'assay[ray]'."
        ) from error
    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@dataclass(eq=False)
class _Held:
    """A slot as the driver sees it: what it was asked last, and the shard it holds."""

    actor: Any
    asked: Any
    question: str = "introduce"
    shard: Shard | None = None


class _Cluster:
    """The slots and what they hold, as the driver sees them; a `dispatch.Team`."""

    def __init__(self, ray: Any, setup: Setup, count: int, sign: Path) -> None:
        self.ray = ray
        self.setup = pickle.dumps(setup)
        self.count = count
        self.sign = str(sign)
        # Ray names the GPU to the slot in CUDA_VISIBLE_DEVICES, which its worker process inherits.
        gpu = {"num_gpus": 1} if setup.tests.device == "cuda" else {}
        # No retries by Ray: it would repeat shards that the ledger no longer asks for.
        self.actor = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0, **gpu)(Slot)
        self.held: list[_Held] = []
        self.losses: Counter[int] = Counter()
        self.failed_starts = 0

    def answers(self, shards: Iterator[Shard]) -> Iterator[Answer]:
        return answers(Queue(shards, self.count), self)

    @property
    def busy(self) -> bool:
        return any(slot.shard is not None for slot in self.held)

    def hand_out(self, queue: Queue) -> None:
        for slot in self.held:
            if slot.asked is None and queue:
                slot.shard = queue.take()
                slot.question, slot.asked = "test", slot.actor.test.remote(slot.shard)
        starting = sum(slot.shard is None for slot in self.held)
        for _ in range(min(len(queue) - starting, self.count - len(self.held))):
            actor = self.actor.remote()
            self.held.append(_Held(actor, actor.introduce.remote()))

    def receive(self, queue: Queue, timeout: float | None) -> Iterator[Answer]:
        asked = {slot.asked: slot for slot in self.held if slot.asked is not None}
        done, _ = self.ray.wait(list(asked), timeout=timeout) if asked else ([], [])
        for each in done:
            answer = self._answer_of(asked[each], queue)
            if answer is not None:
                yield answer

    def _answer_of(self, slot: _Held, queue: Queue) -> Answer | None:
        try:
            answer = self.ray.get(slot.asked)
        except self.ray.exceptions.RayTaskError as error:
            # Its text is a traceback; only what we wrote ourselves is sure to quote no document.
            ours = isinstance(error.cause, RunError)
            raise RunError(str(error.cause) if ours else f"a slot failed ({type(error.cause).__name__}).") from None
        except self.ray.exceptions.RayError:
            return self._bury(slot, queue)
        slot.asked, shard = None, slot.shard
        if slot.question == "introduce":
            version, public = answer
            if version != __version__:
                raise RunError(f"the cluster's machines must have Assay {__version__}, one has {version}.")
            slot.question, slot.asked = "start", slot.actor.start.remote(seal(self.setup, public), self.sign)
            return None
        if slot.question == "start":
            self.failed_starts = 0
            return None
        slot.shard = None
        assert shard is not None  # noqa: S101  # only such a slot is asked to test
        return Lost(shard, answer) if isinstance(answer, str) else answer

    def _bury(self, slot: _Held, queue: Queue) -> Lost | None:
        self.held.remove(slot)
        self._kill(slot)  # it may merely be out of reach
        shard = slot.shard
        if shard is None:
            self.failed_starts += 1
            if self.failed_starts == _STARTS + self.count:
                raise RunError("slots of the cluster end while they start; Ray's logs say why (`ray logs`).")
            return None
        self.losses[shard.index] += 1
        if self.losses[shard.index] == _LOSSES:
            return Lost(shard, "its machine was lost", _LOSSES)
        queue.put_back(shard)
        return None

    def _kill(self, slot: _Held) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.kill(slot.actor)

    def close(self) -> None:
        for slot in self.held:
            self._kill(slot)


def work(
    shards: Iterator[Shard], setup: Setup, count: int | None, address: str | None = None
) -> Generator[Answer, None, None]:
    """Test shards on a Ray cluster.

    Parameters
    ----------
    shards
        Read no further ahead than `count` shards.
    setup
        Given to every slot; its folder must be shared by all machines.
    count
        Largest number of slots, each of one CPU; None: the CPUs of the cluster when the run starts. Slots whose model
        runs on a GPU have one each, and are never more than the GPUs.
    address
        As `ray.init` takes it. None: the connection that the caller has; else RAY_ADDRESS; else a cluster on this
        machine for the time of the run.

    Yields
    ------
    The record of each shard as it is finished, in any order, or `Lost` for one that killed its worker twice, or whose
    machine was lost four times.

    Raises
    ------
    RunError
        If the cluster cannot be reached, has no GPU where one was asked for, its machines lack the folder or have
        another version of Assay, a shard's files cannot be written, or workers cannot start.
    MissingDependencyError
        Without Ray.
    """
    setup = replace(setup, folder=setup.folder.resolve())  # the slots work in other directories
    with _connected(count, address) as ray, _signed(setup.folder) as sign:
        setup, count = _placed(setup, count, ray.cluster_resources())
        cluster = _Cluster(ray, setup, count, sign)
        try:
            yield from cluster.answers(shards)
        finally:
            cluster.close()


def _placed(setup: Setup, count: int | None, resources: Mapping[str, float]) -> tuple[Setup, int]:
    """The setup with its device, and the number of slots: a model runs on GPUs where the cluster has some."""
    device, gpus = setup.tests.device, int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise RunError("device: the cluster has no GPU. Choose device='cpu' or 'auto'.")
    if device in ("auto", "cuda") and gpus:
        return setup.on("cuda"), min(count or gpus, gpus)
    slots = count or max(1, int(resources.get("CPU", 1)))
    return (setup if device is None else setup.on("cpu")), slots


@contextlib.contextmanager
def _signed(folder: Path) -> Iterator[Path]:
    """A file with a random name, by which slots recognise the folder."""
    sign = folder / f".{secrets.token_hex(8)}.tmp"
    sign.touch()
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)


@contextlib.contextmanager
def _connected(count: int | None, address: str | None) -> Iterator[Any]:
    if address is not None and address.startswith("ray://"):
        raise RunError(
            f"ray_address must be HOST:PORT of the cluster's head, 'auto' or 'local', got {address!r}. Run the command "
            "on a machine of the cluster; it writes the ledger in the shared folder."
        )
    connected = sys.modules.get("ray")
    if connected is not None and connected.is_initialized():
        yield connected
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        _knock(address)
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("engine='ray' needs Ray: pip install 'assay[ray]'.") from error
    # An existing cluster has its own number of CPUs and its own dashboard.
    own = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
    try:
        with _without_passphrase():
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"ray_address: no cluster answers at {address!r}: {str(error).splitlines()[0]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Refuse an address at which nothing listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()
    except (OSError, ValueError) as error:
        raise RunError(
            f"ray_address must be HOST:PORT of the cluster's head, 'auto' or 'local'; nothing answers at {address!r}."
        ) from error


@contextlib.contextmanager
def _without_passphrase() -> Iterator[None]:
    """Ray's processes inherit the environment: without the keyring's passphrase, and asked to send no statistics."""
    passphrase = os.environ.pop("ASSAY_PASSPHRASE", None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        yield
    finally:
        if passphrase is not None:
            os.environ["ASSAY_PASSPHRASE"] = passphrase

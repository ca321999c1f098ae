"""A real browser for tests: headless Chromium over its DevTools protocol, with keys as from a keyboard."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0 --window-size=1100,800"
)
PATIENCE_S = 600.0  # a full machine may be slow; what never comes is still an error
_KEYS = {"Tab": 9, "Enter": 13, "Space": 32}


class RefusedError(Exception):
    """A command that the browser did not carry out."""


class Chromium:
    """One page of a browser.

    Parameters
    ----------
    profile
        An empty folder.
    scripts
        Whether pages may run JavaScript.
    """

    def __init__(self, profile: Path, *, scripts: bool = True) -> None:
        assert CHROMIUM is not None
        command = [CHROMIUM, *_OPTIONS.split(), f"--user-data-dir={profile}", "about:blank"]
        self._open = contextlib.ExitStack()
        self._browser = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._open.callback(self._browser.communicate)
        self._open.callback(self._browser.kill)  # nothing of it is kept
        with contextlib.ExitStack() as undo:
            undo.push(self._open)
            self._start(scripts)
            undo.pop_all()

    def _start(self, scripts: bool) -> None:
        assert self._browser.stderr is not None
        line = next(one for one in self._browser.stderr if one.startswith("DevTools listening on"))
        self._socket = self._open.enter_context(
            connect(line.split()[-1], max_size=2**27, open_timeout=PATIENCE_S, ping_interval=None)
        )
        self._number = 0
        self._session: str | None = None
        self.log: list[str] = []
        # A page of our own: that of the command line may come later than the answer to a question for it.
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility", "DOM"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command, and its answer; what the page logs meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE_S))
            logged = answer.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
            # What is "verbose" is advice to the page's author.
            if logged and answer["params"].get("entry", {}).get("level") != "verbose":
                self.log.append(json.dumps(answer["params"]))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RefusedError(answer["error"])
                return dict(answer["result"])

    def open(self, url: str) -> None:
        """Go to an address."""
        self.send("Page.navigate", url=url)
        self.wait(url)

    def wait(self, title_or_url: str) -> None:
        """Until the page is there: its title or address holds this, it has been loaded, and it has been drawn.

        Keys that come before a page has been drawn are lost, and what is to have the focus at first gets it then.
        """
        there = f"[document.title, location.href].join(' ').includes({json.dumps(title_or_url)})"
        self.until(f"document.readyState === 'complete' && {there}")
        self.send("Page.captureScreenshot")

    def until(self, expression: str) -> None:
        """Until an expression is true; what is asked while one page takes the place of another is asked again."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            with contextlib.suppress(RefusedError):
                if self.value(expression):
                    return
            time.sleep(0.05)
        shown = self.value("[document.title, location.href, document.readyState].join(' ')")
        raise AssertionError(f"{expression!r} did not come true; the browser shows {shown!r}")

    def value(self, expression: str) -> Any:
        """What an expression gives: the tester looks from outside, also where pages may run nothing."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, as from a keyboard."""
        code = _KEYS[key]
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        more = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.send("Input.dispatchKeyEvent", type="keyDown", **more, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **more)

    def type(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.send("Input.insertText", text=text)

    def focused(self) -> str:
        """What has the focus: its tag, and its id or text."""
        return str(
            self.value("(e => e.tagName.toLowerCase() + ' ' + (e.id || e.innerText.trim()))(document.activeElement)")
        )

    def tab_to(self, wanted: str) -> list[str]:
        """Press Tab until this has the focus; what had it on the way."""
        seen = []
        while not seen or seen[-1] != wanted:
            assert len(seen) < 40, seen
            self.press("Tab")
            seen.append(self.focused())
        return seen

    def spoken(self) -> list[tuple[str, str, dict[str, Any]]]:
        """What a screen reader gets: role, name and properties of everything that it does not ignore."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (
                node["role"]["value"],
                re.sub(r"\s+", " ", node.get("name", {}).get("value", "")),
                {one["name"]: one["value"].get("value") for one in node.get("properties", [])},
            )
            for node in nodes
            if not node["ignored"]
        ]

    def picture(self, path: Path, *, width: int = 1100, scale: float = 1.0, dark: bool = False) -> None:
        """The whole page as a PNG."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        for height in (600, None):
            if height is None:
                height = int(self.value("Math.ceil(document.documentElement.scrollHeight)"))
            self.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
            )
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

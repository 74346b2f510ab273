"""A headless Chromium that tests drive by the W3C WebDriver protocol, as far as they need it."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NEEDED = "chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
KEYS = {"ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015",
        "Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004"}  # fmt: skip


class Browser:
    """One session: a window that shows one page."""

    def __init__(self, address: str, options: dict):
        self.address = f"{address}/session"
        self.session = self._ask("POST", "", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        self.address += f"/{self.session}"

    def _ask(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file anew."""
        self._ask("POST", "/url", {"url": "about:blank"})
        self._ask("POST", "/url", {"url": path.resolve().as_uri() + fragment})

    def run(self, script: str, *arguments):
        """What a function of that body returns, called with the arguments; it may be a promise."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        values = [KEYS.get(key, key) for key in keys]
        presses = [{"type": kind, "value": value} for value in values for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def point(self, selector: str) -> None:
        """Move the mouse onto an element."""
        element = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 0, "origin": element, "x": 0, "y": 0}
        self._ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def resize(self, width: int, height: int) -> None:
        """Of what the page sees, below what a window of the desktop can be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """ "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", {"features": features})

    def without_scripts(self, is_off: bool = True) -> None:
        self._command("Emulation.setScriptExecutionDisabled", {"value": is_off})

    def _command(self, name: str, parameters: dict):
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def problems(self) -> list[str]:
        """What the browser logged as errors or warnings since it was asked last, breaches of the policy too."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", "")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser for as long as it is needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        one = _connected(f"http://127.0.0.1:{port}", options)
        try:
            yield one
        finally:
            one.close()
    finally:
        driver.terminate()
        driver.wait(timeout=20)


def _connected(address: str, options: dict, seconds: float = 20) -> Browser:
    end = time.monotonic() + seconds
    while True:
        try:
            return Browser(address, options)
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)

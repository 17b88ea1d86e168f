"""A page in headless Chromium, by its DevTools protocol over two pipes: no driver and no package is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 300  # seconds
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def found() -> str | None:
    """Where Chromium is; None where it is not."""
    return next((place for name in NAMES if (place := shutil.which(name))), None)


class Page:
    """One page. messages: what its console said, what failed to load, and what it asked of a network."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._number, self._session = to, back, b"", 0, ""
        self.messages: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._back], [], [], PATIENCE)[0], "Chromium says nothing"
            some = os.read(self._back, 1 << 20)
            assert some, "Chromium ended"
            self._rest += some
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def _note(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.messages.append(given["entry"]["text"])
        elif event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.messages.append(json.dumps(given)[:2000])
        elif event.get("method") == "Network.requestWillBeSent" and given["request"]["url"].startswith("http"):
            self.messages.append(f"asked for {given['request']['url']}")

    def open(self, file: Path, width: int, *, dark: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[theme])
        # By way of an empty page, or the one before would be taken for loaded.
        for url in ("about:blank", file.absolute().as_uri()):
            self.send("Page.navigate", url=url)
            self._wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
        self._wait(f"innerWidth === {width}")

    def _wait(self, condition: str) -> None:
        end = time.monotonic() + 120
        while not self.value(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        told = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def picture(self, out: Path) -> Path:
        """The whole page, as far as it is long."""
        height = self.value("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        out.write_bytes(base64.b64decode(found["data"]))
        return out


@contextmanager
def browser() -> Iterator[Page]:
    program = found()
    assert program is not None
    (far_in, to), (back, far_out) = os.pipe(), os.pipe()
    # Above those that Chromium wants: it reads its descriptor 3 and writes to 4.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (far_in, far_out)]
    os.close(far_in)
    os.close(far_out)
    with tempfile.TemporaryDirectory(prefix="pkt-browser-", ignore_cleanup_errors=True) as profile:
        script = f'exec 3<&{ends[0]} 4>&{ends[1]}; exec "$0" "$@"'
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        child = subprocess.Popen(
            ["bash", "-c", script, program, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in ends:
            os.close(end)
        try:
            yield Page(to, back)
        finally:
            child.kill()
            child.wait()
            os.close(to)
            os.close(back)


CUT = """
[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return !e.closest('.wide') && !e.closest('svg *') && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))
"""
FIGURES = """
[...document.querySelectorAll('svg')].map(e => {
  const box = e.getBoundingClientRect();
  return {x: box.x, y: box.y + scrollY, width: box.width, height: box.height, label: e.getAttribute('aria-label')};
})
"""


def look(page: Page, file: Path, width: int, picture: Path, *, dark: bool = False) -> list[dict[str, Any]]:
    """The figures of a page that is whole at this width: nothing cut, no figure blank, no word in the console, nothing fetched."""
    import numpy as np
    from matplotlib.image import imread

    page.open(file, width, dark=dark)
    page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    assert page.value("innerWidth") == width
    assert page.value(CUT) == []
    assert page.messages == []
    pixels = imread(page.picture(picture))[..., :3]
    colors = (255 * pixels).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    figures: list[dict[str, Any]] = page.value(FIGURES)
    for box in figures:
        top, left = round(box["y"]), round(box["x"])
        part = colors[top : top + round(box["height"]), left : left + round(box["width"])]
        assert min(part.shape) > 60, box
        assert len(np.unique(part)) > 10, box
    # Dark where it is asked for, and its text in the other colour.
    background = pixels[2, 2]
    assert (background.mean() < 0.3) == dark
    assert abs(pixels - background).max() > 0.6
    return figures

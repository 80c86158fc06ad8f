"""A headless Chromium that opens a folder: ONNX files run there as they do in Node, and pages are looked at."""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 120_000
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage")
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
RUN = """async ({ file, build, provider, feeds }) => {
  const ort = await import(`./node_modules/onnxruntime-web/dist/${build}`);
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  const adapter = provider === "webgpu" ? await navigator.gpu?.requestAdapter() : null;
  if (provider === "webgpu" && !adapter) return { error: "there is no WebGPU adapter" };
  const session = await ort.InferenceSession.create(file, { executionProviders: [provider] });
  const answers = [];
  for (const { shape, numbers } of feeds) {
    const { logits } = await session.run({ image: new ort.Tensor("float32", Float32Array.from(numbers), shape) });
    answers.push({ shape: logits.dims, numbers: Array.from(logits.data) });
  }
  const fallback = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter ?? null;
  return { answers, fallback, vendor: adapter?.info?.vendor ?? null, agent: navigator.userAgent };
}"""


class Quiet(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}  # noqa: RUF012

    def log_message(self, *_):
        pass


def browser_or_skip():
    """Chromium's path; skips the test where it or what drives it is missing."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    return found


@contextlib.contextmanager
def serving(folder):
    """The address of a server of a folder, for the length of a block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def launched(*flags):
    """A browser; one serves many pages."""
    executable = browser_or_skip()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser, folder, query="", timeout_ms=TIMEOUT_MS):
    """(page, requests to elsewhere) of a folder's index.html; its errors fail the block."""
    errors, elsewhere = [], []
    with serving(folder) as address:
        page = browser.new_page(viewport={"width": 720, "height": 760})
        page.set_default_timeout(timeout_ms)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "blob:", "data:")) else elsewhere.append(r.url))
        try:
            page.goto(f"{address}{query}")
            yield page, elsewhere
        finally:
            page.close()
    assert errors == []


def noise(batches):
    """One feed [batch, 3, 32, 32] for each batch."""
    return [np.random.default_rng(batch).standard_normal((batch, 3, 32, 32)).astype(np.float32) for batch in batches]


def logits_in_chromium(browser, folder, model, feeds, *, provider="wasm", timeout_ms=TIMEOUT_MS):
    """[logits] of an ONNX file in a folder that also holds node_modules, for each of the feeds, and what else the page told."""
    build = "ort.wasm.min.mjs" if provider == "wasm" else "ort.webgpu.min.mjs"
    (Path(folder) / "index.html").write_text("<!doctype html><link rel=icon href='data:,'><title>parity</title>")
    asked = [{"shape": list(each.shape), "numbers": each.ravel().tolist()} for each in feeds]
    with opened(browser, folder, timeout_ms=timeout_ms) as (page, elsewhere):
        told = page.evaluate(RUN, {"file": model, "build": build, "provider": provider, "feeds": asked})
    assert elsewhere == []
    if "error" in told:
        pytest.skip(told["error"])
    arrays = [np.array(each["numbers"], np.float32).reshape(each["shape"]) for each in told["answers"]]
    return arrays, told

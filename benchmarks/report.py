"""How responsive a study's page is in a browser: loading, switching until the next frame, hovering, scrolling.

    python benchmarks/report.py [--nodes 500] [--clicks 40]

The study is generated: five models, eight compositions, six qualities with intervals, curves and layers. The
browser is Debian's headless Chromium without a GPU, so a desktop's is faster.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from coppice.report.assembly import assemble
from coppice.report.data import as_json

MODELS = ("tiny", "small", "medium", "large", "huge")
COMPOSITIONS = (
    ("prune",), ("quantize",), ("decompose",), ("prune", "recover"), ("decompose", "recover"),
    ("quantize", "compensate"), ("prune", "recover", "quantize"), ("decompose", "recover", "quantize"),
)  # fmt: skip
QUALITIES = ("stories", "biographies", "web", "code", "books", "dialogue")
LATENCY = "cost/decode_latency/cpu"
BUDGETS = (100_000, 400_000, 1_600_000, 6_400_000)
LAYERS = 12
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip

# Milliseconds from a click until the frame that shows what it changed has been painted.
CLICK = """input => new Promise(done => {
  const start = performance.now();
  input.click();
  requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => done(performance.now() - start);
    channel.port2.postMessage(0);
  });
})"""
RECORD = """() => {
  window.frames_seen = [];
  const record = now => { window.frames_seen.push(now); window.recording = requestAnimationFrame(record); };
  record(performance.now());
}"""
RECORDED = "() => { cancelAnimationFrame(window.recording); return window.frames_seen; }"
LOADED = "() => performance.getEntriesByType('navigation')[0].loadEventEnd"


def generated(count: int) -> dict[str, Any]:
    """The page's data of a study of about `count` nodes."""
    generator = np.random.default_rng(0)
    nodes = [_node(model, place, generator) for model in MODELS for place in range(count // len(MODELS))]
    names = [node["node"] for node in nodes]
    level = np.array([2 + 6 / (1 + node["stored_mb"]) for node in nodes]) * generator.lognormal(0, 0.2, len(nodes))
    qualities = [_quality(name) for name in QUALITIES]
    values = {
        quality["id"]: {name: [float(v), float(0.96 * v), float(1.04 * v)] for name, v in zip(names, own, strict=True)}
        for quality in qualities
        for own in [level * generator.lognormal(0, 0.1, len(nodes))]
    }
    values[LATENCY] = {
        node["node"]: [node["stored_mb"] / 1e3, node["stored_mb"] / 1.1e3, node["stored_mb"] / 0.9e3] for node in nodes
    }
    ranked = sorted(names, key=lambda name: values[qualities[0]["id"]][name][0])
    alike = [[a, b, 0.4] for a, b in zip(ranked[::3], ranked[1::3], strict=False)]
    return {
        "study": "generated", "seed": 0, "version": "coppice", "models": list(MODELS), "nodes": nodes,
        "qualities": qualities,
        "sizes": [
            {"id": "stored_mb", "title": "stored size", "unit": "MB", "log": True, "better": "lower"},
            {"id": LATENCY, "title": "decode latency, cpu", "unit": "s/token", "log": True, "better": "lower"},
        ],
        "values": values,
        "alike": {quality["id"]: alike for quality in qualities},
        "pairs": {},
        "layers": {name: _layers(generator) for name in names},
        "recoveries": [_recovery(node, generator) for node in nodes if node["budget"]],
        "laws": {}, "failures": [], "config": "study: generated", "reproduce": [], "versions": {},
    }  # fmt: skip


def _node(model: str, place: int, generator: np.random.Generator) -> dict[str, Any]:
    families = COMPOSITIONS[place % len(COMPOSITIONS)] if place else ()
    steps = [f"{family}-{place}" for family in families]
    share = 1.0 if not place else float(generator.uniform(0.1, 0.9))
    name = "/".join([model, *steps])
    return {
        "node": name, "parent": None, "model": model, "recipe": "/".join(steps), "depth": len(steps),
        "step": steps[-1] if steps else None, "method": families[-1] if families else None,
        "family": families[-1] if families else "dense", "composition": " > ".join(families) or "dense",
        "budget": BUDGETS[place % len(BUDGETS)] if "recover" in families else 0, "seed": 0, "traits": [],
        "stored_mb": share * 10 * 4 ** MODELS.index(model), "path": [],
        "command": f"snakemake results/generated/models/{name}/manifest.json", "fingerprint": "0" * 64,
    }  # fmt: skip


def _quality(name: str) -> dict[str, Any]:
    metric = f"perplexity_{name}"
    return {"id": f"quality/{metric}", "evaluation": "quality", "metric": metric, "title": f"perplexity, {name}",
            "unit": "", "better": "lower", "log": True}  # fmt: skip


def _layers(generator: np.random.Generator) -> dict[str, Any]:
    modules = [f"layers.{layer}.{linear}" for layer in range(LAYERS) for linear in LINEARS]
    columns = {name: generator.random(len(modules)).round(4).tolist() for name in ("sparsity", "error")}
    return {"modules": modules, "columns": columns}


def _recovery(node: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    tokens = np.geomspace(1e4, node["budget"], 8)
    loss = 1 + 5 * tokens**-0.2 * generator.lognormal(0, 0.1)
    return {"node": node["node"], "model": node["model"], "tokens": tokens.round().tolist(), "loss": loss.tolist(),
            "budget": [True] * len(tokens), "dense_loss": 1.0}  # fmt: skip


def measure(page: Any, address: str, clicks: int) -> dict[str, str]:
    """Measurements by name."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(address, timeout=120_000)
    loaded = f"{page.evaluate(LOADED):.0f} ms; processor {_processor(session):.0f} ms"
    found = {"load, until all charts are drawn": loaded}
    inputs = page.locator("#frontier input[data-group]").element_handles()
    for _ in range(2):
        page.evaluate(CLICK, inputs[0])
    before = _processor(session)
    times = [page.evaluate(CLICK, inputs[(place // 2) % len(inputs)]) for place in range(clicks)]
    spent = (_processor(session) - before) / clicks
    found["switch to painted frame"] = (
        f"median {np.median(times):.0f} ms, worst {max(times):.0f} ms of {len(times)}; processor {spent:.0f} ms each"
    )
    page.locator("#frontier-chart").scroll_into_view_if_needed()
    box = page.locator("#frontier-chart").bounding_box()
    page.evaluate(RECORD)
    for step in range(100):
        page.mouse.move(box["x"] + box["width"] * (0.1 + 0.008 * step), box["y"] + box["height"] * (0.3 + 0.004 * step))
    found["hover across the chart"] = _rate(page.evaluate(RECORDED))
    page.evaluate(RECORD)
    for step in range(100):
        page.mouse.wheel(0, 30 if step < 50 else -30)
    found["scroll"] = _rate(page.evaluate(RECORDED))
    return found


def _processor(session: Any) -> float:
    """Milliseconds of a processor that the page's main thread has used."""
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    return 1e3 * metrics["TaskDuration"]


def _rate(frames: list[float]) -> str:
    gaps = np.diff(frames)
    return f"{1e3 / np.mean(gaps):.0f} frames/s, longest frame {gaps.max():.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--clicks", type=int, default=40)
    arguments = parser.parse_args()
    program = shutil.which("chromium")
    if program is None:
        sys.exit("This needs the program chromium (apt-get install chromium).")
    from playwright.sync_api import sync_playwright

    data = generated(arguments.nodes)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        path = Path(folder) / "index.html"
        path.write_text(assemble("generated", "A generated study.", as_json(data), {}, ""), encoding="utf-8")
        print(f"{len(data['nodes'])} nodes, a page of {path.stat().st_size / 1e6:.1f} MB")
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("pageerror", lambda error: sys.exit(f"The page failed: {error}"))
        for name, figure in measure(page, path.as_uri(), arguments.clicks).items():
            print(f"{name}: {figure}")
        browser.close()


if __name__ == "__main__":
    main()

"""Run the page's scripts in Node: no browser, no page."""

import json
import shutil
import subprocess

import pytest

from dkto.web.page import ENGINE, HERE, joined

SOURCES = (*ENGINE, *(HERE / f"{name}.js" for name in ("verdicts", "zip", "settings")))
REPLY = """
const bytes = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");
const floats = (text) => new Float32Array(Uint8Array.from(Buffer.from(text, "base64")).buffer);
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
(async () => { %s })().then((answer) => process.stdout.write(JSON.stringify(answer)));
"""


def in_node(body, folder, /, **given):
    """What the body of an async function returns, as JSON; `given` is what it was called with."""
    if not (node := shutil.which("node")):
        pytest.skip("node is missing: install Node.js")
    script = folder / "script.cjs"
    script.write_text(joined(SOURCES) + REPLY % body)
    done = subprocess.run([node, script], input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)

"""Runs the real program as a user would. EDUBA names it (ctest sets it)."""

import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EDUBA = os.environ.get("EDUBA", str(ROOT / "build" / "release" / "eduba"))
START_TIMEOUT_S = 60
COMMAND_TIMEOUT_S = 120


def eduba(*arguments, server=None):
    """Runs one command to its end; the result has returncode, stdout, stderr."""
    environment = dict(os.environ)
    environment.pop("EDUBA_SERVER", None)
    if server:
        environment["EDUBA_SERVER"] = server
    return subprocess.run([EDUBA, *map(str, arguments)], env=environment, capture_output=True, text=True,
                          timeout=COMMAND_TIMEOUT_S)


class Server:
    """`eduba up`, from its "ready:" line to SIGTERM."""

    def __init__(self, *arguments, memory="256MiB"):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([EDUBA, "up", "--listen", "127.0.0.1:0", "--memory-bytes", str(memory),
                                         *map(str, arguments)], stdout=subprocess.PIPE, stderr=self.log, text=True)
        if not select.select([self.process.stdout], [], [], START_TIMEOUT_S)[0]:
            self.process.kill()
            raise AssertionError("not ready in time: " + self.messages())
        line = self.process.stdout.readline()
        found = re.fullmatch(r"ready: (127\.0\.0\.1:[1-9]\d*)\n", line)
        if not found:
            self.process.kill()
            raise AssertionError(f"said {line!r} instead of ready: {self.messages()}")
        self.address = found[1]

    def messages(self):
        self.log.seek(0)
        return self.log.read()

    def run(self, *arguments):
        """A client command against this server; returns its stdout, or raises with its stderr."""
        result = eduba(*arguments, server=self.address)
        if result.returncode != 0:
            raise AssertionError(f"eduba {' '.join(map(str, arguments))} gave {result.returncode}: {result.stderr}"
                                 f"\nserver: {self.messages()}")
        return result.stdout

    def report(self, *arguments):
        return json.loads(self.run(*arguments, "--json"))

    def stop(self):
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=COMMAND_TIMEOUT_S)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        code = self.stop()
        self.process.stdout.close()
        messages = self.messages()
        self.log.close()
        if kind is not None:
            sys.stderr.write("server: " + messages)
        else:
            assert code == 0, f"exit code {code}: {messages}"


def wait_until(condition, what, timeout_s=30):
    """Polls `condition`; for states that nothing announces."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid):
    """Of a process, in the order in which they were started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return sorted(map(int, found.stdout.split()))


def to_bf16(array):
    """float32 rounded to bf16 (nearest even), as float32."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


NUMPY = {"f32": np.float32, "f16": np.float16}
ROUND = {"f32": lambda a: a.astype(np.float32), "bf16": to_bf16,
         "f16": lambda a: a.astype(np.float16).astype(np.float32)}


def visible(tokens, limits, policy, sinks, window):
    """[rows, tokens]: which keys a row whose position is limits[r] sees. The definition, token by token."""
    j = np.arange(tokens)[None, :]
    p = np.asarray(limits)[:, None]
    if policy == "window":
        return ((j < sinks) | (j > p - window)) & (j <= p)
    return j <= p


def oracle(keys, values, queries, seen, scale, sinks, sink_logits=None, softcap=0.0):
    """outputs, lse, sink mass in float64. keys and values as stored; sink_logits [query_heads] or None."""
    rows, heads, _ = queries.shape
    group = heads // keys.shape[1]
    outputs = np.zeros((rows, heads, values.shape[2]))
    lse = np.full((rows, heads), -np.inf)
    mass = np.zeros((rows, heads))
    for h in range(heads):
        logits = queries[:, h].astype(np.float64) @ keys[:, h // group].astype(np.float64).T * scale
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        logits[~seen] = -np.inf
        learned = -np.inf if sink_logits is None else float(sink_logits[h])
        top = np.maximum(logits.max(axis=1), learned)
        some = np.isfinite(top)
        shift = np.where(some, top, 0)[:, None]
        weights = np.exp(logits - shift)
        extra = np.exp(learned - shift[:, 0])
        total = weights.sum(axis=1) + extra
        safe = np.where(some, total, 1)
        outputs[:, h] = weights @ values[:, h // group].astype(np.float64) / safe[:, None]
        lse[some, h] = (shift[:, 0] + np.log(safe))[some]
        mass[:, h] = (weights[:, :sinks].sum(axis=1) + extra) / safe
    return outputs, lse, mass


def relative_error(got, want):
    return np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)

"""tests/gpu/run.sh without a GPU: nvidia-smi and the programs are stubs, and what is tested is the harness around them. And benchmarks/sdpa_gpu.py
over a stub of torch."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RUN = ROOT / "tests" / "gpu" / "run.sh"

NVIDIA_SMI = """case $* in
  -L) echo "GPU 0: Stub" ;;
  *compute_cap*) echo 9.0 ;;
  *memory.free*) echo 140000 ;;
  *) echo "Stub, 1.0" ;;
esac"""

# One batch, as `eduba bench attend --json` reports it.
FIGURES = {"backend": "cuda/sm_90", "queries_per_kv_head": 4, "query_rows": 64, "keys": 65536.0, "dtype": "bf16", "query_dtype": "f32",
           "seconds": 1e-3, "kernel_seconds": 8e-4, "gb_per_s": 300.0, "stream_gb_per_s": 4000.0, "share": 0.08, "kernel_share": 0.1,
           "gflops": 123400.0, "matrix_gflops": 790000.0, "matrix_dtype": "bf16 cuBLAS", "matrix_share": 0.16, "kernel_matrix_share": 0.2}


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


class Run(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dir = pathlib.Path(folder.name)
        self.tools, self.programs, self.out = self.dir / "tools", self.dir / "built" / "bin", self.dir / "out"
        self.tools.mkdir()
        self.programs.mkdir(parents=True)
        (self.dir / "built" / "commit").write_text("cafe\n")
        self.stub(self.tools / "nvidia-smi", NVIDIA_SMI)
        self.stub(self.programs / "eduba", "echo well")

    def stub(self, path, script):
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def start(self, *options):
        environment = {"PATH": f"{self.tools}:/usr/bin:/bin", "PIDS": str(self.dir / "pids"), "FIGURES": str(self.dir / "figures")}
        return subprocess.Popen([RUN, "--built", self.dir / "built", "--out", self.out, *options], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run_it(self, *options):
        process = self.start(*options)
        self.stdout, self.stderr = process.communicate(timeout=100)
        return process.returncode

    def report(self):
        return next(self.out.glob("gpu-*.md")).read_text()

    def logs(self):
        return next(self.out.glob("gpu-*.log")).read_text()

    def pids(self):
        return [int(pid) for pid in (self.dir / "pids").read_text().split()]

    def test_without_a_gpu_it_says_of_every_step_that_it_was_skipped(self):
        self.stub(self.tools / "nvidia-smi", "exit 9")
        self.assertEqual(self.run_it(), 2)
        lines = self.stdout.splitlines()
        self.assertGreater(len(lines), 25)
        for line in lines:
            self.assertRegex(line, "^SKIPPED, NOT TESTED: ")
        self.assertIn(f"{len(lines)} steps SKIPPED, NOT TESTED; nothing was tested", self.stderr)
        self.assertFalse(self.out.exists())

    def test_a_step_that_passes_is_reported_and_the_others_are_left_out(self):
        self.assertEqual(self.run_it("--only", "^doctor$"), 0, self.stderr)
        self.assertRegex(self.report(), r"commit cafe\n(.*\n)*\n## doctor: passed \(\d+ s, 0 lines say SKIPPED, NOT TESTED\)\n```\nwell\n```\n")
        self.assertRegex(self.report(), r"1 steps passed, 0 failed \(0 of them timed out\), \d were skipped, \d\d left out by --only")

    def test_many_gpus_are_a_gpu(self):
        self.stub(self.tools / "nvidia-smi", "for ((i = 0; i < 5000; ++i)); do echo GPU $i: Stub || exit; done")
        self.assertEqual(self.run_it("--only", "^doctor$"), 0, self.stderr)

    def test_a_step_that_fails_is_reported_with_its_whole_log(self):
        self.stub(self.programs / "eduba", "for ((i = 0; i < 500; ++i)); do echo line $i; done; exit 5")
        self.assertEqual(self.run_it("--only", "^doctor$"), 1)
        self.assertIn("## doctor: FAILED with 5 (", self.report())
        self.assertNotIn("line 400\n", self.report())
        self.assertIn("=== doctor\nline 0\nline 1\n", self.logs())
        self.assertIn("line 499\n", self.logs())
        self.assertIn("0 steps passed, 1 failed (0 of them timed out)", self.report())
        self.assertIn("line 499", self.stderr)

    def test_a_step_that_hangs_is_ended_and_what_does_not_fit_the_budget_any_more_is_skipped(self):
        self.stub(self.programs / "eduba", "trap '' TERM; echo began; (trap '' TERM; sleep 300) & echo $! $$ >$PIDS; sleep 300; sleep 300")
        self.assertEqual(self.run_it("--budget", "12"), 1)
        self.assertRegex(self.report(), r"## doctor: FAILED: timed out after \d+ s \(")
        self.assertIn("=== doctor\nbegan\n", self.logs())
        self.assertFalse([pid for pid in self.pids() if alive(pid)])
        skipped = re.findall("^SKIPPED, NOT TESTED: .*: of --budget 12, 0 s are left", self.report(), re.M)
        self.assertGreater(len(skipped), 25)
        # One more is skipped in any case: the latency of NCCL, for want of GPUs.
        self.assertIn(f"0 steps passed, 1 failed (1 of them timed out), {len(skipped) + 1} were skipped", self.report())

    def test_what_a_step_leaves_running_ends_with_it(self):
        self.stub(self.programs / "eduba", "sleep 300 & echo $! >$PIDS")
        self.assertEqual(self.run_it("--only", "^doctor$"), 0, self.stderr)
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_a_run_that_is_ended_early_leaves_no_process_and_a_summary(self):
        self.stub(self.programs / "eduba", "echo $$ >$PIDS.new; mv $PIDS.new $PIDS; sleep 300")
        process = self.start("--only", "^doctor$")
        while not (self.dir / "pids").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, 143)
        self.assertFalse([pid for pid in self.pids() if alive(pid)])
        self.assertIn("## doctor: FAILED: the run was ended in it\n", self.report())
        self.assertIn("## Summary\n0 steps passed, 1 failed", self.report())

    def test_skips_within_a_step_are_counted_wherever_they_stand(self):
        self.stub(self.programs / "communicator_contract_test",
                  "for ((i = 0; i < 500; ++i)); do echo line; ((i % 100)) || echo 'SKIPPED, NOT TESTED: one'; done")
        self.assertEqual(self.run_it("--only", "^contract of the transports$", "--quick"), 0, self.stderr)
        self.assertRegex(self.report(), r"## contract of the transports: passed \(\d+ s, 5 lines say SKIPPED, NOT TESTED\)")
        skipped, said = map(int, re.search(r"(\d+) were skipped.*; (\d+) SKIPPED, NOT TESTED", self.report()).groups())
        self.assertEqual(said, skipped + 5)

    def test_a_contract_that_was_skipped_for_want_of_a_gpu_has_failed(self):
        self.stub(self.programs / "backend_test", "echo 'SKIPPED, NOT TESTED: cuda: no driver'; echo more")
        self.assertEqual(self.run_it("--only", "^contract of the exact kernels$"), 1)
        self.stub(self.programs / "backend_test", "echo fine")
        self.assertEqual(self.run_it("--only", "^contract of the exact kernels$"), 0, self.stderr)

    def test_tools_that_are_missing_or_do_not_work_here_are_skipped_and_not_failed(self):
        step = "memcheck of cuda"
        self.assertEqual(self.run_it("--only", f"^{step}$"), 0, self.stderr)
        self.assertIn(f"SKIPPED, NOT TESTED: {step}: compute-sanitizer is not installed", self.stdout)
        self.stub(self.tools / "compute-sanitizer", "echo '========= Error: Device not supported'; exit 1")
        self.assertEqual(self.run_it("--only", f"^{step}$"), 0, self.stderr)
        self.assertIn(f"SKIPPED, NOT TESTED: {step}: compute-sanitizer does not work here: ========= Error: Device not", self.stdout)
        self.stub(self.tools / "compute-sanitizer", "echo '========= Invalid __global__ write'; exit 9")
        self.assertEqual(self.run_it("--only", f"^{step}$"), 1)

    def test_a_profile_says_why_there_is_none(self):
        step = "profile of the exact kernel"
        for script, code, text in (("echo '==ERROR== ERR_NVGPUCTRPERM - no permission'", 0, f"SKIPPED, NOT TESTED: {step}: ncu does not work"),
                                   ("echo '==WARNING== No kernels were profiled'", 1, ""),
                                   ("echo '  AttendKernel(AttendArgs) (1, 1, 1)'; echo '    Duration  us  7'", 0, "1 steps passed")):
            with self.subTest(script):
                self.stub(self.tools / "ncu", script)
                self.assertEqual(self.run_it("--only", f"^{step}$"), code, self.stdout)
                self.assertIn(text, self.stdout)

    def test_shares_of_a_ceiling_that_is_too_low_fail(self):
        self.stub(self.programs / "eduba", 'cat "$FIGURES"')
        for ceiling, code in (("bf16 cuBLAS", 0), ("bf16 mma.sync", 1)):
            (self.dir / "figures").write_text(json.dumps([FIGURES | {"matrix_dtype": ceiling}]))
            self.assertEqual(self.run_it("--only", "^bench attend, tensor$", "--out", str(self.dir / ceiling[5:])), code, self.stderr)
            self.out = self.dir / ceiling[5:]
            self.assertIn(f"123.4    790.0 {ceiling}", self.report())
            self.assertEqual(json.loads(next(self.out.glob("*attend-tensor-4GiB.json")).read_text())[0]["keys"], 65536.0)
        self.assertIn("wanted cuBLAS", self.report())

    def test_bad_options_and_a_folder_that_is_no_pack_are_usage_errors(self):
        for options in (["--frob", "1"], ["--only"], ["--budget", "soon"], ["--built", str(self.dir)]):
            with self.subTest(options):
                self.assertEqual(self.run_it(*options), 2)
                self.assertEqual(self.stdout, "")


TORCH = {
    "torch/__init__.py": """
bfloat16, float16 = "bf16", "f16"
__version__ = "0"
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: "Stub")
    synchronize = staticmethod(lambda: None)
    class Event:
        def __init__(self, enable_timing): pass
        def record(self): pass
        def elapsed_time(self, other): return 1000.0
def randn(*shape, **options): return None
""",
    "torch/nn/__init__.py": "",
    "torch/nn/attention/__init__.py": """
import contextlib
class SDPBackend:
    FLASH_ATTENTION = 1
def sdpa_kernel(backend): return contextlib.nullcontext()
""",
    "torch/nn/functional.py": """
def scaled_dot_product_attention(query, key, value, is_causal):
    raise NotImplementedError
""",
}


class Sdpa(unittest.TestCase):
    def run_it(self, torch):
        with tempfile.TemporaryDirectory() as folder:
            for name, text in torch.items():
                path = pathlib.Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            return subprocess.run([sys.executable, ROOT / "benchmarks" / "sdpa_gpu.py"], env={"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
                                  capture_output=True, text=True)

    def test_without_torch_or_its_gpu_it_says_so_and_ends_with_3(self):
        for torch in ({"torch/__init__.py": "raise ImportError('none')"},
                      TORCH | {"torch/__init__.py": TORCH["torch/__init__.py"].replace("lambda: True", "lambda: False")}):
            result = self.run_it(torch)
            self.assertEqual(result.returncode, 3, result)
            self.assertRegex(result.stdout, r"\ASKIPPED, NOT TESTED: torch[^\n]*\n\Z")

    def test_an_old_torch_is_a_line_for_each_thing_that_it_lacks_and_nothing_measured_ends_with_3(self):
        result = self.run_it(TORCH)
        self.assertEqual(result.returncode, 3, result)
        self.assertRegex(result.stdout, r"sdpa flash, causal, bf16: SKIPPED, NOT TESTED: .*enable_gqa")
        self.assertRegex(result.stdout, r"sdpa cudnn, causal, f16: SKIPPED, NOT TESTED: .*CUDNN_ATTENTION")
        self.assertRegex(result.stdout, r"flex_attention.*: SKIPPED, NOT TESTED: .*flex_attention")
        self.assertRegex(result.stdout, r"flashinfer.*: SKIPPED, NOT TESTED: .*flashinfer")

    def test_rates_count_what_is_visible(self):
        works = "def scaled_dot_product_attention(query, key, value, is_causal, enable_gqa): pass\n"
        result = self.run_it(TORCH | {"torch/nn/functional.py": works})
        self.assertEqual(result.returncode, 0, result)
        pairs = sum(q + 1 for q in range(32 << 10))
        rate = 4 * 128 * 32 * pairs / 1e12  # In the stub's one second.
        self.assertIn(f"sdpa flash, causal, bf16: 1000.000 ms, {rate:.1f} Tflop/s\n", result.stdout)


if __name__ == "__main__":
    unittest.main()

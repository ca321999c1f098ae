"""Start-up: `import assay` (target < 0.3 s, without torch) and `assay --help` (target < 0.5 s), as whole processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(command: list[str], repeats: int = 9) -> float:
    """Median wall seconds of a command over `repeats` runs, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    bare = seconds([sys.executable, "-c", "pass"])
    print(f"python alone        {bare:.3f} s")
    print(f"import assay        {seconds([sys.executable, '-c', 'import assay']):.3f} s  (target < 0.3)")
    print(f"assay --help        {seconds([sys.executable, '-m', 'assay', '--help']):.3f} s  (target < 0.5)")
    code = "import assay; assay.detect(range(300), assay.SecretKey.generate())"
    print(f"detect 300 ids      {seconds([sys.executable, '-c', code]):.3f} s")


if __name__ == "__main__":
    main()

"""Build wheel and sdist into dist/, and check each where nothing of the checkout can be seen: `make package`.

Both are installed, one after the other, into a new environment in a temporary folder, with exact versions of what they
need. There a mechanism is trained for a few steps, alone and with the package of `examples/`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"

TRAIN = ["train", "debug=fast", "progress_bar=false", "trainer.accelerator=cpu"]
CHECKS = (
    ["--version"],
    ["list"],
    [*TRAIN, "data=digits", "attention=eigen_topk"],
    [*TRAIN, "plugins=[my_package]", "data=last_marker", "attention=alibi"],
)
REQUIRED_IN_SDIST = (
    "configs/train.yaml",
    "docs/index.md",
    "mkdocs.yml",
    "tests/test_cli.py",
    "LICENSE",
    "CITATION.cff",
)


def main() -> int:
    """Build and check; 0 if all is well."""
    shutil.rmtree(DIST, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT)], ROOT)
    wheel, sdist = next(DIST.glob("*.whl")), next(DIST.glob("*.tar.gz"))
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        work = shutil.copytree(ROOT / "examples", folder / "work", ignore=shutil.ignore_patterns("__pycache__"))
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        constraint = ["--constraint", str(ROOT / "constraints.txt")]
        run([*pip, "install", *constraint, str(wheel)], work)
        check_installed(python, work)
        run([*pip, "install", "--no-deps", "--force-reinstall", str(sdist)], work)
        check_installed(python, work)
        run([*pip, "check"], work)
    print(f"{wheel.name} and {sdist.name} install and train.")
    return 0


def check_contents(wheel: Path, sdist: Path) -> None:
    """Configurations in the wheel, and what tests and documentation need in the sdist."""
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"approx_attn/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    missing = configs - names
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    missing |= set(REQUIRED_IN_SDIST) - packed
    if missing:
        raise SystemExit(f"error: not packed: {', '.join(sorted(missing))}.")


def check_installed(python: Path, work: Path) -> None:
    """Run the command of the environment, away from the checkout."""
    for words in CHECKS:
        run([str(python.parent / "approx-attn"), *words], work)


def run(command: list[str], folder: Path) -> None:
    """Run a command, whose output is shown if it fails."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}.\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    raise SystemExit(main())

"""The compiled kernels of the CPU: built once per machine where a compiler is, as torch.compile's are."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_name("cluster_cpu") / "operators.cpp"
"""Includes the headers beside it."""

SWITCH = "APPROX_ATTN_CPU_KERNEL"
"""Environment variable; 0 keeps to PyTorch's operators."""

FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
"""By what PyTorch finds; not -march=native, since machines of a cluster may share the folder of built kernels."""

log = logging.getLogger(__name__)


@functools.cache
def load() -> ModuleType | None:
    """The operators of cluster_cpu/ (`cluster_forward`, `cluster_backward`), or None where they cannot be built.

    The first call on a machine compiles for about ten seconds and says so. Where nothing can be compiled a warning says
    why, once per process, and PyTorch's operators do the work, which takes several times as long.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return _load()
    except subprocess.CalledProcessError as error:
        reason = _first_error(error)
    except (OSError, RuntimeError, ImportError) as error:  # ImportError: PyTorch's build tools lack setuptools
        reason = str(error)
    slower = "PyTorch's operators do its work, which takes several times as long"
    log.warning("The CPU kernel of eigen_cluster was not built (%s); %s.", reason, slower)
    return None


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether `load` gives operators; torch.compile takes the answer as it is, without a look at how it was found."""
    return load() is not None


@torch.compiler.assume_constant_result
def has_bfloat16_products() -> bool:
    """Whether the operators multiply bfloat16 on this processor: where it has AMX."""
    kernel = load()
    return kernel is not None and kernel.has_bfloat16_products()


def _load() -> ModuleType:
    if sys.platform != "linux":
        raise OSError(f"it is built on Linux only, this is {platform.system()}")
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise OSError(f"no compiler {name!r} was found; the environment variable CXX names another")
    library = _place(compiler)
    if not library.is_file():
        log.warning("Building the CPU kernel of eigen_cluster, once for this machine (about 10 s) ...")
        _build(compiler, library)
    torch.ops.load_library(library)
    return torch.ops.approx_attn_cpu


def _first_error(error: subprocess.CalledProcessError) -> str:
    """What the compiler complains about, in one line."""
    lines = error.stderr.strip().splitlines()
    said = next((line for line in lines if "error" in line), lines[0] if lines else None)
    return said or f"the compiler ended with status {error.returncode}"


def _place(compiler: str) -> Path:
    """Where the library for this source, compiler, PyTorch and kind of processor is kept."""
    from torch.utils import cpp_extension  # imports setuptools, which takes time and may be missing

    source = [file.read_text() for file in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    what = (*source, compiler, *_flags(), platform.machine(), torch.__version__, sys.version)
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(folder) / "approx_attn" / f"cluster_cpu-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    library_abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"  # strings laid out as PyTorch's
    return [*FLAGS, "-DAT_PARALLEL_OPENMP=1", library_abi, *INSTRUCTIONS.get(capability, ())]


def _build(compiler: str, library: Path) -> None:
    """Compile to a name of its own, then rename: processes that build at the same time do not disturb each other."""
    from torch.utils import cpp_extension

    library.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    search = [f"-L{path}" for path in cpp_extension.library_paths()]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *_flags(), *includes, str(SOURCE), "-o", str(built), *search, "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(built, library)

"""Builds the native extension where there is a compiler; without one the package installs and runs all the same.

Everything else is in pyproject.toml. The kernels in csrc/cpu are compiled once for each instruction set, and the
processor chooses at run time; the files in csrc are compiled against the torch that is installed, hence
`pip install --no-build-isolation`.

With `ACIP_CUDA=1` in the environment the CUDA kernels in csrc/cuda are built too, as a library beside the extension;
that takes nvcc (in the PATH or under CUDA_HOME) and about a minute, so it is done only when asked for.
"""

import concurrent.futures
import os
import pathlib
import platform
import shutil
import subprocess
import sys

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"portable": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    # GCC 12 warns of its own header, whose undefined vectors are meant (GCC bug 105593).
    ISAS["avx512"] += ["-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"]
# In decode.cpp, whose vectors are written out, GCC makes vectors of four rows' addresses besides: stored by one
# instruction and read by four, which the processor cannot forward; a short row waits for that longer than it takes.
KERNELS = {"training": [], "decode": ["-fno-tree-slp-vectorize"]}
# Machine code for Ampere (which Ada runs too) and Hopper; what is newer compiles its own of PTX.
CUDA_TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage"]
NVCC_FLAGS += ["-Xcompiler", "-Wall,-Wextra,-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc/include'}"]
# No errno and no traps, but IEEE arithmetic otherwise: sums keep their order and NaN stays NaN.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", f"-I{ROOT / 'csrc/include'}"]


def without(reason):
    """The one line that says why there is no extension."""
    print(f"acip_kernels: installed without its native kernels, plain PyTorch runs instead: {reason}", file=sys.stderr)
    return {}


def find_nvcc():
    """nvcc of CUDA_HOME, or in the PATH; None if there is none. A torch for CPUs does not look for it itself."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


def link_cuda(nvcc, kernels, folder, target):
    """`kernels`, an object, and their operators, compiled into `folder`, as the shared library `target`."""
    import torch

    torch_folder, compiler = pathlib.Path(torch.__file__).parent, os.environ.get("CXX", "c++")
    bindings = f"{folder}/cuda_bindings.o"
    flags = ["-O2", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    flags += [f"-I{ROOT / 'csrc/include'}", "-isystem", torch_folder / "include"]
    subprocess.run([compiler, *flags, "-c", ROOT / "csrc/cuda_bindings.cpp", "-o", bindings], check=True)
    # CUDA's runtime is linked in, from wherever nvcc has it; torch is the one that is loaded.
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [nvcc, "-shared", "-cudart", "static", kernels, bindings, *libraries, "-o", target]
    subprocess.run(command, check=True)


def build_cuda(folder, target):
    """The CUDA kernels and their operators as the shared library `target`, by way of objects in `folder`."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("ACIP_CUDA is set, but there is no nvcc in the PATH nor under CUDA_HOME")
    for path in (folder, os.path.dirname(target)):
        os.makedirs(path, exist_ok=True)
    kernels = f"{folder}/cuda_decode.o"
    targets = [flag for one in CUDA_TARGETS for flag in ("-gencode", one)]
    source = ROOT / "csrc/cuda/decode.cu"
    subprocess.run([nvcc, *NVCC_FLAGS, *targets, "-c", source, "-o", kernels], check=True)
    link_cuda(nvcc, kernels, folder, target)


def extension():
    """Keywords for `setup` that build the extension, or none, with the reason said."""
    if os.environ.get("ACIP_NO_NATIVE"):
        return without("ACIP_NO_NATIVE is set")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return without(f"torch is not importable while building ({error}); install with --no-build-isolation")

    class Build(BuildExtension):
        """BuildExtension, with the kernels compiled before it and failures survived."""

        def build_extension(self, ext):
            try:
                ext.extra_objects = [*ext.extra_objects, *self.kernels()]
                super().build_extension(ext)
            except Exception as error:  # whatever a toolchain does, the package installs
                without(f"the build failed: {str(error).strip().splitlines()[-1]}")
                if os.environ.get("ACIP_REQUIRE_NATIVE"):
                    raise
            if os.environ.get("ACIP_CUDA"):  # asked for: a failure is one
                build_cuda(self.build_temp, self.cuda_library())

        def kernels(self):
            folder = pathlib.Path(self.build_temp, "kernels")
            folder.mkdir(parents=True, exist_ok=True)
            compiler = os.environ.get("CXX", "c++")
            jobs = [("dispatch", "dispatch", ["-DACIP_X86"] if X86 else [])]
            jobs += [(name, f"{name}-{isa}", [*KERNELS[name], *flags, f"-DACIP_ISA={isa}"])
                     for name in KERNELS for isa, flags in ISAS.items()]  # fmt: skip

            def compiled(job):
                name, target, flags = job
                target = str(folder / f"{target}.o")
                source = str(ROOT / f"csrc/cpu/{name}.cpp")
                subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", target], check=True)
                return target

            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(compiled, jobs))

        def cuda_library(self):
            return os.path.join(self.build_lib, "acip_kernels", "_cuda.so")

        def get_outputs(self):
            # An extension that was not built is no output; setuptools would look for it.
            return [path for path in (*super().get_outputs(), self.cuda_library()) if os.path.exists(path)]

        def copy_extensions_to_source(self):
            built = [ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath_built(ext))]
            self.extensions = built
            super().copy_extensions_to_source()
            if os.path.exists(self.cuda_library()):
                shutil.copy(self.cuda_library(), ROOT / "acip_kernels")

        def get_ext_fullpath_built(self, ext):
            return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    module = CppExtension(
        "acip_kernels._native",
        ["csrc/bindings.cpp", "csrc/causal_attention.cpp", "csrc/masked_svd.cpp", "csrc/prepared.cpp"],
        include_dirs=[str(ROOT / "csrc/include")],
        # OpenMP is torch's own: at::parallel_for is a header. Without -g0, symbols for debugging are most of a wheel.
        extra_compile_args=["-O2", "-g0", "-std=c++20", "-fopenmp", "-Wall", "-fvisibility=hidden"],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*/**/*.*"))],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())

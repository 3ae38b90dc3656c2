"""Builds the native extension where there is a compiler; without one the package installs and runs all the same.

Everything else is in pyproject.toml. The kernels in csrc/cpu are compiled once for each instruction set, and the
processor chooses at run time; bindings.cpp is compiled against the torch that is installed, hence
`pip install --no-build-isolation`.
"""

import os
import pathlib
import platform
import subprocess
import sys

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"portable": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
# No errno and no traps, but IEEE arithmetic otherwise: sums keep their order and NaN stays NaN.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", f"-I{ROOT / 'csrc/include'}"]


def without(reason):
    """The one line that says why there is no extension."""
    print(f"acip_kernels: installed without its native kernels, plain PyTorch runs instead: {reason}", file=sys.stderr)
    return {}


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

        def kernels(self):
            folder = pathlib.Path(self.build_temp, "kernels")
            folder.mkdir(parents=True, exist_ok=True)
            compiler = os.environ.get("CXX", "c++")
            for isa, flags in ISAS.items():
                target = folder / f"training-{isa}.o"
                command = [compiler, *FLAGS, *flags, f"-DACIP_ISA={isa}", "-c", str(ROOT / "csrc/cpu/training.cpp")]
                subprocess.run([*command, "-o", str(target)], check=True)
                yield str(target)
            target = folder / "dispatch.o"
            x86 = ["-DACIP_X86"] if X86 else []
            command = [compiler, *FLAGS, *x86, "-c", str(ROOT / "csrc/cpu/dispatch.cpp"), "-o", str(target)]
            subprocess.run(command, check=True)
            yield str(target)

        def get_outputs(self):
            # An extension that was not built is no output; setuptools would look for it.
            return [path for path in super().get_outputs() if os.path.exists(path)]

        def copy_extensions_to_source(self):
            built = [ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath_built(ext))]
            self.extensions = built
            super().copy_extensions_to_source()

        def get_ext_fullpath_built(self, ext):
            return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    module = CppExtension(
        "acip_kernels._native",
        ["csrc/bindings.cpp"],
        include_dirs=[str(ROOT / "csrc/include")],
        # OpenMP is torch's own: at::parallel_for is a header.
        extra_compile_args=["-O2", "-std=c++20", "-fopenmp", "-Wall", "-fvisibility=hidden"],
        depends=["csrc/include/acip/training.h", "csrc/cpu/training.cpp", "csrc/cpu/dispatch.cpp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())

"""One thread a process: the tests run in parallel, and teams of threads that wait for each other are far slower."""

import os

import torch

torch.set_num_threads(1)

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def patch_the_language_once_a_launch():
    """Triton's interpreter patches `triton.language` anew for each call of a function in a kernel, which takes most of
    the time of such a call: until the launch ends, there is nothing left to patch for what names the same modules."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, scope_type, patched = interpreter._patch_lang, interpreter._LangPatchScope, set()
    languages = (interpreter.tl, interpreter.tl.core)

    seen = {}  # by a module's globals

    def names(fn):
        of = fn.__globals__
        if id(of) not in seen:
            seen[id(of)] = of, frozenset(i for i, one in enumerate(languages) if any(v is one for v in of.values()))
        return seen[id(of)][1]

    def patch_once(fn):
        of, first = names(fn), not patched
        if of in patched:
            return scope_type()
        scope = patch(fn)
        patched.add(of)
        if first:  # the launch's own

            def restore():
                patched.clear()
                scope_type.restore(scope)

            scope.restore = restore
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_the_language_once_a_launch()

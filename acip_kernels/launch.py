"""Another program, in this process, to which `import acip_kernels` is added: how programs load compressed models.

Transformers finds the weight format "acip" by an import alone. A program of one's own has it; this is for the others,
LM-Eval's `lm_eval` say.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence


def find_program(name: str) -> Callable[[], object]:
    """What runs the program `name` when it is called.

    name: a Python file; a command that an installed package brings (`lm_eval`); or a module, as for `python -m`.

    Raises `ValueError` if there is no such program.
    """
    path = pathlib.Path(name)
    if path.suffix == ".py" or os.sep in name:
        if not path.is_file():
            raise ValueError(f"{name} is no file")
        return lambda: runpy.run_path(name, run_name="__main__")
    for command in importlib.metadata.entry_points(group="console_scripts", name=name):
        return lambda: sys.exit(command.load()())
    if _is_module(name):
        return lambda: runpy.run_module(name, run_name="__main__", alter_sys=True)
    raise ValueError(f"{name} is no Python file, no command of an installed Python package, and no module")


def run_program(name: str, arguments: Sequence[str]) -> None:
    """Run the program `name` in this process, with `arguments` on its command line, and exit with its status.

    Only this process knows the format: what the program starts as processes of its own does not.

    Raises `ValueError` if there is no such program, else `SystemExit`; an error of the program's is shown as Python
    shows it.
    """
    run = find_program(name)
    from transformers.utils import logging as transformers_logging

    logging.root.handlers.clear()  # it sets up its own logging
    transformers_logging.enable_progress_bar()
    sys.argv = [name, *arguments]
    is_file = pathlib.Path(name).is_file()
    sys.path.insert(0, str(pathlib.Path(name).resolve().parent) if is_file else os.getcwd())
    try:
        run()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # its parent is none
        return False

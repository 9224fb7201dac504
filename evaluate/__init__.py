"""Benchmarks of models and adapters, each a script.

Hugging Face's library `evaluate`, which lm_eval imports, has the same name. If it is installed, its modules can be
imported from this package too, and its functions are loaded on first use.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_here = Path(__file__).parent.resolve()
_others = [path for path in sys.path if Path(path).resolve() not in (_here, _here.parent)]
_library = PathFinder.find_spec("evaluate", _others)
if _library and _library.origin:
    __path__ += _library.submodule_search_locations


def __getattr__(name: str) -> Any:
    """Return an attribute of the library, such as `evaluate.load`."""
    global _library
    if _library and _library.origin and not name.startswith("__"):
        library, _library = _library, None
        library.loader.exec_module(sys.modules[__name__])
        return getattr(sys.modules[__name__], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

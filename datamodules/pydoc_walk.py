"""A walk through the standard library's docstrings, to be run as a script in a bare interpreter.

Libraries patch the standard library when they are imported (methods of `logging.Logger`, `inspect.getfile`), and the
walk is to find the same everywhere: this file imports nothing else, and prints a JSON array of
`{"name", "signature", "docstring"}`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

MODULES = (
    "abc argparse array ast asyncio base64 bdb bisect builtins bz2 calendar cmath cmd code codecs codeop collections "
    "collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy csv ctypes "
    "dataclasses datetime decimal difflib dis doctest email.message email.utils enum fileinput filecmp fnmatch "
    "fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser "
    "http.client http.cookiejar http.cookies http.server imaplib importlib importlib.metadata inspect io ipaddress "
    "itertools json keyword linecache locale logging logging.handlers lzma mailbox marshal math mimetypes mmap "
    "multiprocessing.pool multiprocessing.shared_memory netrc numbers operator optparse os os.path pathlib pdb pickle "
    "pickletools pkgutil platform plistlib poplib pprint profile pstats queue quopri random re reprlib sched secrets "
    "select selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics string "
    "struct subprocess symtable sys sysconfig tarfile tempfile textwrap threading time timeit tokenize trace traceback "
    "tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request urllib.robotparser uuid "
    "warnings wave weakref xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipapp zipfile zipimport zlib zoneinfo"
)
"""Modules whose objects are listed; importing them opens no window, no browser and no connection."""

MAX_DOCSTRING = 1200
"""Longer docstrings are cut behind the last paragraph that ends within so many characters."""

MAX_SIGNATURE = 200
"""Longer signatures are left out."""


def documented_objects() -> list[dict[str, str]]:
    """Each public function, class and method with its docstring, every docstring once."""
    entries, seen = [], set()
    for name, thing in _public_objects():
        docstring = _docstring(thing)
        if docstring is not None and docstring not in seen:
            seen.add(docstring)
            entries.append({"name": name, "signature": _signature(thing), "docstring": docstring})
    return entries


def _public_objects() -> Iterator[tuple[str, Any]]:
    """Names with dots and the objects behind them, always in the same order, none twice."""
    seen: dict[int, Any] = {}  # holds the objects, so that no id is given away again
    for module_name in MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # this Python was built without it
            continue
        for name, thing in _members(module):
            if id(thing) in seen or not _belongs(thing, module):
                continue
            seen[id(thing)] = thing
            prefix = name if module_name == "builtins" else f"{module_name}.{name}"
            yield prefix, thing
            if inspect.isclass(thing):
                for method_name, method in _members(thing):
                    if id(method) not in seen and method_name in vars(thing) and callable(method):
                        seen[id(method)] = method
                        yield f"{prefix}.{method_name}", method


def _members(owner: ModuleType | type) -> Iterator[tuple[str, Any]]:
    names = getattr(owner, "__all__", None) if isinstance(owner, ModuleType) else None
    for name in sorted(names or dir(owner)):
        if not name.startswith("_"):
            try:
                yield name, getattr(owner, name)
            except AttributeError:  # listed, but not on this platform
                continue


def _belongs(thing: Any, module: ModuleType) -> bool:
    """Is it a function or class of this module, and not one that it imported from another?"""
    if not (inspect.isroutine(thing) or inspect.isclass(thing)):
        return False
    home = getattr(thing, "__module__", None)
    if not isinstance(home, str):
        return module.__name__ == "builtins"
    root = module.__name__.split(".")[0]
    return home.split(".")[0].lstrip("_") == root or (root == "os" and home in ("posix", "nt", "posixpath", "ntpath"))


def _docstring(thing: Any) -> str | None:
    """The docstring, cleaned and of handy length; None if there is none, or it says next to nothing."""
    docstring = inspect.getdoc(thing) or ""
    if len(docstring) > MAX_DOCSTRING:
        end = docstring.rfind("\n\n", 0, MAX_DOCSTRING)
        docstring = docstring[:end] if end > 0 else ""
    docstring = re.sub(r" at 0x[0-9a-fA-F]+", "", docstring).strip()
    return docstring if len(docstring) >= 20 else None


def _signature(thing: Any) -> str:
    """The signature as text, without what changes from run to run; empty where Python knows none."""
    try:
        signature = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    signature = re.sub(r" at 0x[0-9a-fA-F]+", "", signature)
    return signature if len(signature) <= MAX_SIGNATURE else ""


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated modules and attributes
        json.dump(documented_objects(), sys.stdout)

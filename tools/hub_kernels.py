"""``python tools/hub_kernels.py OUT``: the ops as a repository of Hugging Face's ``kernels``, which loads them by name.

    kernels.get_local_kernel(Path("OUT"))           # what this wrote
    kernels.get_kernel("USER/asyppo-kernels", ...)  # once it has been uploaded, which this does not do

The sources are those of ``kernels/asyppo_kernels``, but for what ``kernels`` asks of a package that is imported under
a name of its own, perhaps in several versions at once: imports are relative, and the ops are registered in a namespace
that is the build's id. ``integrations`` stay behind, since they are imported by the package's own name.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "asyppo_kernels"
BACKENDS = ("cpu", "cuda", "rocm")
LEFT_OUT = "integrations"
KERNELS_MINVER = "0.17.0"
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels]
---

# asyppo-kernels {version}

Fused ops for reinforcement learning of language models with critics: {ops}.

```python
from kernels import get_kernel

ops = get_kernel("USER/asyppo-kernels", version={major}, trust_remote_code=True)
out = ops.linear_logprob(hidden, head_weight, target)
```

Written from the sources of asyppo {version} (digest {digest}). Shapes, dtypes and errors are in the docstrings.
"""


def sources() -> dict[Path, str]:
    """The package's files by their place in it."""
    found = {path.relative_to(PACKAGE): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    return {place: text for place, text in found.items() if place.parts[0] != LEFT_OUT}


def rewritten(text: str, place: Path, namespace: str) -> str:
    """A file of the package with relative imports, whose ops are in ``namespace``.

    Raises:
        ValueError: it names the package in a way that is not known here.
    """
    dots = "." * len(place.parts)
    text = re.sub(r"^(\s*from )asyppo_kernels(?:\.([\w.]+))? import", rf"\1{dots}\2 import", text, flags=re.M)
    text = re.sub(
        r'import_module\(f"asyppo_kernels\.([\w.]+\.\{form\}_form)"\)',
        rf'import_module(f"{dots}\1", __package__)',
        text,
    )
    text = text.replace('"asyppo::', f'"{namespace}::')
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        for name in names:
            if re.match(r"asyppo(_kernels)?(\.\w|::|$)", name):
                raise ValueError(f"{place}:{node.lineno}: got {name!r}, needs a name this script knows how to change")
    return text


def build(out: Path) -> list[Path]:
    """Write the repository into ``out``, and return the folder of each backend."""
    files = sources()
    digest = hashlib.sha256("".join(f"{place}\0{text}\0" for place, text in files.items()).encode()).hexdigest()
    version = re.search(r'^__version__ = "([\d.]+)"', files[Path("__init__.py")], re.M)
    if version is None:
        raise ValueError(f"{PACKAGE / '__init__.py'}: needs a __version__")
    major = max(1, int(version[1].split(".")[0]))  # whole numbers from 1 on are versions of a repository of kernels
    folders = []
    for backend in BACKENDS:
        name = f"asyppo_kernels_{backend}_{digest[:12]}"
        folder = out / "build" / f"torch-{backend}"
        for place, text in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(rewritten(text, place, name))
        metadata = {
            "id": name,
            "name": "asyppo-kernels",
            "version": major,
            "kernels-minver": KERNELS_MINVER,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        folders.append(folder)
    ops = ", ".join(sorted(f"`{place.parent}`" for place in files if place.name == "op.py"))
    (out / "README.md").write_text(CARD.format(version=version[1], major=major, digest=digest[:12], ops=ops))
    return folders


def main() -> None:
    """Build, and say where."""
    parser = argparse.ArgumentParser(prog="python tools/hub_kernels.py", description=__doc__)
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out}: is there already, needs a new folder")
    for folder in build(out):
        print(folder)


if __name__ == "__main__":
    main()

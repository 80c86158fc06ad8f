"""Reads which names each TensorRT has: `python tests/targets/tensorrt_names.py 10.12.0.36 11.4.0.106`, on Linux with gcc.

TensorRT itself is gigabytes that need NVIDIA's index and a GPU; the Python bindings alone are a wheel of one megabyte. They
are imported over empty libraries in place of TensorRT's, which is enough to see every class and its members. Writes
tensorrt_names.json beside this file: version → class → names, of the classes that slimvit uses.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tensorrt_api import API

RECORD = Path(__file__).with_name("tensorrt_names.json")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
IMPORT = """\
import ctypes, importlib.util, json, sys
bindings, classes, *libraries = sys.argv[1:]
for library in libraries:
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("tensorrt", bindings)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
named = {each: getattr(module, each, None) for each in classes.split(",")}
print(json.dumps({each: sorted(n for n in dir(it) if n[0] != "_") for each, it in named.items() if it is not None}))
"""


def names(version: str, folder: Path) -> dict[str, list[str]]:
    """Class → its public names, in one version of the bindings; a class that it does not have is left out.

    Raises:
        subprocess.CalledProcessError: the wheel cannot be had, or not be imported.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, "--only-binary", ":all:", f"tensorrt-cu12-bindings=={version}"], check=True)
    (wheel,) = folder.glob(f"*{version}*.whl")
    with zipfile.ZipFile(wheel) as archive:
        bindings = Path(archive.extract("tensorrt_bindings/tensorrt.so", folder / version))
    listed = subprocess.run(["nm", "-D", "-u", bindings], check=True, capture_output=True, text=True).stdout.split()
    missing = [
        name for name in listed if name.endswith(("_INTERNAL", "PluginRegistry", "InferPlugins", "ParserVersion"))
    ]
    source = folder / version / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in missing))
    libraries = [folder / version / f"lib{name}.so.{version.partition('.')[0]}" for name in LIBRARIES]
    for path in libraries:
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, source], check=True)
    classes = ",".join((*API, "DataType"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, bindings, classes, *libraries], check=True, capture_output=True, text=True
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def main(versions: list[str]) -> None:
    """Writes the record of the versions anew."""
    with tempfile.TemporaryDirectory() as folder:
        found = {version: names(version, Path(folder)) for version in versions}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

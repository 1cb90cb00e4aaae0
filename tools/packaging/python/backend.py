"""Builds the wheel with nothing but Python and a C compiler: `pip wheel tools/packaging/python`.

It holds tools/examples/medrun.py as the package medrun, and beside it the library, where the binding
looks for it. CC and CFLAGS choose how that is compiled. pip builds in the folder itself, so that the
source is three folders up."""
import base64
import hashlib
import os
import re
import shlex
import subprocess
import sysconfig
import tempfile
import zipfile

TOP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../..")
MAIN = """import os
import runpy
runpy.run_path(os.path.join(os.path.dirname(__file__), "__init__.py"), run_name="__main__")
"""


def read(path):
    with open(os.path.join(TOP, path), "rb") as f:
        return f.read()


def library(name):
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, name)
        cc = shlex.split(os.environ.get("CC", "cc")) + shlex.split(os.environ.get("CFLAGS", "-O2"))
        subprocess.run(cc + ["-fPIC", "-shared", "-s", "-DMEDRUN_NO_MAIN", "-o", out,
                             os.path.join(TOP, "medrun.c"), "-lm", "-lpthread"], check=True)
        with open(out, "rb") as f:
            return f.read()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    version = re.search(rb'#define MEDRUN_VERSION "(.*)"', read("medrun.c")).group(1).decode()
    binding = read("tools/examples/medrun.py")
    name = re.search(rb'NAME = "(.*?)"', binding).group(1).decode()
    tag = "py3-none-" + re.sub(r"[-.]", "_", sysconfig.get_platform())
    info = f"medrun-{version}.dist-info/"
    files = {
        "medrun/__init__.py": binding,
        "medrun/__main__.py": MAIN.encode(),
        "medrun/" + name: library(name),
        info + "METADATA": (f"Metadata-Version: 2.1\nName: medrun\nVersion: {version}\n"
                            "Summary: runs open medical language models on an ordinary CPU\n"
                            "License: MIT\nRequires-Python: >=3.8\n").encode(),
        info + "WHEEL": f"Wheel-Version: 1.0\nGenerator: medrun\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
        info + "LICENSE": read("LICENSE"),
    }
    record = ""
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(data)}\n"
    files[info + "RECORD"] = (record + info + "RECORD,,\n").encode()
    wheel = f"medrun-{version}-{tag}.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, wheel), "w", zipfile.ZIP_DEFLATED) as z:
        for path, data in files.items():
            z.writestr(path, data)
    return wheel

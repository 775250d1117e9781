"""As `diffusers`, with how to load it through torchao: int8 weights, activations quantised as they come.

torchao quantises after loading, so the files are the fp16 ones: its own tensors are stored as pickles, which this
project does not write. The checked error is that of the quantised networks. It is for GPUs: on a CPU the int8 kernels
take several times as long as fp32 without `torch.compile`, and `onnx-int8` is the format to use.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from refine_control.export.format import Format, Velocity, Work
from refine_control.export.formats import diffusers
from refine_control.storage import write_atomic

_NOTE = """
## int8 by torchao

For GPUs; on a CPU it is slower than fp32, and an export `--to onnx-int8` is faster.

```python
from diffusers import SD3ControlNetModel
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

controlnet = SD3ControlNetModel.from_pretrained(FOLDER, variant="fp16").float()
quantize_(controlnet, Int8DynamicActivationInt8WeightConfig())
quantize_(pipeline.transformer, Int8DynamicActivationInt8WeightConfig())
controlnet.compile()
pipeline.transformer.compile()
```
"""


def _write(work: Work, folder: Path) -> None:
    import torchao  # noqa: F401 - an extra

    diffusers.FORMAT.write(work, folder)
    readme = folder / "README.md"
    write_atomic(readme, (readme.read_text() if readme.is_file() else "") + _NOTE)


def quantized(network: Any) -> Any:
    """A copy with linear layers in int8, their activations quantised as they come."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    copied = copy.deepcopy(network)
    quantize_(copied, Int8DynamicActivationInt8WeightConfig())
    return copied


def _load(work: Work, folder: Path) -> Velocity:
    return diffusers.load(work, folder, quantized)


FORMAT = Format("torchao", "diffusers with torchao, int8, for GPUs", 0.1, _write, _load, diffusers.FORMAT.refuse)

"""What can take a linear's place: one file for each stored form, how to find them, and compressed caches.

A new form is a file here and a dataclass of the same name in `coppice.models.replacements`.
"""

from importlib import import_module
from pkgutil import iter_modules

from coppice.models.modules.activation_quantization import quantize_activations, round_tokens
from coppice.models.modules.base import FORMS, PackedForm, Replaceable, StoredForm, effective_weight
from coppice.models.modules.codebook import CodebookLinear
from coppice.models.modules.cur import CURLinear
from coppice.models.modules.finding import (
    describe,
    describe_replacements,
    install,
    mask,
    replaceable_module,
    replaceable_modules,
    set_masked,
    weight_matrices,
)
from coppice.models.modules.flatten_quant import FlattenQuantLinear, flatten_inputs
from coppice.models.modules.low_rank import LowRankLinear
from coppice.models.modules.low_rank_correction import LowRankCorrectionLinear
from coppice.models.modules.packing import pack, packed_words, unpack
from coppice.models.modules.quantized import QuantizedLinear
from coppice.models.modules.tensor_train import TensorTrainLinear

__all__ = [
    "FORMS",
    "CURLinear",
    "CodebookLinear",
    "FlattenQuantLinear",
    "LowRankCorrectionLinear",
    "LowRankLinear",
    "PackedForm",
    "QuantizedLinear",
    "Replaceable",
    "StoredForm",
    "TensorTrainLinear",
    "describe",
    "describe_replacements",
    "effective_weight",
    "flatten_inputs",
    "install",
    "mask",
    "pack",
    "packed_words",
    "quantize_activations",
    "replaceable_module",
    "replaceable_modules",
    "round_tokens",
    "set_masked",
    "unpack",
    "weight_matrices",
]

# Every file registers its forms, those that nothing above names too.
for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

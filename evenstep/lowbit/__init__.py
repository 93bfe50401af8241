"""Low-bit training: number formats, layers that use them, recipes, and packed weights. docs/lowbit.md is the guide."""

from evenstep.lowbit.convert import LowBitReport as LowBitReport
from evenstep.lowbit.convert import dequantize_ as dequantize_
from evenstep.lowbit.convert import lowbit_report as lowbit_report
from evenstep.lowbit.convert import quantize_ as quantize_
from evenstep.lowbit.export import load_quantized_ as load_quantized_
from evenstep.lowbit.export import save_quantized as save_quantized
from evenstep.lowbit.fake_quant import fake_quantize as fake_quantize
from evenstep.lowbit.formats import FORMATS as FORMATS
from evenstep.lowbit.formats import Format as Format
from evenstep.lowbit.linear import LowBitLinear as LowBitLinear
from evenstep.lowbit.metrics import lowbit_metrics as lowbit_metrics
from evenstep.lowbit.metrics import observe_gradients as observe_gradients
from evenstep.lowbit.metrics import observe_inputs as observe_inputs
from evenstep.lowbit.metrics import quantization_error as quantization_error
from evenstep.lowbit.quantized import Quantized as Quantized
from evenstep.lowbit.quantized import dequantize as dequantize
from evenstep.lowbit.quantized import quantize as quantize
from evenstep.lowbit.recipes import RECIPES as RECIPES
from evenstep.lowbit.recipes import Backward as Backward
from evenstep.lowbit.recipes import Recipe as Recipe

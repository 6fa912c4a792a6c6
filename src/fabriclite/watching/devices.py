"""Peak rates of accelerators, as their makers print them: dense, without structured sparsity, in 1e12 per second.

Where a data sheet prints only the rate with 2:4 sparsity, half of it stands here. Of rates that depend on how sums are
kept, those with float32 sums stand here, which is what torch's matrix products use. What is not sure is left out.
"""

import re
from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Rates of one device in 1e12 operations per second; ``None``: the device has no such unit, or it is not known.

    Attributes:
        fp64, fp32: of matrix products in these dtypes.
        tf32: of float32 products, where torch may round their inputs to TF32.
        bf16, fp16, fp8, int8: of products with inputs of these dtypes.
    """

    fp64: float | None = None
    fp32: float | None = None
    tf32: float | None = None
    bf16: float | None = None
    fp16: float | None = None
    fp8: float | None = None
    int8: float | None = None


# nvidia.com, H100 data sheet: 67, 67, 989*, 1979*, 3958* (* with sparsity); the same unit in GH200 and H200
_HOPPER_SXM: Final = Peak(fp64=67, fp32=67, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1978.9, int8=1978.9)
# nvidia.com, H100 NVL and H200 NVL data sheets: 60, 60, 835*, 1671*, 3341*
_HOPPER_NVL: Final = Peak(fp64=60, fp32=60, tf32=417.5, bf16=835.5, fp16=835.5, fp8=1670.5, int8=1670.5)
# amd.com, MI300X and MI325X data sheets; 304 units at 2.1 GHz
_MI300: Final = Peak(fp64=163.4, fp32=163.4, tf32=653.7, bf16=1307.4, fp16=1307.4, fp8=2614.9, int8=2614.9)

_TABLE: Final[tuple[tuple[str, Peak], ...]] = (
    # NVIDIA Blackwell data sheet, per GPU of GB200 NVL72: 40, 80, 2.5e3*, 5e3*, 10e3*
    (r"GB200", Peak(fp64=40, fp32=80, tf32=1250, bf16=2500, fp16=2500, fp8=5000, int8=5000)),
    # the same, per GPU of HGX B200: 37, 75, 2.2e3*, 4.5e3*, 9e3*
    (r"B200", Peak(fp64=37, fp32=75, tf32=1100, bf16=2250, fp16=2250, fp8=4500, int8=4500)),
    (r"(H100|H200) NVL", _HOPPER_NVL),
    # nvidia.com, H100 data sheet, PCIe column: 51, 51, 756*, 1513*, 3026*
    (r"H100 PCIe", Peak(fp64=51, fp32=51, tf32=378, bf16=756.5, fp16=756.5, fp8=1513, int8=1513)),
    (r"H100( 80GB HBM3)?|H200|GH200( (480|144G?|96)GB?)?", _HOPPER_SXM),
    # resellers' data sheets of H20
    (r"H20", Peak(fp32=44, tf32=74, bf16=148, fp16=148, fp8=296, int8=296)),
    # nvidia.com, A100 data sheet
    (
        r"A100(-(SXM4|PCIE|PCIe)-(40|80)GB| 80GB PCIe| PCIe)?",
        Peak(fp64=19.5, fp32=19.5, tf32=156, bf16=312, fp16=312, int8=624),
    ),
    # nvidia.com, A30 data sheet
    (r"A30", Peak(fp64=10.3, fp32=10.3, tf32=82, bf16=165, fp16=165, int8=330)),
    # nvidia.com, A10 data sheet
    (r"A10", Peak(fp32=31.2, tf32=62.5, bf16=125, fp16=125, int8=250)),
    # NVIDIA A10G data sheet, as AWS publishes it: 70*, 140*, 140*, 280*
    (r"A10G", Peak(tf32=35, bf16=70, fp16=70, int8=140)),
    # nvidia.com, V100 data sheet; Volta knows no bfloat16
    (r"(Tesla )?V100-SXM2-(16|32)GB", Peak(fp64=7.8, fp32=15.7, fp16=125)),
    (r"(Tesla )?V100-PCIE-(16|32)GB", Peak(fp64=7, fp32=14, fp16=112)),
    (r"(Tesla )?V100S-PCIE-32GB", Peak(fp64=8.2, fp32=16.4, fp16=130)),
    # nvidia.com, T4 data sheet
    (r"(Tesla )?T4", Peak(fp32=8.1, fp16=65, int8=130)),
    # nvidia.com, L4, L40 and L40S data sheets: 120*, 242*, 485*; 181*, 362*, 724*; 366*, 733*, 1466*
    (r"L4", Peak(fp32=30.3, tf32=60, bf16=121, fp16=121, fp8=242.5, int8=242.5)),
    (r"L40", Peak(fp32=90.5, tf32=90.5, bf16=181, fp16=181, fp8=362, int8=362)),
    (r"L40S", Peak(fp32=91.6, tf32=183, bf16=362, fp16=362, fp8=733, int8=733)),
    # NVIDIA RTX 6000 Ada data sheet: 91.1, and 1457* in fp8
    (r"RTX 6000 Ada Generation", Peak(fp32=91.1, tf32=182.1, bf16=364.2, fp16=364.2, fp8=728.5, int8=728.5)),
    # NVIDIA Ada architecture paper, RTX 4090, with float32 sums
    (r"GeForce RTX 4090", Peak(fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2, fp8=330.3, int8=660.6)),
    # NVIDIA Ampere GA102 architecture paper, RTX 3090, with float32 sums
    (r"GeForce RTX 3090", Peak(fp32=35.6, tf32=35.6, bf16=71, fp16=71, int8=284)),
    # amd.com, MI250X data sheet: 95.7, 95.7, 383; torch sees each of its two dies as a device
    (r"MI250X", Peak(fp64=47.9, fp32=47.9, bf16=191.5, fp16=191.5, int8=191.5)),
    (r"(MI300X|MI325X)( OAM)?", _MI300),
    # amd.com, MI355X data sheet; 256 units at 2.4 GHz
    (r"MI355X( OAM)?", Peak(fp64=78.6, fp32=157.3, bf16=2516.6, fp16=2516.6, fp8=5033.2, int8=5033.2)),
)

_FIELDS: Final = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e4m3fnuz: "fp8",
    torch.float8_e5m2: "fp8",
    torch.float8_e5m2fnuz: "fp8",
}


def peak_of(device_name: str) -> Peak | None:
    """The rates of a device by the name that torch gives it; ``None``: not in the table.

    Only whole names count: a slice of a device (``... MIG 3g.40gb``), a laptop's or a cut-down version is another.
    """
    name = re.sub(r"^(NVIDIA|AMD Instinct|AMD Radeon Graphics)\s+", "", device_name.strip())
    return next((peak for pattern, peak in _TABLE if re.fullmatch(pattern, name)), None)


def peak_flops(device_name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Floating-point operations (for integers: operations) per second that a device can do at most, dense.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` says it.
        dtype: of the inputs of matrix products.
        tf32: float32 products may use TF32, where the device knows it.

    Returns:
        ``None`` where it is not known, or the device has no units for that dtype.
    """
    peak = peak_of(device_name)
    field = _FIELDS.get(dtype)
    if peak is None or field is None:
        return None
    value: float | None = getattr(peak, field)
    if tf32 and dtype == torch.float32 and peak.tf32 is not None:
        value = peak.tf32
    return None if value is None else value * 1e12


def tf32_is_allowed() -> bool:
    """Whether torch may compute float32 products on CUDA in TF32."""
    return torch.get_float32_matmul_precision() != "highest"


def name_of(device: torch.device) -> str:
    """As torch names it; ``"cpu"`` or ``"mps"`` for those."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

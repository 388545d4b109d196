"""What a GPU can do at most: the ceilings of the model of speed, each with its source.

Whitepapers: "NVIDIA A100 Tensor Core GPU Architecture" (2020), "NVIDIA H100 Tensor Core GPU Architecture" (2022).
gpu-benches: measurements of L2 reads by size of the data set, github.com/te42kyfo/gpu-benches, folder gpu-l2-cache.
"""

import dataclasses

# Of an SM, on both devices (CUDA C++ programming guide, "Compute Capabilities").
SHARED_BYTES_PER_CLOCK = 128
EXPS_PER_CLOCK = 16  # the guide's "Arithmetic Instructions": ex2 in float32
SCHEDULERS = 4  # each issues one instruction per clock and feeds one tensor core
REGISTERS = 65536
MAX_THREADS = 2048
MAX_CTAS = 32
# Shared memory that the system takes for each CTA (the guide's section on compute capability 8.x).
RESERVED_SHARED_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates are per second, of the whole GPU.

    Attributes:
      clock: at which the tensor cores have their published rate.
      flops: dense bfloat16, by instruction: "mma" is warp by warp, "wgmma" is what four warps of an H100 do together.
      l2_bytes: read from L2 by all SMs together.
      l2_capacity: the largest data set that is still read within 5% of that rate.
      shared_bytes: of an SM.
    """

    name: str
    sms: int
    clock: float
    flops: dict[str, float]
    hbm_bytes: float
    l2_bytes: float
    l2_capacity: int
    shared_bytes: int


A100 = Device(
    name="A100 SXM 80GB",
    sms=108,  # whitepaper
    clock=1.41e9,  # whitepaper; 312 TFLOP/s are 108 SMs x 2,048 flop per clock
    flops=dict(mma=312e12),  # whitepaper
    hbm_bytes=2.039e12,  # data sheet of the 80 GB SXM module
    l2_bytes=5.4e12,  # gpu-benches, a100_80.txt, 2 to 25 MB; the whitepaper's 5,120 bytes per clock would be 7.2
    l2_capacity=28160 * 1024,  # the same file; L2 has 40 MB, in two halves
    shared_bytes=164 * 1024,  # whitepaper
)

H100 = Device(
    name="H100 SXM",
    sms=132,  # whitepaper
    clock=1.83e9,  # from the whitepaper's rate: 132 SMs x 4,096 flop per clock
    flops=dict(
        wgmma=989.4e12,  # whitepaper
        mma=0.629 * 989.4e12,  # what mma.sync reaches on average (Luo et al., arXiv:2402.13499)
    ),
    hbm_bytes=3.35e12,  # whitepaper
    l2_bytes=9.7e12,  # gpu-benches, h200.txt, 17 to 40 MB: the H200 has the SMs and the L2 of the H100 SXM
    l2_capacity=40448 * 1024,  # the same file; L2 has 50 MB
    shared_bytes=228 * 1024,  # whitepaper
)

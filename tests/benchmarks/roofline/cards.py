"""Every number that the model assumes, with where it is from.

"sustained" rates are what large products reach for seconds on end: below a data sheet's peak, as the card lowers its
clock.
"""

from dataclasses import dataclass

GB, TB, TFLOP = 1e9, 1e12, 1e12


@dataclass(frozen=True)
class Card:
    """One GPU. FLOP/s are sustained, by the number format of a product."""

    name: str
    memory: float  # bytes that a process finds free: the data sheet's less what driver and context take
    bandwidth: float  # bytes/s that elementwise kernels reach: nine tenths of the data sheet's
    multiprocessors: int
    bfloat16: float  # FLOP/s
    tf32: float
    float32: float  # of products without TF32, which matrix units do not take
    float64: float
    flash_forward: float  # FLOP/s of bfloat16 attention, heads of 64, sequences of some hundred tokens
    flash_backward: float
    attention_float32: float  # of the memory-efficient kernel
    eigh_column: float  # seconds: latency of a float64 eigendecomposition, for each column
    eigh_rate: float  # FLOP/s of the rest of it, of 9 d^3
    capability: tuple[int, int]


CARDS = {
    "H100": Card(
        "H100 SXM 80 GB",
        memory=78 * GB,
        bandwidth=0.9 * 3.35 * TB,  # data sheet: 3.35 TB/s
        multiprocessors=132,
        bfloat16=0.65 * 989 * TFLOP,  # data sheet: 989; large products of cuBLAS run at 600 to 700
        tf32=0.7 * 495 * TFLOP,
        float32=0.75 * 67 * TFLOP,
        float64=0.7 * 67 * TFLOP,
        flash_forward=300 * TFLOP,  # FlashAttention-2, which torch has, on an H100: 300 to 350 at long sequences
        flash_backward=220 * TFLOP,
        attention_float32=40 * TFLOP,  # a guess: it takes three TF32 products for one of float32
        # A guess between two facts: 18 us a column at d = 100 (PyTorch issue 174674), where few kernels a column
        # suffice, and less than 3 % of peak, 2 TFLOP/s, at large d (Wang et al. 2024, "Extracting the Potential of
        # Emerging Hardware Accelerators for Symmetric Eigenvalue Decomposition").
        eigh_column=50e-6,
        eigh_rate=1.5 * TFLOP,
        capability=(9, 0),
    ),
    "A100": Card(
        "A100 SXM 80 GB",
        memory=78 * GB,
        bandwidth=0.9 * 2.04 * TB,  # data sheet: 2.04 TB/s
        multiprocessors=108,
        bfloat16=0.8 * 312 * TFLOP,  # data sheet: 312; large products of cuBLAS run at 240 to 270
        tf32=0.8 * 156 * TFLOP,
        float32=0.9 * 19.5 * TFLOP,
        float64=0.85 * 19.5 * TFLOP,
        flash_forward=170 * TFLOP,  # FlashAttention-2, its own figures: 180 to 220 at long sequences
        flash_backward=120 * TFLOP,
        attention_float32=17 * TFLOP,  # as the H100's, by TF32
        eigh_column=60e-6,  # the H100's, with a lower clock
        eigh_rate=1.0 * TFLOP,  # by bandwidth: half of the work reads the matrix once a column
        capability=(8, 0),
    ),
}

# Products. A kernel makes the result by tiles, one on each multiprocessor at a time; small tiles read their operands
# more often, so they are slower (share of the rate: guesses), but fill the card better. The sizes are those that
# cuBLAS's kernels have in their names.
TILES = {
    (128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.85, (128, 64): 0.65, (64, 128): 0.65, (64, 64): 0.5,
    (128, 32): 0.5, (32, 128): 0.5, (64, 32): 0.4, (32, 32): 0.3,
}  # fmt: skip
SPLITS = (1, 2, 4, 8, 16, 32)  # of the summed axis, whose parts are added up afterwards
SMALLEST_SPLIT = 512  # numbers of the summed axis in a part
# Matrix units load 16 bytes at once; where rows do not begin at such addresses other kernels serve (a third of the
# rate, as the prototype of this model assumed). Where only the result's do not, its writing is slower: a guess.
MISALIGNED, MISALIGNED_RESULT = 1 / 3, 2 / 3
ALIGNMENT = 16  # bytes

LAUNCH_FLOOR = 3e-6  # seconds that the smallest kernel takes, one after the other
WIDE_SOFTMAX, WIDE_SOFTMAX_READS = 1024, 3  # torch's kernel for wider rows reads them for maximum, sum and result

# Streams. Several eigendecompositions at once share the card: their throughput part adds up, their latency part does
# not, until so many of them queue for the driver. A guess.
EIGH_STREAMS = 3

# The host: 16 cores of a server beside the card.
LAUNCH = 6e-6  # seconds of Python, dispatch and driver for one operation on the device: 5 to 10 in eager torch
NO_LAUNCH = 1.5e-6  # for one that only makes a view, or a small one on the CPU
CPU_BANDWIDTH = 10 * GB  # bytes/s of one thread that copies memory
CPU_EIGH_RATE = 25e9  # FLOP/s, of 9 d^3, of one thread in float64: README.md's setting B on 2 cores has 32 GFLOP/s each
CPU_EIGH_GAIN = 0.6  # t threads take it t^0.6 times as fast: half of it is bound by memory. A guess
NUM_CORES = 16
PINNED = 25 * GB  # bytes/s between page-locked memory and the device, PCIe 4 or 5 x16
PAGEABLE = 6 * GB  # from memory that is not: by way of a small page-locked buffer of the driver
HASHING = 1.8 * GB  # sha256 with the processor's own instructions, one core
DISK = 1.5 * GB  # bytes/s of a local NVMe disk, at fsync
PAGE_CACHE_WRITE = 3 * GB
PAGE_CACHE_READ = 5 * GB
FSYNC = 2e-3  # seconds, of a small file

"""The CUDA attention kernels, run by the emulator, against the error rule."""

import ctypes
from pathlib import Path

import pytest
import torch

from fastattn import attention, dropout
from fastattn.ops.attention import attention_reference
from fastattn.ops.attention import check as checked
from fastattn.testing.check import OPTION_SETS, option_set
from fastattn.testing.compare import assert_close
from fastattn.testing.fence import FencedAllocations, fenced
from fastattn.testing.inputs import qkv

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [Path(__file__).with_name("emulated_attention.cpp"), ROOT / "csrc/cuda/attention.cu"]
TYPES = (torch.bfloat16, torch.float16)
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 4}
OPTIONAL = ("mask", "bias", "alibi", "sinks")

# B, H, Hk, Sq, Sk, D, Dv: each padded head dim, one block and several, rows and keys that end within one.
SHAPES = {
    "d64": (1, 2, 1, 150, 200, 64, 64),
    "d96": (1, 1, 1, 33, 130, 96, 96),
    "d128": (2, 2, 2, 140, 70, 128, 128),
    "d192": (1, 1, 1, 20, 70, 192, 128),
    "d256": (1, 1, 1, 70, 40, 256, 256),
    "narrow": (1, 3, 1, 17, 65, 8, 24),
    "wider_v": (1, 1, 1, 16, 80, 40, 120),
    "odd": (1, 2, 2, 19, 37, 33, 71),
    "one": (1, 1, 1, 1, 1, 64, 64),
}


class Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
        ("type", ctypes.c_int32),
    )

    def __init__(self, x=None):
        super().__init__()
        if x is None:
            return
        self.data, self.type = x.data_ptr(), TYPE_CODES[x.dtype]
        missing = 4 - x.ndim
        self.size[:] = [*x.shape, *[1] * missing]
        self.stride[:] = [*x.stride(), *[0] * missing]


class EmulatedCall(ctypes.Structure):
    _fields_ = (
        *((name, Array) for name in ("q", "k", "v", "out", "lse", "lse_rest", *OPTIONAL)),
        *((name, ctypes.c_double) for name in ("softmax_scale", "softcap", "dropout_scale")),
        *((name, ctypes.c_int64) for name in ("window_left", "window_right", "dropout_threshold", "seed")),
        *((name, ctypes.c_int64) for name in ("mma", "ldmatrix_conflicts", "shared_conflicts")),
        ("message", ctypes.c_char * 1024),
    )


@pytest.fixture(scope="module")
def library(compile_emulated):
    return ctypes.CDLL(str(compile_emulated("emulated_attention.so", SOURCES, ["-shared", "-fPIC"])))


@pytest.fixture
def emulated(library):
    """out, lse, lse_rest and the emulator's counters, for the arguments of attention."""

    def run(q, k, v, **options):
        call = checked(q, k, v, **options)
        alibi = call.alibi_slopes
        with FencedAllocations() as memory:
            out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
            lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
            lse_rest = torch.empty_like(lse)
        outputs = {"out": out, "lse": lse, "lse_rest": lse_rest}
        inputs = {"q": q, "k": k, "v": v, "mask": call.mask, "bias": call.bias, "alibi": alibi}
        given = EmulatedCall(
            **{name: Array(x) for name, x in {**inputs, **outputs, "sinks": call.sinks}.items()},
            softmax_scale=call.softmax_scale,
            softcap=call.softcap,
            window_left=call.window_left,
            window_right=call.window_right,
            dropout_scale=1.0 / (1.0 - call.dropout_p),
            dropout_threshold=dropout.threshold(call.dropout_p) if call.dropout_p else 0,
            seed=int(call.seed) if call.seed is not None else 0,
        )
        library.emulated_attention_fwd(ctypes.byref(given))
        assert given.message == b"", given.message.decode()
        memory.assert_intact()
        return out, lse, lse_rest, given

    return run


@pytest.fixture
def check(emulated):
    """Holds a call against the error rule; returns the counters."""

    def run(q, k, v, **options):
        out, lse, _, counters = emulated(q, k, v, **options)
        wide = {
            name: x.double() if name in ("bias", "sinks") and isinstance(x, torch.Tensor) else x
            for name, x in options.items()
        }
        base = attention_reference(checked(q, k, v, **options))
        truth = attention_reference(checked(q.double(), k.double(), v.double(), **wide))
        assert_close(out, base[0], truth[0], "out")
        assert_close(lse, base[1], truth[1], "lse", q.dtype)
        return counters

    return run


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((2**16, 1, 2**16, 64), b"B * H * Sq asks for 2^31 blocks or more"),
        ((1, 2**31, 1, 64), b"Sq and Sk go to 2^30"),
        ((1, 1, 1, 257), b"head dims go to 256"),
        ((1, 1, 1, 64), b"q, k and v are bfloat16 or float16"),
    ],
    ids=["blocks", "lengths", "head_dim", "type"],
)
def test_refusals(library, sizes, said):
    dtype = torch.float32 if b"float16" in said else torch.bfloat16
    x = torch.zeros((), dtype=dtype).expand(sizes)  # one number, nothing of this size is stored
    given = EmulatedCall(q=Array(x), k=Array(x), v=Array(x), out=Array(x), softmax_scale=1.0)
    library.emulated_attention_fwd(ctypes.byref(given))
    assert given.message == said


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_shapes(check, shape, causal):
    check(*qkv(*SHAPES[shape], dtype=torch.bfloat16), causal=causal)


@pytest.mark.parametrize("shape", ["d64", "d128", "d256", "odd"])
def test_float16(check, shape):
    check(*qkv(*SHAPES[shape], dtype=torch.float16), causal=True)


@pytest.mark.parametrize("shape", ["d96", "d128", "d192", "d256", "odd"])
def test_every_option_in_every_width(check, shape):
    q, k, v = qkv(*SHAPES[shape], dtype=torch.bfloat16)
    check(q, k, v, **option_set("everything", q, k))


@pytest.mark.parametrize("option", OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options(check, dtype, option):
    q, k, v = qkv(2, 2, 1, 35, 71, 40, 64, dtype=dtype)
    check(q, k, v, **option_set(option, q, k))


@pytest.mark.parametrize("lengths", [(5, 0), (0, 5), (40, 3), (3, 130)], ids=str)
def test_lengths(check, lengths):
    check(*qkv(1, 2, 1, *lengths, 64, dtype=torch.bfloat16), causal=True)


@pytest.mark.parametrize("sinks", [False, True], ids=["no_sinks", "sinks"])
def test_rows_that_see_nothing(emulated, sinks):
    q, k, v = qkv(1, 2, 2, 90, 20, 64, dtype=torch.bfloat16)
    scores = torch.tensor([0.5, -1.0])
    out, lse, lse_rest, _ = emulated(q, k, v, causal=True, sinks=scores if sinks else None)
    assert torch.equal(out[:, :70], torch.zeros_like(out[:, :70]))
    want = scores[:, None].expand(2, 70) if sinks else torch.full((2, 70), -torch.inf)
    torch.testing.assert_close(lse[0, :, :70], want)
    assert lse_rest.isfinite().all()


@pytest.mark.parametrize("layout", ["fenced", "transposed", "long_rows"])
@pytest.mark.parametrize("dims", [(64, 64), (40, 48), (30, 17)], ids=str)
def test_strides(check, layout, dims):
    tensors = qkv(2, 2, 1, 20, 70, *dims, dtype=torch.bfloat16, transposed=layout == "transposed")
    if layout == "fenced":  # rows that begin at any even address
        tensors = [fenced(x) for x in tensors]
    elif layout == "long_rows":  # aligned, with NaN between the rows
        tensors = [torch.nn.functional.pad(x, (0, 8), value=torch.nan)[..., : x.shape[3]] for x in tensors]
    check(*tensors, causal=True)


@pytest.mark.parametrize("shape", [x for x in SHAPES if x != "odd"])  # where lanes run alike
def test_no_bank_conflicts(check, shape):
    counters = check(*qkv(*SHAPES[shape], dtype=torch.bfloat16))
    assert counters.mma > 0
    assert (counters.ldmatrix_conflicts, counters.shared_conflicts) == (0, 0)


def test_causal_skips_keys(check):
    tensors = qkv(1, 1, 1, 256, 256, 64, dtype=torch.bfloat16)
    whole, half = check(*tensors).mma, check(*tensors, causal=True).mma
    assert half * 4 == whole * 3  # two blocks of rows: one sees half of the keys


def test_lse_rest_is_what_float32_takes(emulated):
    q, k, v = qkv(1, 1, 1, 30, 50, 64, dtype=torch.bfloat16)
    _, lse, lse_rest, _ = emulated(q, k, v)
    _, truth = attention_reference(checked(q.double(), k.double(), v.double()))
    whole = lse.double() + lse_rest.double() * 0.6931471805599453
    assert (whole - truth).abs().max() <= (lse.double() - truth).abs().max() + 1e-7
    assert bool((lse_rest != 0).any())


def test_dropout_is_the_cpu_kernels(emulated):
    # Weights that are all alike show the mask itself: what is kept and what is not.
    q = torch.zeros(1, 40, 2, 64, dtype=torch.bfloat16)
    k = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16)
    v = torch.eye(64, dtype=torch.bfloat16)[None, :, None].expand(1, 64, 2, 64)
    options = {"dropout_p": 0.4, "seed": 2**40 + 7}
    out, *_ = emulated(q, k, v, **options)
    assert torch.equal(out != 0, attention(q, k, v, **options) != 0)

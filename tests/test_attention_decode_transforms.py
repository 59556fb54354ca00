"""attention_decode under torch's transforms, and what it refuses, before anything is written."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fastattn import attention_decode, explain
from fastattn.ops.attention_decode import check
from fastattn.testing.check_decode import (
    DECODE_OPTION_SETS,
    decode_inputs,
    decode_option_set,
    same_bytes,
    twins,
)

# torch's own, about itself: dynamo and jvp use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CALLS = {
    "dense": {},
    "selected": {"select": True},
    "paged": {"page_size": 4},
    "int8": {"page_size": 4, "cache_dtype": torch.int8},
}


def make(kind="dense", **options):
    given = {"seqlen_q": 2, "new": 2, "rotary_dim": 8, **CALLS[kind], **options}
    return decode_inputs([9, 0, 14], 4, 2, head_dim=16, **given)


@pytest.fixture
def attend(kernel_backend, skip_if_refused):
    """`attention_decode` on one backend; returns also what it writes to."""
    skip_if_refused(attention_decode, **make())

    def attend(**call):
        out = attention_decode(**call, backend=kernel_backend)
        return (*(out if isinstance(out, tuple) else (out,)), *written(call))

    return attend


def written(call):
    return [call[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale") if name in call]


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    for x, y in zip(ours, expected, strict=True):
        assert same_bytes(x.contiguous().clone(), y.contiguous().clone())


@pytest.mark.parametrize("option", DECODE_OPTION_SETS)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.usefixtures("attend")
def test_opcheck(kernel_backend, kind, option):
    given = make(kind)
    call = check(**given, **decode_option_set(option, given["q"]))
    # torch compares what the op leaves alone with ==, which NaN fails.
    tensors = [x.nan_to_num() if isinstance(x, torch.Tensor) else x for x in call]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    if option == "everything":
        tests = (*tests, "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastattn.attention_decode, (*tensors, kernel_backend), test_utils=tests)


@pytest.fixture
def compiled(attend):
    """The same, compiled without a graph break."""
    torch.compiler.reset()
    yield torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


class TestCompile:
    @pytest.mark.parametrize("kind", CALLS)
    @pytest.mark.parametrize("new", [None, 2])
    def test_same_bits(self, attend, compiled, kind, new):
        call = make(kind, new=new)
        ours, expected = twins(call), twins(call)
        for _ in range(2):  # the second call finds what the first has written
            assert_same(
                compiled(**ours, causal=True, return_lse=True),
                attend(**expected, causal=True, return_lse=True),
            )

    def test_generation_loop(self, attend):
        """Lengths that grow do not compile anew, whether in a tensor or as a number."""
        for as_number in (False, True):
            torch.compiler.reset()
            compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=as_number or None)
            call = decode_inputs([0, 0], 4, 2, 1, 16, new=20)
            ours, expected = twins(call), twins(call)
            for at in range(4):
                step = {name: call[name][:, at : at + 1] for name in ("k", "v")}
                step["cache_seqlens"] = at + 2 if as_number else torch.full((2,), at + 2, dtype=torch.int32)
                with torch.compiler.set_stance("fail_on_recompile" if at else "default"):
                    found = compiled(**ours | step)
                assert_same(found, attend(**expected | step))
        torch.compiler.reset()

    def test_inductor(self, attend):
        call = make("paged")

        def block(x, **call):
            out, *_ = attend(q=(x * 2).unflatten(-1, (4, 16)), **call, causal=True)
            return out.flatten(2).relu()

        x = call.pop("q").flatten(2)
        ours, expected = twins(call), twins(call)
        torch.compiler.reset()
        with torch.no_grad():
            assert torch.equal(torch.compile(block, fullgraph=True)(x, **ours), block(x, **expected))
        assert_same(written(ours), written(expected))
        torch.compiler.reset()

    def test_bad_lengths_raise_when_it_runs(self, compiled):
        """Nobody can see them before; the kernel must not."""
        call = twins(make())
        before = twins(call)
        call["cache_seqlens"][1] = 20
        with pytest.raises(ValueError, match=r"cache_seqlens must be in 0 \.\.\. Smax = 19 - 2.*got 20"):
            compiled(**call)
        assert_same(written(call), written(before))


def test_export_keeps_the_op(attend):
    class Module(torch.nn.Module):
        def forward(self, call):
            return attend(**call)[0]

    call = twins(make(new=None))
    program = torch.export.export(Module(), (call,))
    targets = [node.target for node in program.graph.nodes]
    assert any("attention_decode" in str(x) or "auto_functionalized" in str(x) for x in targets)
    assert torch.equal(program.module()(call), attend(**call)[0])


def test_autocast(attend):
    call = make()
    ours, expected = twins(call), twins(call)
    expected |= {name: call[name].bfloat16() for name in ("q", "k", "v")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(**ours)
    assert found[0].dtype is torch.bfloat16 and found[1].dtype is torch.float32
    assert_same(found, attend(**expected))


def test_fake_tensors(attend):
    call = make("int8")
    with FakeTensorMode() as mode:
        call = {name: mode.from_tensor(x) for name, x in call.items()}
        out, lse, *_ = attend(**call, return_lse=True)
    assert out.shape == (3, 2, 4, 16) and out.dtype is torch.float32
    assert lse.shape == (3, 4, 2) and lse.dtype is torch.float32


def test_other_subclasses_are_plain_tensors_to_it(attend):
    class Marked(torch.Tensor):
        pass

    for kind in CALLS:
        call = make(kind)
        expected = attend(**twins(call))
        for name in call:
            marked = twins(call)
            marked[name] = marked[name].as_subclass(Marked)
            assert_same([x.as_subclass(torch.Tensor) for x in attend(**marked)], expected)


def test_inference_mode(attend):
    call = make("int8")
    expected = attend(**twins(call))
    with torch.inference_mode():
        assert_same(attend(**twins(call)), expected)


GRADIENTS = "q", "k", "v", "k_cache", "v_cache", "cos", "sinks"


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_is_refused(attend, name):
    call = twins(make()) | {"sinks": torch.zeros(4)}
    before = twins(call)
    call[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"attention_decode has no gradient.*torch.no_grad\(\)"):
        attend(**call)
    call[name].requires_grad_(False)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no gradient"):
        attend(**call | {name: forward_ad.make_dual(call[name], call[name].clone())})
    others = {x: t for x, t in call.items() if x != name}
    with pytest.raises(NotImplementedError, match="no gradient"):
        torch.func.grad(lambda x: attend(**others, **{name: x})[0].sum())(call[name])
    assert_same(written(call), written(before))
    call[name].requires_grad_()
    with torch.no_grad():
        assert_same(attend(**call), attend(**before))


def test_what_is_written_counts_as_changed(attend):
    """Whoever saved the cache for a backward of its own hears of it."""
    call = twins(make())
    leaf = torch.ones(16, requires_grad=True)
    loss = (call["k_cache"].nan_to_num_() * leaf).sum()
    attend(**call | {"k": None, "v": None})
    loss.backward(retain_graph=True)
    attend(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_vmap_is_refused(attend):
    call = twins(make())
    before = twins(call)
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.func\.vmap"):
        torch.func.vmap(lambda q: attend(**call | {"q": q})[0])(call["q"].expand(2, -1, -1, -1, -1))
    assert_same(written(call), written(before))


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# Each change is made to a call of this kind. B 3, Sq 2, H 4, Hk 2, D 16; 9, 0 and 14 keys and 2 more in
# 19, or in pages of 4.
BAD = {
    # Types, shapes, devices.
    "q_rank": ("dense", {"q": x(2, 4, 16)}, ValueError, r"q must have 4 dimensions \[B, Sq, H, D\]"),
    "q_none": ("dense", {"q": None}, TypeError, "q must be a tensor, got NoneType"),
    "q_int": ("dense", {"q": x(3, 2, 4, 16, dtype=torch.int8)}, TypeError, "q must be float32.*torch.int8"),
    "cache_rank": ("dense", {"k_cache": x(3, 19, 32)}, ValueError, r"k_cache must .*\[Bc, Smax, Hk, D\]"),
    "pages_rank": ("paged", {"v_cache": x(9, 4, 32)}, ValueError, r"v_cache must .*\[N, page_size, Hk, Dv\]"),
    "cache_type": ("dense", {n: x(3, 19, 2, 16, dtype=torch.int16) for n in ("k_cache", "v_cache")},
                   TypeError, "k_cache must be float32, bfloat16, float16 or int8, got torch.int16"),
    "cache_types": ("dense", {"v_cache": x(3, 19, 2, 16, dtype=torch.half)}, TypeError, "share one type"),
    "cache_double": ("dense", {n: x(3, 19, 2, 16, dtype=torch.double) for n in ("k_cache", "v_cache")},
                     TypeError, "k_cache must be.*got torch.float64"),
    "cache_batch": ("dense", {n: x(4, 19, 2, 16) for n in ("k_cache", "v_cache")}, ValueError,
                    "one row for each of the B = 3.*got 4"),
    "cache_sizes": ("dense", {"v_cache": x(3, 18, 2, 16)}, ValueError, r"k_cache and v_cache must share"),
    "page_sizes": ("paged", {"v_cache": x(13, 5, 2, 16)}, ValueError, r"share \[N, page_size, Hk\], got"),
    "page_size_0": ("paged", {n: x(9, 0, 2, 16) for n in ("k_cache", "v_cache")}, ValueError,
                    "page_size.*at least 1, got 0"),
    "heads": ("dense", {"q": x(3, 2, 3, 16)}, ValueError, "multiple of Hk.*H 3.*Hk 2"),
    "head_dim": ("dense", {"q": x(3, 2, 4, 17)}, ValueError, "head dim D, got 17 and 16"),
    "cache_stride": ("dense", {"k_cache": x(3, 19, 2, 32)[..., ::2]}, ValueError, "last stride of k_cache"),
    "cache_device": ("dense", {"v_cache": x(3, 19, 2, 16, device="meta")}, ValueError, "on q's device cpu"),
    # k and v.
    "k_alone": ("dense", {"v": None}, ValueError, "k and v must be given together, got only k"),
    "v_alone": ("dense", {"k": None}, ValueError, "k and v must be given together, got only v"),
    "k_type": ("dense", {"k": x(3, 2, 2, 16, dtype=torch.half)}, TypeError, "k must be in q's type"),
    "k_batch": ("dense", {"k": x(2, 2, 2, 16)}, ValueError, r"\[3, Sn, 2, 16\], got \[2, 2, 2, 16\]"),
    "v_heads": ("dense", {"v": x(3, 2, 4, 16)}, ValueError, r"v must have shape \[B, Sn, Hk, Dv\]"),
    "k_length": ("dense", {"k": x(3, 1, 2, 16)}, ValueError, "k and v must share the length Sn, got 1 and 2"),
    "k_stride": ("dense", {"k": x(3, 2, 2, 32)[..., ::2]}, ValueError, "last stride of k must"),
    "k_device": ("dense", {"k": x(3, 2, 2, 16, device="meta")}, ValueError, "k must be on q's device"),
    "expanded": ("dense", {"k_cache": x(1, 19, 2, 16).expand(3, -1, -1, -1)}, ValueError,
                 "k_cache is written to.*not be expanded"),
    # cache_seqlens.
    "no_seqlens": ("dense", {"cache_seqlens": None}, ValueError, "cache_seqlens must be given with k and v"),
    "seqlens_type": ("dense", {"cache_seqlens": ints(9, 0, 14).long()}, TypeError, "seqlens must be int32"),
    "seqlens_list": ("dense", {"cache_seqlens": [9, 0, 14]}, TypeError, "an int or int32.*got list"),
    "seqlens_bool": ("dense", {"cache_seqlens": True}, TypeError, "an int or int32.*got bool"),
    "seqlens_shape": ("dense", {"cache_seqlens": ints(9, 0)}, ValueError, r"\[B\] = \[3\], got \[2\]"),
    "seqlens_device": ("dense", {"cache_seqlens": ints(9, 0, 1).to("meta")}, ValueError, "on q's device"),
    "negative": ("dense", {"cache_seqlens": ints(9, -1, 14)}, ValueError, r"got -1 \(sequence 1\)"),
    "full": ("dense", {"cache_seqlens": ints(9, 0, 18)}, ValueError, r"Smax = 19 - 2 app.*got 18 \(seq.* 2"),
    "full_number": ("dense", {"cache_seqlens": 18}, ValueError, "Smax = 19 - 2 appended, got 18"),
    "full_read": ("dense", {"cache_seqlens": 20, "k": None, "v": None}, ValueError, r"0 \.\.\. 19, got 20"),
    "huge_number": ("dense", {"cache_seqlens": 2**40}, ValueError, r"0 \.\.\. 19, got 1099511627776"),
    "negative_number": ("dense", {"cache_seqlens": -1}, ValueError, r"0 \.\.\. 19, got -1"),
    "full_read_tensor": ("dense", {"cache_seqlens": ints(0, 20, 1), "k": None, "v": None}, ValueError,
                         r"0 \.\.\. Smax = 19, got 20 \(sequence 1\)"),
    "full_pages": ("paged", {"cache_seqlens": ints(9, 0, 19)}, ValueError,
                   r"max_pages \* page_size = 5 \* 4 - 2 appended, got 19"),
    # block_table, cache_batch_idx, cache_leftpad.
    "table_type": ("paged", {"block_table": x(3, 5)}, TypeError, "block_table must be int32"),
    "table_shape": ("paged", {"block_table": x(4, 5, dtype=torch.int32)}, ValueError, r"\[3, max_pages\]"),
    "table_stride": ("paged", {"block_table": x(5, 3, dtype=torch.int32).T}, ValueError,
                     "last stride of block_table"),
    "page_too_high": ("paged", {"block_table": ints(*[[0, 1, 99, -1]] * 3)}, ValueError,
                      r"block_table must hold pages in 0 \.\.\. 9, got 99 at \[0, 2\]"),
    "page_negative": ("paged", {"block_table": ints([0, 1, 2, 9], [-1, 9, 9, 9], [3, 4, 5, 6])}, ValueError,
                      r"got -1 at \[1, 0\]"),
    "page_twice": ("paged", {"block_table": ints([0, 1, 2, 9], [2, 9, 9, 9], [3, 4, 5, 6])}, ValueError,
                   "two sequences append to one page, got page 2 twice"),
    "page_twice_in_one": ("paged", {"block_table": ints([0, 1, 2, 9], [7, 9, 9, 9], [3, 4, 5, 5]),
                                    "cache_seqlens": ints(9, 0, 11)}, ValueError, "got page 5 twice"),
    "idx_with_pages": ("paged", {"cache_batch_idx": ints(0, 1, 2)}, ValueError, "idx must be None"),
    "leftpad_with_pages": ("paged", {"cache_leftpad": ints(0, 1, 2)}, ValueError, "leftpad must be None"),
    "idx_type": ("selected", {"cache_batch_idx": ints(0, 1, 2).long()}, TypeError, "idx must be int32"),
    "idx_shape": ("selected", {"cache_batch_idx": ints(0, 1)}, ValueError, r"\[B\] = \[3\], got \[2\]"),
    "idx_high": ("selected", {"cache_batch_idx": ints(0, 5, 2)}, ValueError, r"0 \.\.\. 4, the rows.*got 5"),
    "idx_negative": ("selected", {"cache_batch_idx": ints(0, -1, 2)}, ValueError, "got -1"),
    "idx_twice": ("selected", {"cache_batch_idx": ints(4, 1, 4)}, ValueError, "one row, got 4 twice"),
    "leftpad_negative": ("dense", {"cache_leftpad": ints(0, -1, 2)}, ValueError, "cache_leftpad must be at"),
    "leftpad_shape": ("dense", {"cache_leftpad": ints(0)}, ValueError, r"\[B\] = \[3\], got \[1\]"),
    # Rotary tables.
    "cos_alone": ("dense", {"sin": None}, ValueError, "cos and sin must be given together, got only cos"),
    "cos_type": ("dense", {"cos": x(16, 4, dtype=torch.half)}, TypeError, "cos must be float32 or in q's"),
    "sin_type": ("dense", {"sin": x(16, 4).double()}, TypeError, "sin must be float32 or in q's type"),
    "cos_wide": ("dense", {n: x(16, 9) for n in ("cos", "sin")}, ValueError, r"R in 2 \.\.\. D = 16"),
    "cos_empty": ("dense", {n: x(16, 0) for n in ("cos", "sin")}, ValueError, r"R in 2 \.\.\. D = 16"),
    "cos_rank": ("dense", {"cos": x(1, 16, 4)}, ValueError, r"cos must have shape \[positions, R / 2\]"),
    "cos_stride": ("dense", {"cos": x(16, 8)[:, ::2]}, ValueError, "last stride of cos"),
    "cos_unlike_sin": ("dense", {"cos": x(17, 4)}, ValueError, "cos and sin must share shape and type"),
    "cos_short": ("dense", {n: x(15, 4) for n in ("cos", "sin")}, ValueError, "16 positions or more, got 15"),
    # Scales.
    "int8_bare": ("int8", {"k_scale": None}, ValueError, "k_scale must be given with an int8 cache.*None"),
    "scale_bare": ("dense", {"v_scale": x(3, 19, 2)}, ValueError, "v_scale must be.*cache in torch.float32"),
    "scale_type": ("int8", {"k_scale": x(10, 4, 2).half()}, TypeError, "k_scale must be float32"),
    "scale_shape": ("int8", {"v_scale": x(10, 2, 4)}, ValueError, r"\[10, 4, 2\], got shape \[10, 2, 4\]"),
    "scale_device": ("int8", {"v_scale": x(10, 4, 2, device="meta")}, ValueError, "v_scale must be on"),
    "scale_expanded": ("int8", {"v_scale": x(1, 1, 2).expand(10, 4, 2)}, ValueError, "v_scale is written"),
    # What attention refuses too.
    "slopes": ("dense", {"alibi_slopes": x(3)}, ValueError, r"\[3, 4\], got \[3\]"),
    "sinks": ("dense", {"sinks": x(2)}, ValueError, r"sinks must have shape \[H\] = \[4\]"),
    "scale": ("dense", {"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite"),
    "softcap": ("dense", {"softcap": -1.0}, ValueError, "softcap must be"),
    "window": ("dense", {"window_size": (-2, 0)}, ValueError, "window_size must be two integers"),
    "splits": ("dense", {"num_splits": -1}, ValueError, "num_splits must be an int.*got -1"),
    "splits_type": ("dense", {"num_splits": 1.5}, ValueError, "num_splits must be an int.*got 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    kind, change, error, message = BAD[name]
    call = twins(make(kind)) | change
    before = twins(call)
    for run in (attention_decode, lambda **call: explain(attention_decode, **call)):
        with pytest.raises(error, match=message):
            run(**call)
    for ours, expected in zip(written(call), written(before), strict=True):
        assert ours is None or ours.is_meta or same_bytes(ours, expected)


def test_a_device_without_a_backend():
    call = {name: x.to("meta") for name, x in make("int8").items()}
    with pytest.raises(NotImplementedError, match=r"attention_decode: no backend.*'meta'"):
        attention_decode(**call)


@pytest.mark.parametrize("cache_dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_float64_is_for_the_reference(cache_dtype):
    call = make(dtype=torch.float64, cache_dtype=cache_dtype)
    with pytest.raises(NotImplementedError, match="attention_decode: no backend"):
        attention_decode(**call)
    assert attention_decode(**call, backend="reference").dtype is torch.float64

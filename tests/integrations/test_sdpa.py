"""fastattn.scaled_dot_product_attention against torch's, and the override that puts it in its place."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.testing.compare import assert_close

HAS_REGISTRY = hasattr(torch.nn.attention, "register_flash_attention_impl")
VIAS: list[Any] = [
    pytest.param("registry", marks=pytest.mark.skipif(not HAS_REGISTRY, reason="torch < 2.11")),
    "function",
]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [_normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def _compare(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> None:
    """Output and all gradients against torch's function in float64."""
    results = []
    for function, dtype in (
        (fastattn.scaled_dot_product_attention, torch.float32),
        (F.scaled_dot_product_attention, torch.float32),
        (F.scaled_dot_product_attention, torch.float64),
    ):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        bias = mask
        if mask is not None and mask.dtype is not torch.bool:
            bias = mask.to(dtype, copy=True).requires_grad_()
            leaves.append(bias)
        out = function(*leaves[:3], attn_mask=bias, **options)
        dout = _normal(*out.shape, seed=9).to(dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for name, *compared in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
        assert_close(*compared, name)


class TestFunction:
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("seqlens", [(5, 5), (5, 9), (9, 5), (1, 7), (7, 1)])
    def test_causal_is_aligned_at_the_start(self, seqlens: tuple[int, int], is_causal: bool) -> None:
        sq, sk = seqlens
        _compare(*_inputs((2, 3, sq, 8), (2, 3, sk, 8), (2, 3, sk, 8)), is_causal=is_causal)

    @pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7), (2, 1, 5, 7), (2, 1, 1, 7)])
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks(self, shape: tuple[int, ...], kind: str) -> None:
        mask = _normal(*shape, seed=5)
        if kind == "bool":
            mask = mask > 0
            mask[..., 0] = True
        _compare(*_inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), mask)

    def test_row_that_sees_nothing_is_zero(self) -> None:
        mask = torch.ones(5, 7, dtype=torch.bool)
        mask[2] = False
        q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
        out = fastattn.scaled_dot_product_attention(q, k, v, mask)
        assert out[:, :, 2].eq(0).all()
        assert out.isfinite().all()

    @pytest.mark.parametrize(
        "shapes",
        [
            ((5, 8), (7, 8), (7, 8)),
            ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
            ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
            ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
            ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
            ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
            ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8)),
            ((2, 1, 3, 5, 8), (1, 2, 3, 7, 8), (3, 7, 8)),
            ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 16)),
        ],
    )
    def test_shapes(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        _compare(*_inputs(*shapes))

    def test_mask_of_many_dimensions(self) -> None:
        mask = _normal(2, 1, 1, 5, 7, seed=5) > 0
        mask[..., 0] = True
        _compare(*_inputs((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 8)), mask)

    def test_grouped_heads(self) -> None:
        _compare(*_inputs((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), enable_gqa=True, scale=0.3)

    def test_strides(self) -> None:
        q, k, v = _inputs((2, 3, 8, 5), (2, 3, 8, 7), (7, 2, 3, 8))
        _compare(q.mT, k.mT, v.permute(1, 2, 0, 3))

    def test_dropout_follows_the_default_generator(self) -> None:
        q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(fastattn.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])

    def test_refusals(self) -> None:
        q, k, v = _inputs((2, 6, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8))
        mask = torch.ones(5, 5, dtype=torch.bool)
        with pytest.raises(ValueError, match="exclude each other"):
            fastattn.scaled_dot_product_attention(k, k, v, mask, is_causal=True)
        with pytest.raises(ValueError, match="enable_gqa"):
            fastattn.scaled_dot_product_attention(q, k, v)
        with pytest.raises(ValueError, match="multiple"):
            fastattn.scaled_dot_product_attention(q[:, :4], k, v, enable_gqa=True)
        with pytest.raises(TypeError, match="bias must be"):
            fastattn.scaled_dot_product_attention(k, k, v, mask.long())
        with pytest.raises(ValueError, match="at least 2"):
            fastattn.scaled_dot_product_attention(q[0, 0, 0], k, v)

    def test_compiles(self) -> None:
        q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))

        def step(x: Tensor) -> Tensor:
            return fastattn.scaled_dot_product_attention(x, k, v, is_causal=True)

        out = torch.compile(step, fullgraph=True, backend="aot_eager")(q)
        assert_close(out, step(q), step(q).double())


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    function, before = F.scaled_dot_product_attention, F.scaled_dot_product_attention(q, k, v)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    yield
    assert F.scaled_dot_product_attention is function
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    if HAS_REGISTRY:
        assert torch.nn.attention.current_flash_attention_impl() is None
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), before)


@pytest.fixture(params=VIAS)
def override(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return lambda: fastattn.sdpa_override(via=request.param)


class TestOverride:
    def test_serves_and_counts(self, override: Callable[[], Any]) -> None:
        q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
        mask = _normal(2, 1, 5, 7) > 0
        mask[..., 0] = True
        cases = [
            {}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": _normal(5, 7)}, {"scale": 0.1}
        ]  # fmt: skip
        for options in cases:
            base = F.scaled_dot_product_attention(q, k, v, **options)
            options64 = {
                name: x.double() if isinstance(x, Tensor) and x.dtype is not torch.bool else x
                for name, x in options.items()
            }
            truth = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), **options64)
            with override() as handle:
                out = F.scaled_dot_product_attention(q, k, v, **options)
            assert (handle.calls, dict(handle.refused)) == (1, {})
            assert_close(out, base, truth, str(options))

    @pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
    @pytest.mark.parametrize("case", ["full", "causal", "causal, short q", "mask", "row sees nothing"])
    def test_gradients(self, override: Callable[[], Any], case: str, inside: bool) -> None:
        sq = 5 if case == "causal, short q" else 7
        q, k, v = _inputs((2, 3, sq, 8), (2, 3, 7, 8), (2, 3, 7, 8))
        options: dict[str, Any] = {"is_causal": "causal" in case}
        if "mask" in case or "row" in case:
            options["attn_mask"] = torch.ones(sq, 7, dtype=torch.bool).tril()
            if "row" in case:
                options["attn_mask"][2] = False
        results = []
        for dtype, ours in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
            if ours:
                with override() as handle:
                    out = F.scaled_dot_product_attention(*leaves, **options)
                    if inside:
                        out.square().sum().backward()
                if not inside:
                    out.square().sum().backward()
                assert handle.calls == 1
            else:
                out = F.scaled_dot_product_attention(*leaves, **options)
                out.square().sum().backward()
            results.append([x.grad for x in leaves])
        for name, *compared in zip(("dq", "dk", "dv"), *results, strict=True):
            assert_close(*compared, name)

    def test_what_we_do_not_take_is_torchs(self, override: Callable[[], Any]) -> None:
        """float64 has no kernel here; bit for bit what torch computes, and counted with the reason."""
        q, k, v = (x.double() for x in _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)))
        if fastattn.dispatch.DEFAULT == fastattn.dispatch.REFERENCE:
            pytest.skip("the reference takes everything")
        q.requires_grad_()
        expected = F.scaled_dot_product_attention(q, k, v)
        (gradient,) = torch.autograd.grad(expected.sum(), q)
        with override() as handle:
            out = F.scaled_dot_product_attention(q, k, v)
            assert torch.equal(torch.autograd.grad(out.sum(), q)[0], gradient)
        assert torch.equal(out, expected)
        assert handle.calls == 0
        (reason,) = handle.refused
        assert handle.refused[reason] == 1
        assert "float64" in reason
        assert "float64" in repr(handle)

    def test_torchs_own_errors_stay(self, override: Callable[[], Any]) -> None:
        q, k, v = _inputs((2, 3, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
        with override(), pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v)

    def test_exception_inside(self, override: Callable[[], Any]) -> None:
        with pytest.raises(ZeroDivisionError), override():
            _ = 1 / 0

    def test_nests_and_is_entered_again(self, override: Callable[[], Any]) -> None:
        q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
        outer, inner = override(), override()
        with outer:
            F.scaled_dot_product_attention(q, k, v)
            with inner, inner:
                F.scaled_dot_product_attention(q, k, v)
            F.scaled_dot_product_attention(q, k, v)
        with inner:
            F.scaled_dot_product_attention(q, k, v)
        assert (outer.calls, inner.calls) == (2, 2)

    @pytest.mark.skipif(not HAS_REGISTRY, reason="torch < 2.11")
    def test_both_ways_left_in_any_order(self) -> None:
        one, other = fastattn.sdpa_override(via="registry"), fastattn.sdpa_override(via="function")
        one.__enter__()
        other.__enter__()
        one.__exit__()
        other.__exit__()

    @pytest.mark.parametrize("training", [False, True])
    def test_multihead_attention(self, override: Callable[[], Any], training: bool) -> None:
        """In inference torch would take a fused path of its own, without SDPA."""
        torch.manual_seed(0)
        module = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
        x = _normal(2, 5, 16)
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[0, 3:] = True
        with torch.set_grad_enabled(training):
            base, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
            with override() as handle:
                out, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
        assert handle.calls == 1
        exact = module.double()
        truth, _ = exact(*[x.double()] * 3, key_padding_mask=padding, need_weights=False)
        assert_close(out.detach(), base.detach(), truth.detach())

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiled_code(self, override: Callable[[], Any], compiler: str) -> None:
        q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))

        def step(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, k, v, is_causal=True).sin()

        expected = step(q)
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        with override() as handle:
            out = compiled(q)
        assert_close(out, expected, expected.double())
        # A graph calls torch's operator by name, but has no part that could count in Python.
        assert handle.calls == (1 if handle.via == "registry" else 0)

    def test_other_threads(self, override: Callable[[], Any]) -> None:
        def work() -> None:
            for _ in range(20):
                with override():
                    F.scaled_dot_product_attention(*_inputs((1, 1, 2, 4), (1, 1, 2, 4), (1, 1, 2, 4)))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @pytest.mark.skipif(not HAS_REGISTRY, reason="torch < 2.11")
    def test_another_implementation_is_active(self) -> None:
        class Other:
            def remove(self) -> None:
                pass

        registry = torch.nn.attention
        registry.register_flash_attention_impl("other", register_fn=Other)
        try:
            registry.activate_flash_attention_impl("other")
            with fastattn.sdpa_override(via="registry"):
                assert registry.current_flash_attention_impl() == "FASTATTN"
            assert registry.current_flash_attention_impl() == "other"
            with fastattn.sdpa_override(via="registry"):
                registry.activate_flash_attention_impl("other")
            assert registry.current_flash_attention_impl() == "other"
        finally:
            registry.restore_flash_attention_impl()

    def test_reaches_more_as_a_function(self) -> None:
        q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 16))
        with fastattn.sdpa_override(via="function") as handle:
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
            F.scaled_dot_product_attention(q[0], k[0], v[0])
        assert handle.calls == 2

    def test_replaced_by_somebody_else_meanwhile(self) -> None:
        """Theirs stays, and what it holds of ours passes on to torch."""
        q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
        function, expected = F.scaled_dot_product_attention, F.scaled_dot_product_attention(q, k, v)
        try:
            with fastattn.sdpa_override(via="function"):
                held = F.scaled_dot_product_attention
                F.scaled_dot_product_attention = theirs = lambda *args: held(*args)
            assert F.scaled_dot_product_attention is theirs
            assert torch.equal(theirs(q, k, v), expected)
        finally:
            F.scaled_dot_product_attention = function

    @pytest.mark.skipif(not HAS_REGISTRY, reason="torch < 2.11")
    def test_backward_is_ours_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = fastattn.dispatch.backend_module("cpu", "attention")
        if fastattn.dispatch.DEFAULT == fastattn.dispatch.REFERENCE or cpu is None:
            pytest.skip("the reference has no backward of its own")
        ran: list[Any] = []
        bwd = cpu.attention_bwd
        monkeypatch.setattr(cpu, "attention_bwd", lambda *args: ran.append(args) or bwd(*args))
        q, k, v = (x.requires_grad_() for x in _inputs(*[(2, 3, 5, 8)] * 3))
        with fastattn.sdpa_override(via="registry"):
            F.scaled_dot_product_attention(q, k, v).sum().backward()
        assert len(ran) == 1

    def test_torch_without_a_registry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
        assert fastattn.sdpa_override().via == "function"
        with pytest.raises(RuntimeError, match="no registry"):
            fastattn.sdpa_override(via="registry")

    def test_unknown_way(self) -> None:
        with pytest.raises(ValueError, match="via must be"):
            fastattn.sdpa_override(via="magic")  # type: ignore[arg-type]

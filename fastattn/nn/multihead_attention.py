"""torch.nn.MultiheadAttention on fastattn: the same constructor, state_dict keys, call and masks."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn import nested
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.masks import add_key, canonical_masks, with_window
from fastattn.nn.weights import attention_with_weights
from fastattn.ops._cache import rotate
from fastattn.ops._checks import check_numbers, check_tensor
from fastattn.ops.attention import attention
from fastattn.ops.attention_varlen import attention_varlen


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention whose attention is fastattn's.

    Constructor, parameters, their first values for a seed, state_dict keys and `forward` are torch's. What
    torch's has not comes by keyword:

    Args:
        num_kv_heads: heads of keys and values, a divisor of num_heads. in_proj_weight then has
            (num_heads + 2 num_kv_heads) * head_dim rows, in the order q, k, v. Default: num_heads.
        rotary_dim: how many dimensions of a head are rotated by position, even; 0 means none.
        rotary_base: of the wavelengths of the rotation.
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; else dimension i goes with i + rotary_dim / 2.
        causal: query i sees keys j <= i + Sk - Sq (aligned at the end, as in `attention`).
        window_size: (left, right) in tokens around i + Sk - Sq; -1 means unbounded.
        softcap: bounds the scores to (-softcap, softcap); 0 means none.
    Raises:
        ValueError: an argument is wrong; names it, what was given and what is allowed.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rotary_dim: int = 0,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(embed_dim, num_heads, num_kv_heads, rotary_dim, dropout)
        check_numbers(embed_dim, causal, window_size, None, softcap)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype,
        )  # fmt: skip
        # torch's encoder layers look at this before they take a fast path that never calls forward.
        self._qkv_same_embed_dim = False
        self.num_kv_heads = num_kv_heads
        self.rotary_dim = rotary_dim
        self.rotary_base = rotary_base
        self.rotary_interleaved = rotary_interleaved
        self.causal = causal
        self.window_size = window_size
        self.softcap = softcap
        self._tables: tuple[Tensor, Tensor] | None = None  # of rotation, for caches
        if num_kv_heads != num_heads:
            self._group_heads()

    def _group_heads(self) -> None:
        """Makes the parameters of k and v anew, with fewer rows."""
        rows = self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "in_proj_weight": (self.embed_dim + 2 * rows, self.embed_dim),
            "k_proj_weight": (rows, self.kdim),
            "v_proj_weight": (rows, self.vdim),
            "in_proj_bias": (self.embed_dim + 2 * rows,),
            "bias_k": (1, 1, rows),
            "bias_v": (1, 1, rows),
        }
        for name, shape in shapes.items():
            if (old := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(old.new_empty(shape)))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        # In torch's order, so that a seed gives torch's numbers.
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def extra_repr(self) -> str:
        names = ("embed_dim", "num_heads", "num_kv_heads", "rotary_dim", "causal", "window_size", "softcap")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; returns (output, weights), weights None where need_weights is False.

        Shapes:
            query [Sq, B, embed_dim], key [Sk, B, kdim], value [Sk, B, vdim] -> [Sq, B, embed_dim]; with
            batch_first [B, S, E]; without a batch [S, E]. weights [B, Sq, Sk], or [B, H, Sq, Sk] where
            they are not averaged. Nested tensors [B, *, E] are attended to without padding; they take
            neither masks nor weights.
        Types:
            float32, bfloat16, float16, alike for inputs and parameters; under autocast, autocast's.
        Args:
            key_padding_mask: [B, Sk]. Bool: True = ignore this key. Float: added to its scores.
            need_weights: also return the weights, computed in plain PyTorch, slowly and with O(Sq Sk)
                memory. False runs the fused kernels.
            attn_mask: [Sq, Sk] or [B * num_heads, Sq, Sk]. Bool: True = ignore. Float: added to the scores;
                differentiable.
            average_attn_weights: over the heads.
            is_causal: query i sees keys j <= i (aligned at the start, as in torch). Beside an attn_mask
                it says that attn_mask is this very mask, which then is not read.
            cache: what was said so far. key and value are written behind it, then all of it is attended
                to: a query stands where its own key stands, which is what is_causal and rotation go by.
                key = value = None only reads. No gradient, masks or weights.
        Errors:
            A query whose keys are all ignored gives weights of 0 and the bias of out_proj (torch: NaN).
        Raises:
            ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
            NotImplementedError: no backend takes the call; gives each one's reason.
        """
        if cache is not None:
            self._check_options("a cache", need_weights, key_padding_mask, attn_mask)
            if self._dropout_p():
                raise ValueError(f"dropout must be 0 with a cache, got {self.dropout}; eval() stops it")
            return self._forward_cached(query, key, value, cache, is_causal), None
        if key is None or value is None:
            raise ValueError("key and value must be tensors; they may be None only with a cache")
        self._check_inputs(query, key, value)
        if query.is_nested:
            self._check_options("nested tensors", need_weights, key_padding_mask, attn_mask)
            return self._forward_nested(query, key, value, is_causal), None
        q, k, v = self._project(query, key, value)
        if self.rotary_dim:
            # As in a window, the last query stands where the last key stands.
            length = max(q.shape[1], k.shape[1])
            q, k = (
                self._rotate(x, torch.arange(length - x.shape[1], length, device=x.device)[None], length)
                for x in (q, k)
            )
        mask, bias = canonical_masks(key_padding_mask, attn_mask, q, k, query.ndim == 3, is_causal)
        left, right = self._window(q, k, is_causal)
        if not need_weights:
            out = self._attend(q, k, v, mask, bias, left, right)
            return self._project_out(out, query), None
        out, weights = self._weigh(q, k, v, mask, bias, left, right)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return self._project_out(out, query), weights if query.ndim == 3 else weights[0]

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
        """q [B, Sq, H, D], k and v [B, Sk, Hk, D], as views of what the products wrote; q alone without k."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        rows = self.num_kv_heads * self.head_dim
        sizes = [self.embed_dim, rows, rows]
        if weight is not None and query is key is value:
            found = F.linear(query, weight, bias).split(sizes, dim=-1)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = weights if weight is None else weight.split(sizes)
            biases = (None, None, None) if bias is None else bias.split(sizes)
            inputs = zip((query, key, value), weights, biases, strict=True)
            found = tuple(F.linear(x, w, b) for x, w, b in inputs if x is not None)
        return tuple(self._heads(x) for x in found)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads, D] of [S, B, E], [B, S, E] or [S, E]."""
        batched = x.ndim == 3
        x = x.unflatten(-1, (-1, self.head_dim))
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _project_out(self, out: Tensor, query: Tensor) -> Tensor:
        """out [B, Sq, H, D] in the layout of query."""
        out = out.flatten(2)
        if query.ndim == 2:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1).contiguous()
        return cast(Tensor, self.out_proj(out))

    def _window(self, q: Tensor, k: Tensor, is_causal: bool) -> tuple[int, int | None]:
        """(left, right) around i + Sk - Sq. left -1 and right None: unbounded; right may be negative."""
        left, right = self.window_size
        bounds = [right] if right >= 0 else []
        if self.causal:
            bounds.append(0)
        if is_causal:
            bounds.append(q.shape[1] - k.shape[1])
        return left, min(bounds, default=None)

    def _rotate(self, x: Tensor, positions: Tensor, length: int) -> Tensor:
        """x [B, S, H, D] turned by its positions [B, S], all below length."""
        return rotate(x, *self._rotary_tables(length, x.device), positions, self.rotary_interleaved)

    def _rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [length, rotary_dim / 2] each."""
        frequencies = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device)
        frequencies = self.rotary_base ** (frequencies / -self.rotary_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        return angles.cos(), angles.sin()

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, left: int,
        right: int | None,
    ) -> Tensor:  # fmt: skip
        """The fused kernels. A key of zeros is a sink of score 0: it takes weight and gives no value."""
        hidden = right is not None and right < 0
        if self.bias_k is not None or (hidden and left >= 0):
            mask = with_window(mask, q, k, left, right)
            k, v, mask, bias = self._add_bias_kv(k, v, mask, bias)
            left, right = -1, None
        elif hidden:
            # Nobody sees the last keys. Without them the diagonal is the one that is aligned at the end.
            mask, bias = (None if x is None else x[..., :right] for x in (mask, bias))
            k, v, right = k[:, :right], v[:, :right], 0
        out = attention(
            q, k, v, window_size=(left, -1 if right is None else right), softcap=self.softcap,
            mask=mask, bias=bias, sinks=self._sinks(q), dropout_p=self._dropout_p(),
        )  # fmt: skip
        return cast(Tensor, out)

    def _sinks(self, q: Tensor) -> Tensor | None:
        return q.new_zeros(self.num_heads) if self.add_zero_attn else None

    def _weigh(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, left: int,
        right: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The same in plain PyTorch, with the weights [B, H, Sq, Sk]."""
        mask = with_window(mask, q, k, left, right)
        k, v, mask, bias = self._add_bias_kv(k, v, mask, bias)
        if self.add_zero_attn:
            k, v, mask, bias = add_key(k, v, mask, bias, k.new_zeros(1), v.new_zeros(1))
        return attention_with_weights(q, k, v, mask, bias, self.softcap, self._dropout_p())

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _add_bias_kv(
        self, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if self.bias_k is None or self.bias_v is None:
            return k, v, mask, bias
        shape = (1, 1, self.num_kv_heads, self.head_dim)
        return add_key(k, v, mask, bias, self.bias_k.view(shape), self.bias_v.view(shape))

    # ---- nested tensors ----

    def _forward_nested(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        """Rows of all sequences, one after the other, through the products and `attention_varlen`."""
        packed = {id(x): nested.pack(x) for x in (query, key, value)}
        (x_q, starts_q), (x_k, starts_k), (x_v, _) = (packed[id(x)] for x in (query, key, value))
        if is_causal and starts_q is not starts_k:
            raise ValueError("is_causal must be False with nested tensors whose query is not key, got True")
        q, k, v = self._project(x_q, x_k, x_v)
        if self.rotary_dim:
            longest = max(int(x.diff().max()) for x in (starts_q, starts_k))
            q = self._rotate(q, nested.positions(starts_q, longest), longest)
            k = self._rotate(k, nested.positions(starts_k, longest), longest)
        out = attention_varlen(
            q[0], k[0], v[0], starts_q, starts_k, causal=self.causal or is_causal,
            window_size=self.window_size, softcap=self.softcap, sinks=self._sinks(q),
            dropout_p=self._dropout_p(),
        )  # fmt: skip
        out = self.out_proj(cast(Tensor, out).flatten(1))
        return nested.unpack(out, starts_q, query)

    # ---- a cache of keys and values ----

    def new_cache(self, batch_size: int, max_length: int, **options: Any) -> KVCache:
        """An empty `KVCache` for this module, in the type and on the device of its parameters.

        Args:
            options: of `KVCache`: dtype, device, page_size, num_pages.
        """
        like = self.out_proj.weight
        options = {"dtype": like.dtype, "device": like.device, **options}
        return KVCache(batch_size, max_length, self.num_kv_heads, self.head_dim, **options)

    def _forward_cached(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, cache: KVCache, is_causal: bool
    ) -> Tensor:
        if (key is None) is not (value is None):
            raise ValueError("key and value must be given together, got one of them")
        if key is None and self.rotary_dim:
            raise ValueError("key must be given where rotary_dim is set: a query stands where its key stands")
        self._check_inputs(query, key, value)
        causal, window = self.causal or is_causal, self.window_size
        options: dict[str, Any] = {}
        if self.rotary_dim:
            if self._tables is None or len(self._tables[0]) < cache.max_length:
                self._tables = self._rotary_tables(cache.max_length, query.device)
            cos, sin = (x.to(query.device) for x in self._tables)
            options = {"cos": cos, "sin": sin, "interleaved": self.rotary_interleaved}
            if not causal and window == (-1, -1):
                # attention_decode turns queries one by one only in a window; this one hides nothing.
                window = (-1, cache.max_length)
        q, *kv = self._project(query, key, value)
        out = cache.attend(
            q, *kv, causal=causal, window_size=window, softcap=self.softcap, sinks=self._sinks(q), **options
        )
        return self._project_out(out, query)

    # ---- checks ----

    def _check_options(
        self, why: str, need_weights: bool, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """What neither nested tensors nor caches take."""
        if need_weights:
            raise ValueError(f"need_weights must be False with {why}, got True")
        for name, x in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if x is not None:
                raise ValueError(f"{name} must be None with {why}, got a mask")
        if self.bias_k is not None:
            raise ValueError(f"add_bias_kv must be False with {why}, got True")

    def _check_inputs(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> None:
        self._check_input("query", query, self.embed_dim, query)
        if key is None or value is None:
            return
        self._check_input("key", key, self.kdim, query)
        self._check_input("value", value, self.vdim, query)
        if query.is_nested:
            return
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                "key and value must share batch and length, got shapes "
                f"{list(key.shape)} and {list(value.shape)}"
            )
        at = 0 if self.batch_first else 1
        if query.ndim == 3 and query.shape[at] != key.shape[at]:
            raise ValueError(
                f"query and key must share the batch size, got shapes {list(query.shape)} and "
                f"{list(key.shape)} with batch_first={self.batch_first}"
            )

    def _check_input(self, name: str, x: Tensor, size: int, query: Tensor) -> None:
        check_tensor(name, x)
        if x.ndim != query.ndim or x.ndim not in (2, 3) or x.is_nested is not query.is_nested:
            raise ValueError(
                f"{name} must have 3 dimensions, or 2 without a batch, and be nested where query is; "
                f"got {x.ndim} beside query's {query.ndim}"
            )
        if x.size(-1) != size:
            raise ValueError(f"{name} must have {size} features, got {x.size(-1)}")


def _check_sizes(embed_dim: int, num_heads: int, num_kv_heads: int, rotary_dim: int, dropout: float) -> None:
    if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be a positive multiple of num_heads, got embed_dim={embed_dim} and "
            f"num_heads={num_heads}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
    if rotary_dim % 2 or not 0 <= rotary_dim <= embed_dim // num_heads:
        raise ValueError(
            f"rotary_dim must be even and in 0 ... head_dim = {embed_dim // num_heads}, got {rotary_dim}"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")

"""The loss of a causal language model straight from its hidden states, where the user asks for it.

Logits are the largest tensor of a training step, and are made for the loss alone. A forward pass that is
given labels then returns None for them, which is why nobody gets this unasked.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastattn.integrations.accelerate.replacement import REFUSALS, Layer, has_own, put
from fastattn.integrations.accelerate.structure import Unfit, inside, linear_of
from fastattn.integrations.accelerate.weights import Given, given_by
from fastattn.ops.linear_cross_entropy import linear_cross_entropy

_GENERATES = "transformers.generation.utils.GenerationMixin"  # a base of all causal language models
# What transformers puts around a forward: documentation, and tuples where they are asked for.
_DECORATORS = {"can_return_tuple", "auto_docstring"}
# Gemma 2's, which is an option of the op.
_SOFTCAP = """
if self.config.final_logit_softcapping is not None:
    logits = logits / self.config.final_logit_softcapping
    logits = torch.tanh(logits)
    logits = logits * self.config.final_logit_softcapping
"""


def loss_layer(name: str, module: nn.Module, asked: bool) -> Layer | None:
    """The loss of this model, whether it can be served or not; None: it has none of this kind."""
    if not any(f"{kind.__module__}.{kind.__name__}" == _GENERATES for kind in type(module).__mro__):
        return None
    try:
        if has_own(module):
            raise Unfit("its forward was replaced already")
        head_name = _head_name(type(module).forward)
        head = getattr(module, head_name)
        given = given_by(linear_of(head))
        inside(module, [head_name])
    except Unfit as reason:
        return Layer(name, "loss", module, "", str(reason)) if asked else None
    if not asked:
        return Layer(name, "loss", module, "", "only with loss=True")

    def replace(layer: Layer) -> Callable[[], None]:
        return put(layer, "forward", _forward(layer, head, given, inside(module, [head_name])))

    return Layer(name, "loss", module, "linear_cross_entropy", replace=replace)


def _forward(
    layer: Layer, head: nn.Module, given: Given, unchanged: Callable[[], bool]
) -> Callable[..., Any]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    module: Any = layer.module
    original = type(module).forward

    @wraps(original)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **named: Any) -> Any:
        ours = self is module and layer.active and labels is not None and not is_compiling()
        if not ours or not unchanged() or self.loss_function is not ForCausalLMLoss:
            if labels is not None:
                named["labels"] = labels
            return original(self, *args, **named)
        # For this one pass the head hands on what it gets, and the loss is computed from that.
        compute = _loss(layer, head, given, ForCausalLMLoss)
        with ExitStack() as stack:
            stack.enter_context(_instead(head, "forward", lambda x: x))
            stack.enter_context(_instead(self, "_loss_function", compute))
            if _softcap(self):
                stack.enter_context(_instead(self.config, "final_logit_softcapping", None))
            output = original(self, *args, labels=labels, **named)
        if isinstance(output, tuple):
            return (output[0], None, *output[2:])
        return type(output)(**{key: value for key, value in output.items() if key != "logits"})

    return forward


@contextmanager
def _instead(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute in the owner's __dict__, for a while."""
    namespace = vars(owner)
    before = {name: namespace[name]} if name in namespace else {}
    namespace[name] = value
    try:
        yield
    finally:
        del namespace[name]
        namespace.update(before)


def _softcap(model: Any) -> float:
    return getattr(model.config, "final_logit_softcapping", None) or 0.0


def _loss(layer: Layer, head: nn.Module, given: Given, original: Callable[..., Any]) -> Callable[..., Any]:
    """ForCausalLMLoss of transformers, of hidden states [B, S, K] in the place of logits."""
    softcap = _softcap(layer.module)

    def compute(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        hidden, targets = logits, shift_labels
        if targets is None:
            targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        weight, bias = given()
        try:
            loss = linear_cross_entropy(
                hidden, weight, targets.to(hidden.device), bias=bias, ignore_index=ignore_index,
                softcap=softcap, reduction="mean" if num_items_in_batch is None else "sum",
            )  # fmt: skip
        except REFUSALS as refusal:
            layer.refused[str(refusal)] += 1
        else:
            layer.calls += 1
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(loss.device)
            return loss if num_items_in_batch is None else loss / num_items_in_batch
        scores = type(head).forward(head, hidden)
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        options = {**items, "ignore_index": ignore_index, "shift_labels": shift_labels, **rest}
        return cast(Tensor, original(scores, labels, vocab_size, **options))

    return compute


# ---- which forwards do nothing with their logits but compute a loss and return them ----


@cache
def _head_name(forward: Callable[..., Any]) -> str:
    """The attribute that makes the logits.

    Raises:
        Unfit: this forward does something else with them.
    """
    unfit = Unfit("its forward is not known to compute nothing but a loss from its logits")
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
        (definition,) = ast.parse(source).body
    except (OSError, SyntaxError, TypeError, ValueError):
        raise unfit from None
    if not isinstance(definition, ast.FunctionDef):
        raise unfit
    if not {ast.unparse(x) for x in definition.decorator_list} <= _DECORATORS:
        raise unfit
    softcap = ast.dump(ast.parse(_SOFTCAP).body[0])
    definition.body = [x for x in definition.body if ast.dump(x) != softcap]
    uses = sorted(_uses(definition))
    if [use for use, _ in uses] != ["assigned", "loss", "returned"] or not uses[0][1]:
        raise unfit
    return uses[0][1]


def _uses(definition: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """What happens to the variable `logits`; with the attribute that they come from."""
    known = 0
    for node in ast.walk(definition):
        head = ""
        if isinstance(node, ast.Assign) and [ast.unparse(x) for x in node.targets] == ["logits"]:
            use, head = "assigned", _method_called(node.value)
        elif _method_called(node) == "loss_function" and _takes_logits(node):
            use = "loss"
        elif isinstance(node, ast.Return) and _takes_logits(node.value):
            use = "returned"
        else:
            continue
        known += 1
        yield use, head
    if known != sum(isinstance(node, ast.Name) and node.id == "logits" for node in ast.walk(definition)):
        yield "otherwise", ""


def _takes_logits(node: ast.AST | None) -> bool:
    """Whether it is a call with `logits` as its first argument, or by that name."""
    if not isinstance(node, ast.Call):
        return False
    arguments = [*node.args[:1], *(x.value for x in node.keywords if x.arg == "logits")]
    return [ast.unparse(x) for x in arguments] == ["logits"]


def _method_called(node: ast.AST) -> str:
    """ "lm_head" for self.lm_head(...)."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr if ast.unparse(node.func.value) == "self" else ""
    return ""

"""Formulas: the same computation in other words is recognised, another one never is."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations.accelerate.formula import formula_of, match

MLP = "lambda self, x: self.DOWN(self.ACTIVATION(self.UP(x)))"
FOUND = {"DOWN": "fc2", "ACTIVATION": "act", "UP": "fc1"}


class InOneLine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class InSteps(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """With a docstring."""
        hidden_states = self.fc1(hidden_states)
        between: Any
        between = self.act(hidden_states)
        return self.fc2(between)


class Annotated(nn.Module):
    def forward(self, x):
        up = self.fc1(x)
        up, out = self.act(up), self.fc2
        return out(up)


class Others:
    """None of these is `fc2(act(fc1(x)))`."""

    def twice(self, x):
        return self.fc2(self.act(self.fc1(self.fc1(x))))

    def residual(self, x):
        return x + self.fc2(self.act(self.fc1(x)))

    def options(self, x, scale=1.0):
        return self.fc2(self.act(self.fc1(x)))

    def swapped(self, x, y):
        return self.fc2(self.act(self.fc1(y)))

    def keywords(self, x, **options):
        return self.fc2(self.act(self.fc1(x)))

    def loops(self, x):
        for _ in range(2):
            x = self.fc2(self.act(self.fc1(x)))
        return x

    def sometimes(self, x):
        h = self.act(self.fc1(x))
        if self.training:
            h = h * 2
        return self.fc2(h)

    def nothing(self, x):
        self.fc2(self.act(self.fc1(x)))

    def side_effect(self, x):
        self.last = x
        return self.fc2(self.act(self.fc1(x)))


def _decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(self, x):
        return 2 * function(self, x)

    return wrapper


class Decorated(nn.Module):
    @_decorated
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def test_the_same_in_other_words() -> None:
    assert match(InOneLine.forward, MLP) == FOUND
    assert match(Annotated.forward, MLP) == FOUND


def test_a_declaration_is_not_that_simple() -> None:
    assert formula_of(InSteps.forward) is None


def test_others() -> None:
    for name, function in vars(Others).items():
        if callable(function):
            assert match(function, MLP) is None, name
    assert match(Decorated.forward, MLP) is None


def test_one_name_is_one_attribute() -> None:
    pattern = "lambda self, x: self.A(self.A(x))"
    assert match(lambda self, x: self.fc(self.fc(x)), pattern) is None  # a lambda has no def to read

    def same(self, x):
        return self.fc(self.fc(x))

    def different(self, x):
        return self.fc(self.act(x))

    assert match(same, pattern) == {"A": "fc"}
    assert match(different, pattern) is None


def test_a_condition_is_part_of_it() -> None:
    pattern = "lambda self, x: x.half() if x.dtype == torch.float64 else x"

    def cast(self, x):
        if x.dtype == torch.float64:
            x = x.half()
        return x

    assert match(cast, pattern) == {}


def test_globals_must_be_the_same_objects() -> None:
    pattern = "lambda x: torch.relu(x)"

    def plain(x):
        return torch.relu(x)

    assert match(plain, pattern) == {}
    scope = {"torch": torch.nn.functional}
    other = type(plain)(plain.__code__, scope)
    assert match(other, pattern) is None


def test_what_has_no_source() -> None:
    scope: dict[str, Any] = {}
    exec("def f(self, x):\n    return self.fc2(self.act(self.fc1(x)))", scope)
    assert match(scope["f"], MLP) is None
    assert match(torch.relu, MLP) is None
    assert match(None, MLP) is None

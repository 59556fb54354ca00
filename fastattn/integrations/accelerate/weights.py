"""How a served layer hands its parameters to an op: the one place where all of them do."""

from collections.abc import Callable

from torch import Tensor

from fastattn.integrations.accelerate.structure import Linear

# Asked at each call: the weight, in the form that the op is to get, and the bias.
Given = Callable[[], tuple[Tensor, Tensor | None]]


def given_by(linear: Linear) -> Given:
    """The function by which this layer gives its weight [out, in] and its bias.

    It looks them up at each call: training changes them, loading and moving a model exchanges them.
    """
    parameters = linear.parameters
    if linear.transposed:
        return lambda: (parameters["weight"].t(), parameters["bias"])  # type: ignore[union-attr]
    return lambda: (parameters["weight"], parameters["bias"])  # type: ignore[return-value]

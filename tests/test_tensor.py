"""How the core reads a tensor: by torch's exchange table, and by attributes where torch has none."""

import pytest
import torch

from fastattn.cpu._core import TYPE_CODES, core

pytestmark = pytest.mark.skipif(core is None, reason="the compiled core is missing")

BASE = torch.arange(360).view(2, 3, 4, 15)
TYPES = (*TYPE_CODES, torch.int8, torch.bool, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_both_ways_agree(dtype):
    x = BASE.to(dtype)
    for view in (x, x.transpose(1, 2), x[1:, ::2, :, 3:], x[0], x[:1].expand(5, -1, -1, -1), x[0, 0, 0, 7]):
        address, _, shape, stride = found = core.describe(view, False)
        assert found == core.describe(view, True)
        assert address == view.data_ptr()
        assert shape == list(view.shape) and stride == list(view.stride())


def test_types_have_their_own_codes():
    codes = [core.describe(BASE.to(dtype), False)[1] for dtype in TYPES]
    assert codes == list(range(len(TYPES)))


@pytest.mark.parametrize("by_attributes", [False, True])
def test_what_the_core_cannot_read_is_refused(by_attributes):
    with pytest.raises(ValueError, match="more than 4 dimensions"):
        core.describe(torch.zeros(1, 1, 1, 1, 1), by_attributes)

"""fastattn where there is no Triton: it imports and runs, and the backend says what is missing."""

CODE = """
import sys


class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Nowhere())
import torch
from fastattn import explain, linear

x, weight = torch.ones(2, 4), torch.ones(3, 4)
assert linear(x, weight).shape == (2, 3)
print(dict(explain(linear, x, weight))["triton"])
"""


def test_a_machine_without_triton(run_python):
    done = run_python(CODE, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout

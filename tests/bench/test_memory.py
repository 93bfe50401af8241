import pytest
import torch
from torch import nn

from evenstep.baselines.state_size import state_bytes, tensors_in
from evenstep.bench.measure import transient_bytes
from evenstep.train.hardware import available_memory

CPU = torch.device("cpu")


def parameter(*shape):
    p = nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    return p


def test_transient_is_the_peak_and_not_the_sum():
    def step():
        a = torch.empty(1000, dtype=torch.uint8)
        del a
        b, c = torch.empty(3000, dtype=torch.uint8), torch.empty(500, dtype=torch.uint8)
        del b
        d = torch.empty(2999, dtype=torch.uint8)
        return c, d

    assert transient_bytes(step, CPU) == 3500


def test_transient_counts_what_lives_on_only_above_the_level_before():
    kept = [torch.empty(4000, dtype=torch.uint8)]

    def step():  # frees what the step before left, then allocates as much: no more than before
        kept.clear()
        kept.append(torch.empty(4000, dtype=torch.uint8))

    assert transient_bytes(step, CPU) == 0
    assert transient_bytes(lambda: kept.append(torch.empty(64, dtype=torch.uint8)), CPU) == 64


def test_transients_of_known_optimizers():
    size = 64 * 1024 * 4
    p = parameter(64, 1024)
    fused = torch.optim.AdamW([p], fused=True)
    loop = torch.optim.AdamW([p], foreach=False)
    foreach = torch.optim.AdamW([p], foreach=True)
    for optimizer in (fused, loop, foreach):
        optimizer.step()
    assert transient_bytes(fused.step, CPU) < 100  # in place, scalars aside
    assert 2 * size <= transient_bytes(loop.step, CPU) < 2 * size + 100  # the root, and the root over its correction
    assert size <= transient_bytes(foreach.step, CPU) < size + 100


def test_state_of_known_optimizers():
    p, q = parameter(64, 128), parameter(10)
    adamw = torch.optim.AdamW([p, q], fused=True)
    adamw.step()
    n = p.numel() + q.numel()
    assert state_bytes(adamw.state_dict()["state"], [p, q, p.grad, q.grad]) == 8 * n + 2 * 4  # and two step counts
    assert state_bytes({"a": p, "b": [p.grad]}, [p, p.grad]) == 0


def test_shared_memory_counts_once_and_objects_are_looked_into():
    class Projector:
        def __init__(self):
            self.matrix = torch.empty(10)
            self.pair = (torch.empty(3), {"x": torch.empty(4)})

    whole = torch.empty(100)
    state = {0: {"projector": Projector(), "view": whole[:10], "other": whole[50:], "rank": 4, "none": None}}
    assert sorted(t.numel() for t in tensors_in(state)) == [3, 4, 10, 10, 50]
    assert state_bytes(state) == 4 * (10 + 3 + 4 + 100)


def test_tensor_subclasses_count_by_what_they_are_made_of():
    eight = pytest.importorskip("torchao.optim.subclass_8bit")
    x = eight.OptimState8bit.zeros((64, 256), signed=True, block_size=256)
    assert state_bytes([x]) == 64 * 256 + 64 * 4 + 256 * 4  # codes, scales, the map


def test_available_memory_is_positive_and_at_most_the_machines():
    from evenstep.train.hardware import total_memory

    assert 0 < available_memory(CPU) <= total_memory(CPU)


@pytest.mark.gpu
def test_transient_on_a_gpu():
    device = torch.device("cuda")
    kept = torch.empty(2**20, device=device)
    found = transient_bytes(lambda: kept.add(1).mul_(2), device)
    assert found == kept.nbytes

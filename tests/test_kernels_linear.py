"""Linear layers and their gradients in C, against float64 products of the same numbers."""

import pytest
import torch

from rlhf_ray.cpu import kernels
from rlhf_ray.cpu.packed_linear import GELU, GELU_AND_SLOPE, NOTHING, product, tiles_of

pytestmark = pytest.mark.usefixtures("processor_with_blocks")
ROUNDED = {"rtol": 2**-8, "atol": 1e-3}  # to bfloat16


def numbers(*shape):
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("outputs, inputs", [(16, 32), (50, 64), (1, 96), (33, 1056)])
def test_tiles_are_pairs_of_inputs_beside_16_outputs(dtype, outputs_first, outputs, inputs):
    weight = torch.randn(outputs, inputs, dtype=dtype)
    stored = weight if outputs_first else weight.t().contiguous().t()
    tiles = tiles_of(stored, torch.full((-(-outputs // 32) * 2, inputs // 32, 16, 16, 2), torch.nan).bfloat16())
    padded = torch.zeros(len(tiles) * 16, inputs, dtype=torch.bfloat16)
    padded[:outputs] = weight.bfloat16()
    assert torch.equal(tiles, padded.view(-1, 16, inputs // 32, 16, 2).permute(0, 2, 3, 1, 4))


# Lines: fewer and more than a block's 32 and a piece's 256; inputs beyond what one pass sums; outputs that end within a vector, a
# block and a piece; and a result larger than the caches.
SHAPES = [(1, 32, 1), (33, 64, 17), (64, 544, 50), (300, 96, 300), (257, 1056, 31), (4100, 32, 544)]


@pytest.mark.parametrize("lines, inputs, outputs", SHAPES)
def test_a_layers_output_and_its_gradients(threads, lines, inputs, outputs):
    torch.manual_seed(0)
    x, weight, bias, gradient = (
        numbers(lines, inputs),
        numbers(outputs, inputs),
        numbers(outputs),
        numbers(lines, outputs),
    )
    weight /= 8
    tiles = tiles_of(weight)
    wide = x.double() @ weight.double().T
    torch.testing.assert_close(product(x, tiles, None, outputs).double(), wide, **ROUNDED)
    torch.testing.assert_close(product(x, tiles, bias, outputs).double(), wide + bias.double(), **ROUNDED)

    by_x, slope = torch.full_like(x, torch.nan), numbers(lines, inputs)
    backward = kernels.kernel("linear_by_input")
    expected = gradient.double() @ weight.double()
    for factor in (None, slope):
        backward(gradient, tiles, factor, by_x, lines, inputs, outputs)
        torch.testing.assert_close(by_x.double(), expected if factor is None else expected * slope.double(), **ROUNDED)

    for left, right in ((gradient, x), (x, gradient)):
        total = torch.full((left.shape[1], right.shape[1]), torch.nan)
        expected = left.double().T @ right.double()
        for more in (0, 1):  # in place of what was there, and added to it
            kernels.kernel("linear_by_weight")(left, right, total, lines, *total.shape, more)
            torch.testing.assert_close(total.double(), expected * (1 + more), rtol=1e-5, atol=2e-6 * lines)


@pytest.mark.parametrize("lines, inputs, outputs", [(3, 32, 262_200), (300, 608, 450), (40, 2080, 160)])
def test_gradients_of_weights_too_large_for_one_pass(threads, lines, inputs, outputs):
    """More weights than are put in order at once, and more sums than stay near a core, in either direction."""
    torch.manual_seed(0)
    x, weight, gradient = numbers(lines, inputs), numbers(outputs, inputs) / 64, numbers(lines, outputs)
    by_x = torch.empty_like(x)
    kernels.kernel("linear_by_input")(gradient, tiles_of(weight), None, by_x, lines, inputs, outputs)
    torch.testing.assert_close(by_x.double(), gradient.double() @ weight.double(), **ROUNDED)
    for left, right in ((gradient, x), (x, gradient)):
        total = torch.empty(left.shape[1], right.shape[1])
        kernels.kernel("linear_by_weight")(left, right, total, lines, *total.shape, 0)
        torch.testing.assert_close(total.double(), left.double().T @ right.double(), rtol=1e-5, atol=2e-6 * lines)


@pytest.mark.parametrize("lines, outputs", [(1, 1), (40, 50), (300, 96)])
def test_gelu_and_its_derivative_behind_a_layer(threads, lines, outputs):
    torch.manual_seed(0)
    x, weight = 3 * numbers(lines, 64), numbers(outputs, 64) / 4
    u = (x.double() @ weight.double().T).requires_grad_()
    torch.nn.functional.gelu(u, approximate="tanh").sum().backward()
    slope = torch.full((lines, outputs), torch.nan).bfloat16()
    found = product(x, tiles_of(weight), None, outputs, GELU_AND_SLOPE, slope=slope)
    torch.testing.assert_close(found.double(), torch.nn.functional.gelu(u.detach(), approximate="tanh"), **ROUNDED)
    torch.testing.assert_close(slope.double(), u.grad, **ROUNDED)
    assert torch.equal(found, product(x, tiles_of(weight), None, outputs, GELU))


def test_a_lines_result_is_its_own_and_a_threads_number_changes_none():
    """What keeps a run's bits the same whatever stands beside a sequence."""
    x, weight, gradient = numbers(600, 1056), numbers(100, 1056), numbers(600, 100)
    tiles, found = tiles_of(weight), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        by_x, total = torch.empty_like(x), torch.empty(100, 1056)
        kernels.kernel("linear_by_input")(gradient, tiles, None, by_x, 600, 1056, 100)
        kernels.kernel("linear_by_weight")(gradient, x, total, 600, 100, 1056, 0)
        found.append((product(x, tiles, None, 100), by_x, total))
    torch.set_num_threads(before)
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(each, found[0], strict=True))
    for rows in (slice(0, 1), slice(5, 40), slice(300, 600)):
        assert torch.equal(product(x[rows], tiles, None, 100, NOTHING), found[0][0][rows])
